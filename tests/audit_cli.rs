//! `strongroom audit` against the built daemon and without one: what verify finds, what show and tail print.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use strongroom::vault::audit::path_of;
use support::{
    Outcome, cli,
    client::{FAILURE, Key},
    daemon::Home,
    run,
};

/// `strongroom` with these words; it finds the daemon, and the log where none runs.
fn strongroom(home: &Home, words: &str) -> Command {
    let mut command = cli::strongroom(home);
    command.args(words.split_whitespace());
    command
}

fn cli(home: &Home, words: &str) -> Outcome {
    run(&mut strongroom(home, words))
}

fn json(home: &Home, words: &str) -> Value {
    serde_json::from_str(&cli(home, words).stdout).unwrap()
}

/// Changes the file of the log.
fn change(home: &Home, change: impl FnOnce(&mut Vec<u8>)) {
    let path = path_of(&home.audit_directory(), 1);
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn verify_names_what_was_changed_with_and_without_a_daemon() {
    let home = Home::new();
    let daemon = home.start();
    let mut client = daemon.connect();
    let key = Key::random();
    client.add(&key, "key", &[]);
    for _ in 0..5 {
        client.sign(&key);
    }
    let whole = cli(&home, "audit verify").ok();
    assert!(
        whole.starts_with("The audit log is whole.\nLines: 7, from number 1 on; files: 1. The last line is\n7:"),
        "{whole}"
    );
    let known = whole.lines().last().unwrap().to_owned();
    assert!(daemon.end(Signal::TERM).success());

    let without =
        ["audit verify --config config.toml", "audit verify --state state", "audit verify --files state/audit"];
    for words in without {
        let stdout = cli(&home, &format!("{words} --known {known}")).ok();
        assert!(stdout.contains("The audit log is whole.\nLines: 8,"), "{stdout}");
        assert_eq!(stdout.contains("not known"), words.contains("--files"), "{stdout}");
    }
    let report = &json(&home, "audit verify --state state --json")["audit"];
    assert_eq!((&report["whole"], &report["lines"], &report["head_known"]), (&true.into(), &8.into(), &true.into()));

    let original = fs::read(path_of(&home.audit_directory(), 1)).unwrap();
    let third = original.split(|byte| *byte == b'\n').take(2).map(|line| line.len() + 1).sum::<usize>();
    change(&home, |bytes| bytes[third + 12] ^= 1);
    let altered = cli(&home, "audit verify --state state").fails_with(12);
    let named = format!("{}:3: the line was changed\n", path_of(&home.audit_directory(), 1).display());
    assert!(altered.stdout.starts_with(&named), "{altered:?}");
    assert!(altered.stderr.contains("the audit log is not what was written"), "{altered:?}");
    let told = json(&home, "audit verify --state state --json");
    assert_eq!((&told["error"]["exit"], &told["audit"]["faults"][0]["line"]), (&12.into(), &3.into()), "{told}");

    change(&home, |bytes| *bytes = original[..third].to_vec());
    let cut = cli(&home, "audit verify --state state").fails_with(12).stdout;
    assert!(cut.contains(":2: the log ends here, and its last lines are missing: 6\n"), "{cut}");
    // The daemon goes on, and what is missing stays missing for all to see.
    let daemon = home.start();
    daemon.logs("the audit log was changed or cut");
    let cut = cli(&home, "audit verify").fails_with(12).stdout;
    assert!(cut.contains("00000002.jsonl:1: lines number 3 to 8 are missing before this one"), "{cut}");
    drop(daemon);

    fs::remove_dir_all(home.audit_directory()).unwrap();
    assert!(cli(&home, "audit verify --state state").fails_with(1).stderr.contains("state/audit"));
}

#[test]
fn show_prints_what_is_wanted() {
    let home = Home::new();
    let daemon = home.start();
    let mut client = daemon.connect();
    let (one, other) = (Key::random(), Key::random());
    client.add(&one, "one key", &[]);
    client.add(&other, "another", &[]);
    client.sign(&one);
    client.sign(&other);
    assert_eq!(client.request(&Key::random().sign_message(b"data")), [FAILURE]);

    let all = cli(&home, "audit show").ok();
    assert_eq!(all.lines().count(), 6, "{all}");
    assert!(all.lines().next().unwrap().ends_with("  start  ok"), "{all}");
    let by_name = cli(&home, "audit show --key another").ok();
    let by_print = cli(&home, &format!("audit show --key {}", other.fingerprint())).ok();
    assert!(by_name == by_print && by_name.lines().all(|line| line.contains(&other.fingerprint())), "{by_name}");
    assert_eq!(by_name.lines().count(), 2, "{by_name}");
    let last = cli(&home, "audit show -n 1").ok();
    assert!(last.contains("  sign  no_such_key  ") && last.contains(" of uid "), "{last}");
    assert_eq!(cli(&home, "audit show --since 2100-01-01").ok(), "");
    assert_eq!(cli(&home, "audit show --since 1h").ok(), all);
    cli(&home, "audit show --since yesterday").fails_with(2);
    cli(&home, "audit show --key nobody").fails_with(4);

    // The very lines, of which each has the hash of the one before.
    assert_eq!(cli(&home, "audit show --json").ok(), home.audit());
    assert!(daemon.end(Signal::TERM).success());
    let words = format!("audit show --state state --json --key {}", one.fingerprint());
    let lines: Vec<Value> = cli(&home, &words).ok().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let operations: Vec<_> = lines.iter().map(|line| line["operation"].as_str().unwrap()).collect();
    assert_eq!(operations, ["add", "sign"]);
    cli(&home, "audit show --state state --key another").fails_with(2);
}

#[test]
fn tail_goes_on_with_what_is_added() {
    let mut home = Home::new();
    home.configure("[audit]\nmax_size = \"1M\"");
    let daemon = home.start();
    let mut client = daemon.connect();
    let key = Key::random();
    client.add(&key, "key", &[]);
    client.add(&key, "key", &[]);
    let mut tail = strongroom(&home, "audit tail -n 1 --json").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    let first = next()["seq"].as_u64().unwrap();
    assert_eq!(first, 3);
    // More than a file holds.
    const MANY: u64 = 600;
    for _ in 0..MANY {
        client.sign(&key);
    }
    for n in 1..=MANY {
        assert_eq!(next()["seq"], first + n);
    }
    assert!(path_of(&home.audit_directory(), 2).exists());
    kill_process(Pid::from_raw(tail.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
    assert!(tail.wait().unwrap().success());
}
