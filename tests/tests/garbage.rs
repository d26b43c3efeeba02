//! Garbage on the wire: somebody who knows the cluster key, or does not, sends what nobody would. It ends
//! that one connection, with a reason in the log, and nothing else notices.

use anyhow::{Context, ensure};
use mirror_net::ids::{ClusterId, MapVersion, ProcessId};
use mirror_net::wire::handshake::{
    ClientHandshake, ClusterKey, HELLO_BYTES, Identity, PROOF_PREFIX_BYTES, Purpose, Role, identity_length,
};
use mirror_net::wire::header::{BODY_BYTES_MAX, CrcSeed, HEADER_BYTES, Header, Kind, PIECE_BYTES_MAX};
use mirror_tests::lab::{Daemon, Lab, until};
use mirror_tests::nbd::NbdClient;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The longest that a connection may stand on which nothing of sense comes.
const CLOSED_WITHIN: Duration = Duration::from_secs(8);
/// The longest that a write, a read and a flush may take meanwhile, on a machine that does much else.
const REQUEST_MAX: Duration = Duration::from_secs(3);
/// The key of every lab.
const KEY: [u8; 32] = [7; 32];
const INTRUDER: ProcessId = ProcessId(0x1b7);

/// A connection whose handshake is done.
struct Wire {
    stream: TcpStream,
    session: u64,
    /// Everything that was sent on it.
    sent: Vec<u8>,
}

/// A cluster of n1 and n2, and the place of n3: a spare that is in the map and does not run, so that somebody
/// with the key can pose as it.
struct Scene {
    lab: Lab,
    manager: Daemon,
    nodes: [Daemon; 2],
    cluster: ClusterId,
}

impl Scene {
    fn new() -> anyhow::Result<Self> {
        let lab = Lab::new("64M")?;
        let config = std::fs::read_to_string(lab.path("cluster.toml"))?;
        let third = format!(
            "[[node]]\nname = \"n3\"\naddress = \"{}\"\nspare = true\n[[node.disk]]\npath = \"{}\"\nsize = \"64M\"\n",
            lab.address("n3"),
            lab.disk("n3").display()
        );
        std::fs::write(lab.path("cluster.toml"), config + &third)?;
        let spare = lab.node("n3")?;
        let (manager, n1, n2) = lab.cluster()?;
        spare.stop()?;
        let map: serde_json::Value = serde_json::from_str(&lab.ctl(&["map", "show", "--json"])?.out)?;
        let cluster = map["id"].as_str().context("no cluster id")?.parse()?;
        let scene = Self { lab, manager, nodes: [n1, n2], cluster: ClusterId(cluster) };
        // From here on nothing may change any more.
        until("only the spare to be missed", || Ok(scene.troubles()?.is_empty().then_some(())))?;
        Ok(scene)
    }

    /// What `mirrorctl status` finds, but for the spare's absence.
    fn troubles(&self) -> anyhow::Result<Vec<String>> {
        let status: serde_json::Value = serde_json::from_str(&self.lab.ctl(&["status", "--json"])?.out)?;
        let findings = status["findings"].as_array().context("no findings")?;
        let others = findings.iter().filter(|finding| finding["node"] != "n3").map(ToString::to_string);
        Ok(others.filter(|finding| !finding.contains("n3")).collect())
    }

    fn identity(&self, role: Role, name: &str) -> Identity {
        Identity { role, name: name.into(), cluster: Some(self.cluster), process: INTRUDER }
    }

    fn seed(&self) -> CrcSeed {
        CrcSeed::new(&self.cluster)
    }

    /// The handshake as everybody makes it.
    fn knock(&self, address: &str, purpose: Purpose, identity: &Identity) -> anyhow::Result<Wire> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(CLOSED_WITHIN))?;
        stream.set_nodelay(true)?;
        let mut client = ClientHandshake::new(ClusterKey::new(KEY), purpose, identity, [3; 32]);
        let mut sent = client.hello().to_vec();
        stream.write_all(&sent)?;
        let mut challenge = [0; HELLO_BYTES];
        stream.read_exact(&mut challenge)?;
        let proof = client.challenge(&challenge)?;
        stream.write_all(&proof)?;
        sent.extend(proof);
        let mut verdict = [0];
        stream.read_exact(&mut verdict)?;
        let welcome = client.verdict(verdict[0])?;
        let mut prefix = [0; PROOF_PREFIX_BYTES];
        stream.read_exact(&mut prefix)?;
        let mut body = vec![0; identity_length(&prefix)?];
        stream.read_exact(&mut body)?;
        let session = client.finish(welcome, &prefix, &body)?.session;
        Ok(Wire { stream, session, sent })
    }

    /// A lane to n1, as n3.
    fn lane(&self) -> anyhow::Result<Wire> {
        self.knock(&self.lab.address("n1"), Purpose::Lane, &self.identity(Role::Node, "n3"))
    }

    /// A message with checksums that are right.
    fn message(&self, header: Header, body: &[u8]) -> Vec<u8> {
        let header =
            Header { body_bytes: body.len() as u32, body_crc: self.seed().body([body, &[]]), ..header };
        [&header.encode(self.seed())[..], body].concat()
    }

    /// The first message of a lane.
    fn open(&self, session: u64) -> Vec<u8> {
        let words = [INTRUDER.0, MapVersion(1).0, 3, 1];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.message(Header { session, sequence: 1, ..Header::new(Kind::Open) }, &body)
    }

    /// A message without a body.
    fn bare(&self, kind: Kind, session: u64) -> Vec<u8> {
        self.message(Header { session, sequence: 2, ..Header::new(kind) }, &[])
    }
}

/// Gives a header whatever checksum its bytes need.
fn with_crc(mut bytes: Vec<u8>, seed: CrcSeed) -> Vec<u8> {
    bytes[8..12].fill(0);
    let crc = seed.body([&bytes[..HEADER_BYTES], &[]]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Waits until the other side has hung up; whatever it says before is of no interest.
fn wait_closed(stream: &mut TcpStream) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(begun.elapsed()),
            Ok(_) if begun.elapsed() > CLOSED_WITHIN => break,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                return Ok(begun.elapsed());
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("the connection stands after {CLOSED_WITHIN:?}")
}

/// Sends, waits for the hang-up, and for the reason in what was logged since.
fn ends(
    what: &str,
    stream: &mut TcpStream,
    bytes: &[u8],
    daemon: &Daemon,
    reason: &str,
) -> anyhow::Result<()> {
    // It may hang up while we are still talking.
    let _ = stream.write_all(bytes);
    let closed = wait_closed(stream).with_context(|| format!("{what}:\n{}", daemon.log()))?;
    println!("measured: {what}: closed after {} ms", closed.as_millis());
    // Once: what was said lately is not said again.
    daemon.says(reason).with_context(|| what.to_owned())
}

/// Writes and reads all the time, on a device of each node, until told to stop; each request in good time.
fn work(uri: &str, stop: &AtomicBool) -> anyhow::Result<u64> {
    let mut client = NbdClient::connect(uri)?;
    let mut rounds = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let (at, stamp) = ((rounds % 64) * 65_536, [rounds as u8; 4096]);
        let begun = Instant::now();
        client.write(at, &stamp)?;
        ensure!(client.read(at, 4096)? == stamp, "another block at {at}");
        if rounds.is_multiple_of(16) {
            client.flush()?;
        }
        ensure!(begun.elapsed() < REQUEST_MAX, "round {rounds} took {:?}", begun.elapsed());
        rounds += 1;
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(rounds)
}

/// Sets a scene, does something in it while both nodes work, and wants nothing to have come of it.
fn undisturbed(disturb: impl FnOnce(&Scene) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut scene = Scene::new()?;
    let version = scene.lab.map_version()?;
    let uris = [scene.lab.uri("n1-d1")?, scene.lab.uri("n2-d1")?];
    // The waits after a start are over.
    for uri in &uris {
        NbdClient::connect(uri)?.read(0, 4096)?;
    }
    until("nothing to wait", || Ok(scene.troubles()?.is_empty().then_some(())))?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers = uris.each_ref().map(|uri| scope.spawn(|| work(uri, &stop)));
        let disturbed = disturb(&scene);
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let rounds = worker.join().expect("it does not panic")?;
            ensure!(rounds > 0, "nothing was written");
        }
        disturbed
    })?;
    ensure!(scene.manager.runs()?, "the manager ended");
    let [n1, n2] = &mut scene.nodes;
    ensure!(n1.runs()? && n2.runs()?, "a node ended");
    for (node, peer) in [(&*n1, "n2"), (&*n2, "n1")] {
        let log = node.log();
        let lost = log.lines().find(|line| line.contains("session ended") && line.contains(peer));
        ensure!(lost.is_none(), "{lost:?}");
    }
    ensure!(scene.troubles()?.is_empty(), "{:?}", scene.troubles()?);
    ensure!(scene.lab.map_version()? == version, "the map has changed");
    Ok(())
}

#[test]
fn garbage_on_a_lane_ends_its_session_and_nothing_else() -> anyhow::Result<()> {
    undisturbed(|scene| {
        let seed = scene.seed();
        let other = CrcSeed::new(&ClusterId::default());
        let header = |kind: Kind, session: u64| Header { session, sequence: 2, ..Header::new(kind) };
        type Make<'a> = Box<dyn Fn(u64) -> Vec<u8> + 'a>;
        let patched = |at: usize, bytes: &'static [u8], crc: bool| -> Make<'_> {
            Box::new(move |session| {
                let mut message = scene.open(session);
                message[at..at + bytes.len()].copy_from_slice(bytes);
                if crc { with_crc(message, seed) } else { message }
            })
        };
        let cases: Vec<(&str, &str, Make<'_>)> = vec![
            ("noise", "bad magic", Box::new(|_| vec![0xff; 100_000])),
            ("another magic", "bad magic", patched(0, b"UBMX", true)),
            ("another version", "wire version 9", patched(4, &[9], true)),
            ("an unknown kind", "unknown kind 200", patched(6, &[200], true)),
            ("a changed header", "header checksum", patched(24, &[0x55], false)),
            ("a changed body", "body checksum", patched(70, &[0x55], false)),
            (
                "another cluster",
                "header checksum",
                Box::new(|session| header(Kind::Ping, session).encode(other).to_vec()),
            ),
            (
                "a body too long",
                "is larger than",
                Box::new(|session| {
                    let body_bytes = BODY_BYTES_MAX + 1;
                    Header { body_bytes, ..header(Kind::Write, session) }.encode(seed).to_vec()
                }),
            ),
            (
                "control content too long",
                "is larger than",
                Box::new(|session| scene.message(header(Kind::Open, session), &[0; 70_000])),
            ),
            (
                "a read too long",
                "longer than a piece",
                Box::new(|session| {
                    let length = PIECE_BYTES_MAX + 1;
                    let read = Header { length, ..header(Kind::ForwardRead, session) };
                    [scene.open(session), scene.message(read, &[0; 32])].concat()
                }),
            ),
            ("a message of another session", "another session", Box::new(|session| scene.open(session + 1))),
            ("a message before open", "before open", Box::new(|session| scene.bare(Kind::Ping, session))),
            (
                "the open of another process",
                "not the process",
                Box::new(|session| scene.message(header(Kind::Open, session), &[1; 32])),
            ),
            (
                "half an open",
                "too short",
                Box::new(|session| scene.message(header(Kind::Open, session), &[1; 9])),
            ),
            ("two opens", "twice", Box::new(|session| [scene.open(session), scene.open(session)].concat())),
            (
                "an answer to nothing",
                "an answer to nothing",
                Box::new(|session| [scene.open(session), scene.bare(Kind::Ack, session)].concat()),
            ),
            (
                "no trailer",
                "without a trailer",
                Box::new(|session| [scene.open(session), scene.bare(Kind::ForwardFlush, session)].concat()),
            ),
            (
                "no device",
                "not in the map",
                Box::new(|session| {
                    let flush = Header { device: 99, ..header(Kind::Flush, session) };
                    [scene.open(session), scene.message(flush, &[])].concat()
                }),
            ),
            ("silence", "nothing heard for 1000 ms", Box::new(|_| Vec::new())),
            (
                "half a header",
                "nothing heard for 1000 ms",
                Box::new(|session| scene.open(session)[..40].to_vec()),
            ),
            (
                "half a body",
                "nothing heard for 1000 ms",
                Box::new(|session| scene.open(session)[..80].to_vec()),
            ),
            (
                "half a message after a whole one",
                "nothing heard for 1000 ms",
                Box::new(|session| {
                    let write = scene.message(header(Kind::Write, session), &[5; 65_536]);
                    [&scene.open(session)[..], &write[..30_000]].concat()
                }),
            ),
        ];
        for (what, reason, bytes) in &cases {
            let mut wire = scene.lane()?;
            ends(what, &mut wire.stream, &bytes(wire.session), &scene.nodes[0], reason)?;
        }
        Ok(())
    })
}

#[test]
fn a_captured_session_cannot_be_played_again() -> anyhow::Result<()> {
    undisturbed(|scene| {
        let n1 = &scene.nodes[0];
        let mut wire = scene.lane()?;
        let messages = [scene.open(wire.session), scene.bare(Kind::Ping, wire.session)].concat();
        wire.stream.write_all(&messages)?;
        wire.sent.extend(&messages);
        // It was a real session: it is answered.
        let mut answer = [0; HEADER_BYTES];
        wire.stream.read_exact(&mut answer)?;
        ensure!(Header::decode(&answer, scene.seed())?.kind == Kind::Open);
        wire.stream.shutdown(Shutdown::Both)?;
        // The proof answers a challenge that will not come again.
        let mut again = TcpStream::connect(scene.lab.address("n1"))?;
        again.set_read_timeout(Some(CLOSED_WITHIN))?;
        ends("the whole capture", &mut again, &wire.sent, n1, "another cluster key")?;
        // And who has the key, but not the session's number, has old messages of no use.
        let mut fresh = scene.lane()?;
        ends("its messages", &mut fresh.stream, &messages, n1, "another session")
    })
}

#[test]
fn garbage_before_the_handshake_is_told_and_forgotten() -> anyhow::Result<()> {
    undisturbed(|scene| {
        let node = scene.identity(Role::Node, "n3");
        let hello = ClientHandshake::new(ClusterKey::new(KEY), Purpose::Lane, &node, [5; 32]).hello();
        let ports = [
            (scene.lab.address("n1"), &scene.nodes[0], Purpose::Control),
            (scene.lab.manager_address(), &scene.manager, Purpose::Lane),
        ];
        for (address, daemon, wrong_purpose) in ports {
            let long = [&hello[..], &[0xff; PROOF_PREFIX_BYTES]].concat();
            let unproven = [&hello[..], &[0; PROOF_PREFIX_BYTES]].concat();
            let cases: [(&str, &str, &[u8]); 6] = [
                ("noise", "does not speak our protocol", &[0xa5; 5000]),
                ("half a hello", "did not finish its handshake", &hello[..20]),
                (
                    "a browser",
                    "does not speak our protocol",
                    b"GET / HTTP/1.1\r\nHost: mirror.example.org:7301\r\nAccept: */*\r\n\r\n",
                ),
                ("a hello alone", "did not finish its handshake", &hello),
                ("an identity too long", "identity too long", &long),
                ("no proof", "another cluster key", &unproven),
            ];
            for (what, reason, bytes) in cases {
                let mut stream = TcpStream::connect(&address)?;
                stream.set_read_timeout(Some(CLOSED_WITHIN))?;
                ends(what, &mut stream, bytes, daemon, reason)?;
            }
            let refused = scene.knock(&address, wrong_purpose, &node).err().context("it was let in")?;
            ensure!(refused.to_string().contains("refused by the other end"), "{refused}");
        }
        // A node that nobody knows, with the key.
        let mut stranger =
            scene.knock(&scene.lab.address("n1"), Purpose::Lane, &scene.identity(Role::Node, "n9"))?;
        ends("a stranger", &mut stranger.stream, &[], &scene.nodes[0], "not in the map")
    })
}

#[test]
fn garbage_on_a_control_connection_ends_it_and_nothing_else() -> anyhow::Result<()> {
    fn frame(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
    }
    undisturbed(|scene| {
        let report = frame(r#"{"type":"report","adopted":1,"sessions":[],"exports":[],"waiting":[]}"#);
        let both = [
            ("a length beyond all", "larger than any we know", vec![0xff; 64]),
            ("not JSON", "do not understand", frame("[[[[")),
            ("another message", "do not understand", frame(r#"{"type":"make_coffee"}"#)),
            ("half a message", "stopped in the middle of a message", frame("{    }")[..7].to_vec()),
            ("half a length", "said nothing", vec![1, 0]),
        ];
        for role in [Role::Node, Role::Operator] {
            for (what, reason, bytes) in &both {
                let identity = scene.identity(role, "n9");
                let mut wire = scene.knock(&scene.lab.manager_address(), Purpose::Control, &identity)?;
                ends(&format!("{role:?}: {what}"), &mut wire.stream, bytes, &scene.manager, reason)?;
            }
        }
        let identity = scene.identity(Role::Node, "n9");
        let mut wire = scene.knock(&scene.lab.manager_address(), Purpose::Control, &identity)?;
        let what = "a report before a registration";
        ends(what, &mut wire.stream, &report, &scene.manager, "before it registered")
    })
}

#[test]
fn a_second_connection_of_a_node_ends_the_first() -> anyhow::Result<()> {
    undisturbed(|scene| {
        let mut first = scene.lane()?;
        let _second = scene.lane()?;
        ends("the first of two", &mut first.stream, &[], &scene.nodes[0], "replaced by a new connection")
    })
}
