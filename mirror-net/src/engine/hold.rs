//! How long a copy that was left behind stays so before it is taken back.
//!
//! Whoever was lost once is taken back at once. Whoever is lost again and again, as behind a cable that comes and goes, would
//! change the map each time, hold up every write for as long as its loss takes to be noticed, and never get far in being
//! made equal. So with each loss that follows another it is left out for twice as long as before.

use super::Nanos;

/// The first hold, after a second loss.
const FIRST: Nanos = 1_000_000_000;
/// A loss that comes so long after the one before is a first one again.
const FORGOTTEN: Nanos = 300_000_000_000;

/// What is remembered of one peer's losses.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Hold {
    /// Losses of late, each not long after the one before.
    pub losses: u32,
    last: Nanos,
    until: Nanos,
}

impl Hold {
    /// It was lost as a member.
    pub fn lost(&mut self, now: Nanos, longest: Nanos) {
        if self.losses > 0 && now >= self.last + FORGOTTEN {
            self.losses = 0;
        }
        let length = match self.losses {
            0 => 0,
            again => FIRST.saturating_mul(1 << (again - 1).min(30)).min(longest),
        };
        self.losses = self.losses.saturating_add(1);
        self.last = now;
        self.until = self.until.max(now + length);
    }

    /// For how long it is still left out, in nanoseconds; 0 for no longer.
    pub fn left(&self, now: Nanos) -> Nanos {
        self.until.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::config::{NodePolicy, Tolerance};
    use crate::engine::action::Report;
    use crate::engine::testing::{Rig, map, next};
    use crate::ids::{DeviceId, SliceEpoch};
    use crate::map::ReplicaState;
    use crate::wire::header::Kind;
    use std::time::Duration;

    const SECOND: Nanos = 1_000_000_000;
    const LONGEST: Nanos = 60 * SECOND;

    #[test]
    fn the_first_loss_costs_nothing_and_each_that_follows_twice_as_much() {
        let mut hold = Hold::default();
        let mut now = 10 * SECOND;
        for expected in [0, 1, 2, 4, 8, 16, 32, 60, 60] {
            hold.lost(now, LONGEST);
            assert_eq!(hold.left(now), expected * SECOND);
            now += hold.left(now) + SECOND;
            assert_eq!(hold.left(now), 0);
        }
        now += FORGOTTEN;
        hold.lost(now, LONGEST);
        assert_eq!((hold.left(now), hold.losses), (0, 1));
    }

    #[test]
    fn a_loss_while_it_is_left_out_does_not_shorten_that() {
        let mut hold = Hold::default();
        (0..3).for_each(|_| hold.lost(0, LONGEST));
        hold.lost(SECOND, SECOND / 2);
        assert_eq!(hold.left(SECOND), SECOND);
    }

    /// A disk that hangs while its node lives.
    #[test]
    fn a_partner_that_owes_an_answer_is_told_of_and_then_gone_on_without() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(1, &first);
        let tolerance = Tolerance { stale_after: Some(Duration::from_secs(5)), ..Tolerance::default() };
        rig.engine.set_policy(NodePolicy { tolerance, ..NodePolicy::default() });
        let token = rig.write(0, 4096);
        let slow = |rig: &Rig| rig.engine.session_reports()[0].slow_ms;
        rig.wait(1_500, &[2]);
        assert_eq!(slow(&rig), None);
        rig.wait(1_000, &[2]);
        assert_eq!(slow(&rig), Some(2_500));
        rig.wait(2_000, &[2]);
        assert!(rig.reports.is_empty(), "{:?}", rig.reports);
        rig.wait(500, &[2]);
        let [Report::AskSlow { cause, .. }] = &rig.reports[..] else { panic!("{:?}", rig.reports) };
        assert_eq!(cause, "it owes an answer for 5 s");
        assert_eq!(rig.result(token), None, "it is behind only once the map says so");
        assert!(rig.closed.is_empty(), "its node lives, and would go on without the copies here");
        let stale = next(&first, |span| span.replicas[1].state = ReplicaState::Stale);
        rig.adopt(&stale);
        rig.wait(50, &[2]);
        assert_eq!(rig.closed, [2], "what it owes must not land after what is written next");
        assert_eq!(rig.result(token), Some(Ok(())));
    }

    /// With the manager away a hiccup is over before anything is on record: nothing was missed.
    #[test]
    fn who_answers_before_the_manager_says_anything_is_no_worse() {
        let mut rig = Rig::new(1, &map(2, 2, 1));
        let tolerance = Tolerance { stale_after: Some(Duration::from_secs(5)), ..Tolerance::default() };
        rig.engine.set_policy(NodePolicy { tolerance, ..NodePolicy::default() });
        let first = rig.write(0, 4096);
        let owed = rig.take(Kind::Write);
        rig.wait(5_500, &[2]);
        assert!(matches!(rig.reports[..], [Report::AskSlow { .. }]), "{:?}", rig.reports);
        let second = rig.write(8192, 4096);
        assert!(rig.take(Kind::Write).is_empty(), "nothing more is sent to it");
        rig.ack(&owed[0]);
        assert_eq!((rig.result(first), rig.result(second)), (Some(Ok(())), None));
        rig.wait(50, &[2]);
        for sent in rig.take(Kind::Write) {
            rig.ack(&sent);
        }
        assert_eq!(rig.result(second), Some(Ok(())));
    }

    /// Rule 3: it hangs, and it is not what the map says. That the one passes does not make the other good.
    #[test]
    fn who_answers_in_time_is_lost_all_the_same_if_it_is_another_incarnation() {
        let first = map(2, 2, 1);
        let mut rig = Rig::new(1, &first);
        let tolerance = Tolerance { stale_after: Some(Duration::from_secs(5)), ..Tolerance::default() };
        rig.engine.set_policy(NodePolicy { tolerance, ..NodePolicy::default() });
        rig.write(0, 4096);
        let owed = rig.take(Kind::Write);
        rig.wait(5_500, &[2]);
        assert!(matches!(rig.reports[..], [Report::AskSlow { .. }]), "{:?}", rig.reports);
        rig.reports.clear();
        let other = next(&first, |span| span.replicas[1].incarnation.attach.0 += 1);
        rig.adopt(&other);
        rig.adopted(2, other.version.0);
        let second = rig.write(8192, 4096);
        rig.ack(&owed[0]);
        rig.wait(2_000, &[2]);
        assert!(
            rig.reports.iter().any(|report| matches!(report, Report::AskStale { .. })),
            "{:?}",
            rig.reports
        );
        assert_eq!((rig.take(Kind::Write).len(), rig.result(second)), (0, None));
    }

    /// It is primary of what we have in sync: if its session ended it would go on without us, on a disk that hangs.
    #[test]
    fn while_it_is_primary_of_what_is_in_sync_here_the_session_stays_and_the_roles_are_asked_for() {
        let mut both = map(2, 2, 1);
        let mut other = both.devices[0].clone();
        (other.id, other.name) = (DeviceId(2), "other".into());
        other.spans[0].replicas.swap(0, 1);
        both.devices.push(other);
        let mut rig = Rig::new(1, &both);
        let token = rig.write(0, 4096);
        rig.wait(1_000, &[2]);
        let stale = next(&both, |span| span.replicas[1].state = ReplicaState::Stale);
        rig.adopt(&stale);
        rig.adopted(2, stale.version.0);
        rig.reports.clear();
        rig.wait(2_000, &[2]);
        assert!(rig.closed.is_empty(), "{:?}", rig.closed);
        let asked = rig.reports.iter().any(|report| matches!(report, Report::AskSlow { .. }));
        assert!(asked, "{:?}", rig.reports);
        let mut moved = next(&stale, |_| {});
        moved.devices[1].spans[0].replicas.swap(0, 1);
        moved.devices[1].spans[0].replicas[1].state = ReplicaState::Stale;
        moved.devices[1].spans[0].epoch = SliceEpoch(moved.version.0);
        rig.adopt(&moved);
        rig.wait(50, &[2]);
        assert_eq!((rig.closed.as_slice(), rig.result(token)), ([2].as_slice(), Some(Ok(()))));
    }

    #[test]
    fn an_answer_in_time_is_no_matter_however_many_are_owed() {
        let mut rig = Rig::new(1, &map(2, 2, 1));
        let mut owed = Vec::new();
        for at in 0..40 {
            rig.write(at % 8 * 4096, 4096);
            owed.extend(rig.take(Kind::Write));
            rig.wait(200, &[2]);
            // Dirty bits are cleared now and then.
            for upkeep in [Kind::Flush, Kind::Clear].map(|kind| rig.take(kind)).concat() {
                rig.ack(&upkeep);
            }
            if owed.len() > 4 {
                rig.ack(&owed.remove(0));
            }
        }
        assert_eq!(rig.engine.session_reports()[0].slow_ms, None);
        assert!(rig.reports.is_empty() && rig.closed.is_empty());
    }

    /// A cable that comes and goes does not make the map do so.
    #[test]
    fn whoever_is_lost_again_and_again_is_asked_back_later_each_time() {
        let mut rig = Rig::new(1, &map(2, 2, 1));
        let mut version = map(2, 2, 1);
        let mut waited = Vec::new();
        for _ in 0..4 {
            rig.lane_down(2);
            version = next(&version, |span| span.replicas[1].state = ReplicaState::Stale);
            rig.adopt(&version);
            rig.open(2, version.version);
            rig.reports.clear();
            let begun = rig.now;
            while !rig.reports.iter().any(|report| matches!(report, Report::AskSyncing { .. })) {
                rig.wait(50, &[2]);
            }
            waited.push((rig.now - begun) / SECOND);
            version = next(&version, |span| span.replicas[1].state = ReplicaState::InSync);
            rig.adopt(&version);
            rig.adopted(2, version.version.0);
        }
        assert_eq!(waited, [0, 1, 2, 4]);
        rig.lane_down(2);
        rig.adopt(&next(&version, |span| span.replicas[1].state = ReplicaState::Stale));
        let adopted = rig.engine.adopted_version();
        rig.open(2, adopted);
        assert_eq!(rig.engine.session_reports()[0].held_ms, Some((8_000, 5)));
    }
}
