//! What the kinds of keys do, and how quickly. Knows types; no key.

use crate::{
    devices::{DecryptScheme, DeriveScheme, Hash, Scheme, compute::Length},
    public_key::{Curve, KeyType},
};

/// Whether what it does takes so little time (up to some hundred microseconds) that it need not be handed to another
/// thread.
pub fn is_fast(key_type: KeyType) -> bool {
    match key_type {
        KeyType::Ed25519 | KeyType::Ed25519Expanded | KeyType::X25519 => true,
        KeyType::Ecdsa(curve) => curve != Curve::P521,
        KeyType::Rsa | KeyType::MlDsa44Ed25519 | KeyType::SkEd25519 | KeyType::SkEcdsa => false,
    }
}

/// How long what is not fast takes, by the identity's blob: that of an RSA key is as long as its modulus and a little more,
/// and a certificate's tells nothing.
pub fn length(key_type: KeyType, blob: &[u8]) -> Length {
    const RSA_2048: usize = 279;
    match key_type {
        KeyType::Rsa if blob.len() <= RSA_2048 => Length::Brief,
        KeyType::Ecdsa(_) => Length::Brief,
        _ => Length::Long,
    }
}

/// How it signs. PSS with SHA-512 wants more than 1,024 bits.
pub fn schemes(key_type: KeyType) -> &'static [Scheme] {
    use Hash::{Sha1, Sha256, Sha384, Sha512};
    match key_type {
        KeyType::Ed25519 | KeyType::Ed25519Expanded => &[Scheme::Ed25519, Scheme::Ed25519BlindedTor],
        KeyType::Ecdsa(_) => &[Scheme::Ecdsa(Sha256), Scheme::Ecdsa(Sha384), Scheme::Ecdsa(Sha512)],
        KeyType::Rsa => &[
            Scheme::RsaPkcs1v15(Sha1),
            Scheme::RsaPkcs1v15(Sha256),
            Scheme::RsaPkcs1v15(Sha384),
            Scheme::RsaPkcs1v15(Sha512),
            Scheme::RsaPkcs1v15Raw,
            Scheme::RsaPss(Sha256),
            Scheme::RsaPss(Sha384),
            Scheme::RsaPss(Sha512),
        ],
        KeyType::MlDsa44Ed25519 => &[Scheme::MlDsa44Ed25519],
        KeyType::X25519 | KeyType::SkEd25519 | KeyType::SkEcdsa => &[],
    }
}

/// How it decrypts.
pub fn decrypts(key_type: KeyType) -> &'static [DecryptScheme] {
    match key_type {
        KeyType::Rsa => {
            &[DecryptScheme::RsaOaep(Hash::Sha1), DecryptScheme::RsaOaep(Hash::Sha256), DecryptScheme::RsaPkcs1v15]
        }
        _ => &[],
    }
}

/// How it agrees on secrets.
pub fn derives(key_type: KeyType) -> &'static [DeriveScheme] {
    match key_type {
        KeyType::Ecdsa(_) => &[DeriveScheme::Ecdh],
        KeyType::X25519 => &[DeriveScheme::X25519],
        _ => &[],
    }
}
