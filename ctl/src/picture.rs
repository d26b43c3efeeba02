//! Pictures of the map: nodes with their disks and segments, who mirrors whom, failure sets as frames.

use mirror_net::config::format_bytes;
use mirror_net::format::alloc::Segment;
use mirror_net::ids::{DiskId, NodeId};
use mirror_net::map::{Disk, DistributionMap, Node, ReplicaState};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// Sizes of the parts, in pixels.
const BOX_WIDTH: f64 = 190.0;
const DISK_HEIGHT: f64 = 26.0;
const HEAD_HEIGHT: f64 = 24.0;
/// Between nodes: lines run there.
const GAP: f64 = 56.0;
/// Between the frame of a set and its nodes, and above them for its name.
const MARGIN: f64 = 34.0;

/// Nodes beside each other, at most, where there are several sets.
const COLUMNS_MAX: usize = 10;
const LEGEND_WIDTH: f64 = 1010.0;

/// What one node has of another's primaries.
#[derive(Clone, Copy, Default, Debug)]
struct Mirrored {
    slices: u64,
    /// Those whose copy is not in sync.
    behind: u64,
}

/// The map as it is drawn.
struct Picture<'a> {
    map: &'a DistributionMap,
    /// Failure sets by name, each with its nodes; one without a name if nodes name none.
    sets: BTreeMap<String, Vec<&'a Node>>,
    /// From the primary's node to the mirror's.
    mirrors: BTreeMap<(NodeId, NodeId), Mirrored>,
    /// Slots that hold a copy, and those of them whose copy is not in sync.
    used: HashMap<(DiskId, Segment), (u64, u64)>,
}

impl<'a> Picture<'a> {
    fn of(map: &'a DistributionMap) -> Self {
        let mut sets: BTreeMap<String, Vec<&Node>> = BTreeMap::new();
        for node in &map.nodes {
            let names = [("power", &node.power), ("switch", &node.switch)];
            let named = names.iter().filter_map(|(kind, name)| Some(format!("{kind} {}", name.as_ref()?)));
            sets.entry(named.collect::<Vec<_>>().join(", ")).or_default().push(node);
        }
        let mut mirrors: BTreeMap<(NodeId, NodeId), Mirrored> = BTreeMap::new();
        let mut used: HashMap<(DiskId, Segment), (u64, u64)> = HashMap::new();
        for span in map.devices.iter().flat_map(|device| &device.spans) {
            let count = u64::from(span.count);
            for (position, copy) in span.replicas.iter().enumerate() {
                let behind = if copy.state == ReplicaState::InSync { 0 } else { count };
                let used = used.entry((copy.disk, copy.segment)).or_default();
                *used = (used.0 + count, used.1 + behind);
                let ends = (map.node_of(span.primary().disk), map.node_of(copy.disk));
                if let ((Some(home), Some(mirror)), true) = (ends, position > 0) {
                    let mirrored = mirrors.entry((home, mirror)).or_default();
                    mirrored.slices += count;
                    mirrored.behind += behind;
                }
            }
        }
        Self { map, sets, mirrors, used }
    }

    fn disks(&self, node: NodeId) -> impl Iterator<Item = &'a Disk> {
        self.map.disks.iter().filter(move |disk| disk.node == node)
    }

    fn bytes(&self, slices: u64) -> String {
        format_bytes(slices * u64::from(self.map.slice_bytes))
    }

    fn box_height(&self, node: NodeId) -> f64 {
        HEAD_HEIGHT + DISK_HEIGHT * self.disks(node).count() as f64 + 6.0
    }
}

/// Where a node's box is.
#[derive(Clone, Copy, Debug)]
struct Place {
    x: f64,
    y: f64,
    height: f64,
}

impl Place {
    fn middle(&self) -> (f64, f64) {
        (self.x + BOX_WIDTH / 2.0, self.y + self.height / 2.0)
    }

    /// Where a line from the middle towards a point leaves the box.
    fn edge(&self, towards: (f64, f64)) -> (f64, f64) {
        let (x, y) = self.middle();
        let (dx, dy) = (towards.0 - x, towards.1 - y);
        let (wide, high) = (BOX_WIDTH / 2.0 / dx.abs().max(0.001), self.height / 2.0 / dy.abs().max(0.001));
        let part = wide.min(high).min(1.0);
        (x + dx * part, y + dy * part)
    }
}

/// The map as an SVG document.
pub fn svg(map: &DistributionMap) -> String {
    let picture = Picture::of(map);
    let height = map.nodes.iter().map(|node| picture.box_height(node.id)).fold(0.0, f64::max);
    let mut places: HashMap<NodeId, Place> = HashMap::new();
    let mut frames = String::new();
    // Few sets are bands below each other, so that what mirrors across them is near; many flow like text.
    let banded = picture.sets.len() <= 3;
    let (mut left, mut top, mut row_height, mut width) = (20.0, 60.0, 0.0_f64, LEGEND_WIDTH);
    for (index, (name, nodes)) in picture.sets.iter().enumerate() {
        let columns = match picture.sets.len() {
            // Even, so that pairs are not torn apart.
            1 => ((nodes.len() as f64).sqrt().ceil() as usize).next_multiple_of(2),
            _ => nodes.len().min(COLUMNS_MAX),
        };
        let frame_width = columns as f64 * (BOX_WIDTH + GAP) - GAP + 2.0 * MARGIN;
        let full = left > 20.0 && left + frame_width > COLUMNS_MAX as f64 * (BOX_WIDTH + GAP);
        if index > 0 && (banded || full) {
            (left, top, row_height) = (20.0, top + row_height + GAP, 0.0);
        }
        let rows = nodes.len().div_ceil(columns);
        for (place, node) in nodes.iter().enumerate() {
            let (column, row) = ((place % columns) as f64, (place / columns) as f64);
            let x = left + MARGIN + column * (BOX_WIDTH + GAP);
            let y = top + MARGIN + row * (height + GAP);
            places.insert(node.id, Place { x, y, height: picture.box_height(node.id) });
        }
        let frame_height = rows as f64 * (height + GAP) - GAP + 2.0 * MARGIN;
        if !name.is_empty() {
            let _ = writeln!(
                frames,
                r##"<rect x="{left}" y="{top}" width="{frame_width}" height="{frame_height}" rx="10" fill="#f7f7f2" stroke="#999988"/>
<text x="{}" y="{}" class="set">{}</text>"##,
                left + 12.0,
                top + 20.0,
                escape(name)
            );
        }
        left += frame_width + GAP;
        width = width.max(left - GAP + 20.0);
        row_height = row_height.max(frame_height);
    }
    let bottom = top + row_height + 20.0;
    let title = format!("cluster {}, map {}", map.cluster_name, map.version);
    let mut text = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{bottom:.0}" viewBox="0 0 {width:.0} {bottom:.0}" font-family="sans-serif" font-size="12">
<style>.set {{ fill: #666655; font-size: 14px }} .node {{ font-weight: bold; font-size: 13px }} .small {{ font-size: 10px }}</style>
<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#445566"/></marker></defs>
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="24" font-size="16">{}</text>
"##,
        escape(&title)
    );
    text += &legend();
    text += &frames;
    let most = picture.mirrors.values().map(|mirrored| mirrored.slices).max().unwrap_or(1);
    for ((home, mirror), mirrored) in &picture.mirrors {
        if let (Some(from), Some(to)) = (places.get(home), places.get(mirror)) {
            text += &line_svg(&picture, *from, *to, *mirrored, most);
        }
    }
    // Lines that pass a box go behind it.
    for node in &map.nodes {
        if let Some(place) = places.get(&node.id) {
            text += &node_svg(&picture, node, *place);
        }
    }
    text + "</svg>\n"
}

fn legend() -> String {
    let parts = [
        ("#4a7fb5", "primary segment"),
        ("#6fa86f", "secondary segment"),
        ("#b0a080", "unmirrored"),
        ("#d9534f", "not in sync"),
        ("#ffffff", "free"),
    ];
    let mut text = String::new();
    for (index, (colour, name)) in parts.iter().enumerate() {
        let x = 20 + index * 150;
        let _ = writeln!(
            text,
            r##"<rect x="{x}" y="36" width="14" height="12" fill="{colour}" stroke="#888888"/><text x="{}" y="46">{name}</text>"##,
            x + 19
        );
    }
    text + "<text x=\"770\" y=\"46\">arrow: from the primary to its mirror</text>\n"
}

fn node_svg(picture: &Picture<'_>, node: &Node, place: Place) -> String {
    let Place { x, y, height } = place;
    let mut text = format!(
        r##"<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{height}" rx="5" fill="white" stroke="#333333"/>
<text x="{}" y="{}" class="node">{}</text>
"##,
        x + 8.0,
        y + 17.0,
        escape(&node.name)
    );
    let inside = BOX_WIDTH - 60.0;
    for (index, disk) in picture.disks(node.id).enumerate() {
        let top = y + HEAD_HEIGHT + index as f64 * DISK_HEIGHT;
        let label = match (&disk.failed, disk.spare) {
            (Some(_), _) => format!("{} failed", disk.name),
            (None, true) => format!("{} spare", disk.name),
            (None, false) => disk.name.clone(),
        };
        let _ = writeln!(
            text,
            r##"<text x="{}" y="{}" class="small">{}</text>"##,
            x + 6.0,
            top + 13.0,
            escape(&label)
        );
        let mut at = x + 54.0;
        for (segment, colour) in
            [(Segment::Primary, "#4a7fb5"), (Segment::Secondary, "#6fa86f"), (Segment::Unmirrored, "#b0a080")]
        {
            let slots = u64::from(disk.slots.of(segment));
            let scale = inside / (disk.slots.total() as f64).max(1.0);
            let wide = slots as f64 * scale;
            let (used, behind) = picture.used.get(&(disk.id, segment)).copied().unwrap_or_default();
            let border = if disk.failed.is_some() { "#d9534f" } else { "#888888" };
            let dashes = if disk.spare { r#" stroke-dasharray="3 2""# } else { "" };
            let bar = |from: f64, slots: u64, fill: &str| {
                format!(
                    r##"<rect x="{from:.1}" y="{top}" width="{:.1}" height="16" fill="{fill}"/>"##,
                    slots as f64 * scale
                )
            };
            if used > behind {
                text += &bar(at, used - behind, colour);
            }
            if behind > 0 {
                text += &bar(at + (used - behind) as f64 * scale, behind, "#d9534f");
            }
            let _ = writeln!(
                text,
                r##"<rect x="{at:.1}" y="{top}" width="{wide:.1}" height="16" fill="none" stroke="{border}"{dashes}><title>{}: {segment:?}, {} of {}</title></rect>"##,
                escape(&picture.map.disk_name(disk.id)),
                picture.bytes(used),
                picture.bytes(slots)
            );
            at += wide;
        }
    }
    text
}

/// A curve to the right of the straight line, so that both directions are seen.
fn line_svg(picture: &Picture<'_>, from: Place, to: Place, mirrored: Mirrored, most: u64) -> String {
    let (start, end) = (from.middle(), to.middle());
    let (dx, dy) = (end.0 - start.0, end.1 - start.1);
    let length = dx.hypot(dy).max(1.0);
    let bend = 18.0 + length * 0.06;
    let middle = ((start.0 + end.0) / 2.0 - dy / length * bend, (start.1 + end.1) / 2.0 + dx / length * bend);
    let (start, end) = (from.edge(middle), to.edge(middle));
    let wide = 0.8 + 2.7 * mirrored.slices as f64 / most.max(1) as f64;
    let colour = if mirrored.behind > 0 { "#d9534f" } else { "#445566" };
    let behind = match mirrored.behind {
        0 => String::new(),
        behind => format!(", {} not in sync", picture.bytes(behind)),
    };
    format!(
        r##"<path d="M{:.1} {:.1} Q{:.1} {:.1} {:.1} {:.1}" fill="none" stroke="{colour}" stroke-width="{wide:.1}" stroke-opacity="0.7" marker-end="url(#end)"><title>{}{behind}</title></path>
"##,
        start.0,
        start.1,
        middle.0,
        middle.1,
        end.0,
        end.1,
        picture.bytes(mirrored.slices)
    )
}

/// The map for Graphviz.
pub fn dot(map: &DistributionMap) -> String {
    let picture = Picture::of(map);
    let mut text = "digraph map {\n  rankdir=LR; node [shape=box, fontname=\"sans-serif\"];\n".to_owned();
    for (index, (name, nodes)) in picture.sets.iter().enumerate() {
        let framed = !name.is_empty();
        if framed {
            let _ = writeln!(text, "  subgraph cluster_{index} {{\n    label={};", quoted(name));
        }
        for node in nodes {
            let mut label = node.name.clone();
            let mut broken = false;
            for disk in picture.disks(node.id) {
                let used = |segment| picture.used.get(&(disk.id, segment)).copied().unwrap_or_default();
                let [primary, secondary, unmirrored] = Segment::ALL.map(used);
                let state = match (&disk.failed, disk.spare) {
                    (Some(_), _) => " failed",
                    (None, true) => " spare",
                    (None, false) => "",
                };
                broken |= disk.failed.is_some() || primary.1 + secondary.1 + unmirrored.1 > 0;
                let parts = [primary, secondary, unmirrored].map(|(slices, _)| picture.bytes(slices));
                let _ = write!(label, "\n{}{state}: {}", disk.name, parts.join(" / "));
            }
            let colour = if broken { ", color=red" } else { "" };
            let _ = writeln!(text, "    {} [label={}{colour}];", quoted(&node.name), quoted(&label));
        }
        if framed {
            text += "  }\n";
        }
    }
    for ((home, mirror), mirrored) in &picture.mirrors {
        let colour = if mirrored.behind > 0 { ", color=red" } else { "" };
        let _ = writeln!(
            text,
            "  {} -> {} [label={}{colour}];",
            quoted(&map.node_name(*home)),
            quoted(&map.node_name(*mirror)),
            quoted(&picture.bytes(mirrored.slices))
        );
    }
    text + "}\n"
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_out_of_a_picture() {
        assert_eq!(escape("<a & \"b\">"), "&lt;a &amp; &quot;b&quot;&gt;");
        assert_eq!(quoted("a \"b\"\n\\"), "\"a \\\"b\\\"\\n\\\\\"");
    }
}
