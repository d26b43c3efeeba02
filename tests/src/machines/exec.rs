//! Commands inside a machine: the agent that runs them, and the client on the host.
//!
//! One connection is one command. The agent says hello with one byte, the client sends a JSON array of words and a
//! line feed; from then on both send frames: a byte that says what it is, a length of four bytes, the bytes. When
//! the client leaves, the command is killed with its process group.

use anyhow::{Context, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

const HELLO: u8 = b'!';
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXIT: u8 = 3;
/// How long a machine that is up may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(60);
/// Of a frame's bytes; more is no agent's.
const FRAME_BYTES_MAX: usize = 1 << 20;

fn send(to: &mut impl Write, kind: u8, bytes: &[u8]) -> io::Result<()> {
    let mut frame = vec![kind];
    frame.extend((bytes.len() as u32).to_be_bytes());
    frame.extend(bytes);
    to.write_all(&frame)
}

fn receive(from: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    from.read_exact(&mut head)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::other("not a frame"));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    Ok((head[0], bytes))
}

/// Runs commands for whoever connects, for ever.
pub fn agent(address: &str) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| address.to_owned())?;
    for stream in listener.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = run(&stream) {
                // The client may have left; then nobody reads it.
                let _ = send(&mut &stream, STDERR, format!("lab-agent: {error:#}\n").as_bytes());
                let _ = send(&mut &stream, EXIT, &127i32.to_be_bytes());
            }
        });
    }
    Ok(())
}

fn run(stream: &TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    (&mut &*stream).write_all(&[HELLO])?;
    let mut input = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    if input.read_line(&mut line)? == 0 {
        // Somebody only wanted to know whether we are here.
        return Ok(());
    }
    let words: Vec<String> = serde_json::from_str(&line)?;
    let (program, arguments) = words.split_first().context("an empty command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| program.clone())?;
    let group = Pid::from_raw(child.id() as i32);
    let answers = Arc::new(Mutex::new(stream.try_clone()?));
    // Closed when the command has ended.
    let (over, lives) = io::pipe()?;
    let outputs = [
        pump(child.stdout.take().context("no output")?.into(), STDOUT, &answers, over.try_clone()?),
        pump(child.stderr.take().context("no errors")?.into(), STDERR, &answers, over),
    ];
    let mut stdin = child.stdin.take();
    thread::spawn(move || {
        while let Ok((STDIN, bytes)) = receive(&mut input) {
            match &mut stdin {
                // It may have closed its input: that is no concern of ours.
                Some(open) if !bytes.is_empty() => drop(open.write_all(&bytes)),
                _ => stdin = None,
            }
        }
        // The client has gone. The command may be over already.
        let _ = killpg(group, Signal::SIGKILL);
    });
    let status = child.wait()?;
    drop(lives);
    outputs.into_iter().for_each(|output| drop(output.join()));
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    send(&mut *answers.lock().unwrap_or_else(PoisonError::into_inner), EXIT, &code.to_be_bytes())?;
    Ok(())
}

/// Sends what comes out of a pipe. What the command left in the background may hold it open for ever, so the command's
/// end is the end; but all that was in the pipe by then is sent.
fn pump(
    from: OwnedFd,
    kind: u8,
    to: &Arc<Mutex<TcpStream>>,
    over: io::PipeReader,
) -> thread::JoinHandle<io::Result<()>> {
    let (mut from, to) = (File::from(from), Arc::clone(to));
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        loop {
            let mut wanted = [from.as_fd(), over.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            poll(&mut wanted, PollTimeout::NONE)?;
            if wanted[0].revents().is_none_or(|events| events.is_empty()) {
                return Ok(());
            }
            let count = from.read(&mut bytes)?;
            if count == 0 {
                return Ok(());
            }
            send(&mut *to.lock().unwrap_or_else(PoisonError::into_inner), kind, &bytes[..count])?;
        }
    })
}

/// How a command ended, and what it said.
#[derive(Clone, Default, Debug)]
pub struct Ended {
    /// Its exit code, or 128 and the signal.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Ended {
    /// Its output, if it succeeded.
    pub fn ok(self) -> anyhow::Result<String> {
        ensure!(self.code == 0, "exit code {}: {}{}", self.code, self.out, self.err);
        Ok(self.out)
    }
}

/// A command that runs in a machine.
pub struct Running {
    stream: TcpStream,
}

impl Running {
    /// Starts it.
    pub fn start(agent: &str, words: &[&str]) -> anyhow::Result<Self> {
        let stream = connect(agent, HELLO_WITHIN)?;
        let mut line = serde_json::to_vec(words)?;
        line.push(b'\n');
        (&mut &stream).write_all(&line)?;
        Ok(Self { stream })
    }

    /// Sends this as its whole standard input.
    pub fn feed(&self, bytes: &[u8]) -> anyhow::Result<()> {
        for piece in bytes.chunks(FRAME_BYTES_MAX) {
            send(&mut &self.stream, STDIN, piece)?;
        }
        Ok(send(&mut &self.stream, STDIN, &[])?)
    }

    /// Waits for its end and hands over all that it says: true for standard output. An error if the machine, or the
    /// patience, ends first.
    pub fn follow(
        &self,
        patience: Option<Duration>,
        mut said: impl FnMut(bool, &[u8]),
    ) -> anyhow::Result<i32> {
        self.stream.set_read_timeout(patience)?;
        loop {
            match receive(&mut &self.stream).context("the command's machine does not answer")? {
                (STDOUT, bytes) => said(true, &bytes),
                (STDERR, bytes) => said(false, &bytes),
                (EXIT, code) => {
                    return Ok(i32::from_be_bytes(code.as_slice().try_into().context("no exit code")?));
                }
                (other, _) => bail!("the agent sent a frame of kind {other}"),
            }
        }
    }

    /// Leaves: the command is killed, and whoever follows it is told that it does not answer.
    pub fn hang_up(&self) {
        // Its machine may be gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Waits for its end.
    pub fn finish(&self, patience: Duration) -> anyhow::Result<Ended> {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = self.follow(Some(patience), |stdout, bytes| match stdout {
            true => out.extend_from_slice(bytes),
            false => err.extend_from_slice(bytes),
        })?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ended { code, out: text(out), err: text(err) })
    }
}

/// Connects and waits for the hello: a port that is forwarded accepts before anybody listens behind it.
fn connect(agent: &str, patience: Duration) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect(agent).with_context(|| agent.to_owned())?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    let mut hello = [0];
    stream.read_exact(&mut hello).with_context(|| format!("no agent answers at {agent}"))?;
    ensure!(hello == [HELLO], "what answers at {agent} is no agent");
    Ok(stream)
}

/// Whether an agent says hello in time.
pub fn answers(agent: &str, patience: Duration) -> bool {
    connect(agent, patience).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent_here() -> String {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let own = address.clone();
        thread::spawn(move || agent(&own).unwrap());
        while !answers(&address, HELLO_WITHIN) {
            thread::sleep(Duration::from_millis(5));
        }
        address
    }

    #[test]
    fn a_command_says_what_it_says_and_ends_as_it_ends() {
        let agent = agent_here();
        let run = |words: &[&str], input: &[u8]| {
            let running = Running::start(&agent, words).unwrap();
            running.feed(input).unwrap();
            running.finish(Duration::from_secs(60)).unwrap()
        };
        let ended = run(&["sh", "-c", "cat; echo oops >&2; exit 7"], b"hello");
        assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (7, "hello", "oops\n"));
        assert_eq!(run(&["sh", "-c", "kill -9 $$"], b"").code, 137);
        assert_eq!(run(&["/there/is/no/such/program"], b"").code, 127);
    }

    #[test]
    fn a_command_whose_client_leaves_is_killed() {
        let agent = agent_here();
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("pid");
        let script = format!("echo $$ >{}; exec sleep 1000", mark.display());
        let running = Running::start(&agent, &["sh", "-c", &script]).unwrap();
        let pid = loop {
            match std::fs::read_to_string(&mark).unwrap_or_default().trim().parse::<i32>() {
                Ok(pid) => break pid,
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        drop(running);
        while nix::sys::signal::kill(Pid::from_raw(pid), None).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    }
}
