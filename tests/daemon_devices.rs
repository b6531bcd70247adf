//! The daemon with devices: keys that stay listed while their device is away, one key in two places, one prompt for many
//! requests, crashes that cost nothing else, and an end that leaves nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, thread, time::Instant};

use rustix::process::{Signal, kill_process, test_kill_process};
use strongroom::agent::message::{DeviceEntry, Page, Request};
use support::{
    PATIENCE,
    askpass::Askpass,
    client::{FAILURE, Key, SIGN_REQUEST, SIGN_RESPONSE, message},
    daemon::{Daemon, Home},
    eventually,
    service::first_page,
};

/// Two keys: one that is also on token B, one of its own.
const TOKEN_A: &str = r#"
serial = "A1"
lanes = 2
control = CONTROL
[[key]]
slot = "shared"
type = "ed25519"
seed = 1
label = "shared"
[[key]]
slot = "own"
type = "rsa"
label = "only on A"
"#;

const TOKEN_B: &str = r#"
serial = "B1"
control = CONTROL
[[key]]
slot = "same"
type = "ed25519"
seed = 1
label = "shared too"
"#;

/// Its PIN is asked for, and it opens locked.
const LOCKED: &str = r#"
serial = "L1"
lanes = 4
locked = true
control = CONTROL
[pin]
value = "123456"
[[key]]
slot = "k"
type = "p256"
seed = 2
label = "locked"
"#;

fn sign(blob: &[u8], data: &[u8]) -> Vec<u8> {
    let mut body = message(SIGN_REQUEST, &[blob, data]);
    body.extend([0; 4]);
    body
}

fn signs(daemon: &Daemon<'_>, blob: &[u8]) -> bool {
    daemon.connect().request(&sign(blob, b"data"))[0] == SIGN_RESPONSE
}

#[test]
fn keys_stay_listed_while_their_device_is_away() {
    let mut home = Home::new();
    home.device("a", TOKEN_A, "probe = \"50ms\"");
    let daemon = home.start();
    let own = daemon.blob("only on A");
    assert!(signs(&daemon, &own));
    drop(daemon);

    fs::write(home.control("a").join("absent"), "").unwrap();
    let daemon = home.start();
    daemon.logs("absent device=\"a\"");
    assert_eq!(daemon.connect().list().len(), 2, "from the state file alone");
    assert!(!signs(&daemon, &own));
    daemon.logs("the device is not connected");

    fs::remove_file(home.control("a").join("absent")).unwrap();
    eventually("the key signs again when the device is back", || signs(&daemon, &own));
}

#[test]
fn the_second_place_of_a_key_takes_over() {
    let mut home = Home::new();
    home.device("a", TOKEN_A, "probe = \"50ms\"");
    home.device("b", TOKEN_B, "probe = \"50ms\"");
    let daemon = home.start();
    let shared = daemon.blob("shared");
    eventually("both devices are ready", || home.log().matches(" ready device=").count() == 2);
    assert_eq!(daemon.connect().list().len(), 2, "one key in two places is one identity");
    fs::write(home.control("a").join("absent"), "").unwrap();
    daemon.logs("absent device=\"a\"");
    assert!(signs(&daemon, &shared));
    fs::write(home.control("b").join("absent"), "").unwrap();
    eventually("with both away it does not sign", || !signs(&daemon, &shared));
    fs::remove_file(home.control("a").join("absent")).unwrap();
    eventually("it signs on whichever is back", || signs(&daemon, &shared));
}

#[test]
fn many_requests_make_one_prompt_and_a_restart_makes_none() {
    let mut askpass = Askpass::new();
    let mut home = Home::new();
    home.device("l", LOCKED, "");
    home.askpass(&askpass);
    let daemon = home.start();
    let key = daemon.blob("locked");
    let mut clients: Vec<_> = (0..20).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        client.send(&sign(&key, b"data"));
    }
    let prompt = askpass.next();
    assert!(prompt.text.starts_with("Enter PIN for l (serial L1)\n3 tries are left."), "{prompt:?}");
    askpass.answer(0, "123456");
    for client in &mut clients {
        assert_eq!(client.receive().unwrap()[0], SIGN_RESPONSE);
    }
    for (pid, _) in daemon.hosts() {
        kill_process(pid, Signal::KILL).unwrap();
    }
    // The PIN that the token accepted is sent to it again; a second prompt would find nobody.
    eventually("it signs after its driver was killed", || signs(&daemon, &key));
}

#[test]
fn a_killed_driver_costs_the_requests_inside_it_and_nothing_else() {
    let mut home = Home::new();
    // Time enough for all hundred on a machine that is busy with other tests.
    home.device("a", &format!("latency_ms = 20\n{TOKEN_A}"), "timeout = \"1m\"");
    let daemon = home.start();
    let own = daemon.blob("only on A");
    let soft = Key::random();
    assert_eq!(daemon.connect().request(&soft.add_message(b"soft", &[])), [6]);
    let mut clients: Vec<_> = (0..100).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        client.send(&sign(&own, b"data"));
    }
    assert_eq!(clients[0].receive().unwrap()[0], SIGN_RESPONSE, "the work has begun");
    let killed = daemon.hosts();
    assert_eq!(killed.len(), 1);
    kill_process(killed[0].0, Signal::KILL).unwrap();
    let data = b"meanwhile";
    assert!(soft.signed(data, &daemon.connect().request(&soft.sign_message(data))));
    let answers: Vec<u8> = clients[1..].iter_mut().map(|client| client.receive().unwrap()[0]).collect();
    let refused = answers.iter().filter(|answer| **answer == FAILURE).count();
    assert!(answers.iter().all(|answer| [SIGN_RESPONSE, FAILURE].contains(answer)));
    assert!(refused <= 2, "{refused} requests were lost, and there are two lanes");
    assert!(signs(&daemon, &own));
    assert_ne!(daemon.hosts()[0].0, killed[0].0);
}

#[test]
fn the_end_answers_what_is_in_flight_and_leaves_nothing() {
    let mut home = Home::new();
    let hang = "[[rule]]\non = \"sign\"\ndo = \"hang\"\n";
    home.device("a", &format!("{TOKEN_A}{hang}"), "timeout = \"1h\"");
    let daemon = home.start();
    let own = daemon.blob("only on A");
    let mut clients: Vec<_> = (0..8).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        client.send(&sign(&own, b"data"));
    }
    eventually("all are under way", || {
        let reply = daemon.connect_service().ask(&Request::Devices(first_page(0)));
        let page: Page<DeviceEntry<'_>> = reply.ok();
        page.entries.iter().any(|device| device.running + device.waiting == 8)
    });
    let hosts = daemon.hosts();
    assert_eq!(hosts.len(), 1);
    let began = Instant::now();
    let ending = thread::spawn(move || {
        clients.iter_mut().map(|client| client.receive().ok().map(|reply| reply[0])).collect::<Vec<_>>()
    });
    assert!(daemon.end(Signal::TERM).success());
    assert!(began.elapsed() < PATIENCE);
    let answers = ending.join().unwrap();
    assert!(answers.iter().all(|answer| *answer == Some(FAILURE)), "{answers:?}");
    for (pid, name) in hosts {
        assert!(test_kill_process(pid).is_err(), "the process of {name} is still there");
    }
    assert!(!home.path("agent").exists() && !home.path("service").exists());
    // The state file is free again at once.
    drop(home.start());
}

/// Has the daemon read this configuration.
fn reload(home: &Home, daemon: &Daemon<'_>, config: &str) {
    let reloads = || home.log().matches("the configuration was reloaded").count();
    let before = reloads();
    fs::write(home.path("config.toml"), config).unwrap();
    daemon.signal(Signal::HUP);
    eventually("the configuration is reloaded", || reloads() > before);
}

#[test]
fn devices_come_and_go_with_the_configuration() {
    let mut home = Home::new();
    home.device("a", TOKEN_A, "");
    home.device("b", TOKEN_B, "");
    let daemon = home.start();
    let config = fs::read_to_string(home.path("config.toml")).unwrap();
    let at = |name: &str| config.find(&format!("[[device]]\nname = \"{name}\"")).unwrap();
    let (head, a, b) = (&config[..at("a")], &config[at("a")..at("b")], &config[at("b")..]);
    let (own, shared) = (daemon.blob("only on A"), daemon.blob("shared"));
    let process = |name: &str| daemon.hosts().into_iter().find(|(_, n)| n == name).map(|(pid, _)| pid);
    let (process_a, process_b) = (process("a").unwrap(), process("b").unwrap());
    eventually("both devices are ready", || home.log().matches(" ready device=").count() == 2);

    reload(&home, &daemon, &format!("{head}{b}"));
    assert_eq!(process("a"), None, "its process has ended before the reload is over");
    assert_eq!(daemon.connect().list(), [(shared.clone(), b"shared too".to_vec())]);
    assert!(signs(&daemon, &shared) && !signs(&daemon, &own));

    reload(&home, &daemon, &format!("{head}{b}{a}"));
    eventually("the device is back with its keys", || signs(&daemon, &own));
    assert_ne!(process("a").unwrap(), process_a);
    assert_eq!(daemon.connect().list()[0], (shared.clone(), b"shared too".to_vec()), "what came first is asked first");

    reload(&home, &daemon, &config);
    assert_eq!(daemon.connect().list()[0], (shared, b"shared".to_vec()), "the order is that of the configuration");
    assert_eq!(process("b").unwrap(), process_b, "a device that stays is not touched");

    let before = process("a").unwrap();
    reload(&home, &daemon, &format!("{head}{a}probe = \"1s\"\n{b}"));
    assert_eq!(daemon.connect().list().len(), 2, "under other terms its keys stay listed");
    assert!(signs(&daemon, &own));
    assert_ne!(process("a").unwrap(), before);
    assert_eq!(process("b").unwrap(), process_b);
}

#[test]
fn what_waits_for_a_device_that_is_taken_out_is_refused_at_once() {
    let mut home = Home::new();
    let hang = "[[rule]]\non = \"sign\"\ndo = \"hang\"\n";
    home.device("a", &format!("{TOKEN_A}{hang}"), "timeout = \"1h\"");
    let daemon = home.start();
    let config = fs::read_to_string(home.path("config.toml")).unwrap();
    let own = daemon.blob("only on A");
    let mut clients: Vec<_> = (0..8).map(|_| daemon.connect()).collect();
    for client in &mut clients {
        client.send(&sign(&own, b"data"));
    }
    reload(&home, &daemon, &config[..config.find("[[device]]").unwrap()]);
    for client in &mut clients {
        assert_eq!(client.receive().unwrap(), [FAILURE]);
    }
    assert!(daemon.hosts().is_empty());
    // What is not remembered any more is not listed by the next one either.
    drop(daemon);
    fs::write(home.control("a").join("absent"), "").unwrap();
    let daemon = home.start();
    daemon.logs("absent device=\"a\"");
    assert!(daemon.connect().list().is_empty());
}
