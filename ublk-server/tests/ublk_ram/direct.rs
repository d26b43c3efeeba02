//! Reading and writing a block device past the page cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::Result;

const ALIGNMENT: usize = 4096;
const LENGTH_MAX: usize = 1 << 20;

/// A block device opened with O_DIRECT, with a buffer as that wants it.
pub struct DirectFile {
    file: File,
    buffer: Vec<u8>,
    start: usize,
}

impl DirectFile {
    pub fn open(path: &Path, flags: i32) -> Result<DirectFile> {
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT | flags).open(path)?;
        let buffer = vec![0u8; LENGTH_MAX + ALIGNMENT];
        let start = buffer.as_ptr().align_offset(ALIGNMENT);
        Ok(DirectFile { file, buffer, start })
    }

    pub fn write(&mut self, data: &[u8], offset: u64) -> Result<()> {
        let room = &mut self.buffer[self.start..][..data.len()];
        room.copy_from_slice(data);
        Ok(self.file.write_all_at(room, offset)?)
    }

    pub fn read(&mut self, length: usize, offset: u64) -> Result<Vec<u8>> {
        let room = &mut self.buffer[self.start..][..length];
        self.file.read_exact_at(room, offset)?;
        Ok(room.to_vec())
    }
}
