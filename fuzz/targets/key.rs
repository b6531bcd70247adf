//! Blobs of keys and certificates, and signatures made with them: a key means the same when written again.
//!
//! Input: `string blob, string data, string signature`; what does not read so is a blob as a whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strongroom::{
    public_key::{Blob, FingerprintHash, PublicKey, fingerprint},
    rfc4251::{Reader, WireError},
};

fuzz_target!(|input: &[u8]| {
    let (blob, data, signature) = parts(input).unwrap_or((input, input, input));
    let _ = fingerprint(blob, FingerprintHash::Sha256);
    let _ = fingerprint(blob, FingerprintHash::Md5);
    let Ok(parsed) = Blob::parse(blob) else { return };
    if let Blob::Certificate(certificate) = &parsed {
        let _ = certificate.verify();
        let authority = PublicKey::parse(certificate.signature_key).expect("it was checked when the certificate was");
        round_trip(&authority);
    }
    round_trip(parsed.key());
    let _ = parsed.key().verify(data, signature);
});

fn parts(input: &[u8]) -> Result<(&[u8], &[u8], &[u8]), WireError> {
    let mut r = Reader::new(input);
    let parts = (r.string()?, r.string()?, r.string()?);
    r.finish()?;
    Ok(parts)
}

fn round_trip(key: &PublicKey<'_>) {
    let blob = key.to_blob();
    assert_eq!(PublicKey::parse(&blob), Ok(*key));
}
