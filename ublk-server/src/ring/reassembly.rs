//! Cuts a received stream into frames: a header of fixed size, then a payload of whatever length
//! the header says. For NBD connections and for lanes to peers.
//!
//! A driver receives into a staging buffer, so that one wake-up brings many small frames. Payloads
//! must end up in aligned buffers of their own, which headers in between prevent, so what is in
//! staging is copied out. That is cheap for small payloads and a waste for large ones: while
//! much of a payload is missing, the driver is told to receive straight into its destination.
//!
//! ```text
//! receive into window()  -> received(n)
//!   next_header()        -> None: receive more
//!                        -> a header and its payload's length: find a buffer (or wait for one), then
//!     fill() or skip()   -> Done: the frame is complete, go on with next_header()
//!                        -> Need::Staging: receive into window(), received(n), fill() again
//!                        -> Need::Direct: receive into the destination, received_direct(n), fill() again
//! ```
//!
//! Pure: the caller owns both buffers and does the receiving. While a receive into staging is under
//! way `window` must not be called, since it may move what is there.

use std::ops::Range;

/// The longest rest of a payload that still goes through staging, in bytes. Copying this much costs
/// less than another receive of its own, and leaves room for the next frames to come along.
pub const COPY_BYTES_MAX: usize = 16 << 10;

/// Knows the headers of a protocol.
pub trait FrameParser {
    /// Of every header, in bytes.
    const HEADER_BYTES: usize;
    /// What a header says.
    type Header;
    /// Why the stream cannot be read any further.
    type Error;

    /// Reads a header of exactly [`HEADER_BYTES`](Self::HEADER_BYTES) bytes; also returns how many bytes
    /// of payload follow it. Limits on the length are the parser's business: what it accepts will be
    /// waited for.
    fn parse(&mut self, header: &[u8]) -> Result<(Self::Header, usize), Self::Error>;
}

/// What a payload still lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Receive into the staging window.
    Staging,
    /// Receive at most `missing` bytes into the destination, from `offset` on. Receiving into the
    /// destination and the staging window with one vectored receive is fine, too.
    Direct {
        /// Within the destination.
        offset: usize,
        /// In bytes; at first more than [`COPY_BYTES_MAX`].
        missing: usize,
    },
}

/// How far a payload is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filled {
    /// All there; the next header can be asked for.
    Done,
    /// More has to be received.
    Need(Need),
}

/// The receiving side of one connection.
#[derive(Debug)]
pub struct Reassembly<P> {
    parser: P,
    /// What is in staging and has not been looked at.
    unread: Range<usize>,
    /// Of the payload at hand, in bytes; 0 between frames.
    payload_bytes: usize,
    payload_filled: usize,
    /// Some of it was received straight into its destination: the rest will be, too.
    payload_direct: bool,
}

impl<P: FrameParser> Reassembly<P> {
    /// Begins with an empty staging buffer.
    pub fn new(parser: P) -> Self {
        Self::with_unread(parser, 0..0)
    }

    /// Begins with bytes that are already in staging, such as those that came along with the end of a
    /// handshake.
    pub fn with_unread(parser: P, unread: Range<usize>) -> Self {
        assert!(unread.start <= unread.end);
        Reassembly { parser, unread, payload_bytes: 0, payload_filled: 0, payload_direct: false }
    }

    /// Where in `staging` to receive. Moves the beginning of a header, if there is one, to the front;
    /// so the window is never empty once `next_header` returned `None` or `fill` asked for staging,
    /// provided that staging is longer than a header. It may be empty while frames are left unread.
    pub fn window(&mut self, staging: &mut [u8]) -> Range<usize> {
        assert!(staging.len() > P::HEADER_BYTES && self.unread.end <= staging.len());
        if self.unread.len() < P::HEADER_BYTES && self.unread.start > 0 {
            // Never more than a part of a header: longer leftovers wait for the driver, not for bytes.
            staging.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        self.unread.end..staging.len()
    }

    /// What is in staging and has not been looked at, in bytes.
    pub fn unread_bytes(&self) -> usize {
        self.unread.len()
    }

    /// `bytes` have been received at the beginning of the window.
    pub fn received(&mut self, bytes: usize) {
        self.unread.end += bytes;
    }

    /// `bytes` have been received into the destination, where [`Need::Direct`] said.
    pub fn received_direct(&mut self, bytes: usize) {
        assert!(self.unread.is_empty(), "staging comes first in the stream");
        assert!(bytes <= self.payload_missing(), "received into the next frame");
        self.payload_filled += bytes;
        self.payload_direct = true;
    }

    /// The next header and the length of its payload; `None` if more has to be received into staging.
    /// After an error the stream is of no use any more. After a header with a payload, it
    /// has to be filled or skipped first.
    pub fn next_header(&mut self, staging: &[u8]) -> Result<Option<(P::Header, usize)>, P::Error> {
        assert!(self.payload_missing() == 0, "the payload comes first in the stream");
        let unread = &staging[self.unread.clone()];
        let Some(header) = unread.get(..P::HEADER_BYTES) else {
            return Ok(None);
        };
        let (header, payload_bytes) = self.parser.parse(header)?;
        self.unread.start += P::HEADER_BYTES;
        self.payload_bytes = payload_bytes;
        self.payload_filled = 0;
        self.payload_direct = false;
        Ok(Some((header, payload_bytes)))
    }

    /// Copies what is in staging of the payload into `destination`, which begins where the payload
    /// begins, has room for all of it, and is the same until it is done.
    pub fn fill(&mut self, staging: &[u8], destination: &mut [u8]) -> Filled {
        let from = self.take_payload();
        let at = self.payload_filled - from.len();
        destination[at..self.payload_filled].copy_from_slice(&staging[from]);
        match self.payload_missing() {
            0 => Filled::Done,
            missing if missing <= COPY_BYTES_MAX && !self.payload_direct => Filled::Need(Need::Staging),
            missing => Filled::Need(Need::Direct { offset: self.payload_filled, missing }),
        }
    }

    /// Like `fill`, for a payload nobody wants: it is received into staging and forgotten.
    pub fn skip(&mut self) -> Filled {
        self.take_payload();
        if self.payload_missing() == 0 { Filled::Done } else { Filled::Need(Need::Staging) }
    }

    fn payload_missing(&self) -> usize {
        self.payload_bytes - self.payload_filled
    }

    /// Moves past what is in staging of the payload at hand, and says where it is.
    fn take_payload(&mut self) -> Range<usize> {
        let length = self.unread.len().min(self.payload_missing());
        let taken = self.unread.start..self.unread.start + length;
        self.unread.start = taken.end;
        self.payload_filled += length;
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Four bytes of payload length, two of a number.
    struct Toy;

    impl FrameParser for Toy {
        const HEADER_BYTES: usize = 6;
        type Header = u16;
        type Error = ();

        fn parse(&mut self, header: &[u8]) -> Result<(u16, usize), ()> {
            assert_eq!(header.len(), Self::HEADER_BYTES);
            let length = u32::from_be_bytes(*header.first_chunk().unwrap());
            let number = u16::from_be_bytes(*header.last_chunk().unwrap());
            if number == u16::MAX { Err(()) } else { Ok((number, length as usize)) }
        }
    }

    fn payload(number: u16, length: usize) -> Vec<u8> {
        (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(number as u8)).collect()
    }

    fn stream(lengths: &[usize]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, length) in lengths.iter().enumerate() {
            bytes.extend_from_slice(&(*length as u32).to_be_bytes());
            bytes.extend_from_slice(&(number as u16).to_be_bytes());
            bytes.extend(payload(number as u16, *length));
        }
        bytes
    }

    /// A driver over a stream of which every receive brings as much as `cuts` says next. Odd frames
    /// are skipped if `skip_odd`. Returns the frames, and the bytes received directly.
    fn drive(
        stream: &[u8],
        cuts: &[usize],
        staging_bytes: usize,
        skip_odd: bool,
        vectored: bool,
    ) -> (Vec<(u16, Vec<u8>)>, usize) {
        let mut staging = vec![0; staging_bytes];
        let mut reassembly = Reassembly::new(Toy);
        let (mut rest, mut cuts) = (stream, cuts.iter().cycle());
        let (mut frames, mut direct_bytes) = (Vec::new(), 0);
        let mut open: Option<(u16, Vec<u8>)> = None;
        let mut need = Need::Staging;
        loop {
            if rest.is_empty() {
                break;
            }
            let mut receive = |to: &mut [u8]| {
                let count = (*cuts.next().unwrap()).clamp(1, rest.len()).min(to.len());
                to[..count].copy_from_slice(&rest[..count]);
                rest = &rest[count..];
                count
            };
            match need {
                Need::Staging => {
                    let window = reassembly.window(&mut staging);
                    assert!(!window.is_empty(), "the driver would never get on");
                    let count = receive(&mut staging[window]);
                    reassembly.received(count);
                }
                Need::Direct { offset, missing } => {
                    let buffer = &mut open.as_mut().unwrap().1;
                    assert_eq!(buffer.len() - offset, missing);
                    let count = receive(&mut buffer[offset..]);
                    reassembly.received_direct(count);
                    direct_bytes += count;
                    if vectored && count == missing && !rest.is_empty() {
                        let window = reassembly.window(&mut staging);
                        let count = rest.len().min(window.len());
                        staging[window.start..][..count].copy_from_slice(&rest[..count]);
                        rest = &rest[count..];
                        reassembly.received(count);
                    }
                }
            }
            need = loop {
                if open.is_none() {
                    let Some((number, length)) = reassembly.next_header(&staging).unwrap() else {
                        break Need::Staging;
                    };
                    open = Some((number, vec![0; length]));
                }
                let (number, mut buffer) = open.take().unwrap();
                let filled = if skip_odd && number % 2 == 1 {
                    reassembly.skip()
                } else {
                    reassembly.fill(&staging, &mut buffer)
                };
                match filled {
                    Filled::Done => frames.push((number, buffer)),
                    Filled::Need(need) => {
                        open = Some((number, buffer));
                        break need;
                    }
                }
            };
        }
        assert!(open.is_none() && reassembly.unread.is_empty());
        (frames, direct_bytes)
    }

    proptest! {
        #[test]
        fn any_cuts_yield_the_same_frames(
            lengths in prop::collection::vec(
                prop_oneof![Just(0), 1..100usize, 1000..COPY_BYTES_MAX + 3, 17_000..90_000usize], 1..12),
            cuts in prop::collection::vec(prop_oneof![1..40usize, 1..70_000usize], 1..50),
            staging_bytes in prop_oneof![Just(7usize), 20..5000usize, Just(256 << 10)],
            skip_odd: bool,
            vectored: bool,
        ) {
            // Both tiny: the case would take forever, and tests nothing more.
            prop_assume!(staging_bytes > 7 || cuts.iter().any(|cut| *cut > 1000));
            let (frames, _) = drive(&stream(&lengths), &cuts, staging_bytes, skip_odd, vectored);
            prop_assert_eq!(frames.len(), lengths.len());
            for (number, buffer) in frames {
                if !(skip_odd && number % 2 == 1) {
                    prop_assert!(buffer == payload(number, lengths[usize::from(number)]));
                }
            }
        }
    }

    #[test]
    fn small_payloads_never_take_a_receive_of_their_own() {
        let (frames, direct_bytes) = drive(&stream(&[COPY_BYTES_MAX; 20]), &[1000], 256 << 10, false, false);
        assert_eq!((frames.len(), direct_bytes), (20, 0));
    }

    #[test]
    fn of_large_payloads_only_what_came_along_is_copied() {
        let (_, direct_bytes) = drive(&stream(&[1 << 20]), &[1 << 20], 256 << 10, false, false);
        assert_eq!(direct_bytes, (1 << 20) + 6 - (256 << 10));
    }

    #[test]
    fn the_rest_of_a_large_payload_is_copied_when_it_is_small() {
        let mut staging = vec![0; 64 << 10];
        let bytes = stream(&[40_000, 5]);
        let mut reassembly = Reassembly::new(Toy);
        staging[..30_000].copy_from_slice(&bytes[..30_000]);
        reassembly.received(30_000);
        assert_eq!(reassembly.next_header(&staging), Ok(Some((0, 40_000))));
        assert_eq!(reassembly.fill(&staging, &mut vec![0; 40_000]), Filled::Need(Need::Staging));
    }

    #[test]
    fn what_began_to_be_received_straight_ends_so() {
        let mut staging = vec![0; 64];
        staging[..6].copy_from_slice(&stream(&[40_000])[..6]);
        let mut reassembly = Reassembly::with_unread(Toy, 0..6);
        assert_eq!(reassembly.next_header(&staging), Ok(Some((0, 40_000))));
        let mut payload = vec![0; 40_000];
        let need = |offset| Filled::Need(Need::Direct { offset, missing: 40_000 - offset });
        assert_eq!(reassembly.fill(&staging, &mut payload), need(0));
        reassembly.received_direct(39_000);
        assert_eq!(reassembly.fill(&staging, &mut payload), need(39_000));
    }

    #[test]
    fn frames_wait_in_staging_until_there_is_a_buffer() {
        let mut staging = vec![0; 64];
        let bytes = stream(&[8, 8]);
        staging[10..10 + bytes.len()].copy_from_slice(&bytes);
        let mut reassembly = Reassembly::with_unread(Toy, 10..10 + bytes.len());
        assert_eq!(reassembly.next_header(&staging), Ok(Some((0, 8))));
        // No buffer yet: what is unread stays where it is, and more can be received behind it.
        assert_eq!(reassembly.window(&mut staging), 10 + bytes.len()..64);
        let mut destination = [0; 8];
        assert_eq!(reassembly.fill(&staging, &mut destination), Filled::Done);
        assert_eq!(destination[..], payload(0, 8));
        assert_eq!(reassembly.next_header(&staging), Ok(Some((1, 8))));
    }

    #[test]
    fn an_error_of_the_parser_comes_through() {
        let staging = [0, 0, 0, 0, 0xff, 0xff, 0];
        let mut reassembly = Reassembly::with_unread(Toy, 0..7);
        assert_eq!(reassembly.next_header(&staging), Err(()));
    }
}
