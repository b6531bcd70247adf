//! `strongroom card` against a virtual card: what it shows agrees with gpg, what it changes is there, and the card's own
//! counters tell that no try was spent which nobody caused.
#![cfg(feature = "openpgp")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{fs, path::PathBuf, thread};

use serde_json::Value;
use support::{
    Outcome, cli,
    client::{Key, SUCCESS, message},
    command,
    daemon::{Daemon, Home},
    eventually, keygen,
    pcsc::{Reader, Room},
    run,
    terminal::Terminal,
    with_suffix,
};

const SERIAL: &str = "00000a01";
const USER: &str = "123456";
const ADMIN: &str = "12345678";
/// GET DATA for the touch policies of the slots sign, decrypt and auth.
const UIF: [&str; 3] = ["00CA00D600", "00CA00D700", "00CA00D800"];

/// A daemon's home in a room.
fn home(room: &Room) -> Home {
    let mut home = Home::new();
    home.enter(room);
    home
}

/// Starts the daemon and waits for the card.
fn start<'a>(home: &'a Home) -> Daemon<'a> {
    let daemon = home.start();
    eventually("the card is found", || cli(home, "card status").code == Some(0));
    daemon
}

/// Runs `strongroom` with these words, which spaces separate, and these lines on its standard input.
fn fed(home: &Home, words: &str, lines: &[&str]) -> Outcome {
    cli::fed(home, words.split_whitespace(), lines.join("\n"))
}

fn cli(home: &Home, words: &str) -> Outcome {
    fed(home, words, &[])
}

#[track_caller]
fn json(home: &Home, words: &str) -> Value {
    cli::json(cli(home, &format!("{words} --json")))
}

/// What `card status` says of a slot.
fn slot(home: &Home, name: &str) -> Value {
    let status = json(home, "card status");
    status["slots"].as_array().unwrap().iter().find(|slot| slot["slot"] == name).unwrap().clone()
}

/// `ssh-add`s a new key.
fn add(home: &Home, name: &str, options: &[&str]) -> PathBuf {
    let key = keygen(&home.path(""), name, options);
    run(command("ssh-add", &home.path("")).env("SSH_AUTH_SOCK", home.path("agent")).arg("-q").arg(&key)).ok();
    key
}

/// The user's PIN is verified by the card itself, without Strongroom.
fn verifies(room: &Room, pin: &str) -> bool {
    let digits: String = pin.bytes().map(|byte| format!("{byte:02x}")).collect();
    room.probe(&["send", Reader::A.name(), &format!("00200082{:02x}{digits}", pin.len())]).trim_end() == "9000"
}

/// Fields of a line that `gpg --card-status --with-colons` prints.
fn gpg(status: &str, field: &str) -> Vec<String> {
    let line = status.lines().find(|line| line.split(':').next() == Some(field));
    line.unwrap_or_else(|| panic!("{field} in {status}")).split(':').skip(1).map(str::to_owned).collect()
}

/// The first byte of a slot's touch policy, as the card itself says: 0 off, 1 on, 2 fixed.
fn touch_of(room: &Room, slot: usize) -> String {
    room.probe(&["send", Reader::A.name(), UIF[slot]])[..2].to_owned()
}

#[test]
fn the_status_agrees_with_gpg() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let daemon = start(&home);
    for (words, text) in [("set-name", "Ann Example"), ("set-url", "https://example.org/a"), ("set-login", "ann")] {
        let mut command = command(env!("CARGO_BIN_EXE_strongroom"), &home.path(""));
        fs::write(home.path("stdin"), ADMIN).unwrap();
        command.env("STRONGROOM_SOCKET", home.path("service")).stdin(fs::File::open(home.path("stdin")).unwrap());
        run(command.args(["card", words, text, "--stdin"])).ok();
    }
    fed(&home, "card set-language deen --stdin", &[ADMIN]).ok();
    fed(&home, "card set-touch sign on --stdin", &[ADMIN]).ok();
    fed(&home, "card set-pin reset-code --stdin", &[ADMIN, "87654321"]).ok();
    assert_eq!(card.tries(), [3, 3, 3]);
    let status = json(&home, "card status");
    let text = cli(&home, "card status").ok();
    assert!(text.contains("Ann Example") && text.contains("admin PIN is that of new cards"), "{text}");
    drop(daemon);

    let theirs = room.gpg_card_status(Reader::A);
    assert_eq!(gpg(&theirs, "serial")[0], status["serial"].as_str().unwrap().to_uppercase());
    assert_eq!(gpg(&theirs, "name")[..2], ["Ann", "Example"]);
    assert_eq!(status["name"], "Example<<Ann");
    assert_eq!(gpg(&theirs, "lang")[0], status["language"]);
    assert_eq!(gpg(&theirs, "url")[0].replace("\\x3a", ":"), status["url"]);
    assert_eq!(gpg(&theirs, "login")[0], status["login"]);
    let tries = &status["tries_left"];
    let tries = ["user", "reset_code", "admin"].map(|pin| tries[pin].to_string());
    assert_eq!(gpg(&theirs, "pinretry")[..3], tries);
    let of_slots = |field: &str| {
        ["sign", "decrypt", "auth"].map(|name| {
            let slots = status["slots"].as_array().unwrap();
            slots.iter().find(|slot| slot["slot"] == name).unwrap()[field].clone()
        })
    };
    assert_eq!(gpg(&theirs, "fpr")[..3].to_vec(), of_slots("openpgp_fingerprint").to_vec());
    assert_eq!(gpg(&theirs, "fprtime")[..3].to_vec(), of_slots("created").map(|time| time.to_string()).to_vec());
    assert_eq!(of_slots("algorithm"), ["ed25519", "x25519", "ed25519"]);
    assert_eq!(of_slots("touch"), ["on", "off", "off"]);
    // GnuPG shows it only of cards that say that they have a button.
    assert_eq!([0, 1, 2].map(|slot| touch_of(&room, slot)), ["01", "00", "00"]);
    assert!(theirs.contains("keyattr:1:22:Ed25519:") && theirs.contains("keyattr:2:18:Curve25519:"), "{theirs}");
}

#[test]
fn a_pin_is_set_and_a_wrong_one_is_sent_once() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let daemon = start(&home);
    fed(&home, "unlock --stdin", &[USER]).ok();
    assert!(json(&home, "card status")["default_pins"].as_array().unwrap().contains(&"user".into()));
    for _ in 0..3 {
        fed(&home, "card set-pin --stdin", &["000000", "654321"]).fails_with(6);
        assert_eq!(card.tries(), [2, 0, 3]);
    }
    assert!(fed(&home, "card set-pin --stdin", &[USER, "123"]).fails_with(10).stderr.contains("6 to"), "too short");
    assert_eq!(card.tries(), [2, 0, 3]);
    fed(&home, "card set-pin --stdin", &[USER, "654321"]).ok();
    assert_eq!(card.tries(), [3, 0, 3]);
    // It is asked for again, and what was kept is not sent.
    let devices = json(&home, "status");
    assert_eq!(devices["devices"][0]["pin"], "needed", "{devices}");
    assert_eq!(card.count_pins("apdu 20 63"), 0);
    fed(&home, "unlock --stdin", &["654321"]).ok();
    for _ in 0..2 {
        fed(&home, "card set-pin admin --stdin", &["00000000", "87654321"]).fails_with(6);
        assert_eq!(card.tries(), [3, 0, 2]);
    }
    fed(&home, "card set-pin admin --stdin", &[ADMIN, "87654321"]).ok();
    assert_eq!(card.tries(), [3, 0, 3]);
    // With the admin PIN verified, anybody could write to the card now: nothing is.
    assert!(!room.probe(&["send", Reader::A.name(), "00DA005B0141"]).starts_with("9000"));
    drop(daemon);
    assert!(verifies(&room, "654321"));
}

#[test]
fn a_blocked_pin_is_reset_by_the_admin_or_by_the_code() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let _daemon = start(&home);
    let none = fed(&home, "card reset-pin --code --stdin", &["87654321", "111111"]).fails_with(6);
    assert!(none.stderr.contains("no resetting code"), "{none:?}");
    fed(&home, "card set-pin reset-code --stdin", &[ADMIN, "87654321"]).ok();
    for (words, secret, new) in [("reset-pin", ADMIN, "222222"), ("reset-pin --code", "87654321", "333333")] {
        for _ in 0..3 {
            verifies(&room, "000000");
        }
        assert_eq!(card.tries()[0], 0);
        let text = cli(&home, "card status").ok();
        assert!(text.contains("The user PIN is blocked"), "{text}");
        for words in ["card set-pin --stdin", "unlock --stdin"] {
            let blocked = fed(&home, words, &[USER, "111111"]).fails_with(6);
            assert!(blocked.stderr.contains("`strongroom card reset-pin`"), "{blocked:?}");
        }
        fed(&home, &format!("card {words} --stdin"), &[secret, new]).ok();
        assert_eq!(card.tries(), [3, 3, 3]);
        assert!(verifies(&room, new));
        fed(&home, "unlock --stdin", &[new]).ok();
    }
    for _ in 0..2 {
        fed(&home, "card reset-pin --code --stdin", &["00000000", "444444"]).fails_with(6);
        assert_eq!(card.tries(), [3, 2, 3]);
    }
}

#[test]
fn the_last_try_of_the_admin_pin_is_spent_by_nobody_who_was_not_told() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let daemon = start(&home);
    let mut terminal = Terminal::start(&home, "card set-url x");
    terminal.shows("(3 tries left): ");
    // Meanwhile somebody else spends two.
    for _ in 0..2 {
        room.probe(&["send", Reader::A.name(), "00200083083030303030303030"]);
    }
    terminal.types("99999999\r");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(1), "{seen}");
    assert!(seen.contains("one try of this PIN is left"), "{seen}");
    assert_eq!(card.tries(), [3, 0, 1]);
    let mut terminal = Terminal::start(&home, "card set-url x");
    terminal.shows("(1 try left, a wrong one blocks it): ");
    terminal.types(&format!("{ADMIN}\r"));
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    assert!(!seen.contains(ADMIN), "{seen}");
    assert_eq!(card.tries(), [3, 0, 3]);
    drop(daemon);
}

#[test]
fn keys_are_made_in_each_slot_and_a_key_is_replaced_only_where_that_is_meant() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.blank(SERIAL));
    let home = home(&room);
    let _daemon = start(&home);
    assert!(cli(&home, "card status").ok().contains("123456"), "a new card's PINs are told");
    fed(&home, "card generate --slot decrypt --stdin", &[ADMIN]).fails_with(10);
    fed(&home, "card generate --slot auth --touch off --stdin", &["11111111"]).fails_with(6);
    assert_eq!(card.tries(), [3, 0, 2]);
    for (slot_name, algorithm, touch) in [
        ("auth", "ed25519", "off"),
        ("sign", "nistp256", "on"),
        ("decrypt", "x25519", "off"),
        ("decrypt", "nistp384", "off"),
    ] {
        let words = format!("card generate --slot {slot_name} --algorithm {algorithm} --touch {touch}");
        let replaces = slot(&home, slot_name)["has_key"] == true;
        if replaces {
            fed(&home, &format!("{words} --stdin --serial 00000a02"), &[ADMIN]).fails_with(2);
        }
        let serial = if replaces { format!("--serial {SERIAL}") } else { String::new() };
        let made: Value =
            serde_json::from_str(&fed(&home, &format!("{words} {serial} --stdin --json"), &[ADMIN]).ok()).unwrap();
        let there = slot(&home, slot_name);
        assert_eq!(there["ssh_fingerprint"], made["fingerprint"]);
        assert_eq!((&there["algorithm"], &there["touch"]), (&algorithm.into(), &touch.into()));
        assert!(cli(&home, "keys").ok().contains(made["fingerprint"].as_str().unwrap()));
    }
    assert_eq!(card.tries(), [3, 0, 3]);
    let keys = room.gpg_card_status(Reader::A);
    assert!(!gpg(&keys, "fpr")[..3].contains(&String::new()), "{keys}");
    // Used as any other key is.
    fed(&home, "unlock --stdin", &[USER]).ok();
    fs::write(home.path("m"), "data").unwrap();
    let auth = slot(&home, "auth")["ssh_fingerprint"].as_str().unwrap().to_owned();
    cli(&home, &format!("sign {auth} m --out s")).ok();
    cli(&home, &format!("verify {auth} s m")).ok();
}

#[test]
fn a_touch_policy_is_set_and_obeyed() {
    let room = Room::new();
    let mut card = room.insert(Reader::A, &room.card(SERIAL, "p256"));
    let home = home(&room);
    let _daemon = start(&home);
    fed(&home, "card set-touch auth on --stdin", &[ADMIN]).ok();
    assert_eq!((slot(&home, "auth")["touch"].as_str(), &*touch_of(&room, 2)), (Some("on"), "01"));
    fed(&home, "unlock --stdin", &[USER]).ok();
    fs::write(home.path("m"), "data").unwrap();
    let key = slot(&home, "auth")["ssh_fingerprint"].as_str().unwrap().to_owned();
    card.obey("touch never");
    thread::scope(|scope| {
        let signed = scope.spawn(|| cli(&home, &format!("sign {key} m --out s")));
        card.wait_for("touch");
        card.obey("touch once");
        signed.join().unwrap().ok();
    });
    fed(&home, "card set-touch auth off --stdin", &[ADMIN]).ok();
    assert_eq!(touch_of(&room, 2), "00");
    // What cannot be undone is meant for this very card.
    fed(&home, "card set-touch sign fixed --stdin --serial 12345678", &[ADMIN]).fails_with(2);
    fed(&home, &format!("card set-touch sign fixed --stdin --serial {SERIAL}"), &[ADMIN]).ok();
    assert_eq!(touch_of(&room, 0), "02");
    assert_eq!(card.tries(), [3, 0, 3]);
}

#[test]
fn the_pin_of_each_signature_is_asked_for_until_the_card_is_told_otherwise() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let _daemon = start(&home);
    fs::write(home.path("m"), "data").unwrap();
    let key = slot(&home, "sign")["ssh_fingerprint"].as_str().unwrap().to_owned();
    let sign = || cli(&home, &format!("sign {key} m --scheme ed25519 --out s"));
    for each in [true, false, true] {
        let word = if each { "each" } else { "once" };
        fed(&home, &format!("card set-signature-pin {word} --stdin"), &[ADMIN]).ok();
        assert_eq!(json(&home, "card status")["pin_per_signature"], each);
        fed(&home, "unlock --stdin", &[USER]).ok();
        sign().ok();
        // There is nobody to be asked.
        let second = sign();
        assert_eq!(second.code == Some(0), !each, "{second:?}");
    }
    assert_eq!(card.tries(), [3, 0, 3]);
}

#[test]
fn keys_of_every_kind_move_from_memory_to_the_card() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.blank(SERIAL));
    let home = home(&room);
    let daemon = start(&home);
    fs::write(home.path("m"), "data").unwrap();
    let kinds: [(&str, &[&str], &str); 6] = [
        ("edwards", &["-t", "ed25519"], "auth"),
        ("p256", &["-t", "ecdsa", "-b", "256"], "sign"),
        ("p521", &["-t", "ecdsa", "-b", "521"], "auth"),
        ("rsa", &["-t", "rsa", "-b", "2048"], "sign"),
        ("rsa3072", &["-t", "rsa", "-b", "3072"], "auth"),
        ("p384", &["-t", "ecdsa", "-b", "384"], "decrypt"),
    ];
    for (name, options, slot_name) in kinds {
        let key = add(&home, name, options);
        let public = with_suffix(&key, ".pub");
        let words = format!("card import {} --slot {slot_name} --serial {SERIAL} --stdin", public.display());
        fed(&home, &words, &[ADMIN]).ok();
        assert!(slot(&home, slot_name)["has_key"] == true);
        let places = json(&home, &format!("keys {}", public.display())).to_string();
        assert!(places.contains("card-") && !places.contains("\"memory\""), "{places}");
        if slot_name == "decrypt" {
            continue;
        }
        fed(&home, "unlock --stdin", &[USER]).ok();
        cli(&home, &format!("sign {} m --out s", public.display())).ok();
        cli(&home, &format!("verify {} s m", public.display())).ok();
    }
    // X25519, whose private key cards take the other way round.
    let openssl = |words: &str| run(command("openssl", &home.path("")).args(words.split_whitespace())).ok();
    openssl("genpkey -algorithm X25519 -outform DER -out x.der");
    openssl("pkey -inform DER -in x.der -pubout -outform DER -out x.pub.der");
    let last = |file: &str| fs::read(home.path(file)).unwrap().last_chunk::<32>().unwrap().to_vec();
    let body = message(17, &[b"x25519@spec.torproject.org", &last("x.pub.der"), &last("x.der"), b"xkey"]);
    assert_eq!(daemon.connect().request(&body), [SUCCESS]);
    fed(&home, &format!("card import xkey --slot decrypt --serial {SERIAL} --stdin"), &[ADMIN]).ok();
    assert_eq!(slot(&home, "decrypt")["algorithm"], "x25519");
    // A key with a condition that no card keeps stays where it is.
    let key = Key::random();
    assert_eq!(daemon.connect().request(&key.add_message(b"confirmed", &[2])), [SUCCESS]);
    fed(&home, &format!("card import confirmed --slot auth --serial {SERIAL} --stdin"), &[ADMIN]).fails_with(3);
    assert_eq!(card.tries(), [3, 0, 3]);
}

/// The KDF data object of the specification's example (OpenPGP card 3.4.1, 4.3.2): S2K with SHA-256 and 100,000 bytes,
/// salts of their own for PW1, the resetting code and PW3, and the hashes of 123456, which is the example's, and of
/// 12345678, made with Python's hashlib.
const KDF: &str = "81010382010883040001 86A0 84083031323334353637 85084142434445464748 86083837363534333231 \
    8720 773784A602B6C81E3F092F4D7D00E17CC822D88F7360FCF2D2EF2D9D901F44B6 \
    8820 0642968EEBEEC0D58E7F0E9553E7C98E1427A62B03B073BC71BAFBB2465F452B";

#[test]
fn a_card_that_wants_its_pins_hashed_gets_them_so() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    // As a card with this object has them, the PINs are the hashes.
    let kdf = KDF.replace(' ', "");
    let (user, admin) = (&kdf[kdf.len() - 132..kdf.len() - 68], &kdf[kdf.len() - 64..]);
    let put = [
        "00200083083132333435363738",
        &format!("00DA00F9{:02X}{kdf}", kdf.len() / 2),
        &format!("0024008126313233343536{user}"),
        &format!("00240083283132333435363738{admin}"),
    ];
    let sent = room.probe(&[&["send", Reader::A.name()][..], &put].concat());
    assert!(sent.split_whitespace().all(|answer| answer == "9000"), "{sent}");
    let home = home(&room);
    let daemon = start(&home);
    fed(&home, "unlock --stdin", &[USER]).ok();
    fs::write(home.path("m"), "data").unwrap();
    let key = slot(&home, "auth")["ssh_fingerprint"].as_str().unwrap().to_owned();
    cli(&home, &format!("sign {key} m --out s")).ok();
    fed(&home, "card set-url https://example.org --stdin", &[ADMIN]).ok();
    fed(&home, "card set-pin reset-code --stdin", &[ADMIN, "87654321"]).ok();
    fed(&home, "card reset-pin --code --stdin", &["87654321", "222222"]).ok();
    fed(&home, "card set-pin --stdin", &["222222", "654321"]).ok();
    fed(&home, "unlock --stdin", &["654321"]).ok();
    cli(&home, &format!("sign {key} m --out s")).ok();
    drop(daemon);
    assert_eq!(card.tries(), [3, 3, 3]);
    // Each VERIFY had 32 bytes, in a command of extended length.
    let user = card.count_all("apdu 20 9000 [00, 20, 00, 82] 39");
    assert_eq!(user, 2);
    assert_eq!(card.count_pins("apdu 20 ") - 1, user + card.count_all("apdu 20 9000 [00, 20, 00, 83] 39"));
}

#[test]
fn a_card_is_as_new_after_a_reset_that_names_it() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let _daemon = start(&home);
    fed(&home, "card set-pin --stdin", &[USER, "654321"]).ok();
    cli(&home, "card factory-reset").fails_with(5);
    cli(&home, "card factory-reset --serial 00000a02").fails_with(2);
    assert_eq!((card.tries(), slot(&home, "auth")["has_key"].as_bool()), ([3, 0, 3], Some(true)));
    let mut terminal = Terminal::start(&home, "card factory-reset");
    terminal.shows("to go on: ");
    terminal.types("12345678\r");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(2), "{seen}");
    assert!(slot(&home, "auth")["has_key"] == true);
    let mut terminal = Terminal::start(&home, "card factory-reset");
    terminal.shows("to go on: ");
    terminal.types(&format!("{SERIAL}\r"));
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    for name in ["sign", "decrypt", "auth"] {
        assert!(slot(&home, name)["has_key"] == false);
    }
    assert_eq!(card.tries(), [3, 0, 3]);
    assert!(!cli(&home, "keys").ok().contains("cardno"));
    fed(&home, "unlock --stdin", &[USER]).ok();
}

#[test]
fn a_pin_is_set_on_the_terminal_as_a_person_types_it() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.card(SERIAL, "25519"));
    let home = home(&room);
    let _daemon = start(&home);
    let mut terminal = Terminal::start(&home, "card set-pin");
    terminal.shows("User PIN of card 0000:00000A01 (3 tries left): ");
    terminal.types(&format!("{USER}\r"));
    terminal.shows("New user PIN: ");
    terminal.types("654321\r");
    terminal.shows("The same again: ");
    terminal.types("654322\r");
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(2), "{seen}");
    assert_eq!(card.count("apdu 24"), 0);
    let mut terminal = Terminal::start(&home, "card set-pin user");
    for (question, answer) in [("left): ", USER), ("New user PIN: ", "654321"), ("again: ", "654321")] {
        terminal.shows(question);
        terminal.types(&format!("{answer}\r"));
    }
    let (code, seen) = terminal.ends();
    assert_eq!(code, Some(0), "{seen}");
    assert!(seen.contains("User PIN of card 0000:00000A01 is set.") && !seen.contains("654321"), "{seen}");
    assert!(verifies(&room, "654321"));
}
