//! `ssh-add -x` and `-X`: what is locked away, what comes back, and what nobody finds in between.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    thread,
    time::{Duration, Instant},
};

use support::{
    agent::Agent,
    askpass::{Askpass, answering},
    client::{
        CONFIRM, Client, FAILURE, Key, LOCK, REMOVE_ALL, REMOVE_IDENTITY, SUCCESS, UNLOCK, lifetime, message, random,
    },
    eventually, run,
};

#[track_caller]
fn lock(client: &mut Client, password: &[u8]) {
    assert_eq!(client.request(&message(LOCK, &[password])), [SUCCESS]);
}

#[track_caller]
fn unlock(client: &mut Client, password: &[u8]) {
    assert_eq!(client.request(&message(UNLOCK, &[password])), [SUCCESS]);
}

#[test]
fn ssh_add_locks_and_unlocks() {
    let agent = Agent::start();
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "kept", &[]);
    let ssh_add = |option, password| {
        let mut command = agent.command("ssh-add");
        answering(&mut command, agent.dir(), password);
        run(command.arg(option))
    };
    ssh_add("-x", "secret").ok();
    agent.ssh_add(&["-l"]).fails_with(1);
    ssh_add("-X", "guess").fails_with(1);
    agent.ssh_add(&["-l"]).fails_with(1);
    ssh_add("-X", "secret").ok();
    assert!(agent.ssh_add(&["-l"]).ok().contains("kept"));
    client.sign(&key);
}

#[test]
fn a_locked_agent_lists_nothing_and_does_nothing() {
    let agent = Agent::start();
    let (key, new) = (Key::random(), Key::random());
    let mut client = agent.connect();
    client.add(&key, "kept", &[]);
    lock(&mut client, b"secret");
    assert!(client.list().is_empty());
    for body in [
        key.sign_message(b"data"),
        new.add_message(b"new", &[]),
        new.add_message(b"new", &lifetime(9)),
        message(REMOVE_IDENTITY, &[&key.blob()]),
        vec![REMOVE_ALL],
        message(LOCK, &[b"again"]),
        message(UNLOCK, &[b""]),
    ] {
        assert_eq!(client.request(&body), [FAILURE], "type {}", body[0]);
    }
    unlock(&mut client, b"secret");
    assert_eq!(client.comments(), ["kept"]);
    client.sign(&key);
}

#[test]
fn an_empty_password_locks_nothing_and_an_unlocked_agent_unlocks_nothing() {
    let agent = Agent::start();
    let mut client = agent.connect();
    assert_eq!(client.request(&message(LOCK, &[b""])), [FAILURE]);
    assert_eq!(client.request(&message(UNLOCK, &[b"secret"])), [FAILURE]);
    client.add(&Key::random(), "free", &[]);
}

#[test]
fn a_password_is_any_bytes_but_nul() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let key = Key::random();
    client.add(&key, "kept", &[]);
    let password: Vec<u8> = (1..=255).cycle().take(1000).collect();
    lock(&mut client, &password);
    assert_eq!(client.request(&message(UNLOCK, &[&password[..999]])), [FAILURE]);
    unlock(&mut client, &password);
    client.sign(&key);
}

#[test]
fn a_wrong_password_costs_more_time_each_time_and_the_right_one_forgives() {
    let agent = Agent::start();
    let mut client = agent.connect();
    lock(&mut client, b"secret");
    let mut wrong = || {
        let start = Instant::now();
        assert_eq!(client.request(&message(UNLOCK, &[b"wrong"])), [FAILURE]);
        start.elapsed()
    };
    // A tenth of a second for each failure so far; whether the answer or the next attempt waits is left open.
    let total: Duration = (0..4).map(|_| wrong()).sum();
    assert!(total >= Duration::from_millis(600), "four wrong passwords took {total:?}");
    unlock(&mut client, b"secret");
    lock(&mut client, b"secret");
    unlock(&mut client, b"secret");
}

#[test]
fn order_comments_and_constraints_come_back() {
    let mut askpass = Askpass::new();
    let agent = Agent::start_with(|agent| askpass.serve(agent));
    let keys: Vec<_> = (0..20).map(|_| Key::random()).collect();
    let mut client = agent.connect();
    for (n, key) in keys.iter().enumerate() {
        client.add(key, &format!("key {n}"), if n == 7 { CONFIRM } else { &[] });
    }
    let before = client.list();
    lock(&mut client, b"secret");
    unlock(&mut client, b"secret");
    assert_eq!(client.list(), before);
    client.sign(&keys[6]);
    client.send(&keys[7].sign_message(b"data"));
    askpass.next();
    askpass.answer(1, "");
    assert_eq!(client.receive().unwrap(), [FAILURE]);
}

#[test]
fn keys_expire_while_locked_and_deadlines_come_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    client.add(&Key::random(), "one second", &lifetime(1));
    client.add(&Key::random(), "four seconds", &lifetime(4));
    client.add(&Key::random(), "an hour", &lifetime(3600));
    client.add(&Key::random(), "for ever", &[]);
    lock(&mut client, b"secret");
    // Nothing tells from outside when a key goes that nobody can see.
    thread::sleep(Duration::from_millis(1500));
    unlock(&mut client, b"secret");
    let left = client.comments();
    assert!(!left.contains(&"one second".to_owned()), "{left:?}");
    assert!(left.ends_with(&["an hour".into(), "for ever".into()]), "{left:?}");
    eventually("the lifetime ends after the unlock", || client.comments() == ["an hour", "for ever"]);
}

#[test]
fn locking_dismisses_open_prompts() {
    let mut askpass = Askpass::new();
    let agent = Agent::start_with(|agent| askpass.serve(agent));
    let key = Key::random();
    let mut asker = agent.connect();
    asker.add(&key, "guarded", CONFIRM);
    asker.send(&key.sign_message(b"data"));
    let prompt = askpass.next();

    let mut other = agent.connect();
    lock(&mut other, b"secret");
    prompt.wait_gone();
    assert_eq!(asker.receive().unwrap(), [FAILURE]);
    unlock(&mut other, b"secret");
    asker.send(&key.sign_message(b"data"));
    askpass.next();
    askpass.answer(0, "");
    assert!(key.signed(b"data", &asker.receive().unwrap()));
}

/// Whether the agent's memory can be searched, which only root may do.
fn may_read_memory() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("not searched: only root may read the memory of an agent");
    }
    root
}

#[test]
fn a_locked_agent_has_no_key_in_its_memory() {
    if !may_read_memory() {
        return;
    }
    let agent = Agent::start();
    let key = Key::random();
    let password: String = random().iter().map(|b| format!("{b:02x}")).collect();
    let mut client = agent.connect();
    client.add(&key, "wanted", &[]);
    client.sign(&key);
    assert!(agent.memory_contains(&key.seed()), "the search cannot find what is there");

    lock(&mut client, password.as_bytes());
    assert!(!agent.memory_contains(&key.seed()), "the secret is still there");
    assert!(!agent.memory_contains(password.as_bytes()), "the password is still there");
    unlock(&mut client, password.as_bytes());
    client.sign(&key);
}

#[test]
fn a_removed_or_expired_key_leaves_the_memory() {
    if !may_read_memory() {
        return;
    }
    let agent = Agent::start();
    let [removed, all, expired] = [Key::random(), Key::random(), Key::random()];
    let mut client = agent.connect();
    client.add(&removed, "removed", &[]);
    client.add(&expired, "expired", &lifetime(2));
    client.sign(&removed);
    assert!(agent.memory_contains(&removed.seed()), "the search cannot find what is there");
    assert_eq!(client.request(&message(REMOVE_IDENTITY, &[&removed.blob()])), [SUCCESS]);
    assert!(!agent.memory_contains(&removed.seed()), "removed, and still there");

    eventually("the key expires", || client.list().is_empty());
    assert!(!agent.memory_contains(&expired.seed()), "expired, and still there");

    client.add(&all, "all", &[]);
    assert_eq!(client.request(&[REMOVE_ALL]), [SUCCESS]);
    assert!(!agent.memory_contains(&all.seed()), "removed with all, and still there");
}

#[test]
fn an_added_key_that_is_refused_leaves_the_memory() {
    if !may_read_memory() {
        return;
    }
    let agent = Agent::start();
    let key = Key::random();
    let mut client = agent.connect();
    assert_eq!(client.request(&key.add_message(b"refused", &[77])), [FAILURE]);
    assert!(!agent.memory_contains(&key.seed()));
}

#[test]
fn a_key_that_is_removed_under_an_open_prompt_leaves_the_memory_and_does_not_sign() {
    if !may_read_memory() {
        return;
    }
    let mut askpass = Askpass::new();
    let agent = Agent::start_with(|agent| askpass.serve(agent));
    let key = Key::random();
    let [mut asker, mut other] = [agent.connect(), agent.connect()];
    asker.add(&key, "guarded", CONFIRM);
    assert!(agent.memory_contains(&key.seed()), "the search cannot find what is there");
    asker.send(&key.sign_message(b"data"));
    askpass.next();
    assert_eq!(other.request(&[REMOVE_ALL]), [SUCCESS]);
    assert!(!agent.memory_contains(&key.seed()), "removed, and still there");
    askpass.answer(0, "");
    assert_eq!(asker.receive().unwrap(), [FAILURE]);
}

#[test]
fn locking_again_and_again_keeps_no_memory() {
    // One derivation takes 24 MiB; what is kept of them shows after a few.
    const ROUNDS: u64 = 8;
    let agent = Agent::start();
    let mut client = agent.connect();
    lock(&mut client, b"password");
    unlock(&mut client, b"password");
    let before = agent.resident();
    for _ in 0..ROUNDS {
        lock(&mut client, b"password");
        unlock(&mut client, b"password");
    }
    let grown = agent.resident().saturating_sub(before);
    assert!(grown < ROUNDS * (2 << 20), "{grown} bytes more");
}
