//! Logging in to a real sshd with keys that only the agent has.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use support::{agent::Agent, command, keygen, public_key, run, sshd::Hosts, with_suffix};

/// Every key type of Debian 12's OpenSSH but DSA, as ssh-keygen's options.
const KEY_TYPES: [(&str, &[&str]); 8] = [
    ("ssh-ed25519", &["-t", "ed25519"]),
    ("ecdsa-sha2-nistp256", &["-t", "ecdsa", "-b", "256"]),
    ("ecdsa-sha2-nistp384", &["-t", "ecdsa", "-b", "384"]),
    ("ecdsa-sha2-nistp521", &["-t", "ecdsa", "-b", "521"]),
    ("ssh-rsa", &["-t", "rsa", "-b", "2048"]),
    ("ssh-rsa", &["-t", "rsa", "-b", "3072"]),
    ("sk-ssh-ed25519@openssh.com", &["-t", "ed25519-sk"]),
    ("sk-ecdsa-sha2-nistp256@openssh.com", &["-t", "ecdsa-sk"]),
];

/// The user that logs in: the one that runs the test.
fn user() -> String {
    run(command("id", Path::new("/")).arg("-un")).ok().trim().to_owned()
}

/// Moves a private key into the agent: the file is gone afterwards.
#[track_caller]
fn move_into(agent: &Agent, key: &Path, options: &[&str]) {
    agent.add(key, options);
    fs::remove_file(key).unwrap();
}

/// Checks that `host` let us in with the public key that `key` names.
#[track_caller]
fn logs_in(hosts: &Hosts, agent: &Agent, host: &str, key: &Path, options: &[&str]) {
    let used = hosts.login(agent, host, key, options).ok();
    assert!(used.contains(&public_key(key)), "{} let us in with {used}", key.display());
}

#[test]
fn with_every_key_type() {
    let (agent, hosts) = (Agent::start(), Hosts::one("somewhere"));
    for (n, (name, options)) in KEY_TYPES.into_iter().enumerate() {
        let key = keygen(hosts.dir(), &format!("user_{n}"), options);
        hosts.authorize(&key, "");
        move_into(&agent, &key, &[]);
        let used = hosts.login(&agent, "somewhere", &key, &[]).ok();
        assert_eq!(used.trim(), format!("publickey {name} {}", public_key(&key)));
    }
    assert_eq!(agent.connect().list().len(), KEY_TYPES.len());
}

#[test]
fn with_every_rsa_signature() {
    let (agent, hosts) = (Agent::start(), Hosts::one("somewhere"));
    let key = keygen(hosts.dir(), "user", &["-t", "rsa", "-b", "2048"]);
    hosts.authorize(&key, "");
    move_into(&agent, &key, &[]);
    for algorithm in ["rsa-sha2-256", "rsa-sha2-512", "ssh-rsa"] {
        let only = format!("PubkeyAcceptedAlgorithms={algorithm}");
        logs_in(&hosts, &agent, "somewhere", &key, &["-o", &only]);
    }
}

#[test]
fn with_a_certificate_of_every_key_type() {
    let agent = Agent::start();
    let mut hosts = Hosts::new();
    let ca = keygen(hosts.dir(), "user_ca", &["-t", "ed25519"]);
    hosts.start("somewhere", &format!("TrustedUserCAKeys {}.pub", ca.display()));
    for (n, (_, options)) in KEY_TYPES.into_iter().enumerate() {
        let key = keygen(hosts.dir(), &format!("user_{n}"), options);
        certify(&ca, &key, &user());
        move_into(&agent, &key, &[]);
        let certificate = with_suffix(&key, "-cert");
        logs_in(&hosts, &agent, "somewhere", &certificate, &[]);
    }
    // Each came with its plain key, which no host knows.
    assert_eq!(agent.connect().list().len(), 2 * KEY_TYPES.len());
    let plain = hosts.dir().join("user_0");
    fs::remove_file(with_suffix(&plain, "-cert.pub")).unwrap();
    hosts.login(&agent, "somewhere", &plain, &[]).fails_with(255);
}

/// Makes `key-cert.pub`, which lets `principal` in.
fn certify(ca: &Path, key: &Path, principal: &str) {
    let mut keygen = command("ssh-keygen", ca.parent().unwrap());
    run(keygen.args(["-q", "-I", "a test", "-n", principal, "-s"]).arg(ca).arg(with_suffix(key, ".pub"))).ok();
}

#[test]
fn with_an_sk_key_that_needs_no_touch() {
    let (agent, hosts) = (Agent::start(), Hosts::one("somewhere"));
    let key = keygen(hosts.dir(), "user", &["-t", "ed25519-sk", "-O", "no-touch-required"]);
    hosts.authorize(&key, "no-touch-required");
    move_into(&agent, &key, &[]);
    logs_in(&hosts, &agent, "somewhere", &key, &[]);
}

#[test]
fn not_with_a_key_that_is_gone() {
    let (agent, hosts) = (Agent::start(), Hosts::one("somewhere"));
    let key = keygen(hosts.dir(), "user", &["-t", "ed25519"]);
    hosts.authorize(&key, "");
    move_into(&agent, &key, &[]);
    logs_in(&hosts, &agent, "somewhere", &key, &[]);
    run(agent.command("ssh-add").arg("-d").arg(with_suffix(&key, ".pub"))).ok();
    hosts.login(&agent, "somewhere", &key, &[]).fails_with(255);
}

#[test]
fn many_at_once() {
    let (agent, hosts) = (Agent::start(), Hosts::one("somewhere"));
    let key = keygen(hosts.dir(), "user", &["-t", "ecdsa"]);
    hosts.authorize(&key, "");
    move_into(&agent, &key, &[]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| logs_in(&hosts, &agent, "somewhere", &key, &[]));
        }
    });
}

/// Runs ssh on `near` to go on to `far`, with the agent forwarded to `near`.
fn hop(hosts: &Hosts, agent: &Agent, key: &Path, near: &str, far: &str) -> support::Outcome {
    let config = hosts.ssh_config();
    let onward = format!("ssh -F {} -i {}.pub {far} 'cat $SSH_USER_AUTH'", config.display(), key.display());
    run(hosts.ssh(agent).arg("-A").arg("-i").arg(with_suffix(key, ".pub")).args([near, &onward]))
}

/// Two hosts, and a key that opens both and lives in the agent under `options`.
fn two_hosts(options: &[&str]) -> (Hosts, Agent, PathBuf) {
    let agent = Agent::start();
    let mut hosts = Hosts::new();
    hosts.start("near", "");
    hosts.start("far", "");
    let key = keygen(hosts.dir(), "user", &["-t", "ed25519"]);
    hosts.authorize(&key, "");
    let known_hosts = hosts.dir().join("known_hosts");
    let mut all = vec!["-H", known_hosts.to_str().unwrap()];
    all.extend(options);
    move_into(&agent, &key, &all);
    (hosts, agent, key)
}

#[test]
fn over_a_forwarded_hop() {
    let (hosts, agent, key) = two_hosts(&[]);
    let used = hop(&hosts, &agent, &key, "near", "far").ok();
    assert!(used.contains(&public_key(&key)));
}

#[test]
fn a_key_for_one_host_opens_no_other() {
    let (hosts, agent, key) = two_hosts(&["-h", "near"]);
    logs_in(&hosts, &agent, "near", &key, &[]);
    hosts.login(&agent, "far", &key, &[]).fails_with(255);
    hop(&hosts, &agent, &key, "near", "far").fails_with(255);
}

#[test]
fn a_key_for_a_chain_follows_the_chain() {
    let (hosts, agent, key) = two_hosts(&["-h", "near", "-h", "near>far"]);
    logs_in(&hosts, &agent, "near", &key, &[]);
    hosts.login(&agent, "far", &key, &[]).fails_with(255);
    hop(&hosts, &agent, &key, "near", "far").ok();
    hop(&hosts, &agent, &key, "near", "near").fails_with(255);
}

#[test]
fn a_key_for_one_user_opens_nothing_to_another() {
    let chain = format!("near>{}@far", user());
    let (hosts, agent, key) = two_hosts(&["-h", "near", "-h", &chain]);
    hop(&hosts, &agent, &key, "near", "far").ok();

    let (hosts, agent, key) = two_hosts(&["-h", "near", "-h", "near>somebody@far"]);
    logs_in(&hosts, &agent, "near", &key, &[]);
    hop(&hosts, &agent, &key, "near", "far").fails_with(255);
}
