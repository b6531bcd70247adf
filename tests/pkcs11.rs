//! Keys on SoftHSM behind the daemon: what ssh, git and OpenSSL make of them, what becomes of PINs, and what is said when
//! the token, a key or the driver's process goes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

#[path = "conformance/verify.rs"]
#[allow(dead_code, unreachable_pub, reason = "only a part of it is used here")]
mod verify;

mod support;

use std::{fs, time::Instant};

use rustix::process::{Signal, kill_process};
use strongroom::{
    agent::message::{Code, DeviceEntry, KeyEntry, Page, PinState, Request},
    devices::{
        Hash, Input, Scheme, Signature,
        scheme::{hash as hash_of, sign_scheme},
    },
    public_key::{KeyType, PublicKey},
};
use support::{
    Outcome,
    client::Client,
    command,
    daemon::{Daemon, Home},
    eventually, run,
    service::{first_page, sign, sign_digest, ssh, unlock, use_key},
    softhsm::{PIN, SoftHsm},
    sshd::Hosts,
};

const DATA: &[u8] = b"what is signed";
const WRONG: &str = "000000";
/// For where another program writes to the token. SoftHSM reads an object that is half written, and keeps it so for as long
/// as it is loaded: looking at the token twenty times a second meets that moment in one run of ten.
const CALM: &str = "probe = \"2s\"";

/// A token with a key of this type, as the device `hsm`.
fn with_key(key_type: &str, more: &str) -> (SoftHsm, Home) {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", key_type, "01", "the key", &[]);
    let mut home = Home::new();
    home.configure(&hsm.spied_device("hsm", "vault", more));
    (hsm, home)
}

/// The blob of the listed key with this comment.
fn blob(daemon: &Daemon<'_>, comment: &str) -> Vec<u8> {
    let mut found = None;
    eventually(&format!("{comment:?} is listed"), || {
        let mut client = daemon.connect_service();
        let reply = client.ask(&Request::Keys(first_page(0)));
        let page: Page<KeyEntry<'_>> = reply.ok();
        found = page.entries.iter().find(|key| key.comment == comment.as_bytes()).map(|key| key.blob.to_vec());
        found.is_some()
    });
    found.unwrap()
}

/// Looks at the device `hsm`.
fn device<T>(client: &mut Client, look: impl FnOnce(&DeviceEntry<'_>) -> T) -> T {
    let reply = client.ask(&Request::Devices(first_page(0)));
    let page: Page<DeviceEntry<'_>> = reply.ok();
    look(page.entries.iter().find(|device| device.id == "hsm").unwrap())
}

/// Waits until the device is like that.
#[track_caller]
fn becomes(daemon: &Daemon<'_>, what: &str, good: impl Fn(&DeviceEntry<'_>) -> bool) {
    eventually(what, || device(&mut daemon.connect_service(), &good));
}

/// The reason code of a signature that fails, and its words.
fn refused(daemon: &Daemon<'_>, key: &[u8]) -> (Code, String) {
    let failure = daemon.connect_service().ask(&use_key(ssh(key, DATA), 0)).failure();
    (failure.code, failure.message)
}

fn signs(daemon: &Daemon<'_>, key: &[u8]) -> bool {
    daemon.connect_service().ask(&use_key(ssh(key, DATA), 0)).read::<support::service::Bytes>().is_ok()
}

#[test]
fn openssl_verifies_every_scheme_through_the_daemon() {
    let hsm = SoftHsm::with_token("vault");
    for (id, key_type) in [
        ("01", "rsa:2048"),
        ("02", "EC:prime256v1"),
        ("03", "EC:secp384r1"),
        ("04", "EC:secp521r1"),
        ("05", "EC:edwards25519"),
    ] {
        hsm.generate("vault", key_type, id, key_type, &[]);
    }
    let mut home = Home::new();
    home.configure(&hsm.device("hsm", "vault", ""));
    let daemon = home.start();
    let mut client = daemon.connect_service();
    let mut count = 0;
    for comment in ["rsa:2048", "EC:prime256v1", "EC:secp384r1", "EC:secp521r1", "EC:edwards25519"] {
        let key = blob(&daemon, comment);
        let key_type = PublicKey::parse(&key).unwrap().key_type();
        let reply = client.ask(&Request::Keys(first_page(0)));
        let page: Page<KeyEntry<'_>> = reply.ok();
        let entry = page.entries.iter().find(|entry| entry.blob == key).unwrap();
        for name in entry.signs.iter().filter(|name| **name != "ssh") {
            let scheme = sign_scheme(name.as_bytes()).unwrap();
            let mut inputs = vec![(sign(&key, scheme, DATA), Input::Message(DATA.into()))];
            let digest = hash_of(scheme).map(|hash| verify::digest(hash, DATA));
            if let Some(digest) = &digest
                && scheme == Scheme::Ecdsa(Hash::Sha256)
            {
                inputs.push((sign_digest(&key, digest), Input::Digest(digest.as_slice().into())));
            }
            for (task, input) in inputs {
                let bytes = client.ask(&use_key(task, 0)).bytes();
                let signature = Signature::from_bytes(scheme, key_type, bytes).unwrap();
                assert!(verify::verifies(&key, scheme, &input, &signature), "{comment} {name}");
                count += 1;
            }
        }
        if key_type == KeyType::Rsa {
            assert_eq!(entry.decrypts, ["rsa-oaep-sha1"], "as far as SoftHSM goes");
        }
    }
    // Eight of RSA, three of each curve, one of Ed25519, and a digest on each curve.
    assert_eq!(count, 8 + 9 + 1 + 3);
}

#[test]
fn ssh_logs_in_and_git_signs() {
    let hsm = SoftHsm::with_token("vault");
    let (mut home, hosts) = (Home::new(), Hosts::one("somewhere"));
    let types = [("01", "rsa:2048"), ("02", "EC:prime256v1"), ("03", "EC:edwards25519")];
    for (id, key_type) in types {
        hsm.generate("vault", key_type, id, key_type, &[]);
    }
    home.configure(&hsm.device("hsm", "vault", ""));
    let daemon = home.start();
    let socket = home.path("agent");
    types.iter().for_each(|(_, comment)| drop(blob(&daemon, comment)));
    let listed = daemon.ssh_add(&["-L"]).ok();
    assert_eq!(listed.lines().count(), 3, "{listed}");
    for (n, line) in listed.lines().enumerate() {
        let public = hosts.dir().join(format!("key_{n}.pub"));
        fs::write(&public, format!("{line}\n")).unwrap();
        hosts.authorize(&hosts.dir().join(format!("key_{n}")), "");
        let mut login = command("ssh", hosts.dir());
        login.env("SSH_AUTH_SOCK", &socket).arg("-F").arg(hosts.ssh_config()).arg("-i").arg(&public);
        let said = run(login.args(["somewhere", "cat $SSH_USER_AUTH"])).ok();
        assert!(said.contains(line.split(' ').nth(1).unwrap()), "{line}: {said}");

        let repository = hosts.dir().join(format!("repository_{n}"));
        fs::create_dir(&repository).unwrap();
        let allowed = hosts.dir().join("allowed");
        fs::write(&allowed, format!("somebody@example.org {line}\n")).unwrap();
        let git = |args: &[&str]| -> Outcome {
            let mut git = command("git", &repository);
            git.env("SSH_AUTH_SOCK", &socket);
            for setting in [
                &format!("user.signingKey={}", public.display()),
                &format!("gpg.ssh.allowedSignersFile={}", allowed.display()),
                "gpg.format=ssh",
                "user.name=Somebody",
                "user.email=somebody@example.org",
            ] {
                git.args(["-c", setting]);
            }
            run(git.args(args))
        };
        git(&["init", "-q"]).ok();
        git(&["commit", "-q", "-S", "--allow-empty", "-m", "signed"]).ok();
        let verified = git(&["verify-commit", "HEAD"]);
        assert!(verified.stderr.contains("Good \"git\" signature for somebody@example.org"), "{verified:?}");
    }
}

#[test]
fn a_wrong_pin_costs_one_try_whoever_asks_and_however_often() {
    let (hsm, home) = with_key("EC:prime256v1", "");
    fs::write(hsm.path("hsm.pin"), WRONG).unwrap();
    let daemon = home.start();
    let key = blob(&daemon, "the key");
    assert_eq!(hsm.calls("C_Login"), 0, "listed without a login");
    assert_eq!(refused(&daemon, &key).0, Code::PinWrong);
    assert_eq!(hsm.calls("C_Login"), 1);
    // The same client, another one, and what the worker does by itself.
    for _ in 0..3 {
        let (code, why) = refused(&daemon, &key);
        assert_ne!(code, Code::Failed, "{why}");
    }
    becomes(&daemon, "the note that a wrong PIN was tried", |device| {
        device.notes.iter().any(|note| note.contains("wrong PIN")) && device.pin == PinState::Needed
    });
    drop(daemon);

    let daemon = home.start();
    becomes(&daemon, "ready again", |device| device.state == "ready");
    refused(&daemon, &key);
    assert_eq!(hsm.calls("C_Login"), 1, "a restart spends nothing");

    // A person knows better.
    let mut client = daemon.connect_service();
    client.ask(&unlock("hsm", PIN)).ok::<()>();
    assert!(signs(&daemon, &key));
    assert_eq!(hsm.calls("C_Login"), 2);
}

#[test]
fn a_process_that_is_killed_costs_what_is_inside_and_logs_in_again() {
    let (hsm, home) = with_key("EC:prime256v1", "");
    let daemon = home.start();
    let key = blob(&daemon, "the key");
    assert!(signs(&daemon, &key));
    assert_eq!(hsm.calls("C_Login"), 1);
    for n in 2..4 {
        let hosts = daemon.hosts();
        let [(pid, _)] = &hosts[..] else { panic!("{hosts:?}") };
        kill_process(*pid, Signal::KILL).unwrap();
        eventually("it signs again", || signs(&daemon, &key));
        assert_eq!(hsm.calls("C_Login"), n, "with the PIN that the token had accepted");
    }
    let restarts = device(&mut daemon.connect_service(), |device| device.restarts);
    assert_eq!(restarts, 2);
}

#[test]
fn a_key_that_is_deleted_is_gone_and_the_others_sign() {
    let (hsm, mut home) = with_key("EC:prime256v1", CALM);
    hsm.generate("vault", "EC:prime256v1", "02", "another", &[]);
    home.configure("");
    let daemon = home.start();
    let (key, other) = (blob(&daemon, "the key"), blob(&daemon, "another"));
    assert!(signs(&daemon, &key) && signs(&daemon, &other));
    hsm.delete("vault", "01");
    // While another program writes to it, SoftHSM may take a token for none.
    eventually("the key is gone", || refused(&daemon, &key).0 == Code::NoSuchKey);
    eventually("the other one signs", || signs(&daemon, &other));
    eventually("it is not listed any more", || daemon.connect().list().len() == 1);
}

#[test]
fn a_key_that_comes_is_found() {
    let (hsm, home) = with_key("EC:prime256v1", CALM);
    let daemon = home.start();
    let key = blob(&daemon, "the key");
    assert!(signs(&daemon, &key));
    hsm.generate("vault", "EC:secp384r1", "02", "new", &[]);
    let new = blob(&daemon, "new");
    assert!(signs(&daemon, &new) && signs(&daemon, &key));
}

#[test]
fn a_token_that_is_made_anew_has_other_keys() {
    let (hsm, home) = with_key("EC:prime256v1", CALM);
    let daemon = home.start();
    let key = blob(&daemon, "the key");
    assert!(signs(&daemon, &key));
    hsm.reinit_token("vault");
    hsm.generate("vault", "EC:prime256v1", "01", "the new key", &[]);
    let (code, why) = refused(&daemon, &key);
    assert!([Code::NoSuchKey, Code::PinRequired, Code::Absent].contains(&code), "{code:?}: {why}");
    let new = blob(&daemon, "the new key");
    assert_ne!(key, new);
    eventually("the new key signs", || signs(&daemon, &new));
    assert!(!signs(&daemon, &key));
}

#[test]
fn a_module_that_cannot_be_loaded_says_why_and_delays_nobody() {
    let mut home = Home::new();
    home.configure(
        "[[device]]\nname = \"hsm\"\ndriver = \"pkcs11\"\nmodule = \"/nonexistent/x.so\"\ntoken = \"pkcs11:\"\n",
    );
    let start = Instant::now();
    let daemon = home.start();
    becomes(&daemon, "failed with the reason", |device| {
        device.state == "failed"
            && device.reason.contains("/nonexistent/x.so")
            && device.reason.contains("No such file")
    });
    assert!(start.elapsed() < support::PATIENCE);
    assert!(daemon.connect().list().is_empty());
}

#[test]
fn a_token_is_chosen_by_its_uri_and_none_by_chance() {
    let hsm = SoftHsm::with_token("one");
    hsm.init_token("two");
    hsm.generate("two", "EC:prime256v1", "01", "on two", &[]);
    let mut home = Home::new();
    home.configure(&hsm.device("hsm", "two", "").replace("pkcs11:token=two", "pkcs11:model=SoftHSM%20v2"));
    {
        let daemon = home.start();
        becomes(&daemon, "which of them is meant is asked", |device| {
            let why = device.reason;
            why.contains("2 tokens are") && why.contains("token=one;serial=") && why.contains("token=two;serial=")
        });
    }
    let mut home = Home::new();
    home.configure(&hsm.device("hsm", "two", ""));
    let daemon = home.start();
    assert!(signs(&daemon, &blob(&daemon, "on two")));
    let mut away = Home::new();
    away.configure(&hsm.device("hsm", "three", ""));
    let daemon = away.start();
    becomes(&daemon, "a token that is not there is absent", |device| device.state == "absent");
    hsm.init_token("three");
    becomes(&daemon, "it is noticed when it comes", |device| device.state == "ready");
}
