//! The C client and its example against the built daemon, under the sanitizers: a loop that ticks beside a thousand
//! requests, and an authority whose votes OpenSSL verifies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use base64ct::{Base64, Encoding};
use strongroom::{agent::message::Request, public_key::PublicKey, rfc4251::Put, vault::key::Grants};
use support::{
    c::Program,
    command,
    daemon::{Daemon, Home, SLOW},
    eventually, keygen, public_key, run, soft, with_suffix,
};

const COUNT: usize = 1000;

/// Does not come back from signatures.
const DEAD: &str = r#"
control = CONTROL
[[key]]
slot = "k"
type = "rsa"
[[rule]]
on = "sign"
do = "hang"
"#;

/// The blob of the only key.
fn blob(daemon: &Daemon<'_>) -> Vec<u8> {
    let mut keys = Vec::new();
    eventually("the key is listed", || {
        keys = daemon.connect_service().list();
        keys.len() == 1
    });
    keys.swap_remove(0).0
}

/// Runs the loop: what became of each request, and the ticks meanwhile.
fn ticking(home: &Home, key: &[u8], deadline_ms: &str) -> (BTreeMap<usize, (String, String)>, usize) {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let program = Program::Loop.sanitized(&home.path(""));
    let socket = home.path("service");
    let arguments = [socket.to_str().unwrap(), &hex, &COUNT.to_string(), deadline_ms];
    let outcome = run(command(program.to_str().unwrap(), &home.path("")).args(arguments));
    let stdout = outcome.ok();
    let (answers, last) = stdout.trim_end().rsplit_once('\n').unwrap();
    let mut ended = BTreeMap::new();
    for line in answers.lines() {
        let mut words = line.split(' ').map(ToOwned::to_owned);
        let mut next = || words.next().unwrap();
        let number = next().parse().unwrap();
        assert!(ended.insert(number, (next(), next())).is_none(), "{number} ended twice");
    }
    (ended, last.split(' ').nth(1).unwrap().parse().unwrap())
}

/// Whether these are signatures over `data n` by the key.
fn verifies(key: &[u8], number: usize, signature: &str) -> bool {
    let mut blob = Vec::new();
    blob.put_string(b"ssh-ed25519");
    blob.put_string(&soft::unhex(signature));
    PublicKey::parse(key).unwrap().verify(format!("data {number}").as_bytes(), &blob).is_ok()
}

#[test]
fn a_loop_ticks_while_a_thousand_requests_are_in_flight_and_gets_every_one() {
    let mut home = Home::new();
    home.device("slow", SLOW, "timeout = \"1m\"");
    let daemon = home.start();
    let key = blob(&daemon);
    let (ended, ticks) = ticking(&home, &key, "60000");
    assert_eq!(ended.len(), COUNT);
    for (number, (code, signature)) in &ended {
        assert_eq!(code, "ok", "{number}");
        assert!(verifies(&key, *number, signature), "{number}");
    }
    // More than six seconds of work: a loop that waited for any of it would not have ticked.
    assert!(ticks > 100, "{ticks} ticks");
}

#[test]
fn what_is_not_done_by_its_deadline_is_a_timeout_and_all_else_is_done() {
    let mut home = Home::new();
    home.device("slow", SLOW, "timeout = \"1m\"");
    let daemon = home.start();
    let key = blob(&daemon);
    let (ended, ticks) = ticking(&home, &key, "1000");
    assert_eq!(ended.len(), COUNT);
    let mut signed = 0;
    for (number, (code, signature)) in &ended {
        match code.as_str() {
            "ok" => {
                assert!(verifies(&key, *number, signature), "{number}");
                signed += 1;
            }
            // The device cannot do a thousand in a second.
            code => assert_eq!(code, "timeout", "{number}"),
        }
    }
    assert!(signed > 0 && signed < COUNT && ticks > 10, "{signed} signed, {ticks} ticks");
}

/// Runs the example: what it printed, and its exit code.
fn authority(home: &Home, key: &Path, schedule: [&str; 3]) -> (String, Option<i32>) {
    let program = Program::Authority.sanitized(&home.path(""));
    let socket = home.path("service");
    let mut example = command(program.to_str().unwrap(), &home.path(""));
    let Output { status, stdout, stderr } =
        example.arg(socket).arg(key).arg(home.path("")).args(schedule).output().unwrap();
    assert!(stderr.is_empty(), "{}", String::from_utf8_lossy(&stderr));
    (String::from_utf8(stdout).unwrap(), status.code())
}

#[test]
fn openssl_verifies_the_votes_of_the_authority() {
    let home = Home::new();
    let daemon = home.start();
    let key = keygen(&home.path(""), "authority-key", &["-t", "rsa", "-b", "2048"]);
    daemon.ssh_add(&[key.to_str().unwrap()]).ok();
    let blob = Base64::decode_vec(&public_key(&key)).unwrap();
    // A key that came by ssh-add makes ssh's signatures, until its owner allows it more.
    let public: PathBuf = with_suffix(&key, ".pub");
    let (stdout, code) = authority(&home, &public, ["1", "20", "20000"]);
    assert!(code == Some(1) && stdout.contains("vote 1: not_permitted"), "{stdout}");
    let operations = Grants { sign: true, ..Grants::NONE };
    daemon.connect_service().ask(&Request::Allow { key: &blob, operations, proof: None }).ok::<()>();

    let (stdout, code) = authority(&home, &public, ["3", "30", "20000"]);
    assert!(code == Some(0) && stdout.contains("3 of 3 votes signed"), "{stdout}");
    let dir = home.path("");
    let pem = run(command("ssh-keygen", &dir).args(["-e", "-m", "PKCS8", "-f"]).arg(&public)).ok();
    fs::write(home.path("key.pem"), pem).unwrap();
    for vote in 1..=3 {
        let digest = format!("openssl dgst -sha256 -binary -out digest vote-{vote}");
        run(command("sh", &dir).args(["-c", &digest])).ok();
        let verify = format!(
            "openssl pkeyutl -verify -pubin -inkey key.pem -pkeyopt rsa_padding_mode:pkcs1 \
             -in digest -sigfile vote-{vote}.sig"
        );
        assert!(run(command("sh", &dir).args(["-c", &verify])).ok().contains("Verified Successfully"));
    }
}

#[test]
fn a_dead_device_costs_the_authority_its_votes_and_no_tick() {
    let mut home = Home::new();
    home.device("dead", DEAD, "timeout = \"1m\"");
    let daemon = home.start();
    let key = blob(&daemon);
    let public = home.path("dead.pub");
    fs::write(&public, format!("ssh-rsa {} dead\n", Base64::encode_string(&key))).unwrap();
    let (stdout, code) = authority(&home, &public, ["2", "20", "300"]);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(stdout.contains("vote 1: timeout") && stdout.contains("vote 2: timeout"), "{stdout}");
    let ticks = stdout.split(' ').zip(stdout.split(' ').skip(1)).find(|(_, next)| next.starts_with("ticks"));
    let ticks: usize = ticks.unwrap().0.parse().unwrap();
    assert!(ticks > 10, "{stdout}");
}
