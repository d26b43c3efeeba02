//! The options of a negotiation: reading their data, writing the replies to them.

use super::export::{ExportInfo, Exports, resolve};
use super::{BASE_ALLOCATION, BASE_ALLOCATION_ID, STRING_BYTES_MAX};

pub(super) const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const LIST_META_CONTEXT: u32 = 9;
pub(super) const SET_META_CONTEXT: u32 = 10;

const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
const REP_ERR_INVALID: u32 = (1 << 31) + 3;
const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

/// What an option led to, beside the replies.
pub(super) enum Answer {
    Done,
    Structured,
    /// Chosen for the export of this name.
    BaseAllocation(String),
    Go(ExportInfo),
    Abort,
}

/// An error reply: its type and its message.
pub(super) type Refused = (u32, &'static str);

/// Options that we do not know. STARTTLS is one of them: "not supported at all" is what makes clients
/// for which TLS is optional go on without.
pub(super) const UNKNOWN_OPTION: Refused = (REP_ERR_UNSUP, "option not supported");
pub(super) const TOO_LONG: Refused = (REP_ERR_TOO_BIG, "more data than any option needs");
const NO_DATA_WANTED: Refused = (REP_ERR_INVALID, "this option has no data");
const MALFORMED: Refused = (REP_ERR_INVALID, "malformed data");
const NO_EXPORT: Refused = (REP_ERR_UNKNOWN, "no such export; list shows what there is");
const STRUCTURED_TWICE: Refused = (REP_ERR_INVALID, "structured replies were negotiated before");
const STRUCTURED_FIRST: Refused = (REP_ERR_INVALID, "structured replies must be negotiated first");

/// Whether [`answer`] (or the caller, for `EXPORT_NAME`) deals with it.
pub(super) fn is_known(option: u32) -> bool {
    matches!(option, EXPORT_NAME..=LIST | INFO..=SET_META_CONTEXT)
}

/// Answers an option. Replies are appended to `out`; the last one, if it is an error, is left to the
/// caller.
pub(super) fn answer(
    out: &mut Vec<u8>,
    option: u32,
    data: &[u8],
    structured: bool,
    exports: &dyn Exports,
) -> Result<Answer, Refused> {
    let answer = match option {
        // Data is to be ignored here: a client that is leaving does not want to argue.
        ABORT => Answer::Abort,
        LIST | STRUCTURED_REPLY if !data.is_empty() => return Err(NO_DATA_WANTED),
        LIST => list(out, exports),
        STRUCTURED_REPLY if structured => return Err(STRUCTURED_TWICE),
        STRUCTURED_REPLY => Answer::Structured,
        INFO | GO => info(out, option, data, exports)?,
        LIST_META_CONTEXT | SET_META_CONTEXT if !structured => return Err(STRUCTURED_FIRST),
        LIST_META_CONTEXT | SET_META_CONTEXT => meta_context(out, option, data, exports)?,
        _ => return Err(UNKNOWN_OPTION),
    };
    put_reply(out, option, REP_ACK, &[]);
    Ok(answer)
}

fn list(out: &mut Vec<u8>, exports: &dyn Exports) -> Answer {
    for name in exports.list() {
        let description = exports.get(&name).map(|export| export.description).unwrap_or_default();
        let length = (name.len() as u32).to_be_bytes();
        put_reply(out, LIST, REP_SERVER, &[&length, name.as_bytes(), description.as_bytes()]);
    }
    Answer::Done
}

fn info(out: &mut Vec<u8>, option: u32, data: &[u8], exports: &dyn Exports) -> Result<Answer, Refused> {
    let mut fields = Fields(data);
    let name = fields.string().ok_or(MALFORMED)?;
    let count = fields.u16().ok_or(MALFORMED)?;
    if fields.0.len() != usize::from(count) * 2 {
        return Err(MALFORMED);
    }
    let (mut wants_name, mut wants_description) = (false, false);
    while let Some(wanted) = fields.u16() {
        wants_name |= wanted == INFO_NAME;
        wants_description |= wanted == INFO_DESCRIPTION;
    }
    let export = resolve(exports, name).ok_or(NO_EXPORT)?;

    let mut put = |kind: u16, parts: [&[u8]; 3]| {
        let [a, b, c] = parts;
        put_reply(out, option, REP_INFO, &[&kind.to_be_bytes(), a, b, c]);
    };
    let flags = export.transmission_flags().to_be_bytes();
    put(INFO_EXPORT, [&export.size.to_be_bytes(), &flags, &[]]);
    // Wanted or not: it differs from what the protocol assumes, so every client must be told.
    let [min, preferred, max] = export.size_constraints().map(u32::to_be_bytes);
    put(INFO_BLOCK_SIZE, [&min, &preferred, &max]);
    if wants_name {
        put(INFO_NAME, [export.name.as_bytes(), &[], &[]]);
    }
    if wants_description && !export.description.is_empty() {
        put(INFO_DESCRIPTION, [export.description.as_bytes(), &[], &[]]);
    }
    Ok(if option == GO { Answer::Go(export) } else { Answer::Done })
}

fn meta_context(
    out: &mut Vec<u8>,
    option: u32,
    data: &[u8],
    exports: &dyn Exports,
) -> Result<Answer, Refused> {
    let mut fields = Fields(data);
    let name = fields.string().ok_or(MALFORMED)?;
    let count = fields.u32().ok_or(MALFORMED)?;
    // To list without a query is to list all; to set without one is to set none.
    let mut found = option == LIST_META_CONTEXT && count == 0;
    for _ in 0..count {
        let query = fields.string().ok_or(MALFORMED)?;
        found |= query == BASE_ALLOCATION || (query == "base:" && option == LIST_META_CONTEXT);
    }
    if !fields.0.is_empty() {
        return Err(MALFORMED);
    }
    let export = resolve(exports, name).ok_or(NO_EXPORT)?;
    if !found {
        return Ok(Answer::Done);
    }
    let id = if option == SET_META_CONTEXT { BASE_ALLOCATION_ID } else { 0 };
    put_reply(out, option, REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
    Ok(if option == SET_META_CONTEXT { Answer::BaseAllocation(export.name) } else { Answer::Done })
}

fn put_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(length as u32).to_be_bytes());
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

/// The error reply that ends an option.
pub(super) fn put_refusal(out: &mut Vec<u8>, option: u32, (kind, message): Refused) {
    put_reply(out, option, kind, &[message.as_bytes()]);
}

/// A string by the protocol's rules: UTF-8, no NUL, not too long.
pub(super) fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Reads big-endian fields one after the other; `None` where there are too few bytes.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length before it.
    fn string(&mut self) -> Option<&'a str> {
        let length = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        string(bytes)
    }
}
