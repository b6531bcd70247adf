//! What a device is asked and how it can fail. Knows keys, schemes and signatures; never the vault or a peer.

pub mod compute;
pub mod sk;
pub mod soft;

use thiserror::Error;

use zeroize::Zeroizing;

use crate::public_key::Curve;

/// Encrypts a secret when the vault is locked.
pub type Seal<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Box<[u8]>, DeviceError>;
/// Decrypts what a [`Seal`] made.
pub type Open<'a> = &'a mut dyn FnMut(&[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError>;

/// Why a device did not do what it was asked.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum DeviceError {
    /// The key is sealed by `ssh-add -x`: unlock the vault and ask again.
    #[error("the vault is locked; `ssh-add -X` unlocks it")]
    Sealed,
    /// The device wants a PIN first: ask its holder, then ask again with it.
    #[error("a PIN is needed")]
    PinRequired,
    /// The PIN was refused and a try is spent. Never send the same PIN again.
    #[error("the PIN is wrong")]
    PinWrong,
    /// The touch that the device waited for did not come: ask again when somebody is there.
    #[error("the device was not touched")]
    NotTouched,
    /// The device is not here: plug it in and ask again.
    #[error("the device that holds the key is not connected")]
    Absent,
    /// The key cannot do this, now or ever.
    #[error("the key cannot do this: {0}")]
    Unsupported(&'static str),
    /// More work is waiting than the device's queue holds: ask again later.
    #[error("too much work is waiting for the device")]
    Busy,
    /// The deadline passed before there was a result.
    #[error("the device did not answer in time")]
    Timeout,
    /// Anything else; the words are for a person.
    #[error("{0}")]
    Failed(String),
}

/// Hashes that a signature scheme can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// For old servers only.
    Sha1,
    /// SHA-256
    Sha256,
    /// SHA-512
    Sha512,
}

/// How to sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5 (RFC 8017, 8.2).
    RsaPkcs1v15(Hash),
    /// ECDSA with the hash that RFC 5656 gives the curve.
    Ecdsa(Curve),
    /// Ed25519 (RFC 8032).
    Ed25519,
    /// ML-DSA-44 and Ed25519 over one message.
    MlDsa44Ed25519,
    /// Whatever the FIDO authenticator holds: its helper returns a complete SSH signature.
    Sk,
}

/// A signature in the form its scheme has on devices; the wire's form is made from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signature {
    /// 64 bytes.
    Ed25519([u8; 64]),
    /// `r ‖ s`, each as long as the curve's scalars.
    Ecdsa(Curve, Vec<u8>),
    /// As long as the modulus.
    Rsa(Hash, Vec<u8>),
    /// ML-DSA-44's 2420 bytes, then Ed25519's 64.
    MlDsa44Ed25519(Vec<u8>),
    /// An SSH signature blob as the authenticator's helper made it.
    Sk(Vec<u8>),
}
