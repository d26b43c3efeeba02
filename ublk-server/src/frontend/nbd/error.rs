//! The error numbers that may stand in a reply.

/// An error as a reply carries it. The protocol fixes these few numbers, which are Linux's; other
/// errno values must not go over the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum NbdError {
    /// The export is read-only.
    NotPermitted = 1,
    /// The device could not do it.
    Io = 5,
    /// Out of memory; to be avoided.
    NoMemory = 12,
    /// The client asked for something that makes no sense.
    Invalid = 22,
    /// A write beyond the end, or no room left.
    NoSpace = 28,
    /// The request is longer than what can be answered.
    Overflow = 75,
    /// Only for a fast zeroing that would not be fast.
    NotSupported = 95,
    /// The server is going away; the client should disconnect.
    Shutdown = 108,
}

impl NbdError {
    /// The number that stands in the reply.
    pub fn code(self) -> u32 {
        self as u32
    }

    /// Translates an errno of the device. What has no number of its own becomes `Io`: a client must
    /// not take a broken device for its own mistake. `ENOTSUP` is one of these, since the protocol
    /// reserves it for fast zeroing.
    pub fn from_errno(errno: i32) -> NbdError {
        match errno {
            libc::EPERM | libc::EROFS => NbdError::NotPermitted,
            libc::ENOMEM => NbdError::NoMemory,
            libc::EINVAL => NbdError::Invalid,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => NbdError::NoSpace,
            libc::ESHUTDOWN => NbdError::Shutdown,
            _ => NbdError::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_protocols() {
        let all = [
            (NbdError::NotPermitted, 1),
            (NbdError::Io, 5),
            (NbdError::NoMemory, 12),
            (NbdError::Invalid, 22),
            (NbdError::NoSpace, 28),
            (NbdError::Overflow, 75),
            (NbdError::NotSupported, 95),
            (NbdError::Shutdown, 108),
        ];
        for (error, code) in all {
            assert_eq!(error.code(), code);
        }
    }

    #[test]
    fn device_errors_never_blame_the_client() {
        assert_eq!(NbdError::from_errno(libc::EIO), NbdError::Io);
        assert_eq!(NbdError::from_errno(libc::EBADF), NbdError::Io);
        assert_eq!(NbdError::from_errno(libc::ENOTSUP), NbdError::Io);
        assert_eq!(NbdError::from_errno(libc::EFBIG), NbdError::NoSpace);
        assert_eq!(NbdError::from_errno(libc::EROFS), NbdError::NotPermitted);
    }
}
