//! `mirror-sim --start-seed S --schedules N [--threads T]`, or `mirror-sim --replay SEED [--trace]`.

use mirror_tests::sim::schedule::{CLASSES, run};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

fn number(arguments: &[String], name: &str) -> Option<u64> {
    let at = arguments.iter().position(|argument| argument == name)?;
    arguments.get(at + 1)?.parse().ok()
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(seed) = number(&arguments, "--replay") {
        let outcome = run(seed, arguments.iter().any(|argument| argument == "--trace"));
        outcome.violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
        println!(
            "seed {seed}: {} requests, {} reads, trace hash {:016x}",
            outcome.completed, outcome.reads, outcome.hash
        );
        return u8::from(!outcome.violations.is_empty()).into();
    }
    let start = number(&arguments, "--start-seed").unwrap_or(1);
    let schedules = number(&arguments, "--schedules").unwrap_or(1_000);
    let threads = number(&arguments, "--threads").unwrap_or(1);
    let next = AtomicU64::new(start);
    let total = Mutex::new(([0; CLASSES.len()], 0, 0, Vec::new()));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= start + schedules {
                        return;
                    }
                    let outcome = std::panic::catch_unwind(|| run(seed, false));
                    let mut total = total.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    match outcome {
                        Ok(outcome) => {
                            for (sum, count) in total.0.iter_mut().zip(outcome.faults) {
                                *sum += count;
                            }
                            total.1 += outcome.completed;
                            total.2 += outcome.reads;
                            if let Some(first) = outcome.violations.first() {
                                println!("seed {seed}: {first}");
                                total.3.push(seed);
                            }
                        }
                        Err(_) => {
                            println!("seed {seed}: panicked");
                            total.3.push(seed);
                        }
                    }
                }
            });
        }
    });
    let (faults, completed, reads, mut failing) =
        total.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failing.sort_unstable();
    let rate = schedules as f64 / began.elapsed().as_secs_f64();
    println!("{schedules} schedules, {rate:.0}/s, {completed} requests, {reads} sectors read");
    for (class, count) in CLASSES.iter().zip(faults) {
        println!("  {class}: {count}");
    }
    println!("failing: {} {failing:?}", failing.len());
    u8::from(!failing.is_empty()).into()
}
