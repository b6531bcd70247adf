//! The padding of RSAES-PKCS1-v1_5 taken off without telling whether it was there (draft-irtf-cfrg-rsa-guidance,
//! section 7): a message with bad padding becomes another one, always the same for a key and ciphertext. Knows bytes.
//!
//! Nothing here branches on, or reads memory at, what depends on the padding, but for the length of the result, which
//! the caller learns anyway and which says nothing: both kinds of message have any length.

use aws_lc_rs::{digest, hmac};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq, ConstantTimeLess};
use zeroize::Zeroizing;

/// The shortest padding: two bytes in front, eight that are not zero, one that is.
pub(super) const OVERHEAD: usize = 11;
/// How many lengths are drawn, of which the last that fits is taken.
const LENGTHS: usize = 128;

/// The message in `encoded`, or one made of the key and the ciphertext.
///
/// `encoded` is the ciphertext after RSADP; it, `ciphertext` and `private_exponent` are all as long as the modulus, which
/// has 12 to 8,191 bytes.
pub(super) fn unpad(encoded: &[u8], ciphertext: &[u8], private_exponent: &[u8]) -> Zeroizing<Vec<u8>> {
    let len = encoded.len();
    let key = digest::digest(&digest::SHA256, private_exponent);
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.as_ref());
    let key = hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&key, ciphertext).as_ref());
    let other = expand(&key, b"message", len);
    let start_of_other = index(len) - length_of_other(&key, len);

    let mut found = Choice::from(0);
    let mut zero = 0;
    for (n, byte) in encoded.iter().enumerate().skip(2) {
        let is_first = byte.ct_eq(&0) & !found;
        zero.conditional_assign(&index(n), is_first);
        found |= is_first;
    }
    // Where no zero byte is found, `zero` is 0 and too near.
    let good = encoded[0].ct_eq(&0) & encoded[1].ct_eq(&2) & !zero.ct_lt(&index(OVERHEAD - 1));

    let start = u32::conditional_select(&start_of_other, &(zero + 1), good);
    let mut message = other;
    for (byte, true_byte) in message.iter_mut().zip(encoded) {
        byte.conditional_assign(true_byte, good);
    }
    Zeroizing::new(message[start as usize..].to_vec())
}

/// How long the made-up message is: anything that a true one can be.
fn length_of_other(key: &hmac::Key, len: usize) -> u32 {
    let limit = index(len - OVERHEAD + 1);
    // As many bits as the limit has, also where it is a power of two.
    let mask = (limit + 1).next_power_of_two() - 1;
    let mut length = 0;
    for candidate in expand(key, b"length", 2 * LENGTHS).chunks_exact(2) {
        let candidate = (u32::from(candidate[0]) << 8 | u32::from(candidate[1])) & mask;
        length.conditional_assign(&candidate, candidate.ct_lt(&limit));
    }
    length
}

/// The draft's IRPRF: HMAC over a counter, the label and the length in bits.
fn expand(key: &hmac::Key, label: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
    let bits = (index(len) * 8).to_be_bytes();
    let mut out = Zeroizing::new(Vec::with_capacity(len.next_multiple_of(32)));
    let mut counter = 0u16;
    while out.len() < len {
        let mut mac = hmac::Context::with_key(key);
        mac.update(&counter.to_be_bytes());
        mac.update(label);
        mac.update(&bits[2..]);
        out.extend_from_slice(mac.sign().as_ref());
        counter += 1;
    }
    out.truncate(len);
    out
}

/// No length here needs more than 16 bits.
fn index(n: usize) -> u32 {
    n as u32
}
