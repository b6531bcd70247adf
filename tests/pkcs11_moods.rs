//! A PKCS#11 module that hangs, crashes, exits, dawdles, fails and lies: the caller is told so in time, nobody else notices,
//! and the device is well again as soon as the module is, without a person.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use strongroom::{
    agent::message::{Code, DeviceEntry, Failure, Page, Request},
    devices::{Hash, Input, Scheme},
};
use support::{
    PATIENCE,
    bad_module::BadModule,
    client::{Client, Key, SIGN_REQUEST, SIGN_RESPONSE, message},
    daemon::{Daemon, Home},
    eventually,
    service::{Bytes, first_page, sign, ssh, use_key},
    softhsm::{self, SoftHsm},
};

/// The misbehaving device's own time for an operation.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Two tokens: one behind the module that misbehaves, one behind SoftHSM itself.
struct Moody {
    module: BadModule,
    home: Home,
    tokens: SoftHsm,
}

impl Moody {
    fn new() -> Self {
        let tokens = SoftHsm::with_token("moody");
        tokens.init_token("other");
        tokens.generate("moody", "EC:prime256v1", "01", "moody", &[]);
        tokens.generate("other", "EC:prime256v1", "01", "other", &[]);
        let (module, mut home) = (BadModule::build(), Home::new());
        home.env("SOFTHSM2_CONF", tokens.conf());
        let pin = home.path("pin");
        fs::write(&pin, softhsm::PIN).unwrap();
        for (name, library, timeout) in [("moody", module.path(), TIMEOUT), ("other", softhsm::MODULE.into(), PATIENCE)]
        {
            home.configure(&format!(
                "[[device]]\nname = \"{name}\"\ndriver = \"pkcs11\"\nmodule = {library:?}\n\
                 token = \"pkcs11:token={name}\"\npin = {{ file = {pin:?} }}\nsessions = 2\ntimeout = {:?}\n\
                 grace = \"100ms\"\nprobe = \"200ms\"\nopen_timeout = \"10s\"",
                format!("{}s", timeout.as_secs())
            ));
        }
        Self { module, home, tokens }
    }
}

/// A signature over data, with a deadline far beyond the device's own time.
fn signature(client: &mut Client, key: &[u8]) -> Result<Vec<u8>, Failure> {
    let reply = client.ask(&use_key(ssh(key, b"data"), 30_000));
    reply.read::<Bytes>().map(|bytes| bytes.to_vec())
}

/// How often the others sign at least while something hangs for [`TIMEOUT`]: it takes them milliseconds, and whoever waits for it
/// signs once.
const MEANWHILE: usize = 5;

/// Signs with the other token and with a key in memory until told to stop: nothing may fail there.
fn others<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    daemon: &'scope Daemon<'_>,
    other: &'scope [u8],
    soft: &'scope Key,
    over: &'scope AtomicBool,
    count: &'scope AtomicUsize,
) -> thread::ScopedJoinHandle<'scope, ()> {
    scope.spawn(move || {
        let mut client = daemon.connect();
        while !over.load(Ordering::Relaxed) {
            client.sign(soft);
            let mut body = message(SIGN_REQUEST, &[other, b"data"]);
            body.extend([0; 4]);
            assert_eq!(client.request(&body)[0], SIGN_RESPONSE, "the other token");
            count.fetch_add(1, Ordering::Relaxed);
        }
    })
}

#[test]
fn each_mood_costs_its_own_requests_and_passes() {
    let moody = Moody::new();
    let daemon = moody.home.start();
    let (key, other) = (daemon.blob("moody"), daemon.blob("other"));
    let soft = Key::random();
    daemon.connect().add(&soft, "soft", &[]);
    let mut client = daemon.connect_service();
    signature(&mut client, &key).unwrap();
    signature(&mut client, &other).unwrap();
    let (over, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let others = others(scope, &daemon, &other, &soft, &over, &count);
        for (mood, code, words) in [
            ("hang", Code::Timeout, "in time"),
            ("crash", Code::Restarted, "restarted"),
            ("exit", Code::Restarted, "restarted"),
            ("fail=30", Code::Failed, "CKR_DEVICE_ERROR"),
            ("fail=6", Code::Failed, "CKR_FUNCTION_FAILED"),
            ("wrong", Code::Failed, "does not verify"),
        ] {
            moody.module.mood(&format!("C_Sign {mood}\nC_SignFinal {mood}\n"));
            let (asked, before) = (Instant::now(), count.load(Ordering::Relaxed));
            let failure = signature(&mut client, &key).unwrap_err();
            let meanwhile = count.load(Ordering::Relaxed) - before;
            assert_eq!(failure.code, code, "{mood}: {failure:?}");
            assert!(failure.message.contains(words), "{mood}: {failure:?}");
            assert!(asked.elapsed() < PATIENCE / 4, "{mood}: told in {:?}", asked.elapsed());
            assert!(mood != "hang" || meanwhile >= MEANWHILE, "the others signed {meanwhile} times meanwhile");
            moody.module.recover();
            eventually(&format!("it signs again after {mood}"), || signature(&mut client, &key).is_ok());
        }
        over.store(true, Ordering::Relaxed);
        others.join().unwrap();
    });
    let log = moody.home.log();
    let restarts = log.lines().filter(|line| line.contains("restarted: ") && line.contains("moody")).count();
    assert_eq!(restarts, 3, "the hang, the crash and the exit, and nothing else");
}

#[test]
fn a_slow_module_is_waited_for_and_many_share_its_sessions() {
    let moody = Moody::new();
    let daemon = moody.home.start();
    let key = daemon.blob("moody");
    let mut client = daemon.connect_service();
    signature(&mut client, &key).unwrap();
    moody.module.mood("C_Sign slow=200\nC_SignFinal slow=200\n");
    let asked = Instant::now();
    let mut clients: Vec<_> = (0..4).map(|_| daemon.connect_service()).collect();
    for client in &mut clients {
        client.tell(&use_key(ssh(&key, b"data"), 0));
    }
    for client in &mut clients {
        client.hear(strongroom::agent::message::Name::Sign).ok::<Bytes>();
    }
    assert!(asked.elapsed() >= Duration::from_millis(400), "two at a time");
    // Slower than the device's time, and as slow to whoever asks again: each is told in time.
    moody.module.mood("C_Sign slow=10000\nC_SignFinal slow=10000\n");
    let asked = Instant::now();
    assert_eq!(signature(&mut client, &key).unwrap_err().code, Code::Timeout);
    assert!(asked.elapsed() >= TIMEOUT);
    moody.module.recover();
    eventually("it signs again", || signature(&mut client, &key).is_ok());
}

#[test]
fn a_module_that_cannot_be_opened_is_tried_again_by_itself() {
    let moody = Moody::new();
    moody.module.mood("C_Initialize fail=30\n");
    let daemon = moody.home.start();
    daemon.logs("failed, tried again in the background");
    assert!(moody.home.log().contains("C_Initialize answered CKR_DEVICE_ERROR"), "{}", moody.home.log());
    let other = daemon.blob("other");
    signature(&mut daemon.connect_service(), &other).unwrap();
    moody.module.recover();
    let key = daemon.blob("moody");
    let mut client = daemon.connect_service();
    eventually("it signs", || signature(&mut client, &key).is_ok());
    // Its keys stay listed while it cannot be opened, and what is asked of it is refused with the reason.
    moody.module.mood("C_Initialize crash\nC_Sign crash\nC_SignFinal crash\n");
    assert_eq!(signature(&mut client, &key).unwrap_err().code, Code::Restarted);
    daemon.logs("ended by signal: 11 (SIGSEGV)");
    let failure = signature(&mut client, &key).unwrap_err();
    assert_eq!(failure.code, Code::Failed, "{failure:?}");
    assert!(failure.message.contains("has failed"), "{failure:?}");
    assert_eq!(daemon.blob("moody"), key);
    moody.module.recover();
    eventually("it is well again", || signature(&mut client, &key).is_ok());
}

#[test]
fn a_full_table_of_sessions_is_told_and_waited_for() {
    let moody = Moody::new();
    moody.module.mood("C_OpenSession fail=b1\n");
    let daemon = moody.home.start();
    daemon.logs("all sessions of the token are taken; end other programs that use it");
    signature(&mut daemon.connect_service(), &daemon.blob("other")).unwrap();
    moody.module.recover();
    let key = daemon.blob("moody");
    eventually("it signs", || signature(&mut daemon.connect_service(), &key).is_ok());
}

#[test]
fn an_object_that_cannot_be_read_spoils_no_other_and_is_not_taken_for_gone() {
    let moody = Moody::new();
    moody.tokens.generate("moody", "EC:prime256v1", "02", "second", &[]);
    moody.module.mood("C_GetAttributeValue fail=30 @2\nC_GetAttributeValue fail=30 @258\n");
    let daemon = moody.home.start();
    let key = daemon.blob("moody");
    let mut client = daemon.connect_service();
    signature(&mut client, &key).unwrap();
    eventually("what is left out is told", || {
        let reply = daemon.connect_service().ask(&Request::Devices(first_page(0)));
        let page: Page<DeviceEntry<'_>> = reply.ok();
        let device = page.entries.iter().find(|device| device.id == "moody").unwrap();
        let about = |note: &&&str| note.contains("private key cannot be read") && note.contains("CKR_DEVICE_ERROR");
        device.notes.iter().filter(about).count() == 1
    });
    let is_listed = |comment: &str| daemon.connect().list().iter().any(|(_, c)| c == comment.as_bytes());
    assert!(!is_listed("second"));
    moody.module.recover();
    let second = daemon.blob("second");
    signature(&mut client, &second).unwrap();

    // An EC key on SoftHSM has its public half in the public key alone.
    for (id, mood) in [("03", "fail=30 @2"), ("04", "fail=5 @2"), ("05", "fail=82 @2"), ("06", "fail=5 @258")] {
        moody.module.mood(&format!("C_GetAttributeValue {mood}\n"));
        // The token has been looked at since when this one is there.
        moody.tokens.generate("moody", "EC:prime256v1", id, mood, &[]);
        let another = daemon.blob(mood);
        assert!(is_listed("second"), "{mood}");
        signature(&mut client, &another).unwrap();
        moody.module.recover();
        eventually("it signs again", || signature(&mut client, &second).is_ok());
    }
}

#[test]
fn a_login_that_hangs_or_fails_is_not_repeated() {
    let moody = Moody::new();
    let daemon = moody.home.start();
    let key = daemon.blob("moody");
    let mut client = daemon.connect_service();
    moody.module.mood("C_Login hang\n");
    let failure = signature(&mut client, &key).unwrap_err();
    assert!(matches!(failure.code, Code::Timeout), "{failure:?}");
    moody.module.recover();
    // What became of the PIN is not known: a person has to allow it to be sent again.
    let failure = signature(&mut client, &key).unwrap_err();
    assert_eq!(failure.code, Code::PinRequired, "{failure:?}");
    assert!(moody.module.results("C_Login").is_empty());
    client.ask(&support::service::unlock("moody", softhsm::PIN)).ok::<()>();
    signature(&mut client, &key).unwrap();
    assert_eq!(moody.module.results("C_Login"), ["0"]);
}

#[test]
fn a_key_whose_module_lies_is_refused_in_every_scheme() {
    let moody = Moody::new();
    let daemon = moody.home.start();
    let key = daemon.blob("moody");
    let mut client = daemon.connect_service();
    signature(&mut client, &key).unwrap();
    moody.module.mood("C_Sign wrong\nC_SignFinal wrong\n");
    for hash in [Hash::Sha256, Hash::Sha384, Hash::Sha512] {
        let failure = client.ask(&use_key(sign(&key, Scheme::Ecdsa(hash), b"data"), 0)).failure();
        assert_eq!(failure.code, Code::Failed);
        assert!(failure.message.contains("does not verify"), "{failure:?}");
        let digest = Input::Message(b"data".into()).digest(hash).unwrap().as_ref().to_vec();
        let operation =
            strongroom::devices::Operation::Sign { scheme: Scheme::Ecdsa(hash), input: Input::Digest(digest.into()) };
        let how = strongroom::agent::message::How::Operation(operation);
        let failure = client.ask(&use_key(strongroom::agent::message::KeyUse { key: &key, how }, 0)).failure();
        assert!(failure.message.contains("does not verify"), "{failure:?}");
    }
}
