//! Whether a signature is one: for those that come from devices, which can lie and break. Knows public keys and schemes.

use aws_lc_rs::signature as lc;

use super::{Input, Scheme, Signature, soft::ed25519};
use crate::{
    public_key::{Curve, KeyType, PublicKey},
    rfc4251::Put,
    sys::rsa::RsaPublicKey,
};

/// Whether `signature` is one over `input`, in the scheme's own form, by the key whose plain public key's blob this is.
/// False for everything that is malformed, or that such a key does not sign.
pub fn verify(blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: &Signature) -> bool {
    let Ok(key) = PublicKey::parse(blob) else { return false };
    let bytes = signature.as_bytes();
    if Signature::from_bytes(scheme, key.key_type(), bytes.to_vec()).as_ref() != Some(signature) {
        return false;
    }
    verify_bytes(&key, scheme, input, bytes).unwrap_or(false)
}

fn verify_bytes(key: &PublicKey<'_>, scheme: Scheme, input: &Input<'_>, signature: &[u8]) -> Option<bool> {
    Some(match (key, scheme) {
        (PublicKey::Rsa { e, n }, Scheme::RsaPkcs1v15(hash)) => {
            RsaPublicKey::new(n, e)?.verify_pkcs1v15(hash, input.digest(hash)?.as_ref(), signature)
        }
        (PublicKey::Rsa { e, n }, Scheme::RsaPkcs1v15Raw) => {
            RsaPublicKey::new(n, e)?.verify_pkcs1v15_raw(input.bytes(), signature)
        }
        (PublicKey::Rsa { e, n }, Scheme::RsaPss(hash)) => {
            RsaPublicKey::new(n, e)?.verify_pss(hash, input.digest(hash)?.as_ref(), signature)
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

fn verify_ed25519(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    lc::UnparsedPublicKey::new(&lc::ED25519, public).verify(message, signature).is_ok()
}
