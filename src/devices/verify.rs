//! Whether a signature is one: for those that come from devices, which can lie and break. Knows public keys and schemes.

use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::signature as lc;

use super::{Input, Scheme, Signature, soft::ed25519};
use crate::{
    public_key::{Curve, KeyType, PublicKey},
    rfc4251::Put,
    sys::rsa::RsaPublicKey,
};

/// How many keys a device's [`Verifiers`] keep ready.
const READY: usize = 8;

/// Whether `signature` is one over `input`, in the scheme's own form, by the key whose plain public key's blob this is.
/// False for everything that is malformed, or that such a key does not sign.
pub fn verify(blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
    Verifier::new(blob).verify(scheme, input, signature)
}

/// The public keys that were needed last, ready to verify.
#[derive(Default)]
pub(super) struct Verifiers(Mutex<Vec<Arc<Verifier>>>);

impl Verifiers {
    /// [`verify`], by a key that is likely to be needed again.
    pub(super) fn verify(&self, blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
        self.of(blob).verify(scheme, input, signature)
    }

    fn of(&self, blob: &[u8]) -> Arc<Verifier> {
        let mut ready = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(verifier) = ready.iter().find(|verifier| *verifier.blob == *blob) {
            return Arc::clone(verifier);
        }
        if ready.len() == READY {
            ready.remove(0);
        }
        let verifier = Arc::new(Verifier::new(blob));
        ready.push(Arc::clone(&verifier));
        verifier
    }
}

/// A public key that verifies. What an RSA key has to compute from its modulus before, a quarter of the time of one
/// verification, it computes once.
struct Verifier {
    blob: Box<[u8]>,
    rsa: Option<RsaPublicKey>,
}

impl Verifier {
    fn new(blob: &[u8]) -> Self {
        let rsa = match PublicKey::parse(blob) {
            Ok(PublicKey::Rsa { e, n }) => RsaPublicKey::new(n, e),
            _ => None,
        };
        Self { blob: blob.into(), rsa }
    }

    fn verify(&self, scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
        let Ok(key) = PublicKey::parse(&self.blob) else { return false };
        let bytes = signature.as_bytes();
        if Signature::from_bytes(scheme, key.key_type(), bytes.to_vec()).as_ref() != Some(signature) {
            return false;
        }
        let verified = match &self.rsa {
            Some(key) => verify_rsa(key, scheme, input, bytes),
            None => verify_bytes(&key, scheme, input, bytes),
        };
        verified.unwrap_or(false)
    }
}

fn verify_rsa(key: &RsaPublicKey, scheme: Scheme, input: &Input<'_>, signature: &[u8]) -> Option<bool> {
    Some(match scheme {
        Scheme::RsaPkcs1v15(hash) => key.verify_pkcs1v15(hash, input.digest(hash)?.as_ref(), signature),
        Scheme::RsaPkcs1v15Raw => key.verify_pkcs1v15_raw(input.bytes(), signature),
        Scheme::RsaPss(hash) => key.verify_pss(hash, input.digest(hash)?.as_ref(), signature),
        _ => false,
    })
}

/// The same by a key of another type.
fn verify_bytes(key: &PublicKey<'_>, scheme: Scheme, input: &Input<'_>, signature: &[u8]) -> Option<bool> {
    Some(match (key, scheme) {
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

fn verify_ed25519(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    lc::UnparsedPublicKey::new(&lc::ED25519, public).verify(message, signature).is_ok()
}
