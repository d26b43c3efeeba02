//! Which parts of a device hold data: for clients that copy or show only those.

use super::{Engine, Nanos};
use crate::ids::DeviceId;

/// A part of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// In bytes.
    pub length: u64,
    /// Something may be stored there; otherwise it reads as zeros.
    pub data: bool,
}

impl Engine {
    /// The extents of a range, one after the other.
    ///
    /// Only what this node could read at `now`, the present, is ever called empty (docs/protocol.md
    /// rule 12); slices whose primary is another node count as data.
    pub fn extents(
        &mut self,
        now: Nanos,
        device: DeviceId,
        offset: u64,
        length: u64,
    ) -> impl Iterator<Item = Extent> {
        // A lease is judged by the time at which it is used, however long nothing has happened here.
        self.now = now;
        let region = u64::from(self.region_bytes());
        let end = offset.saturating_add(length);
        let device = self.by_device.get(&device).copied();
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let next = ((at / region + 1) * region).min(end);
            let extent = Extent {
                length: next - at,
                data: device.is_none_or(|device| self.may_hold_data(device, at)),
            };
            at = next;
            Some(extent)
        })
    }

    pub(super) fn may_hold_data(&self, index: usize, at: u64) -> bool {
        let slice = at / u64::from(self.slice_bytes);
        let offset = (at % u64::from(self.slice_bytes)) as u32;
        let device = &self.devices[index];
        // A device that grows is exported by the map that is still being adopted here.
        if slice >= u64::from(device.adopted_slices()) {
            return true;
        }
        let entry = &device.slices[slice as usize];
        let span = device.view.span(slice as u32);
        let region = offset / self.region_bytes();
        if !span.serves()
            || self.now < self.serve_after
            || !self.holds_leases(index, span)
            || self.unreconciled(index, slice as u32) >> region & 1 == 1
        {
            return true;
        }
        entry.place.is_none() || self.content(index, slice as u32) >> region & 1 == 1
    }
}
