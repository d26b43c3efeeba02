//! A user of one device of a playground, who knows what he wrote.

use crate::nbd::NbdClient;
use crate::playground::Playground;
use crate::sim::scheduler::Random;
use anyhow::ensure;
use std::collections::BTreeMap;

/// Bytes that are written at a time.
pub const BLOCK: u64 = 64 << 10;

/// A device, and what it has to hold: blocks that were never written are zeros.
pub struct Tenant {
    /// Its name.
    pub name: &'static str,
    /// A connection to it.
    pub client: NbdClient,
    /// What was written, by number of block.
    pub content: BTreeMap<u64, u8>,
}

impl Tenant {
    /// Connects to a device that is empty.
    pub fn connect(play: &Playground, name: &'static str) -> anyhow::Result<Self> {
        Ok(Self { name, client: NbdClient::connect(&play.uri(name)?)?, content: BTreeMap::new() })
    }

    /// Writes somewhere, and reads somewhere else.
    pub fn work(&mut self, random: &mut Random) -> anyhow::Result<()> {
        let blocks = self.client.size / BLOCK;
        let (at, value) = (random.below(blocks), random.below(255) as u8 + 1);
        self.client.write(at * BLOCK, &vec![value; BLOCK as usize])?;
        self.content.insert(at, value);
        let at = random.below(blocks);
        self.check(at)
    }

    /// Reads one block.
    pub fn check(&mut self, at: u64) -> anyhow::Result<()> {
        let expected = self.content.get(&at).copied().unwrap_or(0);
        let read = self.client.read(at * BLOCK, BLOCK as u32)?;
        ensure!(read.iter().all(|byte| *byte == expected), "{} block {at} is not {expected}", self.name);
        Ok(())
    }

    /// Reads all of it.
    pub fn check_all(&mut self) -> anyhow::Result<()> {
        (0..self.client.size / BLOCK).try_for_each(|at| self.check(at))
    }
}
