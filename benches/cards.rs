//! What the agent takes of a card's speed: authentications a second on one virtual card, through the agent and by a bare loop
//! with a transaction for each, in the same room and on the same card. `make bench` runs it; `make virtual-card` comes first.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program that measures"
)]

#[cfg(feature = "openpgp")]
#[path = "../tests/support/mod.rs"]
mod support;

#[cfg(not(feature = "openpgp"))]
fn main() {}

#[cfg(feature = "openpgp")]
fn main() {
    let args: Vec<String> = std::env::args().collect();
    match &args[1..] {
        [loops, reader] if loops == "--bare" => cards::bare(reader),
        _ => cards::measure(),
    }
}

#[cfg(feature = "openpgp")]
mod cards {
    use std::{
        ffi::CString,
        time::{Duration, Instant},
    };

    use pcsc::{Context, Protocols, Scope, ShareMode};

    use crate::support::{
        client::Client,
        daemon::Home,
        eventually,
        pcsc::{Reader, Room},
        service::{ssh, unlock, use_key},
    };
    use strongroom::agent::message::Name;

    /// Authentications in each round.
    const COUNT: usize = 400;
    const ROUNDS: usize = 3;
    const PIN: &str = "123456";
    /// VERIFY with the PIN, and INTERNAL AUTHENTICATE of what ssh would have signed.
    const VERIFY: [u8; 11] = *b"\x00\x20\x00\x82\x06123456";

    /// A loop with nothing around it.
    pub(crate) fn bare(reader: &str) {
        let context = Context::establish(Scope::User).unwrap();
        let reader = CString::new(reader).unwrap();
        let mut card = context.connect(&reader, ShareMode::Shared, Protocols::ANY).unwrap();
        let mut buffer = [0; 300];
        let mut authenticate = vec![0x00, 0x88, 0x00, 0x00, 100];
        authenticate.extend([7; 100]);
        authenticate.push(0);
        let select = b"\x00\xa4\x04\x00\x06\xd2\x76\x00\x01\x24\x01\x00";
        for command in [&select[..], &VERIFY] {
            let transaction = card.transaction().unwrap();
            assert!(transaction.transmit(command, &mut buffer).unwrap().ends_with(&[0x90, 0x00]));
        }
        let begun = Instant::now();
        for _ in 0..COUNT {
            let transaction = card.transaction().unwrap();
            assert!(transaction.transmit(&authenticate, &mut buffer).unwrap().ends_with(&[0x90, 0x00]));
        }
        println!("{}", begun.elapsed().as_micros());
    }

    pub(crate) fn measure() {
        let room = Room::new();
        let _card = room.insert(Reader::A, &room.card("00000a01", "25519"));
        let mut home = Home::new();
        home.enter(&room);
        let daemon = home.start();
        let mut client = daemon.connect_service();
        eventually("the card is there", || client.ask(&unlock("card-000000000a01", PIN)).read::<()>().is_ok());
        let (key, _) = daemon.connect().list().remove(0);
        println!("authentications a second on one virtual card, {COUNT} in each round:");
        println!("  bare loop   one after the other   64 at once   the slowest of one after the other");
        for _ in 0..ROUNDS {
            let exe = std::env::current_exe().unwrap();
            let bare = room.run(exe.to_str().unwrap(), &["--bare", Reader::A.name()]).ok();
            let bare = Duration::from_micros(bare.trim().parse().unwrap());
            let (alone, slowest) = one_by_one(&mut client, &key);
            let together = at_once(&mut client, &key);
            println!("  {:9.0}   {:21.0}   {:10.0}   {slowest:.1?}", rate(bare), rate(alone), rate(together));
        }
    }

    fn rate(took: Duration) -> f64 {
        COUNT as f64 / took.as_secs_f64()
    }

    fn one_by_one(client: &mut Client, key: &[u8]) -> (Duration, Duration) {
        let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
        for n in 0..COUNT {
            let one = Instant::now();
            client.ask(&use_key(ssh(key, &[n as u8; 100]), 0)).bytes();
            slowest = slowest.max(one.elapsed());
        }
        (begun.elapsed(), slowest)
    }

    fn at_once(client: &mut Client, key: &[u8]) -> Duration {
        const AT_ONCE: usize = 64;
        let begun = Instant::now();
        let mut sent = 0;
        for n in 0..COUNT {
            while sent < COUNT && sent < n + AT_ONCE {
                client.tell(&use_key(ssh(key, &[sent as u8; 100]), 60_000));
                sent += 1;
            }
            client.hear(Name::Sign).bytes();
        }
        begun.elapsed()
    }
}
