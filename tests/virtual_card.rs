//! What the tests of cards stand on, tried without Strongroom: a card that can be pulled, touched and hung, in a room that
//! no other test sees.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    thread,
};

use support::pcsc::{Reader, Room};

/// VERIFY for the user's PIN, with a wrong one and the right one; then INTERNAL AUTHENTICATE.
const WRONG: &str = "0020008206303030303030";
const RIGHT: &str = "0020008206313233343536";
const AUTHENTICATE: &str = "00880000096368616c6c656e676500";
/// PUT DATA: a touch for each use of the authentication key; it wants the admin's PIN.
const ADMIN: &str = "00200083083132333435363738";
const TOUCH: &str = "00DA00D8020120";

#[test]
fn gpg_and_the_probe_see_the_same_card() {
    let room = Room::new();
    let card = room.insert(Reader::A, &room.blank("00000a01"));
    let fingerprint = card.generate("authenticate", "ed25519");
    let status = room.gpg_card_status(Reader::A);
    assert!(status.contains("serial:00000A01"), "{status}");
    assert!(status.contains(&fingerprint.to_uppercase()), "{status}");
    assert_eq!(card.tries(), [3, 0, 3]);
    assert!(room.probe(&["send", Reader::A.name(), WRONG]).starts_with("63c2"));
    assert_eq!(card.tries(), [2, 0, 3]);
    assert!(room.gpg_card_status(Reader::A).contains("pinretry:2:0:3"));
}

#[test]
fn rooms_and_readers_do_not_disturb_one_another() {
    let room = Room::new();
    let other_room = Room::new();
    let card = room.insert(Reader::A, &room.card("00000a01", "rsa2048"));
    let other = room.insert(Reader::B, &room.card("00000a02", "25519"));
    other_room.wait_for(Reader::A, false);
    other_room.wait_for(Reader::B, false);
    card.freeze();
    assert_eq!(other.tries(), [3, 0, 3]);
    card.resume();
    assert_eq!(card.tries(), [3, 0, 3]);
    card.pull();
    assert_eq!(other.tries(), [3, 0, 3]);
}

#[test]
fn a_card_outlives_pcscd_and_remembers_when_it_is_pulled() {
    let room = Room::new();
    let plastic = room.card("00000a01", "25519");
    let card = room.insert(Reader::A, &plastic);
    room.probe(&["send", Reader::A.name(), WRONG]);
    room.kill_pcscd();
    card.wait_for("alone");
    room.start_pcscd();
    card.wait_for("ready");
    room.wait_for(Reader::A, true);
    assert_eq!(card.tries(), [2, 0, 3]);
    card.pull();
    let card = room.insert(Reader::B, &plastic);
    assert_eq!(card.tries(), [2, 0, 3]);
}

#[test]
fn a_card_is_touched_and_hung_while_it_works() {
    let room = Room::new();
    let mut card = room.insert_with(Reader::A, &room.card("00000a01", "25519"), &["--touch", "never"]);
    room.probe(&["send", Reader::A.name(), ADMIN, TOUCH]);
    thread::scope(|scope| {
        let use_key = || room.probe(&["send", Reader::A.name(), RIGHT, AUTHENTICATE]);
        let touched = scope.spawn(use_key);
        card.wait_for("touch");
        card.obey("touch once");
        assert!(touched.join().unwrap().trim_end().ends_with("9000"));

        card.obey("touch always");
        card.obey("hang-on 88");
        let hanging = scope.spawn(use_key);
        card.wait_for("hang 88");
        card.obey("hang-on none");
        assert!(hanging.join().unwrap().trim_end().ends_with("9000"));
    });
}

#[test]
fn nothing_outlives_the_thread_that_made_it() {
    let room = thread::spawn(|| {
        let room = Room::new();
        let mut command = room.command("sh");
        let mut child = command.args(["-c", "echo on; exec sleep infinity"]).stdout(Stdio::piped()).spawn().unwrap();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
        (room, child)
    });
    let (_room, mut child) = room.join().unwrap();
    assert!(!child.wait().unwrap().success());
}
