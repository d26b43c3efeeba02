//! How slow the emulated machines are here and now: what is waited for, and what a daemon takes for a failure, is scaled by it.

use super::machine::Machine;
use anyhow::ensure;
use std::fmt;
use std::time::{Duration, Instant};

/// What a machine takes to come up where two of them have the host to themselves.
const BOOT_REFERENCE: Duration = Duration::from_secs(10);
/// And a command, from the host and back.
const COMMAND_REFERENCE: Duration = Duration::from_millis(60);
/// How many commands are timed; the median counts.
const COMMANDS: usize = 9;
/// Beyond this a host is too slow to be waited for.
const FACTOR_MAX: f64 = 20.0;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// What a machine took to come up, all at once.
    pub boot: Duration,
    command: Duration,
    /// How many times slower than the reference, at least 1.
    pub factor: f64,
}

impl Calibration {
    /// From the times that machines took to come up together, and from commands on one of them.
    pub fn measure(machine: &Machine, boots: &[Duration]) -> anyhow::Result<Self> {
        let boot = boots.iter().copied().max().unwrap_or_default();
        let mut commands = Vec::new();
        for _ in 0..COMMANDS {
            let begun = Instant::now();
            machine.run(&["true"], Duration::from_secs(60))?.ok()?;
            commands.push(begun.elapsed());
        }
        commands.sort();
        let command = commands[COMMANDS / 2];
        let slower =
            |measured: Duration, reference: Duration| measured.as_secs_f64() / reference.as_secs_f64();
        let factor = slower(boot, BOOT_REFERENCE).max(slower(command, COMMAND_REFERENCE)).max(1.0);
        ensure!(factor <= FACTOR_MAX, "this host is {factor:.0} times slower than a lab needs: is it busy?");
        Ok(Self { boot, command, factor })
    }

    /// A time that is right where nothing is slow.
    pub fn scale(&self, time: Duration) -> Duration {
        time.mul_f64(self.factor)
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            to,
            "calibration: machines up after {:.1} s (reference {:.0}), a command takes {:.0} ms (reference {:.0}): \
             times are scaled by {:.1}",
            self.boot.as_secs_f64(),
            BOOT_REFERENCE.as_secs_f64(),
            self.command.as_secs_f64() * 1e3,
            COMMAND_REFERENCE.as_secs_f64() * 1e3,
            self.factor
        )
    }
}
