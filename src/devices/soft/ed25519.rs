//! Ed25519 in tor's forms: keys that are a scalar and a nonce prefix rather than a seed, and keys blinded by a parameter
//! (rend-spec-v3, appendix A). Knows points, scalars and tor's file of a secret key.

use curve25519_dalek::{EdwardsPoint, Scalar, edwards::CompressedEdwardsY, scalar::clamp_integer};
use ed25519_dalek::{
    VerifyingKey,
    hazmat::{ExpandedSecretKey, raw_sign},
};
use sha2::{Digest, Sha512};
use zeroize::Zeroizing;

/// What sets our nonces of blinded keys apart from everything else that is hashed with a key's secret prefix.
const BLINDED_LABEL: &[u8] = b"strongroom blinded";

/// A private key as RFC 8032, 5.1.5, expands it from a seed, which may be unknown or never have existed.
pub struct ExpandedKey {
    secret: Box<ExpandedSecretKey>,
    /// The scalar as it was given, unreduced, then the prefix.
    bytes: Zeroizing<Box<[u8]>>,
    public: VerifyingKey,
}

impl ExpandedKey {
    /// A key from the scalar's 32 bytes and the prefix's; `None` for a scalar that is a multiple of the group's order.
    ///
    /// The scalar is not clamped: a blinded key's is not, and tor takes it as it is. The public key is always ours: one
    /// that is given and wrong would give the key away with the next signature.
    pub fn new(bytes: &[u8; 64]) -> Option<Self> {
        let kept = Zeroizing::new(Box::from(&bytes[..]));
        let (scalar, prefix) = bytes.split_first_chunk::<32>()?;
        let scalar = Zeroizing::new(Scalar::from_bytes_mod_order(*scalar));
        let secret = Box::new(ExpandedSecretKey { scalar: *scalar, hash_prefix: prefix.try_into().ok()? });
        (*scalar != Scalar::ZERO).then(|| Self { public: VerifyingKey::from(&*secret), secret, bytes: kept })
    }

    /// The key that RFC 8032 makes of a seed.
    pub fn from_seed(seed: &[u8]) -> Option<Self> {
        let mut bytes = Zeroizing::new([0; 64]);
        bytes.copy_from_slice(&Sha512::digest(seed));
        let clamped = Zeroizing::new(clamp_integer(*bytes.first_chunk()?));
        bytes[..32].copy_from_slice(&*clamped);
        Self::new(&bytes)
    }

    /// The public key.
    pub fn public(&self) -> &[u8; 32] {
        self.public.as_bytes()
    }

    /// What [`ExpandedKey::new`] takes.
    pub fn to_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// An Ed25519 signature like any other.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        raw_sign::<Sha512>(&self.secret, message, &self.public).to_bytes()
    }

    /// A signature by this key blinded by `parameter`, then the blinded public key, under which it verifies.
    ///
    /// The nonce prefix depends on the blinded key. That of A.2 does not: there one message signed under two parameters
    /// has one nonce and two challenges, from which anybody computes the scalar. Verifiers cannot tell the difference.
    pub fn sign_blinded(&self, parameter: &[u8; 32], message: &[u8]) -> [u8; 96] {
        let scalar = Zeroizing::new(self.secret.scalar * blinding_factor(parameter));
        let public = EdwardsPoint::mul_base(&scalar).compress();
        let prefix = Zeroizing::new(<[u8; 64]>::from(
            Sha512::new()
                .chain_update(BLINDED_LABEL)
                .chain_update(self.secret.hash_prefix)
                .chain_update(public.as_bytes())
                .finalize(),
        ));
        let mut hash_prefix = [0; 32];
        hash_prefix.copy_from_slice(&prefix[..32]);
        let blinded = ExpandedSecretKey { scalar: *scalar, hash_prefix };
        let public = VerifyingKey::from(&blinded);
        let mut out = [0; 96];
        out[..64].copy_from_slice(&raw_sign::<Sha512>(&blinded, message, &public).to_bytes());
        out[64..].copy_from_slice(public.as_bytes());
        out
    }
}

/// How tor's `hs_ed25519_secret_key` begins, to its 32nd byte.
const TOR_FILE_HEADER: &[u8; 32] = b"== ed25519v1-secret: type0 ==\0\0\0";

/// What [`ExpandedKey::new`] takes, out of the contents of tor's `hs_ed25519_secret_key`; `None` when they are not that.
pub fn from_tor_file(file: &[u8]) -> Option<&[u8; 64]> {
    file.strip_prefix(TOR_FILE_HEADER)?.try_into().ok()
}

/// The public key that [`ExpandedKey::sign_blinded`] signs under; `None` when `public` is not a point of the curve.
pub fn blind(public: &[u8; 32], parameter: &[u8; 32]) -> Option<[u8; 32]> {
    let point = CompressedEdwardsY(*public).decompress()?;
    Some((point * blinding_factor(parameter)).compress().to_bytes())
}

/// A.2's h: the parameter, clamped.
fn blinding_factor(parameter: &[u8; 32]) -> Scalar {
    Scalar::from_bytes_mod_order(clamp_integer(*parameter))
}
