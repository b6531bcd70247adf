//! The life of a key through the service door of the built daemon: made on a device, moved there, named, allowed more or
//! less, deleted; who may; and what `check` says of a use. OpenSSL reads what X.509 is told of a key.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs;

use base64ct::{Base64, Encoding};
use rustix::process::Signal;
use strongroom::{
    agent::message::{Checked, Code, KeyEntry, KeyUse, Made, Name, Page, RefusalEntry, Request},
    devices::{Algorithm, DecryptScheme, DeriveScheme, Hash, NewKey, Scheme, Signature, verify::verify},
    public_key::{Curve, FingerprintHash, PublicKey, fingerprint},
    spki,
    vault::{MEMORY, key::Grants, stored::NewStored},
};
use support::{
    askpass::Askpass,
    client::{CONFIRM, Client, FAILURE, Key, LOCK, REMOVE_IDENTITY, SIGN_REQUEST, SUCCESS, UNLOCK, lifetime, message},
    command,
    daemon::{Daemon, Home},
    eventually, keygen, run,
    service::{Bytes, decrypt, derive, first_page, sign, sign_digest, ssh, to, use_key, why},
    soft,
};

const TOKEN: &str = r#"
serial = "T1"
lanes = 2
control = CONTROL
[[key]]
slot = "p"
type = "p256"
label = "p256"
"#;

const DATA: &[u8] = b"what is signed";
const SIGN: Grants = Grants { sign: true, ..Grants::NONE };

fn home() -> Home {
    let mut home = Home::new();
    home.device("token", TOKEN, "probe = \"50ms\"");
    home
}

/// A client of the service door, once the device `token` is there.
fn connect(daemon: &Daemon<'_>) -> Client {
    daemon.logs("ready device=\"token\"");
    let mut client = daemon.connect_service();
    eventually("the token's keys are listed", || !client.list().is_empty());
    client
}

fn generate(new: NewKey) -> Request<'static> {
    Request::Generate { deadline: None, device: "token", new, terms: NewStored::default() }
}

/// Has the token make a key.
fn made(client: &mut Client, new: NewKey) -> Vec<u8> {
    client.ask(&generate(new)).ok::<Made<'_>>().blob.to_vec()
}

fn is_listed(client: &mut Client, key: &[u8]) -> bool {
    client.list().iter().any(|(blob, _)| blob == key)
}

/// Looks at a listed key.
fn entry<T>(client: &mut Client, key: &[u8], look: impl FnOnce(&KeyEntry<'_>) -> T) -> T {
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    look(page.entries.iter().find(|entry| entry.blob == key).expect("the key is listed"))
}

fn name_of(client: &mut Client, key: &[u8]) -> (String, String) {
    entry(client, key, |entry| (entry.name.to_owned(), String::from_utf8_lossy(entry.comment).into_owned()))
}

#[track_caller]
fn signs(client: &mut Client, key: &[u8], scheme: Scheme) {
    let bytes = client.ask(&use_key(sign(key, scheme, DATA), 0)).bytes();
    let signature = Signature::from_bytes(scheme, PublicKey::parse(key).unwrap().key_type(), bytes).unwrap();
    assert!(verify(key, scheme, &soft::message(DATA), &signature), "{scheme:?}");
}

fn delete<'a>(key: &'a [u8], device: &'a str, name: &'a str) -> Request<'a> {
    Request::Delete { key, device, name, proof: None }
}

#[test]
fn a_key_is_made_used_and_deleted_and_each_shows_at_once() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let before = client.list();
    for (algorithm, scheme) in [
        (Algorithm::Ed25519, Scheme::Ed25519),
        (Algorithm::Ecdsa(Curve::P256), Scheme::Ecdsa(Hash::Sha256)),
        (Algorithm::Rsa(2048), Scheme::RsaPkcs1v15(Hash::Sha256)),
    ] {
        let label = format!("a new {algorithm}");
        // The list is asked for in the same breath: it waits for nothing but the answer before it.
        client.tell(&generate(NewKey::new(label.clone(), algorithm)));
        client.tell(&Request::Keys(first_page(0)));
        let reply = client.hear(Name::Generate);
        let key = reply.ok::<Made<'_>>().blob.to_vec();
        let made = format!("\"key\":\"{}\",\"operation\":\"generate\"", fingerprint(&key, FingerprintHash::Sha256));
        assert!(home.audit().contains(&made), "{made} was not written down");
        let reply = client.hear(Name::Keys);
        let page: Page<KeyEntry<'_>> = reply.ok();
        let entry = page.entries.iter().find(|entry| entry.blob == key).expect("listed at once");
        assert_eq!((entry.name, entry.comment, entry.places[0].device), (&*label, label.as_bytes(), "token"));
        signs(&mut client, &key, scheme);

        for wrong in ["", "p256", "memory", "SHA256:nonsense"] {
            assert_eq!(client.ask(&delete(&key, "token", wrong)).code(), Code::BadRequest, "{wrong:?}");
        }
        client.ask(&delete(&key, "token", &label)).ok::<()>();
        assert_eq!(client.list(), before);
        assert_eq!(client.ask(&use_key(sign(&key, scheme, DATA), 0)).code(), Code::NoSuchKey);
        assert_eq!(client.ask(&delete(&key, "token", &label)).code(), Code::NoSuchKey);
    }
    for algorithm in [Algorithm::X25519, Algorithm::Rsa(4096)] {
        assert_eq!(client.ask(&generate(NewKey::new("no", algorithm))).code(), Code::Unsupported);
    }
    let new = NewKey::new("", Algorithm::Ed25519);
    let elsewhere = Request::Generate { deadline: None, device: "none", new, terms: NewStored::default() };
    assert_eq!(client.ask(&elsewhere).code(), Code::NoSuchKey);
}

#[test]
fn what_was_made_named_and_deleted_is_remembered_while_the_device_is_away() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let [kept, deleted] = ["kept", "deleted"].map(|label| made(&mut client, NewKey::new(label, Algorithm::Ed25519)));
    client.ask(&Request::Rename { key: &kept, name: "authority" }).ok::<()>();
    let fingerprint = fingerprint(&deleted, FingerprintHash::Sha256);
    client.ask(&delete(&deleted, "token", &fingerprint)).ok::<()>();
    drop(client);
    daemon.end(Signal::KILL);

    fs::write(home.control("token").join("absent"), "").unwrap();
    let daemon = home.start();
    let mut client = daemon.connect_service();
    assert_eq!(name_of(&mut client, &kept), ("authority".to_owned(), "authority".to_owned()));
    assert!(!is_listed(&mut client, &deleted));
    assert_eq!(client.ask(&generate(NewKey::new("", Algorithm::Ed25519))).code(), Code::Absent);
    fs::remove_file(home.control("token").join("absent")).unwrap();
    eventually("the token is back", || client.ask(&use_key(ssh(&kept, DATA), 0)).read::<Bytes>().is_ok());
    assert!(!is_listed(&mut client, &deleted));
}

#[test]
fn a_key_moves_from_memory_to_a_device() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    for (options, scheme) in [
        (&["-t", "ed25519"][..], Scheme::Ed25519),
        (&["-t", "ecdsa", "-b", "384"], Scheme::Ecdsa(Hash::Sha384)),
        (&["-t", "rsa", "-b", "2048"], Scheme::RsaPss(Hash::Sha256)),
    ] {
        let file = keygen(&home.path(""), &scheme_file(scheme), options);
        daemon.ssh_add(&[file.to_str().unwrap()]).ok();
        let key = Base64::decode_vec(&support::public_key(&file)).unwrap();
        assert_eq!(entry(&mut client, &key, |entry| entry.places[0].device.to_owned()), "memory");
        assert_eq!(client.ask(&use_key(sign(&key, scheme, DATA), 0)).code(), Code::NotPermitted);
        let reply = client.ask(&Request::Import { deadline: None, key: &key, to: to("token") });
        assert_eq!(reply.ok::<Made<'_>>().blob, key);
        let places = entry(&mut client, &key, |entry| {
            entry.places.iter().map(|place| place.device.to_owned()).collect::<Vec<_>>()
        });
        assert_eq!(places, ["token"]);
        signs(&mut client, &key, scheme);
        // What is not in memory cannot be moved from there.
        let again = client.ask(&Request::Import { deadline: None, key: &key, to: to("token") });
        assert_eq!(again.code(), Code::Unsupported);
    }
    for constraint in [lifetime(1000), CONFIRM.to_vec()] {
        let key = Key::random();
        client.add(&key, "constrained", &constraint);
        let refused = client.ask(&Request::Import { deadline: None, key: &key.blob(), to: to("token") });
        assert_eq!(refused.code(), Code::NotPermitted);
        assert_eq!(entry(&mut client, &key.blob(), |entry| entry.places[0].device.to_owned()), "memory");
    }
}

fn scheme_file(scheme: Scheme) -> String {
    format!("{scheme:?}").chars().filter(char::is_ascii_alphanumeric).collect()
}

#[test]
fn names_live_as_long_as_the_key() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let key = Key::random();
    client.add(&key, "comment", &[]);
    let rename = |client: &mut Client, name: &str| {
        client.ask(&Request::Rename { key: &key.blob(), name }).ok::<()>();
        name_of(client, &key.blob())
    };
    assert_eq!(rename(&mut client, "work"), ("work".to_owned(), "comment".to_owned()));
    // It is the key's, whoever adds it again.
    client.add(&key, "another comment", &[]);
    assert_eq!(name_of(&mut client, &key.blob()), ("work".to_owned(), "another comment".to_owned()));
    client.ask(&delete(&key.blob(), MEMORY, "work")).ok::<()>();
    assert!(!is_listed(&mut client, &key.blob()));
    client.add(&key, "comment", &[]);
    assert_eq!(name_of(&mut client, &key.blob()), (String::new(), "comment".to_owned()));
    assert_eq!(rename(&mut client, "work").0, "work");
    assert_eq!(rename(&mut client, "").0, "");
    client.ask(&delete(&key.blob(), MEMORY, "comment")).ok::<()>();
    let stranger = Key::random().blob();
    assert_eq!(client.ask(&Request::Rename { key: &stranger, name: "x" }).code(), Code::NoSuchKey);
}

#[test]
fn a_key_does_exactly_what_it_is_allowed() {
    let mut home = Home::new();
    home.device("token", TOKEN, "probe = \"50ms\"\noperations = [\"sign\", \"derive\"]");
    let daemon = home.start();
    let mut client = connect(&daemon);
    let file = keygen(&home.path(""), "p256", &["-t", "ecdsa"]);
    let certificate = keygen(&home.path(""), "ca", &["-t", "ed25519"]);
    run(command("ssh-keygen", &home.path("")).args(["-q", "-I", "id", "-s"]).arg(&certificate).arg(with_pub(&file)))
        .ok();
    daemon.ssh_add(&[file.to_str().unwrap()]).ok();
    let in_memory = Base64::decode_vec(&support::public_key(&file)).unwrap();
    let certificate = client.list().into_iter().map(|(blob, _)| blob).find(|blob| blob.len() > 300).unwrap();
    let on_token = client.list().into_iter().find(|(_, comment)| comment == b"p256").unwrap().0;
    let peer = PublicKey::parse(&on_token).map(|key| match key {
        PublicKey::Ecdsa(_, point) => point.to_vec(),
        _ => panic!("another key"),
    });
    let peer = peer.unwrap();
    let does = |client: &mut Client, key: &[u8]| {
        let tasks = [sign_digest(key, &[1; 32]), derive(key, DeriveScheme::Ecdh, &peer)];
        tasks.map(|task| client.ask(&use_key(task, 0)).read::<Bytes>().map(drop).map_err(|failure| failure.code))
    };
    let refused = || Err(Code::NotPermitted);
    let allow = |client: &mut Client, key: &[u8], operations| {
        client.ask(&Request::Allow { key, operations, proof: None }).read::<()>().map_err(|failure| failure.code)
    };
    assert_eq!(does(&mut client, &in_memory), [refused(), refused()]);
    // Naming either, both are meant.
    allow(&mut client, &certificate, SIGN).unwrap();
    for key in [&in_memory, &certificate] {
        assert_eq!(does(&mut client, key), [Ok(()), refused()]);
        assert_eq!(client.ask(&use_key(ssh(key, DATA), 0)).read::<Bytes>().map(drop), Ok(()));
    }
    allow(&mut client, &in_memory, Grants { derive: true, ..Grants::NONE }).unwrap();
    assert_eq!(does(&mut client, &in_memory), [refused(), Ok(())]);
    assert_eq!(entry(&mut client, &in_memory, |entry| entry.operations.join(",")), "derive");

    assert_eq!(does(&mut client, &on_token), [Ok(()), Ok(())]);
    assert_eq!(allow(&mut client, &on_token, Grants::ALL), refused(), "the configuration grants no decryption");
    allow(&mut client, &on_token, SIGN).unwrap();
    // What a scan makes new of the key changes nothing about that.
    client.ask(&Request::Rename { key: &on_token, name: "renamed" }).ok::<()>();
    assert_eq!(does(&mut client, &on_token), [Ok(()), refused()]);
    allow(&mut client, &on_token, Grants::NONE).unwrap();
    assert_eq!(does(&mut client, &on_token), [refused(), refused()]);
    assert_eq!(client.ask(&use_key(ssh(&on_token, DATA), 0)).read::<Bytes>().map(drop), Ok(()));
}

#[test]
fn a_key_that_is_here_with_a_certificate_only_goes_by_its_plain_blob() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let [file, ca] = ["key", "ca"].map(|name| keygen(&home.path(""), name, &["-t", "ed25519"]));
    run(command("ssh-keygen", &home.path("")).args(["-q", "-I", "id", "-s"]).arg(&ca).arg(with_pub(&file))).ok();
    daemon.ssh_add(&[file.to_str().unwrap()]).ok();
    let plain = Base64::decode_vec(&support::public_key(&file)).unwrap();
    assert_eq!(client.request(&message(REMOVE_IDENTITY, &[&plain])), [SUCCESS]);
    assert!(!is_listed(&mut client, &plain));
    assert_eq!(entry(&mut client, &plain, |entry| entry.certificates.len()), 1);
    client.ask(&use_key(ssh(&plain, DATA), 0)).bytes();
    client.ask(&Request::Check(ssh(&plain, DATA))).ok::<Checked<'_>>();
    client.ask(&Request::Rename { key: &plain, name: "work" }).ok::<()>();
    client.ask(&Request::Allow { key: &plain, operations: SIGN, proof: None }).ok::<()>();
    client.ask(&use_key(sign(&plain, Scheme::Ed25519, DATA), 0)).bytes();
    // ssh names what it was offered, as with every agent.
    assert_eq!(client.request(&message(SIGN_REQUEST, &[&plain, DATA, &[]])), [FAILURE]);
    client.ask(&delete(&plain, MEMORY, "work")).ok::<()>();
    assert_eq!(client.ask(&use_key(ssh(&plain, DATA), 0)).code(), Code::NoSuchKey);
}

fn with_pub(file: &std::path::Path) -> std::path::PathBuf {
    support::with_suffix(file, ".pub")
}

#[test]
fn a_confirmed_key_asks_before_it_is_allowed_more() {
    let mut home = home();
    let mut askpass = Askpass::new();
    home.askpass(&askpass);
    let daemon = home.start();
    let mut client = connect(&daemon);
    let key = Key::random();
    client.add(&key, "careful", CONFIRM);
    let blob = key.blob();
    let allow = Request::Allow { key: &blob, operations: SIGN, proof: None };
    for (answer, granted) in [(1, ""), (0, "sign")] {
        client.tell(&allow);
        let prompt = askpass.next();
        assert!(prompt.text.starts_with("Allow key careful from now on: sign?"), "{}", prompt.text);
        askpass.answer(answer, "");
        let reply = client.hear(Name::Allow);
        assert_eq!(reply.read::<()>().map_err(|failure| failure.code).is_ok(), answer == 0);
        assert_eq!(entry(&mut client, &blob, |entry| entry.operations.join(",")), granted);
    }
}

#[test]
fn a_restricted_key_is_allowed_nothing() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let file = keygen(&home.path(""), "restricted", &["-t", "ed25519"]);
    let hosts = home.path("known_hosts");
    fs::write(&hosts, format!("host ssh-ed25519 {}\n", support::public_key(&file))).unwrap();
    daemon.ssh_add(&["-H", hosts.to_str().unwrap(), "-h", "host", file.to_str().unwrap()]).ok();
    let key = Base64::decode_vec(&support::public_key(&file)).unwrap();
    assert_eq!(client.ask(&Request::Allow { key: &key, operations: SIGN, proof: None }).code(), Code::NotPermitted);
    assert_eq!(client.ask(&Request::Import { deadline: None, key: &key, to: to("token") }).code(), Code::NotPermitted);
}

#[test]
fn an_administrators_secret_goes_to_the_device_once_and_is_no_users_pin() {
    let mut home = Home::new();
    let script = format!("admin = \"12345678\"\npin = {{ value = \"1234\" }}\n{TOKEN}");
    home.device("token", &script, "probe = \"50ms\"");
    let daemon = home.start();
    let mut client = connect(&daemon);
    let new =
        |secret: Option<&str>| NewKey { secret: secret.map(Into::into), ..NewKey::new("card key", Algorithm::Ed25519) };
    for wrong in [None, Some("87654321")] {
        assert_eq!(client.ask(&generate(new(wrong))).code(), Code::PinWrong);
    }
    let key = made(&mut client, new(Some("12345678")));
    signs(&mut client, &key, Scheme::Ed25519);
    let log = home.log();
    assert!(!log.contains("12345678") && !log.contains("87654321"));
    let told = client.ask(&why());
    let told: Vec<RefusalEntry<'_>> = told.ok();
    assert_eq!(
        told.iter().map(|refusal| (refusal.message, refusal.code)).collect::<Vec<_>>(),
        [("generate", Code::PinWrong), ("generate", Code::PinWrong),]
    );
}

#[test]
fn a_device_that_wants_its_pin_asks_for_it() {
    let mut home = Home::new();
    let mut askpass = Askpass::new();
    home.askpass(&askpass);
    home.device("token", &format!("locked = true\npin = {{ value = \"1234\" }}\n{TOKEN}"), "probe = \"50ms\"");
    let daemon = home.start();
    let mut client = connect(&daemon);
    client.tell(&generate(NewKey::new("new", Algorithm::Ed25519)));
    assert!(askpass.next().text.starts_with("Enter PIN for token"));
    askpass.answer(0, "1234");
    let reply = client.hear(Name::Generate);
    let key = reply.ok::<Made<'_>>().blob.to_vec();
    assert!(is_listed(&mut client, &key));
    assert!(!askpass.has_asked());
}

/// What `check` answers: the verdict, the device and the note, or the reason.
fn checked(client: &mut Client, task: KeyUse<'_>) -> Result<(String, String, String), Code> {
    let reply = client.ask(&Request::Check(task));
    let checked = reply.read::<Checked<'_>>().map_err(|failure| failure.code)?;
    Ok((checked.verdict.to_owned(), checked.device.to_owned(), checked.note.to_owned()))
}

#[test]
fn check_tells_what_would_become_of_a_use_and_does_nothing() {
    let mut home = home();
    let askpass = Askpass::new();
    home.askpass(&askpass);
    let locked = "serial = \"L1\"\nlocked = true\ncontrol = CONTROL\npin = { value = \"1234\" }\n[[key]]\nslot = \"k\"\ntype = \"p256\"\nseed = 2\nlabel = \"locked\"\ntouch = true";
    home.device("other", locked, "probe = \"50ms\"");
    let daemon = home.start();
    let mut client = connect(&daemon);
    let (soft, careful) = (Key::random(), Key::random());
    client.add(&soft, "soft", &[]);
    client.add(&careful, "careful", CONFIRM);
    let of = |client: &mut Client, comment: &str| {
        let mut found = None;
        eventually(comment, || {
            found = client.list().into_iter().find(|(_, c)| c == comment.as_bytes()).map(|(blob, _)| blob);
            found.is_some()
        });
        found.unwrap()
    };
    let (p256, locked) = (of(&mut client, "p256"), of(&mut client, "locked"));
    let ok = |verdict: &str, device: &str, note: &str| Ok((verdict.into(), device.into(), note.into()));
    assert_eq!(checked(&mut client, ssh(&soft.blob(), DATA)), ok("allow", "memory", ""));
    assert_eq!(checked(&mut client, sign(&soft.blob(), Scheme::Ed25519, DATA)), Err(Code::NotPermitted));
    let (verdict, device, note) = checked(&mut client, ssh(&careful.blob(), DATA)).unwrap();
    assert_eq!((&*verdict, &*device), ("confirm", "memory"));
    assert!(note.starts_with("Allow use of key careful?"), "{note}");
    assert_eq!(checked(&mut client, sign_digest(&p256, &[1; 32])), ok("allow", "token", ""));
    let note = "other wants its PIN (prompt)\nthe device wants a touch";
    assert_eq!(checked(&mut client, sign_digest(&locked, &[1; 32])), ok("allow", "other", note));
    assert_eq!(checked(&mut client, decrypt(&p256, DecryptScheme::RsaPkcs1v15, DATA)), Err(Code::Unsupported));
    assert_eq!(checked(&mut client, sign(&p256, Scheme::Ed25519, DATA)), Err(Code::Unsupported));
    assert_eq!(checked(&mut client, ssh(&Key::random().blob(), DATA)), Err(Code::NoSuchKey));
    fs::write(home.control("token").join("absent"), "").unwrap();
    eventually("the token is away", || checked(&mut client, sign_digest(&p256, &[1; 32])) == Err(Code::Absent));
    assert!(!askpass.has_asked());
    let told = client.ask(&why());
    assert!(told.ok::<Vec<RefusalEntry<'_>>>().is_empty(), "nothing was refused");
}

/// The vault's owner and root administer it; others who are admitted use keys, and no more.
#[test]
fn others_who_are_admitted_make_no_keys() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no other user can be played");
        return;
    }
    let mut home = home();
    let shared = home.path("shared");
    home.configure(&format!("[[listen]]\ndoor = \"service\"\npath = {shared:?}\nmode = \"0666\"\nuids = [65534]"));
    home.open_to_others();
    let daemon = home.start();
    let mut owner = connect(&daemon);
    let key = owner.list().remove(0).0;
    let mut other = Client::connect_as(&shared, 65534);
    other.ask(&use_key(sign_digest(&key, &[1; 32]), 0)).ok::<Bytes>();
    for request in [
        generate(NewKey::new("", Algorithm::Ed25519)),
        Request::Import { deadline: None, key: &key, to: to("token") },
        Request::Rename { key: &key, name: "mine" },
        Request::Allow { key: &key, operations: Grants::ALL, proof: None },
        delete(&key, "token", "p256"),
    ] {
        assert_eq!(other.ask(&request).code(), Code::NotPermitted, "{:?}", request.name());
    }
    assert_eq!(owner.list().len(), 1);
    assert_eq!(name_of(&mut owner, &key), ("p256".to_owned(), "p256".to_owned()));
}

#[test]
fn a_sealed_vault_makes_nothing_and_what_was_made_before_is_there_afterwards() {
    let home = home();
    let daemon = home.start();
    let mut client = connect(&daemon);
    let key = made(&mut client, NewKey::new("new", Algorithm::Ed25519));
    assert_eq!(daemon.connect().request(&message(LOCK, &[b"password"])), [SUCCESS]);
    assert_eq!(client.ask(&generate(NewKey::new("", Algorithm::Ed25519))).code(), Code::Locked);
    assert_eq!(client.ask(&delete(&key, "token", "new")).code(), Code::Locked);
    assert_eq!(daemon.connect().request(&message(UNLOCK, &[b"password"])), [SUCCESS]);
    assert!(is_listed(&mut client, &key));
}

/// OpenSSL writes the same SubjectPublicKeyInfo of the same key, and names it alike.
#[test]
fn x509_software_knows_the_key_by_what_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let openssl = |args: &[&str]| run(command("openssl", dir).args(args)).ok();
    for (name, args) in [
        ("rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"][..]),
        ("p256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]),
        ("p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
        ("p521", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"]),
        ("ed25519", &["-algorithm", "ED25519"]),
        ("x25519", &["-algorithm", "X25519"]),
    ] {
        openssl(&[&["genpkey", "-out", name], args].concat());
        openssl(&["pkey", "-in", name, "-pubout", "-outform", "DER", "-out", "spki"]);
        let expected = fs::read(dir.join("spki")).unwrap();
        let public = public_of(&expected);
        let key = PublicKey::parse(&public).unwrap();
        assert_eq!(spki::encode(&key).unwrap(), expected, "{name}");
        if name == "x25519" {
            continue; // It signs no certificate of its own.
        }
        openssl(&[
            "req",
            "-x509",
            "-new",
            "-key",
            name,
            "-subj",
            "/CN=test",
            "-addext",
            "subjectKeyIdentifier=hash",
            "-out",
            "crt",
        ]);
        let shown = openssl(&["x509", "-in", "crt", "-noout", "-ext", "subjectKeyIdentifier"]);
        let digits: String = shown.lines().nth(1).unwrap().chars().filter(char::is_ascii_hexdigit).collect();
        assert_eq!(soft::unhex(&digits), spki::key_identifier(&key).unwrap(), "{name}");
    }
}

/// The SSH blob of the key whose SubjectPublicKeyInfo this is, by where its bits are in it.
fn public_of(spki: &[u8]) -> Vec<u8> {
    let end = |len: usize| &spki[spki.len() - len..];
    let ec = |curve: Curve| PublicKey::Ecdsa(curve, end(1 + 2 * curve.scalar_len())).to_blob();
    match spki.len() {
        44 if spki[8] == 0x6e => PublicKey::X25519(end(32)).to_blob(),
        44 => PublicKey::Ed25519(end(32)).to_blob(),
        91 => ec(Curve::P256),
        120 => ec(Curve::P384),
        158 => ec(Curve::P521),
        // 256 bytes of modulus, then 02 03 and the exponent.
        294 => PublicKey::Rsa { n: &spki[294 - 261..294 - 5], e: end(3) }.to_blob(),
        other => panic!("an unforeseen length: {other}"),
    }
}
