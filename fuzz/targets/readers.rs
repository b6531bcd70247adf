//! What the process that watches the readers tells the daemon: what is read, reads the same when written again.
//!
//! Input: a frame's body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::devices::openpgp::Sighting;

fuzz_target!(|body: &[u8]| {
    if let Some(sighting) = Sighting::from_bytes(body) {
        // Not always the same bytes: the reason comes out harmless. But then it stays as it is.
        assert_eq!(Sighting::from_bytes(&sighting.to_bytes()), Some(sighting));
    }
});
