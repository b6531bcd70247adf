//! Keys on their way: what is inside of backups and transfers, offers and wraps. What reads is the same when written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::vault::{
    carried,
    transfer::{Offer, Wrap},
};

fuzz_target!(|input: &[u8]| {
    if let Ok((created, keys)) = carried::decode(input) {
        assert_eq!(&**carried::encode(&keys, created).expect("no more than was read"), input);
        for key in keys.iter().take(4) {
            let _ = key.to_file();
        }
    }
    if let Ok(offer) = Offer::decode(input) {
        assert_eq!(offer.encode(), input);
        let _ = offer.check(0);
    }
    if let Ok(wrap) = Wrap::decode(input) {
        assert_eq!(wrap.encode(), input);
    }
});
