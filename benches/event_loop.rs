//! Is an event loop held up by what it asks the vault for? A loop in C ticks every 10 ms while it has 1,000 signatures in
//! flight over contrib/c, on a device with eight lanes that takes 50 ms for each; how late the ticks come, and what becomes
//! of the requests. Beside it, the same loop with one request in flight: what the machine itself is late by.
//!
//! `cargo bench --profile bench-scripted --bench event_loop [-- ROUNDS]`, best on a machine that does nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{collections::BTreeMap, path::Path};

use support::{
    c::Program,
    command,
    daemon::{Home, SLOW},
    eventually, run,
};

const ROUNDS: usize = 3;

fn main() {
    // Cargo adds `--bench`.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let mut home = Home::new();
    home.device("slow", SLOW, "timeout = \"1m\"");
    let daemon = home.start();
    let mut keys = Vec::new();
    eventually("the key is listed", || {
        keys = daemon.connect_service().list();
        keys.len() == 1
    });
    let program = Program::Loop.optimised(&home.path(""));
    for _ in 0..rounds {
        for count in [1, 1000] {
            measure(&home, &program, &keys[0].0, count);
        }
    }
}

/// Runs the loop once, and prints what it tells.
fn measure(home: &Home, program: &Path, key: &[u8], count: usize) {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let socket = home.path("service");
    let arguments = [socket.to_str().unwrap(), &hex, &count.to_string(), "60000"];
    let stdout = run(command(program.to_str().unwrap(), &home.path("")).args(arguments)).ok();
    let (answers, last) = stdout.trim_end().rsplit_once('\n').unwrap();
    let mut codes: BTreeMap<&str, usize> = BTreeMap::new();
    for line in answers.lines() {
        *codes.entry(line.split(' ').nth(1).unwrap()).or_default() += 1;
    }
    assert_eq!(codes.values().sum::<usize>(), count, "every request ends once");
    let mut words = last.split(' ').filter_map(|word| word.parse::<u64>().ok());
    let mut next = || words.next().unwrap();
    let (ticks, p50, p99, worst) = (next(), next(), next(), next());
    println!("{count:5} in flight: {codes:?}; {ticks} ticks, late by p50 {p50}, p99 {p99}, at worst {worst} µs");
}
