//! How much of what a PKCS#11 module can do reaches the clients? Signatures with keys on SoftHSM: two threads that call
//! C_Sign and do nothing else, the daemon with eight connections, with as many sessions as are its default and with eight, and
//! OpenSSH's ssh-agent with its pkcs11 helper, also with eight connections.
//!
//! Method. Each agent has its turn between two of the bare loop, which is what it is compared with: a machine that is
//! shared is not the same from one second to the next. Figures are medians over the rounds. The connections are one
//! program's, which waits for all of them in one epoll set, and shares the cores with the agents. Messages have 600 bytes;
//! RSA signs with SHA-256, and one request of each connection is under way at a time.
//!
//! `cargo bench --profile bench-scripted --bench pkcs11 [-- ROUNDS]`, best on a machine that does nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    mechanism::Mechanism,
    object::{Attribute, ObjectClass},
    session::{Session, UserType},
};
use rustix::{
    buffer::spare_capacity,
    event::epoll::{self, CreateFlags, EventData, EventFlags},
};
use strongroom::devices::pkcs11::default_sessions;
use support::{
    agent::Agent,
    askpass::answering,
    client::{Client, SIGN_REQUEST, SIGN_RESPONSE, frame, message},
    daemon::Home,
    eventually, run,
    softhsm::{MODULE, PIN, SoftHsm},
};

const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(500);
const CONNECTIONS: usize = 8;
const THREADS: usize = 2;
const MESSAGE: [u8; 600] = [0x5a; 600];
/// A key's type for pkcs11-tool, its name, its mechanism, and how many bytes that signs: a digest, for RSA inside a
/// DigestInfo.
type Kind = (&'static str, &'static str, fn() -> Mechanism<'static>, usize);
const KEYS: [Kind; 2] =
    [("rsa:2048", "RSA-2048", || Mechanism::RsaPkcs, 51), ("EC:prime256v1", "P-256", || Mechanism::Ecdsa, 32)];

fn main() {
    // Cargo adds `--bench`.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(ROUNDS);
    let hsm = SoftHsm::with_token("bench");
    for (n, (key_type, name, ..)) in KEYS.iter().enumerate() {
        hsm.generate("bench", key_type, &format!("0{}", n + 1), name, &[]);
    }
    let raw = Raw::open(&hsm);
    let homes = ["", "sessions = 8"].map(|sessions| {
        let mut home = Home::new();
        home.configure(&hsm.device("hsm", "bench", &format!("probe = \"1h\"\n{sessions}")));
        home
    });
    let _daemons = homes.each_ref().map(Home::start);
    let doors = homes.each_ref().map(|home| home.path("agent"));
    let agent = Agent::start_with(|agent| {
        agent.env("SOFTHSM2_CONF", hsm.conf());
    });
    let mut add = agent.command("ssh-add");
    answering(&mut add, agent.dir(), PIN);
    run(add.args(["-q", "-s", MODULE])).ok();
    for (n, (_, name, mechanism, len)) in KEYS.into_iter().enumerate() {
        let (mut own, mut rates, mut parts) = (Vec::new(), [const { Vec::new() }; 3], [const { Vec::new() }; 3]);
        let blobs = doors.each_ref().map(|door| blob(door, name));
        let agents = [(&*doors[0], &blobs[0]), (&*doors[1], &blobs[1]), (agent.socket(), &blobs[0])];
        let mut before = raw.rate(n, mechanism, len);
        for _ in 0..rounds {
            for (at, (socket, blob)) in agents.into_iter().enumerate() {
                let rate = rate(socket, blob);
                let after = raw.rate(n, mechanism, len);
                rates[at].push(rate);
                parts[at].push(100.0 * rate / f64::midpoint(before, after));
                own.push(after);
                before = after;
            }
        }
        let ([daemon, wider, peer], parts, own) = (rates.map(median), parts.map(median), median(own));
        println!(
            "{name}: C_Sign {own:.0}/s; daemon with {} sessions {daemon:.0}/s ({:.1} %), with eight {wider:.0}/s ({:.1} %); ssh-agent \
             {peer:.0}/s ({:.1} %)",
            default_sessions(),
            parts[0],
            parts[1],
            parts[2]
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The blob of the listed key with this comment.
fn blob(socket: &Path, comment: &str) -> Vec<u8> {
    let mut found = None;
    eventually("the key is listed", || {
        let keys = Client::connect(socket).list();
        found = keys.into_iter().find(|(_, c)| c == comment.as_bytes()).map(|(blob, _)| blob);
        found.is_some()
    });
    found.unwrap()
}

/// Signatures a second over all connections.
fn rate(socket: &Path, blob: &[u8]) -> f64 {
    let mut request = message(SIGN_REQUEST, &[blob, &MESSAGE]);
    // SSH_AGENT_RSA_SHA2_256: other keys take no notice.
    request.extend([0, 0, 0, 2]);
    let request = frame(&request);
    let set = epoll::create(CreateFlags::CLOEXEC).unwrap();
    let mut clients: Vec<_> = (0..CONNECTIONS).map(|_| UnixStream::connect(socket).unwrap()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        epoll::add(&set, &*client, EventData::new_u64(n as u64), EventFlags::IN).unwrap();
        // Once before it counts: a login, a handle, a warm cache.
        client.write_all(&request).unwrap();
        assert_is_signature(client);
        client.write_all(&request).unwrap();
    }
    let (start, mut count, mut events) = (Instant::now(), 0u32, Vec::with_capacity(CONNECTIONS));
    while start.elapsed() < ROUND {
        events.clear();
        epoll::wait(&set, spare_capacity(&mut events), None).unwrap();
        for event in &events {
            let client = &mut clients[usize::try_from(event.data.u64()).unwrap()];
            assert_is_signature(client);
            client.write_all(&request).unwrap();
            count += 1;
        }
    }
    f64::from(count) / start.elapsed().as_secs_f64()
}

/// Reads a reply: they come in one piece, and have far less than a kilobyte.
fn assert_is_signature(client: &mut UnixStream) {
    let mut reply = [0; 1024];
    let len = client.read(&mut reply).unwrap();
    assert!(len > 5 && reply[..4] == u32::try_from(len - 4).unwrap().to_be_bytes() && reply[4] == SIGN_RESPONSE);
}

/// How often a second `threads` do what `prepare` gives each, all together.
fn side_by_side<F: FnMut()>(threads: usize, prepare: impl Fn(usize) -> F + Sync) -> f64 {
    let (ready, over, count) = (Barrier::new(threads + 1), AtomicBool::new(false), AtomicU64::new(0));
    let mut elapsed = Duration::ZERO;
    thread::scope(|scope| {
        for n in 0..threads {
            let (ready, over, count, prepare) = (&ready, &over, &count, &prepare);
            scope.spawn(move || {
                let mut act = prepare(n);
                // Once before it counts: a login, a handle, a warm cache.
                act();
                ready.wait();
                let mut done = 0;
                while !over.load(Ordering::Relaxed) {
                    act();
                    done += 1;
                }
                count.fetch_add(done, Ordering::Relaxed);
            });
        }
        ready.wait();
        let start = Instant::now();
        thread::sleep(ROUND);
        over.store(true, Ordering::Relaxed);
        elapsed = start.elapsed();
    });
    count.into_inner() as f64 / elapsed.as_secs_f64()
}

/// The module in this process.
struct Raw {
    context: Pkcs11,
    slot: cryptoki::slot::Slot,
    _login: Session,
}

impl Raw {
    fn open(hsm: &SoftHsm) -> Self {
        // SAFETY: nothing else runs in this process yet.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("SOFTHSM2_CONF", hsm.conf());
            std::env::set_var("STRONGROOM_TEST_AGENT", "/usr/bin/ssh-agent");
        }
        let context = Pkcs11::new(MODULE).unwrap();
        context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
        let slot = context.get_slots_with_initialized_token().unwrap()[0];
        let login = context.open_ro_session(slot).unwrap();
        login.login(UserType::User, Some(&PIN.into())).unwrap();
        Self { context, slot, _login: login }
    }

    /// C_Sign's a second, over all threads.
    fn rate(&self, key: usize, mechanism: fn() -> Mechanism<'static>, len: usize) -> f64 {
        let template =
            [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Id(vec![u8::try_from(key + 1).unwrap()])];
        let (context, slot) = (&self.context, self.slot);
        side_by_side(THREADS, |_| {
            let (session, mechanism) = (context.open_ro_session(slot).unwrap(), mechanism());
            let key = session.find_objects(&template).unwrap()[0];
            move || drop(session.sign(&mechanism, key, &MESSAGE[..len]).unwrap())
        })
    }
}
