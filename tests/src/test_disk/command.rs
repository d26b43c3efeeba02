//! What a test disk can be told, as words: for its control socket and for `scripts/lab disk`.

use std::fmt;

/// Kinds of requests that fail, or never end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The disk has died.
    All,
    /// It can only be read.
    Writes,
    /// One write fails.
    NextWrite,
    /// One flush fails, and loses a subset of what it should have kept.
    NextFlush,
    /// Nothing ends until `heal`; then all of it does.
    Hang,
}

impl fmt::Display for Fault {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self {
            Self::All => "everything fails",
            Self::Writes => "writes fail",
            Self::NextWrite => "the next write fails",
            Self::NextFlush => "the next flush fails",
            Self::Hang => "nothing ends",
        })
    }
}

/// One order.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Order {
    /// The power is gone.
    Cut,
    /// Something fails from now on.
    Fault(Fault),
    /// Sectors that cannot be read until they are written.
    BadSector {
        /// The first, in sectors of 512 bytes.
        lba: u64,
        /// How many.
        count: u64,
    },
    /// The head is slow, and slower towards the end; in MiB per second.
    Slow {
        /// At the first byte.
        first: f64,
        /// At the last.
        last: f64,
    },
    /// A disk with the same content and nothing wrong.
    Heal,
    /// Only tells.
    Status,
}

/// How orders are written.
pub const USAGE: &str = "cut | fail [writes|next-write|next-flush] | hang | bad-sector LBA [COUNT] | slow MIB_S [MIB_S_AT_THE_END] \
     | heal | status";

impl Order {
    /// Reads an order; the error is for people.
    pub fn parse(words: &[&str]) -> Result<Self, String> {
        let order = match words {
            ["cut"] => Self::Cut,
            ["fail"] => Self::Fault(Fault::All),
            ["fail", "writes"] => Self::Fault(Fault::Writes),
            ["fail", "next-write"] => Self::Fault(Fault::NextWrite),
            ["fail", "next-flush"] => Self::Fault(Fault::NextFlush),
            ["hang"] => Self::Fault(Fault::Hang),
            ["bad-sector", lba] => Self::BadSector { lba: number(lba)?, count: 1 },
            ["bad-sector", lba, count] => Self::BadSector { lba: number(lba)?, count: number(count)?.max(1) },
            ["slow", speed] => Self::Slow { first: rate(speed)?, last: rate(speed)? },
            ["slow", first, last] => Self::Slow { first: rate(first)?, last: rate(last)? },
            ["heal"] => Self::Heal,
            ["status"] => Self::Status,
            _ => return Err(format!("not an order for a disk: {:?}; one of: {USAGE}", words.join(" "))),
        };
        Ok(order)
    }
}

fn number(word: &str) -> Result<u64, String> {
    word.parse().map_err(|_| format!("{word:?} is not a number of sectors"))
}

fn rate(word: &str) -> Result<f64, String> {
    match word.parse::<f64>() {
        // A hundredth is a byte now and then: slower than that is called hanging.
        Ok(rate) if (0.01..1e6).contains(&rate) => Ok(rate),
        _ => Err(format!("{word:?} is not a speed in MiB per second, from 0.01 on")),
    }
}
