//! OpenPGP cards behind the daemon, with pcscd and virtual cards in a room of their own: found, pulled, put back, hung, touched,
//! shared. After each test the card says that no PIN was tried which nobody gave.
#![cfg(feature = "openpgp")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Signal, kill_process};
use strongroom::{
    agent::message::{Code, DeviceEntry, KeyEntry, Name, Page, Request, Target},
    devices::{DecryptScheme, DeriveScheme, Scheme},
    public_key::PublicKey,
};
use support::{
    askpass::{Askpass, answering},
    client::{Client, LOCK, SIGN_REQUEST, SIGN_RESPONSE, SUCCESS, UNLOCK, message},
    command,
    daemon::{Daemon, Home},
    eventually,
    pcsc::{Reader, Room},
    run,
    service::{Bytes, decrypt, derive, first_page, sign, ssh, unlock, use_key},
    sshd::Hosts,
    with_suffix,
};
use tempfile::TempDir;

const PIN: &str = "123456";
/// The device of the card with the serial `00000a01`, and what its keys are called.
const A: (&str, &str) = ("card-000000000a01", "cardno:0000 00000A01");
/// The same of `00000a02`.
const B: (&str, &str) = ("card-000000000a02", "cardno:0000 00000A02");
const ALL_TRIES: [u8; 3] = [3, 0, 3];
/// A loaded machine may be that late with a signature; one that waited for another card's timeout would be later.
const LONGEST: Duration = Duration::from_secs(4);

/// A daemon's home in a room.
fn home(room: &Room) -> Home {
    let mut home = Home::new();
    home.enter(room);
    home
}

/// The blob of the listed key whose comment begins so.
fn listed(daemon: &Daemon<'_>, comment: &str) -> Vec<u8> {
    let mut found = None;
    eventually(&format!("{comment:?} is listed"), || {
        let listed = daemon.connect().list();
        found = listed.into_iter().find(|(_, c)| c.starts_with(comment.as_bytes())).map(|(blob, _)| blob);
        found.is_some()
    });
    found.unwrap()
}

/// What the devices say of themselves: state, reason, what is wanted.
fn device(client: &mut Client, id: &str) -> Option<(String, String, String)> {
    let reply = client.ask(&Request::Devices(first_page(0)));
    let page: Page<DeviceEntry<'_>> = reply.ok();
    let entry = page.entries.iter().find(|entry| entry.id == id)?;
    Some((entry.state.to_owned(), entry.reason.to_owned(), entry.wants.to_owned()))
}

fn becomes(daemon: &Daemon<'_>, id: &str, state: &str) {
    let mut client = daemon.connect_service();
    eventually(&format!("{id} is {state}"), || device(&mut client, id).is_some_and(|device| device.0 == state));
}

/// Waits for a card and unlocks it; returns the key that ssh is offered.
fn ready(daemon: &Daemon<'_>, (id, comment): (&str, &str)) -> Vec<u8> {
    becomes(daemon, id, "ready");
    daemon.connect_service().ask(&unlock(id, PIN)).ok::<()>();
    listed(daemon, comment)
}

fn sign_request(blob: &[u8], data: &[u8]) -> Vec<u8> {
    let mut body = message(SIGN_REQUEST, &[blob, data]);
    body.extend([0; 4]);
    body
}

#[track_caller]
fn signs(client: &mut Client, key: &[u8]) {
    client.ask(&use_key(ssh(key, b"data"), 0)).bytes();
}

/// How long each of some signatures takes.
fn signing_times(daemon: &Daemon<'_>, key: &[u8], go_on: impl Fn(usize) -> bool) -> Vec<Duration> {
    let (mut client, mut times) = (daemon.connect_service(), Vec::new());
    while go_on(times.len()) {
        let begun = Instant::now();
        signs(&mut client, key);
        times.push(begun.elapsed());
    }
    times.sort();
    times
}

/// Signs again and again with a key until told to stop; returns how often that was, and the longest that one took.
fn sign_all_the_while<T>(daemon: &Daemon<'_>, key: &[u8], meanwhile: impl FnOnce() -> T) -> (T, usize, Duration) {
    let before = signing_times(daemon, key, |count| count < 20);
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let go_on = |_| !done.load(std::sync::atomic::Ordering::Relaxed);
        let signer = scope.spawn(move || signing_times(daemon, key, go_on));
        // Whatever fails, the signer is told.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(meanwhile));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let times = signer.join().expect("the other card signs");
        let (count, longest) = (times.len(), times.last().copied().unwrap_or_default());
        let median = |times: &[Duration]| times.get(times.len() / 2).copied().unwrap_or_default();
        eprintln!(
            "median of {:?} before, then of {:?} in {count}, the slowest {longest:?}",
            median(&before),
            median(&times)
        );
        (result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), count, longest)
    })
}

#[test]
fn a_card_is_found_asks_for_its_pin_and_signs() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = listed(&daemon, A.1);
    let mut client = daemon.connect();
    client.send(&sign_request(&key, b"data"));
    let prompt = askpass.next();
    assert!(prompt.text.contains(A.0) && prompt.text.contains("3 tries are left"), "{}", prompt.text);
    askpass.answer(0, PIN);
    assert_eq!(client.receive().unwrap()[0], SIGN_RESPONSE);
    for _ in 0..20 {
        assert_eq!(client.request(&sign_request(&key, b"data"))[0], SIGN_RESPONSE);
    }
    assert!(!askpass.has_asked());
    // One PIN, in one mode, for all of them.
    assert_eq!(card.count_all("apdu 20"), 1);
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn ssh_is_offered_the_authentication_key_and_our_messages_all_three() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    ready(&daemon, A);
    let mut client = daemon.connect_service();
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    let slot = |name: &str| {
        let found =
            page.entries.iter().find(|entry| entry.note.starts_with(&format!("slot {name}, OpenPGP fingerprint ")));
        found.unwrap_or_else(|| panic!("no key in the slot {name} among {:?}", page.entries))
    };
    let [authenticate, sign_slot, decrypt] = ["auth", "sign", "decrypt"].map(slot);
    assert_eq!(page.entries.len(), 3);
    assert!(authenticate.note.contains(", made 20"), "{}", authenticate.note);
    assert_eq!(decrypt.derives, ["x25519"]);
    let offered: Vec<_> = daemon.connect().list().into_iter().map(|(blob, _)| blob).collect();
    assert_eq!(offered, [authenticate.blob]);
    let plain = daemon.connect().request(&sign_request(sign_slot.blob, b"data"));
    assert_eq!(plain, [support::client::FAILURE]);
    let blob = sign_slot.blob.to_vec();
    daemon.connect_service().ask(&use_key(sign(&blob, Scheme::Ed25519, b"data"), 0)).bytes();
    assert_eq!(card.tries(), ALL_TRIES);
}

/// The blob of the key in a slot: `sign`, `decrypt` or `auth`.
fn in_slot(client: &mut Client, slot: &str) -> Vec<u8> {
    let reply = client.ask(&Request::Keys(first_page(0)));
    let page: Page<KeyEntry<'_>> = reply.ok();
    let entry = page.entries.iter().find(|entry| entry.note.starts_with(&format!("slot {slot}, ")));
    entry.unwrap_or_else(|| panic!("no key in the slot {slot}")).blob.to_vec()
}

/// PUT DATA to the PW status bytes: PW1 holds for one signature only, or for several.
const FOR_ONE_SIGNATURE: &str = "00DA00C40100";
const FOR_MANY_SIGNATURES: &str = "00DA00C40101";

#[test]
fn a_card_that_wants_its_pin_for_each_signature_has_it_asked_for_each() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    room.probe(&["send", Reader::A.name(), ADMIN, FOR_ONE_SIGNATURE]);
    let auth = ready(&daemon, A);
    let mut client = daemon.connect_service();
    let [signing, decrypting] = ["sign", "decrypt"].map(|slot| in_slot(&mut client, slot));
    let request = || use_key(sign(&signing, Scheme::Ed25519, b"data"), 0);
    // What was given serves for one.
    client.ask(&request()).bytes();
    let mut other = daemon.connect_service();
    for _ in 0..2 {
        client.tell(&request());
        let prompt = askpass.next();
        assert!(prompt.text.contains(A.0) && prompt.text.contains("for each use"), "{}", prompt.text);
        // The other slots are none of its business.
        signs(&mut other, &auth);
        other.ask(&use_key(derive(&decrypting, DeriveScheme::X25519, &[9; 32]), 0)).bytes();
        askpass.answer(0, PIN);
        client.hear(Name::Sign).bytes();
    }
    assert_eq!(card.tries(), ALL_TRIES);
    // Those that come together are asked for one after the other, and none signs with what was given for another.
    let mut more: Vec<_> = (0..3).map(|_| daemon.connect_service()).collect();
    more.iter_mut().for_each(|client| client.tell(&request()));
    for _ in &more {
        askpass.next();
        askpass.answer(0, PIN);
    }
    for client in &mut more {
        client.hear(Name::Sign).bytes();
    }
    assert!(!askpass.has_asked());
    // Nor with what was given before the card's process was started again, though it is sent again for another slot.
    let host = || daemon.hosts().into_iter().find(|(_, name)| name != "readers").map(|(pid, _)| pid);
    let before = host().unwrap();
    kill_process(before, Signal::KILL).unwrap();
    eventually("another process", || host().is_some_and(|now| now != before));
    becomes(&daemon, A.0, "ready");
    signs(&mut other, &auth);
    assert!(!askpass.has_asked());
    client.tell(&request());
    assert!(askpass.next().text.contains("for each use"));
    askpass.answer(0, PIN);
    client.hear(Name::Sign).bytes();
    client.tell(&request());
    askpass.next();
    askpass.answer(1, "");
    assert_eq!(client.hear(Name::Sign).code(), Code::Denied);
    client.tell(&request());
    askpass.next();
    askpass.answer(0, "654321");
    assert_eq!(client.hear(Name::Sign).code(), Code::PinWrong);
    assert_eq!(card.tries(), [2, 0, 3]);
    client.tell(&request());
    assert!(askpass.next().text.contains("2 tries are left"));
    askpass.answer(0, PIN);
    client.hear(Name::Sign).bytes();
    assert_eq!(card.tries(), ALL_TRIES);
    room.probe(&["send", Reader::A.name(), ADMIN, FOR_MANY_SIGNATURES]);
    for _ in 0..3 {
        client.ask(&request()).bytes();
    }
    assert!(!askpass.has_asked());
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn a_message_longer_than_the_card_takes_is_hashed_here_or_refused_with_the_limit() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let other = room.insert(Reader::B, &room.card("00000a02", "p256"));
    let (whole, hashed) = (ready(&daemon, A), ready(&daemon, B));
    let mut client = daemon.connect_service();
    let long = vec![7; 100_000];
    client.ask(&use_key(ssh(&hashed, &long), 0)).bytes();
    let mut refused = |len: usize| -> usize {
        let failure = client.ask(&use_key(ssh(&whole, &long[..len]), 0)).failure();
        assert_eq!(failure.code, Code::TooLong, "{failure:?}");
        let limit = failure.message.split_whitespace().find_map(|word| word.parse().ok());
        limit.unwrap_or_else(|| panic!("a limit: {failure:?}"))
    };
    // What the card says, which does not hold: it takes 1024.
    let says = refused(long.len());
    assert!(says > 1024 && says < long.len(), "{says}");
    // What is told from then on does.
    let told = refused(says);
    let mut client = daemon.connect_service();
    for len in [told, 1024] {
        client.ask(&use_key(ssh(&whole, &long[..len]), 0)).bytes();
    }
    assert_eq!(refused(says), 1024);
    assert_eq!((card.tries(), other.tries()), (ALL_TRIES, ALL_TRIES));
    assert_eq!(card.count_all("apdu 88"), 3, "it is not asked again for what it refused");
}

#[test]
fn a_pin_is_forgotten_when_its_time_is_over() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    home.configure(
        "[[device]]\nname = \"mine\"\ndriver = \"openpgp\"\ncard = \"0000:00000a01\"\npin_lifetime = \"1s\"",
    );
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    becomes(&daemon, "mine", "ready");
    let key = listed(&daemon, A.1);
    let mut client = daemon.connect_service();
    for kept in 1..=2 {
        client.tell(&use_key(ssh(&key, b"data"), 0));
        assert!(askpass.next().text.contains("PIN"));
        askpass.answer(0, PIN);
        client.hear(Name::Sign).bytes();
        eventually("its time is over", || home.log().matches("its PIN was kept for long enough").count() == kept);
        // The card has forgotten it as well.
        eventually("the card is locked", || {
            !room.probe(&["send", Reader::A.name(), AUTHENTICATE]).trim_end().ends_with("9000")
        });
    }
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn a_pin_is_forgotten_with_the_lock_of_the_vault_and_when_it_is_told_so() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = ready(&daemon, A);
    let mut client = daemon.connect_service();
    signs(&mut client, &key);
    let mut ssh_door = daemon.connect();
    let forget: [&mut dyn FnMut(); 2] = [
        &mut || {
            for kind in [LOCK, UNLOCK] {
                assert_eq!(ssh_door.request(&message(kind, &[b"password"])), [SUCCESS]);
            }
        },
        &mut || daemon.connect_service().ask(&Request::Forget(Target::Device(A.0))).ok::<()>(),
    ];
    for forget in forget {
        forget();
        eventually("the card is locked", || {
            !room.probe(&["send", Reader::A.name(), AUTHENTICATE]).trim_end().ends_with("9000")
        });
        client.tell(&use_key(ssh(&key, b"data"), 0));
        assert!(askpass.next().text.contains("PIN"));
        askpass.answer(0, PIN);
        client.hear(Name::Sign).bytes();
    }
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn a_card_that_goes_is_absent_and_another_signs_all_the_while() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let plastic = room.card("00000a01", "25519");
    let card = room.insert(Reader::A, &plastic);
    let other = room.insert(Reader::B, &room.card("00000a02", "p256"));
    let (key, others) = (ready(&daemon, A), ready(&daemon, B));
    let mut client = daemon.connect_service();
    signs(&mut client, &key);
    let (card, count, longest) = sign_all_the_while(&daemon, &others, || {
        card.pull();
        becomes(&daemon, A.0, "absent");
        assert_eq!(client.ask(&use_key(ssh(&key, b"data"), 0)).code(), Code::Absent);
        // Absent is not deleted.
        assert_eq!(listed(&daemon, A.1), key);
        let card = room.insert(Reader::A, &plastic);
        becomes(&daemon, A.0, "ready");
        // Its PIN went with it.
        assert_ne!(client.ask(&use_key(ssh(&key, b"data"), 0)).code(), Code::Absent);
        client.ask(&unlock(A.0, PIN)).ok::<()>();
        signs(&mut client, &key);
        card
    });
    assert!(count > 5 && longest < LONGEST, "{count} signatures, the slowest in {longest:?}");
    assert_eq!((card.tries(), other.tries()), (ALL_TRIES, ALL_TRIES));
}

#[test]
fn a_card_in_another_reader_is_the_same_and_one_in_its_place_is_not() {
    let room = Room::new();
    let home = home(&room);
    let (first, second) = (room.card("00000a01", "25519"), room.card("00000a02", "25519"));
    {
        let daemon = home.start();
        let card = room.insert(Reader::A, &first);
        let key = ready(&daemon, A);
        card.pull();
        // Both have the same keys, but the PIN was given to the first.
        let card = room.insert(Reader::A, &second);
        becomes(&daemon, B.0, "ready");
        becomes(&daemon, A.0, "absent");
        let mut client = daemon.connect_service();
        assert_ne!(client.ask(&use_key(ssh(&key, b"data"), 0)).code(), Code::Absent);
        assert_eq!(card.tries(), ALL_TRIES);
        let other = room.insert(Reader::B, &first);
        becomes(&daemon, A.0, "ready");
        client.ask(&unlock(A.0, PIN)).ok::<()>();
        signs(&mut client, &key);
        assert_eq!((card.tries(), other.tries()), (ALL_TRIES, ALL_TRIES));
    }
    // What was seen is known after a restart, while it is away.
    let daemon = home.start();
    assert!(!listed(&daemon, A.1).is_empty());
    becomes(&daemon, A.0, "absent");
    becomes(&daemon, B.0, "absent");
}

#[test]
fn a_card_that_is_pulled_while_it_works_or_hangs_costs_one_request() {
    let room = Room::new();
    let mut home = home(&room);
    home.configure("[[device]]\nname = \"mine\"\ndriver = \"openpgp\"\ncard = \"0000:00000a01\"\ntimeout = \"8s\"");
    let daemon = home.start();
    let plastic = room.card("00000a01", "25519");
    let mut card = room.insert(Reader::A, &plastic);
    let other = room.insert(Reader::B, &room.card("00000a02", "p256"));
    let (key, others) = (ready(&daemon, ("mine", A.1)), ready(&daemon, B));
    let mut client = daemon.connect_service();
    let (card, count, longest) = sign_all_the_while(&daemon, &others, || {
        signs(&mut client, &key);
        card.obey("hang-on 88");
        client.tell(&use_key(ssh(&key, b"data"), 0));
        card.wait_for("hang 88");
        card.pull();
        let reply = client.hear(Name::Sign);
        assert!(matches!(reply.code(), Code::Absent | Code::Restarted), "{:?}", reply.failure());
        becomes(&daemon, "mine", "absent");

        let mut card = room.insert(Reader::A, &plastic);
        ready(&daemon, ("mine", A.1));
        card.obey("hang-on 88");
        let begun = Instant::now();
        assert_eq!(client.ask(&use_key(ssh(&key, b"data"), 0)).code(), Code::Timeout);
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(8) && took < Duration::from_secs(20), "{took:?}");
        card.obey("hang-on none");
        becomes(&daemon, "mine", "ready");
        eventually("it signs again", || client.ask(&use_key(ssh(&key, b"data"), 0)).read::<Bytes>().is_ok());
        card
    });
    assert!(count > 5 && longest < LONGEST, "{count} signatures, the slowest in {longest:?}");
    assert_eq!((card.tries(), other.tries()), (ALL_TRIES, ALL_TRIES));
}

#[test]
fn pcscd_that_stops_is_a_reason_and_heals() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = ready(&daemon, A);
    let mut client = daemon.connect_service();
    signs(&mut client, &key);
    room.kill_pcscd();
    card.wait_for("alone");
    becomes(&daemon, A.0, "failed");
    let failure = client.ask(&use_key(ssh(&key, b"data"), 0)).failure();
    assert!(failure.message.contains("pcscd"), "{failure:?}");
    room.start_pcscd();
    card.wait_for("ready");
    assert_eq!(ready(&daemon, A), key);
    signs(&mut client, &key);
    assert_eq!(card.tries(), ALL_TRIES);
}

/// What sends to a card: the administrator's PIN, and a touch for each use of the authentication key.
const ADMIN: &str = "00200083083132333435363738";
const TOUCH: &str = "00DA00D8020120";
/// INTERNAL AUTHENTICATE, which wants the user's PIN.
const AUTHENTICATE: &str = "00880000096368616c6c656e676500";
/// VERIFY with a PIN that is wrong.
const SPEND_A_TRY: &str = "0020008206303030303030";

#[test]
fn a_touch_is_asked_for_and_one_that_does_not_come_is_no_matter_of_pins() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    let daemon = home.start();
    let mut card = room.insert_with(Reader::A, &room.card("00000a01", "25519"), &["--touch", "never"]);
    room.probe(&["send", Reader::A.name(), ADMIN, TOUCH]);
    let other = room.insert(Reader::B, &room.card("00000a02", "p256"));
    let (key, others) = (ready(&daemon, A), ready(&daemon, B));
    let mut client = daemon.connect_service();
    // The card was changed behind our back; it is looked at again.
    let touched = |daemon: &Daemon<'_>| {
        let mut client = daemon.connect_service();
        let reply = client.ask(&Request::Keys(first_page(0)));
        let page: Page<KeyEntry<'_>> = reply.ok();
        page.entries.iter().any(|entry| entry.blob == key && entry.constraints.contains(&"touch"))
    };
    eventually("the key wants a touch", || touched(&daemon));
    let ((), count, longest) = sign_all_the_while(&daemon, &others, || {
        client.tell(&use_key(ssh(&key, b"data"), 0));
        let notice = askpass.next();
        assert_eq!(notice.kind, "none");
        for part in ["Touch", A.0, A.1, "SHA256:", "requested by", "openpgp_cards"] {
            assert!(notice.text.contains(part), "{part}: {}", notice.text);
        }
        card.wait_for("touch");
        let (_, _, wants) = device(&mut daemon.connect_service(), A.0).unwrap();
        assert_eq!(wants, "touch");
        daemon.logs(&format!("Touch {}", A.0));
        card.obey("touch once");
        client.hear(Name::Sign).bytes();
        notice.wait_gone();
        assert_eq!(device(&mut daemon.connect_service(), A.0).unwrap().2, "");

        let begun = Instant::now();
        let failure = client.ask(&use_key(ssh(&key, b"data"), 0)).failure();
        assert_eq!(failure.code, Code::NotTouched, "{failure:?}");
        assert!(begun.elapsed() > Duration::from_secs(10) && begun.elapsed() < Duration::from_secs(25));
        card.obey("touch always");
        signs(&mut client, &key);
    });
    assert!(count > 20 && longest < LONGEST, "{count} signatures, the slowest in {longest:?}");
    assert_eq!((card.tries(), other.tries()), (ALL_TRIES, ALL_TRIES));
}

#[test]
fn a_request_waits_for_its_card_while_the_user_is_told_which() {
    let (room, mut askpass) = (Room::new(), Askpass::new());
    let mut home = home(&room);
    home.askpass(&askpass);
    home.configure("[[device]]\nname = \"mine\"\ndriver = \"openpgp\"\ncard = \"0000:00000a01\"\nwait = true");
    let plastic = room.card("00000a01", "25519");
    let daemon = home.start();
    let card = room.insert(Reader::A, &plastic);
    let key = ready(&daemon, ("mine", A.1));
    card.pull();
    becomes(&daemon, "mine", "absent");
    let mut client = daemon.connect_service();
    client.tell(&use_key(ssh(&key, b"data"), 60_000));
    let notice = askpass.next();
    assert!(notice.kind == "none" && notice.text.contains("Insert mine") && notice.text.contains(A.1), "{notice:?}");
    assert_eq!(device(&mut daemon.connect_service(), "mine").unwrap().2, "insert");
    let card = room.insert(Reader::B, &plastic);
    // It went, and its PIN with it.
    assert!(askpass.next().text.contains("PIN"));
    askpass.answer(0, PIN);
    client.hear(Name::Sign).bytes();
    notice.wait_gone();
    assert_eq!(card.tries(), ALL_TRIES);
    card.pull();
    becomes(&daemon, "mine", "absent");
    let begun = Instant::now();
    assert_eq!(client.ask(&use_key(ssh(&key, b"data"), 1000)).code(), Code::Absent);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn the_same_key_on_two_cards_is_one_key_and_either_serves() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let first = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = ready(&daemon, A);
    let second = room.insert(Reader::B, &room.card("00000a02", "25519"));
    becomes(&daemon, B.0, "ready");
    daemon.connect_service().ask(&unlock(B.0, PIN)).ok::<()>();
    let mut client = daemon.connect_service();
    assert_eq!(daemon.connect().list().len(), 1);
    signs(&mut client, &key);
    assert_eq!((first.count_all("apdu 88"), second.count_all("apdu 88")), (1, 0));
    first.pull();
    signs(&mut client, &key);
    assert_eq!(second.count_all("apdu 88"), 1);
    assert_eq!(second.tries(), ALL_TRIES);
}

#[test]
fn no_try_is_spent_that_nobody_meant() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    becomes(&daemon, A.0, "ready");
    let key = listed(&daemon, A.1);
    let mut client = daemon.connect_service();
    let refused = |client: &mut Client, pin: &str| {
        let failure = client.ask(&unlock(A.0, pin)).failure();
        (failure.code, failure.tries_left)
    };
    // Too short for any card; wrong; and the same again.
    assert_eq!(refused(&mut client, "12345"), (Code::PinWrong, Some(3)));
    assert_eq!(card.tries(), ALL_TRIES);
    assert_eq!(refused(&mut client, "654321"), (Code::PinWrong, Some(2)));
    assert_eq!(refused(&mut client, "654321").0, Code::PinWrong);
    assert_eq!(card.tries(), [2, 0, 3]);
    // Somebody else leaves one try: what the user was told of is not true any more.
    room.probe(&["send", Reader::A.name(), SPEND_A_TRY]);
    assert_eq!(card.tries(), [1, 0, 3]);
    assert_eq!(refused(&mut client, PIN).0, Code::PinRequired);
    assert_eq!(card.count("apdu 20 9000"), 0);
    eventually("the user can be told", || {
        let reply = client.ask(&Request::Devices(first_page(0)));
        let page: Page<DeviceEntry<'_>> = reply.ok();
        page.entries.iter().any(|entry| entry.id == A.0 && entry.tries_left == Some(1))
    });
    client.ask(&unlock(A.0, PIN)).ok::<()>();
    signs(&mut client, &key);
    assert_eq!(card.tries(), ALL_TRIES);

    // The PIN is changed by another program: what was accepted is tried once more, and never again.
    room.probe(&["send", Reader::A.name(), "002400810c313233343536363534333231"]);
    // Nobody uses it: it is let go, and forgets.
    card.wait_for("power off");
    let refusal = client.ask(&use_key(ssh(&key, b"data"), 0)).failure();
    assert_eq!((refusal.code, refusal.tries_left), (Code::PinWrong, Some(2)));
    assert_eq!(card.tries(), [2, 0, 3]);
    for _ in 0..3 {
        assert_ne!(client.ask(&use_key(ssh(&key, b"data"), 0)).code(), Code::PinWrong);
    }
    assert_eq!(refused(&mut client, PIN).0, Code::PinWrong);
    assert_eq!(card.tries(), [2, 0, 3]);
}

#[test]
fn an_end_amid_a_login_waits_for_what_the_card_says() {
    let room = Room::new();
    let mut home = home(&room);
    fs::write(home.path("pin"), PIN).unwrap();
    let pin = home.path("pin");
    home.configure(&format!(
        "[[device]]\nname = \"mine\"\ndriver = \"openpgp\"\ncard = \"0000:00000a01\"\ntimeout = \"1m\"\npin = {{ file = {pin:?} }}"
    ));
    let daemon = home.start();
    let mut card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    becomes(&daemon, "mine", "ready");
    let key = listed(&daemon, A.1);
    card.obey("hang-on 20");
    let mut client = daemon.connect_service();
    client.tell(&use_key(ssh(&key, b"data"), 0));
    card.wait_for("hang 20");
    daemon.signal(Signal::TERM);
    daemon.logs("its answer is waited for");
    card.obey("hang-on none");
    assert!(daemon.wait().success());
    // Otherwise what became of it would not be known, and it would not be sent again.
    let daemon = home.start();
    becomes(&daemon, "mine", "ready");
    signs(&mut daemon.connect_service(), &key);
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn other_programs_have_the_card_between_its_uses() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = ready(&daemon, A);
    let mut client = daemon.connect_service();
    for _ in 0..3 {
        signs(&mut client, &key);
        assert!(room.gpg_card_status(Reader::A).contains("serial:00000A01"));
    }
    signs(&mut client, &key);
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn a_card_that_another_program_has_open_is_not_reset() {
    let room = Room::new();
    let home = home(&room);
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    // GnuPG shares it, and keeps it open.
    let gnupg = gnupg(&room, "pcsc-shared\n");
    let status = || room.run("gpg", &["--homedir", &gnupg, "--card-status"]).ok();
    assert!(status().contains("00000A01"));
    let disturbed = || card.count_all("reset") + card.count_all("power");
    let before = disturbed();
    {
        let daemon = home.start();
        becomes(&daemon, A.0, "ready");
        assert!(status().contains("00000A01"));
    }
    assert_eq!(disturbed(), before, "looked at or let go of, it was reset");
    {
        let daemon = home.start();
        let key = ready(&daemon, A);
        let mut client = daemon.connect_service();
        for _ in 0..3 {
            signs(&mut client, &key);
            assert!(status().contains("00000A01"));
        }
        assert_eq!(disturbed(), before, "used, it was reset");
    }
    assert_eq!(disturbed(), before, "let go of, it was reset");
    // What was verified is not, for whoever has the card open.
    let refused =
        room.run("gpg-connect-agent", &["--hex", "--homedir", &gnupg, "SCD APDU 00880000046461746100", "/bye"]);
    let refused = refused.ok();
    assert!(refused.contains("69 82"), "{refused}");
    assert!(status().contains("00000A01"));
    room.run("gpgconf", &["--homedir", &gnupg, "--kill", "all"]).ok();
    assert_eq!(card.tries(), ALL_TRIES);
}

/// A home of GnuPG's whose daemon for cards keeps the one in the first reader, and has these lines in its configuration.
fn gnupg(room: &Room, lines: &str) -> String {
    let gnupg = room.path("gnupg");
    fs::create_dir(&gnupg).unwrap();
    fs::set_permissions(&gnupg, fs::Permissions::from_mode(0o700)).unwrap();
    let config = format!("disable-ccid\nreader-port {}\n{lines}", Reader::A.name());
    fs::write(gnupg.join("scdaemon.conf"), config).unwrap();
    gnupg.display().to_string()
}

#[test]
fn a_card_that_another_program_has_for_itself_is_busy_until_it_lets_go() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let key = ready(&daemon, A);
    let mut client = daemon.connect_service();
    signs(&mut client, &key);
    // Let go: GnuPG, as it is without configuration, takes the card for itself and keeps it.
    card.wait_for("power off");
    let gnupg = gnupg(&room, "");
    assert!(room.run("gpg", &["--homedir", &gnupg, "--card-status"]).ok().contains("00000A01"));
    let failure = client.ask(&use_key(ssh(&key, b"data"), 0)).failure();
    assert_eq!(failure.code, Code::Busy, "{failure:?}");
    assert!(failure.message.contains("another program") && failure.retry_after_ms > 0, "{failure:?}");
    room.run("gpgconf", &["--homedir", &gnupg, "--kill", "all"]).ok();
    eventually("it signs again", || client.ask(&use_key(ssh(&key, b"data"), 0)).read::<Bytes>().is_ok());
    assert_eq!(card.tries(), ALL_TRIES);
}

/// A file that OpenSSL reads, with the public key of a blob.
fn pem(dir: &Path, blob: &[u8]) -> PathBuf {
    let path = dir.join("key.pem");
    match PublicKey::parse(blob).unwrap() {
        PublicKey::X25519(point) => {
            // SubjectPublicKeyInfo (RFC 8410).
            let der = [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00][..], point].concat();
            fs::write(dir.join("key.der"), der).unwrap();
            openssl(dir, "pkey -pubin -inform DER -in key.der -out key.pem");
        }
        _ => {
            let line = ssh_key::PublicKey::from_bytes(blob).unwrap().to_openssh().unwrap();
            fs::write(dir.join("key.pub"), line).unwrap();
            let pem = run(command("ssh-keygen", dir).args(["-e", "-m", "PKCS8", "-f", "key.pub"])).ok();
            fs::write(&path, pem).unwrap();
        }
    }
    path
}

#[track_caller]
fn openssl(dir: &Path, args: &str) {
    run(command("openssl", dir).args(args.split(' '))).ok();
}

#[test]
fn what_openssl_made_for_a_card_is_decrypted_and_derived() {
    let room = Room::new();
    let mut home = home(&room);
    for serial in ["00000a01", "00000a02"] {
        home.configure(&format!(
            "[[device]]\nname = \"c{serial}\"\ndriver = \"openpgp\"\ncard = \"0000:{serial}\"\ntimeout = \"1m\"\npkcs1_decrypt = true"
        ));
    }
    let daemon = home.start();
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    for pair in [["25519", "p256"], ["p384", "p521"], ["rsa2048", "rsa4096"]] {
        let serials = ["00000a01", "00000a02"];
        // Two cards at once.
        let cards: Vec<_> = [Reader::A, Reader::B]
            .into_iter()
            .zip(serials.into_iter().zip(pair))
            .map(|(reader, (serial, keys))| room.insert(reader, &room.card(serial, keys)))
            .collect();
        for serial in serials {
            becomes(&daemon, &format!("c{serial}"), "ready");
            daemon.connect_service().ask(&unlock(&format!("c{serial}"), PIN)).ok::<()>();
        }
        let mut client = daemon.connect_service();
        let reply = client.ask(&Request::Keys(first_page(0)));
        let page: Page<KeyEntry<'_>> = reply.ok();
        let decrypts = page.entries.iter().filter(|entry| !(entry.decrypts.is_empty() && entry.derives.is_empty()));
        let blobs: Vec<_> = decrypts.map(|entry| entry.blob.to_vec()).collect();
        assert_eq!(blobs.len(), 2, "{pair:?}");
        let mut client = daemon.connect_service();
        for blob in blobs {
            pem(dir.path(), &blob);
            let (scheme, algorithm) = match PublicKey::parse(&blob).unwrap() {
                PublicKey::Rsa { .. } => {
                    fs::write(path("plain"), b"what OpenSSL encrypted").unwrap();
                    openssl(dir.path(), "pkeyutl -encrypt -pubin -inkey key.pem -in plain -out cipher");
                    let cipher = fs::read(path("cipher")).unwrap();
                    let plain = client.ask(&use_key(decrypt(&blob, DecryptScheme::RsaPkcs1v15, &cipher), 0)).bytes();
                    assert_eq!(plain, b"what OpenSSL encrypted");
                    continue;
                }
                PublicKey::X25519(_) => (DeriveScheme::X25519, "X25519".to_owned()),
                PublicKey::Ecdsa(curve, _) => {
                    let name = curve.name().replace("nistp", "P-");
                    (DeriveScheme::Ecdh, format!("EC -pkeyopt ec_paramgen_curve:{name}"))
                }
                other => panic!("{other:?}"),
            };
            openssl(dir.path(), &format!("genpkey -algorithm {algorithm} -out peer.pem"));
            openssl(dir.path(), "pkey -in peer.pem -pubout -outform DER -out peer.der");
            openssl(dir.path(), "pkeyutl -derive -inkey peer.pem -peerkey key.pem -out secret");
            let der = fs::read(path("peer.der")).unwrap();
            let point = match PublicKey::parse(&blob).unwrap() {
                PublicKey::Ecdsa(curve, _) => 1 + 2 * curve.scalar_len(),
                _ => 32,
            };
            let peer = &der[der.len() - point..];
            let secret = client.ask(&use_key(derive(&blob, scheme, peer), 0)).bytes();
            assert_eq!(secret, fs::read(path("secret")).unwrap(), "{scheme:?}");
            assert_eq!(client.ask(&use_key(derive(&blob, scheme, &peer[1..]), 0)).code(), Code::Unsupported);
        }
        for card in cards {
            assert_eq!(card.tries(), ALL_TRIES);
            card.pull();
        }
        for serial in serials {
            becomes(&daemon, &format!("c{serial}"), "absent");
        }
        fs::remove_dir_all(room.path("card-00000a01")).unwrap();
        fs::remove_dir_all(room.path("card-00000a02")).unwrap();
    }
}

#[test]
fn ssh_logs_in_and_git_signs_with_the_key_of_a_card() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    let blob = ready(&daemon, A);
    let hosts = Hosts::one("host");
    let key = hosts.dir().join("card");
    let line = ssh_key::PublicKey::from_bytes(&blob).unwrap().to_openssh().unwrap();
    fs::write(with_suffix(&key, ".pub"), format!("{line}\n")).unwrap();
    hosts.authorize(&key, "");
    let socket = home.path("agent");
    let mut ssh = command("ssh", hosts.dir());
    ssh.env("SSH_AUTH_SOCK", &socket).arg("-F").arg(hosts.ssh_config()).arg("-i").arg(with_suffix(&key, ".pub"));
    assert!(run(ssh.args(["host", "cat $SSH_USER_AUTH"])).ok().starts_with("publickey ssh-ed25519"));

    let signers = hosts.dir().join("allowed_signers");
    fs::write(&signers, format!("somebody@example.org {line}\n")).unwrap();
    let git = |args: &[&str]| {
        let mut git = command("git", hosts.dir());
        for setting in [
            &format!("user.signingKey={}.pub", key.display()),
            &format!("gpg.ssh.allowedSignersFile={}", signers.display()),
            "gpg.format=ssh",
            "user.name=Somebody",
            "user.email=somebody@example.org",
            "init.defaultBranch=main",
        ] {
            git.args(["-c", setting]);
        }
        run(git.env("SSH_AUTH_SOCK", &socket).current_dir(hosts.dir()).args(args))
    };
    git(&["init", "-q"]).ok();
    git(&["commit", "-q", "-S", "--allow-empty", "-m", "signed"]).ok();
    let verified = git(&["verify-commit", "HEAD"]);
    assert!(verified.stderr.contains("Good \"git\" signature for somebody@example.org"), "{verified:?}");
    assert_eq!(card.tries(), ALL_TRIES);
}

#[test]
fn ssh_add_unlocks_and_locks_a_card_by_its_name() {
    let room = Room::new();
    let home = home(&room);
    let daemon = home.start();
    let card = room.insert(Reader::A, &room.card("00000a01", "25519"));
    becomes(&daemon, A.0, "ready");
    let key = listed(&daemon, A.1);
    let mut client = daemon.connect_service();
    let ssh_add = |args: &[&str], pin: &str| {
        let mut command = command("ssh-add", &home.path(""));
        answering(&mut command, &home.path(""), pin);
        run(command.env("SSH_AUTH_SOCK", home.path("agent")).args(args))
    };
    assert_ne!(ssh_add(&["-s", "0000:00000A01"], "654321").code, Some(0));
    assert_eq!(card.tries(), [2, 0, 3]);
    // A lifetime cannot be had: the keys are there already.
    assert_ne!(ssh_add(&["-t", "60", "-s", "0000:00000A01"], PIN).code, Some(0));
    ssh_add(&["-s", "0000:00000a01"], PIN).ok();
    signs(&mut client, &key);
    ssh_add(&["-e", "0000:00000A01"], PIN).ok();
    assert_ne!(client.ask(&use_key(ssh(&key, b"data"), 0)).read::<Bytes>().map(drop), Ok(()));
    assert_eq!(card.tries(), ALL_TRIES);
}
