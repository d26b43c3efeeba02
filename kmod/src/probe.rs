//! Can this machine carry a ublk device, and if not, what has to be done?
//!
//! The probe changes nothing: it opens the control device, asks GET_FEATURES and reads files. It never tries
//! ADD_DEV, which crashes some kernels.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use serde::ser::{Serialize, SerializeStruct, Serializer};
use thiserror::Error;
use zerocopy::IntoBytes;

use crate::abi::{CONTROL_DEVICE, CtrlCmd, DEV_ID_ANY, Features, control_op};
use crate::command::{self, CommandError, CommandRing, OpenError};

/// GET_FEATURES never blocks; a kernel that takes longer is in trouble.
const GET_FEATURES_TIMEOUT: Duration = Duration::from_secs(10);

/// The capability that ublk's control commands ask for.
const CAP_SYS_ADMIN: u32 = 21;

/// One thing that keeps the mirror from using ublk here.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Problem {
    /// ADD_DEV crashes this kernel.
    #[error("kernel {release} crashes when a ublk device is added, so it is not tried")]
    KernelRefused {
        /// As `uname -r` says.
        release: String,
    },
    /// `kernel.io_uring_disabled` forbids io_uring.
    #[error("io_uring is switched off here (kernel.io_uring_disabled = {value})")]
    IoUringDisabled {
        /// The sysctl's value: 1 for processes without a right to it, 2 for everybody.
        value: u32,
    },
    /// io_uring is not in the kernel.
    #[error("this kernel was built without io_uring")]
    IoUringMissing,
    /// io_uring cannot be set up for another reason.
    #[error("io_uring cannot be set up: {errno}")]
    IoUringRefused {
        /// What `io_uring_setup` said.
        errno: Errno,
    },
    /// The module exists and nobody loaded it.
    #[error("the module ublk_drv is installed and not loaded")]
    ModuleNotLoaded,
    /// The module does not exist for the running kernel.
    #[error("kernel {release} has no ublk: ublk_drv is neither built in nor among its modules")]
    NotInKernel {
        /// As `uname -r` says.
        release: String,
    },
    /// There is no ublk, and no way to tell whether it could be had.
    #[error("ublk is not there, and {} is missing, so it cannot be told whether the kernel has it", directory.display())]
    ModulesUnknown {
        /// Where the running kernel's modules belong.
        directory: PathBuf,
    },
    /// The driver runs, its device node is missing.
    #[error("the driver is loaded and {CONTROL_DEVICE} does not exist")]
    NodeMissing,
    /// Not enough rights.
    #[error("no right to use {CONTROL_DEVICE}: {lacking}")]
    NoRights {
        /// What is lacking.
        lacking: Lacking,
    },
    /// The driver does not answer GET_FEATURES.
    #[error("the driver of kernel {release} does not know GET_FEATURES, so it is older than 6.5")]
    FeaturesUnknown {
        /// As `uname -r` says.
        release: String,
    },
    /// The driver lacks something.
    #[error("the driver lacks {names}", names = missing)]
    FeaturesMissing {
        /// What it lacks.
        missing: Features,
    },
    /// The driver answered something unexpected.
    #[error("asking the driver for its features failed: {what}")]
    CommandFailed {
        /// The error's text.
        what: String,
    },
}

/// Which right is lacking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Lacking {
    /// The device node cannot be opened.
    #[error("it cannot be opened for reading and writing")]
    Node,
    /// The process has no CAP_SYS_ADMIN.
    #[error("the process lacks CAP_SYS_ADMIN")]
    Admin,
}

impl Problem {
    /// A short word for programs; it does not change between versions.
    pub fn code(&self) -> &'static str {
        match self {
            Problem::KernelRefused { .. } => "kernel_refused",
            Problem::IoUringDisabled { .. } => "io_uring_disabled",
            Problem::IoUringMissing => "io_uring_missing",
            Problem::IoUringRefused { .. } => "io_uring_refused",
            Problem::ModuleNotLoaded => "module_not_loaded",
            Problem::NotInKernel { .. } => "not_in_kernel",
            Problem::ModulesUnknown { .. } => "modules_unknown",
            Problem::NodeMissing => "node_missing",
            Problem::NoRights { .. } => "no_rights",
            Problem::FeaturesUnknown { .. } => "features_unknown",
            Problem::FeaturesMissing { .. } => "features_missing",
            Problem::CommandFailed { .. } => "command_failed",
        }
    }

    /// What to do about it, as a sentence or a command to type.
    pub fn next(&self) -> String {
        match self {
            Problem::KernelRefused { .. } => {
                "boot another kernel: 6.12, 6.18.6 or later, or any 7.x".to_owned()
            }
            Problem::IoUringDisabled { value: 1 } => {
                "run as root, or add the user to the group of kernel.io_uring_group, or: sysctl -w kernel.io_uring_disabled=0".to_owned()
            }
            Problem::IoUringDisabled { .. } => "sysctl -w kernel.io_uring_disabled=0".to_owned(),
            Problem::IoUringMissing => "boot a kernel with CONFIG_IO_URING=y".to_owned(),
            Problem::IoUringRefused { errno: Errno::EPERM } => {
                "a seccomp filter forbids it (containers do): allow io_uring_setup, io_uring_enter and io_uring_register".to_owned()
            }
            Problem::IoUringRefused { errno: Errno::ENOMEM } => {
                "raise the limit of locked memory: ulimit -l unlimited".to_owned()
            }
            Problem::IoUringRefused { .. } => "look into the kernel's log: dmesg".to_owned(),
            Problem::ModuleNotLoaded => "modprobe ublk_drv".to_owned(),
            Problem::NotInKernel { .. } => {
                "boot a kernel with CONFIG_BLK_DEV_UBLK, 6.12 or later: Debian 13's has it; Ubuntu keeps it in \
                 linux-modules-extra-$(uname -r); until then devices can be served over NBD"
                    .to_owned()
            }
            Problem::ModulesUnknown { .. } => {
                "in a container: run modprobe ublk_drv on the host and hand in /dev; else install the running \
                 kernel's modules and: modprobe ublk_drv"
                    .to_owned()
            }
            Problem::NodeMissing => {
                format!(
                    "in a container: hand in the host's {CONTROL_DEVICE}; else: udevadm trigger --subsystem-match=misc"
                )
            }
            Problem::NoRights { .. } => "run it as root: sudo ublk-probe".to_owned(),
            Problem::FeaturesUnknown { .. } | Problem::FeaturesMissing { .. } => {
                "boot kernel 6.12 or later".to_owned()
            }
            Problem::CommandFailed { .. } => "look into the kernel's log: dmesg | grep ublk".to_owned(),
        }
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Problem", 3)?;
        out.serialize_field("code", self.code())?;
        out.serialize_field("message", &self.to_string())?;
        out.serialize_field("next", &self.next())?;
        out.end()
    }
}

/// What the probe found.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// The running kernel, as `uname -r` says.
    pub kernel: String,
    /// What its ublk driver can do; `None` if it could not be asked.
    pub features: Option<Features>,
    /// What stands in the way; empty if nothing does.
    pub problems: Vec<Problem>,
}

impl Verdict {
    /// Whether ublk devices can be served here.
    pub fn usable(&self) -> bool {
        self.problems.is_empty()
    }
}

impl Serialize for Verdict {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Verdict", 6)?;
        out.serialize_field("usable", &self.usable())?;
        out.serialize_field("kernel", &self.kernel)?;
        out.serialize_field("features_bits", &self.features.map(|features| format!("{:#x}", features.0)))?;
        out.serialize_field("features", &self.features.map(Features::names))?;
        out.serialize_field(
            "required_missing",
            &self.features.map(|features| Features::REQUIRED.without(features).names()),
        )?;
        out.serialize_field("problems", &self.problems)?;
        out.end()
    }
}

/// Why there is no verdict at all.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// `uname` failed.
    #[error("the kernel's release is not known: {0}")]
    Uname(#[source] Errno),
}

/// Looks at the running machine.
///
/// # Errors
/// Only when not even the kernel's release can be learned; everything else is a [`Problem`] of the verdict.
pub fn probe() -> Result<Verdict, ProbeError> {
    let uname = nix::sys::utsname::uname().map_err(ProbeError::Uname)?;
    let kernel = uname.release().to_string_lossy().into_owned();
    let root = Path::new("/");

    let mut problems = Vec::new();
    if is_refused(&kernel) {
        problems.push(Problem::KernelRefused { release: kernel.clone() });
    }
    problems.extend(io_uring_problem());
    let mut features = None;
    if !root.join(CONTROL_DEVICE.trim_start_matches('/')).exists() {
        problems.push(absent_driver(root, &kernel));
    } else if !has_capability(&read(root, "proc/self/status"), CAP_SYS_ADMIN) {
        problems.push(Problem::NoRights { lacking: Lacking::Admin });
    } else if problems.iter().all(|problem| matches!(problem, Problem::KernelRefused { .. })) {
        match ask_features(&kernel) {
            Ok(found) => {
                features = Some(found);
                let missing = Features::REQUIRED.without(found);
                if !missing.is_empty() {
                    problems.push(Problem::FeaturesMissing { missing });
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    Ok(Verdict { kernel, features, problems })
}

/// Kernels that got the NUMA-aware queues without the reordering they need: a null pointer in `ublk_init_queues`
/// at the first ADD_DEV. Stable 6.18.4 and 6.18.5; Ubuntu's 6.17 for clouds from build 1015 (seen: azure 1015 and
/// 1018, aws 1017; no fixed build is known).
fn is_refused(release: &str) -> bool {
    let (version, build) = release.split_once('-').unwrap_or((release, ""));
    match version {
        "6.18.4" | "6.18.5" => true,
        "6.17.0" => {
            let (number, flavour) = build.split_once('-').unwrap_or((build, ""));
            let flavour = flavour.split('-').next().unwrap_or("");
            matches!(flavour, "aws" | "azure" | "gcp" | "oracle")
                && number.parse::<u32>().is_ok_and(|number| (1015..2000).contains(&number))
        }
        _ => false,
    }
}

/// What keeps this process from having an io_uring.
fn io_uring_problem() -> Option<Problem> {
    let error = match command::open_ring() {
        Ok(_) => return None,
        Err(error) => error,
    };
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    let disabled: u32 = read(Path::new("/"), "proc/sys/kernel/io_uring_disabled").trim().parse().unwrap_or(0);
    Some(match errno {
        Errno::ENOSYS => Problem::IoUringMissing,
        Errno::EPERM if disabled != 0 => Problem::IoUringDisabled { value: disabled },
        errno => Problem::IoUringRefused { errno },
    })
}

/// Why `/dev/ublk-control` is not there.
fn absent_driver(root: &Path, kernel: &str) -> Problem {
    if root.join("sys/class/misc/ublk-control").exists() {
        return Problem::NodeMissing;
    }
    let directory = root.join("lib/modules").join(kernel);
    if !directory.is_dir() {
        return Problem::ModulesUnknown { directory };
    }
    let listed = |list: &str| {
        fs::read_to_string(directory.join(list))
            .is_ok_and(|text| text.lines().any(|line| line.contains("/ublk_drv.ko")))
    };
    let file_there = ["ublk_drv.ko", "ublk_drv.ko.xz", "ublk_drv.ko.zst", "ublk_drv.ko.gz"]
        .iter()
        .any(|name| directory.join("kernel/drivers/block").join(name).exists());
    if file_there || listed("modules.dep") || modprobe_knows(root, "ublk_drv") {
        Problem::ModuleNotLoaded
    } else {
        Problem::NotInKernel { release: kernel.to_owned() }
    }
}

/// Whether `modprobe` would find the module; it also knows directories that were configured for it.
fn modprobe_knows(root: &Path, module: &str) -> bool {
    if root != Path::new("/") {
        return false;
    }
    // Not in the path of ordinary users on Debian.
    ["modprobe", "/usr/sbin/modprobe", "/sbin/modprobe"].iter().any(|program| {
        Command::new(program)
            .args(["--dry-run", "--quiet", module])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    })
}

/// Asks the driver, which must be there.
fn ask_features(kernel: &str) -> Result<Features, Problem> {
    let mut ring = CommandRing::open().map_err(|error| match error {
        OpenError::ControlDevice(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Problem::NoRights { lacking: Lacking::Node }
        }
        OpenError::ControlDevice(error) if error.raw_os_error() == Some(libc::ENODEV) => Problem::NodeMissing,
        error => Problem::CommandFailed { what: error.to_string() },
    })?;
    get_features(&mut ring).map_err(|error| match error {
        CommandError::Refused(Errno::EOPNOTSUPP | Errno::EINVAL) => {
            Problem::FeaturesUnknown { release: kernel.to_owned() }
        }
        CommandError::Refused(Errno::EPERM | Errno::EACCES) => Problem::NoRights { lacking: Lacking::Admin },
        error => Problem::CommandFailed { what: error.to_string() },
    })
}

/// The features of the running driver.
///
/// # Errors
/// As [`CommandRing::call`]; a driver older than 6.5 refuses with EOPNOTSUPP.
pub fn get_features(ring: &mut CommandRing) -> Result<Features, CommandError> {
    let mut features = Features::NONE;
    let command = CtrlCmd::for_device(DEV_ID_ANY, 0);
    ring.call(control_op::GET_FEATURES, command, features.as_mut_bytes(), GET_FEATURES_TIMEOUT)?;
    Ok(features)
}

/// Whether the effective set in the text of `/proc/self/status` has a capability.
fn has_capability(status: &str, capability: u32) -> bool {
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .is_some_and(|set| set & (1 << capability) != 0)
}

fn read(root: &Path, path: &str) -> String {
    fs::read_to_string(root.join(path)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_that_crash_are_refused() {
        for release in [
            "6.18.4",
            "6.18.5",
            "6.18.4-arch1-1",
            "6.17.0-1015-azure",
            "6.17.0-1017-aws",
            "6.17.0-1018-azure-fde",
        ] {
            assert!(is_refused(release), "{release}");
        }
        for release in [
            "6.12.107+deb13-cloud-amd64",
            "6.18.40",
            "6.18.6",
            "6.18.44-fc",
            "6.17.0-14-generic",
            "6.17.0-1010-azure",
            "6.17.5",
            "7.3.4",
        ] {
            assert!(!is_refused(release), "{release}");
        }
    }

    #[test]
    fn an_absent_driver_has_its_own_sentence_for_each_cause() {
        let root = tempfile::tempdir().unwrap();
        let modules = root.path().join("lib/modules/6.12.1");
        assert_eq!(
            absent_driver(root.path(), "6.12.1"),
            Problem::ModulesUnknown { directory: modules.clone() }
        );
        fs::create_dir_all(&modules).unwrap();
        assert_eq!(
            absent_driver(root.path(), "6.12.1"),
            Problem::NotInKernel { release: "6.12.1".to_owned() }
        );
        fs::write(modules.join("modules.dep"), "kernel/drivers/block/ublk_drv.ko.xz:\n").unwrap();
        assert_eq!(absent_driver(root.path(), "6.12.1"), Problem::ModuleNotLoaded);
        fs::create_dir_all(root.path().join("sys/class/misc/ublk-control")).unwrap();
        assert_eq!(absent_driver(root.path(), "6.12.1"), Problem::NodeMissing);
    }

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let status = "CapPrm:\t000001ffffffffff\nCapEff:\t0000000000200000\n";
        assert!(has_capability(status, CAP_SYS_ADMIN));
        assert!(!has_capability(status, 20));
        assert!(!has_capability("", CAP_SYS_ADMIN));
    }

    #[test]
    fn a_verdict_without_problems_is_usable() {
        let mut verdict =
            Verdict { kernel: "6.12".to_owned(), features: Some(Features(0x1fe)), problems: vec![] };
        assert!(verdict.usable());
        verdict.problems.push(Problem::ModuleNotLoaded);
        assert!(!verdict.usable());
        let json = serde_json::to_value(&verdict).unwrap();
        assert_eq!(json["usable"], false);
        assert_eq!(json["features_bits"], "0x1fe");
        assert_eq!(json["problems"][0]["code"], "module_not_loaded");
        assert_eq!(json["problems"][0]["next"], "modprobe ublk_drv");
    }
}
