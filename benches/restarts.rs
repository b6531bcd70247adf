//! Does a device's process that dies leave anything behind? Starts one, uses it, has it crash in the middle of a call, and
//! again, 10,000 times; then looks for processes, descriptors, threads and memory.
//!
//! `cargo bench --profile bench-scripted --bench restarts [-- CYCLES]`. Fails when something is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

use strongroom::{
    devices::{
        DeviceError, Input, Operation, Scheme, Slot,
        call::{Call, Engine, Session},
        host::{Host, HostEngine, HostSettings},
    },
    reactor::Reactor,
};

const CYCLES: usize = 10_000;
/// After so many, everything that is made once is there.
const WARM: usize = 200;
/// Memory that a run may have gained for reasons of its allocator, in KiB.
const SLACK_KIB: u64 = 4096;

const SCRIPT: &str = r#"
[[key]]
slot = "k"
type = "ed25519"
[[rule]]
on = "sign"
from = 2
do = { crash = "segv" }
"#;

/// What the process has.
#[derive(Debug)]
struct Holdings {
    resident_kib: u64,
    descriptors: usize,
    threads: usize,
    children: usize,
}

impl Holdings {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        // Of all threads: whichever started a process is its parent.
        let children = fs::read_dir("/proc/self/task").unwrap().map(|task| {
            let children = fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
            children.split_whitespace().count()
        });
        Self {
            resident_kib: field("VmRSS:"),
            descriptors: fs::read_dir("/proc/self/fd").unwrap().count(),
            threads: usize::try_from(field("Threads:")).unwrap(),
            children: children.sum(),
        }
    }
}

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let cycles = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(CYCLES);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = HostSettings { program: env!("CARGO_BIN_EXE_strongroom").into(), ..HostSettings::new("restarts") };
    let reactor = Reactor::start(1, runtime.handle()).unwrap();
    let host = Host::new("scripted", SCRIPT.as_bytes().to_vec(), settings);
    let host = HostEngine { host, reactor: reactor.registry().clone() };
    let began = Instant::now();
    let run = |cycles| {
        for _ in 0..cycles {
            runtime.block_on(cycle(&host));
        }
    };
    run(WARM);
    let before = Holdings::now();
    run(cycles);
    // Threads and descriptors of the last one go within moments.
    let deadline = Instant::now() + Duration::from_secs(10);
    let after = loop {
        let now = Holdings::now();
        let same = now.descriptors <= before.descriptors && now.threads <= before.threads && now.children == 0;
        if same || Instant::now() > deadline {
            break now;
        }
    };
    println!("before: {before:?}\nafter {cycles} cycles in {:?}: {after:?}", began.elapsed());
    let left = after.descriptors > before.descriptors
        || after.threads > before.threads
        || after.children > 0
        || after.resident_kib > before.resident_kib + SLACK_KIB;
    if left { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn cycle(host: &HostEngine) {
    let session = host.open().await.expect("the device opens");
    let sign = || {
        let input = Input::Message(b"message".as_slice().into());
        session.call(Call::Operate(
            Slot(b"k".as_slice().into()),
            Operation::Sign { scheme: Scheme::Ed25519, input }.into(),
        ))
    };
    sign().await.expect("the first signature");
    assert!(matches!(sign().await, Err(DeviceError::Restarted)), "the second kills it");
    session.end(Duration::ZERO).await;
}
