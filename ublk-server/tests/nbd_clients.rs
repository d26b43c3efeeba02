//! Real NBD clients against the pure parts of the server: what they negotiate, what they write and
//! read back, what they say about errors. Needs the packages `libnbd-bin`, `qemu-utils` and `fio`.

mod nbd_ram;

use nbd_ram::{BLOCK_BYTES, Running, export, start, start_with};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process;
use ublk_server::frontend::nbd::{Command, ExportInfo, NbdError};

const MIB: u64 = 1 << 20;

/// A client that hangs must fail its test instead of holding up all of them.
const CLIENT_SECONDS_MAX: &str = "120";

fn client(program: &str, arguments: &[&str]) -> process::Output {
    let package = match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "qemu-img" | "qemu-io" | "qemu-nbd" => "qemu-utils",
        other => other,
    };
    match process::Command::new(program).arg("--version").output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            panic!("{program} is not installed: apt-get install {package}")
        }
        other => other.unwrap_or_else(|error| panic!("{program} (package {package}): {error}")),
    };
    process::Command::new("timeout")
        .args([CLIENT_SECONDS_MAX, program])
        .args(arguments)
        .output()
        .expect("timeout(1) of coreutils")
}

/// Runs a client that must succeed, and returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = client(program, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}

/// Runs a client that must fail, and returns what it printed and complained.
fn fail(program: &str, arguments: &[&str]) -> String {
    let output = client(program, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{program} {arguments:?}: {out}{err}");
    format!("{out}{err}")
}

fn json_of(program: &str, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(program, arguments)).unwrap()
}

/// Different in every block, so that a misplaced one is noticed.
fn pattern(bytes: u64) -> Vec<u8> {
    let block = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes().repeat(64);
    (0..bytes / 512).map(|i| block(i + 1)).collect::<Vec<_>>().concat()
}

/// A file with data, holes and an end that is no multiple of anything large.
fn image(server: &Running, size: u64) -> (String, Vec<u8>) {
    let mut contents = pattern(size);
    contents[(size / 4) as usize & !65535..(size / 2) as usize & !65535].fill(0);
    let path = server.file("image");
    std::fs::write(&path, &contents).unwrap();
    (text(&path), contents)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn assert_same(left: &[u8], right: &[u8]) {
    if left == right {
        return;
    }
    assert_eq!(left.len(), right.len());
    let different = left.iter().zip(right).position(|(left, right)| left != right);
    assert_eq!(different, None, "first different byte");
}

#[test]
fn nbdinfo_understands_the_export() {
    let large = ExportInfo {
        block_size_min: 4096,
        block_size_preferred: 65536,
        read_only: true,
        rotational: true,
        ..export("large", 4 * MIB)
    };
    let server = start(vec![export("disk", 64 * MIB), large]);
    let uri = format!("nbd+unix:///?socket={}", server.socket().display());
    let list = json_of("nbdinfo", &["--json", "--list", &uri]);
    assert_eq!((&list["protocol"], &list["structured"]), (&json!("newstyle-fixed"), &json!(true)));
    let expected = [("disk", 64 * MIB, 512, 4096, false, true), ("large", 4 * MIB, 4096, 65536, true, false)];
    for (at, (name, size, min, preferred, read_only, writable)) in expected.into_iter().enumerate() {
        let shown = &list["exports"][at];
        for (key, value) in [
            ("export-name", json!(name)),
            ("description", json!(format!("{name} in memory"))),
            ("export-size", json!(size)),
            ("contexts", json!(["base:allocation"])),
            ("block_size_minimum", json!(min)),
            ("block_size_preferred", json!(preferred)),
            ("block_size_maximum", json!(32 * MIB)),
            ("is_read_only", json!(read_only)),
            ("is_rotational", json!(read_only)),
            ("can_flush", json!(true)),
            ("can_fua", json!(true)),
            ("can_multi_conn", json!(true)),
            ("can_trim", json!(writable)),
            ("can_zero", json!(writable)),
            ("can_fast_zero", json!(writable)),
            ("can_cache", json!(false)),
            ("can_df", json!(false)),
        ] {
            assert_eq!(shown[key], value, "{name}: {key}");
        }
    }
    for uri in [server.unix_uri("large"), server.tcp_uri("large")] {
        assert_eq!(json_of("nbdinfo", &["--json", &uri])["exports"][0]["export-size"], json!(4 * MIB));
    }
    assert_eq!(run("nbdinfo", &["--size", &server.unix_uri("large")]).trim(), "4194304");
}

#[test]
fn qemu_nbd_lists_many_exports_on_one_connection() {
    let names: Vec<_> = (0..100).map(|i| format!("disk{i}")).collect();
    let server = start(names.iter().map(|name| export(name, MIB)).collect());
    let list = run("qemu-nbd", &["--list", "-k", &text(&server.socket())]);
    assert!(list.contains("exports available: 100\n"), "{list}");
    assert_eq!(list.matches("available meta contexts: 1\n").count(), 100, "{list}");
    assert!(list.contains("export: 'disk99'\n  description: disk99 in memory\n"), "{list}");
}

#[test]
fn a_missing_export_is_named() {
    let server = start(vec![export("disk", MIB), export("other", MIB)]);
    assert!(fail("nbdinfo", &[&server.unix_uri("none")]).contains("No such file"));
    let message = fail("qemu-img", &["info", &server.unix_uri("none")]);
    assert!(message.contains("Requested export not available"), "{message}");
    assert!(message.contains("no such export; list shows what there is"), "{message}");
    assert!(fail("nbdinfo", &[&server.unix_uri("")]).contains("default export"));
}

#[test]
fn the_only_export_needs_no_name() {
    let server = start(vec![export("disk", MIB)]);
    assert_eq!(run("nbdinfo", &["--size", &server.unix_uri("")]).trim(), "1048576");
    assert!(run("nbdinfo", &["--map", &server.unix_uri("")]).contains("hole,zero"));
}

/// There and back, with and without structured replies, over both kinds of sockets.
#[test]
fn nbdcopy_copies_both_ways() {
    for simple_only in [false, true] {
        let server = start_with(vec![export("disk", 64 * MIB)], simple_only, None);
        let (file, contents) = image(&server, 64 * MIB);
        let copy = text(&server.file("copy"));
        run("nbdcopy", &["--flush", &file, &server.unix_uri("disk")]);
        assert_same(&server.contents(0), &contents);
        assert!(server.sessions() > 1, "several connections were offered");
        assert!(server.requests(|request| request.command == Command::Flush) > 0);
        run("nbdcopy", &[&server.tcp_uri("disk"), &copy]);
        assert_same(&std::fs::read(&copy).unwrap(), &contents);
        assert_eq!(server.structured_sessions(), if simple_only { 0 } else { server.sessions() });
        let asked_for_holes = server.requests(|request| request.command == Command::BlockStatus) > 0;
        assert_eq!(asked_for_holes, !simple_only);
        assert!(server.requests(|request| request.command == Command::WriteZeroes) > 0);
        assert!(server.requests(|request| request.command == Command::Disconnect) > 0);
    }
}

#[test]
fn nbdcopy_from_server_to_server_with_large_requests() {
    let size = 40 * MIB;
    let (from, to) = (start(vec![export("from", size)]), start(vec![export("to", size)]));
    let (file, contents) = image(&from, size);
    run("nbdcopy", &[&file, &from.unix_uri("from")]);
    run("nbdcopy", &["--request-size=33554432", &from.unix_uri("from"), &to.tcp_uri("to")]);
    assert_same(&to.contents(0), &contents);
    assert!(to.requests(|request| u64::from(request.length) > MIB) > 0);
}

#[test]
fn maps_show_holes() {
    let server = start(vec![export("disk", 64 * MIB)]);
    let uri = server.unix_uri("disk");
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write 1m 1m", "-c", "write 33m 64k", "-c", "write -z -u 34m 64k", &uri],
    );
    let map = json_of("nbdinfo", &["--json", "--map", &uri]);
    let expected = [(0, MIB, 3), (MIB, MIB, 0), (2 * MIB, 31 * MIB, 3), (33 * MIB, 65536, 0)];
    for (at, (offset, length, kind)) in expected.into_iter().enumerate() {
        let extent = &map[at];
        assert_eq!((&extent["offset"], &extent["length"]), (&json!(offset), &json!(length)), "{map}");
        assert_eq!(extent["type"], json!(kind));
    }
    let map = json_of("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    assert_eq!((&map[1]["start"], &map[1]["length"]), (&json!(MIB), &json!(MIB)), "{map}");
    assert_eq!(
        (&map[0]["data"], &map[1]["data"], &map[2]["zero"]),
        (&json!(false), &json!(true), &json!(true))
    );
    assert!(server.requests(|request| request.flags.req_one()) > 0, "qemu asks for one extent at a time");
}

/// More extents than fit one reply: the clients ask again where it ended.
#[test]
fn maps_longer_than_one_reply() {
    let server = start(vec![export("disk", 4 * MIB)]);
    let uri = server.unix_uri("disk");
    let writes: Vec<_> = (0..300).map(|i| format!("write {} 4k", i * 2 * BLOCK_BYTES)).collect();
    let mut arguments = vec!["-f", "raw"];
    writes.iter().for_each(|write| arguments.extend(["-c", write]));
    arguments.push(&uri);
    run("qemu-io", &arguments);
    let map = json_of("nbdinfo", &["--json", "--map", &uri]);
    assert_eq!(map.as_array().unwrap().len(), 600);
}

#[test]
fn qemu_img_converts_and_compares() {
    for block_size_min in [512, 4096] {
        let server = start(vec![ExportInfo { block_size_min, ..export("disk", 64 * MIB) }]);
        let (file, contents) = image(&server, 64 * MIB);
        let uri = server.unix_uri("disk");
        run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", &file, &uri]);
        assert_same(&server.contents(0), &contents);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &file, &server.tcp_uri("disk")]);
        let copy = text(&server.file("copy.qcow2"));
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &copy]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, &copy]);
        let info = json_of("qemu-img", &["info", "-f", "raw", "--output=json", &uri]);
        assert_eq!(info["virtual-size"], json!(64 * MIB));
    }
}

#[test]
fn qemu_io_reaches_every_command() {
    for simple_only in [false, true] {
        let server = start_with(vec![export("disk", 64 * MIB)], simple_only, None);
        let script = [
            "write -P 5 4k 64k",
            "read -P 5 4k 64k",
            "write -z 4k 16k",
            "write -z -u 20k 4k",
            "write -z -n -u 24k 4k",
            "discard 28k 4k",
            "read -P 0 4k 28k",
            "read -P 5 32k 36k",
            "write -f -P 6 512 512",
            "read -P 6 512 512",
            "write -P 7 32m 32m",
            "read -P 7 32m 32m",
            "aio_write -P 1 0 64k",
            "aio_write -P 2 64k 64k",
            "aio_flush",
            "read -P 1 0 64k",
            "read -P 2 64k 64k",
            "flush",
        ];
        let uri = server.unix_uri("disk");
        let mut arguments = vec!["-t", "none", "-f", "raw"];
        script.iter().for_each(|line| arguments.extend(["-c", line]));
        arguments.push(&uri);
        let out = run("qemu-io", &arguments);
        assert!(!out.contains("fail"), "{out}");
        assert_eq!(server.requests(|request| request.command == Command::Trim), 1);
        let zeroes = |no_hole| {
            let of_kind = |request: &ublk_server::frontend::nbd::Request| {
                request.command == Command::WriteZeroes && request.flags.no_hole() == no_hole
            };
            server.requests(of_kind)
        };
        assert_eq!((zeroes(true), zeroes(false)), (1, 2));
        assert_eq!(server.requests(|request| request.flags.fast_zero()), 1);
        assert_eq!(server.requests(|request| request.flags.fua()), 1);
        assert!(server.requests(|request| request.command == Command::Flush) > 0);
        assert_eq!(server.structured_sessions(), usize::from(!simple_only));
        assert_eq!(server.contents(0)[32 * MIB as usize], 7);
    }
}

#[test]
fn zeroing_that_is_not_fast_is_refused_at_once() {
    let server = start(vec![ExportInfo { fast_zero: false, ..export("disk", MIB) }]);
    let uri = server.unix_uri("disk");
    let out = fail("qemu-io", &["-f", "raw", "-c", "write -P 1 0 64k", "-c", "write -z -n 0 64k", &uri]);
    assert!(out.contains("Operation not supported"), "{out}");
    assert_eq!(server.contents(0)[0], 1);
    run("qemu-io", &["-f", "raw", "-c", "write -z 0 64k", "-c", "read -P 0 0 64k", &uri]);
}

#[test]
fn a_read_only_export_stays_as_it_is() {
    let server = start(vec![ExportInfo { read_only: true, ..export("disk", MIB) }]);
    let uri = server.unix_uri("disk");
    fail("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 4k", &uri]);
}

#[test]
fn clients_hear_of_errors_and_stay_in_step() {
    for simple_only in [false, true] {
        let server = start_with(vec![export("disk", MIB)], simple_only, Some(NbdError::Io));
        let uri = server.unix_uri("disk");
        let (file, _) = image(&server, MIB);
        let script =
            ["-f", "raw", "-c", "read 0 64k", "-c", "write 0 256k", "-c", "write 0 4k", "-c", "read 0 4k"];
        let out = fail("qemu-io", &[&script[..], &[&uri]].concat());
        assert_eq!(out.matches("failed: Input/output error").count(), 4, "{out}");
        assert_eq!(server.requests(|request| request.length == 4096), 2);
        assert!(fail("nbdcopy", &[&file, &uri]).contains("Input/output error"));
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    for (simple_only, block_size_min) in [(false, 512), (false, 4096), (true, 512)] {
        let disk = ExportInfo { block_size_min, ..export("disk", 64 * MIB) };
        let server = start_with(vec![disk], simple_only, None);
        for uri in [server.unix_uri("disk"), server.tcp_uri("disk")] {
            let out = run(
                "fio",
                &[
                    "--name=mixed",
                    "--ioengine=nbd",
                    &format!("--uri={uri}"),
                    "--rw=randwrite",
                    "--bsrange=4k-256k",
                    "--bs_unaligned=0",
                    "--blockalign=4k",
                    "--iodepth=32",
                    "--numjobs=4",
                    "--size=8m",
                    "--offset_increment=16m",
                    "--fsync=50",
                    "--verify=crc32c",
                    "--verify_fatal=1",
                    // Not into the source tree, where it would run.
                    "--verify_state_save=0",
                ],
            );
            assert!(out.contains("err= 0") && !out.contains("verify failed"), "{out}");
        }
        assert!(server.sessions() >= 8, "each job has a connection");
        assert_eq!(server.structured_sessions(), if simple_only { 0 } else { server.sessions() });
        assert!(server.requests(|request| request.command == Command::Flush) > 0);
    }
}

/// What no well-behaved client would send: all of it in one piece, a refused write in the middle.
#[test]
fn a_stream_stays_in_step_over_refused_writes() {
    let server = start(vec![export("disk", MIB)]);
    let request = |command: u16, cookie: u64, offset: u64, payload: &[u8], length: u32| {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(payload);
        bytes
    };
    let mut bytes = 1u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    bytes.extend(request(1, 1, 0, &[1; 512], 512));
    bytes.extend(request(1, 2, MIB, &[2; 512], 512));
    bytes.extend(request(1, 3, 7, &[3; 100_000], 100_000));
    bytes.extend(request(1, 4, 0, &vec![4; 40 * MIB as usize], 40 * MIB as u32));
    bytes.extend(request(5, 5, 0, &[], 512));
    bytes.extend(request(99, 6, 0, &[], 512));
    bytes.extend(request(0, 7, 0, &[], 512));
    bytes.extend(request(2, 8, 0, &[], 0));
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(&bytes).unwrap();
    let mut replies = Vec::new();
    stream.read_to_end(&mut replies).unwrap();

    let reply = |error: u32, cookie: u64| {
        [&0x6744_6698u32.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    };
    let mut expected = b"NBDMAGICIHAVEOPT\0\x03\0\0\0\0\0\x10\0\0\x09\x6d".to_vec();
    expected.extend([0; 124]);
    for (error, cookie) in [(0, 1), (28, 2), (22, 3), (28, 4), (22, 5), (22, 6), (0, 7)] {
        expected.extend(reply(error, cookie));
    }
    expected.extend([1; 512]);
    assert_same(&replies, &expected);
}
