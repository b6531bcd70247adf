//! What a key can be asked to do, and what comes of it. Knows schemes and sizes; no device.

use std::borrow::Cow;

use aws_lc_rs::digest::{self, Digest};
use zeroize::Zeroizing;

use crate::public_key::{Curve, KeyType, MLDSA44_SIGNATURE};

/// The longest message, ciphertext or label that an operation takes, in bytes: as long as a frame of the agent protocol.
pub const MAX_INPUT: usize = 256 * 1024;
/// The longest result of an operation, in bytes.
pub const MAX_RESULT: usize = 64 * 1024;

/// Hashes that a scheme can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hash {
    /// For old servers only.
    Sha1,
    /// SHA-256
    Sha256,
    /// SHA-384
    Sha384,
    /// SHA-512
    Sha512,
}

impl Hash {
    /// The length of a digest, in bytes.
    pub fn digest_len(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The hash that RFC 5656, section 6.2.1, gives a curve.
    pub fn of_curve(curve: Curve) -> Self {
        match curve {
            Curve::P256 => Self::Sha256,
            Curve::P384 => Self::Sha384,
            Curve::P521 => Self::Sha512,
        }
    }

    /// What computes it.
    pub fn algorithm(self) -> &'static digest::Algorithm {
        match self {
            Self::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
            Self::Sha256 => &digest::SHA256,
            Self::Sha384 => &digest::SHA384,
            Self::Sha512 => &digest::SHA512,
        }
    }
}

/// How to sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// RSASSA-PKCS1-v1_5 (RFC 8017, 8.2).
    RsaPkcs1v15(Hash),
    /// The padding of EMSA-PKCS1-v1_5 around exactly what is given, with no DigestInfo: tor's directory signatures. At
    /// most 11 bytes shorter than the modulus.
    RsaPkcs1v15Raw,
    /// RSASSA-PSS with MGF1 of the same hash and a salt as long as its digest (RFC 8017, 8.1).
    RsaPss(Hash),
    /// ECDSA on the key's curve (FIPS 186-5). A digest of another length than the curve's order is truncated, or padded
    /// with zeros on the left.
    Ecdsa(Hash),
    /// Ed25519 (RFC 8032).
    Ed25519,
    /// Ed25519 with the key blinded by a parameter (tor's rend-spec-v3, A.2). The input is the parameter's 32 bytes,
    /// then the message.
    Ed25519BlindedTor,
    /// ML-DSA-44 and Ed25519 over one message.
    MlDsa44Ed25519,
    /// Whatever the FIDO authenticator holds: its helper returns a complete SSH signature.
    Sk,
}

/// How to decrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DecryptScheme {
    /// RSAES-OAEP with MGF1 of the same hash (RFC 8017, 7.1).
    RsaOaep(Hash),
    /// RSAES-PKCS1-v1_5 (RFC 8017, 7.2). Bad padding gives random bytes, never an error.
    RsaPkcs1v15,
}

/// How to agree on a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeriveScheme {
    /// ECDH on the key's NIST curve; the peer is an uncompressed point, the result its x coordinate (SP 800-56A, 5.7.1.2).
    Ecdh,
    /// X25519 (RFC 7748, section 6.1); the peer and the result have 32 bytes.
    X25519,
}

/// What is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input<'a> {
    /// The message; whoever signs hashes it as the scheme says.
    Message(Cow<'a, [u8]>),
    /// Its digest, as long as the scheme's hash makes them. Not for Ed25519.
    Digest(Cow<'a, [u8]>),
}

impl Input<'_> {
    /// The bytes, whichever they are.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Message(bytes) | Self::Digest(bytes) => bytes,
        }
    }

    /// The digest: made with `hash`, or given. `None` when the given one is not as long as the hash makes them.
    pub fn digest(&self, hash: Hash) -> Option<Digest> {
        match self {
            Self::Message(message) => Some(digest::digest(hash.algorithm(), message)),
            Self::Digest(digest) => Digest::import_less_safe(digest, hash.algorithm()).ok(),
        }
    }

    /// The digest in the form that ECDSA on `curve` reads it, under the name of the curve's own hash: one of another
    /// length is cut, or padded with zeros on the left, which leaves the integer that it stands for (FIPS 186-5, 6.4.1).
    pub fn ecdsa_digest(&self, hash: Hash, curve: Curve) -> Option<Digest> {
        let digest = self.digest(hash)?;
        let len = Hash::of_curve(curve).digest_len();
        let mut fitted = vec![0; len.saturating_sub(hash.digest_len())];
        fitted.extend(digest.as_ref().iter().take(len));
        Digest::import_less_safe(&fitted, Hash::of_curve(curve).algorithm()).ok()
    }

    /// The message, unless only its digest was given.
    pub fn message(&self) -> Option<&[u8]> {
        match self {
            Self::Message(message) => Some(message),
            Self::Digest(_) => None,
        }
    }

    /// The same, owned.
    pub fn into_owned(self) -> Input<'static> {
        match self {
            Self::Message(bytes) => Input::Message(Cow::Owned(bytes.into_owned())),
            Self::Digest(bytes) => Input::Digest(Cow::Owned(bytes.into_owned())),
        }
    }
}

/// One use of a private key.
#[derive(Clone, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Make a signature.
    Sign {
        /// How.
        scheme: Scheme,
        /// What is signed, at most [`MAX_INPUT`] bytes.
        input: Input<'a>,
    },
    /// Decrypt.
    Decrypt {
        /// How.
        scheme: DecryptScheme,
        /// OAEP's label; empty for the other schemes.
        label: Cow<'a, [u8]>,
        /// As long as the modulus.
        ciphertext: Cow<'a, [u8]>,
    },
    /// Agree on a secret with a peer.
    Derive {
        /// How.
        scheme: DeriveScheme,
        /// The peer's public key, as the scheme has it.
        peer: Cow<'a, [u8]>,
    },
}

impl Operation<'_> {
    /// The same, owned.
    pub fn into_owned(self) -> Operation<'static> {
        match self {
            Self::Sign { scheme, input } => Operation::Sign { scheme, input: input.into_owned() },
            Self::Decrypt { scheme, label, ciphertext } => Operation::Decrypt {
                scheme,
                label: Cow::Owned(label.into_owned()),
                ciphertext: Cow::Owned(ciphertext.into_owned()),
            },
            Self::Derive { scheme, peer } => Operation::Derive { scheme, peer: Cow::Owned(peer.into_owned()) },
        }
    }

    /// The same, borrowed.
    pub fn borrowed(&self) -> Operation<'_> {
        match self {
            Self::Sign { scheme, input: Input::Message(bytes) } => {
                Operation::Sign { scheme: *scheme, input: Input::Message(Cow::Borrowed(bytes)) }
            }
            Self::Sign { scheme, input: Input::Digest(bytes) } => {
                Operation::Sign { scheme: *scheme, input: Input::Digest(Cow::Borrowed(bytes)) }
            }
            Self::Decrypt { scheme, label, ciphertext } => Operation::Decrypt {
                scheme: *scheme,
                label: Cow::Borrowed(label),
                ciphertext: Cow::Borrowed(ciphertext),
            },
            Self::Derive { scheme, peer } => Operation::Derive { scheme: *scheme, peer: Cow::Borrowed(peer) },
        }
    }

    /// Whether a key with these schemes does it.
    pub fn is_among(&self, signs: &[Scheme], decrypts: &[DecryptScheme], derives: &[DeriveScheme]) -> bool {
        match self {
            Self::Sign { scheme, .. } => signs.contains(scheme),
            Self::Decrypt { scheme, .. } => decrypts.contains(scheme),
            Self::Derive { scheme, .. } => derives.contains(scheme),
        }
    }

    /// `sign`, `decrypt` or `derive`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sign { .. } => "sign",
            Self::Decrypt { .. } => "decrypt",
            Self::Derive { .. } => "derive",
        }
    }
}

/// What came of an [`Operation`].
#[derive(PartialEq, Eq)]
pub enum Outcome {
    /// Of a sign operation.
    Signature(Signature),
    /// The plaintext of a decrypt operation, or the secret of a derive operation.
    Secret(Zeroizing<Vec<u8>>),
}

impl Outcome {
    /// The signature, if it is one.
    pub fn signature(self) -> Option<Signature> {
        match self {
            Self::Signature(signature) => Some(signature),
            Self::Secret(_) => None,
        }
    }

    /// The secret, if it is one.
    pub fn secret(self) -> Option<Zeroizing<Vec<u8>>> {
        match self {
            Self::Signature(_) => None,
            Self::Secret(secret) => Some(secret),
        }
    }
}

/// A signature in the form its scheme has on devices; the wire's form is made from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signature {
    /// 64 bytes.
    Ed25519([u8; 64]),
    /// `r ‖ s`, each as long as the curve's scalars.
    Ecdsa(Curve, Vec<u8>),
    /// RSASSA-PKCS1-v1_5 with one of the hashes that SSH names, as long as the modulus.
    Rsa(Hash, Vec<u8>),
    /// ML-DSA-44's 2420 bytes, then Ed25519's 64.
    MlDsa44Ed25519(Vec<u8>),
    /// An SSH signature blob as the authenticator's helper made it.
    Sk(Vec<u8>),
    /// Of a scheme that SSH has no name for: the other RSA signatures, as long as the modulus; a blinded Ed25519
    /// signature's 64 bytes, then the blinded public key's 32.
    Plain(Vec<u8>),
}

impl Signature {
    /// The signature that a device wrote as `bytes`; `None` when its length is not one of the scheme with such a key.
    pub fn from_bytes(scheme: Scheme, key_type: KeyType, bytes: Vec<u8>) -> Option<Self> {
        match (scheme, key_type) {
            (Scheme::Ed25519, KeyType::Ed25519 | KeyType::Ed25519Expanded) => {
                Some(Self::Ed25519(bytes.try_into().ok()?))
            }
            (Scheme::Ecdsa(_), KeyType::Ecdsa(curve)) if bytes.len() == 2 * curve.scalar_len() => {
                Some(Self::Ecdsa(curve, bytes))
            }
            // SSH has no name for SHA-384 with RSA.
            (Scheme::RsaPkcs1v15(hash), KeyType::Rsa) if !bytes.is_empty() && hash != Hash::Sha384 => {
                Some(Self::Rsa(hash, bytes))
            }
            (Scheme::RsaPkcs1v15(_) | Scheme::RsaPkcs1v15Raw | Scheme::RsaPss(_), KeyType::Rsa)
                if !bytes.is_empty() =>
            {
                Some(Self::Plain(bytes))
            }
            (Scheme::MlDsa44Ed25519, KeyType::MlDsa44Ed25519) if bytes.len() == MLDSA44_SIGNATURE + 64 => {
                Some(Self::MlDsa44Ed25519(bytes))
            }
            (Scheme::Ed25519BlindedTor, KeyType::Ed25519 | KeyType::Ed25519Expanded) if bytes.len() == 96 => {
                Some(Self::Plain(bytes))
            }
            (Scheme::Sk, KeyType::SkEd25519 | KeyType::SkEcdsa) => Some(Self::Sk(bytes)),
            _ => None,
        }
    }

    /// The bytes of the scheme's own form.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Ed25519(bytes) => bytes,
            Self::Ecdsa(_, bytes)
            | Self::Rsa(_, bytes)
            | Self::MlDsa44Ed25519(bytes)
            | Self::Sk(bytes)
            | Self::Plain(bytes) => bytes,
        }
    }
}
