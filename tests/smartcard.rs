//! `ssh-add -s` and `-e`: the keys of SoftHSM's tokens, under the conditions they came with, gone with their processes; one
//! PIN sent once; modules that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use rustix::process::Signal;
use strongroom::agent::message::Code;
use support::{
    Outcome, PATIENCE,
    agent::Agent,
    askpass::Askpass,
    bad_module::BadModule,
    cli::{json, strongroom},
    client::{Client, FAILURE, Key, REMOVE_IDENTITY, SIGN_REQUEST, SIGN_RESPONSE, SUCCESS, lifetime, message, put},
    command,
    daemon::{Daemon, Home},
    eventually, keygen, run,
    service::{first_page, unlock, why},
    softhsm::{self, SoftHsm},
    with_suffix,
};

const ADD_SMARTCARD: u8 = 20;
const REMOVE_SMARTCARD: u8 = 21;
const ADD_SMARTCARD_CONSTRAINED: u8 = 26;

/// A daemon's home that finds these tokens, and lets modules of tests be loaded.
fn home(hsm: &SoftHsm) -> Home {
    let mut home = Home::new();
    home.env("SOFTHSM2_CONF", hsm.conf());
    home.configure("[agent]\nallowed_providers = \"/*\"\nprovider_timeout = \"20s\"");
    home
}

/// A token with an Ed25519 key and one on P-256.
fn two_keys() -> SoftHsm {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", "EC:edwards25519", "01", "first", &[]);
    hsm.generate("vault", "EC:prime256v1", "02", "second", &[]);
    hsm
}

/// `ssh-add -s` with this PIN, at an agent's socket.
fn ssh_add_s(socket: &Path, module: &Path, pin: &str, options: &[&str]) -> Outcome {
    let dir = socket.parent().unwrap();
    let mut ssh_add = command("ssh-add", dir);
    ssh_add.env("SSH_AUTH_SOCK", socket).args(options).arg("-s").arg(module);
    // It reads the PIN from a standard input that is no terminal.
    let mut child = ssh_add.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "{pin}").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Outcome { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn smartcard(kind: u8, module: &Path, pin: &str, constraints: &[u8]) -> Vec<u8> {
    let mut body = message(kind, &[module.to_str().unwrap().as_bytes(), pin.as_bytes()]);
    body.extend(constraints);
    body
}

fn add(client: &mut Client, module: &Path, pin: &str, constraints: &[u8]) -> u8 {
    let kind = if constraints.is_empty() { ADD_SMARTCARD } else { ADD_SMARTCARD_CONSTRAINED };
    client.request(&smartcard(kind, module, pin, constraints))[0]
}

fn sign(client: &mut Client, blob: &[u8]) -> u8 {
    let mut body = message(SIGN_REQUEST, &[blob, b"data"]);
    body.extend([0; 4]);
    client.request(&body)[0]
}

/// The last refusal that this uid was given.
fn last_refusal(daemon: &Daemon<'_>) -> (Code, String) {
    let reply = daemon.connect_service().ask(&strongroom::agent::message::Request::Why { all: true, max: 1 });
    let entries: Vec<strongroom::agent::message::RefusalEntry<'_>> = reply.ok();
    (entries[0].code, entries[0].reason.to_owned())
}

fn no_process_is_left(daemon: &Daemon<'_>) {
    eventually("nothing is left of the token's process", || daemon.hosts().is_empty());
}

fn module() -> PathBuf {
    PathBuf::from(softhsm::MODULE)
}

#[test]
fn keys_come_sign_and_go_one_by_one() {
    let hsm = two_keys();
    let module = BadModule::build();
    let home = home(&hsm);
    let daemon = home.start();
    ssh_add_s(&home.path("agent"), &module.path(), softhsm::PIN, &[]).ok();
    let mut comments = daemon.connect().comments();
    comments.sort_unstable();
    assert_eq!(comments, ["first", "second"]);
    assert_eq!(daemon.hosts().len(), 1, "one process for the token");
    for (n, line) in daemon.ssh_add(&["-L"]).ok().lines().enumerate() {
        let public = home.path(&format!("key{n}.pub"));
        fs::write(&public, line).unwrap();
        daemon.ssh_add(&["-T", public.to_str().unwrap()]).ok();
    }

    let public = home.path("key0.pub");
    daemon.ssh_add(&["-d", public.to_str().unwrap()]).ok();
    assert_eq!(daemon.connect().list().len(), 1);
    let logins = module.results("C_Login").len();
    ssh_add_s(&home.path("agent"), &module.path(), softhsm::PIN, &[]).ok();
    assert_eq!(daemon.connect().list().len(), 2, "what was removed comes back, from the device that is there");
    assert_eq!(module.results("C_Login").len(), logins, "without another login");
    assert_eq!(daemon.hosts().len(), 1);
    ssh_add_s(&home.path("agent"), &module.path(), softhsm::PIN, &[]).fails_with(1);
    assert!(last_refusal(&daemon).1.contains("not here already"));

    for n in 0..2 {
        daemon.ssh_add(&["-d", home.path(&format!("key{n}.pub")).to_str().unwrap()]).ok();
    }
    no_process_is_left(&daemon);
    assert_eq!(module.results("C_Login"), vec!["0"; logins], "every login was right");
}

#[test]
fn every_way_of_removal_ends_the_process() {
    let hsm = two_keys();
    let home = home(&hsm);
    let daemon = home.start();
    let module = module();
    let mut client = daemon.connect();

    assert_eq!(add(&mut client, &module, softhsm::PIN, &[]), SUCCESS);
    assert_eq!(client.request(&smartcard(REMOVE_SMARTCARD, &module, "", &[])), [SUCCESS]);
    assert!(client.list().is_empty());
    no_process_is_left(&daemon);
    assert_eq!(client.request(&smartcard(REMOVE_SMARTCARD, &module, "", &[])), [SUCCESS], "gone is gone");

    assert_eq!(add(&mut client, &module, softhsm::PIN, &[]), SUCCESS);
    daemon.ssh_add(&["-D"]).ok();
    no_process_is_left(&daemon);

    assert_eq!(add(&mut client, &module, softhsm::PIN, &[]), SUCCESS);
    daemon.signal(Signal::USR1);
    no_process_is_left(&daemon);
    assert!(client.list().is_empty());

    assert_eq!(add(&mut client, &module, softhsm::PIN, &lifetime(1)), SUCCESS);
    // Nobody asks: the clock alone removes them.
    no_process_is_left(&daemon);
    assert!(client.list().is_empty());
}

#[test]
fn conditions_apply_to_every_key() {
    let hsm = two_keys();
    let mut askpass = Askpass::new();
    let mut home = home(&hsm);
    home.askpass(&askpass);
    let daemon = home.start();
    let mut client = daemon.connect();
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &[2]), SUCCESS);
    for (blob, comment) in client.list() {
        let mut body = message(SIGN_REQUEST, &[&blob, b"data"]);
        body.extend([0; 4]);
        client.send(&body);
        let prompt = askpass.next();
        assert!(prompt.text.contains(&*String::from_utf8(comment).unwrap()), "{prompt:?}");
        askpass.answer(0, "yes");
        assert_eq!(client.receive().unwrap()[0], SIGN_RESPONSE);
    }
    assert_eq!(client.request(&smartcard(REMOVE_SMARTCARD, &module(), "", &[])), [SUCCESS]);

    // To a host that is known by some key: a connection that is bound to none cannot use it.
    let hop = |host: &str, key: Option<&[u8]>| {
        let mut hop = Vec::new();
        [b"", host.as_bytes(), b""].iter().for_each(|field| put(&mut hop, field));
        if let Some(key) = key {
            put(&mut hop, key);
            hop.push(0);
        }
        hop
    };
    let (mut step, mut steps, mut constraint) = (Vec::new(), Vec::new(), vec![255]);
    [hop("", None), hop("far", Some(&Key::random().blob())), Vec::new()].iter().for_each(|part| put(&mut step, part));
    put(&mut steps, &step);
    put(&mut constraint, b"restrict-destination-v00@openssh.com");
    put(&mut constraint, &steps);
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &constraint), SUCCESS);
    for (blob, _) in client.list() {
        assert_eq!(sign(&mut client, &blob), FAILURE);
        assert!(last_refusal(&daemon).1.contains("not bound to an SSH session"));
    }
}

/// `associated-certs-v00@openssh.com`
fn certificates(only: bool, blobs: &[&[u8]]) -> Vec<u8> {
    let (mut constraint, mut list) = (vec![255], Vec::new());
    put(&mut constraint, b"associated-certs-v00@openssh.com");
    constraint.push(only.into());
    blobs.iter().for_each(|blob| put(&mut list, blob));
    put(&mut constraint, &list);
    constraint
}

#[test]
fn certificates_come_with_their_keys_or_without() {
    let hsm = two_keys();
    let home = home(&hsm);
    let daemon = home.start();
    let mut client = daemon.connect();
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &[]), SUCCESS);
    let lines = daemon.ssh_add(&["-L"]).ok();
    let line = lines.lines().find(|line| line.ends_with("first")).unwrap();
    daemon.ssh_add(&["-D"]).ok();

    let dir = home.path("agent").parent().unwrap().to_owned();
    let authority = keygen(&dir, "authority", &["-t", "ed25519"]);
    let (public, other) = (home.path("token.pub"), keygen(&dir, "other", &["-t", "ed25519"]));
    fs::write(&public, line).unwrap();
    let certify = |public: &Path| {
        let mut keygen = command("ssh-keygen", &dir);
        run(keygen.arg("-q").arg("-s").arg(&authority).args(["-I", "me", "-n", "me", "-V", "+1h"]).arg(public)).ok();
        let name = public.file_stem().unwrap().to_str().unwrap();
        let path = home.path(&format!("{name}-cert.pub"));
        ssh_key::Certificate::read_file(&path).unwrap().to_bytes().unwrap()
    };
    let (certificate, of_other) = (certify(&public), certify(&with_suffix(&other, ".pub")));

    assert_eq!(add(&mut client, &module(), softhsm::PIN, &certificates(true, &[&of_other])), FAILURE, "none matches");
    let only = certificates(true, &[&of_other, &certificate]);
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &only), SUCCESS);
    assert_eq!(client.list(), [(certificate.clone(), b"first".to_vec())]);
    assert_eq!(sign(&mut client, &certificate), SIGN_RESPONSE);
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &certificates(false, &[&certificate])), SUCCESS);
    assert_eq!(client.list().len(), 3);
    daemon.ssh_add(&["-D"]).ok();

    assert_eq!(add(&mut client, &module(), softhsm::PIN, &certificates(false, &[&certificate])), SUCCESS);
    let listed = client.list();
    let at = |wanted: &dyn Fn(&[u8]) -> bool| listed.iter().position(|(blob, _)| wanted(blob)).unwrap();
    let plain = ssh_key::PublicKey::from_openssh(line).unwrap().to_bytes().unwrap();
    assert_eq!(at(&|blob| blob == certificate) + 1, at(&|blob| blob == plain), "a certificate stands before its key");

    let mut forged = certificate.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &certificates(false, &[&forged])), FAILURE);
    assert_eq!(last_refusal(&daemon).0, Code::BadRequest);
}

#[test]
fn a_wrong_pin_is_sent_once_and_never_again() {
    let hsm = two_keys();
    let module = BadModule::build();
    let home = home(&hsm);
    let daemon = home.start();
    assert_eq!(add(&mut daemon.connect(), &module.path(), "111111", &[]), FAILURE);
    assert_eq!(last_refusal(&daemon).0, Code::PinWrong);
    assert_eq!(module.results("C_Login"), ["a0"]);
    no_process_is_left(&daemon);
    // Another client, and a daemon that was started anew.
    assert_eq!(add(&mut daemon.connect(), &module.path(), "111111", &[]), FAILURE);
    assert!(last_refusal(&daemon).1.contains("not sent again"), "{:?}", last_refusal(&daemon));
    drop(daemon);
    let daemon = home.start();
    assert_eq!(add(&mut daemon.connect(), &module.path(), "111111", &[]), FAILURE);
    assert_eq!(module.results("C_Login"), ["a0"]);
    assert_eq!(add(&mut daemon.connect(), &module.path(), softhsm::PIN, &[]), SUCCESS);
    assert_eq!(module.results("C_Login")[1], "0");
}

#[test]
fn every_token_is_asked_once_and_those_that_share_a_serial_share_a_refusal() {
    let hsm = two_keys();
    hsm.init_token("second");
    let module = BadModule::build();
    let home = home(&hsm);
    let daemon = home.start();
    assert_eq!(add(&mut daemon.connect(), &module.path(), "111111", &[]), FAILURE);
    assert_eq!(module.results("C_Login"), ["a0", "a0"]);
    module.mood("C_GetTokenInfo serial\n");
    assert_eq!(add(&mut daemon.connect(), &module.path(), "222222", &[]), FAILURE);
    assert_eq!(module.results("C_Login"), ["a0"; 3], "one of two tokens with one serial");
}

#[test]
fn a_slot_that_cannot_be_read_spoils_no_other_token() {
    let hsm = two_keys();
    hsm.init_token("second");
    hsm.generate("second", "EC:prime256v1", "01", "on second", &[]);
    let module = BadModule::build();
    let home = home(&hsm);
    let daemon = home.start();
    let mut scan = strongroom(&home);
    scan.env("SOFTHSM2_CONF", hsm.conf()).args(["device", "scan", "--json"]).arg(module.path());
    let found = json(run(&mut scan));
    let tokens = found["modules"][0]["tokens"].as_array().unwrap();
    let slot = tokens.iter().find(|token| token["label"] == "vault").unwrap()["slot"].as_u64().unwrap();
    module.mood(&format!("C_GetTokenInfo fail=30 @{slot}\n"));
    assert_eq!(add(&mut daemon.connect(), &module.path(), softhsm::PIN, &[]), SUCCESS);
    let listed = daemon.connect().list();
    assert_eq!(listed.len(), 1);
    assert_eq!(sign(&mut daemon.connect(), &listed[0].0), SIGN_RESPONSE);
    daemon.logs(&format!("the token in slot {slot} cannot be used: C_GetTokenInfo answered CKR_DEVICE_ERROR"));
    module.recover();
    assert_eq!(add(&mut daemon.connect(), &module.path(), softhsm::PIN, &[]), SUCCESS);
    assert_eq!(daemon.connect().list().len(), 3);
}

#[test]
fn a_module_that_hangs_holds_up_nobody_and_the_reason_is_told() {
    let hsm = two_keys();
    let module = BadModule::build();
    let mut home = Home::new();
    home.env("SOFTHSM2_CONF", hsm.conf());
    home.configure("[agent]\nallowed_providers = \"/*\"\nprovider_timeout = \"2s\"");
    let daemon = home.start();
    for mood in ["C_Initialize hang", "C_GetSlotList hang", "C_OpenSession hang"] {
        module.mood(mood);
        let mut stuck = daemon.connect();
        stuck.send(&smartcard(ADD_SMARTCARD, &module.path(), softhsm::PIN, &[]));
        let (mut other, key) = (daemon.connect(), Key::random());
        other.add(&key, "other", &[]);
        other.sign(&key);
        assert_eq!(other.request(&message(REMOVE_IDENTITY, &[&key.blob()])), [SUCCESS]);
        let asked = Instant::now();
        assert_eq!(stuck.receive().unwrap(), [FAILURE], "{mood}");
        assert!(asked.elapsed() < PATIENCE / 2);
        let (code, reason) = last_refusal(&daemon);
        assert!(matches!(code, Code::Timeout), "{mood}: {code:?} {reason}");
        no_process_is_left(&daemon);
    }
    module.recover();
    // On a loaded machine that may take longer than the modules here are given.
    eventually("it is well again", || add(&mut daemon.connect(), &module.path(), softhsm::PIN, &[]) == SUCCESS);
}

#[test]
fn a_module_that_dies_or_fails_says_so() {
    let hsm = two_keys();
    let module = BadModule::build();
    let home = home(&hsm);
    let daemon = home.start();
    for (mood, reason) in [
        ("C_Initialize crash", "ended by signal"),
        ("C_GetSlotList exit", "exited with code 3"),
        ("C_Initialize fail=30", "CKR_DEVICE_ERROR"),
        ("C_GetTokenInfo fail=5", "CKR_GENERAL_ERROR"),
    ] {
        module.mood(mood);
        assert_eq!(add(&mut daemon.connect(), &module.path(), softhsm::PIN, &[]), FAILURE);
        let told = last_refusal(&daemon).1;
        assert!(told.contains(reason), "{mood}: {told}");
    }
    assert_eq!(module.results("C_Login"), Vec::<String>::new(), "no PIN went anywhere");
}

#[test]
fn a_device_of_the_configuration_is_not_opened_twice() {
    let hsm = two_keys();
    let mut home = home(&hsm);
    home.configure(&format!(
        "[[device]]\nname = \"hsm\"\ndriver = \"pkcs11\"\nmodule = \"{}\"\ntoken = \"pkcs11:token=vault\"",
        softhsm::MODULE
    ));
    let daemon = home.start();
    let mut client = daemon.connect();
    eventually("the device's keys are listed", || daemon.connect().list().len() == 2);
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &[2]), FAILURE, "its conditions are in the configuration");
    assert!(last_refusal(&daemon).1.contains("the device `hsm` of the configuration"));
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &[]), SUCCESS, "it is logged in to");
    assert_eq!(daemon.hosts().len(), 1);
    for (blob, _) in client.list() {
        assert_eq!(sign(&mut client, &blob), SIGN_RESPONSE);
    }
    assert_eq!(add(&mut client, &module(), softhsm::PIN, &[]), FAILURE, "nothing is new");
    // It keeps its keys and wants its PIN again.
    assert_eq!(client.request(&smartcard(REMOVE_SMARTCARD, &module(), "", &[])), [SUCCESS]);
    let (blob, _) = client.list()[0].clone();
    assert_eq!(sign(&mut client, &blob), FAILURE, "nobody can be asked for it");
    daemon.connect_service().ask(&unlock("hsm", softhsm::PIN)).ok::<()>();
    assert_eq!(sign(&mut client, &blob), SIGN_RESPONSE);
}

#[test]
fn devices_that_came_so_are_told_of() {
    let hsm = two_keys();
    let home = home(&hsm);
    let daemon = home.start();
    assert_eq!(add(&mut daemon.connect(), &module(), softhsm::PIN, &[]), SUCCESS);
    let reply = daemon.connect_service().ask(&strongroom::agent::message::Request::Devices(first_page(0)));
    let devices: strongroom::agent::message::Page<strongroom::agent::message::DeviceEntry<'_>> = reply.ok();
    let [device] = &*devices.entries else { panic!("{devices:?}") };
    assert_eq!((device.id, device.kind, device.state), ("libsofthsm2.so:1", "pkcs11", "ready"));
    assert!(!device.serial.is_empty());
    assert!(daemon.connect_service().ask(&why()).ok::<Vec<strongroom::agent::message::RefusalEntry<'_>>>().is_empty());
}

#[test]
fn a_module_that_is_not_allowed_is_not_loaded() {
    let hsm = two_keys();
    let module = BadModule::build();
    let mut home = Home::new();
    home.env("SOFTHSM2_CONF", hsm.conf());
    let daemon = home.start();
    // A link does not help: the real path counts.
    let link = home.path("link.so");
    std::os::unix::fs::symlink(module.path(), &link).unwrap();
    for path in [module.path(), link] {
        assert_eq!(add(&mut daemon.connect(), &path, softhsm::PIN, &[]), FAILURE);
        assert!(last_refusal(&daemon).1.contains("not among the allowed paths"));
    }
    assert_eq!(add(&mut daemon.connect(), &home.path("nothing.so"), softhsm::PIN, &[]), FAILURE);
    assert!(last_refusal(&daemon).1.contains("No such file"));
    assert!(module.results("C_Initialize").is_empty());
}

#[test]
fn the_drop_in_does_the_same() {
    let hsm = two_keys();
    let agent = Agent::start_with(|command| {
        command.env("SOFTHSM2_CONF", hsm.conf());
    });
    ssh_add_s(agent.socket(), &module(), softhsm::PIN, &[]).ok();
    let mut client = Client::connect(agent.socket());
    for (blob, _) in client.list() {
        assert_eq!(sign(&mut client, &blob), SIGN_RESPONSE);
    }
    ssh_add_s(agent.socket(), &BadModule::build().path(), softhsm::PIN, &[]).fails_with(1);
    run(command("ssh-add", agent.socket().parent().unwrap())
        .env("SSH_AUTH_SOCK", agent.socket())
        .arg("-e")
        .arg(softhsm::MODULE))
    .ok();
    assert!(client.list().is_empty());
}
