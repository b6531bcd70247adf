//! Tickets against the built daemon: thousands in flight on one connection, their limits, the rules of `collect`, and
//! clients that never collect, never read or hang up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    collections::HashMap,
    fs,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use strongroom::{
    agent::message::{Cancelled, Code, DeviceEntry, Name, Page, RefusalEntry, Request},
    devices::{Hash, Input, Scheme, Signature, verify::verify},
    public_key::Curve,
};
use support::{
    PATIENCE,
    client::{Client, EXTENSION, FAILURE, Key, REQUEST_IDENTITIES, frame, message, random},
    daemon::{Daemon, Home},
    eventually,
    service::{collect, first_page, frame_of, sign, sign_digest, ssh, submit, use_key, why},
};

/// A P-256 key on a device that does what the rules say.
fn token(rules: &str) -> String {
    format!("lanes = 4\ncontrol = CONTROL\n[[key]]\nslot = \"p\"\ntype = \"p256\"\nlabel = \"p256\"\n{rules}")
}

/// With a second key, whose signatures do this. Which of two calls comes to a rule first, lanes decide.
fn token_and_slow(action: &str) -> String {
    token(&format!(
        "[[key]]\nslot = \"s\"\ntype = \"p256\"\nseed = 1\nlabel = \"slow\"\n[[rule]]\non = \"sign\"\nslot = \"s\"\ndo = {action}"
    ))
}

const HANG: &str = "[[rule]]\non = \"sign\"\ndo = \"hang\"";
/// A queue and times in which nothing is refused or late.
const ROOMY: &str = "queue = 65536\ntimeout = \"1h\"";

/// Looks at the only device.
fn device<T>(daemon: &Daemon<'_>, look: impl FnOnce(&DeviceEntry<'_>) -> T) -> T {
    let reply = daemon.connect_service().ask(&Request::Devices(first_page(0)));
    look(&reply.ok::<Page<DeviceEntry<'_>>>().entries[0])
}

fn verifies(blob: &[u8], digest: &[u8], signature: &[u8]) -> bool {
    let signature = Signature::Ecdsa(Curve::P256, signature.to_vec());
    verify(blob, Scheme::Ecdsa(Hash::Sha256), &Input::Digest(digest.into()), &signature)
}

/// A number that no two tickets share and that is not in their order.
fn id(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn digest(n: u64) -> [u8; 32] {
    let mut digest = [0x5a; 32];
    digest[..8].copy_from_slice(&n.to_be_bytes());
    digest
}

/// Sends `count` submits in one go while the replies are read, and checks that all are accepted.
fn submit_all(client: &mut Client, key: &[u8], count: u64) {
    let mut frames = Vec::new();
    for n in 0..count {
        frames.extend(frame_of(&submit(id(n), sign_digest(key, &digest(n)), 0)));
    }
    let mut writer = client.socket();
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&frames).unwrap());
        for _ in 0..count {
            client.hear(Name::Submit).ok::<()>();
        }
    });
}

#[test]
fn ten_thousand_digests_are_signed_and_each_signature_verifies() {
    const COUNT: u64 = 10_000;
    let mut home = Home::new();
    home.device("a", &token(""), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    submit_all(&mut client, &key, COUNT);
    eventually("all are done", || device(&daemon, |device| device.done) == COUNT);

    let mut digests: HashMap<u64, [u8; 32]> = (0..COUNT).map(|n| (id(n), digest(n))).collect();
    let mut more = true;
    while more {
        let reply = client.ask(&collect(PATIENCE, 0));
        assert!(reply.body.len() <= 256 * 1024, "a reply of {} bytes", reply.body.len());
        let collected: strongroom::agent::message::Collected = reply.ok();
        more = collected.more;
        assert!(!collected.finished.is_empty());
        for finished in collected.finished {
            let digest = digests.remove(&finished.id).expect("a ticket of ours, once");
            assert!(verifies(&key, &digest, &finished.reply.unwrap()), "ticket {}", finished.id);
        }
    }
    assert!(digests.is_empty(), "{} are missing", digests.len());
    assert!(client.collect(Duration::ZERO, 0).finished.is_empty());
}

#[test]
fn tickets_come_as_they_finish_and_no_more_than_asked_for() {
    let mut home = Home::new();
    home.device("a", &token_and_slow("{ sleep_ms = 4000 }"), ROOMY);
    let daemon = home.start();
    let (key, slow) = (daemon.blob("p256"), daemon.blob("slow"));
    let key = |n| if n == 1 { &slow } else { &key };
    let mut client = daemon.connect_service();
    for n in 1..=5 {
        client.submit(n, sign_digest(key(n), &digest(n)), 0);
        if n == 1 {
            eventually("the slow one has begun", || device(&daemon, |device| device.running) == 1);
        }
    }
    eventually("the quick ones are done", || device(&daemon, |device| device.done) >= 4);
    let two = client.collect(PATIENCE, 2);
    assert_eq!((two.finished.len(), two.more), (2, true));
    let rest = client.collect_all(3);
    let order: Vec<u64> = two.finished.iter().chain(&rest).map(|finished| finished.id).collect();
    assert_eq!(order[4], 1, "the slow one comes last: {order:?}");
    for finished in two.finished.iter().chain(&rest) {
        assert!(verifies(key(finished.id), &digest(finished.id), finished.reply.as_ref().unwrap()));
    }
}

#[test]
fn an_id_is_taken_until_its_ticket_is_collected_or_cancelled() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &[]);
    let mut client = daemon.connect_service();
    client.submit(7, sign_digest(&key, &digest(7)), 0);
    assert_eq!(client.ask(&submit(7, ssh(&soft.blob(), b"data"), 0)).code(), Code::BadRequest);
    daemon.connect_service().submit(7, ssh(&soft.blob(), b"another connection's"), 0);
    assert_eq!(client.ask(&Request::Cancel(7)).ok::<Cancelled>(), Cancelled::Abandoned);
    client.submit(7, ssh(&soft.blob(), b"data"), 0);
    assert_eq!(client.ask(&submit(7, ssh(&soft.blob(), b"data"), 0)).code(), Code::BadRequest, "finished, and there");
    assert_eq!(client.collect_all(1)[0].id, 7);
    client.submit(7, ssh(&soft.blob(), b"data"), 0);
    assert_eq!(client.ask(&Request::Cancel(7)).ok::<Cancelled>(), Cancelled::Finished);
    assert_eq!(client.ask(&Request::Cancel(7)).ok::<Cancelled>(), Cancelled::Unknown);
    assert!(client.collect(Duration::ZERO, 0).finished.is_empty());
}

/// Sends `last` while a `collect` waits for an hour, and returns what it then collected, with the last reply's body.
fn interrupt(client: &mut Client, last: &[u8]) -> (usize, Vec<u8>) {
    client.tell(&collect(Duration::from_secs(3600), 0));
    client.stream.write_all(last).unwrap();
    let collected = client.hear(Name::Collect).ok::<strongroom::agent::message::Collected>();
    (collected.finished.len(), client.receive().unwrap())
}

#[test]
fn the_next_frame_ends_a_collect_whatever_it_is() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    client.submit(1, sign_digest(&key, &digest(1)), 0);
    let began = Instant::now();
    // More than the daemon reads at once, so that the frame's beginning waits for its end.
    let long = message(EXTENSION, &[b"nobody-knows@example.org", &[0; 200_000]]);
    for (last, reply) in [
        (frame(&[REQUEST_IDENTITIES]), None),
        (frame(&message(EXTENSION, &[b"nobody-knows@example.org"])), Some(vec![FAILURE])),
        (frame(&long), Some(vec![FAILURE])),
        (frame(&[99]), Some(vec![FAILURE])),
        (frame_of(&collect(Duration::ZERO, 0)), None),
        (frame_of(&submit(2, sign_digest(&key, &digest(2)), 0)), None),
        (frame_of(&Request::Cancel(2)), None),
        (frame_of(&why()), None),
    ] {
        let (finished, answer) = interrupt(&mut client, &last);
        assert_eq!(finished, 0);
        assert!(reply.is_none_or(|reply| reply == answer), "{answer:?}");
    }
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn a_collect_with_a_frame_right_behind_it_still_collects() {
    let home = Home::new();
    let daemon = home.start();
    // Not as quick as others: it is signed with on another thread.
    let key = support::keygen(&home.path(""), "rsa", &["-t", "rsa", "-b", "2048"]);
    daemon.ssh_add(&["-q", key.to_str().unwrap()]).ok();
    let key = daemon.blob("rsa");
    let mut client = daemon.connect_service();
    client.submit(1, ssh(&key, b"data"), 0);
    let both = [frame_of(&collect(Duration::ZERO, 0)), frame_of(&why())].concat();
    let deadline = Instant::now() + PATIENCE;
    loop {
        client.stream.write_all(&both).unwrap();
        let collected = client.hear(Name::Collect).ok::<strongroom::agent::message::Collected>();
        client.hear(Name::Why).ok::<Vec<RefusalEntry<'_>>>();
        if !collected.finished.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "never collected");
    }
}

#[test]
fn a_collect_waits_as_long_as_it_says() {
    let mut home = Home::new();
    home.device("a", &token("[[rule]]\non = \"sign\"\ndo = { sleep_ms = 300 }"), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    let began = Instant::now();
    assert!(client.collect(Duration::from_millis(150), 0).finished.is_empty());
    assert!(began.elapsed() >= Duration::from_millis(150));
    client.submit(1, sign_digest(&key, &digest(1)), 0);
    let began = Instant::now();
    let collected = client.collect(Duration::from_secs(3600), 0);
    assert_eq!((collected.finished.len(), collected.more), (1, false));
    assert!(began.elapsed() < PATIENCE);
}

#[test]
fn a_dead_device_costs_each_ticket_its_own_time_only() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    for n in 0..1000 {
        client.submit(n, sign_digest(&key, &digest(n)), 200 + n % 100);
    }
    for finished in client.collect_all(1000) {
        assert_eq!(finished.reply.unwrap_err().code, Code::Timeout);
    }
    let counted = device(&daemon, |device| (device.waiting, device.done));
    assert_eq!(counted, (0, 0), "nothing of them waits any more");
}

#[test]
fn who_submits_more_than_it_collects_is_refused_and_costs_nobody_else() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &[]);
    let before = resident(&daemon);

    let mut many = daemon.connect_service();
    submit_all(&mut many, &key, 16_384);
    let refused = many.ask(&submit(1 << 63, ssh(&soft.blob(), b"data"), 0)).failure();
    assert_eq!(refused.code, Code::Busy);
    assert!(refused.retry_after_ms > 0);

    let data = vec![7; 250_000];
    let large = |client: &mut Client| {
        let accepted = |n: &u64| {
            let reply = client.ask(&submit(*n, sign(&key, Scheme::Ecdsa(Hash::Sha256), &data), 0));
            match reply.read::<()>() {
                Ok(()) => true,
                Err(failure) if failure.code == Code::Busy && failure.retry_after_ms > 0 => false,
                Err(failure) => panic!("{failure:?}"),
            }
        };
        (0..).take_while(accepted).count()
    };
    let mut clients: Vec<_> = (0..4).map(|_| daemon.connect_service()).collect();
    let accepted: Vec<_> = clients.iter_mut().map(large).collect();
    let most = (16 << 20) / 250_000;
    assert!(accepted[..3].iter().all(|n| (most - 1..=most).contains(n)), "16 MiB each: {accepted:?}");
    let total = accepted.iter().sum::<usize>() * 250_000 + 16_384 * 800;
    assert!(accepted[3] < most && total <= 64 << 20, "64 MiB for all: {accepted:?}");

    let mut other = daemon.connect();
    let began = Instant::now();
    other.sign(&soft);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let grown = resident(&daemon).saturating_sub(before);
    assert!(grown < 512 << 20, "{grown} bytes for 64 MiB of tickets");

    // What one connection leaves, another may have; collected or cancelled, a ticket makes room for the next.
    drop(clients.remove(0));
    let mut next = daemon.connect_service();
    eventually("room", || next.ask(&submit(1, sign(&key, Scheme::Ecdsa(Hash::Sha256), &data), 0)).read::<()>().is_ok());
    many.ask(&Request::Cancel(id(3))).ok::<Cancelled>();
    many.submit(1 << 63, ssh(&soft.blob(), b"data"), 0);
    assert_eq!(many.collect_all(1)[0].id, 1 << 63);
    drop((many, clients, next));
    eventually("hung up, their work is dropped", || device(&daemon, |device| device.waiting) == 0);
}

fn resident(daemon: &Daemon<'_>) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn cancelling_for_ever_keeps_no_memory() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    // What waits for the audit log's disk is bounded too, and more than what is looked for here.
    home.configure("[audit]\nenabled = false");
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    let mut round = |count: usize| {
        let pair = [frame_of(&submit(1, sign_digest(&key, &digest(1)), 0)), frame_of(&Request::Cancel(1))].concat();
        let mut writer = client.socket();
        thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..count {
                    writer.write_all(&pair).unwrap();
                }
            });
            for _ in 0..count {
                client.hear(Name::Submit).ok::<()>();
                client.hear(Name::Cancel).ok::<Cancelled>();
            }
        });
    };
    round(2_000);
    let before = resident(&daemon);
    round(40_000);
    let grown = resident(&daemon).saturating_sub(before);
    assert!(grown < 6 << 20, "{grown} bytes more after 40,000 cancelled tickets");
}

#[test]
fn who_never_reads_is_bounded_and_hurts_nobody() {
    let home = Home::new();
    let daemon = home.start();
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &[]);
    let before = resident(&daemon);
    let mut deaf = daemon.connect_service();
    // When nothing was taken for so long, nothing will be.
    deaf.stream.set_write_timeout(Some(Duration::from_secs(3))).unwrap();
    let frames = frame_of(&use_key(ssh(&soft.blob(), &[1; 1000]), 0)).repeat(100);
    let mut sent = 0;
    while let Ok(n) = deaf.stream.write(&frames) {
        sent += n;
        assert!(sent < 1 << 30, "it takes whatever a client sends that never reads");
    }
    let grown = resident(&daemon).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes for a client that never reads");
    let mut other = daemon.connect();
    let began = Instant::now();
    other.sign(&soft);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn uses_overlap_and_answers_keep_their_order() {
    let mut home = Home::new();
    home.device("a", &token_and_slow("\"hang\""), ROOMY);
    let daemon = home.start();
    let (key, slow) = (daemon.blob("p256"), daemon.blob("slow"));
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &[]);
    let mut client = daemon.connect_service();
    client.tell(&use_key(sign_digest(&slow, &digest(1)), 3000));
    eventually("the first has begun", || device(&daemon, |device| device.running) == 1);
    client.tell(&use_key(sign_digest(&key, &digest(2)), 0));
    client.send(&soft.sign_message(b"plain"));
    client.tell(&submit(9, ssh(&soft.blob(), b"data"), 0));
    client.tell(&why());
    client.tell(&use_key(sign_digest(&key, &digest(3)), 0));
    eventually("the second is done beside the first", || {
        device(&daemon, |device| (device.running, device.done)) == (1, 1)
    });
    assert_eq!(client.hear(Name::Sign).code(), Code::Timeout);
    assert!(verifies(&key, &digest(2), &client.hear(Name::Sign).bytes()));
    assert!(soft.signed(b"plain", &client.receive().unwrap()));
    client.hear(Name::Submit).ok::<()>();
    // It was held back, so it knows of the first.
    let reply = client.hear(Name::Why);
    let refusals: Vec<RefusalEntry<'_>> = reply.ok();
    assert_eq!(refusals.iter().map(|refusal| refusal.code).collect::<Vec<_>>(), [Code::Timeout]);
    // Whether the device takes new work before the hanging lane's process is ended is its own affair.
    client.hear(Name::Sign);
    assert_eq!(client.collect_all(1)[0].id, 9);
}

#[test]
fn hanging_up_takes_back_what_was_submitted() {
    let mut home = Home::new();
    home.device("a", &token(HANG), ROOMY);
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    submit_all(&mut client, &key, 100);
    eventually("all are there", || device(&daemon, |device| (device.running, device.waiting)) == (4, 96));
    client.tell(&use_key(sign_digest(&key, &random()), 0));
    drop(client);
    eventually("nothing waits", || device(&daemon, |device| device.waiting) == 0);
}
