//! Whether a signature is one: for those that come from devices, which can lie and break. Knows public keys and schemes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::signature as lc;

use super::{Input, Scheme, Signature, soft::ed25519};
use crate::{
    public_key::{Curve, KeyType, PublicKey},
    rfc4251::Put,
    sys::rsa::RsaPublicKey,
};

/// How many RSA keys of a device are kept ready.
const READY: usize = 8;

/// Whether `signature` is one over `input`, in the scheme's own form, by the key whose plain public key's blob this is.
/// False for everything that is malformed, or that such a key does not sign.
pub fn verify(blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
    RsaKeys::default().verify(blob, scheme, input, signature)
}

/// The RSA keys that were used last. What one has to compute from its modulus, a quarter of the time of a verification, it
/// computes once.
#[derive(Default)]
pub(super) struct RsaKeys(Mutex<Vec<Ready>>);

struct Ready {
    n: Box<[u8]>,
    e: Box<[u8]>,
    key: Arc<RsaPublicKey>,
}

impl RsaKeys {
    /// [`verify`], by a key that may be needed again.
    pub(super) fn verify(&self, blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
        let Ok(key) = PublicKey::parse(blob) else { return false };
        let bytes = signature.as_bytes();
        if Signature::from_bytes(scheme, key.key_type(), bytes.to_vec()).as_ref() != Some(signature) {
            return false;
        }
        self.verify_bytes(&key, scheme, input, bytes).unwrap_or(false)
    }

    fn verify_bytes(&self, key: &PublicKey<'_>, scheme: Scheme, input: &Input<'_>, signature: &[u8]) -> Option<bool> {
        Some(match (key, scheme) {
            (PublicKey::Rsa { e, n }, Scheme::RsaPkcs1v15(hash)) => {
                self.key(n, e)?.verify_pkcs1v15(hash, input.digest(hash)?.as_ref(), signature)
            }
            (PublicKey::Rsa { e, n }, Scheme::RsaPkcs1v15Raw) => {
                self.key(n, e)?.verify_pkcs1v15_raw(input.bytes(), signature)
            }
            (PublicKey::Rsa { e, n }, Scheme::RsaPss(hash)) => {
                self.key(n, e)?.verify_pss(hash, input.digest(hash)?.as_ref(), signature)
            }
            (PublicKey::Ecdsa(curve, point), Scheme::Ecdsa(hash)) => {
                let algorithm = match curve {
                    Curve::P256 => &lc::ECDSA_P256_SHA256_FIXED,
                    Curve::P384 => &lc::ECDSA_P384_SHA384_FIXED,
                    Curve::P521 => &lc::ECDSA_P521_SHA512_FIXED,
                };
                let digest = input.ecdsa_digest(hash, *curve)?;
                lc::UnparsedPublicKey::new(algorithm, point).verify_digest(&digest, signature).is_ok()
            }
            (PublicKey::Ed25519(point), Scheme::Ed25519) => verify_ed25519(point, input.message()?, signature),
            (PublicKey::Ed25519(point), Scheme::Ed25519BlindedTor) => {
                let (parameter, message) = input.message()?.split_first_chunk()?;
                let (signature, blinded) = signature.split_at_checked(64)?;
                ed25519::blind((*point).try_into().ok()?, parameter)? == blinded
                    && verify_ed25519(blinded, message, signature)
            }
            (PublicKey::MlDsa44Ed25519(..), Scheme::MlDsa44Ed25519) => {
                let mut blob = Vec::new();
                blob.put_string(KeyType::MlDsa44Ed25519.name().as_bytes());
                blob.put_string(signature);
                key.verify(input.message()?, &blob).is_ok()
            }
            (PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..), Scheme::Sk) => {
                key.verify(input.message()?, signature).is_ok()
            }
            _ => false,
        })
    }

    fn key(&self, n: &[u8], e: &[u8]) -> Option<Arc<RsaPublicKey>> {
        if let Some(key) = use_ready(&mut self.ready(), n, e) {
            return Some(key);
        }
        let key = Arc::new(RsaPublicKey::new(n, e)?);
        let new = Ready { n: n.into(), e: e.into(), key: Arc::clone(&key) };
        let mut ready = self.ready();
        // Another thread may have been quicker.
        if let Some(key) = use_ready(&mut ready, n, e) {
            return Some(key);
        }
        let oldest = (ready.len() == READY).then(|| ready.remove(0));
        ready.push(new);
        drop(ready);
        drop(oldest);
        Some(key)
    }

    fn ready(&self) -> MutexGuard<'_, Vec<Ready>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The key, which is the one used last from now on.
fn use_ready(ready: &mut Vec<Ready>, n: &[u8], e: &[u8]) -> Option<Arc<RsaPublicKey>> {
    let at = ready.iter().position(|ready| *ready.n == *n && *ready.e == *e)?;
    let used = ready.remove(at);
    let key = Arc::clone(&used.key);
    ready.push(used);
    Some(key)
}

fn verify_ed25519(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    lc::UnparsedPublicKey::new(&lc::ED25519, public).verify(message, signature).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_rsa_keys_that_were_used_last_are_ready() {
        let keys = RsaKeys::default();
        let modulus = |n: u8| [vec![0xff; 255], vec![2 * n + 1]].concat();
        let key = |n| keys.key(&modulus(n), &[1, 0, 1]).unwrap();
        let first = key(0);
        assert!(Arc::ptr_eq(&first, &key(0)));
        assert!(!Arc::ptr_eq(&first, &keys.key(&modulus(0), &[3]).unwrap()));
        (1..7).for_each(|n| _ = key(n));
        assert!(Arc::ptr_eq(&first, &key(0)));
        // The other exponent's goes, and then what has been used least since.
        (7..9).for_each(|n| _ = key(n));
        assert_eq!(keys.ready().len(), READY);
        assert!(Arc::ptr_eq(&first, &key(0)));
        (9..17).for_each(|n| _ = key(n));
        assert!(!Arc::ptr_eq(&first, &key(0)));
    }

    #[test]
    fn an_rsa_key_that_is_none_is_not_kept() {
        let keys = RsaKeys::default();
        assert!(keys.key(&[0xfe; 256], &[1, 0, 1]).is_none());
        assert!(keys.ready().is_empty());
    }
}
