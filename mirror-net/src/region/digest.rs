//! Digests by which two copies are compared without sending them.
//!
//! Keyed BLAKE3, cut to 16 bytes: whoever writes data but does not know the key cannot make two
//! blocks that only look equal, so the length need not allow for the birthday bound. The digest of a
//! large block is that of its small blocks' digests; one pass over the data yields both.

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 16;
/// The small block: what is sent when it differs.
pub const FINE_BYTES: u32 = 4 << 10;
/// The large block: what is compared first.
pub const COARSE_BYTES: u32 = 64 << 10;

const FINE_PER_COARSE: usize = (COARSE_BYTES / FINE_BYTES) as usize;

/// One block's digest.
pub type Digest = [u8; DIGEST_BYTES];

/// The key, the same on all nodes of a cluster and nowhere else.
#[derive(Clone)]
pub struct DigestKey([u8; 32]);

impl std::fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DigestKey(..)")
    }
}

impl DigestKey {
    /// Derived from the cluster's secret.
    pub fn new(secret: &[u8]) -> Self {
        Self(blake3::derive_key("ublk-mirror 2026 digests of blocks", secret))
    }

    /// The digests of all small blocks, the last of which may be shorter.
    pub fn fine(&self, data: &[u8]) -> Vec<Digest> {
        data.chunks(FINE_BYTES as usize).map(|block| self.digest(block)).collect()
    }

    /// The digest of a small block of zeros.
    pub fn zero(&self) -> Digest {
        self.digest(&[0; FINE_BYTES as usize])
    }

    fn digest(&self, data: &[u8]) -> Digest {
        cut(blake3::keyed_hash(&self.0, data))
    }
}

fn cut(hash: blake3::Hash) -> Digest {
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&hash.as_bytes()[..DIGEST_BYTES]);
    digest
}

/// The digests of the large blocks, from those of the small.
pub fn coarse(fine: &[Digest]) -> Vec<Digest> {
    fine.chunks(FINE_PER_COARSE).map(|group| cut(blake3::hash(group.as_flattened()))).collect()
}

/// A block's digest bound to its place: what it adds to the sum over a device.
pub fn placed(digest: &Digest, offset: u64) -> u128 {
    let mut bytes = [0; DIGEST_BYTES + 8];
    bytes[..DIGEST_BYTES].copy_from_slice(digest);
    bytes[DIGEST_BYTES..].copy_from_slice(&offset.to_le_bytes());
    u128::from_le_bytes(cut(blake3::hash(&bytes)))
}

/// The digests in a message.
pub fn parse(bytes: &[u8]) -> Option<Vec<Digest>> {
    let (digests, rest) = bytes.as_chunks::<DIGEST_BYTES>();
    rest.is_empty().then(|| digests.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_changes_its_blocks_digests_only() {
        let key = DigestKey::new(b"secret");
        let mut data = vec![7u8; 200 << 10];
        let before = key.fine(&data);
        data[70 << 10] ^= 1;
        let after = key.fine(&data);
        let differing = |a: &[Digest], b: &[Digest]| -> Vec<usize> {
            (0..a.len()).filter(|index| a[*index] != b[*index]).collect()
        };
        assert_eq!(before.len(), 50);
        assert_eq!(differing(&before, &after), [17]);
        assert_eq!(differing(&coarse(&before), &coarse(&after)), [1]);
        assert_eq!(coarse(&before).len(), 4);
    }

    #[test]
    fn another_key_gives_other_digests() {
        let data = [1u8; 4096];
        assert_ne!(DigestKey::new(b"a").fine(&data), DigestKey::new(b"b").fine(&data));
    }

    #[test]
    fn digests_are_parsed_whole_or_not_at_all() {
        let digests = DigestKey::new(b"a").fine(&[0u8; 9000]);
        assert_eq!(parse(digests.as_flattened()), Some(digests));
        assert_eq!(parse(&[0; 17]), None);
    }
}
