//! Mistakes put in on purpose, to see that the simulator notices them.
//!
//! They exist with the feature `planted-bugs` only, which no build of the product has; without it
//! [`is`] is `false` before the program runs, and the code behind it is gone. Which one is active
//! belongs to the thread, as the simulator runs one cluster a thread.

#[cfg(feature = "planted-bugs")]
use std::cell::Cell;

/// A mistake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A primary that rebooted before anybody noticed stays primary.
    RebootBelieved,
    /// A stale copy is promoted when its primary fails.
    StalePromoted,
    /// A readmission after a loss of power raises no loss generation.
    LossUntold,
    /// The manager sends a map out before it is stored.
    SentBeforeStored,
    /// An exporter may start before every primary knows its claim.
    ExportedEarly,
    /// Data goes to the disk while the dirty bit is still on its way.
    DataBeforeIntent,
    /// Log writes stay in the disk's volatile cache.
    IntentVolatile,
    /// The log's tail moves on before the pages that replace it are flushed.
    TailEarly,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::RebootBelieved,
        Self::StalePromoted,
        Self::LossUntold,
        Self::SentBeforeStored,
        Self::ExportedEarly,
        Self::DataBeforeIntent,
        Self::IntentVolatile,
        Self::TailEarly,
    ];

    /// Its name on the command line and in the list of seeds.
    pub fn name(self) -> &'static str {
        match self {
            Self::RebootBelieved => "reboot-believed",
            Self::StalePromoted => "stale-promoted",
            Self::LossUntold => "loss-untold",
            Self::SentBeforeStored => "sent-before-stored",
            Self::ExportedEarly => "exported-early",
            Self::DataBeforeIntent => "data-before-intent",
            Self::IntentVolatile => "intent-volatile",
            Self::TailEarly => "tail-early",
        }
    }

    /// One line for people.
    pub fn description(self) -> &'static str {
        match self {
            Self::RebootBelieved => "a primary that rebooted before anybody noticed stays primary",
            Self::StalePromoted => "a stale copy is promoted when its primary fails",
            Self::LossUntold => "a readmission after a loss of power raises no loss generation",
            Self::SentBeforeStored => "the manager sends a map out before it is stored",
            Self::ExportedEarly => "an exporter may start before every primary knows its claim",
            Self::DataBeforeIntent => "data goes to the disk while the dirty bit is still on its way",
            Self::IntentVolatile => "log writes stay in the disk's volatile cache",
            Self::TailEarly => "the log's tail moves on before the pages that replace it are flushed",
        }
    }

    /// The one with that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bug| bug.name() == name)
    }
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static ACTIVE: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Makes a mistake active on this thread, in place of any other.
#[cfg(feature = "planted-bugs")]
pub fn set(bug: Option<Bug>) {
    ACTIVE.set(bug);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn is(bug: Bug) -> bool {
    ACTIVE.get() == Some(bug)
}

/// Whether this mistake is to be made: never, in this build.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is(_: Bug) -> bool {
    false
}

#[cfg(all(test, feature = "planted-bugs"))]
mod tests {
    use super::*;

    #[test]
    fn every_bug_is_found_by_its_name_and_active_alone() {
        for bug in Bug::ALL {
            assert_eq!(Bug::named(bug.name()), Some(bug));
            set(Some(bug));
            assert_eq!(Bug::ALL.into_iter().filter(|other| is(*other)).collect::<Vec<_>>(), [bug]);
        }
        set(None);
        assert!(!Bug::ALL.into_iter().any(is));
    }
}
