//! A stream received in pieces of any size, cut into frames.

use crate::choices::Choices;
use ublk_server::ring::reassembly::{COPY_BYTES_MAX, Filled, FrameParser, Need, Reassembly};

/// Frames are not longer than this: a header may promise gigabytes that never come.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// What came out of a stream.
#[derive(PartialEq, Eq, Debug)]
pub struct Frames<H> {
    /// Headers with their payloads, `None` for one that was skipped.
    pub complete: Vec<(H, Option<Vec<u8>>)>,
    /// A header was refused, and nothing was read after it.
    pub refused: bool,
}

/// Cuts `stream` into frames as a driver would, receiving pieces of the sizes that `cuts` chooses. Those
/// payloads are skipped that `skip` says.
pub fn receive<P: FrameParser>(
    parser: P,
    stream: &[u8],
    mut cuts: Choices<'_>,
    skip: impl Fn(&P::Header) -> bool,
) -> Frames<P::Header> {
    let staging_bytes = P::HEADER_BYTES + 1 + usize::from(cuts.word());
    let mut staging = vec![0; staging_bytes];
    let mut reassembly = Reassembly::new(parser);
    let mut frames = Frames { complete: Vec::new(), refused: false };
    let mut open: Option<(P::Header, Vec<u8>, bool)> = None;
    let mut need = Need::Staging;
    let mut rest = stream;
    while !rest.is_empty() {
        // At the end of the choices, everything at once.
        let most = if cuts.is_empty() { usize::MAX } else { 1 + usize::from(cuts.byte()) };
        let mut take = |to: &mut [u8]| {
            let count = most.min(rest.len()).min(to.len());
            to[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            count
        };
        match (need, &mut open) {
            (Need::Direct { offset, missing }, Some((_, payload, false))) => {
                assert_eq!(payload.len() - offset, missing);
                assert!(missing > COPY_BYTES_MAX, "small rests go through staging");
                let count = take(&mut payload[offset..]);
                reassembly.received_direct(count);
            }
            _ => {
                let window = reassembly.window(&mut staging);
                assert!(!window.is_empty(), "the driver would never get on");
                let count = take(&mut staging[window]);
                reassembly.received(count);
            }
        }
        need = loop {
            if open.is_none() {
                match reassembly.next_header(&staging) {
                    Ok(Some((header, length))) => {
                        // What is longer is skipped, as by a server that has no room for it.
                        let skipped = length > PAYLOAD_BYTES_MAX || skip(&header);
                        let payload = vec![0; if skipped { 0 } else { length }];
                        open = Some((header, payload, skipped));
                    }
                    Ok(None) => break Need::Staging,
                    Err(_) => {
                        frames.refused = true;
                        return frames;
                    }
                }
            }
            let Some((header, mut payload, skipped)) = open.take() else { break Need::Staging };
            let filled = if skipped { reassembly.skip() } else { reassembly.fill(&staging, &mut payload) };
            match filled {
                Filled::Done => frames.complete.push((header, (!skipped).then_some(payload))),
                Filled::Need(need) => {
                    open = Some((header, payload, skipped));
                    break need;
                }
            }
        };
    }
    frames
}
