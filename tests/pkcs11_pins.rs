//! What a PIN costs on a token that takes its time to refuse it, that has another one by now, or that has one try left; by
//! whoever sends it, and however many at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, process::Command};

use rustix::process::{Signal, kill_process};
use strongroom::agent::message::{Code, Failure, Name, RefusalEntry, Request};
use support::{
    bad_module::BadModule,
    cli::strongroom,
    client::{Client, FAILURE, message},
    daemon::{Daemon, Home},
    eventually, run,
    service::{Bytes, ssh, unlock, use_key},
    softhsm::{PIN, SoftHsm},
};

const WRONG: &str = "000000";
const ADD_SMARTCARD: u8 = 20;

fn signs(client: &mut Client, key: &[u8]) -> Result<(), Failure> {
    client.ask(&use_key(ssh(key, b"data"), 0)).read::<Bytes>().map(drop)
}

/// A token behind a module that can misbehave, with a key that wants a login for each use; as the device `hsm`.
fn each_time(more: &str) -> (SoftHsm, BadModule, Home) {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", "EC:prime256v1", "01", "each time", &["--always-auth"]);
    let (module, mut home) = (BadModule::build(), Home::new());
    home.configure(&hsm.device_of(&module.path(), "hsm", "vault", more));
    (hsm, module, home)
}

/// What was said to these requests, which are made at once.
fn at_once(daemon: &Daemon<'_>, requests: &[Request<'_>], name: Name) -> Vec<Result<(), Failure>> {
    let mut clients: Vec<_> = requests.iter().map(|_| daemon.connect_service()).collect();
    for (client, request) in clients.iter_mut().zip(requests) {
        client.tell(request);
    }
    let read = |client: &mut Client| match name {
        Name::Unlock => client.hear(name).read::<()>(),
        _ => client.hear(name).read::<Bytes>().map(drop),
    };
    clients.iter_mut().map(read).collect()
}

fn cli(home: &Home, words: &str) -> String {
    run(strongroom(home).args(words.split(' '))).ok()
}

fn refused(logins: &[String]) -> usize {
    logins.iter().filter(|rv| *rv == "a0").count()
}

#[test]
fn a_pin_that_the_token_takes_no_more_costs_one_try_however_many_uses_want_it() {
    let (_hsm, module, home) = each_time("sessions = 4");
    let daemon = home.start();
    let (key, mut client) = (daemon.blob("each time"), daemon.connect_service());
    signs(&mut client, &key).unwrap();
    signs(&mut client, &key).unwrap();
    assert_eq!(module.results("C_Login"), ["0", "0", "0"], "the token's, and one for each use");

    module.mood("C_Login slow=300\nC_Login fail=a0\n");
    let uses: Vec<_> = (0..4).map(|_| use_key(ssh(&key, b"data"), 0)).collect();
    let outcomes = at_once(&daemon, &uses, Name::Sign);
    assert!(
        outcomes.iter().all(|outcome| outcome.as_ref().is_err_and(|why| why.code == Code::PinWrong)),
        "{outcomes:?}"
    );
    assert_eq!(refused(&module.results("C_Login")), 1);

    // It would be right again, but nobody has said so.
    module.recover();
    for _ in 0..2 {
        assert_eq!(signs(&mut client, &key).unwrap_err().code, Code::PinWrong);
    }
    assert_eq!(module.results("C_Login").len(), 4);
    cli(&home, "forget hsm");
    signs(&mut client, &key).unwrap();
}

#[test]
fn a_pin_that_was_changed_is_sent_once_and_the_new_one_unlocks() {
    let (hsm, module, home) = each_time("");
    let daemon = home.start();
    let (key, mut client) = (daemon.blob("each time"), daemon.connect_service());
    signs(&mut client, &key).unwrap();
    let other = "975310";
    run(hsm.pkcs11_tool("vault").args(["--change-pin", "--new-pin", other])).ok();
    // A SoftHSM that is loaded takes no note of it.
    let hosts = daemon.hosts();
    kill_process(hosts[0].0, Signal::KILL).unwrap();
    eventually("the old PIN is refused", || {
        refused(&module.results("C_Login")) == 1 || signs(&mut client, &key).is_ok()
    });
    assert_eq!(signs(&mut client, &key).unwrap_err().code, Code::PinWrong);
    assert_eq!(refused(&module.results("C_Login")), 1);
    client.ask(&unlock("hsm", other)).ok::<()>();
    signs(&mut client, &key).unwrap();
}

#[test]
fn the_last_try_is_left_to_a_person() {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", "EC:prime256v1", "01", "plain", &[]);
    hsm.generate("vault", "EC:prime256v1", "02", "each time", &["--always-auth"]);
    let module = BadModule::build();
    let mut home = Home::new();
    home.configure("[agent]\nallowed_providers = \"/*\"");
    home.env("SOFTHSM2_CONF", hsm.conf());
    // What another program has spent is seen at the time of the login, not by looking often.
    home.configure(&hsm.device_of(&module.path(), "hsm", "vault", "probe = \"1h\""));
    let daemon = home.start();
    let (plain, each) = (daemon.blob("plain"), daemon.blob("each time"));
    let mut client = daemon.connect_service();
    let is_last =
        |failure: &Failure| failure.code == Code::PinRequired && failure.message.contains("one PIN try is left");
    let spare = || {
        let failure = signs(&mut daemon.connect_service(), &plain).unwrap_err();
        assert!(is_last(&failure), "{failure:?}");
    };

    module.mood("C_GetTokenInfo final\n");
    spare();
    eventually("it is told", || cli(&home, "status").contains("needed (1 left)"));
    let provider = module.path().display().to_string();
    let add = message(ADD_SMARTCARD, &[provider.as_bytes(), PIN.as_bytes()]);
    assert_eq!(daemon.connect().request(&add), [FAILURE]);
    let refusals = client.ask(&Request::Why { all: true, max: 1 });
    let refusals: Vec<RefusalEntry<'_>> = refusals.ok();
    assert!(refusals[0].reason.contains("one PIN try is left"), "{refusals:?}");
    assert!(module.results("C_Login").is_empty());

    // Whoever types it may; the token counts anew then.
    client.ask(&unlock("hsm", PIN)).ok::<()>();
    module.recover();
    signs(&mut client, &plain).unwrap();
    signs(&mut client, &each).unwrap();
    let logins = module.results("C_Login").len();
    module.mood("C_GetTokenInfo final\n");
    let failure = signs(&mut client, &each).unwrap_err();
    assert!(is_last(&failure), "{failure:?}");
    assert_eq!(module.results("C_Login").len(), logins);
    module.recover();
    client.ask(&unlock("hsm", PIN)).ok::<()>();
    signs(&mut client, &each).unwrap();
}

#[test]
fn devices_with_one_token_send_a_wrong_pin_once_and_the_right_one_each() {
    let hsm = SoftHsm::with_token("one");
    hsm.init_token("two");
    hsm.generate("one", "EC:prime256v1", "01", "on one", &[]);
    hsm.generate("two", "EC:prime256v1", "01", "on two", &[]);
    let module = BadModule::build();
    let mut home = Home::new();
    for token in ["one", "two"] {
        home.configure(&hsm.device_of(&module.path(), token, token, ""));
    }
    // As the two tokens of one card do.
    module.mood("C_GetTokenInfo serial\nC_Login slow=300\n");
    let daemon = home.start();
    let keys = ["on one", "on two"].map(|comment| daemon.blob(comment));
    let outcomes = at_once(&daemon, &[unlock("one", WRONG), unlock("two", WRONG)], Name::Unlock);
    assert!(
        outcomes.iter().all(|outcome| outcome.as_ref().is_err_and(|why| why.code == Code::PinWrong)),
        "{outcomes:?}"
    );
    assert_eq!(module.results("C_Login"), ["a0"]);

    let uses = keys.each_ref().map(|key| use_key(ssh(key, b"data"), 0));
    let outcomes = at_once(&daemon, &uses, Name::Sign);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    assert_eq!(module.results("C_Login"), ["a0", "0", "0"]);
}

#[test]
fn a_pin_is_read_from_no_pipe() {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", "EC:prime256v1", "01", "plain", &[]);
    let mut home = Home::new();
    home.configure(&hsm.device("hsm", "vault", ""));
    let pin = hsm.path("hsm.pin");
    fs::remove_file(&pin).unwrap();
    run(Command::new("mkfifo").arg(&pin)).ok();
    let daemon = home.start();
    let (key, mut client) = (daemon.blob("plain"), daemon.connect_service());
    let failure = signs(&mut client, &key).unwrap_err();
    assert!(failure.code == Code::NoPrompt && failure.message.contains("no regular file"), "{failure:?}");
    fs::remove_file(&pin).unwrap();
    fs::write(&pin, PIN).unwrap();
    signs(&mut client, &key).unwrap();
}
