//! The messages of the service door against the built daemon: each of them and its refusals, what each door speaks, PINs,
//! what a key may be used for, and the messages of other agents, with OpenSSL to check what comes of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, io::Write, path::Path};

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{Ed25519KeyPair, KeyPair},
};
use base64ct::{Base64, Encoding};
use strongroom::{
    agent::message::{
        Code, DeviceEntry, KeyEntry, KeyUse, Name, Page, Paging, PinState, RefusalEntry, ReplyError, Request, Target,
        compatible,
    },
    devices::{DecryptScheme, DeriveScheme, Hash, Scheme, Signature, verify::verify},
    public_key::{Curve, PublicKey},
};
use support::{
    askpass::{Askpass, answering},
    client::{
        CONFIRM, Client, EXTENSION, EXTENSION_FAILURE, FAILURE, Key, LOCK, SIGN_RESPONSE, SUCCESS, UNLOCK, message,
        put, take,
    },
    command,
    daemon::{Home, LOCKED},
    eventually, keygen, run,
    service::{
        Bytes, all_names, collect, compatible, compatible_requests, decrypt, derive, first_page, frame_of, one_of_each,
        query, sign, sign_digest, ssh, submit, unlock, use_key, why,
    },
    soft,
};

/// A key of each kind.
const TOKEN: &str = r#"
serial = "T1"
lanes = 2
control = CONTROL
[[key]]
slot = "e"
type = "ed25519"
seed = 1
label = "ed25519"
[[key]]
slot = "p"
type = "p256"
label = "p256"
[[key]]
slot = "r"
type = "rsa"
label = "rsa"
"#;

const DATA: &[u8] = b"what is signed";

/// A home with the device `token`.
fn home() -> Home {
    let mut home = Home::new();
    home.device("token", TOKEN, "probe = \"50ms\"");
    home
}

/// Looks at a device.
fn device<T>(client: &mut Client, name: &str, look: impl FnOnce(&DeviceEntry<'_>) -> T) -> T {
    let reply = client.ask(&Request::Devices(first_page(0)));
    let page: Page<DeviceEntry<'_>> = reply.ok();
    look(page.entries.iter().find(|device| device.id == name).unwrap())
}

#[test]
fn each_door_speaks_what_query_lists_and_nothing_else() {
    let mut home = home();
    let named = ["sign@strongroom.alt", "ecdh@joyent.com"];
    home.configure(&format!("[[listen]]\ndoor = \"ssh\"\npath = {:?}\nmessages = {named:?}", home.path("named")));
    let daemon = home.start();
    let key = daemon.blob("p256");
    let own = ["query", "session-bind@openssh.com"];
    let mut expected = [&["query"], &all_names()[..]].concat();
    expected.sort_unstable();
    let mut names = query(&mut daemon.connect_service());
    names.sort_unstable();
    assert_eq!(names, expected);

    for (mut client, spoken) in [(daemon.connect(), &[][..]), (Client::connect(&home.path("named")), &named)] {
        let mut names = query(&mut client);
        names.sort_unstable();
        let mut expected = [&own[..], spoken].concat();
        expected.sort_unstable();
        assert_eq!(names, expected);
        for name in all_names() {
            let answer = client.request(&message(EXTENSION, &[name.as_bytes()]));
            assert_eq!(answer, [if spoken.contains(&name) { EXTENSION_FAILURE } else { FAILURE }], "{name}");
        }
    }
    let mut client = Client::connect(&home.path("named"));
    client.ask(&use_key(sign_digest(&key, &[1; 32]), 0)).ok::<Bytes>();
    for request in one_of_each(&key) {
        let spoken = request.name() == Name::Sign;
        let reply = client.ask(&request);
        assert!(spoken || reply.error() == ReplyError::NotSpoken, "{:?}", request.name());
    }
}

#[test]
fn a_malformed_body_is_a_28() {
    let home = home();
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    for request in one_of_each(&key) {
        let body = frame_of(&request)[4..].to_vec();
        // One without fields would be cut in its name.
        let shorter = (request.name() != Name::Store).then(|| body[..body.len() - 1].to_vec());
        for broken in shorter.iter().chain([&[&body[..], &[0]].concat()]) {
            assert_eq!(client.request(broken), [EXTENSION_FAILURE], "{:?}", request.name());
        }
    }
    for name in compatible::Name::ALL {
        let mut body = message(EXTENSION, &[name.as_str().as_bytes()]);
        body.push(0);
        assert_eq!(client.request(&body), [EXTENSION_FAILURE], "{name:?}");
    }
    // Fields that are there and make no sense.
    let digest = [1; 31];
    let longest = [7; 65];
    for request in [
        Request::Keys(Paging { cursor: &longest, max: 0 }),
        use_key(sign_digest(&key, &digest), 0),
        use_key(ssh(&key, DATA), 3_600_001),
        submit(1, ssh(&key, DATA), 3_600_001),
        collect(std::time::Duration::from_millis(3_600_001), 0),
        unlock("token", ""),
        Request::Random { len: 0, device: "" },
        Request::Random { len: 1025, device: "" },
    ] {
        assert_eq!(client.ask(&request).code(), Code::BadRequest, "{:?}", request.name());
    }
}

#[test]
fn a_sealed_vault_says_locked() {
    let home = home();
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    client.submit(1, sign_digest(&key, &[1; 32]), 0);
    assert_eq!(daemon.connect().request(&message(LOCK, &[b"password"])), [SUCCESS]);
    assert!(query(&mut client).contains(&"sign@strongroom.alt".to_owned()));
    assert_eq!(daemon.connect().request(&message(EXTENSION, &[b"query"])), [FAILURE]);
    for request in one_of_each(&key) {
        match request.name() {
            Name::Collect | Name::Cancel | Name::Audit => {}
            name => assert_eq!(client.ask(&request).code(), Code::Locked, "{name:?}"),
        }
    }
    for request in compatible_requests(&key) {
        assert_eq!(compatible(&mut client, &request), [EXTENSION_FAILURE], "{:?}", request.name());
    }
    // What was finished before may be fetched, or was given up.
    let finished = client.collect_all(1);
    assert!(finished[0].reply.as_ref().err().is_none_or(|failure| failure.code == Code::Locked));
    assert_eq!(daemon.connect().request(&message(UNLOCK, &[b"password"])), [SUCCESS]);
    client.ask(&use_key(sign_digest(&key, &[1; 32]), 0)).ok::<Bytes>();
    let reply = client.ask(&why());
    assert!(reply.ok::<Vec<RefusalEntry<'_>>>().iter().all(|refusal| refusal.code == Code::Locked));
}

#[test]
fn keys_and_devices_are_described() {
    let mut home = home();
    home.device("other", LOCKED, "operations = [\"sign\"]\nconfirm = true");
    let daemon = home.start();
    daemon.blob("p256");
    daemon.blob("locked");
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &support::client::lifetime(1000));
    let mut client = daemon.connect_service();
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    assert!(page.next.is_empty() && page.entries.len() == 5);
    let key = |comment: &str| page.entries.iter().find(|entry| entry.comment == comment.as_bytes()).unwrap();

    let entry = key("rsa");
    assert_eq!((&entry.operations[..], entry.places[0].device), (&["sign", "decrypt"][..], "token"));
    assert!(entry.signs.starts_with(&["ssh"]) && entry.signs.contains(&"rsa-pkcs1v15-raw"), "{:?}", entry.signs);
    assert!(entry.decrypts.contains(&"rsa-oaep-sha256") && entry.derives.is_empty());
    assert_eq!((key("p256").operations.as_slice(), &key("p256").derives[..]), (&["sign", "derive"][..], &["ecdh"][..]));
    let entry = key("locked");
    assert_eq!(
        (entry.password, &entry.constraints[..], &entry.operations[..]),
        ("prompt", &["confirm"][..], &["sign"][..])
    );
    let entry = key("soft");
    assert_eq!((entry.password, &entry.constraints[..], &entry.operations[..]), ("none", &["lifetime"][..], &[][..]));
    assert_eq!((entry.blob, entry.places[0].device), (&soft.blob()[..], "memory"));

    device(&mut client, "token", |device| {
        assert_eq!((device.kind, device.serial, device.state, device.lanes), ("scripted", "T1", "ready", 2));
        assert_eq!((device.pin, device.tries_left), (PinState::None, None));
    });
    device(&mut client, "other", |device| {
        assert_eq!((device.pin, device.tries_left, device.lanes), (PinState::Needed, Some(5), 1));
    });
}

/// A device with so many keys that no list of them fits one frame.
fn crowded() -> Home {
    const KEYS: usize = 1500;
    let mut home = Home::new();
    let key = |n| format!("[[key]]\nslot = \"{n}\"\ntype = \"p256\"\nseed = {n}\nlabel = \"{n:0200}\"\n");
    home.device("token", &(0..KEYS).map(key).collect::<String>(), "");
    home
}

#[test]
fn a_list_longer_than_a_frame_has_pages() {
    let home = crowded();
    let daemon = home.start();
    daemon.logs("ready device=\"token\"");
    let mut client = daemon.connect_service();
    for max in [0, 400] {
        let (mut cursor, mut comments, mut pages) = (Vec::new(), Vec::new(), 0);
        loop {
            let reply = client.ask(&Request::Keys(Paging { cursor: &cursor, max }));
            assert!(reply.body.len() <= 256 * 1024);
            let page: Page<KeyEntry<'_>> = reply.ok();
            assert!(!page.entries.is_empty() && (max == 0 || page.entries.len() <= 400));
            comments.extend(page.entries.iter().map(|entry| entry.comment.to_vec()));
            pages += 1;
            cursor = page.next.clone();
            if cursor.is_empty() {
                break;
            }
        }
        let all = comments.len();
        comments.sort_unstable();
        comments.dedup();
        assert_eq!((all, comments.len()), (1500, 1500));
        assert!(pages >= 3);
    }
    let far = Request::Keys(Paging { cursor: &[0xff; 4], max: 0 });
    assert!(client.ask(&far).ok::<Page<KeyEntry<'_>>>().entries.is_empty());

    let ids = compatible(&mut client, &compatible::Request::DecryptDeriveIds);
    assert!(ids.len() <= 256 * 1024, "a reply of {} bytes", ids.len());
    assert!(identities(&ids).len() > 500);
}

#[test]
fn a_long_comment_hides_no_key() {
    let home = Home::new();
    let daemon = home.start();
    let [first, second] = [Key::random(), Key::random()];
    let mut client = daemon.connect_service();
    client.add(&first, &"x".repeat(262_000), &[]);
    client.add(&second, "second", &[]);
    let mut seen = Vec::new();
    let mut cursor = Vec::new();
    for _ in 0..2 {
        let reply = client.ask(&Request::Keys(Paging { cursor: &cursor, max: 0 }));
        let page: Page<KeyEntry<'_>> = reply.ok();
        seen.extend(page.entries.iter().map(|entry| entry.blob.to_vec()));
        cursor = page.next.clone();
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!(seen, [first.blob(), second.blob()]);
    assert!(cursor.is_empty());
}

#[test]
fn a_key_that_no_message_of_ours_can_name_hides_no_other() {
    let home = Home::new();
    let daemon = home.start();
    let (mut client, key) = (daemon.connect_service(), Key::random());
    let mut body = message(17, &[b"sk-ssh-ed25519@openssh.com", &[1; 32], &[b'a'; 261_900]]);
    body.push(1);
    for part in [&b"handle"[..], b"", b"long"] {
        put(&mut body, part);
    }
    assert_eq!(client.request(&body), [SUCCESS]);
    client.add(&key, "second", &[]);
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    assert_eq!(page.entries.iter().map(|entry| entry.blob).collect::<Vec<_>>(), [&key.blob()[..]]);
    assert!(page.next.is_empty());
}

#[test]
fn every_scheme_signs_on_a_device() {
    let home = home();
    let daemon = home.start();
    let (ed25519, p256, rsa) = (daemon.blob("ed25519"), daemon.blob("p256"), daemon.blob("rsa"));
    let mut client = daemon.connect_service();
    for (key, scheme) in [
        (&ed25519, Scheme::Ed25519),
        (&p256, Scheme::Ecdsa(Hash::Sha256)),
        (&p256, Scheme::Ecdsa(Hash::Sha512)),
        (&rsa, Scheme::RsaPkcs1v15(Hash::Sha1)),
        (&rsa, Scheme::RsaPkcs1v15(Hash::Sha512)),
        (&rsa, Scheme::RsaPkcs1v15Raw),
        (&rsa, Scheme::RsaPss(Hash::Sha384)),
    ] {
        let bytes = client.ask(&use_key(sign(key, scheme, DATA), 0)).bytes();
        let key_type = PublicKey::parse(key).unwrap().key_type();
        let signature = Signature::from_bytes(scheme, key_type, bytes).unwrap();
        assert!(verify(key, scheme, &soft::message(DATA), &signature), "{scheme:?}");
    }
    for key in [&ed25519, &p256, &rsa] {
        let signature = client.ask(&use_key(ssh(key, DATA), 0)).bytes();
        assert!(PublicKey::parse(key).unwrap().verify(DATA, &signature).is_ok());
    }
    for task in [
        sign(&ed25519, Scheme::RsaPkcs1v15Raw, DATA),
        sign(&p256, Scheme::Ed25519, DATA),
        derive(&rsa, DeriveScheme::Ecdh, DATA),
        derive(&p256, DeriveScheme::X25519, &[9; 32]),
        decrypt(&ed25519, DecryptScheme::RsaPkcs1v15, DATA),
    ] {
        assert_eq!(client.ask(&use_key(task, 0)).code(), Code::Unsupported);
    }
    let stranger = Key::random().blob();
    assert_eq!(client.ask(&use_key(ssh(&stranger, DATA), 0)).code(), Code::NoSuchKey);
    assert_eq!(client.ask(&use_key(ssh(b"no blob", DATA), 0)).code(), Code::NoSuchKey);
}

#[test]
fn random_bytes_come_from_where_they_are_asked_of() {
    let home = home();
    let daemon = home.start();
    daemon.blob("p256");
    let mut client = daemon.connect_service();
    let mut random = |len, device| client.ask(&Request::Random { len, device });
    let [one, other] = [random(1024, ""), random(1024, "")].map(|reply| reply.bytes());
    assert!(one.len() == 1024 && other.len() == 1024 && one != other);
    assert_eq!(random(1, "").bytes().len(), 1);
    assert_eq!(random(1, "token").code(), Code::Unsupported);
    assert_eq!(random(1, "nobody").code(), Code::NoSuchKey);
}

#[test]
fn why_tells_of_every_refusal_plain_ones_too() {
    let home = home();
    let daemon = home.start();
    let key = daemon.blob("p256");
    let stranger = Key::random();
    let (mut plain, mut client) = (daemon.connect(), daemon.connect_service());
    assert_eq!(plain.request(&stranger.sign_message(DATA)), [FAILURE]);
    assert_eq!(plain.request(&message(UNLOCK, &[b"password"])), [FAILURE]);
    assert_eq!(plain.request(&message(18, &[&key])), [FAILURE]);
    assert_eq!(client.ask(&use_key(sign(&key, Scheme::Ed25519, DATA), 0)).code(), Code::Unsupported);
    assert_eq!(client.ask(&unlock("nobody", "1")).code(), Code::NoSuchKey);
    assert_eq!(
        compatible(&mut client, &compatible::Request::SignPrehash { key: &key, digest: DATA }),
        [EXTENSION_FAILURE]
    );

    let told = |client: &mut Client, all, max| {
        let reply = client.ask(&Request::Why { all, max });
        let refusals: Vec<RefusalEntry<'_>> = reply.ok();
        for refusal in &refusals {
            assert!(refusal.unix_ms > 1_600_000_000_000 && refusal.caller.contains(&std::process::id().to_string()));
            daemon.logs(refusal.reason);
        }
        refusals.iter().map(|r| (r.message.to_owned(), r.code, r.key.to_owned())).collect::<Vec<_>>()
    };
    let of_key = ssh_key::PublicKey::from_bytes(&key).unwrap().fingerprint(ssh_key::HashAlg::Sha256).to_string();
    let none = String::new;
    let own = [
        ("sign".to_owned(), Code::Unsupported, none()),
        ("unlock".to_owned(), Code::NoSuchKey, none()),
        ("sign".to_owned(), Code::Unsupported, of_key),
    ];
    let others = [
        ("remove".to_owned(), Code::NotPermitted, none()),
        ("unlock".to_owned(), Code::NotLocked, none()),
        ("sign".to_owned(), Code::NoSuchKey, stranger.fingerprint()),
    ];
    assert_eq!(told(&mut client, false, 0), own);
    assert_eq!(told(&mut client, true, 0), [&own[..], &others].concat());
    assert_eq!(told(&mut client, false, 1), own[..1]);
}

#[test]
fn a_device_that_fails_is_told_by_its_reason() {
    let mut home = Home::new();
    let rule = |slot: &str, action: &str| format!("[[rule]]\non = \"sign\"\nslot = {slot:?}\ndo = {action}\n");
    let actions = [
        ("hang", "\"hang\"", Code::Timeout),
        ("crash", "{ crash = \"abort\" }", Code::Restarted),
        ("away", "\"absent\"", Code::Absent),
        ("busy", "\"busy\"", Code::Busy),
        ("lie", "\"wrong\"", Code::Failed),
        ("fail", "{ fail = \"it burns\" }", Code::Failed),
        ("touch", "{ not_touched_ms = 10 }", Code::NotTouched),
    ];
    for (n, (name, action, _)) in actions.iter().enumerate() {
        let key = format!("[[key]]\nslot = \"k\"\ntype = \"p256\"\nseed = {}\nlabel = {name:?}\n", 100 + n);
        home.device(name, &(key + &rule("k", action)), "probe = \"50ms\"\ntimeout = \"20s\"");
    }
    let daemon = home.start();
    let mut client = daemon.connect_service();
    for (n, (name, _, code)) in actions.iter().enumerate() {
        let key = daemon.blob(name);
        daemon.logs(&format!("ready device={name:?}"));
        let deadline = if *name == "hang" { 200 } else { 0 };
        client.submit(n as u64, sign_digest(&key, &[1; 32]), deadline);
        let finished = client.collect_all(1);
        let failure = finished[0].reply.clone().unwrap_err();
        assert_eq!(failure.code, *code, "{name}: {failure:?}");
        assert_eq!(failure.retry_after_ms > 0, *code == Code::Busy, "{name}");
        assert!(!failure.message.is_empty() && failure.tries_left.is_none());
        // The same again, by the message that waits: a crashed device is back by then, or about to be.
        eventually(&format!("{name} is there again"), || {
            let reply = client.ask(&use_key(sign_digest(&key, &[1; 32]), 200));
            reply.code() == *code || (*name == "hang" && reply.code() == Code::Restarted)
        });
    }
}

#[test]
fn a_deadline_counts_from_the_arrival_of_its_frame() {
    const IN_FLIGHT: usize = 64;
    let mut home = home();
    let hang =
        "[[key]]\nslot = \"k\"\ntype = \"p256\"\nseed = 99\nlabel = \"hang\"\n[[rule]]\non = \"sign\"\ndo = \"hang\"\n";
    home.device("hang", hang, "timeout = \"2s\"");
    let daemon = home.start();
    let (good, hung) = (daemon.blob("p256"), daemon.blob("hang"));
    let mut client = daemon.connect_service();
    let mut frames = Vec::new();
    for _ in 0..IN_FLIGHT {
        frames.extend(frame_of(&use_key(sign_digest(&hung, &[1; 32]), 0)));
    }
    frames.extend(frame_of(&use_key(sign_digest(&good, &[1; 32]), 300)));
    frames.extend(frame_of(&use_key(sign_digest(&good, &[1; 32]), 60_000)));
    client.stream.write_all(&frames).unwrap();
    for _ in 0..=IN_FLIGHT {
        assert_eq!(client.hear(Name::Sign).code(), Code::Timeout);
    }
    client.hear(Name::Sign).ok::<Bytes>();
}

#[test]
fn a_full_queue_is_busy_for_us_and_a_wait_for_ssh() {
    let mut home = Home::new();
    let script = "control = CONTROL\n[[key]]\nslot = \"k\"\ntype = \"p256\"\nlabel = \"k\"\n[[rule]]\non = \"sign\"\ncount = 1\ndo = \"hang\"\n";
    home.device("token", script, "queue = 1\ntimeout = \"3s\"");
    let daemon = home.start();
    let key = daemon.blob("k");
    let mut client = daemon.connect_service();
    client.submit(1, sign_digest(&key, &[1; 32]), 0);
    eventually("the lane is taken", || device(&mut client, "token", |device| device.running) == 1);
    client.submit(2, sign_digest(&key, &[2; 32]), 0);
    eventually("the queue is full", || device(&mut client, "token", |device| device.waiting) == 1);
    let failure = client.ask(&use_key(sign_digest(&key, &[3; 32]), 0)).failure();
    assert!(failure.code == Code::Busy && failure.retry_after_ms > 0, "{failure:?}");
    let mut body = message(13, &[&key, DATA]);
    body.extend([0; 4]);
    let mut plain = daemon.connect();
    plain.send(&body);
    // It ends: with a signature when the hanging process was replaced in time, without one at its deadline.
    assert!(matches!(plain.receive().unwrap()[0], SIGN_RESPONSE | FAILURE));
}

#[test]
fn who_fills_a_queue_keeps_nobody_else_out() {
    const QUEUE: u64 = 8;
    let mut home = Home::new();
    let script = "[[key]]\nslot = \"k\"\ntype = \"p256\"\nlabel = \"k\"\n[[rule]]\non = \"sign\"\ndo = \"hang\"\n";
    home.device("token", script, &format!("queue = {QUEUE}\ntimeout = \"1h\""));
    let daemon = home.start();
    let key = daemon.blob("k");
    let (mut greedy, mut other) = (daemon.connect_service(), daemon.connect_service());
    greedy.submit(0, sign_digest(&key, &[1; 32]), 0);
    eventually("the lane is taken", || device(&mut other, "token", |device| device.running) == 1);
    for n in 1..=QUEUE {
        greedy.submit(n, sign_digest(&key, &[1; 32]), 0);
        // Each ticket has a task of its own, which may come to the queue before that of an earlier one.
        eventually("it waits", || u64::from(device(&mut other, "token", |device| device.waiting)) == n);
    }
    assert_eq!(greedy.ask(&use_key(sign_digest(&key, &[1; 32]), 0)).code(), Code::Busy);
    assert_eq!(other.ask(&use_key(sign_digest(&key, &[1; 32]), 100)).code(), Code::Timeout, "it had its place");
    let finished = greedy.collect_all(1);
    assert_eq!((finished[0].id, finished[0].reply.as_ref().unwrap_err().code), (QUEUE, Code::Busy));
    // Plain requests wait beside the others, and take no place from them.
    (0..QUEUE).for_each(|n| drop(greedy.ask(&Request::Cancel(n))));
    eventually("nothing waits", || device(&mut other, "token", |device| device.waiting) == 0);
    let mut plain = daemon.connect();
    let mut body = message(13, &[&key, DATA]);
    body.extend([0; 4]);
    (0..2 * QUEUE).for_each(|_| plain.send(&body));
    eventually("they wait", || u64::from(device(&mut other, "token", |device| device.waiting)) == 2 * QUEUE);
    assert_eq!(greedy.ask(&use_key(sign_digest(&key, &[1; 32]), 100)).code(), Code::Timeout);
}

#[test]
fn a_pin_that_was_refused_is_not_sent_again() {
    let mut home = Home::new();
    home.device("token", LOCKED, "");
    let daemon = home.start();
    let key = daemon.blob("locked");
    let mut client = daemon.connect_service();
    daemon.logs("ready device=\"token\"");
    let tries = || device(&mut daemon.connect_service(), "token", |device| device.tries_left).unwrap();
    let sign = || use_key(sign_digest(&key, &[1; 32]), 0);

    assert_eq!(client.ask(&sign()).code(), Code::NoPrompt);
    let refused = client.ask(&unlock("token", "000000")).failure();
    assert_eq!((refused.code, refused.tries_left), (Code::PinWrong, Some(4)));
    let again = client.ask(&unlock("token", "000000")).failure();
    assert_eq!((again.code, tries()), (Code::PinWrong, 4), "it costs no try");
    assert_eq!(client.ask(&sign()).code(), Code::NoPrompt);
    // Not even after a restart.
    drop(daemon);
    let daemon = home.start();
    let mut client = daemon.connect_service();
    let tries = || device(&mut daemon.connect_service(), "token", |device| device.tries_left).unwrap();
    assert_eq!((client.ask(&unlock("token", "000000")).code(), tries()), (Code::PinWrong, 4));

    client.ask(&Request::Unlock(Target::Key(&key), "123456".into())).ok::<()>();
    client.ask(&sign()).ok::<Bytes>();
    eventually("the device says that it is open", || {
        device(&mut client, "token", |device| (device.pin, device.tries_left)) == (PinState::Open, Some(5))
    });
    client.ask(&Request::Lock(Target::Device("token"))).ok::<()>();
    assert_eq!(device(&mut client, "token", |device| device.pin), PinState::Needed);
    assert_eq!(client.ask(&sign()).code(), Code::NoPrompt, "a locked device has forgotten its PIN");

    // A person may say that it is to be tried again.
    client.ask(&Request::Forget(Target::Everything)).ok::<()>();
    let refused = client.ask(&unlock("token", "000000")).failure();
    assert_eq!((refused.code, refused.tries_left), (Code::PinWrong, Some(4)));
    for (pin, left) in [("000001", 3), ("000002", 2), ("000003", 1), ("000004", 0)] {
        let refused = client.ask(&unlock("token", pin)).failure();
        assert_eq!((refused.code, refused.tries_left), (Code::PinWrong, Some(left)), "{pin}");
    }
    let blocked = client.ask(&unlock("token", "123456")).failure();
    assert_eq!((blocked.code, blocked.tries_left), (Code::PinBlocked, Some(0)));
    assert_eq!(device(&mut client, "token", |device| device.pin), PinState::Blocked);
    assert_eq!(client.ask(&unlock("nobody", "1")).code(), Code::NoSuchKey);
    assert_eq!(client.ask(&Request::Lock(Target::Key(&Key::random().blob()))).code(), Code::NoSuchKey);
    assert!(!home.log().contains("00000") && !home.log().contains("123456"), "a PIN in the log");
}

/// The secret of the scripted Ed25519 key with this seed.
fn scripted_seed(seed: u64) -> [u8; 32] {
    let text = [&b"Ed25519"[..], &seed.to_be_bytes()].concat();
    digest(&SHA256, &text).as_ref().try_into().unwrap()
}

/// Adds the device's Ed25519 key a second time, as `ssh-add` would.
fn add_a_second_time(client: &mut Client, constraints: &[u8]) -> Vec<u8> {
    let seed = scripted_seed(1);
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let public = pair.public_key().as_ref();
    let kind = if constraints.is_empty() { 17 } else { 25 };
    let mut body = message(kind, &[b"ssh-ed25519", public, &[&seed, public].concat(), b"second"]);
    body.extend(constraints);
    assert_eq!(client.request(&body), [SUCCESS]);
    PublicKey::Ed25519(public).to_blob()
}

/// `restrict-destination-v00@openssh.com`: to one host with this key.
fn only_to(host: &Key) -> Vec<u8> {
    let mut to = Vec::new();
    for text in [&b""[..], b"host", b""] {
        put(&mut to, text);
    }
    put(&mut to, &host.blob());
    to.push(0);
    let mut from = Vec::new();
    (0..3).for_each(|_| put(&mut from, b""));
    let mut step = Vec::new();
    put(&mut step, &from);
    put(&mut step, &to);
    put(&mut step, b"");
    let (mut steps, mut constraint) = (Vec::new(), vec![255]);
    put(&mut steps, &step);
    put(&mut constraint, b"restrict-destination-v00@openssh.com");
    put(&mut constraint, &steps);
    constraint
}

/// Every way but the standard's to use a key.
fn every_way(key: &[u8]) -> Vec<KeyUse<'_>> {
    vec![
        sign(key, Scheme::Ed25519, DATA),
        sign(key, Scheme::Ed25519BlindedTor, &[7; 40]),
        sign_digest(key, &[1; 32]),
        sign(key, Scheme::RsaPkcs1v15Raw, DATA),
        sign(key, Scheme::RsaPss(Hash::Sha256), DATA),
        decrypt(key, DecryptScheme::RsaPkcs1v15, &[1; 256]),
        decrypt(key, DecryptScheme::RsaOaep(Hash::Sha256), &[1; 256]),
        derive(key, DeriveScheme::Ecdh, &[4; 65]),
        derive(key, DeriveScheme::X25519, &[9; 32]),
    ]
}

/// No message does more with the key than a plain signature.
#[track_caller]
fn does_nothing_else(client: &mut Client, key: &[u8]) {
    for (n, task) in every_way(key).into_iter().enumerate() {
        assert_eq!(client.ask(&use_key(task.clone(), 0)).code(), Code::NotPermitted, "way {n}");
        client.submit(1, task, 0);
        assert_eq!(client.collect_all(1)[0].reply.as_ref().unwrap_err().code, Code::NotPermitted, "way {n}, submitted");
    }
    for request in compatible_requests(key) {
        assert_eq!(compatible(client, &request), [EXTENSION_FAILURE], "{:?}", request.name());
    }
    let ids = compatible(client, &compatible::Request::DecryptDeriveIds);
    assert!(identities(&ids).iter().all(|(blob, _)| blob != key), "listed as if it decrypted");
}

/// The answer to `decrypt-derive-ids@metacode.biz`.
fn identities(answer: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rest = &answer[1..];
    assert_eq!((answer[0], take(&mut rest)), (29, &b"decrypt-derive-ids@metacode.biz"[..]));
    support::client::identities(&[&[12], rest].concat())
}

#[test]
fn a_key_that_was_added_makes_plain_signatures_only() {
    let home = Home::new();
    let daemon = home.start();
    let mut client = daemon.connect_service();
    for (name, options) in [
        ("ed25519", &["-t", "ed25519"][..]),
        ("ecdsa", &["-t", "ecdsa", "-b", "256"]),
        ("rsa", &["-t", "rsa", "-b", "2048"]),
    ] {
        let file = keygen(&home.path(""), name, options);
        daemon.ssh_add(&["-q", file.to_str().unwrap()]).ok();
        let key = daemon.blob(name);
        does_nothing_else(&mut client, &key);
        let signature = client.ask(&use_key(ssh(&key, DATA), 0)).bytes();
        assert!(PublicKey::parse(&key).unwrap().verify(DATA, &signature).is_ok());
    }
    // A key that ssh has no use for, as arti keeps them: it has no plain signature either.
    let dir = home.path("");
    openssl(&dir, "genpkey -algorithm X25519 -outform DER -out private.der").ok();
    openssl(&dir, "pkey -inform DER -in private.der -pubout -outform DER -out public.der").ok();
    let [private, public] = ["private.der", "public.der"].map(|file| {
        let der = fs::read(dir.join(file)).unwrap();
        der[der.len() - 32..].to_vec()
    });
    let add = message(17, &[b"x25519@spec.torproject.org", &public, &private, b"x25519"]);
    assert_eq!(client.request(&add), [SUCCESS]);
    does_nothing_else(&mut client, &PublicKey::X25519(&public).to_blob());
    assert_eq!(client.ask(&use_key(ssh(&PublicKey::X25519(&public).to_blob(), DATA), 0)).code(), Code::Unsupported);
    let alias = PublicKey::Ed25519(&public).to_blob();
    let request = compatible::Request::DecryptDerive { key: &alias, data: &[9; 32] };
    assert_eq!(compatible(&mut client, &request), [EXTENSION_FAILURE]);
}

#[test]
fn a_destination_constraint_holds_in_every_message() {
    let home = home();
    let daemon = home.start();
    let granted = daemon.blob("ed25519");
    let mut client = daemon.connect_service();
    client.ask(&use_key(sign(&granted, Scheme::Ed25519, DATA), 0)).ok::<Bytes>();
    // From now on it is the same key in two places, and the constraint of one of them is that of both.
    let key = add_a_second_time(&mut client, &only_to(&Key::random()));
    assert_eq!(key, granted);
    does_nothing_else(&mut client, &key);
    assert_eq!(client.ask(&use_key(ssh(&key, DATA), 0)).code(), Code::NotPermitted);
    client.submit(1, ssh(&key, DATA), 0);
    assert_eq!(client.collect_all(1)[0].reply.as_ref().unwrap_err().code, Code::NotPermitted);
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    let entry = page.entries.iter().find(|entry| entry.blob == key).unwrap();
    assert!(entry.operations.is_empty() && entry.constraints.contains(&"destination"), "{entry:?}");
}

#[test]
fn a_confirmation_is_asked_for_in_every_message() {
    let mut askpass = Askpass::new();
    let mut home = Home::new();
    home.device("token", TOKEN, "confirm = true");
    home.askpass(&askpass);
    let daemon = home.start();
    let (ed25519, p256, rsa) = (daemon.blob("ed25519"), daemon.blob("p256"), daemon.blob("rsa"));
    let mut client = daemon.connect_service();
    for (task, code, asked) in [
        (ssh(&ed25519, DATA), 1, "use of"),
        (sign(&ed25519, Scheme::Ed25519, DATA), 1, "use of"),
        (sign_digest(&p256, &[1; 32]), 0, "use of"),
        (derive(&p256, DeriveScheme::Ecdh, &PublicKey::parse(&p256).map(point).unwrap()), 0, "derivation of a secret"),
        (decrypt(&rsa, DecryptScheme::RsaPkcs1v15, &[1; 256]), 1, "decryption"),
    ] {
        client.tell(&use_key(task.clone(), 0));
        let prompt = askpass.next();
        assert!(prompt.kind == "confirm" && prompt.text.starts_with(&format!("Allow {asked}")), "{prompt:?}");
        askpass.answer(code, "");
        let reply = client.hear(task.name());
        assert_eq!(reply.read::<Bytes>().err().map(|failure| failure.code), (code == 1).then_some(Code::Denied));
        client.submit(1, task, 0);
        askpass.next();
        askpass.answer(1, "");
        assert_eq!(client.collect_all(1)[0].reply.as_ref().unwrap_err().code, Code::Denied);
    }
    for request in [
        compatible::Request::DecryptDerive { key: &rsa, data: &[1; 256] },
        compatible::Request::DecryptDerive { key: &p256, data: &[4; 65] },
        compatible::Request::Ecdh { key: &p256, partner: &p256 },
        compatible::Request::SignPrehash { key: &p256, digest: &[1; 32] },
        compatible::Request::SignPrehash { key: &rsa, digest: &[1; 32] },
    ] {
        let mut frame = Vec::new();
        request.put(&mut frame);
        client.send(&frame[4..]);
        askpass.next();
        askpass.answer(1, "");
        assert_eq!(client.receive().unwrap(), [EXTENSION_FAILURE], "{:?}", request.name());
    }
    assert!(!askpass.has_asked());

    // The same key twice: the one that was added needs a confirmation as well.
    drop(daemon);
    let home = self::home();
    let daemon = home.start();
    daemon.blob("ed25519");
    let mut client = daemon.connect_service();
    let key = add_a_second_time(&mut client, CONFIRM);
    assert_eq!(client.ask(&use_key(sign(&key, Scheme::Ed25519, DATA), 0)).code(), Code::NoPrompt);
}

fn point(key: PublicKey<'_>) -> Vec<u8> {
    match key {
        PublicKey::Ecdsa(Curve::P256, point) => point.to_vec(),
        _ => panic!("no P-256 key"),
    }
}

#[test]
fn a_security_key_makes_its_own_signatures_only() {
    let mut home = Home::new();
    home.configure(&format!("[agent]\nallowed_providers = {:?}", support::SK_DUMMY));
    let daemon = home.start();
    let file = keygen(&home.path(""), "sk", &["-t", "ed25519-sk", "-O", "no-touch-required"]);
    let add = daemon.ssh_add(&["-q", "-S", support::SK_DUMMY, file.to_str().unwrap()]);
    add.ok();
    let key = daemon.blob("sk");
    let mut client = daemon.connect_service();
    does_nothing_else(&mut client, &key);
    let signature = client.ask(&use_key(ssh(&key, DATA), 0)).bytes();
    assert!(PublicKey::parse(&key).unwrap().verify(DATA, &signature).is_ok());
}

#[test]
fn a_door_with_some_keys_shows_no_others() {
    let mut home = Home::new();
    home.device("token", TOKEN, "");
    home.device("other", LOCKED, "");
    let daemon = home.start();
    let (ed25519, p256) = (daemon.blob("ed25519"), daemon.blob("p256"));
    drop(daemon);
    let shown = ssh_key::PublicKey::from_bytes(&p256).unwrap().fingerprint(ssh_key::HashAlg::Sha256).to_string();
    let path = home.path("few");
    home.configure(&format!("[[listen]]\ndoor = \"service\"\npath = {path:?}\nkeys = [{shown:?}]"));
    let daemon = home.start();
    daemon.blob("p256");
    let mut client = Client::connect(&path);
    let reply = client.ask(&Request::Keys(first_page(0)));
    assert_eq!(
        reply.ok::<Page<KeyEntry<'_>>>().entries.iter().map(|entry| entry.blob).collect::<Vec<_>>(),
        [&p256[..]]
    );
    let reply = client.ask(&Request::Devices(first_page(0)));
    assert_eq!(reply.ok::<Page<DeviceEntry<'_>>>().entries.iter().map(|entry| entry.id).collect::<Vec<_>>(), ["token"]);
    client.ask(&use_key(sign_digest(&p256, &[1; 32]), 0)).ok::<Bytes>();
    for task in every_way(&ed25519) {
        assert_eq!(client.ask(&use_key(task, 0)).code(), Code::NoSuchKey);
    }
    for request in [
        unlock("token", "1234"),
        unlock("other", "1234"),
        Request::Lock(Target::Device("token")),
        Request::Forget(Target::Everything),
        Request::Forget(Target::Key(&p256)),
    ] {
        assert_eq!(client.ask(&request).code(), Code::NotPermitted, "{:?}", request.name());
    }
    assert_eq!(client.ask(&Request::Random { len: 1, device: "other" }).code(), Code::NoSuchKey);
    // Nor does it tell of keys that others asked for.
    let mut elsewhere = daemon.connect_service();
    assert_eq!(
        elsewhere.ask(&use_key(decrypt(&ed25519, DecryptScheme::RsaPkcs1v15, DATA), 0)).code(),
        Code::Unsupported
    );
    let refusals =
        |client: &mut Client, all| client.ask(&Request::Why { all, max: 0 }).ok::<Vec<RefusalEntry<'_>>>().len();
    assert_eq!(refusals(&mut client, true), refusals(&mut client, false));
    assert_eq!(refusals(&mut elsewhere, false), 1);
}

#[test]
fn an_attempt_to_bind_a_session_ends_all_at_the_service_door() {
    let home = home();
    let daemon = home.start();
    let key = daemon.blob("p256");
    let mut client = daemon.connect_service();
    client.submit(1, sign_digest(&key, &[1; 32]), 0);
    assert_eq!(client.request(&message(EXTENSION, &[b"session-bind@openssh.com"])), [FAILURE]);
    for request in one_of_each(&key) {
        assert_eq!(client.ask(&request).code(), Code::Denied, "{:?}", request.name());
    }
    for request in compatible_requests(&key) {
        assert_eq!(compatible(&mut client, &request), [FAILURE], "{:?}", request.name());
    }
    assert_eq!(client.request(&[11]), [FAILURE]);
    assert_eq!(client.request(&message(LOCK, &[b"password"])), [FAILURE]);
}

fn openssl(dir: &Path, arguments: &str) -> support::Outcome {
    run(command("openssl", dir).args(arguments.split_whitespace()))
}

/// Writes the public key of `blob` to `dir/NAME`, in PEM.
fn to_pem(dir: &Path, blob: &[u8], name: &str) {
    let mut reader = blob;
    let kind = String::from_utf8(take(&mut reader).to_vec()).unwrap();
    fs::write(dir.join("pub"), format!("{kind} {}\n", Base64::encode_string(blob))).unwrap();
    let pem = run(command("ssh-keygen", dir).args(["-e", "-m", "PKCS8", "-f", "pub"])).ok();
    fs::write(dir.join(name), pem).unwrap();
}

/// The result in an answer to one of the messages of other agents.
#[track_caller]
fn result(request: &compatible::Request<'_>, answer: &[u8]) -> Vec<u8> {
    compatible::read_result(request.name(), answer).unwrap().unwrap_or_else(|| panic!("{answer:?}")).to_vec()
}

#[test]
fn openssl_agrees_with_the_messages_of_other_agents_and_with_ours() {
    let home = home();
    let daemon = home.start();
    let (ed25519, p256, rsa) = (daemon.blob("ed25519"), daemon.blob("p256"), daemon.blob("rsa"));
    let mut client = daemon.connect_service();
    let dir = home.path("");
    to_pem(&dir, &p256, "p256.pem");
    to_pem(&dir, &rsa, "rsa.pem");

    let ids = identities(&compatible(&mut client, &compatible::Request::DecryptDeriveIds));
    assert_eq!(ids, [(p256.clone(), b"p256".to_vec()), (rsa.clone(), b"rsa".to_vec())]);

    fs::write(dir.join("text"), "for their eyes only").unwrap();
    openssl(&dir, "pkeyutl -encrypt -pubin -inkey rsa.pem -in text -out sealed").ok();
    let sealed = fs::read(dir.join("sealed")).unwrap();
    let request = compatible::Request::DecryptDerive { key: &rsa, data: &sealed };
    assert_eq!(result(&request, &compatible(&mut client, &request)), b"for their eyes only");
    assert_eq!(
        client.ask(&use_key(decrypt(&rsa, DecryptScheme::RsaPkcs1v15, &sealed), 0)).bytes(),
        b"for their eyes only"
    );

    openssl(&dir, "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out peer").ok();
    openssl(&dir, "pkey -in peer -pubout -outform DER -out peer.der").ok();
    openssl(&dir, "pkeyutl -derive -inkey peer -peerkey p256.pem -out secret").ok();
    let der = fs::read(dir.join("peer.der")).unwrap();
    let (peer, secret) = (&der[der.len() - 65..], fs::read(dir.join("secret")).unwrap());
    let partner = PublicKey::Ecdsa(Curve::P256, peer).to_blob();
    for request in [
        compatible::Request::DecryptDerive { key: &p256, data: peer },
        compatible::Request::Ecdh { key: &p256, partner: &partner },
    ] {
        assert_eq!(result(&request, &compatible(&mut client, &request)), secret, "{:?}", request.name());
    }
    assert_eq!(client.ask(&use_key(derive(&p256, DeriveScheme::Ecdh, peer), 0)).bytes(), secret);

    let digest = digest(&SHA256, DATA);
    fs::write(dir.join("digest"), digest.as_ref()).unwrap();
    for (key, pem, options) in [(&p256, "p256.pem", ""), (&rsa, "rsa.pem", "-pkeyopt digest:sha256")] {
        let request = compatible::Request::SignPrehash { key, digest: digest.as_ref() };
        let signature = result(&request, &compatible(&mut client, &request));
        fs::write(dir.join("signature"), signature).unwrap();
        openssl(&dir, &format!("pkeyutl -verify -pubin -inkey {pem} -in digest -sigfile signature {options}")).ok();
    }

    for request in [
        compatible::Request::DecryptDerive { key: &ed25519, data: peer },
        compatible::Request::Ecdh { key: &ed25519, partner: &partner },
        compatible::Request::Ecdh { key: &p256, partner: &rsa },
        compatible::Request::SignPrehash { key: &ed25519, digest: digest.as_ref() },
        compatible::Request::SignPrehash { key: &p256, digest: DATA },
        compatible::Request::DecryptDerive { key: &rsa, data: peer },
    ] {
        assert_eq!(compatible(&mut client, &request), [EXTENSION_FAILURE], "{:?}", request.name());
    }
    // A flag that nobody has given a meaning.
    let mut body = message(EXTENSION, &[b"sign-prehash@arekinath.github.io", &p256, digest.as_ref()]);
    body.extend([0, 0, 0, 1]);
    assert_eq!(client.request(&body), [EXTENSION_FAILURE]);
}

#[test]
fn ssh_add_notices_nothing() {
    let mut home = home();
    home.device("locked", LOCKED, "");
    let daemon = home.start();
    daemon.blob("locked");
    let file = keygen(&home.path(""), "plain", &["-t", "ed25519"]);
    daemon.ssh_add(&["-q", file.to_str().unwrap()]).ok();
    assert_eq!(daemon.ssh_add(&["-l"]).ok().lines().count(), 5);
    daemon.ssh_add(&["-T", &format!("{}.pub", file.display())]).ok();
    let lock = |option: &str| {
        let mut command = command("ssh-add", &home.path(""));
        command.env("SSH_AUTH_SOCK", home.path("agent"));
        answering(&mut command, &home.path(""), "password");
        run(command.arg(option))
    };
    lock("-x").ok();
    daemon.ssh_add(&["-l"]).fails_with(1);
    lock("-X").ok();
    daemon.ssh_add(&["-q", "-D"]).ok();
    assert_eq!(daemon.ssh_add(&["-l"]).ok().lines().count(), 4, "keys of devices stay");
}
