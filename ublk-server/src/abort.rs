//! A daemon of which one thread panicked must not live on as half of itself: with its disks and
//! connections held and nobody serving them, no other node would take over.

/// From now on a panic, in whatever thread or task, ends the process after it was reported.
pub fn on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const CHILD: &str = "UBLK_MIRROR_TEST_PANICS";

    #[test]
    fn a_panic_in_a_thread_ends_the_process() {
        if std::env::var_os(CHILD).is_some() {
            super::on_panic();
            let _ = std::thread::spawn(|| panic!("as if in the I/O thread")).join();
            std::process::exit(0);
        }
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "abort::tests::a_panic_in_a_thread_ends_the_process"])
            .env(CHILD, "1")
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
    }
}
