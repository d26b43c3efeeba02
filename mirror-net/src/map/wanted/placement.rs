//! The placement in the making: slices with their copies, moved one run after the other.

use super::quotas::Quotas;
use super::room::{Room, Share};
use super::shortage::shortage;
use super::topology::Relation;
use super::{NoPlan, Wanted, Wish};
use crate::format::alloc::Segment;
use crate::ids::{DeviceId, SliceIndex};
use crate::map::plan::Move;
use crate::map::verbs::Run;
use crate::map::{DistributionMap, ReplicaState, Span};

/// A copy, with the index of its disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Copy {
    pub(super) at: usize,
    pub(super) segment: Segment,
    pub(super) in_sync: bool,
    /// A move is about it: a second one would be taken for the first undone.
    moved: bool,
}

/// A run of slices with the same copies, the primary first.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// Index of the device in the map.
    pub(super) device: usize,
    pub(super) first: u32,
    pub(super) count: u32,
    pub(super) copies: Vec<Copy>,
    /// Disks that it has left: they do not get it back in the same plan.
    left: Vec<usize>,
    /// Something of it has no place yet: nothing else is done to it meanwhile.
    waiting: bool,
}

/// A copy that needs a place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Where it is now; `None` if it is to be made anew.
    pub(super) from: Option<usize>,
    pub(super) segment: Segment,
    /// It is the primary, or becomes it.
    primary: bool,
}

/// The copies of a piece that need a place, in this order.
#[derive(Clone, Debug)]
pub(super) struct Work {
    pub(super) piece: usize,
    pub(super) needs: Vec<Need>,
    /// The disk whose node decides who mirrors it, once that is certain.
    pub(super) home: Option<usize>,
}

/// What the planner works on.
pub(super) struct Placement<'a> {
    pub(super) map: &'a DistributionMap,
    wish: &'a Wish,
    pub(super) room: Room,
    pub(super) relation: Relation,
    /// Copies that each device is to have, by index.
    copies: Vec<usize>,
    quotas: Quotas,
    emptied: Vec<bool>,
    pub(super) pieces: Vec<Piece>,
    moves: Vec<Move>,
    copied: u64,
    copied_min: u64,
}

impl<'a> Placement<'a> {
    pub(super) fn new(
        map: &'a DistributionMap,
        room: Room,
        relation: Relation,
        wish: &'a Wish,
        copies: Vec<usize>,
    ) -> Self {
        let emptied = room.spots.iter().map(|spot| wish.emptied.contains(&spot.id)).collect();
        let mut pieces = Vec::new();
        let concerned = |device: DeviceId| wish.only.is_empty() || wish.only.contains(&device);
        for (device, of_map) in map.devices.iter().enumerate().filter(|(_, device)| concerned(device.id)) {
            pieces.extend(of_map.spans.iter().map(|span| Piece {
                device,
                first: span.first.0,
                count: span.count,
                copies: copies_of(&room, span),
                left: Vec::new(),
                waiting: false,
            }));
        }
        let (quotas, moves) = (Quotas::default(), Vec::new());
        Self { map, wish, room, relation, copies, quotas, emptied, pieces, moves, copied: 0, copied_min: 0 }
    }

    /// Gives every copy that may not stay another place, makes those that are missing, and drops those that are
    /// too many.
    pub(super) fn find_places(&mut self) -> Result<(), NoPlan> {
        let mut mirrored = Vec::new();
        let mut unmirrored = Vec::new();
        for piece in 0..self.pieces.len() {
            let found = self.needs(piece);
            if found.needs.is_empty() {
                continue;
            }
            self.pieces[piece].waiting = true;
            let is_mirrored = self.copies[self.pieces[piece].device] > 1;
            if is_mirrored { mirrored.push(found) } else { unmirrored.push(found) }
        }
        // What may lie anywhere makes even what the rules left uneven, so it comes last.
        self.place_all(mirrored)?;
        self.place_all(unmirrored)
    }

    fn place_all(&mut self, mut work: Vec<Work>) -> Result<(), NoPlan> {
        let mut needs = [0u64; 3];
        for item in &work {
            for need in &item.needs {
                needs[need.segment as usize] += u64::from(self.pieces[item.piece].count);
            }
        }
        self.copied_min += needs.iter().sum::<u64>();
        self.quotas = Quotas::even(&self.room, needs);
        while !work.is_empty() {
            let mut left = Vec::new();
            let mut placed = false;
            for item in work {
                placed |= self.place(item, &mut left);
            }
            // What was placed left slots that others may have waited for. If nothing was, something is served by
            // another copy, whose node has other mirrors, or something else has to go out of the way.
            if !left.is_empty()
                && !placed
                && !left.iter_mut().any(|item| self.change_home(item))
                && !left.iter().any(|item| self.shift(item))
            {
                return Err(shortage(self, &left));
            }
            work = left;
        }
        Ok(())
    }

    /// Decides which copy of a piece is at home, drops what is too much, and says what needs a place.
    fn needs(&mut self, piece: usize) -> Work {
        let found = &self.pieces[piece];
        let copies = found.copies.clone();
        let device = &self.map.devices[found.device];
        let mirrored = self.copies[found.device] > 1;
        let wanted = self.wish.copies.get(&device.id).map_or(copies.len(), |wanted| usize::from(*wanted));
        let ordered = mirrored && matches!(self.relation, Relation::Listed(_));
        let stays = |copy: &Copy| !self.emptied[copy.at];
        let judge = self.judge();
        let mirrors = |home: &Copy, copy: &Copy| judge.mirrors(found, home.at, copy.at);
        // The home decides who may mirror it: the one where the device was laid out, lest a node be primary of what two
        // have; then the one that leaves the most where it is, and of equal ones the first.
        let home = if ordered {
            let kept = |home: &Copy| copies.iter().filter(|copy| stays(copy) && mirrors(home, copy)).count();
            let laid_out = |copy: &Copy| copy.segment == Segment::Primary;
            // One that misses something for a moment is at home all the same, and gets its role once it is in sync.
            let fit = |copy: &&Copy| stays(copy) && (copy.in_sync || laid_out(copy)) && judge.knows(copy.at);
            copies.iter().filter(fit).rev().max_by_key(|copy| (laid_out(copy), kept(copy))).copied()
        } else {
            // What is too much anyway need not be moved first.
            let spared = copies.iter().find(|copy| wanted < copies.len() && stays(copy) && copy.in_sync);
            Some(*spared.unwrap_or(&copies[0]))
        };
        let good = |copy: &Copy| {
            let related = |home: Copy| !ordered || home.at == copy.at || mirrors(&home, copy);
            stays(copy) && home.is_some_and(related)
        };
        // The best first: what is too much is taken from the end.
        let mut best = copies.clone();
        best.sort_by_key(|copy| (!copy.in_sync, home != Some(*copy), !good(copy)));
        let surplus = best.split_off(wanted.min(best.len()));
        let missing = wanted - best.len();
        let mut needs: Vec<Need> = best
            .iter()
            .filter(|copy| !good(copy))
            .map(|copy| Need { from: Some(copy.at), segment: copy.segment, primary: home == Some(*copy) })
            .collect();
        needs.sort_by_key(|need| !need.primary);
        if home.is_none()
            && let Some(need) = needs.first_mut()
        {
            need.primary = true;
        }
        let segment = if mirrored { Segment::Secondary } else { Segment::Unmirrored };
        needs.extend((0..missing).map(|_| Need { from: None, segment, primary: false }));
        let (keeper, placed) = (best[0].at, home.filter(good).map(|home| home.at));
        if let Some(home) = home.filter(|home| home.at != copies[0].at) {
            self.swap_roles(piece, home.at);
        }
        for copy in surplus {
            self.drop_copy(piece, copy.at, keeper);
        }
        Work { piece, needs, home: placed }
    }

    /// Finds places for what a piece needs; what has none is added to `left`. Whether anything was placed.
    fn place(&mut self, mut work: Work, left: &mut Vec<Work>) -> bool {
        let Some(need) = work.needs.first().copied() else {
            self.pieces[work.piece].waiting = false;
            return true;
        };
        let mut placed = false;
        loop {
            let shares = self.shares(&work, need);
            if shares.is_empty() {
                left.push(work);
                return placed;
            }
            for share in shares {
                // What else this piece needs may have taken some of it meanwhile.
                let count = share.count.min(self.room.free(share.at, share.segment));
                if count == 0 {
                    continue;
                }
                placed = true;
                let rest = self.split(work.piece, count);
                self.put(work.piece, need, share);
                let home = if need.primary { Some(share.at) } else { work.home };
                let further = Work { piece: work.piece, needs: work.needs[1..].to_vec(), home };
                self.place(further, left);
                match rest {
                    Some(rest) => work.piece = rest,
                    None => return true,
                }
            }
        }
    }

    /// Who takes a piece's copy: one by its quota, or several by their loads; none if there is no room.
    fn shares(&mut self, work: &Work, need: Need) -> Vec<Share> {
        let Self { map, room, relation, copies, quotas, pieces, .. } = self;
        let judge = Judge { map, room, relation, copies };
        let piece = &pieces[work.piece];
        let allowed = |at: usize| judge.may_take(piece, work.home, need, at);
        for segment in segments(need.segment) {
            if let Some(share) = quotas.next(room, *segment, piece.count, allowed) {
                return vec![share];
            }
        }
        let mut by_load =
            segments(need.segment).iter().map(|it| quotas.beside(room, *it, piece.count, allowed));
        by_load.find(|shares| !shares.is_empty()).unwrap_or_default()
    }

    pub(super) fn judge(&self) -> Judge<'_> {
        Judge { map: self.map, room: &self.room, relation: &self.relation, copies: &self.copies }
    }

    /// Lets another copy of a piece be at home, if those who mirror that one's node have room for what the piece needs.
    fn change_home(&mut self, work: &mut Work) -> bool {
        let piece = &self.pieces[work.piece];
        let (Relation::Listed(_), Some(home)) = (&self.relation, work.home) else { return false };
        // Where the device was laid out is its home, and what was begun is not begun anew.
        if piece.copies.iter().any(|copy| copy.moved || copy.segment == Segment::Primary) {
            return false;
        }
        let judge = self.judge();
        let needs_with = |home: usize| -> Vec<Need> {
            let others = piece.copies.iter().filter(|copy| copy.at != home);
            let badly_placed =
                others.filter(|copy| self.emptied[copy.at] || !judge.mirrors(piece, home, copy.at));
            let needs =
                badly_placed.map(|copy| Need { from: Some(copy.at), segment: copy.segment, primary: false });
            needs.chain(work.needs.iter().filter(|need| need.from.is_none()).copied()).collect()
        };
        let has_room = |need: &Need, home: usize| {
            let takers = self.room.takers().filter(|at| judge.may_take(piece, Some(home), *need, *at));
            let free = |at: usize| -> u64 {
                segments(need.segment).iter().map(|segment| u64::from(self.room.free(at, *segment))).sum()
            };
            takers.map(free).sum::<u64>() >= u64::from(piece.count)
        };
        let fit =
            |copy: &&Copy| copy.at != home && copy.in_sync && !self.emptied[copy.at] && judge.knows(copy.at);
        let found = piece.copies.iter().filter(fit).map(|copy| (copy.at, needs_with(copy.at)));
        let found = found.filter(|(home, needs)| needs.iter().all(|need| has_room(need, *home)));
        let Some((home, needs)) = found.min_by_key(|(_, needs)| needs.len()) else { return false };
        (work.home, work.needs) = (Some(home), needs);
        self.swap_roles(work.piece, home);
        true
    }

    /// Moves something that could stay, so that the first thing that a piece needs has a place.
    fn shift(&mut self, work: &Work) -> bool {
        let Some(need) = work.needs.first().copied() else { return false };
        let judge = self.judge();
        let room_for =
            |segment, at| segments(segment).iter().copied().find(|segment| self.room.free(at, *segment) > 0);
        let free: Vec<usize> =
            self.room.takers().filter(|at| room_for(need.segment, *at).is_some()).collect();
        let wanted: Vec<bool> = (0..self.room.spots.len())
            .map(|at| judge.may_take(&self.pieces[work.piece], work.home, need, at))
            .collect();
        let movable = self.pieces.iter().enumerate().filter(|(_, piece)| !piece.waiting);
        let mut copies = movable
            .flat_map(|(index, piece)| piece.copies.iter().enumerate().map(move |copy| (index, piece, copy)));
        let found = copies.find_map(|(index, piece, (position, copy))| {
            let in_the_way = !copy.moved && wanted[copy.at] && segments(need.segment).contains(&copy.segment);
            let free = free.iter().copied().filter(|_| in_the_way);
            let at = free.into_iter().find(|at| judge.may_move(piece, position, *at))?;
            let segment = room_for(copy.segment, at)?;
            Some((index, position, Share { at, segment, count: piece.count }))
        });
        let Some((piece, position, share)) = found else { return false };
        let count =
            share.count.min(self.pieces[work.piece].count).min(self.room.free(share.at, share.segment));
        self.move_copy(piece, position, Share { count, ..share });
        true
    }

    /// Moves the first slices of a piece's copy; the rest is a piece of its own.
    fn move_copy(&mut self, piece: usize, position: usize, share: Share) {
        let Copy { at, segment, .. } = self.pieces[piece].copies[position];
        self.split(piece, share.count);
        self.put(piece, Need { from: Some(at), segment, primary: position == 0 }, share);
    }

    /// Brings primaries home, and makes takers equally full.
    pub(super) fn make_even(&mut self) {
        self.bring_primaries_home();
        let loads = self.room.even_loads();
        let mut surplus = vec![0u32; self.room.spots.len()];
        for (at, load) in &loads {
            surplus[*at] = self.room.spots[*at].load.saturating_sub(*load);
        }
        self.copied_min += surplus.iter().map(|surplus| u64::from(*surplus)).sum::<u64>();
        self.quotas = Quotas::to_loads(&self.room, &loads);
        // What is at home stays there if something else can go.
        for segments in [&[Segment::Secondary][..], &[Segment::Primary]] {
            let mut piece = 0;
            // What is split off comes as a piece of its own.
            while piece < self.pieces.len() {
                for position in 0..self.pieces[piece].copies.len() {
                    let copy = self.pieces[piece].copies[position];
                    if surplus[copy.at] > 0 && !copy.moved && segments.contains(&copy.segment) {
                        surplus[copy.at] -= self.relieve(piece, position, surplus[copy.at]);
                    }
                }
                piece += 1;
            }
        }
    }

    /// Moves up to `most` slices of a piece's copy to a disk that has too little; how many.
    fn relieve(&mut self, piece: usize, position: usize, most: u32) -> u32 {
        let Self { map, room, relation, copies, quotas, pieces, .. } = self;
        let judge = Judge { map, room, relation, copies };
        let found = &pieces[piece];
        let count = found.count.min(most);
        let allowed = |at: usize| judge.may_move(found, position, at);
        let segments = segments(found.copies[position].segment);
        let share = segments.iter().find_map(|segment| quotas.next(room, *segment, count, allowed));
        let Some(share) = share else { return 0 };
        self.move_copy(piece, position, share);
        share.count
    }

    /// Makes copies that take up slots of a primary segment the primaries: where their node's devices were laid out.
    fn bring_primaries_home(&mut self) {
        for piece in 0..self.pieces.len() {
            let found = &self.pieces[piece];
            let at_home = |copy: &&Copy| copy.segment == Segment::Primary;
            let first = found.copies[0];
            let home = found.copies.iter().filter(at_home).find(|copy| copy.in_sync && !copy.moved);
            let Some(home) = home.copied().filter(|_| first.segment == Segment::Secondary) else { continue };
            let judge = self.judge();
            let mut others = found.copies.iter().filter(|copy| copy.at != home.at);
            if !first.moved && others.all(|other| judge.mirrors(found, home.at, other.at)) {
                self.swap_roles(piece, home.at);
            }
        }
    }

    /// Cuts a piece after so many slices; the index of what is behind, if there is anything.
    fn split(&mut self, piece: usize, count: u32) -> Option<usize> {
        let found = &mut self.pieces[piece];
        if count >= found.count {
            return None;
        }
        let mut rest = found.clone();
        rest.first += count;
        rest.count -= count;
        found.count = count;
        self.pieces.push(rest);
        Some(self.pieces.len() - 1)
    }

    /// Puts a copy of a whole piece somewhere, in the place of another or as one more.
    fn put(&mut self, piece: usize, need: Need, share: Share) {
        let Share { at, segment, .. } = share;
        let count = self.pieces[piece].count;
        self.copied += u64::from(count);
        self.room.occupy(at, segment, count);
        let found = &mut self.pieces[piece];
        let new = Copy { at, segment, in_sync: true, moved: true };
        match found.copies.iter().position(|copy| Some(copy.at) == need.from) {
            Some(position) => {
                let old = std::mem::replace(&mut found.copies[position], new);
                found.left.push(old.at);
                self.room.leave(old.at, old.segment, count);
                if need.primary {
                    found.copies[..=position].rotate_right(1);
                }
            }
            None => found.copies.push(new),
        }
        self.note(piece, need.from, new, need.primary);
    }

    /// Makes another copy the primary.
    fn swap_roles(&mut self, piece: usize, at: usize) {
        let found = &mut self.pieces[piece];
        let Some(position) = found.copies.iter().position(|copy| copy.at == at) else { return };
        found.copies[..=position].rotate_right(1);
        found.copies[0].moved = true;
        let copy = found.copies[0];
        self.note(piece, None, copy, true);
    }

    /// Gives up a copy, whose place the one at `keeper` takes.
    fn drop_copy(&mut self, piece: usize, at: usize, keeper: usize) {
        let found = &mut self.pieces[piece];
        let Some(position) = found.copies.iter().position(|copy| copy.at == at) else { return };
        let old = found.copies.remove(position);
        found.left.push(old.at);
        let Some(kept) = found.copies.iter().position(|copy| copy.at == keeper) else { return };
        if position == 0 {
            found.copies[..=kept].rotate_right(1);
        }
        let (primary, count) = (position == 0, found.count);
        let copy = found.copies[if primary { 0 } else { kept }];
        self.room.leave(old.at, old.segment, count);
        self.note(piece, Some(old.at), copy, primary);
    }

    fn note(&mut self, piece: usize, from: Option<usize>, to: Copy, primary: bool) {
        let found = &self.pieces[piece];
        let (first, count) = (found.first, found.count);
        let step = Move {
            run: Run { device: self.map.devices[found.device].id, first: SliceIndex(first), count },
            from: from.map(|at| self.room.spots[at].id),
            to: self.room.spots[to.at].id,
            segment: to.segment,
            primary,
        };
        match self.moves.last_mut() {
            // A run that was cut for no reason that still holds.
            Some(last)
                if Move { run: last.run, ..step } == *last
                    && last.run.device == step.run.device
                    && last.run.first.0 + last.run.count == first =>
            {
                last.run.count += count
            }
            _ => self.moves.push(step),
        }
    }

    pub(super) fn finish(self) -> Wanted {
        Wanted { moves: self.moves, copied: self.copied, copied_min: self.copied_min }
    }
}

/// Says where a copy may be.
pub(super) struct Judge<'a> {
    map: &'a DistributionMap,
    room: &'a Room,
    relation: &'a Relation,
    copies: &'a [usize],
}

impl Judge<'_> {
    /// Whether a disk may take what a piece needs, if it had a slot.
    pub(super) fn may_take(&self, piece: &Piece, home: Option<usize>, need: Need, at: usize) -> bool {
        self.may_hold(piece, need.from, at)
            && (self.copies[piece.device] < 2
                || if need.primary {
                    self.knows(at)
                } else {
                    home.is_none_or(|home| self.mirrors(piece, home, at))
                })
    }

    /// Whether a copy that could stay may as well be at that disk, if it had a slot.
    fn may_move(&self, piece: &Piece, position: usize, at: usize) -> bool {
        let mut others = piece.copies.iter().enumerate().filter(|(other, _)| *other != position);
        self.may_hold(piece, Some(piece.copies[position].at), at)
            && match position {
                0 => self.knows(at) && others.all(|(_, other)| self.mirrors(piece, at, other.at)),
                _ => self.mirrors(piece, piece.copies[0].at, at),
            }
    }

    /// Whether the map lets a disk hold a copy of a piece while all that it has are still there.
    pub(super) fn may_hold(&self, piece: &Piece, from: Option<usize>, at: usize) -> bool {
        let spot = &self.room.spots[at];
        let apart = |copy: &Copy| {
            self.room.other_node(copy.at, at) && (Some(copy.at) == from || self.room.other_set(copy.at, at))
        };
        spot.taker
            && spot.block_bytes <= self.map.devices[piece.device].block_bytes
            && !piece.left.contains(&at)
            && piece.copies.iter().all(apart)
    }

    fn knows(&self, at: usize) -> bool {
        self.relation.knows(self.room.spots[at].node)
    }

    fn mirrors(&self, piece: &Piece, home: usize, mirror: usize) -> bool {
        let [home, mirror] = [home, mirror].map(|at| self.room.spots[at].node);
        self.relation.holds(home, mirror, self.copies[piece.device].max(1))
    }
}

/// Where a copy of a segment may lie: there if it can be, else in the other of the mirrored ones.
pub(super) fn segments(segment: Segment) -> &'static [Segment] {
    match segment {
        Segment::Primary => &[Segment::Primary, Segment::Secondary],
        Segment::Secondary => &[Segment::Secondary, Segment::Primary],
        Segment::Unmirrored => &[Segment::Unmirrored],
    }
}

fn copies_of(room: &Room, span: &Span) -> Vec<Copy> {
    let copy = |replica: &crate::map::Replica| {
        let in_sync = replica.state == ReplicaState::InSync;
        room.index(replica.disk).map(|at| Copy { at, segment: replica.segment, in_sync, moved: false })
    };
    span.replicas.iter().filter_map(copy).collect()
}
