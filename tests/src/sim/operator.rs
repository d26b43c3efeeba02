//! An operator who has copies moved about by plans while everything else goes wrong.
//!
//! What he does. In a quarter of the seeds he makes spares of nodes or of single disks, onto all others or onto the
//! spares that there are, has disks made equally full, changes who mirrors whom and how many copies a device has, makes, enlarges and
//! deletes devices, and pauses, resumes and cancels whatever plan there is; each at any
//! time, one thing soon after the other or late. He asks the manager that runs, and nobody if none does; what is refused he
//! does not repeat. When all that was broken is mended he resumes what rests, and takes back what can come to no end: copies
//! of data that nobody can read any more. Then every plan has to end, and every slice to have as many copies as in the
//! beginning. He is the only one who moves copies: in his seeds nobody changes the map behind the manager's back.
//!
//! He draws from a sequence of his own, so the other seeds are what they are without him.

use crate::sim::cluster::{Cluster, Fault, Shape};
use crate::sim::scheduler::{MS, Nanos, Random};
use mirror_net::control::PlanOrder;
use mirror_net::map::Topology;

/// What an operator does, and what comes of it, for counting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Deed {
    SpareMade,
    Rebalanced,
    TopologyChanged,
    CopiesChanged,
    DeviceMade,
    DeviceGrown,
    DeviceDeleted,
    Paused,
    Resumed,
    Cancelled,
    Refused,
    Done,
    GivenUp,
}

impl Deed {
    /// All, in the order of their counts.
    pub const ALL: [Self; 13] = [
        Self::SpareMade,
        Self::Rebalanced,
        Self::TopologyChanged,
        Self::CopiesChanged,
        Self::DeviceMade,
        Self::DeviceGrown,
        Self::DeviceDeleted,
        Self::Paused,
        Self::Resumed,
        Self::Cancelled,
        Self::Refused,
        Self::Done,
        Self::GivenUp,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::SpareMade => "operator: spare made",
            Self::Rebalanced => "operator: rebalanced",
            Self::TopologyChanged => "operator: topology changed",
            Self::CopiesChanged => "operator: number of copies changed",
            Self::DeviceMade => "operator: device made",
            Self::DeviceGrown => "operator: device grown",
            Self::DeviceDeleted => "operator: device deleted",
            Self::Paused => "operator: plan paused",
            Self::Resumed => "operator: plan resumed",
            Self::Cancelled => "operator: plan cancelled",
            Self::Refused => "operator: refused, or nothing to do",
            Self::Done => "operator: plan came to its end",
            Self::GivenUp => "operator: plan given up, in part at least",
        }
    }
}

/// What is to be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// `spare make`.
    Spare {
        /// The node.
        node: u16,
        /// One of its disks, or all.
        disk: Option<usize>,
        /// Onto spares, if there are any.
        onto_spares: bool,
    },
    /// `rebalance`.
    Balance,
    /// `topology`.
    Topology(Option<Topology>),
    /// `device set --copies`.
    Copies {
        /// Index of the device; of one that is mirrored, or the next that is.
        device: usize,
        /// 2 or 3.
        copies: u8,
    },
    /// `device create`, of a slice or two.
    Make {
        /// The node that exports it.
        node: u16,
        /// 1 to 3.
        copies: u8,
    },
    /// `device resize`, of the last that he made, by a slice.
    Grow,
    /// `device delete`, of the last that he made.
    Delete,
}

/// Whether that seed has one, and his own sequence.
pub fn of_seed(seed: u64) -> Option<Random> {
    let mut random = Random::new(seed ^ 0x0be7_a70b);
    random.one_in(4).then_some(random)
}

/// Gives a cluster what there has to be for copies to be moved: a spare, or another node.
pub fn make_room(shape: &mut Shape, random: &mut Random) {
    shape.operator = true;
    let used = shape.nodes - shape.spares;
    // Of two nodes nothing can go anywhere but to spares.
    let wanted = if used == 2 { 1 + random.below(2) as u16 } else { random.below(3) as u16 };
    shape.spares = shape.spares.max(wanted.min(5 - used));
    shape.nodes = used + shape.spares;
}

/// Whether his wishes go beyond where copies lie: in half of his seeds he changes topologies, numbers of copies and
/// devices too.
pub fn wishes_more(seed: u64) -> bool {
    !Random::new(seed ^ 0x5e7_71e5).one_in(2)
}

/// Plans what he does until then.
pub fn plan(cluster: &mut Cluster, shape: Shape, random: &mut Random, more: bool, until: Nanos) {
    let used = u64::from(shape.nodes - shape.spares);
    for _ in 0..1 + random.below(4) {
        // Mostly shortly before something goes wrong.
        let wrong = cluster.planned().to_vec();
        let at = match wrong.len() as u64 {
            0 => random.range(500 * MS, until),
            _ if random.one_in(3) => random.range(500 * MS, until),
            count => wrong[random.below(count) as usize].saturating_sub(random.below(300 * MS)).max(500 * MS),
        };
        // What is a spare from the beginning may be none by then.
        let nodes = if random.one_in(6) { shape.nodes.into() } else { used };
        let wish = match random.below(if more { 11 } else { 4 }) {
            0 => Wish::Balance,
            5 => {
                Wish::Topology([None, Some(Topology::Pair), Some(Topology::Chain)][random.below(3) as usize])
            }
            6 => Wish::Copies { device: random.below(8) as usize, copies: random.range(2, 4) as u8 },
            7 | 8 => Wish::Make { node: random.range(1, nodes + 1) as u16, copies: random.range(1, 4) as u8 },
            9 => Wish::Grow,
            10 => Wish::Delete,
            kind => Wish::Spare {
                node: random.range(1, nodes + 1) as u16,
                disk: (kind == 1).then(|| random.below(u64::from(shape.disks)) as usize),
                onto_spares: random.below(5) > 0,
            },
        };
        cluster.plan(at, Fault::Redistribute { wish });
        let mut at = at;
        // Mostly while it is under way.
        while random.below(5) < 3 {
            at += [5, 20, 60, 200, 1_000][random.below(5) as usize] * MS + random.below(20 * MS);
            let order = match random.below(4) {
                0 => PlanOrder::Resume,
                1 => PlanOrder::Cancel,
                _ => PlanOrder::Pause,
            };
            cluster.plan(at, Fault::Order { order, nth: random.below(4) as usize });
        }
    }
}
