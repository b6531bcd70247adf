//! Backups and transfers between two built daemons: what goes in comes out and signs the same, what may not leave stays,
//! and whoever changes something on the way gets nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64ct::{Base64, Encoding};
use secrecy::ExposeSecret;
use serde_json::Value;
use strongroom::{
    age::SecretKey,
    agent::message::{CarryRequest, Code, Made, Request},
    devices::{Algorithm, NewKey},
    public_key::PublicKey,
    vault::{
        STORE,
        backup::{self, Recipients},
        carried::CarriedKey,
        store::{KeySlot, MasterKey, Metadata, Store},
        stored::NewStored,
    },
};
use support::{
    Outcome,
    cli::{fed, json},
    client::Client,
    command,
    daemon::{Daemon, Home},
    run,
    service::{Bytes, ssh, use_key},
    terminal::Terminal,
};
use zeroize::Zeroizing;

const PASSPHRASE: &str = "correct horse battery staple";
const DATA: &[u8] = b"what is signed";

/// `strongroom` with these words, and the store's passphrase on its standard input.
fn proven(home: &Home, line: &str) -> Outcome {
    let words: Vec<_> = line.split_whitespace().chain(["--passphrase-stdin"]).collect();
    fed(home, &words, PASSPHRASE)
}

/// Makes the store, and puts its recovery key into a file, as age-keygen writes them.
fn init(home: &Home) -> String {
    let made = json(fed(home, &["init", "--stdin", "--json"], PASSPHRASE));
    let key = made["recovery_key"].as_str().unwrap().to_owned();
    fs::write(home.path("recovery"), format!("# created: today\n{key}\n")).unwrap();
    key
}

/// A daemon with a store.
fn vault(home: &Home) -> Daemon<'_> {
    let daemon = home.start();
    init(home);
    daemon
}

fn generate(client: &mut Client, label: &str, exportable: bool) -> Vec<u8> {
    let terms = NewStored { exportable, ..NewStored::default() };
    let new = NewKey::new(label, Algorithm::Ed25519);
    client.ask(&Request::Generate { deadline: None, device: STORE, new, terms }).ok::<Made<'_>>().blob.to_vec()
}

/// What a key signs; Ed25519 signs the same twice.
fn signature(client: &mut Client, key: &[u8]) -> Vec<u8> {
    client.ask(&use_key(ssh(key, DATA), 0)).ok::<Bytes>().to_vec()
}

fn names(home: &Home) -> Vec<String> {
    let keys = json(fed(home, &["keys", "--json"], ""));
    let mut names: Vec<_> =
        keys["keys"].as_array().unwrap().iter().map(|key| key["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

fn copy(from: &Home, to: &Home, name: &str) {
    fs::copy(from.path(name), to.path(name)).unwrap();
}

#[test]
fn a_backup_is_restored_in_another_vault_and_signs_the_same() {
    let (first, second) = (Home::with_cheap_tries(), Home::with_cheap_tries());
    let (daemon, other) = (vault(&first), vault(&second));
    let mut client = daemon.connect_service();
    let keys = [generate(&mut client, "free", true), generate(&mut client, "bound", false)];
    let signed = keys.each_ref().map(|key| signature(&mut client, key));

    // The passphrase is asked for, although the store is open.
    fed(&first, &["backup", "b.age", "--passphrase-stdin"], "wrong").fails_with(6);
    assert!(!first.path("b.age").exists());
    assert!(proven(&first, "backup b.age").ok().contains("2 keys are in b.age"));
    assert_eq!(fs::metadata(first.path("b.age")).unwrap().permissions().mode() & 0o777, 0o600);
    let before = fs::read(first.path("b.age")).unwrap();
    assert!(proven(&first, "backup b.age").fails_with(2).stderr.contains("--force overwrites it"));
    assert_eq!(fs::read(first.path("b.age")).unwrap(), before);
    proven(&first, "backup b.age --force").ok();
    assert_ne!(fs::read(first.path("b.age")).unwrap(), before);

    // age opens it with the recovery key.
    let plain = run(command("age", &first.path("")).args(["-d", "-i", "recovery", "-o", "plain", "b.age"]));
    plain.ok();
    assert!(fs::read(first.path("plain")).unwrap().starts_with(b"strongroom keys 1\n"));

    copy(&first, &second, "b.age");
    let wrong = proven(&second, "restore b.age --identity recovery").fails_with(2);
    assert!(wrong.stderr.contains("not encrypted to this key"), "{wrong:?}");
    assert_eq!(names(&second), Vec::<String>::new());
    copy(&first, &second, "recovery");
    assert!(proven(&second, "restore b.age --identity recovery").ok().contains("2 keys are new in the store.\n"));
    let again = proven(&second, "restore b.age --identity recovery").ok();
    assert!(again.contains("0 keys are new in the store; 2 were here"), "{again}");
    let mut client = other.connect_service();
    assert_eq!(keys.each_ref().map(|key| signature(&mut client, key)), signed);
    assert_eq!(names(&second), ["bound", "free"]);
    // What was not exportable is not here either.
    let refused = proven(&second, &format!("backup c.age --to {}", recipient(&second)));
    assert!(refused.stderr.contains("1 key is not exportable"), "{refused:?}");
    for (home, operation) in [(&first, "\"operation\":\"backup\""), (&second, "\"operation\":\"restore\"")] {
        assert!(home.audit().contains(operation), "{operation} was not written down");
    }
}

/// A new age key of somebody else's, in a file of this name.
fn recipient(home: &Home) -> String {
    run(command("age-keygen", &home.path("")).args(["-o", "other"])).ok();
    run(command("age-keygen", &home.path("")).args(["-y", "other"])).ok().trim().to_owned()
}

#[test]
fn under_another_recipient_goes_only_what_may_leave() {
    let home = Home::with_cheap_tries();
    let daemon = vault(&home);
    let mut client = daemon.connect_service();
    generate(&mut client, "bound", false);
    let to = recipient(&home);
    let nothing = proven(&home, &format!("backup none.age --to {to}"));
    assert!(nothing.ok().contains("0 keys are in none.age"));
    generate(&mut client, "free", true);
    let told = json(proven(&home, &format!("backup b.age --to {to} --json")));
    assert_eq!((&told["keys"], &told["left_out"]), (&1.into(), &1.into()));
    for key in ["recovery", "other"] {
        run(command("age", &home.path("")).args(["-d", "-i", key, "-o", "plain", "b.age"])).ok();
        let plain = fs::read(home.path("plain")).unwrap();
        assert!(plain.windows(4).any(|window| window == b"free") && !plain.windows(5).any(|window| window == b"bound"));
    }
    assert!(proven(&home, "backup c.age --to age1nobody").fails_with(2).stderr.contains("mistyped"));
    // A damaged backup restores nothing.
    let mut bytes = fs::read(home.path("b.age")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(home.path("b.age"), bytes).unwrap();
    assert!(proven(&home, "restore b.age -i other").fails_with(2).stderr.contains("changed or cut off"));
}

/// Many keys take several frames each way, and one change of the state file.
#[test]
fn thousands_of_keys_go_in_and_out() {
    const COUNT: usize = 2000;
    let home = Home::with_cheap_tries();
    let _daemon = vault(&home);
    let keys: Vec<_> = (0..COUNT).map(carried).collect();
    let own = SecretKey::generate().unwrap();
    let recipients = Recipients { recovery: vec![own.recipient().unwrap()], others: Vec::new() };
    fs::write(home.path("in.age"), backup::write(&keys, &recipients, 1).unwrap()).unwrap();
    fs::write(home.path("own"), own.to_text().as_bytes()).unwrap();
    let told = json(proven(&home, "restore in.age -i own --json"));
    assert_eq!((&told["new"], &told["damaged"]), (&COUNT.into(), &0.into()));
    assert!(json(proven(&home, "backup out.age --json"))["keys"] == COUNT);
    let text = fs::read_to_string(home.path("recovery")).unwrap();
    let recovery = SecretKey::parse(text.lines().last().unwrap()).unwrap();
    let (_, back) = backup::read(&fs::read(home.path("out.age")).unwrap(), &recovery).unwrap();
    let names = |keys: &[CarriedKey]| keys.iter().map(|key| key.metadata.name.clone()).collect::<BTreeSet<_>>();
    assert_eq!(names(&back), names(&keys));
}

/// An Ed25519 key that is known by its number.
fn carried(n: usize) -> CarriedKey {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&n.to_be_bytes());
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let blob = PublicKey::Ed25519(pair.public_key().as_ref()).to_blob().into();
    let metadata = Metadata { blob, name: format!("key {n}").into(), enabled: true, ..Metadata::default() };
    CarriedKey { metadata, secret: Zeroizing::new(seed.to_vec()) }
}

/// Whoever can write the state file, and not open it, has no backup encrypted to himself.
#[test]
fn a_recovery_slot_from_elsewhere_reads_no_backup() {
    let home = Home::with_cheap_tries();
    let daemon = vault(&home);
    generate(&mut daemon.connect_service(), "deploy", true);
    drop(daemon);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let his = runtime.block_on(async {
        let store = Store::open(&home.path("state")).unwrap().store;
        let (slot, his) = KeySlot::recovery(9, "", 1, &MasterKey::generate().unwrap()).unwrap();
        store.add_slot(slot).await.unwrap();
        store.close().await;
        his
    });
    fs::write(home.path("his"), his.expose_secret()).unwrap();
    let _daemon = home.start();
    assert!(proven(&home, "backup b.age").ok().contains("1 key is in b.age"));
    let open = |key: &str| run(command("age", &home.path("")).args(["-d", "-i", key, "-o", "plain", "b.age"]));
    open("recovery").ok();
    assert!(open("his").stderr.contains("no identity matched"));
    assert!(home.log().contains("a recovery slot that this store did not write"));
}

/// While keys are made, each backup has those that were there when it began, whole.
#[test]
fn a_backup_is_consistent_while_keys_come_and_go() {
    let home = Home::with_cheap_tries();
    let daemon = vault(&home);
    let mut client = daemon.connect_service();
    let mut made = 0;
    std::thread::scope(|scope| {
        let backups = scope.spawn(|| {
            let count = |n: u64| json(proven(&home, &format!("backup {n}.age --json")))["keys"].as_u64().unwrap();
            (0..5).map(count).collect::<Vec<_>>()
        });
        while !backups.is_finished() {
            generate(&mut client, &format!("key {made}"), true);
            made += 1;
        }
        let counts = backups.join().unwrap();
        assert!(counts.is_sorted() && counts[4] <= made, "{counts:?} of {made}");
    });
    for n in 0..5 {
        let told = json(proven(&home, &format!("restore {n}.age -i recovery --json")));
        assert_eq!((&told["new"], &told["damaged"]), (&0.into(), &0.into()), "{n}");
    }
}

/// The fingerprint in what a command has printed.
fn fingerprint(told: &Value) -> String {
    told["fingerprint"].as_str().unwrap().to_owned()
}

#[test]
fn keys_are_transferred_between_two_vaults_once() {
    let (source, target) = (Home::with_cheap_tries(), Home::with_cheap_tries());
    let (daemon, other) = (vault(&source), vault(&target));
    let mut client = daemon.connect_service();
    let keys = [generate(&mut client, "deploy", true), generate(&mut client, "signing", true)];
    generate(&mut client, "bound", false);
    let signed = keys.each_ref().map(|key| signature(&mut client, key));

    let offered = fingerprint(&json(proven(&target, "transfer offer offer --name target --json")));
    copy(&target, &source, "offer");
    let wrong = proven(&source, "transfer wrap offer wrap deploy --fingerprint SHA256:other");
    assert!(wrong.fails_with(2).stderr.contains("nothing was transferred"));
    let bound = proven(&source, &format!("transfer wrap offer wrap deploy bound --fingerprint {offered}"));
    assert!(bound.fails_with(3).stderr.contains("1 of these keys cannot leave the store"));
    assert!(!source.path("wrap").exists());
    let wrap = format!("transfer wrap offer wrap deploy signing --fingerprint {offered} --json");
    let wrapped = json(proven(&source, &wrap));
    assert_eq!(wrapped["keys"], 2);
    let both = fingerprint(&wrapped);
    copy(&source, &target, "wrap");

    // Neither another fingerprint nor a changed wrap.
    proven(&target, &format!("transfer accept wrap --fingerprint {offered}")).fails_with(2);
    let changed = changed_armour(&target.path("wrap"));
    fs::write(target.path("changed"), &changed).unwrap();
    proven(&target, &format!("transfer accept changed --fingerprint {both}")).fails_with(2);
    // Not even for who does not compare.
    let of_changed = run_look(&target, "changed");
    let refused = proven(&target, &format!("transfer accept changed --fingerprint {of_changed}"));
    assert!(refused.fails_with(2).stderr.contains("was changed on its way"));
    assert_eq!(names(&target), Vec::<String>::new());

    let accepted = proven(&target, &format!("transfer accept wrap --fingerprint {both}"));
    assert!(accepted.ok().contains("2 keys are new in the store"));
    let mut client = other.connect_service();
    assert_eq!(keys.each_ref().map(|key| signature(&mut client, key)), signed);
    assert_eq!(names(&target), ["deploy", "signing"]);
    // The offer's key is gone, from the disk too.
    let again = proven(&target, &format!("transfer accept wrap --fingerprint {both}"));
    assert!(again.fails_with(2).stderr.contains("none of this vault's offers"));
    drop((client, other));
    let _other = target.start();
    let again = proven(&target, &format!("transfer accept wrap --fingerprint {both}"));
    assert!(again.fails_with(2).stderr.contains("none of this vault's offers"));
    for (home, operation) in [(&source, "transfer-wrap"), (&target, "transfer-offer"), (&target, "transfer-accept")] {
        assert!(home.audit().contains(&format!("\"operation\":\"{operation}\"")), "{operation} was not written down");
    }
}

/// The fingerprint that `transfer accept` shows, when a wrong one was given.
fn run_look(home: &Home, file: &str) -> String {
    let refused = proven(home, &format!("transfer accept {file} --fingerprint SHA256:none")).fails_with(2);
    refused.stderr.split("the fingerprint is ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// The file with one bit of its ciphertext changed.
fn changed_armour(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let mut bytes = Base64::decode_vec(&lines[1..lines.len() - 1].concat()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    format!("{}\n{}\n{}\n", lines[0], Base64::encode_string(&bytes), lines[lines.len() - 1])
}

/// An offer survives a restart of the target, and a person is asked on the terminal.
#[test]
fn people_compare_fingerprints_on_the_terminal() {
    let (source, target) = (Home::with_cheap_tries(), Home::with_cheap_tries());
    let (daemon, other) = (vault(&source), vault(&target));
    generate(&mut daemon.connect_service(), "deploy", true);
    let told = proven(&target, "transfer offer offer --name target").ok();
    let offered = told.split_whitespace().find(|word| word.starts_with("SHA256:")).unwrap().to_owned();
    drop(other);
    let _other = target.start();
    copy(&target, &source, "offer");
    let mut terminal = Terminal::start(&source, "transfer wrap offer wrap deploy");
    terminal.shows("calls itself `target`");
    terminal.shows(&offered);
    terminal.types("no\r");
    assert_eq!(terminal.ends().0, Some(2));
    let mut terminal = Terminal::start(&source, "transfer wrap offer wrap deploy");
    terminal.shows(&offered);
    terminal.types("yes\r");
    terminal.shows("Passphrase of the store: ");
    terminal.types("wrong\r");
    terminal.shows("That is not it. Passphrase");
    terminal.types(&format!("{PASSPHRASE}\r"));
    let (code, shown) = terminal.ends();
    assert_eq!(code, Some(0), "{shown}");
    let both = shown.split_whitespace().rfind(|word| word.starts_with("SHA256:")).unwrap().to_owned();
    copy(&source, &target, "wrap");
    let mut terminal = Terminal::start(&target, "transfer accept wrap");
    terminal.shows(&both);
    terminal.types("yes\r");
    terminal.shows("Passphrase of the store: ");
    // The wrap is still there for the next attempt.
    terminal.types("wrong\r");
    terminal.shows("That is not it. Passphrase");
    terminal.types(&format!("{PASSPHRASE}\r"));
    let (code, shown) = terminal.ends();
    assert_eq!((code, shown.contains("1 key is new in the store")), (Some(0), true), "{shown}");
}

#[test]
fn pieces_have_their_order_and_their_bounds() {
    let home = Home::with_cheap_tries();
    let daemon = vault(&home);
    let mut client = daemon.connect_service();
    let piece = |offset, bytes| Request::Carry(CarryRequest::Upload { offset, bytes });
    assert_eq!(client.ask(&piece(1, b"late")).code(), Code::BadRequest);
    client.ask(&piece(0, b"one")).ok::<()>();
    assert_eq!(client.ask(&piece(2, b"two")).code(), Code::BadRequest);
    // What is no backup is none, and a connection that holds nothing restores nothing.
    let restore = || Request::Carry(CarryRequest::Restore { proof: PASSPHRASE.into(), key: "AGE-SECRET-KEY-1".into() });
    assert_eq!(client.ask(&restore()).code(), Code::BadRequest);
    assert_eq!(client.ask(&Request::Carry(CarryRequest::TransferLook)).code(), Code::BadRequest);
    assert!(client.ask(&Request::Carry(CarryRequest::Fetch(u64::MAX))).ok::<Bytes>().is_empty());
    // Four connections hold something; a fifth waits for its turn until one of them is gone.
    let mut others: Vec<_> = (0..3).map(|_| daemon.connect_service()).collect();
    for other in &mut others {
        other.ask(&piece(0, b"x")).ok::<()>();
    }
    let mut fifth = daemon.connect_service();
    assert_eq!(fifth.ask(&piece(0, b"x")).code(), Code::Busy);
    drop(others);
    support::eventually("a place is free", || fifth.ask(&piece(0, b"x")).read::<()>().is_ok());
}
