//! How fast is the agent, beside others and beside what the machine allows? Signatures over sockets in several shapes, many
//! keys, many connections, starts; against a minimal agent (the floor), the bare arithmetic, OpenSSH's ssh-agent and, where it is
//! installed, GnuPG's gpg-agent.
//!
//! Method. Each agent is a process of its own; ours has its audit log on and a store with a hundred
//! keys open, as a user has. Rounds of all agents alternate, so that all see the same machine, and the floor is measured
//! before and after ours; a ratio is the median of the rounds' ratios. The clients are one thread of this process and share
//! the cores with the agent. Messages have 600 bytes, each request another; a signature of each load is verified.
//!
//! `make bench-agents`, best on a machine that does nothing else; `ROUNDS=9` for more rounds than five. One part of it:
//! `cargo bench --bench agents -- --only shapes`, with the release in STRONGROOM_RELEASE.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, unreachable_pub, missing_docs)]

#[path = "../../tests/support/mod.rs"]
mod support;

mod floor;
mod load;
mod raw;
mod report;
mod subject;

use std::{
    cell::Cell,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use load::{Figures, Load, Request, churn};
use raw::Signer;
use report::{Bars, Row, Target, Wanted};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use subject::{Keys, Subject, program, ssh_agent, start_up, strongroom};
use support::client::{Client, Key};

const ROUNDS: usize = 5;
const WINDOW: Duration = Duration::from_secs(1);
/// How often a start is measured.
const STARTS: usize = 15;
/// Keys, and connections, that are a lot.
const MANY: usize = 10_000;
const NO_AUDIT: &str = "[audit]\nenabled = false";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, socket] = &arguments[..]
        && mode == "floor"
    {
        return floor::serve(Path::new(socket), cores());
    }
    // Cargo adds `--bench`.
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let directory = arguments.iter().position(|argument| argument == "--write").and_then(|at| arguments.get(at + 1));
    let descriptors = raise_descriptors();
    let mut bench = Bench { rounds, descriptors, keys: Keys::new(), rows: Vec::new(), bars: Vec::new() };
    let sections: [Section; 10] = [
        ("shapes", Bench::shapes),
        ("idle halves", Bench::idle_halves),
        ("other keys", Bench::other_keys),
        ("beside rsa", Bench::beside_rsa),
        ("one client", Bench::one_client),
        ("many keys", Bench::many_keys),
        ("many connections", Bench::many_connections),
        ("churn", Bench::churn),
        ("starts", Bench::starts),
        ("costs", Bench::costs),
    ];
    let only = arguments.iter().position(|argument| argument == "--only").and_then(|at| arguments.get(at + 1));
    for (name, section) in sections {
        if only.is_none_or(|only| only == name) {
            section(&mut bench);
        }
    }
    let heading =
        format!("{} cores, {rounds} rounds of {} s. benches/agents describes the method.", cores(), WINDOW.as_secs());
    println!("{heading}\n\n{}", report::table(&bench.rows));
    if let Some(directory) = directory {
        report::write(Path::new(directory), &heading, &bench.rows, &bench.bars).expect("the report is written");
    }
}

/// A part of the table, by its name.
type Section = (&'static str, fn(&mut Bench));

struct Bench {
    rounds: usize,
    /// How many files may be open.
    descriptors: u64,
    keys: Keys,
    rows: Vec<Row>,
    bars: Vec<Bars>,
}

/// What a load showed, and what the agent used of the processors for one request, in µs.
struct Sample {
    figures: Figures,
    cpu_us: f64,
}

impl Sample {
    fn rate(&self) -> f64 {
        self.figures.rate
    }
}

fn measure(subject: &Subject, load: &Load) -> Sample {
    let (before, after) = (Cell::new(Duration::ZERO), Cell::new(Duration::ZERO));
    let figures = load.run(WINDOW, || before.set(subject.cpu()), || after.set(subject.cpu()));
    let cpu_us = (after.get() - before.get()).as_secs_f64() * 1e6 / figures.count.max(1) as f64;
    Sample { figures, cpu_us }
}

impl Bench {
    fn row(&mut self, what: impl Into<String>, measured: String, target: Option<(f64, Wanted, &'static str)>) {
        let target = target.map(|(value, wanted, unit)| Target { value, wanted, unit });
        let row = Row { what: what.into(), measured, target };
        print!(
            "{}",
            report::table(std::slice::from_ref(&row)).lines().nth(2).map_or(String::new(), |line| format!("{line}\n"))
        );
        self.rows.push(row);
    }

    fn blob(&self, key: &str) -> Vec<u8> {
        self.keys.blob(key)
    }

    /// Ed25519, so many connections with so many requests in flight.
    fn shapes(&mut self) {
        let (ours, floor, ssh) = (Subject::strongroom(&self.keys, ""), Subject::floor(), Subject::ssh_agent());
        let gpg = Subject::gpg_agent();
        ours.add(&self.keys, "ed25519");
        ssh.add(&self.keys, "ed25519");
        if let Some(gpg) = &gpg {
            gpg.add(&self.keys, "ed25519");
        }
        let (key, floor_key, raw) = (self.blob("ed25519"), floor.first_key(), Signer::new("ed25519"));
        for (connections, in_flight) in [(8, 1), (64, 1), (8, 8), (64, 8)] {
            let what = format!("Ed25519, {connections} × {in_flight}");
            let load = |subject: &Subject, key| Load::sign(&subject.socket, key, connections, in_flight);
            let (mut ratios, mut own, mut floors, mut peer, mut other) = (vec![], vec![], vec![], vec![], vec![]);
            let (mut cpu, mut raws) = (vec![], vec![]);
            for _ in 0..self.rounds {
                let before = measure(&floor, &load(&floor, &floor_key)).rate();
                let sample = measure(&ours, &load(&ours, &key));
                let after = measure(&floor, &load(&floor, &floor_key)).rate();
                ratios.push(sample.rate() / f64::midpoint(before, after));
                floors.push(f64::midpoint(before, after));
                own.push(sample.rate());
                cpu.push(sample.cpu_us);
                raws.push(raw.rate(cores(), WINDOW / 4));
                peer.push(measure(&ssh, &load(&ssh, &key)).rate());
                other.extend(gpg.as_ref().map(|gpg| measure(gpg, &load(gpg, &key)).rate()));
            }
            let [own, floors, peer, raw, cpu] = [own, floors, peer, raws, cpu].map(median);
            let other = (!other.is_empty()).then(|| median(other));
            let beside = other.map_or(String::new(), |rate| format!(", gpg-agent {rate:.0}/s"));
            let (least, times) = if in_flight == 1 { (0.85, Some(10.0)) } else { (0.9, None) };
            let target = Some((median(ratios), Wanted::AtLeast(least), " × floor"));
            self.row(&what, format!("{own:.0}/s; floor {floors:.0}/s, ssh-agent {peer:.0}/s{beside}"), target);
            if let Some(times) = times {
                let target = Some((own / peer, Wanted::AtLeast(times), " × ssh-agent"));
                self.row(&what, format!("{cpu:.1} µs of a core each"), target);
            } else {
                let share = cores() as f64 * 1e6 / raw / cpu;
                let target = Some((share, Wanted::AtLeast(0.75), " of its time signing"));
                self.row(&what, format!("{cpu:.1} µs of a core each, bare {raw:.0}/s"), target);
            }
            let mut rates = vec![("strongroom", own), ("floor", floors), ("ssh-agent", peer)];
            rates.extend(other.map(|rate| ("gpg-agent", rate)));
            self.bars.push(Bars { what, rates });
        }
    }

    /// The same with as many connections more that are idle, so that those at work may all be on one core.
    fn idle_halves(&mut self) {
        let (ours, floor) = (Subject::strongroom(&self.keys, ""), Subject::floor());
        ours.add(&self.keys, "ed25519");
        let (key, floor_key) = (self.blob("ed25519"), floor.first_key());
        for (connections, in_flight) in [(8, 1), (64, 1), (8, 8)] {
            let ratio = |subject: &Subject, key: &[u8]| {
                let even = Load::sign(&subject.socket, key, connections, in_flight);
                let uneven = Load { with_idle: true, ..even.clone() };
                measure(subject, &uneven).rate() / measure(subject, &even).rate()
            };
            let (own, floor): (Vec<_>, Vec<_>) =
                (0..self.rounds).map(|_| (ratio(&ours, &key), ratio(&floor, &floor_key))).unzip();
            let what = format!("the same, {connections} × {in_flight}, every second connection idle");
            let target = Some((median(own), Wanted::AtLeast(0.95), " × even"));
            self.row(what, format!("the floor {:.2} × even", median(floor)), target);
        }
    }

    /// P-256 and RSA over 64 connections.
    fn other_keys(&mut self) {
        let (ours, floor, ssh) = (Subject::strongroom(&self.keys, ""), Subject::floor(), Subject::ssh_agent());
        let (floor_key, ed25519) = (floor.first_key(), Signer::new("ed25519"));
        for (name, what) in
            [("p256", "P-256"), ("rsa2048", "RSA-2048"), ("rsa3072", "RSA-3072"), ("rsa4096", "RSA-4096")]
        {
            ours.add(&self.keys, name);
            ssh.add(&self.keys, name);
            let (key, signer) = (self.blob(name), Signer::new(name));
            let (mut own, mut raws, mut peer, mut ratios) = (vec![], vec![], vec![], vec![]);
            for _ in 0..self.rounds {
                let limit = signer.rate(cores(), WINDOW);
                let rate = measure(&ours, &Load::sign(&ours.socket, &key, 64, 1)).rate();
                let reach = if name == "p256" {
                    // What the floor takes of the machine for all but its signature, and this signature.
                    let floor = 1.0 / measure(&floor, &Load::sign(&floor.socket, &floor_key, 64, 1)).rate();
                    1.0 / (floor - 1.0 / ed25519.rate(cores(), WINDOW / 2) + 1.0 / limit)
                } else {
                    limit
                };
                ratios.push(rate / reach);
                own.push(rate);
                raws.push(limit);
                peer.push(measure(&ssh, &Load::sign(&ssh.socket, &key, 64, 1)).rate());
            }
            let [own, raw, peer] = [own, raws, peer].map(median);
            let measured = format!("{own:.0}/s; bare {raw:.0}/s, ssh-agent {peer:.0}/s");
            let (least, unit) = if name == "p256" { (0.7, " × socket and bare") } else { (0.9, " × bare") };
            self.row(format!("{what}, 64 × 1"), measured, Some((median(ratios), Wanted::AtLeast(least), unit)));
            if name != "p256" {
                let target = Some((own / peer, Wanted::AtLeast(4.0), " × ssh-agent"));
                self.row(format!("{what}, 64 × 1"), String::new(), target);
            }
            let rates = vec![("strongroom", own), ("raw", raw), ("ssh-agent", peer)];
            self.bars.push(Bars { what: format!("{what}, 64 × 1"), rates });
        }
    }

    /// Ed25519 beside eight connections that ask for RSA-4096 without a pause.
    fn beside_rsa(&mut self) {
        let (ours, ssh) = (Subject::strongroom(&self.keys, ""), Subject::ssh_agent());
        for subject in [&ours, &ssh] {
            subject.add(&self.keys, "ed25519").add(&self.keys, "rsa4096");
        }
        let (key, slow) = (self.blob("ed25519"), self.blob("rsa4096"));
        let beside = |subject: &Subject, connections| {
            let victim = Load::sign(&subject.socket, &key, connections, 1);
            let hammer = Load::sign(&subject.socket, &slow, 8, 1);
            thread::scope(|scope| {
                let hammer = scope.spawn(|| hammer.run(WINDOW * 2, || {}, || {}));
                let victim = victim.run(WINDOW * 2, || {}, || {});
                (victim, hammer.join().expect("the clients"))
            })
        };
        for connections in [1, 8] {
            let (mut p99, mut kept, mut peer) = (vec![], vec![], vec![]);
            for _ in 0..self.rounds {
                let alone = measure(&ours, &Load::sign(&ours.socket, &slow, 8, 1)).rate();
                let (victim, hammer) = beside(&ours, connections);
                p99.push(victim.percentile(99.0));
                kept.push(hammer.rate / alone);
                peer.push(beside(&ssh, connections).0.percentile(50.0));
            }
            let what = format!("Ed25519 × {connections} beside RSA-4096 × 8");
            let measured = format!("p99; ssh-agent {:.0} µs at p50", median(peer));
            self.row(&what, measured, Some((median(p99), Wanted::AtMost(1000.0), " µs")));
            let target = Some((median(kept), Wanted::AtLeast(0.2), " of its rate alone"));
            self.row(&what, "RSA-4096 keeps".to_owned(), target);
        }
    }

    /// One client that waits for each reply.
    fn one_client(&mut self) {
        let (ours, floor, ssh) = (Subject::strongroom(&self.keys, ""), Subject::floor(), Subject::ssh_agent());
        let gpg = Subject::gpg_agent();
        ours.add(&self.keys, "ed25519");
        ssh.add(&self.keys, "ed25519");
        if let Some(gpg) = &gpg {
            gpg.add(&self.keys, "ed25519");
        }
        let (key, floor_key) = (self.blob("ed25519"), floor.first_key());
        let p50 = |subject: &Subject, key: &[u8]| {
            measure(subject, &Load::sign(&subject.socket, key, 1, 1)).figures.percentile(50.0)
        };
        let (mut ratios, mut own, mut floors, mut peer, mut other) = (vec![], vec![], vec![], vec![], vec![]);
        for _ in 0..self.rounds {
            let (before, mine, after) = (p50(&floor, &floor_key), p50(&ours, &key), p50(&floor, &floor_key));
            ratios.push(mine / f64::midpoint(before, after));
            own.push(mine);
            floors.push(f64::midpoint(before, after));
            peer.push(p50(&ssh, &key));
            other.extend(gpg.as_ref().map(|gpg| p50(gpg, &key)));
        }
        let beside = if other.is_empty() { String::new() } else { format!(", gpg-agent {:.0} µs", median(other)) };
        let [own, floors, peer] = [own, floors, peer].map(median);
        let measured = format!("p50 {own:.0} µs; floor {floors:.0} µs, ssh-agent {peer:.0} µs{beside}");
        let target = Some((median(ratios), Wanted::AtMost(1.15), " × floor"));
        self.row("Ed25519, one blocking client", measured, target);
    }

    fn many_keys(&mut self) {
        let (few, many) = (Subject::strongroom(&self.keys, ""), Subject::strongroom(&self.keys, ""));
        for subject in [&few, &many] {
            subject.add(&self.keys, "ed25519");
        }
        let before = many.memory().1;
        let mut client = Client::connect(&many.socket);
        for n in 1..MANY {
            client.add(&Key::random(), &format!("key {n}"), &[]);
        }
        let grown = many.memory().1 - before;
        let key = self.blob("ed25519");
        let rate = |subject: &Subject| measure(subject, &Load::sign(&subject.socket, &key, 8, 1)).rate();
        let ratios = (0..self.rounds).map(|_| rate(&many) / rate(&few)).collect();
        let what = format!("{MANY} keys");
        self.row(&what, "sign, 8 × 1".to_owned(), Some((median(ratios), Wanted::AtLeast(0.95), " × one key")));
        let list = Load { request: Request::list(), ..Load::sign(&many.socket, &key, 1, 1) };
        let p50 = measure(&many, &list).figures.percentile(50.0);
        self.row(&what, "list, p50".to_owned(), Some((p50 / 1000.0, Wanted::AtMost(1.0), " ms")));
        let target = Some((grown / (MANY - 1) as f64, Wanted::AtMost(1.0), " KiB a key"));
        self.row(&what, "memory".to_owned(), target);
    }

    fn many_connections(&mut self) {
        let count = MANY.min(usize::try_from(self.descriptors).unwrap_or(MANY).saturating_sub(500));
        let (few, many) = (Subject::strongroom(&self.keys, ""), Subject::strongroom(&self.keys, ""));
        for subject in [&few, &many] {
            subject.add(&self.keys, "ed25519");
        }
        let before = many.memory().1;
        let idle: Vec<_> = (0..count).map(|_| connect(&many.socket)).collect();
        // Each has been served once.
        let mut last = Client::connect(&many.socket);
        last.list();
        let grown = many.memory().1 - before;
        let key = self.blob("ed25519");
        let p50 =
            |subject: &Subject| measure(subject, &Load::sign(&subject.socket, &key, 1, 1)).figures.percentile(50.0);
        let ratios = (0..self.rounds).map(|_| p50(&many) / p50(&few)).collect();
        let what = format!("{count} idle connections");
        let target = Some((median(ratios), Wanted::AtMost(1.05), " × none"));
        self.row(&what, "sign, p50 of one client".to_owned(), target);
        self.row(&what, "memory".to_owned(), Some((grown / count as f64, Wanted::AtMost(4.0), " KiB each")));
        drop(idle);
    }

    fn churn(&mut self) {
        let (ours, floor, ssh) = (Subject::strongroom(&self.keys, ""), Subject::floor(), Subject::ssh_agent());
        ours.add(&self.keys, "ed25519");
        ssh.add(&self.keys, "ed25519");
        let (key, floor_key) = (self.blob("ed25519"), floor.first_key());
        let (mut own, mut floors, mut peer) = (vec![], vec![], vec![]);
        for _ in 0..self.rounds {
            floors.push(churn(&floor.socket, &floor_key, 8, WINDOW));
            own.push(churn(&ours.socket, &key, 8, WINDOW));
            peer.push(churn(&ssh.socket, &key, 8, WINDOW));
        }
        let ratio = median(own.iter().zip(&floors).map(|(own, floor)| own / floor).collect());
        let [own, floors, peer] = [own, floors, peer].map(median);
        let what = "connect, sign, close; 8 threads";
        let measured = format!("{own:.0}/s; floor {floors:.0}/s, ssh-agent {peer:.0}/s");
        self.row(what, measured, Some((ratio, Wanted::AtLeast(0.7), " × floor")));
        self.row(what, String::new(), Some((own / peer, Wanted::AtLeast(5.0), " × ssh-agent")));
        let rates = vec![("strongroom", own), ("floor", floors), ("ssh-agent", peer)];
        self.bars.push(Bars { what: what.to_owned(), rates });
    }

    fn starts(&mut self) {
        let agent = |dir: &Path, socket: &Path| strongroom(Some(&self.keys), "")(dir, socket);
        let drop_in = |_: &Path, socket: &Path| {
            let mut command = Command::new(program());
            command.args(["ssh-agent", "-D", "-a"]).arg(socket);
            command
        };
        let time = |make: &dyn Fn(&Path, &Path) -> Command| {
            median((0..STARTS).map(|_| start_up(make).as_secs_f64() * 1e3).collect())
        };
        let [agent, drop_in, peer] = [time(&agent), time(&drop_in), time(&ssh_agent)];
        let measured = format!("`strongroom agent`; ssh-agent {peer:.1} ms");
        self.row("start to first answer", measured, Some((agent, Wanted::AtMost(5.0), " ms")));
        let measured = "`strongroom ssh-agent`".to_owned();
        self.row("start to first answer", measured, Some((drop_in, Wanted::AtMost(5.0), " ms")));
        let ours = Subject::strongroom(&self.keys, "");
        ours.add(&self.keys, "ed25519");
        // What only adding needed goes when nobody has been connected for a moment.
        thread::sleep(Duration::from_secs(2));
        let (all, own) = ours.memory();
        let measured = format!("{:.1} MiB of it not from the program's file", own / 1024.0);
        self.row("memory after start, one key", measured, Some((all / 1024.0, Wanted::AtMost(8.0), " MiB")));
    }

    /// What each part that is on costs, by turning it off.
    fn costs(&mut self) {
        let with = Subject::strongroom(&self.keys, "");
        let parts = [
            ("the audit log", Subject::strongroom(&self.keys, NO_AUDIT)),
            ("the store", Subject::strongroom_without_store("")),
        ];
        for subject in parts.iter().map(|(_, without)| without).chain([&with]) {
            subject.add(&self.keys, "ed25519");
        }
        let key = self.blob("ed25519");
        for (connections, in_flight) in [(8, 1), (8, 8)] {
            let sample =
                |subject: &Subject| measure(subject, &Load::sign(&subject.socket, &key, connections, in_flight));
            for (part, without) in &parts {
                let (mut ratios, mut cost) = (vec![], vec![]);
                for _ in 0..self.rounds {
                    let (on, off) = (sample(&with), sample(without));
                    ratios.push(on.rate() / off.rate());
                    cost.push(on.cpu_us - off.cpu_us);
                }
                let [ratio, cost] = [ratios, cost].map(median);
                let measured = format!("{ratio:.2} × the rate without it, {cost:+.1} µs of a core each");
                self.row(format!("{part}, {connections} × {in_flight}"), measured, None);
            }
        }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(2, usize::from)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A connection, which waits while the agent's backlog is full.
fn connect(socket: &PathBuf) -> UnixStream {
    let deadline = Instant::now() + support::PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// As many open files as the system allows, for this process and the agents that it starts.
fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
