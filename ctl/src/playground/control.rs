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

/// The next request; a client that says nothing sensible is dropped.
pub(super) async fn next(listener: &UnixListener) -> (Request, UnixStream) {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        let mut line = String::new();
        let read = async {
            let mut reader = BufReader::new((&mut stream).take(LINE_BYTES_MAX));
            reader.read_line(&mut line).await
        };
        if !matches!(timeout(REQUEST_MAX, read).await, Ok(Ok(_))) {
            continue;
        }
        if let Ok(request) = serde_json::from_str(&line) {
            return (request, stream);
        }
    }
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
