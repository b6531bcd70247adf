//! What do bad devices cost everybody else? Signatures with a soft Ed25519 key, lists, and signatures with a P-256 key of
//! another token, SoftHSM's, each over eight connections, alone and beside three devices that 64 clients each ask without a pause: one that hangs for ever, one that takes 50 ms, one that
//! crashes at every third signature. Then beside a PKCS#11 module that hangs, crashes, ends its process, dawdles, fails or
//! lies, mood by mood. And: how long until a device whose process is killed is ready again.
//!
//! Method. The daemon is the real one, in a profile that is a release but for the assertions which let the scripted device
//! in. Rounds without and with the clients of the bad devices alternate, so that both see the same machine; each figure is
//! the median over the rounds. The clients share the cores with the daemon, as they do in life.
//!
//! `cargo bench --profile bench-scripted --bench isolation [-- ROUNDS]`, best on a machine that does nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Signal, kill_process};
use support::{
    bad_module::BadModule,
    client::{Client, Key, REQUEST_IDENTITIES, SIGN_REQUEST, SIGN_RESPONSE, message},
    daemon::{Daemon, Home},
    softhsm::SoftHsm,
};

const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_secs(3);
/// What is measured, for an equal part of each round.
const OPERATIONS: [&str; 3] = ["sign", "list", "token"];
/// Connections that are measured.
const CONNECTIONS: usize = 8;
/// Clients of each bad device.
const CLIENTS: usize = 64;
/// One less than makes a device count as failed, so that the pauses between deaths in a row are in the figures.
const KILLS: usize = 4;

/// The devices: a name, and what goes wrong.
const DEVICES: [(&str, &str); 3] = [
    ("hung", "[[rule]]\non = \"sign\"\ndo = \"hang\"\n"),
    ("slow", "[[rule]]\non = \"sign\"\ndo = { sleep_ms = 50 }\n"),
    ("flapping", "[[rule]]\non = \"sign\"\nfrom = 3\ndo = { crash = \"abort\" }\n"),
];

/// What the PKCS#11 module does at each signature (tests/pkcs11/bad.c).
const MOODS: [&str; 6] = ["hang", "crash", "exit", "slow=50", "fail=30", "wrong"];

fn main() {
    // Cargo adds `--bench`.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let mut home = Home::new();
    for (n, (name, rule)) in DEVICES.iter().enumerate() {
        let key = format!("[[key]]\nslot = \"k\"\ntype = \"ed25519\"\nseed = {n}\nlabel = \"{name}\"\n");
        home.device(name, &format!("control = CONTROL\n{key}{rule}"), "");
    }
    home.device(
        "killed",
        "control = CONTROL\n[[key]]\nslot = \"k\"\ntype = \"p256\"\nseed = 9\nlabel = \"killed\"\n",
        "",
    );
    let (hsm, module) = (SoftHsm::with_token("moody"), BadModule::build());
    hsm.generate("moody", "EC:prime256v1", "01", "moody", &[]);
    home.configure(&hsm.device_of(&module.path(), "moody", "moody", "timeout = \"1s\"\ngrace = \"100ms\""));
    hsm.init_token("well");
    hsm.generate("well", "EC:prime256v1", "01", "well", &[]);
    home.configure(&hsm.device("well", "well", ""));
    let daemon = home.start();
    let soft = Key::random();
    assert_eq!(daemon.connect().request(&soft.add_message(b"soft", &[])), [6]);
    let well = sign(&daemon.blob("well"));
    assert_eq!(daemon.connect().request(&well)[0], SIGN_RESPONSE);
    let bodies = [sign(&soft.blob()), vec![REQUEST_IDENTITIES], well];
    let keys: Vec<_> = DEVICES.iter().map(|(name, _)| daemon.blob(name)).collect();

    println!("{CONNECTIONS} connections, {rounds} rounds of {} s; µs", ROUND.as_secs());
    compare("the three", rounds, &daemon, &bodies, &keys);
    let moody = [daemon.blob("moody")];
    for mood in MOODS {
        module.mood(&format!("C_Sign {mood}\n"));
        compare(mood, rounds, &daemon, &bodies, &moody);
        module.recover();
        let mut client = daemon.connect();
        let began = Instant::now();
        while client.request(&sign(&moody[0]))[0] != SIGN_RESPONSE {
            assert!(began.elapsed() < support::PATIENCE, "{mood}: it does not sign again");
        }
        println!("{mood}: signed again after {:?}", began.elapsed());
    }

    let killed = daemon.blob("killed");
    let back: Vec<_> = (0..KILLS).map(|_| kill(&daemon, &killed)).collect();
    println!("killed in the middle of 100 requests and ready again, {KILLS} times in a row: {back:?}");
}

/// What these requests cost alone, and beside the clients of these keys.
fn compare(what: &str, rounds: usize, daemon: &Daemon<'_>, bodies: &[Vec<u8>; 3], keys: &[Vec<u8>]) {
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let mut asked = 0;
    for _ in 0..rounds {
        alone.push(measure(daemon, bodies));
        let hammering = Hammering::start(daemon, keys);
        beside.push(measure(daemon, bodies));
        asked += hammering.stop().load(Ordering::Relaxed);
    }
    for (at, operation) in OPERATIONS.iter().enumerate() {
        let [p50, p99] = [0, 1].map(|n| (median(&alone, at, n), median(&beside, at, n)));
        println!(
            "{what}: {operation}: p50 {} alone, {} beside; p99 {} alone, {} beside: {:+} µs ({asked} answers)",
            p50.0,
            p50.1,
            p99.0,
            p99.1,
            p99.1.cast_signed() - p99.0.cast_signed()
        );
    }
}

/// `[p50, p99]` of each operation in a round, in microseconds.
type Figures = [[u64; 2]; 3];

fn median(figures: &[Figures], operation: usize, which: usize) -> u64 {
    let mut values: Vec<_> = figures.iter().map(|figure| figure[operation][which]).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

fn sign(blob: &[u8]) -> Vec<u8> {
    let mut body = message(SIGN_REQUEST, &[blob, &[7; 600]]);
    body.extend([0; 4]);
    body
}

/// A round.
fn measure(daemon: &Daemon<'_>, bodies: &[Vec<u8>; 3]) -> Figures {
    bodies.each_ref().map(|body| {
        let start = Arc::new(Barrier::new(CONNECTIONS));
        let threads: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let (mut client, body, start) = (daemon.connect(), body.clone(), Arc::clone(&start));
                thread::spawn(move || {
                    start.wait();
                    let end = Instant::now() + ROUND / 3;
                    let mut times = Vec::new();
                    while Instant::now() < end {
                        let asked = Instant::now();
                        let reply = client.request(&body);
                        times.push(u64::try_from(asked.elapsed().as_micros()).unwrap());
                        assert!(reply.len() > 60, "refused");
                    }
                    times
                })
            })
            .collect();
        let mut times: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        times.sort_unstable();
        [times[times.len() / 2], times[times.len() * 99 / 100]]
    })
}

/// The clients of the bad devices.
struct Hammering {
    over: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    sockets: Vec<std::os::unix::net::UnixStream>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Hammering {
    fn start(daemon: &Daemon<'_>, keys: &[Vec<u8>]) -> Self {
        let (over, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (mut sockets, mut threads) = (Vec::new(), Vec::new());
        for key in keys.iter().flat_map(|key| std::iter::repeat_n(key, CLIENTS)) {
            let mut client: Client = daemon.connect();
            sockets.push(client.socket());
            let (body, over, requests) = (sign(key), Arc::clone(&over), Arc::clone(&requests));
            threads.push(thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    client.send(&body);
                    if client.receive().is_err() {
                        return;
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Self { over, requests, sockets, threads }
    }

    fn stop(self) -> Arc<AtomicU64> {
        self.over.store(true, Ordering::Relaxed);
        for socket in &self.sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        for thread in self.threads {
            // One that was about to write when its socket was closed has nothing to tell.
            let _ = thread.join();
        }
        self.requests
    }
}

/// Kills the device's process in the middle of 100 requests; how long until it signs again.
fn kill(daemon: &Daemon<'_>, key: &[u8]) -> Duration {
    let mut clients: Vec<_> = (0..100).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        client.send(&sign(key));
    }
    let process = daemon.hosts().into_iter().find(|(_, name)| name == "killed").expect("its process").0;
    let killed = Instant::now();
    kill_process(process, Signal::KILL).unwrap();
    for client in &mut clients {
        client.receive().expect("each request is answered");
    }
    let mut client = daemon.connect();
    while client.request(&sign(key))[0] != SIGN_RESPONSE {}
    killed.elapsed()
}
