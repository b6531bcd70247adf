//! The command line against the built daemon: OpenSSL and ssh-keygen verify what it signs in every scheme and form, exit
//! codes, JSON, names of keys, terminals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    io::BufReader,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::Value;
use strongroom::public_key::{PublicKey, fingerprint};
use support::{
    Outcome,
    cli::{self, strongroom},
    command,
    daemon::{Daemon, Home, LOCKED},
    eventually, keygen, run,
    soft::unhex,
    terminal::Terminal,
    with_suffix,
};

/// A key of each kind, and one that no signature comes from.
const TOKEN: &str = r#"
serial = "T1"
lanes = 4
control = CONTROL
[[key]]
slot = "e"
type = "ed25519"
label = "edwards"
[[key]]
slot = "p"
type = "p256"
label = "nist"
[[key]]
slot = "r"
type = "rsa"
label = "rivest"
[[key]]
slot = "hangs"
type = "p256"
seed = 2
label = "hangs"
touch = true
[[rule]]
on = "sign"
slot = "hangs"
do = "hang"
"#;

/// Not there when its key is asked for.
const GONE: &str = r#"
serial = "G1"
control = CONTROL
[[key]]
slot = "gone"
type = "p256"
seed = 3
label = "gone"
[[rule]]
on = "sign"
do = "absent"
"#;

const MESSAGE: &[u8] = b"what is signed here\n";

/// A home with the device `token`, and a file `m` with the message.
fn home() -> Home {
    let mut home = Home::new();
    home.device("token", TOKEN, "");
    fs::write(home.path("m"), MESSAGE).unwrap();
    home
}

/// Starts the daemon, and waits for its devices.
fn start(home: &Home) -> Daemon<'_> {
    let daemon = home.start();
    eventually("the devices are ready", || {
        let status = json(home, "status");
        status["devices"].as_array().unwrap().iter().all(|device| device["state"] == "ready")
    });
    daemon
}

/// `strongroom` with these words, which spaces separate.
fn cli(home: &Home, words: &str) -> Outcome {
    run(strongroom(home).args(words.split_whitespace()))
}

/// Runs it with this on its standard input.
fn fed(home: &Home, words: &str, input: &[u8]) -> Outcome {
    cli::fed(home, words.split_whitespace(), input)
}

/// What it prints with `--json`, when it succeeds.
#[track_caller]
fn json(home: &Home, words: &str) -> Value {
    cli::json(cli(home, &format!("{words} --json")))
}

fn openssl(home: &Home, words: &str) -> Outcome {
    run(command("openssl", &home.path("")).args(words.split_whitespace()))
}

/// `ssh-add`s a new key, whose files are in the home.
fn add(home: &Home, name: &str, options: &[&str]) -> PathBuf {
    let key = keygen(&home.path(""), name, options);
    run(command("ssh-add", &home.path("")).env("SSH_AUTH_SOCK", home.path("agent")).arg("-q").arg(&key)).ok();
    key
}

/// Signs the message into `s` and checks that `verify` finds it valid without a daemon, and nothing else.
#[track_caller]
fn sign(home: &Home, key: &str, options: &str) {
    cli(home, &format!("sign {key} m --out s {options}")).ok();
    cli(home, &format!("keys {key} --format pem --out {key}.pem")).ok();
    let options = options.replace("--format der", "").replace("--format ssh", "").replace("--format pem", "");
    let nowhere = home.path("nowhere").display().to_string();
    let verify = format!("verify {key}.pem s m {options} --socket {nowhere}");
    cli(home, &verify).ok();
    fs::write(home.path("other"), b"something else\n").unwrap();
    cli(home, &verify.replace(" m ", " other ")).fails_with(11);
    let mut bytes = fs::read(home.path("s")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(home.path("broken"), bytes).unwrap();
    cli(home, &verify.replace(" s ", " broken ")).fails_with(11);
}

#[test]
fn openssl_verifies_every_scheme() {
    let home = home();
    let _daemon = start(&home);
    for hash in ["sha1", "sha256", "sha384", "sha512"] {
        sign(&home, "rivest", &format!("--scheme rsa-pkcs1v15-{hash}"));
        openssl(&home, &format!("dgst -{hash} -verify rivest.pem -signature s m")).ok();
        if hash == "sha1" {
            continue;
        }
        sign(&home, "rivest", &format!("--scheme rsa-pss-{hash}"));
        let pss = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest";
        openssl(&home, &format!("dgst -{hash} -verify rivest.pem {pss} -signature s m")).ok();
        sign(&home, "nist", &format!("--scheme ecdsa-{hash} --format der"));
        openssl(&home, &format!("dgst -{hash} -verify nist.pem -signature s m")).ok();
        sign(&home, "nist", &format!("--scheme ecdsa-{hash}"));
        assert_eq!(fs::read(home.path("s")).unwrap().len(), 64);
    }
    sign(&home, "rivest", "--scheme rsa-pkcs1v15-raw");
    openssl(&home, "pkeyutl -verifyrecover -pubin -inkey rivest.pem -in s -out found").ok();
    assert_eq!(fs::read(home.path("found")).unwrap(), MESSAGE);
    sign(&home, "edwards", "");
    openssl(&home, "pkeyutl -verify -pubin -inkey edwards.pem -rawin -in m -sigfile s").ok();
    // What a blinded key signs is checked in tests/tor_keys.rs; here that it comes and verifies.
    fs::write(home.path("m"), [&[7; 32][..], MESSAGE].concat()).unwrap();
    sign(&home, "edwards", "--scheme ed25519-blinded-tor");
    assert_eq!(fs::read(home.path("s")).unwrap().len(), 96);
}

#[test]
fn the_defaults_are_openssls() {
    let home = home();
    let _daemon = start(&home);
    sign(&home, "rivest", "");
    openssl(&home, "dgst -sha256 -verify rivest.pem -signature s m").ok();
    sign(&home, "nist", "--format der");
    openssl(&home, "dgst -sha256 -verify nist.pem -signature s m").ok();
    cli(&home, "keys nist --format der --out nist.der").ok();
    openssl(&home, "pkey -pubin -inform DER -in nist.der -noout").ok();
}

#[test]
fn ssh_blobs_and_sshsig_are_what_openssh_takes() {
    let home = home();
    let _daemon = start(&home);
    for key in ["rivest", "nist", "edwards"] {
        let line = cli(&home, &format!("keys {key} --format ssh")).ok();
        fs::write(home.path("allowed"), format!("me {line}")).unwrap();
        sign(&home, key, "--format pem");
        let verify = "-Y verify -f allowed -I me -n file -s s";
        let mut keygen = command("ssh-keygen", &home.path(""));
        run(keygen.args(verify.split(' ')).stdin(fs::File::open(home.path("m")).unwrap())).ok();
        cli(&home, &format!("verify {key}.pem s m --namespace git")).fails_with(11);

        sign(&home, key, "--scheme ssh");
        let base64 = line.split(' ').nth(1).unwrap();
        let blob = <base64ct::Base64 as base64ct::Encoding>::decode_vec(base64).unwrap();
        let signature = fs::read(home.path("s")).unwrap();
        PublicKey::parse(&blob).unwrap().verify(MESSAGE, &signature).unwrap();
        sign(&home, key, "--format ssh");
        let signature = fs::read(home.path("s")).unwrap();
        PublicKey::parse(&blob).unwrap().verify(MESSAGE, &signature).unwrap();
    }
    for form in ["--scheme rsa-pss-sha256 --format ssh", "--format der", "--scheme rsa-pkcs1v15-sha384 --format ssh"] {
        cli(&home, &format!("sign rivest m {form}")).fails_with(10);
    }
    cli(&home, "sign nist m --scheme ecdsa-sha512 --format ssh").fails_with(10);

    // And the other way: OpenSSH signs.
    let key = keygen(&home.path(""), "own", &["-t", "rsa"]);
    run(command("ssh-keygen", &home.path("")).args(["-Y", "sign", "-n", "file", "-f"]).arg(key).arg("m")).ok();
    cli(&home, "verify own.pub m.sig m").ok();
    cli(&home, "verify nist.pem m.sig m").fails_with(11);
}

#[test]
fn a_digest_and_a_long_file_are_signed_as_their_message_would_be() {
    let home = home();
    let _daemon = start(&home);
    sign(&home, "nist", "--format der");
    let sums = run(command("sha256sum", &home.path("")).arg("m")).ok();
    fs::write(home.path("sums"), &sums).unwrap();
    for digest in [sums.as_bytes(), &unhex(sums.split(' ').next().unwrap())] {
        fed(&home, "sign nist - --prehashed --format der --out s", digest).ok();
        openssl(&home, "dgst -sha256 -verify nist.pem -signature s m").ok();
        fed(&home, "verify nist s --prehashed", digest).ok();
    }
    fed(&home, "sign nist --prehashed", b"too short").fails_with(2);
    cli(&home, "sign edwards sums --prehashed").fails_with(2);

    fs::write(home.path("m"), vec![b'x'; 3_000_000]).unwrap();
    sign(&home, "nist", "--format der");
    openssl(&home, "dgst -sha256 -verify nist.pem -signature s m").ok();
    sign(&home, "edwards", "--format pem");
    assert!(cli(&home, "sign edwards m").fails_with(10).stderr.contains("192 KiB"));
}

#[test]
fn a_key_that_makes_plain_signatures_only_makes_those_that_are_hidden_in_them() {
    let home = home();
    let _daemon = start(&home);
    for (name, options, hash) in
        [("p384", &["-t", "ecdsa", "-b", "384"][..], "sha384"), ("r2", &["-t", "rsa"], "sha256")]
    {
        add(&home, name, options);
        let form = if hash == "sha384" { "--format der" } else { "" };
        sign(&home, name, form);
        openssl(&home, &format!("dgst -{hash} -verify {name}.pem -signature s m")).ok();
    }
    cli(&home, "sign r2 m --scheme rsa-pss-sha256").fails_with(3);
}

#[test]
fn what_openssl_encrypts_is_decrypted() {
    let home = home();
    let _daemon = start(&home);
    cli(&home, "keys rivest --format pem --out pem").ok();
    let oaep = "-pkeyopt rsa_padding_mode:oaep -pkeyopt";
    for (scheme, options) in [
        ("rsa-oaep-sha1", format!("{oaep} rsa_oaep_md:sha1")),
        ("rsa-oaep-sha256 --label box", format!("{oaep} rsa_oaep_md:sha256 -pkeyopt rsa_oaep_label:626f78")),
        ("rsa-pkcs1v15", "-pkeyopt rsa_padding_mode:pkcs1".to_owned()),
    ] {
        openssl(&home, &format!("pkeyutl -encrypt -pubin -inkey pem {options} -in m -out c")).ok();
        cli(&home, &format!("decrypt rivest c --scheme {scheme} --out p")).ok();
        assert_eq!(fs::read(home.path("p")).unwrap(), MESSAGE);
        assert_eq!(cli(&home, &format!("decrypt rivest c --scheme {scheme}")).ok().as_bytes(), MESSAGE);
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(home.path("p")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "a secret's file");
    assert_eq!(json(&home, "decrypt rivest c --scheme rsa-pkcs1v15")["plaintext"], "d2hhdCBpcyBzaWduZWQgaGVyZQo=");
}

#[test]
fn openssl_agrees_on_what_is_derived() {
    let home = home();
    let _daemon = start(&home);
    cli(&home, "keys nist --format pem --out ours.pem").ok();
    openssl(&home, "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out peer.key").ok();
    openssl(&home, "pkey -in peer.key -pubout -out peer.pem").ok();
    openssl(&home, "pkey -in peer.key -pubout -outform DER -out peer.der").ok();
    openssl(&home, "pkeyutl -derive -inkey peer.key -peerkey ours.pem -out shared").ok();
    let shared = fs::read(home.path("shared")).unwrap();
    let der = fs::read(home.path("peer.der")).unwrap();
    let digits: String = der[der.len() - 65..].iter().map(|byte| format!("{byte:02x}")).collect();
    for peer in ["peer.pem", "./peer.der", &digits] {
        let derived = cli(&home, &format!("derive nist {peer} --hex")).ok();
        assert_eq!(unhex(derived.trim_end()), shared, "{peer}");
    }
    cli(&home, "derive nist 0badf00d").fails_with(10);
    cli(&home, "derive nist nonsense").fails_with(2);
    cli(&home, "keys rivest --format pem --out rsa.pem").ok();
    cli(&home, "derive nist rsa.pem").fails_with(2);
}

#[test]
fn each_exit_code_has_its_reason() {
    let mut home = home();
    home.device("safe", LOCKED, "");
    home.device("loose", GONE, "");
    let _daemon = start(&home);
    add(&home, "added", &["-t", "ecdsa"]);
    sign(&home, "nist", "");
    for (words, code, reason, remedy) in [
        ("sign nist missing", 1, "missing: No such file", "Name a file"),
        ("random 0", 2, "0 is not in 1..=1048576", "--help"),
        ("sign", 2, "<KEY>", "--help"),
        ("derive added nist.pem", 3, "was not allowed to do this", "strongroom key allow"),
        ("sign nobody m", 4, "no key has the name `nobody`", "strongroom keys"),
        ("unlock nobody", 4, "nobody", "strongroom keys"),
        ("random 4 --device nobody", 4, "no such device", "strongroom status"),
        ("sign locked m", 5, "", "strongroom unlock"),
        ("sign hangs m --deadline 200ms", 7, "in time", "--deadline"),
        ("sign gone m", 8, "not connected", "Connect the device"),
        ("status --socket /nowhere/at/all", 9, "/nowhere/at/all", "strongroom agent"),
        ("sign edwards m --scheme ecdsa-sha256", 10, "", "strongroom keys"),
        ("verify nist.pem s s", 11, "not valid", "belong together"),
    ] {
        let outcome = cli(&home, words);
        assert_eq!(outcome.code, Some(code), "{words}: {outcome:?}");
        assert!(outcome.stdout.is_empty(), "{words}: {outcome:?}");
        assert!(outcome.stderr.contains(reason) && outcome.stderr.contains(remedy), "{words}: {outcome:?}");
        if code == 2 {
            continue;
        }
        let told: Value = serde_json::from_str(&cli(&home, &format!("{words} --json")).stdout).unwrap();
        assert_eq!(told["error"]["exit"], code, "{words}: {told}");
        assert!(told["error"]["code"].is_string() && told["error"]["message"].is_string(), "{told}");
    }
    let wrong = fed(&home, "unlock safe --stdin", b"000000\n").fails_with(6);
    assert!(wrong.stderr.contains("4 tries are left"), "{wrong:?}");
    let told: Value = serde_json::from_str(&fed(&home, "unlock safe --stdin --json", b"111111\n").stdout).unwrap();
    assert_eq!((&told["error"]["code"], &told["error"]["tries_left"]), (&"pin_wrong".into(), &3.into()));
}

#[test]
fn pins_open_and_lock_devices() {
    let mut home = home();
    home.device("safe", LOCKED, "");
    let _daemon = start(&home);
    let pin = || json(&home, "status")["devices"].as_array().unwrap()[1]["pin"].clone();
    assert_eq!(pin(), "needed");
    let text = cli(&home, "status").ok();
    assert!(text.contains("safe: it wants its PIN; `strongroom unlock safe` gives it."), "{text}");
    assert_eq!(fed(&home, "unlock --stdin", b"123456\n").ok(), "safe is unlocked.\n");
    assert_eq!(pin(), "open");
    cli(&home, "sign locked m --hex").ok();
    assert_eq!(cli(&home, "lock").ok(), "safe is locked.\n");
    assert_eq!(pin(), "needed");
    fed(&home, "unlock locked --stdin", b"123456").ok();
    assert_eq!(json(&home, "lock locked")["locked"], "locked");
    cli(&home, "forget").fails_with(2);
    assert_eq!(cli(&home, "forget --all").ok(), "The secrets of everything are forgotten.\n");
    assert_eq!(json(&home, "forget safe")["forgotten"], "safe");
    fed(&home, "unlock safe --stdin", b"\n").fails_with(2);
    // Without a terminal there is nobody to ask.
    assert!(
        run(Command::new("setsid")
            .args(["-w", env!("CARGO_BIN_EXE_strongroom"), "unlock", "safe", "--socket"])
            .arg(home.path("service")))
        .fails_with(5)
        .stderr
        .contains("--stdin")
    );
}

#[test]
fn a_key_is_found_by_each_of_its_names() {
    let home = home();
    let _daemon = start(&home);
    let key = add(&home, "mine", &["-t", "ed25519", "-C", "a comment"]);
    let public = with_suffix(&key, ".pub");
    run(command("ssh-keygen", &home.path("")).args(["-q", "-s"]).arg(&key).args(["-I", "id", "mine.pub"])).ok();
    let described = &json(&home, "keys ./mine.pub")["keys"][0];
    assert_eq!(described["comment"], "a comment");
    cli(&home, "keys ./mine.pub --format pem --out mine.pem").ok();
    cli(&home, "keys ./mine.pub --format der --out mine.der").ok();
    fs::write(
        home.path("mine.rfc4716"),
        run(command("ssh-keygen", &home.path("")).args(["-e", "-f", "mine.pub"])).ok(),
    )
    .unwrap();
    let names = ["sha256", "md5", "identifier"].map(|field| described[field].as_str().unwrap().to_owned());
    let files = ["mine.pub", "mine-cert.pub", "mine.pem", "mine.der", "mine.rfc4716"].map(ToOwned::to_owned);
    for name in names.iter().chain(&files) {
        assert_eq!(&json(&home, &format!("keys {name}"))["keys"][0], described, "{name}");
    }
    let by_comment = run(strongroom(&home).args(["keys", "a comment", "--format", "ssh"])).ok();
    assert_eq!(by_comment, fs::read_to_string(public).unwrap());

    // A self-signed certificate of the token's key, as OpenSSL makes one with another key.
    cli(&home, "keys nist --format pem --out nist.pem").ok();
    openssl(&home, "genpkey -algorithm ED25519 -out ca.key").ok();
    openssl(&home, "x509 -new -signkey ca.key -subj /CN=x -force_pubkey nist.pem -out nist.crt").ok();
    assert_eq!(json(&home, "keys nist.crt")["keys"][0]["comment"], "nist");

    add(&home, "again", &["-t", "ed25519", "-C", "a comment"]);
    let unclear = run(strongroom(&home).args(["keys", "a comment"])).fails_with(4);
    assert_eq!(unclear.stderr.matches("SHA256:").count(), 2, "{unclear:?}");
    for (file, text) in [("empty", ""), ("private", "-----BEGIN PRIVATE KEY-----\nAA==\n"), ("noise", "\x01\x02")] {
        fs::write(home.path(file), text).unwrap();
        cli(&home, &format!("keys ./{file}")).fails_with(2);
    }
}

#[test]
fn lists_show_what_there_is_and_nothing_that_harms_a_terminal() {
    let home = home();
    let daemon = start(&home);
    let key = support::client::Key::random();
    daemon.connect().add(&key, "evil\u{1b}[2J\u{202e}name", &[]);
    let text = cli(&home, "keys").ok();
    assert!(text.contains("evil\u{fffd}[2J\u{fffd}name") && !text.contains('\u{1b}'), "{text}");
    assert!(text.lines().any(|line| line.starts_with("rivest") && line.ends_with("ssh, sign, decrypt")), "{text}");
    let described = cli(&home, "keys rivest").ok();
    assert!(described.contains("  decrypts      rsa-oaep-sha1 rsa-oaep-sha256 rsa-pkcs1v15\n"), "{described}");
    let status = json(&home, "status");
    assert_eq!(
        (&status["keys"], &status["sealed"], &status["devices"][0]["keys"]),
        (&5.into(), &false.into(), &4.into())
    );
    let missing = cli(&home, "keys \u{1b}[2J").fails_with(4);
    assert!(!missing.stderr.contains('\u{1b}'), "{missing:?}");
    assert_eq!(
        fingerprint(&key.blob(), Default::default()),
        json(&home, "keys")["keys"][4]["sha256"].as_str().unwrap()
    );
}

#[test]
fn a_sealed_vault_is_said_to_be() {
    let home = home();
    let daemon = start(&home);
    assert_eq!(daemon.connect().request(&support::client::message(22, &[b"password"])), [6]);
    assert!(cli(&home, "status").ok().contains("ssh-add -X"));
    assert_eq!(json(&home, "status")["sealed"], true);
    assert!(cli(&home, "keys").fails_with(5).stderr.contains("ssh-add -X"));
}

#[test]
fn refusals_are_explained() {
    let mut home = home();
    home.device("loose", GONE, "");
    let _daemon = start(&home);
    assert_eq!(cli(&home, "why").ok(), "Nothing was refused.\n");
    cli(&home, "sign gone m").fails_with(8);
    cli(&home, "sign hangs m --deadline 100ms").fails_with(7);
    let text = cli(&home, "why").ok();
    assert!(text.contains("ago: sign with SHA256:") && text.contains("absent: the device"), "{text}");
    let refusals = json(&home, "why");
    let codes: Vec<_> = refusals["refusals"].as_array().unwrap().iter().map(|refusal| &refusal["code"]).collect();
    assert_eq!(codes, ["timeout", "absent"]);
    assert_eq!(json(&home, "why -n 1")["refusals"].as_array().unwrap().len(), 1);
}

#[test]
fn random_bytes_come_in_any_number_and_their_reader_may_leave() {
    let home = home();
    let _daemon = start(&home);
    cli(&home, "random 5000 --out r").ok();
    assert_eq!(fs::read(home.path("r")).unwrap().len(), 5000);
    assert_eq!(cli(&home, "random 3 --hex").ok().len(), 7);
    assert!(json(&home, "random 3")["random"].is_string());
    let pipe = format!("set -o pipefail; {} random 1000000 --hex | head -c 1", env!("CARGO_BIN_EXE_strongroom"));
    let outcome =
        run(command("bash", &home.path("")).env("STRONGROOM_SOCKET", home.path("service")).args(["-c", &pipe]));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn any_ssh_agent_can_be_asked() {
    let home = home();
    let mut agent = Command::new("/usr/bin/ssh-agent")
        .args(["-D", "-a"])
        .arg(home.path("plain"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("ssh-agent listens", || std::os::unix::net::UnixStream::connect(home.path("plain")).is_ok());
    let key = keygen(&home.path(""), "k", &["-t", "ecdsa"]);
    run(command("ssh-add", &home.path("")).env("SSH_AUTH_SOCK", home.path("plain")).arg("-q").arg(key)).ok();
    cli(&home, "sign k.pub m --format der --socket plain --out s").ok();
    cli(&home, "verify k.pub s m").ok();
    assert!(cli(&home, "keys --socket plain").ok().contains("ECDSA 256"));
    assert!(cli(&home, "status --socket plain").fails_with(10).stderr.contains("service door"));
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_pin_is_typed_unseen() {
    let mut home = home();
    home.device("safe", LOCKED, "");
    let _daemon = start(&home);
    let mut terminal = Terminal::start(&home, "unlock");
    terminal.shows("PIN of safe (5 tries left): ");
    terminal.types("123456\r");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    assert!(seen.contains("safe is unlocked.") && !seen.contains("1234"), "{seen}");
    let mut terminal = Terminal::start(&home, "unlock safe");
    terminal.shows("PIN of safe");
    terminal.types("12\x03");
    let (code, seen) = terminal.ends();
    assert_ne!(code, Some(0), "{seen}");
}

#[test]
fn bytes_do_not_go_to_a_terminal() {
    let home = home();
    let _daemon = start(&home);
    for words in ["random 8", "sign nist m", "sign nist m --format der", "keys nist --format der"] {
        let (code, seen) = Terminal::start(&home, words).ends();
        assert_eq!(code, Some(2), "{seen}");
        assert!(seen.contains("--hex"), "{seen}");
    }
    for words in ["random 8 --hex", "sign nist m --base64", "sign nist m --format pem"] {
        assert_eq!(Terminal::start(&home, words).ends().0, Some(0));
    }
}

#[test]
fn a_watched_status_is_redrawn_in_place_until_ctrl_c() {
    let home = home();
    let daemon = start(&home);
    let mut terminal = Terminal::start(&home, "status --watch --interval 20ms");
    terminal.shows("token   scripted  ready");
    let mut hanging = strongroom(&home).args(["sign", "hangs", "m"]).stderr(Stdio::null()).spawn().unwrap();
    // Whom it waits for, and for which key.
    terminal.shows("1/4");
    terminal.shows("token: Touch");
    let device = &json(&home, "status")["devices"][0];
    assert_eq!(device["wants"], "touch");
    assert!(device["wanted_for"].as_str().unwrap().contains("hangs"), "{device}");
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    drop(daemon);
    terminal.shows("waiting for one");
    let _daemon = home.start();
    terminal.seen.clear();
    terminal.shows("token   scripted  ready");
    terminal.types("\x03");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    assert!(seen.trim_end().ends_with("\x1b[?25h\x1b[?1049l"), "the screen is as it was: {seen:?}");
    assert!(!seen.contains("\x1b[2J"), "nothing is cleared before it is drawn");
    cli(&home, "status --watch").fails_with(2);

    let mut lines = strongroom(&home)
        .args(["status", "--watch", "--json", "--interval", "20ms"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(lines.stdout.take().unwrap());
    for line in std::io::BufRead::lines(output).take(3) {
        let status: Value = serde_json::from_str(&line.unwrap()).unwrap();
        assert_eq!(status["devices"][0]["id"], "token");
    }
    // Its reader has left.
    assert!(lines.wait().unwrap().success());
}

#[test]
fn a_key_lives_at_the_command_line() {
    let home = home();
    let _daemon = start(&home);
    let made = json(&home, "key generate token ed25519 --label made");
    let fingerprint = made["sha256"].as_str().unwrap().to_owned();
    assert!(made["public_key"].as_str().unwrap().ends_with(" made"));
    let key = &json(&home, "keys made")["keys"][0];
    assert_eq!((&key["sha256"], &key["identifier"]), (&made["sha256"], &made["identifier"]));
    cli(&home, &format!("key rename {fingerprint} vote")).ok();
    assert_eq!(json(&home, "keys vote")["keys"][0]["name"], "vote");
    assert_eq!(json(&home, "key allow vote derive")["operations"][0], "derive");
    cli(&home, "sign vote m --scheme ed25519-blinded-tor").fails_with(3);
    assert_eq!(json(&home, "key allow vote --none")["operations"].as_array().unwrap().len(), 0);
    cli(&home, "key allow vote").fails_with(2);
    // Without a terminal nothing is asked, and another name deletes nothing.
    cli(&home, "key delete vote").fails_with(5);
    cli(&home, "key delete vote --name other").fails_with(2);
    let mut terminal = Terminal::start(&home, "key delete vote");
    terminal.shows("Its name again, or its fingerprint: ");
    terminal.types("vote\r");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    cli(&home, &format!("keys {fingerprint}")).fails_with(4);

    add(&home, "moved", &["-t", "ed25519"]);
    cli(&home, "key import moved token").ok();
    assert_eq!(json(&home, "keys moved")["keys"][0]["devices"][0]["device"], "token");
    cli(&home, "key delete moved --device memory --name moved").fails_with(4);
    cli(&home, "key generate token rsa-1024").fails_with(2);
    cli(&home, "key generate nowhere ed25519").fails_with(4);
}

#[test]
fn sign_check_tells_and_does_not_sign() {
    let home = home();
    let _daemon = start(&home);
    add(&home, "soft", &["-t", "ed25519"]);
    let checked = json(&home, "sign soft m --check");
    assert_eq!((&checked["verdict"], &checked["device"]), (&"allow".into(), &"memory".into()));
    cli(&home, "sign soft m --check --scheme ed25519-blinded-tor").fails_with(3);
    assert_eq!(cli(&home, "sign soft m --check --format pem").ok(), "allow: memory\n");
}

#[test]
fn keys_in_files_of_other_programs_are_added() {
    let home = home();
    let _daemon = start(&home);
    let add = |words: &str| cli(&home, &format!("add {words}"));
    openssl(&home, "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out rsa.pem").ok();
    openssl(&home, "pkey -in rsa.pem -pubout -out rsa.pub").ok();
    fs::write(home.path("right"), "correct\n").unwrap();
    openssl(&home, "pkcs8 -topk8 -in rsa.pem -passout file:right -out locked.pem").ok();
    // Without a passphrase nothing is added, nor with a wrong one.
    assert!(add("locked.pem").fails_with(5).stderr.contains("--stdin"));
    assert!(fed(&home, "add locked.pem --stdin", b"wrong\n").fails_with(6).stderr.contains("passphrase is wrong"));
    fed(&home, "add locked.pem --stdin --lifetime 1h", b"correct\n").ok();
    let key = &json(&home, "keys locked.pem")["keys"][0];
    assert_eq!((key["comment"].as_str(), key["constraints"][0].as_str()), (Some("locked.pem"), Some("lifetime")));
    // It is the key that OpenSSL has.
    cli(&home, "key allow locked.pem sign").ok();
    cli(&home, "sign locked.pem m --scheme rsa-pss-sha256 --out sig").ok();
    openssl(
        &home,
        "dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest -verify rsa.pub -signature sig m",
    )
    .ok();
    // On a terminal the passphrase is asked for, again if it is wrong.
    let mut terminal = Terminal::start(&home, "add locked.pem --comment asked");
    terminal.shows("Passphrase of locked.pem: ");
    terminal.types("wrong\r");
    terminal.shows("That is not it. Passphrase");
    terminal.types("correct\r");
    assert_eq!(terminal.ends().0, Some(0));
    assert_eq!(json(&home, "keys asked")["keys"].as_array().unwrap().len(), 1);
    // An OpenPGP file has several keys, some of which are of no use here.
    let gpg = support::gpg::Home::new();
    let alice = gpg.generate("Alice <alice@example.org>", "dsa2048 ed25519/sign cv25519/encrypt", "");
    fs::write(home.path("alice.pgp"), gpg.export(&alice, "")).unwrap();
    let added = add("alice.pgp");
    assert!(added.stderr.contains("one key is left out: a DSA key"), "{added:?}");
    assert_eq!(added.ok().matches("Alice <alice@example.org> is added: SHA256:").count(), 2);
    let added = json(&home, "add alice.pgp --comment again");
    assert_eq!((added["keys"].as_array().unwrap().len(), &added["comment"]), (2, &"again".into()));
    assert!(add("m").fails_with(2).stderr.contains("no private key"));
    assert!(add("rsa.pub").fails_with(2).stderr.contains("public key"));
    // The vault says why it takes no key.
    let refused = cli(&home, "add rsa.pem --confirm --lifetime 0s");
    assert_eq!(refused.code, Some(2), "{refused:?}");
}
