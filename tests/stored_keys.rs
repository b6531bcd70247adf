//! Keys in the encrypted store of the built daemon, once they are there: brought from files, disabled, expired, confirmed,
//! certified, exported for ssh-keygen and OpenSSL, replaced by successors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use base64ct::{Base64, Encoding};
use rustix::process::Signal;
use strongroom::{
    agent::message::{Code, KeyEntry, Made, Page, Request, StoredRequest},
    public_key::{FingerprintHash, fingerprint},
    vault::stored::{KeyChange, NewStored},
};
use support::{
    Outcome,
    askpass::Askpass,
    cli::{fed, json},
    client::{Client, Key},
    command,
    daemon::{Daemon, Home},
    eventually, keygen, run,
    service::{Bytes, first_page, ssh, use_key},
    sshd::Hosts,
};

const PASSPHRASE: &str = "correct horse battery staple";
const DATA: &[u8] = b"what is signed";

/// Starts a daemon with a new store.
fn start(home: &Home) -> Daemon<'_> {
    let daemon = home.start();
    fed(home, &["init", "--stdin", "--no-recovery"], PASSPHRASE).ok();
    daemon
}

fn cli(home: &Home, words: &[&str]) -> Outcome {
    fed(home, words, "")
}

fn blob_of(file: &Path) -> Vec<u8> {
    Base64::decode_vec(&support::public_key(file)).unwrap()
}

fn entry<T>(client: &mut Client, key: &[u8], look: impl FnOnce(&KeyEntry<'_>) -> T) -> T {
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    look(page.entries.iter().find(|entry| entry.blob == key).expect("the key is listed"))
}

fn set<'a>(key: &'a [u8], proof: Option<&str>, change: KeyChange) -> Request<'a> {
    Request::Stored(StoredRequest::Set { key, proof: proof.map(Into::into), change })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A key made by ssh-keygen, in the store.
fn imported(home: &Home, name: &str, options: &[&str], words: &[&str]) -> PathBuf {
    let file = keygen(&home.path(""), name, options);
    let mut all = vec!["key", "import", file.to_str().unwrap(), "store", "--label", name];
    all.extend(words);
    cli(home, &all).ok();
    file
}

#[test]
fn a_key_from_a_file_logs_in_after_a_restart_and_the_file_is_not_needed() {
    let home = Home::with_cheap_tries();
    let daemon = start(&home);
    let sealed = keygen(&home.path(""), "sealed", &["-t", "ed25519"]);
    run(command("ssh-keygen", &home.path("")).args(["-q", "-p", "-N", "file pass", "-P", "", "-f"]).arg(&sealed)).ok();
    let import = ["key", "import", sealed.to_str().unwrap(), "store", "--label", "work"];
    fed(&home, &[&import[..], &["--stdin"]].concat(), "wrong").fails_with(6);
    let line = fed(&home, &[&import[..], &["--stdin"]].concat(), "file pass").ok();
    assert!(line.contains(&support::public_key(&sealed)), "{line}");
    // Of other programs' forms, too.
    let pem = home.path("p256.pem");
    run(command("openssl", &home.path(""))
        .args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"])
        .arg(&pem))
    .ok();
    cli(&home, &["key", "import", pem.to_str().unwrap(), "store"]).ok();
    assert_eq!(daemon.connect().list().len(), 2);
    daemon.end(Signal::KILL);

    let daemon = home.start();
    fed(&home, &["unlock", "--stdin"], PASSPHRASE).ok();
    let public = support::with_suffix(&sealed, ".pub");
    let hosts = Hosts::one("host");
    hosts.authorize(&sealed, "");
    fs::remove_file(&sealed).unwrap();
    let mut login = command("ssh", hosts.dir());
    login.env("SSH_AUTH_SOCK", home.path("agent")).arg("-F").arg(hosts.ssh_config()).arg("-i").arg(&public);
    let logged_in = run(login.args(["host", "echo in"]));
    assert_eq!(logged_in.ok(), "in\n");
    drop(daemon);
}

#[test]
fn a_disabled_or_expired_key_is_listed_and_not_used() {
    let home = Home::with_cheap_tries();
    let daemon = start(&home);
    let file = imported(&home, "work", &["-t", "ed25519"], &[]);
    let key = blob_of(&file);
    let mut client = daemon.connect_service();
    cli(&home, &["key", "disable", "work"]).ok();
    assert!(daemon.connect().list().is_empty(), "ssh is not offered it");
    let refused = client.ask(&use_key(ssh(&key, DATA), 0)).failure();
    assert_eq!(refused.code, Code::NotPermitted);
    assert!(refused.message.contains("`strongroom key enable`"), "{refused:?}");
    assert!(entry(&mut client, &key, |entry| entry.constraints.contains(&"disabled")));
    assert_eq!(client.ask(&set(&key, None, KeyChange::Enable)).code(), Code::ProofRequired);
    fed(&home, &["key", "enable", "work", "--passphrase-stdin"], PASSPHRASE).ok();
    client.ask(&use_key(ssh(&key, DATA), 0)).ok::<Bytes>();

    client.ask(&set(&key, None, KeyChange::Expires(Some(now() + 3600)))).ok::<()>();
    client.ask(&use_key(ssh(&key, DATA), 0)).ok::<Bytes>();
    assert_eq!(daemon.connect().list().len(), 1);
    client.ask(&set(&key, None, KeyChange::Expires(Some(now() + 1)))).ok::<()>();
    eventually("it expires", || daemon.connect().list().is_empty());
    let refused = client.ask(&use_key(ssh(&key, DATA), 0)).failure();
    assert!(refused.message.contains("expired"), "{refused:?}");
    assert_eq!(client.ask(&set(&key, None, KeyChange::Expires(None))).code(), Code::ProofRequired);
    drop(client);
    daemon.end(Signal::TERM);
    let daemon = home.start();
    assert!(daemon.connect().list().is_empty(), "after a restart, too");
    fed(&home, &["key", "set", "work", "--expires", "never", "--passphrase-stdin"], PASSPHRASE).ok();
    assert_eq!(daemon.connect().list().len(), 1);
    let shown = cli(&home, &["key", "show", "work"]).ok();
    assert!(shown.contains("stored") && shown.contains("store (locked)"), "{shown}");
}

#[test]
fn tightening_needs_no_passphrase_and_loosening_does() {
    let mut askpass = Askpass::new();
    let mut home = Home::with_cheap_tries();
    home.askpass(&askpass);
    let daemon = start(&home);
    let key = blob_of(&imported(&home, "work", &["-t", "ed25519"], &["--exportable"]));
    let mut client = daemon.connect_service();
    cli(&home, &["key", "set", "work", "--confirm", "yes"]).ok();
    client.tell(&use_key(ssh(&key, DATA), 0));
    assert_eq!(askpass.next().kind, "confirm");
    askpass.answer(0, "");
    client.hear(strongroom::agent::message::Name::Sign).ok::<Bytes>();
    fed(&home, &["key", "set", "work", "--confirm", "no", "--passphrase-stdin"], "wrong").fails_with(6);
    fed(&home, &["key", "set", "work", "--confirm", "no", "--passphrase-stdin"], PASSPHRASE).ok();
    client.ask(&use_key(ssh(&key, DATA), 0)).ok::<Bytes>();
    assert_eq!(entry(&mut client, &key, |entry| entry.traits.join(",")), "exportable");
    cli(&home, &["key", "set", "work", "--not-exportable"]).ok();
    assert_eq!(entry(&mut client, &key, |entry| entry.traits.join(",")), "");
    fed(&home, &["key", "export", "work", "--stdin"], &format!("{PASSPHRASE}\nfile pass")).fails_with(3);
    let other = Key::random();
    client.add(&other, "in memory", &[]);
    assert_eq!(client.ask(&set(&other.blob(), None, KeyChange::Disable)).code(), Code::Unsupported);
    assert_eq!(client.ask(&set(b"nobody's", None, KeyChange::Disable)).code(), Code::NoSuchKey);
    assert!(home.audit().contains("\"operation\":\"set-key\""));
}

#[test]
fn an_exportable_key_leaves_sealed_for_ssh_keygen_and_openssl() {
    let home = Home::with_cheap_tries();
    let daemon = start(&home);
    for (name, options) in
        [("ed", &["-t", "ed25519"][..]), ("ec", &["-t", "ecdsa"]), ("rsa", &["-t", "rsa", "-b", "2048"])]
    {
        let file = imported(&home, name, options, &["--exportable"]);
        let out = home.path(&format!("{name}.out"));
        let export = |format: &str, input: &str| {
            fed(&home, &["key", "export", name, "--format", format, "--stdin", "--out", out.to_str().unwrap()], input)
        };
        export("openssh", "wrong\nfile pass").fails_with(6);
        export("openssh", PASSPHRASE).fails_with(2);
        let both = format!("{PASSPHRASE}\nfile pass");
        export("openssh", &both).ok();
        let read = run(command("ssh-keygen", &home.path("")).args(["-y", "-P", "file pass", "-f"]).arg(&out)).ok();
        assert!(read.contains(&support::public_key(&file)), "{name}: {read}");
        assert_ne!(run(command("ssh-keygen", &home.path("")).args(["-y", "-P", "", "-f"]).arg(&out)).code, Some(0));
        export("pkcs8", &both).ok();
        let pem = run(command("openssl", &home.path(""))
            .args(["pkey", "-passin", "pass:file pass", "-pubout", "-in"])
            .arg(&out))
        .ok();
        let ours = cli(&home, &["keys", name, "--format", "pem"]).ok();
        assert_eq!(pem, ours, "{name}");
    }
    let mut client = daemon.connect_service();
    let stays = Request::Generate {
        deadline: None,
        device: "store",
        new: strongroom::devices::NewKey::new("stays", strongroom::devices::Algorithm::Ed25519),
        terms: NewStored::default(),
    };
    client.ask(&stays).ok::<Made<'_>>();
    let refused = fed(&home, &["key", "export", "stays", "--stdin"], &format!("{PASSPHRASE}\nfile pass")).fails_with(3);
    assert!(refused.stderr.contains("not made exportable"), "{refused:?}");
    assert!(home.audit().contains("\"operation\":\"export\""));
}

#[test]
fn certificates_are_offered_replaced_and_dropped_when_they_expire() {
    let home = Home::with_cheap_tries();
    let daemon = start(&home);
    let dir = home.path("");
    let (ca, file) = (keygen(&dir, "ca", &["-t", "ed25519"]), imported(&home, "work", &["-t", "ed25519"], &[]));
    let certify = |serial: &str, time: &str| {
        run(command("ssh-keygen", &dir)
            .args(["-q", "-s"])
            .arg(&ca)
            .args(["-I", "me", "-n", "me", "-z", serial, "-V", time, "work.pub"]))
        .ok();
        cli(&home, &["key", "attach", "work-cert.pub"])
    };
    certify("1", "-2h:-1h").fails_with(2);
    certify("1", "+1h").ok();
    assert_eq!(daemon.connect().list().len(), 2);
    certify("2", "+2h").ok();
    let offered = daemon.connect().list();
    assert_eq!(offered.len(), 2, "the new one is in place of the old");
    let certificate = fs::read_to_string(dir.join("work-cert.pub")).unwrap();
    let blob = Base64::decode_vec(certificate.split(' ').nth(1).unwrap()).unwrap();
    assert!(offered.iter().any(|(offered, _)| *offered == blob));
    let mut client = daemon.connect_service();
    client.ask(&use_key(ssh(&blob, DATA), 0)).ok::<Bytes>();
    cli(&home, &["key", "detach", "work-cert.pub"]).ok();
    assert_eq!(daemon.connect().list().len(), 1);
    // Ends by itself, and not before it is looked at on a loaded machine.
    let until = run(command("date", &dir).args(["-u", "-d", "+10 seconds", "+%Y%m%d%H%M%SZ"])).ok();
    certify("3", &format!("-1h:{}", until.trim())).ok();
    assert_eq!(daemon.connect().list().len(), 2);
    eventually("the certificate expires", || daemon.connect().list().len() == 1);
    client.ask(&use_key(ssh(&blob_of(&file), DATA), 0)).ok::<Bytes>();
    drop(client);
    daemon.end(Signal::TERM);
    assert_eq!(home.start().connect().list().len(), 1, "and is not back after a restart");
}

#[test]
fn a_successor_has_the_name_and_the_conditions_and_the_old_key_retires() {
    let home = Home::with_cheap_tries();
    let daemon = start(&home);
    let file = imported(&home, "work", &["-t", "ecdsa"], &["--allow", "sign,derive", "--exportable"]);
    let old = blob_of(&file);
    let rotated = cli(&home, &["key", "rotate", "work", "--retire", "30d"]).ok();
    for shown in
        ["authorized_keys", "user.signingkey 'key::ecdsa-sha2-nistp256 ", "PRINCIPALS ecdsa", "is used until 2"]
    {
        assert!(rotated.contains(shown), "{shown} in {rotated}");
    }
    let shown = json(cli(&home, &["keys", "work", "--json"]));
    let new = &shown["keys"][0];
    let word = new["public_key"].as_str().unwrap().split(' ').nth(1).unwrap().to_owned();
    assert_ne!(word, support::public_key(&file));
    assert!(rotated.contains(&word) && rotated.contains(&support::public_key(&file)), "{rotated}");
    assert_eq!(new["operations"], serde_json::json!(["sign", "derive"]));
    assert_eq!(new["traits"], serde_json::json!(["exportable"]));
    let mut client = daemon.connect_service();
    let (name, may, traits, until) = entry(&mut client, &old, |entry| {
        (entry.name.to_owned(), entry.operations.join(","), entry.traits.join(","), entry.not_after)
    });
    assert_eq!((name.as_str(), may.as_str(), traits.as_str()), ("", "derive", "exportable,retired"));
    assert!((now() + 29 * 86_400..now() + 31 * 86_400).contains(&until));
    for key in [&old, &Base64::decode_vec(&word).unwrap()] {
        client.ask(&use_key(ssh(key, DATA), 0)).ok::<Bytes>();
    }
    drop(client);
    daemon.end(Signal::KILL);
    let daemon = home.start();
    assert_eq!(daemon.connect().list().len(), 2);
    // A key of a kind that is not made here has no successor.
    let mut client = daemon.connect_service();
    let refused = client.ask(&Request::Stored(StoredRequest::Rotate { key: b"nobody's", retires: None }));
    assert_eq!(refused.code(), Code::NoSuchKey);
    let name = fingerprint(&old, FingerprintHash::Sha256);
    let delete = ["key", "delete", &name, "--name", &name, "--passphrase-stdin"];
    fed(&home, &delete, PASSPHRASE).ok();
    assert_eq!(daemon.connect().list().len(), 1);
}
