//! The audit log of the built daemon: what is written and when, kills, restarts, reloads, full disks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::Write,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use strongroom::agent::message::{Code, Request, Target};
use support::{
    cli,
    client::{Client, FAILURE, Key, LOCK, REMOVE_IDENTITY, SUCCESS, UNLOCK, frame, message, put, random},
    daemon::{Daemon, Home, LOCKED},
    eventually,
    service::{ssh, unlock, use_key},
};

/// Runs `strongroom` at the service door, with a passphrase on its standard input.
fn cli(home: &Home, words: &[&str]) {
    cli::fed(home, words, "correct horse battery staple\n").ok();
}

/// The lines that say all of these.
fn lines(home: &Home, fields: &[(&str, &str)]) -> Vec<String> {
    let says = |line: &&str| fields.iter().all(|(name, value)| line.contains(&format!("\"{name}\":\"{value}\"")));
    home.audit().lines().filter(says).map(str::to_owned).collect()
}

/// Waits for the one line that says all of these.
#[track_caller]
fn line(home: &Home, fields: &[(&str, &str)]) -> String {
    eventually(&format!("a line with {fields:?}"), || lines(home, fields).len() == 1);
    lines(home, fields).remove(0)
}

#[test]
fn each_use_and_each_act_is_a_line_and_nothing_secret_is_in_it() {
    let mut home = Home::new();
    home.device("token", LOCKED, "probe = \"50ms\"");
    let daemon = home.start();
    let (key, other) = (Key::random(), Key::random());
    let mut client = daemon.connect();
    client.add(&key, "a comment", &[]);
    // Administrative: on the disk before the reply.
    let added = &lines(&home, &[("operation", "add"), ("key", &key.fingerprint()), ("outcome", "ok")])[0];
    let pid = std::process::id();
    assert!(added.contains(&format!("\"pid\":{pid},\"program\":\"/")) && added.contains("\"door\":\"ssh\""), "{added}");

    client.sign(&key);
    let signed = line(&home, &[("operation", "sign"), ("key", &key.fingerprint()), ("purpose", "opaque")]);
    assert!(signed.contains("\"scheme\":\"ed25519\"") && signed.contains("\"device\":\"memory\""), "{signed}");
    assert!(signed.contains("\"latency_us\":"), "{signed}");
    assert_eq!(client.request(&other.sign_message(b"data")), [FAILURE]);
    line(&home, &[("operation", "sign"), ("key", &other.fingerprint()), ("outcome", "no_such_key")]);

    let mut sshsig = b"SSHSIG".to_vec();
    for part in [&b"git \"\n"[..], b"", b"sha512", &[7; 64]] {
        put(&mut sshsig, part);
    }
    client.request(&key.sign_message(&sshsig));
    line(&home, &[("purpose", "sshsig"), ("namespace", "git \\\"\u{fffd}")]);

    let mut service = daemon.connect_service();
    assert_eq!(service.ask(&unlock("token", "000111")).code(), Code::PinWrong);
    assert_eq!(lines(&home, &[("operation", "login"), ("device", "token"), ("outcome", "pin_wrong")]).len(), 1);
    service.ask(&unlock("token", "123456")).ok::<()>();
    assert_eq!(lines(&home, &[("operation", "unlock"), ("device", "token"), ("outcome", "ok")]).len(), 1);
    service.ask(&Request::Lock(Target::Device("token"))).ok::<()>();
    assert_eq!(lines(&home, &[("operation", "lock"), ("door", "service"), ("outcome", "ok")]).len(), 1);

    assert_eq!(client.request(&message(LOCK, &[b"sesame"])), [SUCCESS]);
    assert_eq!(service.ask(&use_key(ssh(&key.blob(), b"data"), 0)).code(), Code::Locked);
    line(&home, &[("operation", "sign"), ("key", &key.fingerprint()), ("outcome", "locked")]);
    assert_eq!(client.request(&message(UNLOCK, &[b"simsalabim"])), [FAILURE]);
    assert_eq!(lines(&home, &[("operation", "unlock"), ("outcome", "wrong_password")]).len(), 1);
    assert_eq!(client.request(&message(UNLOCK, &[b"sesame"])), [SUCCESS]);
    assert_eq!(client.request(&message(REMOVE_IDENTITY, &[&key.blob()])), [SUCCESS]);
    assert_eq!(lines(&home, &[("operation", "remove"), ("key", &key.fingerprint()), ("outcome", "ok")]).len(), 1);

    assert!(daemon.end(Signal::TERM).success());
    let log = home.audit();
    assert!(log.starts_with("{\"seq\":1,") && log.lines().last().unwrap().contains("\"operation\":\"stop\""), "{log}");
    for secret in ["123456", "000111", "sesame", "simsalabim", "a comment"] {
        assert!(!log.contains(secret), "{secret}");
    }
    assert_eq!(home.verify_audit().faults, []);
}

#[test]
fn what_ends_by_itself_is_written_too() {
    let home = Home::new();
    let daemon = home.start();
    let key = Key::random();
    daemon.connect().add(&key, "short", &support::client::lifetime(1));
    line(&home, &[("operation", "expire"), ("key", &key.fingerprint())]);
    daemon.connect().add(&key, "long", &[]);
    daemon.signal(Signal::USR1);
    line(&home, &[("operation", "wipe")]);
}

#[test]
fn a_configuration_without_it_has_no_log() {
    let mut home = Home::new();
    home.configure("[audit]\nenabled = false");
    let daemon = home.start();
    daemon.connect().add(&Key::random(), "key", &[]);
    assert!(daemon.end(Signal::TERM).success());
    assert!(!home.audit_directory().exists());
}

/// Signs until the connection ends.
fn sign_for_ever(mut client: Client, key: &Key) {
    let request = frame(&key.sign_message(b"data")).repeat(16);
    while client.stream.write_all(&request).is_ok() {
        if !(0..16).all(|_| client.receive().is_ok()) {
            return;
        }
    }
}

#[test]
fn whenever_it_is_killed_no_alarm_is_false_and_nothing_acknowledged_is_missing() {
    let mut home = Home::new();
    home.configure("[audit]\nmax_size = \"1M\"");
    let mut added = Vec::new();
    let mut rounds_kept = 0;
    for round in 0..12 {
        let daemon = home.start();
        let key = Key::random();
        daemon.connect().add(&key, "key", &[]);
        thread::scope(|scope| {
            for client in [daemon.connect(), daemon.connect()] {
                scope.spawn(|| sign_for_ever(client, &key));
            }
            let until = Instant::now() + Duration::from_millis(u64::from(random()[0]));
            let mut client = daemon.connect();
            loop {
                let key = Key::random();
                client.add(&key, "another", &[]);
                added.push(key.fingerprint());
                if Instant::now() >= until {
                    break;
                }
            }
            assert!(!daemon.end(Signal::KILL).success());
        });
        let report = home.verify_audit();
        assert_eq!(report.faults, [], "round {round}");
        let log = home.audit();
        // Two who sign fill a MiB in some 50 ms, so that also the last one may have had to make room by
        // the time of the kill. But what makes room is always the oldest.
        let kept: Vec<bool> = added.iter().map(|fingerprint| log.contains(fingerprint)).collect();
        let missing = kept.iter().take_while(|kept| !**kept).count();
        assert!(kept[missing..].iter().all(|kept| *kept), "one is missing among newer ones in round {round}: {kept:?}");
        assert!(report.first > 1 || missing == 0, "{missing} of {} are missing in round {round}", added.len());
        rounds_kept += usize::from(missing < kept.len());
    }
    assert!(rounds_kept > 0, "no round had one of the additions in what was kept");
}

#[test]
fn a_reload_bounds_the_files_anew_and_keeps_the_chain() {
    let mut home = Home::new();
    home.configure("[audit]\nmax_size = \"64M\"");
    let daemon = home.start();
    let key = Key::random();
    let mut client = daemon.connect();
    client.add(&key, "key", &[]);
    fill(&daemon, &key, 2 << 20);
    let config = fs::read_to_string(home.path("config.toml")).unwrap();
    fs::write(home.path("config.toml"), config.replace("64M", "1M")).unwrap();
    daemon.signal(Signal::HUP);
    daemon.logs("the configuration was reloaded");
    // The next file begins with the next line, and there is no room for the long one before it.
    client.sign(&key);
    client.add(&key, "key", &[]);
    assert!(size(&home) <= 1 << 20, "{}", size(&home));
    assert!(daemon.end(Signal::TERM).success());
    let report = home.verify_audit();
    assert!(report.faults.is_empty() && report.first > 1000, "{report:?}");
}

fn size(home: &Home) -> u64 {
    fs::read_dir(home.audit_directory()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// Signs until the log is so long.
fn fill(daemon: &Daemon<'_>, key: &Key, bytes: u64) {
    let mut client = daemon.connect();
    let home = daemon.home();
    while size(home) < bytes {
        let requests = frame(&key.sign_message(b"data")).repeat(60);
        client.stream.write_all(&requests).unwrap();
        for _ in 0..60 {
            client.receive().unwrap();
        }
    }
}

/// A disk that is full for the log only: no file may be longer than the state file, and the log is about to be.
fn limit(daemon: &Daemon<'_>, bytes: Option<u64>) {
    let pid = Pid::from_raw(daemon.pid().cast_signed());
    prlimit(pid, Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

#[test]
fn without_a_log_stored_keys_are_used_or_refused_as_configured() {
    for (choice, refused) in [("", true), ("on_full = \"warn\"", false)] {
        let mut home = Home::with_cheap_tries();
        let log = home.path("lines");
        home.configure(&format!("[audit]\npath = {log:?}\n{choice}"));
        let daemon = home.start();
        cli(&home, &["init", "--stdin"]);
        cli(&home, &["key", "generate", "store", "ed25519", "--label", "stored"]);
        let stored = daemon.connect().list().remove(0).0;
        assert!(daemon.end(Signal::TERM).success());
        fs::remove_dir_all(&log).unwrap();
        fs::write(&log, "").unwrap();

        let daemon = home.start();
        daemon.logs("nothing is written down of the use of keys");
        cli(&home, &["unlock", "store", "--stdin"]);
        let used = daemon.connect_service().ask(&use_key(ssh(&stored, b"data"), 0));
        if refused {
            assert_eq!(used.code(), Code::Full);
        } else {
            used.bytes();
        }
        // What is not stored, and what makes keys safer, is served.
        let (mut client, key) = (daemon.connect(), Key::random());
        client.add(&key, "key", &[]);
        client.sign(&key);
        assert_eq!(client.request(&message(LOCK, &[b"sesame"])), [SUCCESS]);
        assert!(daemon.end(Signal::TERM).success());
    }
}

#[test]
fn on_a_full_disk_keys_are_used_or_refused_as_configured() {
    // Without a choice, uses of stored keys are refused.
    for on_full in ["refuse", "warn", ""] {
        let mut home = Home::with_cheap_tries();
        let choice = if on_full.is_empty() { String::new() } else { format!("on_full = \"{on_full}\"") };
        home.configure(&format!("[audit]\nmax_size = \"1G\"\n{choice}"));
        let daemon = home.start();
        cli(&home, &["init", "--stdin"]);
        cli(&home, &["key", "generate", "store", "ed25519", "--label", "stored"]);
        let stored = daemon.connect().list().remove(0).0;
        let key = Key::random();
        let mut client = daemon.connect();
        client.add(&key, "key", &[]);
        fill(&daemon, &key, fs::metadata(home.path("state/state.redb")).unwrap().len() + 4096);
        client.add(&key, "key", &[]);
        let full = size(&home) + 700;
        limit(&daemon, Some(full));
        eventually("the log notices", || {
            client.request(&key.sign_message(b"data"));
            home.log().contains("the audit log cannot be written")
        });
        assert!(size(&home) <= full);
        let mut service = daemon.connect_service();
        let used = service.ask(&use_key(ssh(&key.blob(), b"data"), 0));
        let used_stored = service.ask(&use_key(ssh(&stored, b"data"), 0));
        let added = client.request(&Key::random().add_message(b"another", &[]));
        if on_full == "refuse" {
            assert_eq!((used.code(), added), (Code::Full, vec![FAILURE]));
        } else {
            used.bytes();
            assert_eq!(added, [SUCCESS]);
        }
        if on_full == "warn" {
            used_stored.bytes();
        } else {
            assert_eq!(used_stored.code(), Code::Full);
        }
        // What makes keys safer is never refused.
        assert_eq!(client.request(&message(LOCK, &[b"sesame"])), [SUCCESS]);
        limit(&daemon, None);
        daemon.logs("the audit log is written again");
        eventually("it is unlocked again", || client.request(&message(UNLOCK, &[b"sesame"])) == [SUCCESS]);
        client.sign(&key);
        assert!(daemon.end(Signal::TERM).success());
        assert_eq!(home.verify_audit().faults, [], "{on_full}");
        let locks = lines(&home, &[("operation", "lock"), ("outcome", "ok")]);
        assert_eq!(locks.len(), 1, "{locks:?}");
        let unrecorded = lines(&home, &[("operation", "unrecorded")]);
        assert_eq!(unrecorded.len(), usize::from(on_full == "refuse"), "{on_full:?}: {unrecorded:?}");
    }
}
