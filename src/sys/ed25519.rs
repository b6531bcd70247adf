//! Ed25519 on aws-lc's C interface. aws-lc-rs goes through aws-lc's general one and returns a buffer that has room for the
//! signature of any algorithm, 4.6 kB: together 4 % of the time of a signature.
#![allow(unsafe_code)]

use std::fmt;

use aws_lc_sys as lc;
use zeroize::Zeroizing;

/// Bytes of a seed, and of a public key.
const HALF: usize = 32;

/// An Ed25519 key pair (RFC 8032): its seed, then the public key that the seed makes.
/// Boxed: a value that moves leaves copies on the stack.
pub struct Ed25519Key(Box<Zeroizing<[u8; 2 * HALF]>>);

impl Ed25519Key {
    /// The key of this seed. `None` unless it has 32 bytes.
    pub fn from_seed(seed: &[u8]) -> Option<Self> {
        let seed: &[u8; HALF] = seed.try_into().ok()?;
        let mut key = Self(Box::new(Zeroizing::new([0; 2 * HALF])));
        let mut public = [0; HALF];
        // SAFETY: the function reads 32 bytes of the seed, and writes 32 of the public key and 64 of the private key.
        unsafe { lc::ED25519_keypair_from_seed(public.as_mut_ptr(), key.0.as_mut_ptr(), seed.as_ptr()) };
        Some(key)
    }

    /// The seed: 32 bytes.
    pub fn seed(&self) -> &[u8] {
        &self.0[..HALF]
    }

    /// The public key: 32 bytes.
    pub fn public(&self) -> &[u8] {
        &self.0[HALF..]
    }

    /// Signs `message`. `None` where aws-lc fails, for which it documents no reason.
    pub fn sign(&self, message: &[u8]) -> Option<[u8; 2 * HALF]> {
        let mut signature = [0; 2 * HALF];
        // SAFETY: the function reads the message by its length and 64 bytes of the private key, and writes 64 bytes.
        let signed =
            unsafe { lc::ED25519_sign(signature.as_mut_ptr(), message.as_ptr(), message.len(), self.0.as_ptr()) };
        (signed == 1).then_some(signature)
    }
}

impl fmt::Debug for Ed25519Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ed25519Key").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use proptest::prelude::*;

    #[test]
    fn a_seed_has_32_bytes() {
        assert!(Ed25519Key::from_seed(&[0; 31]).is_none() && Ed25519Key::from_seed(&[0; 33]).is_none());
        assert!(!format!("{:?}", Ed25519Key::from_seed(&[7; 32])).contains('7'));
    }

    proptest! {
        #[test]
        fn it_signs_as_the_other_interface_does(seed: [u8; 32], message: Vec<u8>) {
            let (key, other) = (Ed25519Key::from_seed(&seed).unwrap(), Ed25519KeyPair::from_seed_unchecked(&seed).unwrap());
            prop_assert_eq!(key.public(), other.public_key().as_ref());
            prop_assert_eq!(key.seed(), seed);
            let (signature, expected) = (key.sign(&message).unwrap(), other.sign(&message));
            prop_assert_eq!(&signature[..], expected.as_ref());
        }
    }
}
