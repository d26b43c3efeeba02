//! How `playground kill` and `start` reach the process that owns the playground.

use super::directory::socket_path;
use crate::failure::{Failure, OK};
use crate::output;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// How long a request may take to arrive.
const REQUEST_MAX: Duration = Duration::from_secs(1);
/// Longest request or answer in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// One line of JSON.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Request {
    Kill { name: String },
    Start { name: String },
}

/// The answer, one line of JSON.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Done(String),
    Failed(String),
}

/// Asks the playground in that directory.
pub(super) async fn ask(dir: &Path, request: Request) -> Result<u8, Failure> {
    let none = |error: std::io::Error| {
        Failure::new(format!(
            "no playground runs in {} ({error}): start one with `mirrorctl playground --dir {}`",
            dir.display(),
            dir.display()
        ))
    };
    let mut stream = UnixStream::connect(socket_path(dir)).await.map_err(none)?;
    let text = serde_json::to_string(&request).map_err(|error| Failure::new(error.to_string()))? + "\n";
    stream.write_all(text.as_bytes()).await.map_err(none)?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line).await.map_err(none)?;
    match serde_json::from_str(&line) {
        Ok(Answer::Done(text)) => {
            output::print(&text);
            Ok(OK)
        }
        Ok(Answer::Failed(text)) => Err(Failure::new(text)),
        Err(_) => Err(Failure::new(format!("the playground in {} ended meanwhile", dir.display()))),
    }
}

/// A client that connects within that time. What it asks for is another call: this one may be given up, and a
/// client that was accepted may not.
pub(super) async fn accept(listener: &UnixListener, limit: Duration) -> Option<UnixStream> {
    timeout(limit, listener.accept()).await.ok()?.ok().map(|(stream, _)| stream)
}

/// What a client asks for; `None` if it says nothing sensible.
pub(super) async fn request(stream: &mut UnixStream) -> Option<Request> {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.take(LINE_BYTES_MAX));
    timeout(REQUEST_MAX, reader.read_line(&mut line)).await.ok()?.ok()?;
    serde_json::from_str(&line).ok()
}

/// Answers a request.
pub(super) async fn answer(mut stream: UnixStream, result: Result<String, Failure>) {
    let answer = match result {
        Ok(text) => Answer::Done(text),
        Err(failure) => Answer::Failed(failure.message),
    };
    let text = serde_json::to_string(&answer).unwrap_or_default() + "\n";
    let _ = stream.write_all(text.as_bytes()).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    /// The process looks after its children in between, however slow a client is.
    #[tokio::test]
    async fn a_slow_client_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let mut client = UnixStream::connect(dir.path().join("socket")).await.unwrap();
        let limit = Duration::from_millis(20);
        let mut stream = accept(&listener, limit).await.expect("it has connected");
        let wanted = Request::Start { name: "n1".into() };
        let text = serde_json::to_string(&wanted).unwrap() + "\n";
        let (asked, ()) = tokio::join!(request(&mut stream), async {
            sleep(10 * limit).await;
            client.write_all(text.as_bytes()).await.unwrap();
        });
        assert_eq!(asked, Some(wanted));
        assert!(accept(&listener, limit).await.is_none(), "nobody else connects");
    }
}
