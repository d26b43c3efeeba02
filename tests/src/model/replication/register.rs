//! What a region may contain, as its user knows it: the specification that copies are held to.

use zerocopy::{Immutable, IntoBytes};

/// The highest number of a write.
pub const WRITES_MAX: u8 = 3;

/// A register that is written with the numbers 1 to [`WRITES_MAX`], each once; 0 to begin with.
///
/// Held are all the histories that fit what its user saw: pairs of what it contains now and which
/// writes, begun and not acknowledged, have yet to take effect. One whose user died may take effect
/// at any time, once. Nothing is left when no order of effects explains what was read.
#[derive(Clone, Copy, PartialEq, Eq, Default, IntoBytes, Immutable)]
#[repr(C)]
pub struct Register {
    /// A bit for each pair: content plus 4 times the set of writes to come (write 1 is bit 0 of it).
    histories: [u8; 4],
    /// Begun and not acknowledged: bit `w`.
    begun: u8,
    /// What it may have contained since the start of the last acknowledged FLUSH: bit `value`.
    unflushed: u8,
    /// The same since the start of the FLUSH that runs.
    flushing: u8,
}

/// All pairs in which the content is `value`.
fn with_content(value: u8) -> u32 {
    0x1111_1111 << value
}

/// All pairs in which `write` has yet to take effect.
fn with_outstanding(write: u8) -> u32 {
    (0..8).filter(|set| set >> (write - 1) & 1 == 1).fold(0, |mask, set| mask | 0xf << (4 * set))
}

impl Register {
    /// Contains `value`, and that is flushed.
    pub fn containing(value: u8) -> Self {
        let mut new = Self::default();
        new.set(1 << value);
        new.unflushed = 1 << value;
        new
    }

    fn histories(&self) -> u32 {
        u32::from_le_bytes(self.histories)
    }

    /// Takes the pairs, and all that they lead to.
    fn set(&mut self, mut histories: u32) {
        // A write taking effect leaves a smaller set, so one pass downwards finds everything.
        for set in (1..8u32).rev().filter(|set| histories >> (4 * set) & 0xf != 0).collect::<Vec<_>>() {
            for write in 1..=u32::from(WRITES_MAX) {
                if set >> (write - 1) & 1 == 1 {
                    histories |= 1 << (write + 4 * (set & !(1 << (write - 1))));
                }
            }
        }
        self.histories = histories.to_le_bytes();
        self.unflushed |= self.contents();
        self.flushing |= self.contents();
    }

    /// What it may contain now: bit `value`.
    pub fn contents(&self) -> u8 {
        (0..=WRITES_MAX)
            .filter(|value| self.histories() & with_content(*value) != 0)
            .fold(0, |a, v| a | 1 << v)
    }

    /// A write begins.
    pub fn begin(&mut self, write: u8) {
        self.begun |= 1 << write;
        let before = self.histories();
        let moved =
            (0..8u32).fold(0, |all, set| all | (before >> (4 * set) & 0xf) << (4 * (set | 1 << (write - 1))));
        self.set(moved);
    }

    /// A write is acknowledged: it has taken effect.
    pub fn acknowledge(&mut self, write: u8) {
        self.begun &= !(1 << write);
        self.set(self.histories() & !with_outstanding(write));
    }

    /// It is read; false if no history explains that.
    pub fn read(&mut self, value: u8) -> bool {
        let left = self.histories() & with_content(value);
        self.set(left);
        left != 0
    }

    /// What was not flushed may be lost: it contains anything that it may have contained since.
    pub fn lose(&mut self) {
        let mut histories = 0;
        for set in (0..8u32).filter(|set| (set << 1) & !u32::from(self.begun) == 0) {
            histories |= u32::from(self.unflushed & 0xf) << (4 * set);
        }
        self.set(histories);
    }

    /// A FLUSH begins.
    pub fn begin_flush(&mut self) {
        self.flushing = self.contents();
    }

    /// It is acknowledged.
    pub fn flushed(&mut self) {
        self.unflushed = self.flushing;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unanswered_write_may_take_effect_once_at_any_time() {
        let mut register = Register::containing(0);
        register.begin(1);
        assert_eq!(register.contents(), 0b11);
        let mut early = register;
        assert!(early.read(1) && !early.read(0), "what was read is not taken back");
        let mut late = register;
        assert!(late.read(0) && late.read(1));
        register.begin(2);
        register.acknowledge(2);
        assert_eq!(register.contents(), 0b110, "the first may still come");
        assert!(register.read(2) && register.read(1) && !register.read(2));
    }

    #[test]
    fn an_acknowledged_write_stays() {
        let mut register = Register::containing(0);
        register.begin(1);
        register.acknowledge(1);
        assert!(!register.read(0));
    }

    #[test]
    fn only_what_no_flush_covered_may_be_lost() {
        let mut register = Register::containing(0);
        register.begin(1);
        register.acknowledge(1);
        register.begin_flush();
        register.begin(2);
        register.acknowledge(2);
        register.flushed();
        register.lose();
        assert_eq!(register.contents(), 0b110);
    }
}
