//! A map in pieces, for a store whose values are small.
//!
//! The *head* is a few bytes and names the newest version. The *base* of that version holds
//! everything but the devices' spans, and of each device the version under which its spans were last
//! written; most changes leave most devices as they are. Base and spans are cut into chunks, and each
//! carries a checksum: a base that refers to spans of another moment is noticed.

use mirror_net::ids::{DeviceId, MapVersion};
use mirror_net::map::{DistributionMap, Span};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The version of this form.
const FORMAT: u32 = 1;
/// Bytes in a chunk at most: a request of etcd may have 1.5 MiB.
pub(super) const CHUNK_BYTES: usize = 512 << 10;

/// A text that is stored in chunks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Text {
    /// The version under which it was written.
    pub version: MapVersion,
    pub chunks: u32,
    pub blake3: String,
}

/// What makes a version the newest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head {
    format: u32,
    pub base: Text,
}

/// A map without its devices' spans.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Base {
    /// What led to this version.
    why: Vec<String>,
    spans: BTreeMap<DeviceId, Text>,
    map: DistributionMap,
}

/// A map that is not what was written; for people.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Damaged(String);

/// Where the pieces of one version are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Places {
    pub head: Head,
    pub spans: BTreeMap<DeviceId, Text>,
}

/// A key, without the store's prefix, and its value.
pub(super) type Entry = (String, Vec<u8>);

/// The key of the head.
pub(super) const HEAD: &str = "head";
/// What the keys of all bases begin with.
pub(super) const BASES: &str = "base@";
/// What the keys of all devices' spans begin with.
pub(super) const DEVICES: &str = "device/";

fn base_prefix(version: MapVersion) -> String {
    format!("{BASES}{:012}/", version.0)
}

fn device_prefix(device: DeviceId, version: MapVersion) -> String {
    format!("{DEVICES}{:08}@{:012}/", device.0, version.0)
}

/// The version in a key of a base or of a device's spans.
pub(super) fn version_of(key: &str) -> Option<MapVersion> {
    let (_, rest) = key.rsplit_once('@')?;
    rest.split('/').next()?.parse().ok().map(MapVersion)
}

impl Text {
    fn new(version: MapVersion, text: &[u8]) -> Self {
        let blake3 = blake3::hash(text).to_hex().to_string();
        Self { version, chunks: text.chunks(CHUNK_BYTES).len() as u32, blake3 }
    }

    fn keys(&self, prefix: &str) -> impl Iterator<Item = String> {
        (0..self.chunks).map(move |chunk| format!("{prefix}{chunk:04}"))
    }

    fn entries(&self, prefix: &str, text: &[u8]) -> Vec<Entry> {
        self.keys(prefix).zip(text.chunks(CHUNK_BYTES).map(<[u8]>::to_vec)).collect()
    }

    fn check<'a>(&self, what: &str, text: &'a [u8]) -> Result<&'a [u8], Damaged> {
        if blake3::hash(text).to_hex().as_str() == self.blake3 {
            return Ok(text);
        }
        Err(Damaged(format!("the checksum of {what} does not match")))
    }
}

impl Head {
    pub fn version(&self) -> MapVersion {
        self.base.version
    }

    pub fn parse(text: &[u8]) -> Result<Self, Damaged> {
        let head: Self = serde_json::from_slice(text).map_err(|error| Damaged(error.to_string()))?;
        if head.format == FORMAT {
            return Ok(head);
        }
        Err(Damaged(format!("it has format {}, this program reads format {FORMAT}", head.format)))
    }

    pub fn to_text(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it is plain data")
    }

    /// The keys whose values, one after the other, are the base.
    pub fn base_keys(&self) -> Vec<String> {
        self.base.keys(&base_prefix(self.version())).collect()
    }

    /// Where the spans are.
    pub fn places(&self, base: &[u8]) -> Result<Places, Damaged> {
        let base: Base = self.read(base)?;
        Ok(Places { head: self.clone(), spans: base.spans })
    }

    fn read(&self, base: &[u8]) -> Result<Base, Damaged> {
        let base = self.base.check("the map", base)?;
        serde_json::from_slice(base).map_err(|error| Damaged(error.to_string()))
    }
}

impl Places {
    /// Where the spans of a base without a head are; for the maps of the history.
    pub fn of_history(base: &[u8]) -> Result<BTreeSet<(DeviceId, MapVersion)>, Damaged> {
        let base: Base = serde_json::from_slice(base).map_err(|error| Damaged(error.to_string()))?;
        Ok(base.spans.iter().map(|(device, text)| (*device, text.version)).collect())
    }

    /// Every device, and the keys whose values, one after the other, are its spans.
    pub fn span_keys(&self) -> impl Iterator<Item = (DeviceId, Vec<String>)> {
        self.spans.iter().map(|(device, text)| {
            let prefix = device_prefix(*device, text.version);
            (*device, text.keys(&prefix).collect())
        })
    }

    /// The map, from the values of the keys.
    pub fn join(&self, base: &[u8], spans: &BTreeMap<DeviceId, Vec<u8>>) -> Result<DistributionMap, Damaged> {
        let mut map = self.head.read(base)?.map;
        for device in &mut map.devices {
            let missing = || Damaged(format!("the spans of device {} are missing", device.name));
            let (place, text) = self.spans.get(&device.id).zip(spans.get(&device.id)).ok_or_else(missing)?;
            let text = place.check(&format!("the spans of device {}", device.name), text)?;
            device.spans =
                serde_json::from_slice::<Vec<Span>>(text).map_err(|error| Damaged(error.to_string()))?;
        }
        if map.version != self.head.version() {
            return Err(Damaged(format!(
                "it is map {}, and the head names map {}",
                map.version,
                self.head.version()
            )));
        }
        map.validate().map_err(|error| Damaged(error.to_string()))?;
        Ok(map)
    }
}

/// Cuts a map into pieces: where they are, and what has to be written before the head is.
pub(super) fn split(before: Option<&Places>, map: &DistributionMap, why: &[String]) -> (Places, Vec<Entry>) {
    let mut entries = Vec::new();
    let mut spans = BTreeMap::new();
    let mut bare = map.clone();
    for device in &mut bare.devices {
        let text = serde_json::to_vec(&std::mem::take(&mut device.spans)).expect("it is plain data");
        let new = Text::new(map.version, &text);
        let old = before.and_then(|before| before.spans.get(&device.id));
        let place = match old.filter(|old| (old.chunks, &old.blake3) == (new.chunks, &new.blake3)) {
            Some(old) => old.clone(),
            None => {
                entries.extend(new.entries(&device_prefix(device.id, map.version), &text));
                new
            }
        };
        spans.insert(device.id, place);
    }
    let base = Base { why: why.to_vec(), spans: spans.clone(), map: bare };
    let base = serde_json::to_vec(&base).expect("it is plain data");
    let text = Text::new(map.version, &base);
    entries.extend(text.entries(&base_prefix(map.version), &base));
    (Places { head: Head { format: FORMAT, base: text }, spans }, entries)
}

/// What the keys of a device's spans begin with.
pub(super) fn spans_prefix((device, version): (DeviceId, MapVersion)) -> String {
    device_prefix(device, version)
}

/// What the keys of a version's base begin with.
pub(super) fn history_prefix(version: MapVersion) -> String {
    base_prefix(version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::ids::{AttachId, ClusterId, Incarnation, ProcessId, SliceEpoch, SliceIndex};
    use mirror_net::map::SegmentSlots;
    use mirror_net::map::layout::{DiskSpec, NodeSpec, pairs};

    /// A map whose devices have as many spans as slices.
    fn map(slices: u32) -> DistributionMap {
        let slots = SegmentSlots { primary: slices, secondary: slices, unmirrored: 1 };
        let node = |index: u64| NodeSpec {
            name: format!("n{index}"),
            address: format!("10.0.0.{index}:7301"),
            power: None,
            switch: None,
            disks: vec![DiskSpec {
                name: "d1".into(),
                slots,
                block_bytes: 512,
                incarnation: Incarnation { attach: AttachId(index), process: ProcessId(index) },
            }],
            spare: false,
            devices: Default::default(),
        };
        let mut map = pairs(ClusterId::default(), "lab", 1 << 20, &[node(1), node(2)]).unwrap();
        map.version = MapVersion(2);
        for device in &mut map.devices {
            let whole = device.spans[0].clone();
            let one = |slice| Span {
                first: SliceIndex(slice),
                count: 1,
                epoch: SliceEpoch(1 + u64::from(slice % 2)),
                ..whole.clone()
            };
            device.spans = (0..device.slices).map(one).collect();
        }
        map.validate().unwrap();
        map
    }

    fn join(places: &Places, stored: &BTreeMap<String, Vec<u8>>) -> Result<DistributionMap, Damaged> {
        let all =
            |keys: Vec<String>| keys.iter().filter_map(|key| stored.get(key)).flatten().copied().collect();
        let base: Vec<u8> = all(places.head.base_keys());
        let again = Head::parse(&places.head.to_text())?.places(&base)?;
        assert_eq!(again, *places);
        let spans = again.span_keys().map(|(device, keys)| (device, all(keys))).collect();
        again.join(&base, &spans)
    }

    #[test]
    fn a_map_is_cut_into_small_pieces_and_comes_back() {
        for slices in [1, 15_000] {
            let map = map(slices);
            let (places, entries) = split(None, &map, &["because".into()]);
            assert!(entries.iter().all(|(_, value)| value.len() <= CHUNK_BYTES));
            assert_eq!(entries.len() > 6, slices > 1, "the long one is longer than a piece");
            assert!(entries.iter().all(|(key, _)| version_of(key) == Some(map.version)));
            assert_eq!(join(&places, &entries.into_iter().collect()), Ok(map));
        }
    }

    #[test]
    fn only_what_changed_is_written_again() {
        let first = map(4);
        let (places, entries) = split(None, &first, &[]);
        let mut stored: BTreeMap<_, _> = entries.into_iter().collect();
        let mut next = first.clone();
        next.version = MapVersion(3);
        next.devices[1].spans[0].epoch = SliceEpoch(3);
        let (next_places, entries) = split(Some(&places), &next, &[]);
        let keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
        let device = next.devices[1].id.0;
        assert_eq!(keys, [&format!("device/{device:08}@000000000003/0000"), "base@000000000003/0000"]);
        stored.extend(entries);
        assert_eq!(join(&next_places, &stored), Ok(next));
        assert_eq!(join(&places, &stored), Ok(first), "the map before is still there");
        let base =
            next_places.head.base_keys().iter().flat_map(|key| stored[key].clone()).collect::<Vec<_>>();
        let used = Places::of_history(&base).unwrap();
        assert!(used.contains(&(next_places.span_keys().nth(1).unwrap().0, MapVersion(3))));
        assert!(used.contains(&(next_places.span_keys().next().unwrap().0, MapVersion(2))));
    }

    #[test]
    fn pieces_that_do_not_belong_together_are_noticed() {
        let map = map(4);
        let (places, entries) = split(None, &map, &[]);
        let stored: BTreeMap<_, _> = entries.into_iter().collect();
        for key in stored.keys() {
            let mut damaged = stored.clone();
            damaged.get_mut(key).unwrap()[40] ^= 1;
            let is_base = key.starts_with(BASES);
            let base: Vec<u8> = places.head.base_keys().iter().flat_map(|key| damaged[key].clone()).collect();
            let error = match places.head.places(&base) {
                Err(error) => error,
                Ok(places) => join(&places, &damaged).unwrap_err(),
            };
            assert!(error.to_string().contains("checksum"), "{error}");
            assert_eq!(error.to_string().contains("the map"), is_base, "{error}");
        }
        let head = places.head.to_text();
        let other = String::from_utf8(head).unwrap().replace("\"format\":1", "\"format\":2");
        let error = Head::parse(other.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "it has format 2, this program reads format 1");
    }
}
