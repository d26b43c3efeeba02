//! The exports that NBD clients find.

use ublk_server::frontend::nbd::{ExportInfo, Exports};

/// A few exports.
pub struct Shelf(Vec<ExportInfo>);

/// One that can be written.
pub fn export(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 30,
        block_size_min: 512,
        block_size_preferred: 4096,
        read_only: false,
        rotational: false,
        fast_zero: false,
    }
}

impl Shelf {
    /// So many exports, the first called `disk`, the second read-only.
    pub fn of(count: usize) -> Self {
        let other = ExportInfo { read_only: true, rotational: true, ..export("other") };
        let third = ExportInfo { block_size_min: 4096, fast_zero: true, ..export("third") };
        Self([export("disk"), other, third].into_iter().take(count).collect())
    }
}

impl Exports for Shelf {
    fn list(&self) -> Vec<String> {
        self.0.iter().map(|export| export.name.clone()).collect()
    }

    fn get(&self, name: &str) -> Option<ExportInfo> {
        assert!(!name.is_empty(), "nobody asks for the empty name");
        self.0.iter().find(|export| export.name == name).cloned()
    }
}
