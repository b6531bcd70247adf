//! Any body is read as a request or refused; the private parts of a key to be added make a key or are refused.
//!
//! Input: a frame's body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{
    agent::wire::{PrivateParts, Request, SessionBind},
    public_key::Blob,
    vault::soft_key,
};

fuzz_target!(|body: &[u8]| match Request::read(body) {
    Ok(Request::Add(add)) => {
        // The blob names the identity from now on: it must be one that clients can read.
        let blob = Blob::parse(&add.blob).expect("the blob of an added key");
        assert_eq!(blob.key().key_type(), add.key_type);
        if let PrivateParts::Soft(parts) = &add.private {
            let _ = soft_key(parts);
        }
    }
    Ok(Request::Extension(_, body)) => {
        let _ = SessionBind::read(body);
    }
    Ok(_) | Err(_) => {}
});
