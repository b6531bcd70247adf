//! The life of keys on SoftHSM, at the command line: made, looked at with another tool, used, named, deleted; listed while
//! their token is away.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::fs;

use serde_json::Value;
use support::{
    Outcome, cli, command,
    daemon::{Daemon, Home},
    eventually, run,
    softhsm::SoftHsm,
};

fn cli(home: &Home, words: &str) -> Outcome {
    run(cli::strongroom(home).args(words.split_whitespace()))
}

#[track_caller]
fn json(home: &Home, words: &str) -> Value {
    cli::json(cli(home, &format!("{words} --json")))
}

/// What pkcs11-tool says of the objects of this type, the private ones too.
fn objects(hsm: &SoftHsm, kind: &str) -> String {
    run(hsm.pkcs11_tool("vault").args(["--list-objects", "--type", kind])).ok()
}

/// A token as the device `hsm`, and a file `m` with a message.
fn token() -> (SoftHsm, Home) {
    let hsm = SoftHsm::with_token("vault");
    let mut home = Home::new();
    home.configure(&hsm.device("hsm", "vault", ""));
    fs::write(home.path("m"), "what is signed").unwrap();
    (hsm, home)
}

fn start<'a>(home: &'a Home) -> Daemon<'a> {
    let daemon = home.start();
    becomes(home, "ready");
    daemon
}

#[track_caller]
fn becomes(home: &Home, state: &str) {
    eventually(state, || json(home, "status")["devices"][0]["state"] == state);
}

#[test]
fn a_key_is_made_used_named_and_deleted() {
    let (hsm, home) = token();
    let _daemon = start(&home);
    for algorithm in ["rsa-2048", "nistp256", "nistp384", "ed25519"] {
        let made = json(&home, &format!("key generate hsm {algorithm} --label vote"));
        // Its secret part is the token's own.
        let private = objects(&hsm, "privkey");
        assert!(private.contains("label:      vote"), "{private}");
        assert!(private.contains("sensitive") && private.contains("never extractable"), "{private}");
        let id = private.lines().find_map(|line| line.trim().strip_prefix("ID:")).unwrap().trim();
        assert_eq!(id.len(), 32, "a random CKA_ID: {id}");
        // X.509 software names it by the identifier that we told, and takes the SubjectPublicKeyInfo.
        let identifier = made["identifier"].as_str().unwrap();
        fs::write(home.path("spki.b64"), made["spki"].as_str().unwrap()).unwrap();
        let openssl = |words: &str| run(command("openssl", &home.path("")).args(words.split_whitespace())).ok();
        openssl("base64 -d -A -in spki.b64 -out spki.der");
        openssl("pkey -pubin -inform DER -in spki.der -out public.pem");
        cli(&home, &format!("sign {identifier} m --out s")).ok();
        cli(&home, "verify public.pem s m").ok();
        cli(&home, "key rename vote ballot").ok();
        assert!(objects(&hsm, "privkey").contains("label:      ballot"));
        // The name again, and the right one.
        assert_ne!(cli(&home, "key delete ballot --name vote").code, Some(0));
        cli(&home, "key delete ballot --name ballot").ok();
        cli(&home, "sign ballot m").fails_with(4);
        assert_eq!(objects(&hsm, "privkey").trim(), "", "{algorithm}");
        assert_eq!(objects(&hsm, "pubkey").trim(), "", "{algorithm}");
    }
}

#[test]
fn a_key_that_was_made_is_listed_while_its_token_is_away() {
    let (hsm, home) = token();
    let daemon = start(&home);
    let made = json(&home, "key generate hsm nistp256 --label vote");
    drop(daemon);
    let away = hsm.path("away");
    fs::rename(hsm.tokens(), &away).unwrap();
    fs::create_dir(hsm.tokens()).unwrap();
    let _daemon = home.start();
    becomes(&home, "absent");
    let key = &json(&home, "keys vote")["keys"][0];
    assert_eq!(key["sha256"], made["sha256"]);
    assert_eq!(key["devices"][0]["state"], "absent");
    cli(&home, "sign vote m").fails_with(8);
    fs::remove_dir(hsm.tokens()).unwrap();
    fs::rename(&away, hsm.tokens()).unwrap();
    becomes(&home, "ready");
    cli(&home, "sign vote m --out s").ok();
    cli(&home, "verify vote s m").ok();
}

#[test]
fn keys_for_one_signature_leave_nothing_behind() {
    let (hsm, home) = token();
    let _daemon = start(&home);
    for n in 0..20 {
        let name = format!("once-{n}");
        let made = json(&home, &format!("key generate hsm nistp256 --label {name}"));
        let key = made["sha256"].as_str().unwrap();
        cli(&home, &format!("sign {key} m --out s")).ok();
        cli(&home, &format!("key delete {key} --name {name}")).ok();
    }
    assert_eq!(objects(&hsm, "privkey").trim(), "");
    assert_eq!(json(&home, "keys")["keys"].as_array().unwrap().len(), 0);
}
