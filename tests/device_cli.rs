//! `strongroom device`: tokens are found, added and removed without a PIN, and a running daemon takes the change.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, path::Path, time::Instant};

use rustix::process::Signal;
use serde_json::Value;
use support::{
    Outcome, PATIENCE,
    bad_module::BadModule,
    cli::{self, json},
    daemon::{Daemon, Home},
    eventually, run,
    softhsm::{self, SoftHsm},
    terminal::Terminal,
};

/// `strongroom device` with these words.
fn device(home: &Home, hsm: &SoftHsm, words: &str) -> Outcome {
    let mut strongroom = cli::strongroom(home);
    run(strongroom.env("SOFTHSM2_CONF", hsm.conf()).arg("device").args(words.split_whitespace()))
}

fn reload(home: &Home, daemon: &Daemon<'_>) {
    let reloads = || home.log().matches("the configuration was reloaded").count();
    let before = reloads();
    daemon.signal(Signal::HUP);
    eventually("the configuration is reloaded", || reloads() > before);
}

#[test]
fn a_token_is_added_used_and_removed_while_the_daemon_runs() {
    let hsm = SoftHsm::with_token("My vault");
    hsm.generate("My vault", "EC:prime256v1", "01", "the key", &[]);
    let home = Home::new();
    // Its own environment does not say where SoftHSM's tokens are: the entry does.
    let daemon = home.start();
    let config = home.path("config.toml");
    let commented = fs::read_to_string(&config).unwrap() + "# Here be devices.\n";
    fs::write(&config, &commented).unwrap();

    let words = format!("add pkcs11 {} --config {}", softhsm::MODULE, config.display());
    let said = device(&home, &hsm, &words).ok();
    assert!(said.contains("[[device]]\nname = \"My-vault\"\ndriver = \"pkcs11\"\n"), "{said}");
    assert!(said.contains("reload strongroom") && !said.contains(softhsm::PIN), "{said}");
    let written = fs::read_to_string(&config).unwrap();
    assert!(written.contains("# Here be devices.\n") && written.contains("env = { SOFTHSM2_CONF = "), "{written}");

    reload(&home, &daemon);
    eventually("its key is listed", || daemon.connect().comments() == ["the key"]);
    let listed = json(device(&home, &hsm, "list --json"));
    assert_eq!(listed["devices"][0]["id"], "My-vault");
    assert_eq!(listed["devices"][0]["pin"], "needed");
    assert!(device(&home, &hsm, "list").ok().contains("My-vault  pkcs11"));

    // Once is enough.
    let again = device(&home, &hsm, &words).fails_with(4);
    assert!(again.stderr.contains("is the device `My-vault`"), "{again:?}");
    assert_eq!(fs::read_to_string(&config).unwrap(), written);

    let said = device(&home, &hsm, &format!("remove My-vault --config {}", config.display())).ok();
    assert!(said.contains("name = \"My-vault\""), "{said}");
    assert_eq!(fs::read_to_string(&config).unwrap(), commented);
    reload(&home, &daemon);
    assert!(daemon.connect().list().is_empty() && daemon.hosts().is_empty());
    let missing = device(&home, &hsm, &format!("remove My-vault --json --config {}", config.display())).fails_with(4);
    let error: Value = serde_json::from_str(&missing.stdout).unwrap();
    assert_eq!(error["error"]["code"], "no_such_key");
}

#[test]
fn one_of_several_tokens_is_named() {
    let hsm = SoftHsm::with_token("one");
    hsm.init_token("two");
    let home = Home::new();
    let config = home.path("new/config.toml");
    let add = |more: &str| {
        device(&home, &hsm, &format!("add pkcs11 {} --config {} {more}", softhsm::MODULE, config.display()))
    };
    let several = add("").fails_with(4);
    assert!(several.stderr.contains("pkcs11:token=one;serial=") && several.stderr.contains("--token"), "{several:?}");
    assert!(!config.exists());
    let none = add("--token pkcs11:token=three").fails_with(4);
    assert!(none.stderr.contains("token=one") && none.stderr.contains("is not meant"), "{none:?}");
    let added = json(add("--token pkcs11:token=two --name second --pin credential:hsm-pin --json"));
    assert_eq!((added["device"].as_str(), added["file"].as_str()), (Some("second"), config.to_str()));
    let written = fs::read_to_string(&config).unwrap();
    assert_eq!(added["entry"].as_str(), Some(&*written));
    assert!(written.contains("token = \"pkcs11:token=two\"") && written.contains("{ credential = \"hsm-pin\" }"));
    // Now there is only one other.
    add("--pin file:pin").ok();
    let written = fs::read_to_string(&config).unwrap();
    assert!(written.contains("name = \"one\"") && written.contains("token=one;serial="), "{written}");
    assert!(written.contains(&format!("{{ file = {:?} }}", home.path("pin"))), "{written}");
    let no = add("--pin 648219").fails_with(2);
    assert!(no.stderr.contains("prompt, file:PATH or credential:NAME"), "{no:?}");
}

/// On a terminal it is a question, with a number for an answer; what is no number of a token adds nothing.
#[test]
fn a_person_is_asked_which_of_several_tokens() {
    let hsm = SoftHsm::with_token("one");
    hsm.init_token("two");
    let home = Home::new();
    let config = home.path("new/config.toml");
    let words = format!("device add pkcs11 {} --config {}", softhsm::MODULE, config.display());
    let ask = || {
        let mut terminal = Terminal::start_with(&home, &words, |script| {
            script.env("SOFTHSM2_CONF", hsm.conf());
        });
        terminal.shows("Which token? [1-2] ");
        terminal
    };
    for none in ["\n", "0\n", "3\n", "two\n", "\u{4}"] {
        let mut terminal = ask();
        terminal.types(none);
        let (code, seen) = terminal.ends();
        assert!(code == Some(4) && seen.contains("--token"), "{none:?}: {code:?}, {seen}");
        assert!(!config.exists());
    }
    let mut terminal = ask();
    let line = |n: u8| {
        let (start, shown) = (format!("{n}  "), terminal.seen.lines().map(str::to_owned));
        shown.into_iter().find(|line| line.starts_with(&start)).unwrap()
    };
    let (first, second) = (line(1), line(2));
    assert!(first.contains("pkcs11:token=") && second.contains("pkcs11:token="), "{first} {second}");
    let wanted = second.split_whitespace().nth(1).unwrap().to_owned();
    assert!(!first.contains(&format!("token={wanted};")), "{first}");
    terminal.types("2\n");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    let written = fs::read_to_string(&config).unwrap();
    assert!(written.contains(&format!("name = {wanted:?}")), "{written}");
    assert!(written.contains(&format!("token = \"pkcs11:token={wanted};serial=")), "{written}");
}

#[test]
fn a_scan_shows_what_there_is_and_what_is_wrong() {
    let hsm = SoftHsm::with_token("good");
    hsm.init_token("other");
    let (home, module) = (Home::new(), BadModule::build());
    let config = home.path("none.toml");
    let scan = |more: &str| {
        device(&home, &hsm, &format!("scan {} --config {} {more}", module.path().display(), config.display()))
    };
    let shown = scan("").ok();
    assert!(shown.contains("pkcs11:token=good;serial=") && shown.contains("not initialised"), "{shown}");
    let found = json(scan("--json"));
    let tokens = found["modules"][0]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 3);
    let slot = tokens.iter().find(|token| token["label"] == "good").unwrap()["slot"].as_u64().unwrap();

    module.mood(&format!("C_GetTokenInfo fail=30 @{slot}\n"));
    let found = json(scan("--json"));
    let bad = &found["modules"][0]["bad_slots"][0];
    assert_eq!(bad["slot"].as_u64(), Some(slot));
    assert!(bad["reason"].as_str().unwrap().contains("CKR_DEVICE_ERROR"), "{bad}");
    assert!(scan("").ok().contains("CKR_DEVICE_ERROR"));

    module.mood("C_Initialize crash\n");
    assert!(scan("").ok().contains("cannot be used: the device's process was ended by signal: 11"));
    module.mood("C_GetSlotList hang\n");
    let asked = Instant::now();
    assert!(scan("--deadline 300ms").ok().contains("cannot be used: the device did not answer in time"));
    let words = format!("add pkcs11 {} --config {} --deadline 300ms", module.path().display(), config.display());
    let hung = device(&home, &hsm, &words).fails_with(7);
    assert!(hung.stderr.contains("--deadline"), "{hung:?}");
    assert!(asked.elapsed() < PATIENCE / 2);
    assert!(module.results("C_Login").is_empty());
}

#[test]
fn without_a_module_those_that_are_installed_are_asked() {
    let hsm = SoftHsm::with_token("found by itself");
    let home = Home::new();
    let found = json(device(&home, &hsm, &format!("scan --json --config {}", home.path("none.toml").display())));
    let modules = found["modules"].as_array().unwrap();
    let of_softhsm = |module: &&Value| {
        fs::canonicalize(module["module"].as_str().unwrap()).unwrap() == fs::canonicalize(softhsm::MODULE).unwrap()
    };
    assert_eq!(modules.iter().filter(of_softhsm).count(), 1, "{found}");
    let tokens = modules.iter().find(of_softhsm).unwrap()["tokens"].as_array().unwrap();
    assert!(tokens.iter().any(|token| token["label"] == "found by itself"), "{found}");
    let nothing = device(&home, &hsm, "scan /nonexistent/module.so").fails_with(1);
    assert!(nothing.stderr.contains("/nonexistent/module.so"));
    let none = device(&home, &hsm, &format!("add pkcs11 {}", Path::new("/etc/passwd").display())).fails_with(1);
    assert!(none.stderr.contains("cannot be loaded"), "{none:?}");
}
