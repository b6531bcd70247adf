//! Files with private keys: whatever they hold, reading ends, and a key that was read has a public half.
//!
//! Without a passphrase: what making a key of one costs is said by the file, and bounded, but not to milliseconds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{key_file::KeyFile, public_key::PublicKey};

fuzz_target!(|input: &[u8]| {
    let Ok(contents) = KeyFile::read_all(input, None) else { return };
    assert!(!contents.keys.is_empty());
    for key in contents.keys {
        PublicKey::parse(key.blob()).expect("the public half of a key that was read");
    }
});
