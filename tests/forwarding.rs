//! What the far side of `ssh -A` may do with the agent, and what it may not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs;

use support::{
    agent::Agent,
    askpass::answering,
    client::{EXTENSION, FAILURE, LOCK, SUCCESS, UNLOCK, message, put},
    keygen, public_key, run,
    sshd::{Forwarded, Hosts},
    with_suffix,
};

/// An agent with the key `user`, forwarded to `near`. The session comes last, so that it goes first.
fn forwarded() -> (Agent, Hosts, Forwarded) {
    let (agent, hosts) = (Agent::start(), Hosts::one("near"));
    let key = keygen(hosts.dir(), "user", &["-t", "ed25519"]);
    hosts.authorize(&key, "");
    agent.add(&key, &[]);
    let far = hosts.forward(&agent, "near", &key);
    (agent, hosts, far)
}

#[test]
fn the_far_side_lists_and_signs() {
    let (_agent, hosts, far) = forwarded();
    let key = with_suffix(&hosts.dir().join("user"), ".pub");
    assert!(run(far.command("ssh-add").arg("-L")).ok().contains(&public_key(&hosts.dir().join("user"))));
    run(far.command("ssh-add").arg("-T").arg(&key)).ok();

    let text = hosts.dir().join("text");
    fs::write(&text, "signed far away").unwrap();
    fs::rename(hosts.dir().join("user"), hosts.dir().join("hidden")).unwrap();
    run(far.command("ssh-keygen").args(["-Y", "sign", "-n", "file", "-f"]).arg(&key).arg(&text)).ok();
    assert!(with_suffix(&text, ".sig").exists());
}

#[test]
fn the_far_side_sees_only_keys_that_may_be_used_from_there() {
    let agent = Agent::start();
    let mut hosts = Hosts::one("near");
    hosts.start("far", "");
    let known_hosts = hosts.dir().join("known_hosts");
    let login = keygen(hosts.dir(), "login", &["-t", "ed25519"]);
    hosts.authorize(&login, "");
    let keys: [(&str, &[&str]); 4] = [
        ("free", &[]),
        ("onward", &["-h", "near", "-h", "near>far"]),
        ("near-only", &["-h", "near"]),
        ("elsewhere", &["-h", "far"]),
    ];
    for (name, options) in keys {
        let key = keygen(hosts.dir(), name, &["-t", "ed25519"]);
        let mut all = vec!["-H", known_hosts.to_str().unwrap()];
        all.extend(options);
        agent.add(&key, &all);
    }
    let far = hosts.forward(&agent, "near", &login);
    assert_eq!(far.connect().comments(), ["free", "onward"]);
    assert_eq!(agent.connect().comments(), ["free", "onward", "near-only", "elsewhere"]);

    // A key for a chain signs logins along the chain, and nothing else.
    let test = |name: &str| run(far.command("ssh-add").arg("-T").arg(with_suffix(&hosts.dir().join(name), ".pub")));
    test("free").ok();
    test("onward").fails_with(1);
    test("near-only").fails_with(1);
}

#[test]
fn the_far_side_cannot_lock() {
    let (agent, hosts, far) = forwarded();
    let mut lock = far.command("ssh-add");
    answering(&mut lock, hosts.dir(), "a password from far away");
    run(lock.arg("-x")).fails_with(1);
    assert_eq!(far.connect().request(&message(LOCK, &[b"password"])), [FAILURE]);
    assert_eq!(agent.connect().comments(), ["user"]);
    assert_eq!(far.connect().comments(), ["user"]);
}

#[test]
fn the_far_side_cannot_unlock() {
    let (agent, hosts, far) = forwarded();
    let mut near = agent.connect();
    assert_eq!(near.request(&message(LOCK, &[b"password"])), [SUCCESS]);
    let mut unlock = far.command("ssh-add");
    answering(&mut unlock, hosts.dir(), "password");
    run(unlock.arg("-X")).fails_with(1);
    assert_eq!(far.connect().request(&message(UNLOCK, &[b"password"])), [FAILURE]);
    assert!(near.list().is_empty(), "unlocked from far away");
    assert!(far.connect().list().is_empty());
    assert_eq!(near.request(&message(UNLOCK, &[b"password"])), [SUCCESS]);
    assert_eq!(far.connect().comments(), ["user"]);
}

#[test]
fn the_far_side_has_no_message_of_ours() {
    let (_agent, _hosts, far) = forwarded();
    let mut client = far.connect();
    let ours = [
        "keys", "devices", "sign", "decrypt", "derive", "submit", "collect", "cancel", "unlock", "lock", "forget",
        "why", "random", "generate", "import", "rename", "allow", "delete", "export",
    ];
    for name in ours {
        let name = format!("{name}@strongroom.alt");
        assert_eq!(client.request(&message(EXTENSION, &[name.as_bytes()])), [FAILURE], "{name}");
        assert_eq!(client.request(&message(EXTENSION, &[name.as_bytes(), &[0; 64]])), [FAILURE], "{name}");
    }
    let query = client.request(&message(EXTENSION, &[b"query"]));
    assert!(!String::from_utf8_lossy(&query).contains("strongroom.alt"), "{query:?}");
}

#[test]
fn the_far_side_cannot_pass_for_the_near() {
    let (_agent, _hosts, far) = forwarded();
    let mut client = far.connect();
    // A bind without a valid signature is refused, and what was bound before stays.
    let mut body = message(EXTENSION, &[b"session-bind@openssh.com"]);
    put(&mut body, b"no key");
    put(&mut body, b"no session");
    put(&mut body, b"no signature");
    body.push(0);
    assert_ne!(client.request(&body), [SUCCESS]);
    assert_eq!(client.request(&message(LOCK, &[b"password"])), [FAILURE]);
    assert_eq!(client.comments(), ["user"]);
}
