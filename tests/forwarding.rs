//! What the far side of a forwarding may do with the agent, and what it may not: through `ssh -A`, through clients that
//! bind no session, and when the service door's socket itself is forwarded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, process::Command};

use strongroom::agent::message::{Code, ReplyError};
use support::{
    agent::Agent,
    askpass::answering,
    client::{Client, EXTENSION, FAILURE, Key, LOCK, SUCCESS, UNLOCK, message, put},
    command,
    daemon::Home,
    keygen, public_key, run,
    service::{all_names, compatible, compatible_requests, one_of_each, query},
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

/// The standard messages work with this key, and no other does.
#[track_caller]
fn is_for_ssh_only(client: &mut Client, key: &Key) {
    assert_eq!(client.list().len(), 1);
    client.sign(key);
    for request in one_of_each(&key.blob()) {
        assert_eq!(client.ask(&request).error(), ReplyError::NotSpoken, "{:?}", request.name());
    }
    for request in compatible_requests(&key.blob()) {
        assert_eq!(compatible(client, &request), [FAILURE], "{:?}", request.name());
    }
    for name in all_names() {
        assert_eq!(client.request(&message(EXTENSION, &[name.as_bytes()])), [FAILURE], "{name}");
    }
    let known = query(client);
    assert!(known.iter().all(|name| ["query", "session-bind@openssh.com"].contains(&name.as_str())), "{known:?}");
    client.sign(key);
}

/// A host, and a key in a file that may log in to it.
fn host() -> (Hosts, std::path::PathBuf) {
    let hosts = Hosts::one("near");
    let login = keygen(hosts.dir(), "login", &["-t", "ed25519"]);
    hosts.authorize(&login, "");
    (hosts, login)
}

#[test]
fn what_an_ssh_door_is_configured_to_speak_is_for_this_machine_only() {
    let (hosts, login) = host();
    let mut home = Home::new();
    let path = home.path("named");
    home.configure(&format!("[[listen]]\ndoor = \"ssh\"\npath = {path:?}\nmessages = {:?}", all_names()));
    let daemon = home.start();
    let key = Key::random();
    daemon.connect().add(&key, "key", &[]);
    assert!(query(&mut Client::connect(&path)).len() > all_names().len());
    let far = hosts.forward_socket(&path, "near", &login);
    is_for_ssh_only(&mut far.connect(), &key);
}

#[test]
fn the_far_side_of_a_client_that_binds_no_session_has_no_message_of_ours() {
    let (hosts, login) = host();
    let home = Home::new();
    let daemon = home.start();
    let key = Key::random();
    daemon.connect().add(&key, "key", &[]);
    let far = hosts.forward_by_paramiko(&home.path("agent"), "near", &login);
    is_for_ssh_only(&mut far.connect(), &key);
    drop(far);

    let (proxy, agent) = (home.path("proxy"), home.path("agent"));
    let mut socat: Command = command("socat", &home.path(""));
    socat.arg(format!("UNIX-LISTEN:{}", proxy.display())).arg(format!("UNIX-CONNECT:{}", agent.display()));
    let mut socat = socat.spawn().unwrap();
    // It takes one connection and no other.
    let mut client = Client::connect_to_starting("socat listens: apt-get install socat", &proxy);
    is_for_ssh_only(&mut client, &key);
    drop(client);
    assert!(socat.wait().unwrap().success());
}

#[test]
fn a_forwarded_service_door_is_of_no_use() {
    let (hosts, login) = host();
    let home = Home::new();
    let daemon = home.start();
    let key = Key::random();
    let mut near = daemon.connect_service();
    near.add(&key, "key", &[]);
    let far = hosts.forward_remotely(&home.path("service"), "near", &login);
    let mut client = far.connect();
    for request in one_of_each(&key.blob()) {
        assert_eq!(client.ask(&request).code(), Code::Denied, "{:?}", request.name());
    }
    for request in compatible_requests(&key.blob()) {
        assert_eq!(compatible(&mut client, &request), [FAILURE], "{:?}", request.name());
    }
    for body in [
        vec![11],
        key.sign_message(b"data"),
        Key::random().add_message(b"mine", &[]),
        message(18, &[&key.blob()]),
        vec![19],
        message(LOCK, &[b"password"]),
        message(EXTENSION, &[b"query"]),
        message(EXTENSION, &[b"session-bind@openssh.com"]),
    ] {
        assert_eq!(client.request(&body), [FAILURE], "message {}", body[0]);
    }
    assert_eq!(near.comments(), ["key"]);
    near.sign(&key);
}
