//! What no honest client sends: an error or a closed connection, never a crash, a hang or growth.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    io::{ErrorKind, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use support::{
    agent::Agent,
    client::{
        ADD_ID_CONSTRAINED, ADD_IDENTITY, CONFIRM, EXTENSION, FAILURE, Key, LOCK, MAX_MESSAGE, REMOVE_IDENTITY,
        REQUEST_IDENTITIES, SIGN_REQUEST, SUCCESS, UNLOCK, frame, identities, lifetime, message, put,
    },
};

const ADD_SMARTCARD_KEY: u8 = 20;
const REMOVE_SMARTCARD_KEY: u8 = 21;
const ADD_SMARTCARD_KEY_CONSTRAINED: u8 = 26;

const MIB: u64 = 1 << 20;

/// Checks that the agent lives and still does its work.
#[track_caller]
fn still_serves(agent: &mut Agent) {
    assert!(agent.is_alive(), "the agent died");
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "after all", &[]);
    client.sign(&key);
    assert_eq!(client.request(&message(REMOVE_IDENTITY, &[&key.blob()])), [SUCCESS]);
}

#[test]
fn a_frame_that_ends_early_closes_its_connection() {
    let mut agent = Agent::start();
    for cut in [&[0][..], &[0, 0, 0], &[0, 0, 0, 100], &[0, 0, 0, 100, 11, 1, 2]] {
        let mut client = agent.connect();
        client.stream.write_all(cut).unwrap();
        client.stream.shutdown(Shutdown::Write).unwrap();
        assert!(client.is_closed(), "{cut:?}");
    }
    still_serves(&mut agent);
}

#[test]
fn a_frame_has_one_byte_at_least() {
    let mut agent = Agent::start();
    let mut client = agent.connect();
    // The byte behind it belongs to a next frame that never gets its turn.
    client.stream.write_all(&[0; 5]).unwrap();
    assert!(client.is_closed());
    still_serves(&mut agent);
}

#[test]
fn a_frame_has_262144_bytes_at_most() {
    let mut agent = Agent::start();
    let mut client = agent.connect();
    // A valid message of the greatest size: what follows a sign request is ignored.
    let key = Key::random();
    client.add(&key, "", &[]);
    let mut largest = key.sign_message(b"data");
    largest.resize(MAX_MESSAGE, 0);
    assert!(key.signed(b"data", &client.request(&largest)));

    for len in [MAX_MESSAGE as u32 + 1, u32::MAX, 1 << 31] {
        let mut client = agent.connect();
        client.stream.write_all(&[&len.to_be_bytes()[..], &[SIGN_REQUEST]].concat()).unwrap();
        assert!(client.is_closed(), "{len}");
    }
    assert_eq!(client.list().len(), 1, "the other connection goes on");
    still_serves(&mut agent);
}

#[test]
fn an_unknown_type_is_refused_and_the_connection_stays() {
    let agent = Agent::start();
    let mut client = agent.connect();
    // 1 is the request for identities of a protocol long gone; 12 and 14 are replies.
    for kind in [0, 1, 2, 5, 6, 12, 14, 16, 24, 28, 29, 30, 127, 200, 255] {
        assert_eq!(client.request(&[kind]), [FAILURE], "type {kind}");
        assert_eq!(client.request(&[kind, 1, 2, 3]), [FAILURE], "type {kind}");
    }
    assert!(client.list().is_empty());
}

#[test]
fn a_body_that_ends_early_is_refused_and_the_connection_stays() {
    let mut agent = Agent::start();
    let mut client = agent.connect();
    let key = Key::random();
    let bodies = [
        key.sign_message(b"data"),
        key.add_message(b"comment", &[]),
        key.add_message(b"comment", &lifetime(60)),
        message(REMOVE_IDENTITY, &[&key.blob()]),
        message(ADD_SMARTCARD_KEY, &[b"/usr/lib/none.so", b"1234"]),
        message(REMOVE_SMARTCARD_KEY, &[b"/usr/lib/none.so", b"1234"]),
        message(ADD_SMARTCARD_KEY_CONSTRAINED, &[b"/usr/lib/none.so", b"1234"]),
    ];
    for body in &bodies {
        for cut in 1..body.len() {
            let reply = client.request(&body[..cut]);
            // Without its last field an addition under a lifetime is one without.
            let whole = body[0] == ADD_ID_CONSTRAINED && cut == body.len() - 5;
            assert_eq!(reply, [if whole { SUCCESS } else { FAILURE }], "type {} cut at {cut}", body[0]);
        }
    }
    still_serves(&mut agent);
}

#[test]
fn a_malformed_lock_is_refused() {
    let mut agent = Agent::start();
    for kind in [LOCK, UNLOCK] {
        for rest in [&[][..], &[0, 0], &[0, 0, 0, 9, b'a'], &[0xff; 4], &[0xff; 40]] {
            let mut client = agent.connect();
            assert_eq!(client.request(&[&[kind], rest].concat()), [FAILURE], "type {kind}, {rest:?}");
        }
    }
    still_serves(&mut agent);
}

#[test]
fn lengths_that_point_nowhere_are_refused() {
    let mut agent = Agent::start();
    let before = agent.resident();
    let mut client = agent.connect();
    let kinds = [
        SIGN_REQUEST,
        ADD_IDENTITY,
        REMOVE_IDENTITY,
        ADD_SMARTCARD_KEY,
        REMOVE_SMARTCARD_KEY,
        LOCK,
        UNLOCK,
        ADD_ID_CONSTRAINED,
        ADD_SMARTCARD_KEY_CONSTRAINED,
        EXTENSION,
    ];
    for kind in kinds {
        let mut body = vec![kind];
        body.extend([0xff; 64]);
        assert_eq!(client.request(&body), [FAILURE], "type {kind}");
    }
    // The count deeper inside: a constraint, a certificate list, a destination.
    let key = Key::random();
    for name in ["restrict-destination-v00@openssh.com", "associated-certs-v00@openssh.com"] {
        let mut constraint = vec![255];
        put(&mut constraint, name.as_bytes());
        constraint.extend([0xff; 64]);
        assert_eq!(client.request(&key.add_message(b"", &constraint)), [FAILURE], "{name}");
    }
    let mut blob = Vec::new();
    put(&mut blob, b"ssh-rsa-cert-v01@openssh.com");
    blob.extend([0xff; 64]);
    assert_eq!(client.request(&message(SIGN_REQUEST, &[&blob, b"data", b""])), [FAILURE]);
    assert_eq!(client.request(&message(REMOVE_IDENTITY, &[&blob])), [FAILURE]);
    assert!(agent.resident() < before + 16 * MIB);
    still_serves(&mut agent);
}

#[test]
fn a_constraint_that_is_unknown_or_twice_there_refuses_the_key() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let mut extension = vec![255];
    put(&mut extension, b"nobody-knows@example.org");
    put(&mut extension, b"");
    let mut sk_provider = vec![255];
    put(&mut sk_provider, b"sk-provider@openssh.com");
    put(&mut sk_provider, b"internal");
    let refused = [
        ("an unknown type", vec![4]),
        ("maxsign, which no agent enforces", vec![3, 0, 0, 0, 1]),
        ("type 0", vec![0]),
        ("an unknown extension", extension),
        ("a provider for a key that is not sk", sk_provider),
        ("confirm twice", CONFIRM.repeat(2)),
        ("a lifetime twice", lifetime(60).repeat(2)),
        ("an unknown type behind a good one", [&lifetime(60)[..], &[77]].concat()),
        ("a lifetime cut short", vec![1, 0, 0]),
        ("an extension without a name", vec![255]),
    ];
    for (what, constraints) in &refused {
        assert_eq!(client.request(&Key::random().add_message(b"no", constraints)), [FAILURE], "{what}");
    }
    // The message that adds without constraints takes them all the same, and is as strict.
    let mut plain = Key::random().add_message(b"no", &[]);
    plain.push(77);
    assert_eq!(client.request(&plain), [FAILURE]);
    assert!(client.list().is_empty());
}

#[test]
fn a_comment_is_bytes_without_nul() {
    let agent = Agent::start();
    let mut client = agent.connect();
    assert_eq!(client.request(&Key::random().add_message(b"a\0b", &[])), [FAILURE]);
    assert!(client.list().is_empty());

    let bytes = b"caf\xe9 \xff\xfe";
    assert_eq!(client.request(&Key::random().add_message(bytes, &[])), [SUCCESS]);
    assert_eq!(client.list()[0].1, bytes);
}

#[test]
fn a_key_whose_halves_do_not_fit_is_refused() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let (one, other) = (Key::random(), Key::random());
    let public = |key: &Key| key.blob()[19..].to_vec();
    let private = |seed: &Key, public_of: &Key| [&seed.seed()[..], &public(public_of)].concat();
    for (named, secret) in [(&one, private(&other, &other)), (&one, private(&one, &other)), (&one, vec![7; 63])] {
        let body = message(ADD_IDENTITY, &[b"ssh-ed25519", &public(named), &secret, b"no"]);
        assert_eq!(client.request(&body), [FAILURE]);
    }
    assert!(client.list().is_empty());
}

#[test]
fn bytes_behind_a_sign_request_are_ignored() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let key = Key::random();
    client.add(&key, "", &[]);
    let mut body = key.sign_message(b"data");
    body.extend(b"what is this?");
    assert!(key.signed(b"data", &client.request(&body)));
    // But the flags are not optional.
    assert_eq!(client.request(&message(SIGN_REQUEST, &[&key.blob(), b"data"])), [FAILURE]);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let key = Key::random();
    let (first, second) = (b"first".as_slice(), b"second".as_slice());
    let stream = [
        vec![REQUEST_IDENTITIES],
        key.add_message(b"pipelined", &[]),
        vec![REQUEST_IDENTITIES],
        key.sign_message(first),
        vec![200],
        key.sign_message(second),
        message(REMOVE_IDENTITY, &[&key.blob()]),
        key.sign_message(first),
        vec![REQUEST_IDENTITIES],
    ];
    client.stream.write_all(&stream.map(|body| frame(&body)).concat()).unwrap();
    let mut reply = || client.receive().unwrap();
    assert!(identities(&reply()).is_empty());
    assert_eq!(reply(), [SUCCESS]);
    assert_eq!(identities(&reply()).len(), 1);
    assert!(key.signed(first, &reply()));
    assert_eq!(reply(), [FAILURE]);
    assert!(key.signed(second, &reply()));
    assert_eq!(reply(), [SUCCESS]);
    assert_eq!(reply(), [FAILURE]);
    assert!(identities(&reply()).is_empty());
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let key = Key::random();
    for body in [key.add_message(b"in pieces", &[]), key.sign_message(b"data")] {
        for byte in frame(&body) {
            client.stream.write_all(&[byte]).unwrap();
        }
    }
    assert_eq!(client.receive().unwrap(), [SUCCESS]);
    assert!(key.signed(b"data", &client.receive().unwrap()));
}

#[test]
fn a_flood_of_bad_frames_does_not_grow_memory() {
    let mut agent = Agent::start();
    let mut junk = message(SIGN_REQUEST, &[&[0xff; 1000], &vec![0xff; 100_000]]);
    junk.extend([0xff; 100_000]);
    let mut flood = |rounds: u32| {
        for round in 0..rounds {
            let mut client = agent.connect();
            for kind in [ADD_IDENTITY, SIGN_REQUEST, EXTENSION, 99] {
                junk[0] = kind;
                assert_eq!(client.request(&junk), [FAILURE], "type {kind}");
            }
            client.stream.write_all(&[0xff; 5]).unwrap();
            assert!(client.is_closed(), "round {round}");
        }
    };
    flood(20);
    let before = agent.resident();
    flood(200);
    let after = agent.resident();
    assert!(after < before + 8 * MIB, "{before} bytes have become {after}");
    still_serves(&mut agent);
}

#[test]
fn a_promised_length_costs_nothing_until_it_comes() {
    let mut agent = Agent::start();
    let before = agent.resident();
    let clients: Vec<_> = (0..500)
        .map(|_| {
            let mut client = agent.connect();
            client.stream.write_all(&(MAX_MESSAGE as u32).to_be_bytes()).unwrap();
            client.stream.write_all(&[SIGN_REQUEST]).unwrap();
            client
        })
        .collect();
    still_serves(&mut agent);
    let after = agent.resident();
    assert!(after < before + 32 * MIB, "{before} bytes have become {after}");
    drop(clients);
}

#[test]
fn a_client_that_never_reads_costs_little_and_stops_nobody() {
    let mut agent = Agent::start();
    let mut other = agent.connect();
    let keys: Vec<_> = (0..100).map(|_| Key::random()).collect();
    keys.iter().for_each(|key| other.add(key, "one of a hundred", &[]));

    let before = agent.resident();
    let deaf = agent.connect();
    deaf.stream.set_nonblocking(true).unwrap();
    let requests = frame(&[REQUEST_IDENTITIES]).repeat(1000);
    let mut sent = 0;
    // Writes until the agent has stopped reading: a second without room is taken for that.
    while is_writable(&deaf.stream) {
        match (&deaf.stream).write(&requests[sent % 5..]) {
            Ok(n) => sent += n,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        let now = agent.resident();
        assert!(now < before + 32 * MIB, "{sent} bytes of requests made {before} bytes of memory {now}");
    }
    other.sign(&keys[50]);
    assert_eq!(other.list().len(), 100);
    still_serves(&mut agent);
}

/// Whether `stream` takes bytes within a second.
fn is_writable(stream: &UnixStream) -> bool {
    let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&timeout)).unwrap() > 0
}

#[test]
fn ten_thousand_connections_at_once() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let room = limit.maximum.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let count = 10_000.min(room.saturating_sub(500));

    let mut agent = Agent::start();
    let before = agent.resident();
    let mut clients: Vec<_> = (0..count).map(|_| agent.connect()).collect();
    for client in clients.iter_mut().step_by(100) {
        assert!(client.list().is_empty());
    }
    still_serves(&mut agent);
    let each = agent.resident().saturating_sub(before) / count as u64;
    assert!(each < 16 * 1024, "{each} bytes for each connection");
    drop(clients);
    still_serves(&mut agent);
}
