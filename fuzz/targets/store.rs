//! The records of the state on disk, the second copy of it, and age files: whatever is in a damaged file is read or not, and what
//! is read is the same when written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{age, vault::store};

fuzz_target!(|input: &[u8]| {
    store::fuzz(input);
    if let Ok(text) = std::str::from_utf8(input) {
        if let Ok(recipient) = text.parse::<age::Recipient>() {
            assert_eq!(recipient.to_string(), text.trim().to_ascii_lowercase());
        }
        let _ = age::SecretKey::parse(text);
    }
    let key = age::SecretKey::parse(KEY).expect("a key");
    let _ = age::decrypt(&key, input);
});

/// What the seed `age` is encrypted to.
const KEY: &str = "AGE-SECRET-KEY-1GQ4RGD6JEP4RRAZAA4CGL7EFJQS5ERK8SNQY3LHA7ZSTZN9K7GNSWSNMSS";
