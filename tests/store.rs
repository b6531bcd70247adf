//! The encrypted store of the built daemon: made, opened by one prompt for all, locked by hand, by a signal and by time;
//! keys that outlive kill -9 and sign for ssh-keygen; slots; and what nobody finds in the memory of a locked store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding};
use rustix::process::Signal;
use strongroom::{
    agent::message::{Code, How, KeyEntry, KeyUse, Made, Page, Request, StoreRequest, Target},
    devices::{Algorithm, NewKey, Scheme, Signature, soft::SoftKey, verify::verify},
    public_key::{Curve, FingerprintHash, PublicKey, fingerprint},
    vault::{
        MEMORY, Move, STORE,
        key::Grants,
        store::{KeySlot, MasterKey, Metadata, Store},
        stored::NewStored,
    },
};
use support::{
    Outcome,
    agent::memory_contains,
    askpass::Askpass,
    cli::{fed, json},
    client::{CONFIRM, Client, Key, LOCK, SUCCESS, UNLOCK, message},
    command,
    daemon::Home,
    eventually, keygen, run,
    service::{Bytes, first_page, sign, ssh, to, use_key},
    soft,
    terminal::Terminal,
};

const PASSPHRASE: &str = "correct horse battery staple";
const DATA: &[u8] = b"what is signed";

fn cli(home: &Home, words: &[&str]) -> Outcome {
    fed(home, words, "")
}

/// Makes the store, and gives the recovery key.
#[track_caller]
fn init(home: &Home) -> String {
    let made = json(fed(home, &["init", "--stdin", "--json"], PASSPHRASE));
    made["recovery_key"].as_str().unwrap().to_owned()
}

fn state(home: &Home) -> String {
    json(cli(home, &["status", "--json"]))["store"]["state"].as_str().unwrap().to_owned()
}

fn unlock(home: &Home, secret: &str) -> Outcome {
    fed(home, &["unlock", "store", "--stdin"], secret)
}

fn generate(client: &mut Client, algorithm: Algorithm, label: &str, terms: NewStored) -> Vec<u8> {
    let request = Request::Generate { deadline: None, device: STORE, new: NewKey::new(label, algorithm), terms };
    client.ask(&request).ok::<Made<'_>>().blob.to_vec()
}

fn ed25519(client: &mut Client, label: &str) -> Vec<u8> {
    generate(client, Algorithm::Ed25519, label, NewStored::default())
}

/// Puts a key into memory, and from there into the store.
fn kept(client: &mut Client, key: &Key, constraints: &[u8]) {
    client.add(key, "kept", constraints);
    client.ask(&Request::Import { deadline: None, key: &key.blob(), to: to(STORE) }).ok::<Made<'_>>();
}

fn entry<T>(client: &mut Client, key: &[u8], look: impl FnOnce(&KeyEntry<'_>) -> T) -> T {
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    look(page.entries.iter().find(|entry| entry.blob == key).expect("the key is listed"))
}

fn places(client: &mut Client, key: &[u8]) -> Vec<(String, String)> {
    let place = |entry: &KeyEntry<'_>| {
        entry.places.iter().map(|place| (place.device.to_owned(), place.state.to_owned())).collect()
    };
    entry(client, key, place)
}

#[track_caller]
fn signs(client: &mut Client, key: &[u8]) {
    client.ask(&use_key(ssh(key, DATA), 0)).read::<Bytes>().unwrap();
}

/// `ssh-keygen -Y sign` by way of the ssh door, and whether `ssh-keygen -Y check-novalidate` believes it.
fn sign_file(home: &Home, public: &Path) -> Outcome {
    fs::write(home.path("m"), DATA).unwrap();
    let _ = fs::remove_file(home.path("m.sig"));
    let mut keygen = command("ssh-keygen", &home.path(""));
    keygen.env("SSH_AUTH_SOCK", home.path("agent")).args(["-Y", "sign", "-n", "test", "-f"]).arg(public).arg("m");
    let signed = run(&mut keygen);
    if signed.code == Some(0) {
        let mut check = command("ssh-keygen", &home.path(""));
        check
            .args(["-Y", "check-novalidate", "-n", "test", "-s", "m.sig"])
            .stdin(fs::File::open(home.path("m")).unwrap());
        run(&mut check).ok();
    }
    signed
}

fn public_file(home: &Home, blob: &[u8]) -> PathBuf {
    let path = home.path(&format!("{}.pub", fingerprint(blob, FingerprintHash::Sha256).replace(['/', ':'], "_")));
    let name = PublicKey::parse(blob).unwrap().key_type().name();
    fs::write(&path, format!("{name} {} stored\n", Base64::encode_string(blob))).unwrap();
    path
}

#[test]
fn keys_of_every_kind_outlive_the_daemon_and_one_prompt_opens_them_for_ssh() {
    let mut askpass = Askpass::new();
    let mut home = Home::with_cheap_tries();
    home.askpass(&askpass);
    let daemon = home.start();
    assert_eq!(state(&home), "none");
    let refused = cli(&home, &["key", "generate", "store", "ed25519"]);
    assert!(refused.stderr.contains("`strongroom init` makes one"), "{refused:?}");
    init(&home);
    let mut client = daemon.connect_service();
    let sign_too = NewStored { grants: Grants { sign: true, ..Grants::NONE }, ..NewStored::default() };
    let keys: Vec<_> = [
        (Algorithm::Ed25519, Scheme::Ed25519),
        (Algorithm::Ecdsa(Curve::P256), Scheme::Ecdsa(strongroom::devices::Hash::Sha256)),
        (Algorithm::Ecdsa(Curve::P521), Scheme::Ecdsa(strongroom::devices::Hash::Sha512)),
        (Algorithm::Rsa(2048), Scheme::RsaPss(strongroom::devices::Hash::Sha256)),
    ]
    .map(|(algorithm, scheme)| (generate(&mut client, algorithm, &algorithm.to_string(), sign_too), scheme))
    .into();
    let composite = generate(&mut client, Algorithm::MlDsa44Ed25519, "composite", NewStored::default());
    generate(&mut client, Algorithm::X25519, "agreement", NewStored::default());
    drop(client);
    daemon.end(Signal::KILL);

    let daemon = home.start();
    assert_eq!(state(&home), "locked");
    let mut client = daemon.connect_service();
    assert_eq!(places(&mut client, &composite), [("store".to_owned(), "locked".to_owned())]);
    assert_eq!(daemon.connect().list().len(), 5, "ssh is offered all but the X25519 key");
    let public = public_file(&home, &keys[0].0);
    let signed = std::thread::scope(|scope| {
        let signed = scope.spawn(|| sign_file(&home, &public));
        let prompt = askpass.next();
        assert!(prompt.text.starts_with("Passphrase of the encrypted store\nrequested by "), "{prompt:?}");
        askpass.answer(0, PASSPHRASE);
        signed.join().unwrap()
    });
    signed.ok();
    for (key, scheme) in &keys {
        sign_file(&home, &public_file(&home, key)).ok();
        let bytes = client.ask(&use_key(sign(key, *scheme, DATA), 0)).bytes();
        let signature = Signature::from_bytes(*scheme, PublicKey::parse(key).unwrap().key_type(), bytes).unwrap();
        assert!(verify(key, *scheme, &soft::message(DATA), &signature), "{scheme:?}");
    }
    signs(&mut client, &composite);
    assert!(!askpass.has_asked());
    for line in ["\"operation\":\"init\"", "\"operation\":\"unlock\"", "\"operation\":\"generate\""] {
        assert!(home.audit().contains(line), "{line} was not written down");
    }
}

#[test]
fn a_hundred_requests_make_one_prompt_and_each_has_its_own_deadline() {
    let mut askpass = Askpass::new();
    let mut home = Home::with_cheap_tries();
    home.askpass(&askpass);
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    cli(&home, &["lock"]).ok();
    for id in 0..100 {
        client.submit(id, ssh(&key, DATA), 0);
    }
    let prompt = askpass.next();
    // One that has less patience is answered while the others wait.
    let mut hasty = daemon.connect_service();
    assert_eq!(hasty.ask(&use_key(ssh(&key, DATA), 300)).code(), Code::Timeout);
    assert!(client.collect(Duration::ZERO, 0).finished.is_empty());
    askpass.answer(0, PASSPHRASE);
    for finished in client.collect_all(100) {
        assert!(finished.reply.is_ok(), "{finished:?}");
    }
    prompt.wait_gone();
    assert!(!askpass.has_asked());

    // Nobody waits any more: the prompt goes. One who unlocks by hand answers it, too.
    cli(&home, &["lock"]).ok();
    let mut gone = daemon.connect_service();
    gone.tell(&use_key(ssh(&key, DATA), 0));
    let prompt = askpass.next();
    drop(gone);
    prompt.wait_gone();
    client.tell(&use_key(ssh(&key, DATA), 0));
    let prompt = askpass.next();
    unlock(&home, PASSPHRASE).ok();
    client.hear(strongroom::agent::message::Name::Sign).ok::<Bytes>();
    prompt.wait_gone();
}

#[test]
fn a_wrong_passphrase_is_asked_for_again_and_a_no_is_a_no() {
    let mut askpass = Askpass::new();
    let mut home = Home::with_cheap_tries();
    home.askpass(&askpass);
    let daemon = home.start();
    let recovery = init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    cli(&home, &["lock"]).ok();
    client.tell(&use_key(ssh(&key, DATA), 0));
    for n in 0..3 {
        let prompt = askpass.next();
        assert_eq!(prompt.text.starts_with("That is not it. "), n > 0, "{prompt:?}");
        askpass.answer(0, "wrong");
    }
    let refused = client.hear(strongroom::agent::message::Name::Sign);
    assert_eq!(refused.code(), Code::WrongPassword);
    assert!(!askpass.has_asked());
    client.tell(&use_key(ssh(&key, DATA), 0));
    askpass.next();
    askpass.answer(1, "");
    assert_eq!(client.hear(strongroom::agent::message::Name::Sign).code(), Code::Denied);

    unlock(&home, "wrong").fails_with(6);
    assert_eq!(state(&home), "locked");
    // The recovery key opens it, in whatever case and with the spaces of a paste.
    unlock(&home, &format!("  {}  ", recovery.to_lowercase())).ok();
    signs(&mut client, &key);
    let refusals = home.audit();
    assert!(refusals.contains("\"operation\":\"unlock\"") && refusals.contains("\"outcome\":\"wrong_password\""));
}

#[test]
fn without_a_prompt_the_refusal_says_what_unlocks() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    cli(&home, &["lock"]).ok();
    let failure = client.ask(&use_key(ssh(&key, DATA), 0)).failure();
    assert_eq!(failure.code, Code::NoPrompt);
    assert!(failure.message.contains("`strongroom unlock` unlocks it"), "{failure:?}");
}

#[test]
fn a_person_makes_a_store_on_the_terminal() {
    let home = Home::with_cheap_tries();
    let _daemon = home.start();
    let mut terminal = Terminal::start(&home, "init");
    terminal.shows("New passphrase: ");
    terminal.types("letmein\n");
    terminal.shows("Very weak: ");
    terminal.shows("The same again: ");
    terminal.types("letmeon\n");
    terminal.shows("The two differ.");
    for question in ["New passphrase: ", "The same again: "] {
        terminal.seen.clear();
        terminal.shows(question);
        terminal.types("letmein\n");
    }
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    let recovery = seen.split_whitespace().find(|word| word.starts_with("AGE-SECRET-KEY-1")).expect("a recovery key");
    assert!(!seen.contains("letmein"), "{seen}");
    cli(&home, &["lock"]).ok();
    unlock(&home, recovery).ok();
    let mut terminal = Terminal::start(&home, "key generate store rsa-2048");
    terminal.shows("Making an RSA key with 2048 bits .");
    terminal.shows("ssh-rsa ");
    assert_eq!(terminal.ends().0, Some(0));
    let again = cli(&home, &["init"]).fails_with(10);
    assert!(again.stderr.contains("there is an encrypted store already"), "{again:?}");

    let mut terminal = Terminal::start(&home, "passphrase");
    terminal.shows("Passphrase of the store, or its recovery key: ");
    terminal.types("letmein\n");
    terminal.shows("New passphrase: ");
    terminal.types("correct horse battery staple lamp river\n");
    terminal.shows("Strong: ");
    terminal.shows("The same again: ");
    terminal.types("correct horse battery staple lamp river\n");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    cli(&home, &["lock"]).ok();
    unlock(&home, "letmein").fails_with(6);
    unlock(&home, "correct horse battery staple lamp river").ok();
}

#[test]
fn each_slot_opens_the_store_and_the_last_one_stays() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let file = home.path("key");
    fs::write(&file, [7; 32]).unwrap();
    let add =
        |words: &[&str]| fed(&home, &[&["slot", "add"], words, &["--passphrase-stdin", "--json"]].concat(), PASSPHRASE);
    let short = home.path("short");
    fs::write(&short, [7; 31]).unwrap();
    let refused = add(&["key-file", short.to_str().unwrap()]).fails_with(2);
    assert!(refused.stderr.contains("32 bytes to 64 KiB"), "{refused:?}");
    assert_eq!(json(add(&["key-file", file.to_str().unwrap(), "--label", "boot"]))["slot"], 2);
    let paper = json(add(&["recovery", "--label", "paper"]));
    assert_eq!(paper["slot"], 3);
    let listed = cli(&home, &["slot", "list"]).ok();
    for shown in ["passphrase", "recovery", "key-file", "boot", "age1", file.to_str().unwrap()] {
        assert!(listed.contains(shown), "{shown} in {listed}");
    }
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    drop(client);
    daemon.end(Signal::TERM);

    // The daemon finds the key file at its start, and asks nobody.
    let daemon = home.start();
    eventually("the store is open", || state(&home) == "open");
    signs(&mut daemon.connect_service(), &key);
    cli(&home, &["lock"]).ok();
    unlock(&home, paper["recovery_key"].as_str().unwrap()).ok();

    let remove =
        |number: &str, secret: &str| fed(&home, &["slot", "remove", number, "--yes", "--passphrase-stdin"], secret);
    remove("2", "wrong").fails_with(6);
    remove("9", PASSPHRASE).fails_with(4);
    for number in ["2", "1", "0"] {
        remove(number, PASSPHRASE).ok();
    }
    unlock(&home, PASSPHRASE).fails_with(6);
    let last = remove("3", paper["recovery_key"].as_str().unwrap()).fails_with(3);
    assert!(last.stderr.contains("add another first"), "{last:?}");
    for line in ["add-slot", "remove-slot"] {
        assert!(home.audit().contains(&format!("\"operation\":\"{line}\"")), "{line} was not written down");
    }
}

#[test]
fn a_key_file_that_is_a_pipe_keeps_nothing_waiting() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let add = |file: &Path| {
        fed(&home, &["slot", "add", "key-file", file.to_str().unwrap(), "--passphrase-stdin"], PASSPHRASE)
    };
    let (first, second) = (home.path("first"), home.path("second"));
    let pipe = |path: &Path| assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    pipe(&first);
    let refused = add(&first).fails_with(2);
    assert!(refused.stderr.contains("no regular file"), "{refused:?}");
    fs::remove_file(&first).unwrap();
    for file in [&first, &second] {
        fs::write(file, [7; 32]).unwrap();
        add(file).ok();
    }
    daemon.end(Signal::TERM);

    // At the start the next slot is tried.
    fs::remove_file(&first).unwrap();
    pipe(&first);
    let daemon = home.start();
    eventually("the store is open", || state(&home) == "open");
    daemon.logs("no regular file");
}

#[test]
fn a_credential_of_systemd_opens_the_store_at_the_start() {
    let mut home = Home::with_cheap_tries();
    let credentials = home.path("credentials");
    fs::create_dir(&credentials).unwrap();
    fs::write(credentials.join("boot"), [9; 48]).unwrap();
    home.env("CREDENTIALS_DIRECTORY", &credentials);
    let daemon = home.start();
    init(&home);
    let add = |name: &str| fed(&home, &["slot", "add", "credential", name, "--passphrase-stdin"], PASSPHRASE);
    let refused = add("none").fails_with(2);
    assert!(refused.stderr.contains("No such file"), "{refused:?}");
    add("../boot").fails_with(2);
    add("boot").ok();
    let key = ed25519(&mut daemon.connect_service(), "work");
    daemon.end(Signal::KILL);

    let daemon = home.start();
    eventually("the store is open", || state(&home) == "open");
    signs(&mut daemon.connect_service(), &key);
    daemon.end(Signal::TERM);
    // Without it a person is asked, and that is no error.
    fs::write(credentials.join("boot"), [8; 48]).unwrap();
    let daemon = home.start();
    daemon.logs("it does not open the store");
    assert_eq!(state(&home), "locked");
}

#[test]
fn what_carries_keys_away_or_loosens_them_takes_the_passphrase_each_time() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    let allow = |proof: Option<&str>| Request::Allow {
        key: &key,
        operations: Grants { sign: true, ..Grants::NONE },
        proof: proof.map(Into::into),
    };
    let delete =
        |proof: Option<&str>| Request::Delete { key: &key, device: STORE, name: "work", proof: proof.map(Into::into) };
    for (request, wrong) in [(allow(None), allow(Some("wrong"))), (delete(None), delete(Some("wrong")))] {
        assert_eq!(client.ask(&request).code(), Code::ProofRequired, "the store is open");
        assert_eq!(client.ask(&wrong).code(), Code::WrongPassword);
    }
    client.ask(&allow(Some(PASSPHRASE))).ok::<()>();
    client.ask(&use_key(sign(&key, Scheme::Ed25519, DATA), 0)).bytes();
    // Less needs none, and lasts.
    client.ask(&Request::Allow { key: &key, operations: Grants::NONE, proof: None }).ok::<()>();
    client.ask(&allow(Some(PASSPHRASE))).ok::<()>();
    client.ask(&Request::Rename { key: &key, name: "renamed" }).ok::<()>();
    drop(client);
    daemon.end(Signal::KILL);

    let daemon = home.start();
    let mut client = daemon.connect_service();
    let (name, may) = entry(&mut client, &key, |entry| (entry.name.to_owned(), entry.operations.join(",")));
    assert_eq!((name.as_str(), may.as_str()), ("renamed", "sign"));
    // The passphrase is proof while the store is locked, and does not open it.
    let named = Request::Delete { key: &key, device: STORE, name: "wrong", proof: Some(PASSPHRASE.into()) };
    assert_eq!(client.ask(&named).code(), Code::BadRequest);
    fed(&home, &["key", "delete", "renamed", "--name", "renamed", "--passphrase-stdin"], PASSPHRASE).ok();
    assert_eq!(state(&home), "locked");
    assert!(daemon.connect().list().is_empty());
    drop(client);
    daemon.end(Signal::KILL);
    let daemon = home.start();
    assert!(daemon.connect().list().is_empty());
}

#[test]
fn a_key_from_ssh_add_is_kept_with_its_conditions_and_certificate() {
    let mut askpass = Askpass::new();
    let mut home = Home::with_cheap_tries();
    home.askpass(&askpass);
    let daemon = home.start();
    init(&home);
    let dir = home.path("");
    let (ca, user) = (keygen(&dir, "ca", &["-t", "ed25519"]), keygen(&dir, "user", &["-t", "ecdsa"]));
    run(command("ssh-keygen", &dir)
        .args(["-q", "-s"])
        .arg(&ca)
        .args(["-I", "me", "-n", "me", "-V", "+1h", "user.pub"]))
    .ok();
    daemon.ssh_add(&["-q", "-c", user.to_str().unwrap()]).ok();
    assert_eq!(daemon.connect().list().len(), 2);
    cli(&home, &["key", "keep", "user", "--label", "work"]).ok();
    let refused = daemon.ssh_add(&["-d", user.to_str().unwrap()]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(cli(&home, &["why"]).ok().contains("`strongroom key delete`"));
    daemon.ssh_add(&["-D"]).ok();
    daemon.end(Signal::KILL);

    let daemon = home.start();
    unlock(&home, PASSPHRASE).ok();
    assert_eq!(daemon.connect().list().len(), 2, "the key and its certificate");
    let mut client = daemon.connect_service();
    let blob = Base64::decode_vec(&support::public_key(&user)).unwrap();
    assert_eq!(places(&mut client, &blob), [("store".to_owned(), "ready".to_owned())]);
    client.tell(&use_key(KeyUse { key: &blob, how: How::Ssh { flags: 0, data: DATA } }, 0));
    let prompt = askpass.next();
    assert_eq!(prompt.kind, "confirm");
    askpass.answer(0, "");
    client.hear(strongroom::agent::message::Name::Sign).ok::<Bytes>();
    // What is there already is not brought there again under fewer conditions.
    daemon.ssh_add(&["-q", user.to_str().unwrap()]).ok();
    let again = client.ask(&Request::Import { deadline: None, key: &blob, to: to(STORE) });
    assert_eq!(again.code(), Code::Unsupported);
}

#[test]
fn ssh_add_locks_the_store_with_the_rest_and_brings_it_back() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    let mut plain = daemon.connect();
    for _ in 0..2 {
        assert_eq!(plain.request(&message(LOCK, &[b"secret"])), [SUCCESS]);
        assert_eq!(client.ask(&use_key(ssh(&key, DATA), 0)).code(), Code::Locked);
        assert_eq!(plain.request(&message(UNLOCK, &[b"secret"])), [SUCCESS]);
        signs(&mut client, &key);
    }
    // What was locked before stays so.
    cli(&home, &["lock"]).ok();
    assert_eq!(plain.request(&message(LOCK, &[b"secret"])), [SUCCESS]);
    assert_eq!(plain.request(&message(UNLOCK, &[b"secret"])), [SUCCESS]);
    assert_eq!(state(&home), "locked");
    // And so does what was locked meanwhile.
    unlock(&home, PASSPHRASE).ok();
    assert_eq!(plain.request(&message(LOCK, &[b"secret"])), [SUCCESS]);
    daemon.signal(Signal::USR2);
    daemon.logs("the store is locked");
    eventually("it is written down", || home.audit().matches("\"operation\":\"lock\"").count() >= 5);
    assert_eq!(plain.request(&message(UNLOCK, &[b"secret"])), [SUCCESS]);
    assert_eq!(state(&home), "locked");
}

#[test]
fn the_store_is_locked_by_itself() {
    let mut home = Home::with_cheap_tries();
    home.configure("[store]\nlock_after_idle = \"10s\"\nlock_after = \"10s\"");
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    signs(&mut client, &key);
    assert_eq!(state(&home), "open");
    eventually("it is locked by itself", || state(&home) == "locked");
    assert_eq!(client.ask(&use_key(ssh(&key, DATA), 0)).code(), Code::NoPrompt);
}

/// The master key of the home's store, while no daemon runs.
fn master_key(home: &Home) -> MasterKey {
    let opened = Store::open(&home.path("state")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let slots = opened.store.slots().await.unwrap();
        let master =
            slots.iter().find_map(|slot| slot.open(PASSPHRASE.as_bytes()).ok()).expect("the passphrase opens it");
        opened.store.close().await;
        master
    })
}

#[test]
fn a_locked_store_has_no_key_in_its_memory() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not searched: only root may read the memory of an agent");
        return;
    }
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let [kept_key, deleted] = [Key::random(), Key::random()];
    for key in [&kept_key, &deleted] {
        kept(&mut client, key, &[]);
    }
    drop(client);
    daemon.end(Signal::TERM);
    let master = master_key(&home);

    let daemon = home.start();
    let holds = |secret: &[u8]| memory_contains(daemon.pid(), secret);
    assert!(!holds(&kept_key.seed()) && !holds(master.bytes()), "nothing is open at the start");
    let mut client = daemon.connect_service();
    let open = |client: &mut Client| {
        client.ask(&Request::Unlock(Target::Store, PASSPHRASE.into())).ok::<()>();
        assert!(!holds(PASSPHRASE.as_bytes()), "the passphrase is still there");
        assert!(holds(master.bytes()), "the search cannot find what is there");
        signs(client, &kept_key.blob());
        assert!(holds(&kept_key.seed()), "the search cannot find what is there");
    };
    let closed = |how: &str| {
        assert!(!holds(master.bytes()), "{how}: the master key is still there");
        assert!(!holds(&kept_key.seed()), "{how}: a private key is still there");
    };
    open(&mut client);
    signs(&mut client, &deleted.blob());
    assert!(holds(&deleted.seed()), "the search cannot find what is there");
    let name = deleted.fingerprint();
    let delete = Request::Delete { key: &deleted.blob(), device: STORE, name: &name, proof: Some(PASSPHRASE.into()) };
    client.ask(&delete).ok::<()>();
    assert!(!holds(&deleted.seed()), "a deleted key is still there");

    client.ask(&Request::Lock(Target::Store)).ok::<()>();
    closed("lock");
    open(&mut client);
    client.ask(&Request::Forget(Target::Everything)).ok::<()>();
    closed("forget");
    open(&mut client);
    daemon.signal(Signal::USR2);
    eventually("the signal locks", || home.log().matches("the store is locked").count() >= 3);
    closed("SIGUSR2");
    open(&mut client);
    let mut plain = daemon.connect();
    assert_eq!(plain.request(&message(LOCK, &[b"secret"])), [SUCCESS]);
    closed("ssh-add -x");
    assert_eq!(plain.request(&message(UNLOCK, &[b"secret"])), [SUCCESS]);
    signs(&mut client, &kept_key.blob());
    daemon.signal(Signal::USR1);
    eventually("the signal wipes", || home.log().matches("the store is locked").count() >= 4);
    closed("SIGUSR1");
}

#[test]
fn nothing_of_the_store_is_for_others() {
    let home = Home::with_cheap_tries();
    let daemon = home.start();
    init(&home);
    let mut client = daemon.connect_service();
    let key = ed25519(&mut client, "work");
    // A bind makes the service door shut; on the ssh door none of these is spoken.
    let mut plain = daemon.connect();
    for request in [Request::Store(StoreRequest::Status), Request::Lock(Target::Store)] {
        plain.tell(&request);
        assert_eq!(plain.receive().unwrap(), [5]);
    }
    signs(&mut client, &key);
    let to_memory = Move { device: MEMORY.to_owned(), ..to("") };
    let back = client.ask(&Request::Import { deadline: None, key: &key, to: to_memory });
    assert_eq!(back.code(), Code::NoSuchKey, "nothing leads from the store to memory");
    let wishes = Move { secret: Some("12345678".into()), ..to(STORE) };
    let other = Key::random();
    client.add(&other, "other", CONFIRM);
    assert_eq!(
        client.ask(&Request::Import { deadline: None, key: &other.blob(), to: wishes }).code(),
        Code::Unsupported
    );
}

/// Bytes of memory that a process has resident.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Puts so many keys into the home's store, and returns up to three of them.
fn fill(home: &Home, count: usize) -> Vec<Vec<u8>> {
    let file = home.path("key");
    fs::write(&file, [7; 32]).unwrap();
    let (master, seeds) = (MasterKey::generate().unwrap(), 0..count);
    let seal = |n: usize| {
        let key = SoftKey::generate(Algorithm::Ed25519).unwrap();
        let metadata = Metadata {
            blob: key.public_blob().unwrap().into(),
            name: format!("key {n}").into(),
            comment: (*b"somebody@somewhere.example").into(),
            enabled: true,
            ..Metadata::default()
        };
        master.seal_key(metadata, &key.secret().unwrap()).unwrap()
    };
    let keys: Vec<_> = seeds.map(seal).collect();
    let blobs = keys[count / 2..].iter().take(3).map(|key| key.metadata().blob.to_vec()).collect();
    let opened = Store::open(&home.path("state")).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let slot = KeySlot::key_file(0, "", 0, &master, &file, &[7; 32]).unwrap();
        opened.store.initialise(vec![slot]).await.unwrap();
        opened.store.replace_keys(Vec::new(), keys).await.unwrap();
        opened.store.close().await;
    });
    blobs
}

/// How long this takes.
fn time(act: impl FnOnce()) -> Duration {
    let began = Instant::now();
    act();
    began.elapsed()
}

#[test]
fn ten_thousand_stored_keys_are_as_quick_as_one_and_cost_little() {
    const KEYS: usize = 10_000;
    let (empty, full) = (Home::with_cheap_tries(), Home::with_cheap_tries());
    let before = {
        fill(&empty, 1);
        let daemon = empty.start();
        eventually("the store is open", || state(&empty) == "open");
        resident(daemon.pid())
    };
    let keys = fill(&full, KEYS);
    let daemon = full.start();
    daemon.logs("the store is unlocked");
    let mut client = daemon.connect_service();
    // The best of three: on a loaded machine any one may be slow.
    let signed = keys.iter().map(|key| time(|| signs(&mut client, key))).min().unwrap();
    let each = resident(daemon.pid()).saturating_sub(before) / KEYS as u64;
    let mut plain = daemon.connect();
    let first = Instant::now();
    let listed = plain.list().len();
    let first = first.elapsed();
    let again = (0..3).map(|_| time(|| drop(plain.list()))).min().unwrap();
    eprintln!(
        "{KEYS} keys: first signature of a key {signed:?}, first list {first:?}, list {again:?}, {each} bytes a key"
    );
    // OpenSSH's clients take no more.
    assert_eq!(listed, 2048);
    // A loaded machine is slow, and these programs are not optimised: what would grow with the keys is far above.
    assert!(signed < Duration::from_millis(500), "{signed:?}");
    assert!(again < Duration::from_millis(500), "{again:?}");
    assert!(each < 4096, "{each}");
}
