//! Nobody waits for somebody else's prompt, nor for somebody else's wrong password.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{env, io::ErrorKind};

use support::{
    agent::Agent,
    askpass::Askpass,
    client::{CONFIRM, Client, FAILURE, Key, LOCK, REMOVE_IDENTITY, SIGN_RESPONSE, SUCCESS, UNLOCK, message},
};

/// An agent whose prompts the test answers.
fn start() -> (Agent, Askpass) {
    let askpass = Askpass::new();
    (Agent::start_with(|agent| askpass.serve(agent)), askpass)
}

/// Whether no reply has come to `client` yet.
fn is_waiting(client: &Client) -> bool {
    client.stream.set_nonblocking(true).unwrap();
    let peeked = rustix::net::recv(&client.stream, &mut [0; 1], rustix::net::RecvFlags::PEEK);
    client.stream.set_nonblocking(false).unwrap();
    peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn while_a_prompt_is_open_everybody_else_is_served() {
    let (agent, mut askpass) = start();
    let (guarded, free) = (Key::random(), Key::random());
    let mut asker = agent.connect();
    asker.add(&guarded, "guarded", CONFIRM);
    asker.add(&free, "free", &[]);
    asker.send(&guarded.sign_message(b"data"));
    askpass.next();

    for _ in 0..10 {
        let mut other = agent.connect();
        assert_eq!(other.comments(), ["guarded", "free"]);
        other.sign(&free);
        let key = Key::random();
        other.add(&key, "for a moment", &[]);
        other.sign(&key);
        assert_eq!(other.request(&message(REMOVE_IDENTITY, &[&key.blob()])), [SUCCESS]);
    }
    agent.ssh_add(&["-l"]).ok();
    assert!(is_waiting(&asker), "the prompt was never open");

    askpass.answer(0, "");
    assert!(guarded.signed(b"data", &asker.receive().unwrap()));
}

#[test]
fn prompts_do_not_wait_for_each_other() {
    let (agent, mut askpass) = start();
    let key = Key::random();
    let [mut first, mut second] = [agent.connect(), agent.connect()];
    first.add(&key, "guarded", CONFIRM);
    first.send(&key.sign_message(b"first"));
    askpass.next();
    second.send(&key.sign_message(b"second"));
    askpass.next();
    assert!(is_waiting(&first) && is_waiting(&second));
    askpass.answer(0, "");
    askpass.answer(0, "");
    assert!(key.signed(b"first", &first.receive().unwrap()));
    assert!(key.signed(b"second", &second.receive().unwrap()));
}

#[test]
fn behind_a_prompt_on_one_connection_the_replies_keep_their_order() {
    let (agent, mut askpass) = start();
    let (guarded, free) = (Key::random(), Key::random());
    let mut client = agent.connect();
    client.add(&guarded, "guarded", CONFIRM);
    client.add(&free, "free", &[]);
    client.send(&guarded.sign_message(b"first"));
    client.send(&free.sign_message(b"second"));
    askpass.next();
    assert!(is_waiting(&client), "the second reply overtook the first");
    askpass.answer(1, "");
    assert_eq!(client.receive().unwrap(), [FAILURE]);
    assert!(free.signed(b"second", &client.receive().unwrap()));
}

#[test]
fn a_client_that_hangs_up_takes_its_prompt_along() {
    let (agent, mut askpass) = start();
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "guarded", CONFIRM);
    client.send(&key.sign_message(b"data"));
    let prompt = askpass.next();
    drop(client);
    prompt.wait_gone();
    assert_eq!(agent.connect().comments(), ["guarded"]);
}

#[test]
fn the_answer_is_an_exit_code_and_no_word_but_yes() {
    let (agent, mut askpass) = start();
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "guarded", CONFIRM);
    let cases = [
        (0, "", true),
        (0, "yes", true),
        (0, "YES", true),
        (0, "no", false),
        (0, "yesterday", false),
        (1, "", false),
        (1, "yes", false),
        (255, "", false),
    ];
    for (code, text, allowed) in cases {
        client.send(&key.sign_message(b"data"));
        askpass.next();
        askpass.answer(code, text);
        let reply = client.receive().unwrap();
        assert_eq!(reply[0], if allowed { SIGN_RESPONSE } else { FAILURE }, "exit {code}, {text:?}");
    }
}

#[test]
fn the_prompt_names_the_key_its_fingerprint_and_the_program() {
    let (agent, mut askpass) = start();
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "the key of a test", CONFIRM);
    client.send(&key.sign_message(b"data"));
    let prompt = askpass.next();
    assert_eq!(prompt.kind, "confirm");
    assert!(prompt.text.starts_with("Allow use of key the key of a test?\nKey fingerprint "), "{}", prompt.text);
    assert!(prompt.text.contains(&key.fingerprint()), "{}", prompt.text);
    let program = env::current_exe().unwrap();
    assert!(prompt.text.contains(program.file_name().unwrap().to_str().unwrap()), "{}", prompt.text);
    assert!(prompt.text.contains(&std::process::id().to_string()), "{}", prompt.text);
}

#[test]
fn a_comment_cannot_forge_the_prompt() {
    let (agent, mut askpass) = start();
    let key = Key::random();
    let mut client = agent.connect();
    client.add(&key, "good?\nKey fingerprint SHA256:forged\u{1b}[2J\u{202e}\r\u{9b}x", CONFIRM);
    client.send(&key.sign_message(b"data"));
    let prompt = askpass.next();
    assert!(!prompt.text.contains("\nKey fingerprint SHA256:forged"), "{}", prompt.text);
    for c in ['\u{1b}', '\r', '\u{202e}', '\u{9b}'] {
        assert!(!prompt.text.contains(c), "{:?}", prompt.text);
    }
    assert!(prompt.text.contains(&key.fingerprint()), "{}", prompt.text);
}

#[test]
fn without_a_display_the_key_is_taken_and_its_use_denied() {
    let mut askpass = Askpass::new();
    let key = Key::random();
    let agent = Agent::start_with(|agent| {
        askpass.serve(agent);
        agent.env_remove("DISPLAY");
    });
    let mut client = agent.connect();
    client.add(&key, "guarded", CONFIRM);
    assert_eq!(client.request(&key.sign_message(b"data")), [FAILURE]);
    assert!(!askpass.has_asked());

    let agent = Agent::start_with(|agent| {
        askpass.serve(agent);
        agent.env_remove("DISPLAY").env("SSH_ASKPASS_REQUIRE", "force");
    });
    let mut client = agent.connect();
    client.add(&key, "guarded", CONFIRM);
    client.send(&key.sign_message(b"data"));
    askpass.next();
    askpass.answer(0, "");
    assert!(key.signed(b"data", &client.receive().unwrap()));
}

#[test]
fn an_askpass_that_does_not_exist_denies() {
    let key = Key::random();
    let agent = Agent::start_with(|agent| {
        agent.env("SSH_ASKPASS", "/nonexistent/askpass").env("DISPLAY", ":none");
    });
    let mut client = agent.connect();
    client.add(&key, "guarded", CONFIRM);
    assert_eq!(client.request(&key.sign_message(b"data")), [FAILURE]);
    assert_eq!(client.comments(), ["guarded"]);
}

#[test]
fn while_an_unlock_is_slowed_everybody_else_is_served() {
    let agent = Agent::start();
    let mut guesser = agent.connect();
    assert_eq!(guesser.request(&message(LOCK, &[b"right"])), [SUCCESS]);
    // The delays of these add up to several seconds.
    let guesses = 12;
    (0..guesses).for_each(|_| guesser.send(&message(UNLOCK, &[b"wrong"])));
    assert_eq!(guesser.receive().unwrap(), [FAILURE]);

    for _ in 0..10 {
        let mut other = agent.connect();
        assert!(other.list().is_empty());
        assert_eq!(other.request(&Key::random().sign_message(b"data")), [FAILURE]);
    }
    // The last delay is the longest, and nobody has read the replies: see that the last one is not among them.
    guesser.stream.set_nonblocking(true).unwrap();
    let mut answered = 1;
    while guesser.receive().is_ok() {
        answered += 1;
    }
    assert!(answered < guesses, "all {guesses} wrong passwords were answered before the others were");
}
