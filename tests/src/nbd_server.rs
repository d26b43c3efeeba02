//! A blocking NBD server on threads: the smallest driver of the daemon's pure protocol parts, over whatever
//! answers the requests.

use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use ublk_server::frontend::nbd::reply;
use ublk_server::frontend::nbd::{
    Command, Exports, NbdError, Negotiation, Outcome, Request, RequestParser, Session,
};
use ublk_server::ring::reassembly::{Filled, Need, Reassembly};

/// What the server serves.
pub trait Storage: Exports + Send + Sync + 'static {
    /// A client has got as far as to requests.
    fn joined(&self, _session: &Session) {}

    /// Whether a request is carried out, or the error and the words of its refusal.
    fn admit(&self, session: &Session, request: &Request) -> Result<(), (NbdError, &'static str)> {
        request.check(session).map_err(|refusal| (refusal.error, refusal.message))
    }

    /// Carries out an admitted request and writes the reply. An error closes the connection.
    fn answer(&self, session: &Session, request: &Request, data: &[u8], to: &mut dyn Write)
    -> io::Result<()>;

    /// Stands between a client and its negotiation.
    fn filter(&self) -> Box<dyn Filter> {
        Box::new(Open)
    }
}

/// May change what is said in a negotiation.
pub trait Filter {
    /// Receives some bytes from the client.
    fn receive(&mut self, stream: &mut dyn Read, staging: &mut [u8]) -> io::Result<usize> {
        received(stream.read(staging)?)
    }

    /// Looks at what is sent to it.
    fn send(&mut self, _reply: &mut [u8]) {}
}

/// A filter that changes nothing.
pub struct Open;

impl Filter for Open {}

/// Serves every client that comes, for as long as the process lives.
pub fn listen<S, St>(storage: &Arc<St>, next: impl Fn() -> io::Result<S> + Send + 'static)
where
    S: Read + Write + Send + 'static,
    St: Storage,
{
    let storage = Arc::clone(storage);
    thread::spawn(move || {
        while let Ok(mut stream) = next() {
            let storage = Arc::clone(&storage);
            // An error is a client that hung up.
            thread::spawn(move || serve(&*storage, &mut stream));
        }
    });
}

/// Serves one client until it leaves.
pub fn serve<S: Read + Write>(storage: &impl Storage, stream: &mut S) -> io::Result<()> {
    let mut staging = vec![0; 256 << 10];
    let Some((session, unread)) = negotiate(storage, stream, &mut staging)? else {
        return Ok(());
    };
    storage.joined(&session);
    let mut reassembly = Reassembly::with_unread(RequestParser, unread);
    loop {
        let (request, payload_bytes) = loop {
            match reassembly.next_header(&staging) {
                Ok(Some(frame)) => break frame,
                Ok(None) => receive(stream, &mut reassembly, &mut staging)?,
                Err(_) => return Ok(()),
            }
        };
        let verdict = storage.admit(&session, &request);
        let mut data = vec![0; if verdict.is_ok() { payload_bytes } else { 0 }];
        loop {
            let filled = match verdict {
                Ok(()) => reassembly.fill(&staging, &mut data),
                Err(_) => reassembly.skip(),
            };
            match filled {
                Filled::Done => break,
                Filled::Need(Need::Staging) => receive(stream, &mut reassembly, &mut staging)?,
                Filled::Need(Need::Direct { offset, .. }) => {
                    let count = received(stream.read(&mut data[offset..])?)?;
                    reassembly.received_direct(count);
                }
            }
        }
        match verdict {
            Err((error, message)) => {
                stream.write_all(&reply::failure(&session, &request, error, message))?;
            }
            Ok(()) if request.command == Command::Disconnect => return Ok(()),
            Ok(()) => storage.answer(&session, &request, &data, stream)?,
        }
    }
}

fn negotiate<S: Read + Write>(
    storage: &impl Storage,
    stream: &mut S,
    staging: &mut [u8],
) -> io::Result<Option<(Session, Range<usize>)>> {
    let mut negotiation = Negotiation::new();
    let mut filter = storage.filter();
    let mut unread = 0..0;
    loop {
        let mut pending = negotiation.pending().to_vec();
        negotiation.sent(pending.len());
        filter.send(&mut pending);
        stream.write_all(&pending)?;
        match negotiation.outcome() {
            Outcome::Transmit(session) => return Ok(Some((session.clone(), unread))),
            Outcome::Closed(_) => return Ok(None),
            Outcome::Continue => {}
        }
        if unread.is_empty() {
            unread = 0..filter.receive(stream, staging)?;
        }
        unread.start += negotiation.handle(&staging[unread.clone()], storage);
    }
}

fn receive(
    stream: &mut impl Read,
    reassembly: &mut Reassembly<RequestParser>,
    staging: &mut [u8],
) -> io::Result<()> {
    let window = reassembly.window(staging);
    reassembly.received(received(stream.read(&mut staging[window])?)?);
    Ok(())
}

/// No bytes are the end of a stream, which is an error wherever more was wanted.
pub fn received(count: usize) -> io::Result<usize> {
    if count == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(count) }
}
