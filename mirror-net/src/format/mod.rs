//! The on-disk format, as pure code: bytes in, bytes out.
