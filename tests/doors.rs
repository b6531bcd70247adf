//! Doors that several users share, against the built daemon: each uid gets the keys and operations that are configured for
//! it, in every message. Root plays the other users.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, path::PathBuf};

use rustix::process::Signal;
use strongroom::{
    agent::message::{Code, DeviceEntry, KeyEntry, Page, RefusalEntry, Request, Target, compatible},
    devices::{DeriveScheme, Hash, Scheme},
    public_key::{FingerprintHash, PublicKey, fingerprint},
};
use support::{
    client::{Client, EXTENSION_FAILURE, FAILURE, LOCK, SIGN_RESPONSE, message},
    daemon::{Daemon, Home},
    eventually,
    service::{Bytes, compatible, derive, first_page, sign, sign_digest, ssh, unlock, use_key, why},
};

const TOKEN: &str = r#"
control = CONTROL
[[key]]
slot = "a"
type = "p256"
seed = 1
label = "a"
[[key]]
slot = "b"
type = "p256"
seed = 2
label = "b"
"#;
const OTHER: &str = r#"
control = CONTROL
[[key]]
slot = "c"
type = "p256"
seed = 3
label = "c"
"#;
const DATA: &[u8] = b"what is signed";

/// Uids that nobody has.
const SIGNER: u32 = 4_000_001;
const DERIVER: u32 = 4_000_002;
const PLAIN: u32 = 4_000_003;
const STRANGER: u32 = 4_000_004;

/// Whether other users can be played; says so where not.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not root: no other user can be played");
    }
    root
}

/// The blobs of the keys `a`, `b` and `c`, which follow from their seeds.
fn keys(daemon: &Daemon<'_>) -> [Vec<u8>; 3] {
    let mut found = Vec::new();
    eventually("the keys are listed", || {
        found = daemon.connect_service().list();
        found.len() == 3
    });
    ["a", "b", "c"].map(|name| found.iter().find(|(_, comment)| comment == name.as_bytes()).unwrap().0.clone())
}

fn name(blob: &[u8]) -> String {
    fingerprint(blob, FingerprintHash::Sha256)
}

/// A home with two devices, and both kinds of door shared by users that get different things.
fn shared() -> (Home, [Vec<u8>; 3]) {
    let mut home = Home::new();
    home.device("token", TOKEN, "probe = \"50ms\"");
    home.device("other", OTHER, "probe = \"50ms\"");
    // Once without the doors, for the fingerprints.
    let blobs = {
        let daemon = home.start();
        let blobs = keys(&daemon);
        daemon.end(Signal::TERM);
        blobs
    };
    home.open_to_others();
    let [a, b, _] = blobs.each_ref().map(|blob| name(blob));
    for door in ["ssh", "service"] {
        home.configure(&format!(
            "[[listen]]\ndoor = \"{door}\"\npath = {:?}\nmode = \"0666\"\nkeys = [\"{a}\", \"{b}\"]\n\
             uids = [{SIGNER}, {DERIVER}, {PLAIN}]\n\
             [[listen.client]]\nuid = {SIGNER}\nkeys = [\"{a}\"]\noperations = [\"sign\"]\n\
             [[listen.client]]\nuid = {DERIVER}\noperations = [\"derive\"]\n",
            home.path(&format!("shared-{door}")),
        ));
    }
    (home, blobs)
}

fn door(home: &Home, kind: &str) -> PathBuf {
    home.path(&format!("shared-{kind}"))
}

fn listed(client: &mut Client) -> Vec<String> {
    client.list().into_iter().map(|(_, comment)| String::from_utf8(comment).unwrap()).collect()
}

fn does(client: &mut Client, key: &[u8], peer: &[u8]) -> [Result<(), Code>; 3] {
    let tasks = [ssh(key, DATA), sign(key, Scheme::Ecdsa(Hash::Sha256), DATA), derive(key, DeriveScheme::Ecdh, peer)];
    tasks.map(|task| client.ask(&use_key(task, 0)).read::<Bytes>().map(drop).map_err(|failure| failure.code))
}

#[test]
fn each_uid_gets_its_own_keys_and_operations() {
    if !is_root() {
        return;
    }
    let (home, [a, b, c]) = shared();
    let _daemon = home.start();
    let service = door(&home, "service");
    let Ok(PublicKey::Ecdsa(_, peer)) = PublicKey::parse(&c) else { panic!("another key") };
    let (hidden, refused) = (Err(Code::NoSuchKey), Err(Code::NotPermitted));
    for (uid, shown, of_a, of_b) in [
        (SIGNER, &["a"][..], [Ok(()), Ok(()), refused], [hidden; 3]),
        (DERIVER, &["a", "b"], [refused, refused, Ok(())], [refused, refused, Ok(())]),
        (PLAIN, &["a", "b"], [Ok(()); 3], [Ok(()); 3]),
    ] {
        let mut client = Client::connect_as(&service, uid);
        eventually("the keys are listed", || listed(&mut client) == shown);
        assert_eq!((does(&mut client, &a, peer), does(&mut client, &b, peer)), (of_a, of_b), "{uid}");
        assert_eq!(does(&mut client, &c, peer), [hidden; 3], "{uid}");
        // The reasons are there for whoever wonders.
        let reply = client.ask(&why());
        let told: Vec<RefusalEntry<'_>> = reply.ok();
        let expected = of_a.iter().chain(&of_b).filter(|result| result.is_err()).count() + 3;
        assert_eq!(told.len(), expected, "{uid}");

        let operations = |client: &mut Client, key: &[u8]| {
            let reply = client.ask(&Request::Keys(first_page(0)));
            let page: Page<KeyEntry<'_>> = reply.ok();
            assert_eq!(page.entries.len(), shown.len());
            page.entries.iter().find(|entry| entry.blob == key).unwrap().operations.join(",")
        };
        let expected = match uid {
            SIGNER => "sign",
            DERIVER => "derive",
            _ => "sign,derive",
        };
        assert_eq!(operations(&mut client, &a), expected, "{uid}");
        // Nor does it learn of a device that has none of its keys.
        let reply = client.ask(&Request::Devices(first_page(0)));
        let page: Page<DeviceEntry<'_>> = reply.ok();
        assert_eq!(page.entries.iter().map(|device| device.id).collect::<Vec<_>>(), ["token"]);
    }
}

#[test]
fn messages_of_other_agents_and_of_ssh_are_under_the_same_rules() {
    if !is_root() {
        return;
    }
    let (home, [a, b, c]) = shared();
    let _daemon = home.start();
    let signs = |client: &mut Client, key: &[u8]| {
        let request = message(13, &[key, DATA]).into_iter().chain([0; 4]).collect::<Vec<_>>();
        client.request(&request)[0] == SIGN_RESPONSE
    };
    for kind in ["ssh", "service"] {
        for (uid, of_a, of_b) in [(SIGNER, true, false), (DERIVER, false, false), (PLAIN, true, true)] {
            let mut client = Client::connect_as(&door(&home, kind), uid);
            eventually("the keys are listed", || !client.list().is_empty());
            assert_eq!((signs(&mut client, &a), signs(&mut client, &b)), (of_a, of_b), "{uid} at the {kind} door");
            assert!(!signs(&mut client, &c));
        }
    }
    for (uid, agrees, digests) in [(SIGNER, false, true), (DERIVER, true, false), (PLAIN, true, true)] {
        let mut client = Client::connect_as(&door(&home, "service"), uid);
        let done = |answer: Vec<u8>| answer != [EXTENSION_FAILURE];
        let ecdh = compatible(&mut client, &compatible::Request::Ecdh { key: &a, partner: &c });
        assert_eq!(done(ecdh), agrees, "{uid}");
        let signed = compatible(&mut client, &compatible::Request::SignPrehash { key: &a, digest: &[1; 32] });
        assert_eq!(done(signed), digests, "{uid}");
        let ids = compatible(&mut client, &compatible::Request::DecryptDeriveIds);
        let holds = |blob: &[u8]| ids.windows(blob.len()).any(|window| window == blob);
        assert_eq!((holds(&a), holds(&b), holds(&c)), (agrees, agrees, false), "{uid}");
    }
}

#[test]
fn who_gets_little_locks_nothing_and_strangers_get_nothing() {
    if !is_root() {
        return;
    }
    let (home, [a, ..]) = shared();
    let _daemon = home.start();
    for uid in [SIGNER, DERIVER, PLAIN] {
        let mut client = Client::connect_as(&door(&home, "service"), uid);
        for request in [
            unlock("token", "1234"),
            Request::Lock(Target::Device("token")),
            Request::Forget(Target::Everything),
            Request::Allow { key: &a, operations: strongroom::vault::key::Grants::ALL, proof: None },
        ] {
            assert_eq!(client.ask(&request).code(), Code::NotPermitted, "{uid}: {:?}", request.name());
        }
        assert_eq!(client.request(&message(LOCK, &[b"password"])), [FAILURE], "{uid}");
    }
    for kind in ["ssh", "service"] {
        assert!(Client::connect_as(&door(&home, kind), STRANGER).is_closed());
    }
}

#[test]
fn a_reload_changes_what_new_connections_get() {
    if !is_root() {
        return;
    }
    let (home, [a, ..]) = shared();
    let daemon = home.start();
    let service = door(&home, "service");
    let check = |client: &mut Client| client.ask(&use_key(sign_digest(&a, &[1; 32]), 0)).read::<Bytes>().is_ok();
    let mut before = Client::connect_as(&service, DERIVER);
    eventually("the keys are listed", || !before.list().is_empty());
    assert!(!check(&mut before));
    let config = fs::read_to_string(home.path("config.toml")).unwrap();
    let wrong = config.replacen("[\"derive\"]", "[\"fly\"]", 1);
    fs::write(home.path("config.toml"), wrong).unwrap();
    daemon.signal(Signal::HUP);
    daemon.logs("unknown variant `fly`");
    assert!(!check(&mut Client::connect_as(&service, DERIVER)), "a wrong file changes nothing");
    fs::write(home.path("config.toml"), config.replace("[\"derive\"]", "[\"sign\"]")).unwrap();
    daemon.signal(Signal::HUP);
    eventually("a new connection gets the new operations", || check(&mut Client::connect_as(&service, DERIVER)));
}
