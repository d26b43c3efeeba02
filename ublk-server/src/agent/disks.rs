//! The node's disks: those of the cluster file, and those that were added while it ran.
//!
//! What is added is remembered in the state directory, since the cluster file of this machine need not name it yet. Once
//! it does, the two have to agree.

use super::state::StateDir;
use crate::ring::disk::DiskFile;
use crate::storage::{Candidate, DiskError, prepare};
use anyhow::Context;
use mirror_net::config::{self, Segments};
use mirror_net::control::{DiskContent, DiskInventory, FormatOrder};
use mirror_net::engine::LocalDisk;
use mirror_net::ids::{AttachId, ClusterId, DiskId, NodeId};
use mirror_net::map::DistributionMap;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A disk that was added while the node ran.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddedDisk {
    /// Its name.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
}

/// A disk ready for the I/O thread.
pub type Opened = (LocalDisk, DiskFile);

/// Why a disk is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    /// The cluster file names it.
    File,
    /// It was added, and is opened again after a restart.
    Added,
    /// It was added and has left the map: it is forgotten after a restart.
    Left,
}

#[derive(Clone)]
struct Held {
    candidate: Arc<Candidate>,
    origin: Origin,
    /// The I/O thread has it, by that id.
    in_service: Option<DiskId>,
    /// Its id, where a map is awaited that lists it.
    awaited: Option<DiskId>,
    /// Why it cannot be opened for service, as was found when the process began.
    broken: Option<String>,
}

impl Held {
    fn new(candidate: Candidate, origin: Origin) -> Self {
        Self { candidate: Arc::new(candidate), origin, in_service: None, awaited: None, broken: None }
    }

    fn inventory(&self) -> DiskInventory {
        let mut inventory = self.candidate.inventory();
        if let Some(why) = &self.broken {
            inventory.content = DiskContent::Unusable { why: why.clone() };
        }
        inventory
    }

    fn leave(&mut self) {
        if self.origin == Origin::Added {
            self.origin = Origin::Left;
        }
    }

    fn keep(&mut self) {
        if self.origin == Origin::Left {
            self.origin = Origin::Added;
        }
    }
}

/// All disks that this process holds.
#[derive(Clone)]
pub struct Disks {
    held: Vec<Held>,
    /// Added ones that could not be opened.
    absent: Vec<AddedDisk>,
}

impl Disks {
    /// Opens the disks of the cluster file, and what was added since. An added one that does not come for so long is left
    /// out: it cannot be taken out of a file, and must not keep the others from serving.
    pub fn open(
        file: &[config::DiskFile],
        added: Vec<AddedDisk>,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let until = Instant::now() + patience;
        let mut disks = Self { held: Vec::new(), absent: Vec::new() };
        for disk in file {
            disks.held.push(Held::new(Candidate::open(disk)?, Origin::File));
        }
        for disk in added {
            if let Some(named) = file.iter().find(|named| named.name == disk.name) {
                anyhow::ensure!(
                    is_same(&named.path, &disk.path),
                    "disk {} is {} in the cluster file, and was added as {}: give the cluster file that path, or another name \
                     to what it means",
                    disk.name,
                    named.path.display(),
                    disk.path.display()
                );
                continue;
            }
            if let Some(named) = file.iter().find(|named| is_same(&named.path, &disk.path)) {
                anyhow::bail!(
                    "{0} is disk {1} in the cluster file, and was added as {2}: call it {2} there",
                    disk.path.display(),
                    named.name,
                    disk.name
                );
            }
            // When a machine starts the kernel may find it later than others.
            while !disk.path.exists() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(100));
            }
            match open(&disk.name, &disk.path) {
                Ok(candidate) => disks.held.push(Held::new(candidate, Origin::Added)),
                Err(error) => {
                    tracing::error!(%error, "a disk is left out");
                    disks.absent.push(disk);
                }
            }
        }
        Ok(disks)
    }

    /// Repairs the metadata of those that are of this cluster. One of which that fails is told as one that cannot be used:
    /// whoever heard that it is there might count on it before its failure is known.
    pub fn recover(&mut self, cluster: ClusterId) {
        for held in &mut self.held {
            let of = held.candidate.inventory().content;
            if matches!(of, DiskContent::Ours { cluster: of, .. } if of == cluster)
                && let Err(error) = prepare::recover(&held.candidate, cluster)
            {
                tracing::error!(%error, "a disk cannot be used");
                held.broken = Some(error.to_string());
            }
        }
    }

    /// What is on each of them.
    pub fn inventory(&self) -> Vec<DiskInventory> {
        self.held.iter().map(Held::inventory).collect()
    }

    /// Their attachments, in that order.
    pub fn attachments(&self, order: &FormatOrder) -> Vec<AttachId> {
        let named = |name: &str| self.held.iter().find(|held| held.candidate.name == name);
        order
            .disks
            .iter()
            .filter_map(|wanted| named(&wanted.name))
            .map(|held| held.candidate.attach)
            .collect()
    }

    /// Those that a cluster to be made may format.
    pub fn candidates(&self) -> Vec<Arc<Candidate>> {
        self.held.iter().map(|held| Arc::clone(&held.candidate)).collect()
    }

    /// Forgets what was added: it was of another cluster.
    pub fn forget_added(&mut self) {
        self.held.retain(|held| held.origin == Origin::File);
        self.absent.clear();
    }

    /// The disk at a path, which is to get a name: opened, unless it is held and nobody's.
    pub fn find(&self, name: &str, path: &Path) -> anyhow::Result<Arc<Candidate>> {
        for held in &self.held {
            let candidate = &held.candidate;
            let same_path = is_same(&candidate.path, path);
            if !same_path && candidate.name != name {
                continue;
            }
            anyhow::ensure!(
                held.in_service.is_none(),
                "{} is in use by ublk-server here as disk {}: remove it first with `mirrorctl disk remove`; if that was done, \
                 what is under way on it has to end, or ublk-server here to be restarted",
                candidate.path.display(),
                candidate.name
            );
            anyhow::ensure!(
                same_path && candidate.name == name,
                "ublk-server here has {} as disk {}: add it under that name and path, or take it out of the cluster file and \
                 restart ublk-server",
                candidate.path.display(),
                candidate.name
            );
            if candidate.is_at(path) {
                return Ok(Arc::clone(candidate));
            }
            // Another disk has taken its place.
        }
        anyhow::ensure!(path.exists(), "{} does not exist on this node", path.display());
        Ok(Arc::new(open(name, path)?))
    }

    /// A disk has been formatted as one that a map will list. Known after a restart as well, before anybody hears of it.
    pub fn add(&mut self, candidate: Arc<Candidate>, id: DiskId, state: &StateDir) -> anyhow::Result<()> {
        let known = self.held.iter_mut().find(|held| Arc::ptr_eq(&held.candidate, &candidate));
        if let Some(held) = known {
            held.awaited = Some(id);
            held.keep();
        } else {
            self.absent.retain(|absent| absent.name != candidate.name);
            self.held.retain(|held| held.in_service.is_some() || held.candidate.name != candidate.name);
            self.held.push(Held {
                candidate,
                origin: Origin::Added,
                in_service: None,
                awaited: Some(id),
                broken: None,
            });
        }
        self.save(state)
    }

    /// Writes down which disks were added.
    pub fn save(&self, state: &StateDir) -> anyhow::Result<()> {
        let added = self
            .held
            .iter()
            .filter(|held| held.origin == Origin::Added)
            .map(|held| AddedDisk { name: held.candidate.name.clone(), path: held.candidate.path.clone() });
        let added: Vec<AddedDisk> = added.chain(self.absent.iter().cloned()).collect();
        state.save_disks(&added)?;
        Ok(())
    }

    /// Whether a map lists disks that the I/O thread is still to get.
    pub fn awaits(&self, map: &DistributionMap, me: NodeId) -> bool {
        let listed = |id: DiskId| map.node_of(id) == Some(me);
        self.held.iter().any(|held| held.in_service.is_none() && held.awaited.is_some_and(listed))
    }

    /// Opens what the map lists and the I/O thread does not have: for the first map everything. What cannot be used is
    /// left out, and why is returned beside, with its id if that is known.
    pub fn open_for_service(
        &mut self,
        map: &DistributionMap,
        first: bool,
    ) -> (Vec<Opened>, Vec<(Option<DiskId>, String)>) {
        let (mut opened, mut troubles) = (Vec::new(), Vec::new());
        for held in self.held.iter_mut().filter(|held| held.in_service.is_none()) {
            let awaited = held.awaited.filter(|id| map.disk(*id).is_some());
            if !first && awaited.is_none() {
                continue;
            }
            let disk = Arc::clone(&held.candidate);
            let opened_now = match &held.broken {
                None => prepare::open_for_service(&disk, map.cluster).map_err(|error| error.to_string()),
                Some(why) => Err(why.clone()),
            };
            match opened_now {
                Ok((local, _)) if map.disk(local.id).is_none() => {
                    held.awaited = Some(local.id);
                    // It was removed while this node was away, or is about to enter: then it is added once more.
                    if map.has_left(local.id) {
                        held.leave();
                    }
                    // The manager knows it from the registration, and tells what to do.
                    tracing::warn!(disk = disk.name, id = %local.id, "a disk is left out: it is no part of the cluster");
                }
                Ok(pair) => {
                    held.in_service = Some(pair.0.id);
                    held.awaited = None;
                    held.keep();
                    opened.push(pair);
                }
                Err(error) => {
                    let id = awaited.or_else(|| match disk.inventory().content {
                        DiskContent::Ours { cluster, disk } if cluster == map.cluster => Some(disk),
                        _ => None,
                    });
                    troubles.push((id, error));
                }
            }
        }
        (opened, troubles)
    }

    /// There is no I/O thread after all.
    pub fn let_go(&mut self) {
        self.held.iter_mut().for_each(|held| held.in_service = None);
    }

    /// The I/O thread has closed a disk: whoever wants it can have it, under this name or another.
    pub fn released(&mut self, id: DiskId) {
        self.held.retain(|held| held.in_service != Some(id));
    }

    /// A disk has left the map: nobody adds it again by itself after a restart.
    /// One that was never in service is let go of at once.
    pub fn removed(&mut self, id: DiskId, name: &str, state: &StateDir) -> anyhow::Result<()> {
        // Not another one that got its name meanwhile.
        let is_it = |held: &Held| {
            held.candidate.name == name && held.in_service.or(held.awaited).is_none_or(|known| known == id)
        };
        self.held.iter_mut().filter(|held| is_it(held)).for_each(Held::leave);
        self.held.retain(|held| held.in_service.is_some() || !is_it(held));
        self.absent.retain(|absent| absent.name != name);
        self.save(state)
    }
}

fn open(name: &str, path: &Path) -> Result<Candidate, DiskError> {
    let (name, path) = (name.to_owned(), path.to_owned());
    Candidate::open(&config::DiskFile { name, path, bytes: None, segments: Segments::default() })
}

/// Whether two paths lead to one disk, be it by way of links such as those of /dev/disk.
fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    one == other || real(one) == real(other)
}

/// Formats one that was found.
pub fn format(order: &FormatOrder, node: &str, candidate: &Arc<Candidate>) -> anyhow::Result<()> {
    prepare::format_all(order, node, std::slice::from_ref(candidate))
        .with_context(|| format!("{} cannot be formatted", candidate.path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_net::config::segment_slots;
    use mirror_net::control::FormatDisk;
    use mirror_net::format::Geometry;
    use mirror_net::map::{Disk, Node};

    const SLICE_BYTES: u32 = 1 << 20;
    const ME: NodeId = NodeId(1);

    struct Place {
        dir: tempfile::TempDir,
        state: StateDir,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let state = StateDir::open(&dir.path().join("state")).unwrap();
            Self { dir, state }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn make(&self, name: &str) -> PathBuf {
            std::fs::File::create(self.path(name)).unwrap().set_len(64 << 20).unwrap();
            self.path(name)
        }

        fn named(&self, name: &str, path: &str) -> config::DiskFile {
            let (name, path) = (name.into(), self.path(path));
            config::DiskFile { name, path, bytes: None, segments: Segments::default() }
        }

        fn open(&self, file: &[config::DiskFile]) -> anyhow::Result<Disks> {
            Disks::open(file, self.state.added_disks()?, Duration::ZERO)
        }

        /// As the agent carries out the manager's order.
        fn add(&self, disks: &mut Disks, name: &str, id: u32, force: bool) -> anyhow::Result<()> {
            let candidate = disks.find(name, &self.path(name))?;
            let geometry = Geometry::new(candidate.bytes, SLICE_BYTES, candidate.block_bytes)?;
            let slots =
                segment_slots(candidate.bytes, SLICE_BYTES, geometry.slots.into(), Segments::default())?;
            let order = FormatOrder {
                cluster: ClusterId::default(),
                node: ME,
                slice_bytes: SLICE_BYTES,
                disks: vec![FormatDisk { name: name.into(), path: None, disk: DiskId(id), slots }],
                force,
                check_only: false,
            };
            format(&order, "n1", &candidate)?;
            disks.add(candidate, DiskId(id), &self.state)
        }
    }

    /// A map that has these disks of this node, and gave ids up to `last`.
    fn map(ids: &[u32], last: u32) -> DistributionMap {
        let disk = |id: &u32| Disk {
            id: DiskId(*id),
            node: ME,
            name: format!("d{id}"),
            slots: mirror_net::map::SegmentSlots::default(),
            block_bytes: 512,
            spare: false,
            failed: None,
        };
        let node = Node { id: ME, name: "n1".into(), address: "n1:1".into(), power: None, switch: None };
        DistributionMap {
            nodes: vec![node],
            disks: ids.iter().map(disk).collect(),
            last_disk: last,
            ..DistributionMap::empty()
        }
    }

    fn opened(disks: &mut Disks, map: &DistributionMap, first: bool) -> Vec<u32> {
        let (opened, troubles) = disks.open_for_service(map, first);
        assert!(troubles.is_empty(), "{troubles:?}");
        opened.iter().map(|(local, _)| local.id.0).collect()
    }

    fn kept(place: &Place) -> Vec<String> {
        place.state.added_disks().unwrap().into_iter().map(|disk| disk.name).collect()
    }

    #[test]
    fn what_was_added_is_opened_with_the_map_that_lists_it_and_after_a_restart() {
        let place = Place::new();
        place.make("d3");
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        assert_eq!(kept(&place), ["d3"]);
        assert!(!disks.awaits(&map(&[], 3), ME));
        assert!(disks.awaits(&map(&[3], 3), ME));
        assert_eq!(opened(&mut disks, &map(&[3], 3), false), [3]);
        assert!(!disks.awaits(&map(&[3], 3), ME), "once");
        let error = disks.find("d3", &place.path("d3")).map(drop).unwrap_err().to_string();
        assert!(error.contains("in use by ublk-server here as disk d3"), "{error}");
        // When it has left the map and is closed, anybody can have it.
        let mut let_go = disks.clone();
        drop(disks);
        let_go.released(DiskId(3));
        drop(let_go.find("d4", &place.path("d3")).unwrap());
        drop(let_go);
        let mut disks = place.open(&[]).unwrap();
        assert_eq!(opened(&mut disks, &map(&[3], 3), true), [3]);
        // It has left the map: nobody opens it after the next restart.
        disks.removed(DiskId(3), "d3", &place.state).unwrap();
        assert_eq!(kept(&place), Vec::<String>::new());
    }

    #[test]
    fn what_left_while_the_node_was_away_is_forgotten_unless_it_enters_after_all() {
        let place = Place::new();
        place.make("d3");
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        drop(disks);
        let mut disks = place.open(&[]).unwrap();
        // Its id was given and it is not in the map: it has left, or is about to enter.
        assert!(opened(&mut disks, &map(&[], 3), true).is_empty());
        disks.save(&place.state).unwrap();
        assert_eq!(kept(&place), Vec::<String>::new());
        assert_eq!(opened(&mut disks, &map(&[3], 3), false), [3]);
        disks.save(&place.state).unwrap();
        assert_eq!(kept(&place), ["d3"]);
    }

    #[test]
    fn the_cluster_file_and_what_was_added_have_to_agree() {
        let place = Place::new();
        place.make("d3");
        place.make("other");
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        drop(disks);
        // A link to it is it.
        std::os::unix::fs::symlink(place.path("d3"), place.path("link")).unwrap();
        assert_eq!(place.open(&[place.named("d3", "link")]).unwrap().held.len(), 1);
        let error = place.open(&[place.named("d3", "other")]).map(drop).unwrap_err().to_string();
        assert!(error.starts_with("disk d3 is ") && error.contains("and was added as"), "{error}");
        let error = place.open(&[place.named("d4", "d3")]).map(drop).unwrap_err().to_string();
        assert!(
            error.contains("is disk d4 in the cluster file") && error.ends_with("call it d3 there"),
            "{error}"
        );
    }

    #[test]
    fn an_added_disk_that_is_not_there_is_left_out_and_not_forgotten() {
        let place = Place::new();
        place.make("d3");
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        drop(disks);
        std::fs::rename(place.path("d3"), place.path("away")).unwrap();
        let disks = place.open(&[]).unwrap();
        assert!(disks.inventory().is_empty());
        let error = disks.find("d5", &place.path("d5")).map(drop).unwrap_err().to_string();
        assert!(error.ends_with("d5 does not exist on this node"), "{error}");
        disks.save(&place.state).unwrap();
        assert_eq!(kept(&place), ["d3"]);
        // One that comes late is waited for.
        let (from, to) = (place.path("away"), place.path("d3"));
        let coming = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            std::fs::rename(from, to).unwrap();
        });
        let added = place.state.added_disks().unwrap();
        let disks = Disks::open(&[], added, Duration::from_secs(60)).unwrap();
        coming.join().unwrap();
        assert!(matches!(disks.inventory()[0].content, DiskContent::Ours { disk: DiskId(3), .. }));
    }

    #[test]
    fn what_holds_anything_is_formatted_by_force_only() {
        let place = Place::new();
        place.make("d3");
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        let error = place.add(&mut disks, "d3", 4, false).unwrap_err();
        assert!(format!("{error:#}").contains("give --force"), "{error:#}");
        place.add(&mut disks, "d3", 4, true).unwrap();
        assert_eq!(opened(&mut disks, &map(&[4], 4), false), [4]);
    }

    /// Its metadata has to be repaired, and it takes no writes.
    #[test]
    fn a_disk_whose_repair_fails_is_never_told_as_one_that_is_there() {
        use mirror_net::format::geometry::SUPERBLOCK_OFFSET;
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        use std::os::fd::AsRawFd;
        let place = Place::new();
        let memory: std::fs::File = memfd_create("disk", MFdFlags::MFD_ALLOW_SEALING).unwrap().into();
        memory.set_len(64 << 20).unwrap();
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        std::os::unix::fs::symlink(path, place.path("d3")).unwrap();
        let mut disks = place.open(&[]).unwrap();
        place.add(&mut disks, "d3", 3, false).unwrap();
        drop(disks);
        let ours = |disks: &Disks| matches!(disks.inventory()[0].content, DiskContent::Ours { .. });
        for takes_writes in [true, false] {
            // One of the copies of the superblock is gone.
            std::os::unix::fs::FileExt::write_all_at(&memory, &[0; 4096], SUPERBLOCK_OFFSET).unwrap();
            if !takes_writes {
                fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
            }
            let mut disks = place.open(&[]).unwrap();
            assert!(ours(&disks));
            disks.recover(ClusterId::default());
            assert_eq!(ours(&disks), takes_writes);
            let (opened, troubles) = disks.open_for_service(&map(&[3], 3), true);
            assert_eq!(opened.len(), usize::from(takes_writes));
            let told: Vec<_> = troubles.iter().map(|(id, _)| *id).collect();
            assert_eq!(told, if takes_writes { vec![] } else { vec![Some(DiskId(3))] }, "{troubles:?}");
        }
    }

    /// It was never in service: its tables are lost, or it came back after it had been removed.
    #[test]
    fn a_broken_disk_that_is_removed_makes_room_for_another_at_once() {
        for other_path in [true, false] {
            let place = Place::new();
            let path = place.make("d3");
            let mut disks = place.open(&[]).unwrap();
            place.add(&mut disks, "d3", 3, false).unwrap();
            drop(disks);
            let mut disks = place.open(&[]).unwrap();
            disks.held[0].broken = Some("its slot tables are lost".into());
            let (opened, troubles) = disks.open_for_service(&map(&[3], 3), true);
            assert!(opened.is_empty());
            assert_eq!(troubles, [(Some(DiskId(3)), "its slot tables are lost".to_owned())]);
            if other_path {
                disks.removed(DiskId(3), "d3", &place.state).unwrap();
                let new = place.make("new");
                assert_eq!(disks.find("d3", &new).unwrap().path, new);
                continue;
            }
            // Another one at its path is another disk, be it removed before or not.
            std::fs::rename(&path, place.path("old")).unwrap();
            place.make("d3");
            place.add(&mut disks, "d3", 4, false).unwrap();
            assert_eq!(opened_ids(&disks), [4]);
            drop(disks);
            let mut disks = place.open(&[]).unwrap();
            assert_eq!(self::opened(&mut disks, &map(&[4], 4), true), [4]);
        }
    }

    fn opened_ids(disks: &Disks) -> Vec<u32> {
        let contents = disks.inventory().into_iter().map(|disk| disk.content);
        let ours = contents.filter_map(|content| match content {
            DiskContent::Ours { disk, .. } => Some(disk.0),
            _ => None,
        });
        ours.collect()
    }
}
