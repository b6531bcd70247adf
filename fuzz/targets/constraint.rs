//! Constraints are understood to the last byte or refuse their key; destinations mean the same when written again.
//!
//! Input: the constraints as they stand behind a key; also taken as the value of a destination constraint alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{
    agent::constraint::{read_constraints, read_destinations},
    rfc4251::{Put, Reader},
    vault::key::{Destination, Hop},
};

fuzz_target!(|input: &[u8]| {
    let mut r = Reader::new(input);
    if let Ok(all) = read_constraints(&mut r) {
        assert!(r.is_empty());
        if let Some(destinations) = all.destinations {
            round_trip(&destinations);
        }
    }
    if let Ok(destinations) = read_destinations(input) {
        round_trip(&destinations);
    }
});

fn round_trip(destinations: &[Destination]) {
    let mut out = Vec::new();
    for destination in destinations {
        let mut one = Vec::new();
        one.put_string(&hop(&destination.from));
        one.put_string(&hop(&destination.to));
        one.put_string(b"");
        out.put_string(&one);
    }
    assert_eq!(read_destinations(&out).as_deref(), Ok(destinations));
}

fn hop(hop: &Hop) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_string(&hop.user);
    out.put_string(&hop.host);
    out.put_string(b"");
    for key in &hop.keys {
        out.put_string(&key.blob);
        out.push(key.is_ca.into());
    }
    out
}
