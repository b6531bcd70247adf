//! ssh-add and ssh-keygen find what they expect of an agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use support::{
    agent::Agent,
    askpass::Askpass,
    client::{
        CONFIRM, EXTENSION, Key, MAX_MESSAGE, REMOVE_ALL, REQUEST_IDENTITIES, SUCCESS, identities, lifetime, message,
    },
    eventually, keygen, public_key, run, with_suffix,
};

/// OpenSSH's clients refuse a longer list.
const MAX_IDENTITIES: usize = 2048;

#[test]
fn ssh_add_lists_adds_and_removes() {
    let agent = Agent::start();
    let empty = agent.ssh_add(&["-l"]).fails_with(1);
    assert_eq!(empty.stdout, "The agent has no identities.\n");

    let keys: Vec<_> = [["-t", "ed25519"], ["-t", "rsa"], ["-t", "ecdsa"]]
        .iter()
        .enumerate()
        .map(|(n, options)| keygen(agent.dir(), &format!("user_{n}"), options))
        .collect();
    keys.iter().for_each(|key| agent.add(key, &[]));
    let fingerprint = |key: &Path| run(agent.command("ssh-keygen").arg("-lf").arg(with_suffix(key, ".pub"))).ok();
    assert_eq!(agent.ssh_add(&["-l"]).ok(), keys.iter().map(|key| fingerprint(key)).collect::<String>());
    let lines: String = keys.iter().map(|key| fs::read_to_string(with_suffix(key, ".pub")).unwrap()).collect();
    assert_eq!(agent.ssh_add(&["-L"]).ok(), lines);
    for key in &keys {
        run(agent.command("ssh-add").arg("-T").arg(with_suffix(key, ".pub"))).ok();
    }

    run(agent.command("ssh-add").arg("-d").arg(&keys[1])).ok();
    run(agent.command("ssh-add").arg("-d").arg(&keys[1])).fails_with(1);
    assert_eq!(agent.connect().comments(), ["user_0", "user_2"]);
    run(agent.command("ssh-add").arg("-T").arg(with_suffix(&keys[1], ".pub"))).fails_with(1);

    agent.ssh_add(&["-D"]).ok();
    agent.ssh_add(&["-l"]).fails_with(1);
    agent.ssh_add(&["-D"]).ok();
}

#[test]
fn a_key_and_its_certificate_are_two_identities() {
    let agent = Agent::start();
    let ca = keygen(agent.dir(), "ca", &["-t", "ed25519"]);
    let key = keygen(agent.dir(), "user", &["-t", "ecdsa"]);
    let public = with_suffix(&key, ".pub");
    run(agent.command("ssh-keygen").args(["-q", "-I", "a test", "-n", "root", "-s"]).arg(&ca).arg(&public)).ok();
    agent.add(&key, &[]);
    assert_eq!(agent.connect().list().len(), 2);
    let certificate = with_suffix(&key, "-cert.pub");
    run(agent.command("ssh-add").arg("-T").arg(&certificate)).ok();
    // -k leaves the certificate alone.
    run(agent.command("ssh-add").arg("-dk").arg(&key)).ok();
    let left = agent.ssh_add(&["-L"]).ok();
    assert!(left.starts_with("ecdsa-sha2-nistp256-cert-v01@openssh.com "), "{left}");
    assert_eq!(left.lines().count(), 1);
    run(agent.command("ssh-add").arg("-T").arg(&certificate)).ok();
}

#[test]
fn adding_again_keeps_the_place_and_replaces_the_rest() {
    let mut askpass = Askpass::new();
    let agent = Agent::start_with(|agent| askpass.serve(agent));
    let [first, second, third] = [Key::random(), Key::random(), Key::random()];
    let mut client = agent.connect();
    client.add(&first, "first", &[]);
    client.add(&second, "second", &[&lifetime(2)[..], CONFIRM].concat());
    client.add(&third, "third", &lifetime(2));
    client.add(&second, "again", &[]);
    assert_eq!(client.comments(), ["first", "again", "third"]);
    client.sign(&second);
    assert!(!askpass.has_asked(), "the confirmation outlived the addition");
    eventually("the third key expires", || client.comments() == ["first", "again"]);

    client.add(&first, "guarded", CONFIRM);
    client.send(&first.sign_message(b"data"));
    askpass.next();
    askpass.answer(0, "");
    assert!(first.signed(b"data", &client.receive().unwrap()));
}

#[test]
fn a_lifetime_ends() {
    let agent = Agent::start();
    let key = keygen(agent.dir(), "user", &["-t", "ed25519"]);
    let start = Instant::now();
    agent.add(&key, &["-t", "2"]);
    let mut client = agent.connect();
    if start.elapsed() < Duration::from_secs(1) {
        assert_eq!(client.comments(), ["user"]);
    }
    eventually("the key expires", || client.list().is_empty());
    // OpenSSH's agent counts whole seconds, and may be one short.
    assert!(start.elapsed() >= Duration::from_secs(1), "after {:?} already", start.elapsed());
    run(agent.command("ssh-add").arg("-T").arg(with_suffix(&key, ".pub"))).fails_with(1);

    // 0 succeeds, and is over at once.
    client.add(&Key::random(), "never seen", &lifetime(0));
    eventually("no time is no time", || client.list().is_empty());
}

#[test]
fn the_agents_own_lifetime_is_for_keys_without_one() {
    let agent = Agent::start_with(|agent| {
        agent.args(["-t", "2s"]);
    });
    let mut client = agent.connect();
    client.add(&Key::random(), "default", &[]);
    client.add(&Key::random(), "longer", &lifetime(3600));
    eventually("the default ends", || client.comments() == ["longer"]);
}

#[test]
fn ssh_add_asks_to_confirm() {
    let mut askpass = Askpass::new();
    let agent = Agent::start_with(|agent| askpass.serve(agent));
    let key = keygen(agent.dir(), "user", &["-t", "ed25519"]);
    agent.add(&key, &["-c"]);
    for (code, expected) in [(0, 0), (1, 1)] {
        let mut test = agent.command("ssh-add");
        let mut test = test.arg("-T").arg(with_suffix(&key, ".pub")).stderr(Stdio::null()).spawn().unwrap();
        let prompt = askpass.next();
        assert!(prompt.text.contains("Allow use of key user?"), "{}", prompt.text);
        askpass.answer(code, "");
        assert_eq!(test.wait().unwrap().code(), Some(expected));
    }
}

#[test]
fn ssh_keygen_signs_files() {
    let agent = Agent::start();
    let text = agent.dir().join("text");
    fs::write(&text, "what is signed").unwrap();
    for (name, options) in [
        ("ed25519", &["-t", "ed25519"][..]),
        ("rsa", &["-t", "rsa"]),
        ("ecdsa", &["-t", "ecdsa", "-b", "521"]),
        ("sk", &["-t", "ed25519-sk"]),
    ] {
        let key = keygen(agent.dir(), name, options);
        agent.add(&key, &[]);
        fs::remove_file(&key).unwrap();
        let public = with_suffix(&key, ".pub");
        let signature = with_suffix(&text, ".sig");
        let _ = fs::remove_file(&signature);
        run(agent.command("ssh-keygen").args(["-Y", "sign", "-n", "file", "-f"]).arg(&public).arg(&text)).ok();

        let allowed = agent.dir().join("allowed");
        fs::write(&allowed, format!("me {}", fs::read_to_string(&public).unwrap())).unwrap();
        let verify = |file: &Path| {
            let mut keygen = agent.command("ssh-keygen");
            keygen.args(["-Y", "verify", "-n", "file", "-I", "me", "-f"]).arg(&allowed).arg("-s").arg(&signature);
            run(keygen.stdin(fs::File::open(file).unwrap()))
        };
        verify(&text).ok();
        assert_ne!(verify(&allowed).code, Some(0), "a signature over something else");
    }
}

#[test]
fn ssh_keygen_certifies_with_a_ca_in_the_agent() {
    let agent = Agent::start();
    for (name, options) in [("ed25519", ["-t", "ed25519"]), ("rsa", ["-t", "rsa"]), ("ecdsa", ["-t", "ecdsa"])] {
        let ca = keygen(agent.dir(), &format!("ca_{name}"), &options);
        let user = keygen(agent.dir(), &format!("user_{name}"), &["-t", "ed25519"]);
        agent.add(&ca, &[]);
        fs::remove_file(&ca).unwrap();
        let mut certify = agent.command("ssh-keygen");
        certify.args(["-q", "-I", "a test", "-n", "somebody", "-Us"]).arg(with_suffix(&ca, ".pub"));
        run(certify.arg(with_suffix(&user, ".pub"))).ok();
        let shown = run(agent.command("ssh-keygen").arg("-Lf").arg(with_suffix(&user, "-cert.pub"))).ok();
        let fingerprint = run(agent.command("ssh-keygen").arg("-lf").arg(with_suffix(&ca, ".pub"))).ok();
        let fingerprint = fingerprint.split(' ').nth(1).unwrap();
        assert!(shown.contains(fingerprint) && shown.contains("somebody"), "{shown}");
        // That is read without verifying; ssh-add verifies what it loads.
        agent.add(&user, &[]);
        assert!(agent.ssh_add(&["-L"]).ok().contains(&public_key(&with_suffix(&user, "-cert"))));
        agent.ssh_add(&["-D"]).ok();
    }
}

#[test]
fn the_list_stops_where_clients_stop_reading() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let keys: Vec<_> = (0..MAX_IDENTITIES + 100).map(|_| Key::random()).collect();
    // One write for all: what counts here is the number of keys, not of round trips.
    keys.iter().for_each(|key| client.send(&key.add_message(b"one of many", &[])));
    keys.iter().for_each(|_| assert_eq!(client.receive().unwrap(), [SUCCESS]));
    assert_eq!(client.list().len(), MAX_IDENTITIES);
    assert_eq!(agent.ssh_add(&["-l"]).ok().lines().count(), MAX_IDENTITIES);
    client.sign(keys.last().unwrap());
    assert_eq!(client.request(&[REMOVE_ALL]), [SUCCESS]);
    assert!(client.list().is_empty());
}

#[test]
fn the_list_is_no_longer_than_a_message() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let comment = "a long comment ".repeat(1000);
    let keys: Vec<_> = (0..40).map(|_| Key::random()).collect();
    keys.iter().for_each(|key| client.add(key, &comment, &[]));
    let reply = client.request(&[REQUEST_IDENTITIES]);
    assert!(reply.len() <= MAX_MESSAGE, "{} bytes", reply.len());
    assert_eq!(identities(&reply).len(), MAX_MESSAGE / (comment.len() + 59));
    agent.ssh_add(&["-l"]).ok();
    client.sign(&keys[39]);
}

#[test]
fn query_names_what_is_spoken() {
    let agent = Agent::start();
    let reply = agent.connect().request(&message(EXTENSION, &[b"query"]));
    // SSH_AGENT_EXTENSION_RESPONSE, "query", then names without a total in front.
    let (&kind, mut rest) = reply.split_first().unwrap();
    assert_eq!(kind, 29);
    let mut names = Vec::new();
    while !rest.is_empty() {
        names.push(String::from_utf8(support::client::take(&mut rest).to_vec()).unwrap());
    }
    assert_eq!(names[0], "query");
    assert!(names.contains(&"session-bind@openssh.com".to_owned()), "{names:?}");
    assert!(!names.iter().any(|name| name.ends_with("@strongroom.alt")), "{names:?}");
}
