//! Runs commands from the host inside a machine of the lab: `lab-agent ADDRESS`.

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1) {
        Some(address) => mirror_tests::machines::exec::agent(&address),
        None => anyhow::bail!("usage: lab-agent ADDRESS"),
    }
}
