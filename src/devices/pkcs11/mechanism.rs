//! Which mechanism does what a scheme wants, by what the token and the key allow. Knows mechanisms, schemes and paddings;
//! makes no call.

use std::borrow::Cow;

use cryptoki::{
    mechanism::{
        Mechanism, MechanismType,
        eddsa::{EddsaParams, EddsaSignatureScheme},
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams},
    },
    types::Ulong,
};

use super::object::Usage;
use crate::{
    devices::{DecryptScheme, DeriveScheme, DeviceError, Hash, Input, Scheme},
    public_key::{KeyType, PublicKey},
};

/// The padding of EMSA-PKCS1-v1_5 that is always there: two bytes in front, eight in the middle, one behind.
const PKCS1_OVERHEAD: usize = 11;

const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];
/// As ssh and the other devices have them: no new signatures with SHA-1.
const NEW_HASHES: [Hash; 3] = [Hash::Sha256, Hash::Sha384, Hash::Sha512];

/// The mechanisms of a token.
pub(super) struct Mechanisms(Vec<MechanismType>);

/// What a private key can do, and how.
#[derive(Clone)]
pub(super) struct Ability {
    key_type: KeyType,
    /// Bytes of an RSA modulus; 0 for other keys.
    modulus: usize,
    /// Those that the token and the key allow, of the ones used here.
    mechanisms: Vec<MechanismType>,
    usage: Usage,
}

/// How a signature is made.
pub(super) struct Plan<'a> {
    pub(super) mechanism: Mechanism<'static>,
    pub(super) data: Cow<'a, [u8]>,
}

impl Mechanisms {
    pub(super) fn new(mechanisms: Vec<MechanismType>) -> Self {
        Self(mechanisms)
    }

    /// Whether the token has it.
    pub(super) fn has(&self, mechanism: MechanismType) -> bool {
        self.0.contains(&mechanism)
    }

    /// What a key can do; `None` for one whose blob is not known here.
    pub(super) fn ability(&self, blob: &[u8], usage: &Usage) -> Option<Ability> {
        let key = PublicKey::parse(blob).ok()?;
        let modulus = if let PublicKey::Rsa { n, .. } = key { n.len() } else { 0 };
        let allowed = |mechanism: &&MechanismType| usage.allowed.is_empty() || usage.allowed.contains(mechanism);
        let mechanisms = self.0.iter().filter(allowed).copied().collect();
        Some(Ability { key_type: key.key_type(), modulus, mechanisms, usage: usage.clone() })
    }
}

impl Ability {
    fn has(&self, mechanism: MechanismType) -> bool {
        self.mechanisms.contains(&mechanism)
    }

    pub(super) fn key_type(&self) -> KeyType {
        self.key_type
    }

    pub(super) fn always_authenticate(&self) -> bool {
        self.usage.always_authenticate
    }

    /// How it signs messages. Digests it signs where the token has the mechanism without a hash.
    pub(super) fn schemes(&self) -> Vec<Scheme> {
        let candidates: Vec<Scheme> = match self.key_type {
            KeyType::Rsa => {
                let v15 = HASHES.map(Scheme::RsaPkcs1v15).into_iter();
                v15.chain([Scheme::RsaPkcs1v15Raw]).chain(NEW_HASHES.map(Scheme::RsaPss)).collect()
            }
            KeyType::Ecdsa(_) => NEW_HASHES.map(Scheme::Ecdsa).into(),
            KeyType::Ed25519 => vec![Scheme::Ed25519],
            _ => Vec::new(),
        };
        let empty = Input::Message(Cow::Borrowed(&[]));
        candidates.into_iter().filter(|scheme| self.plan(*scheme, &empty).is_ok()).collect()
    }

    /// How it decrypts. `oaep_sha256` says whether the token takes OAEP with another hash than SHA-1.
    pub(super) fn decrypts(&self, pkcs1: bool, oaep_sha256: bool) -> Vec<DecryptScheme> {
        let mut schemes = Vec::new();
        if self.key_type == KeyType::Rsa && self.usage.decrypt {
            if self.has(MechanismType::RSA_PKCS_OAEP) {
                schemes.push(DecryptScheme::RsaOaep(Hash::Sha1));
                schemes.extend(oaep_sha256.then_some(DecryptScheme::RsaOaep(Hash::Sha256)));
            }
            if pkcs1 && self.has(MechanismType::RSA_PKCS) {
                schemes.push(DecryptScheme::RsaPkcs1v15);
            }
        }
        schemes
    }

    /// How it agrees on secrets.
    pub(super) fn derives(&self) -> Vec<DeriveScheme> {
        let can = self.usage.derive && self.has(MechanismType::ECDH1_DERIVE);
        match self.key_type {
            KeyType::Ecdsa(_) if can => vec![DeriveScheme::Ecdh],
            KeyType::X25519 if can => vec![DeriveScheme::X25519],
            _ => Vec::new(),
        }
    }

    /// Whether OAEP can be tried out with it.
    pub(super) fn has_oaep(&self) -> bool {
        self.key_type == KeyType::Rsa && self.usage.decrypt && self.has(MechanismType::RSA_PKCS_OAEP)
    }

    /// How to sign this. The hash is made here wherever the token allows: that is faster than to send it the message, and
    /// serves digests the same way.
    pub(super) fn plan<'a>(&self, scheme: Scheme, input: &'a Input<'_>) -> Result<Plan<'a>, DeviceError> {
        const WRONG_DIGEST: DeviceError = DeviceError::unsupported("the digest is not as long as its hash makes them");
        if !self.usage.sign {
            return Err(DeviceError::unsupported("the token does not let this key sign"));
        }
        let digest = |hash: Hash| input.digest(hash).ok_or(WRONG_DIGEST);
        let owned = |mechanism, data: &[u8]| Plan { mechanism, data: Cow::Owned(data.to_vec()) };
        match (self.key_type, scheme) {
            (_, Scheme::RsaPss(Hash::Sha1) | Scheme::Ecdsa(Hash::Sha1)) => Err(NO_SUCH_SCHEME),
            (KeyType::Rsa, Scheme::RsaPkcs1v15(hash)) => {
                if let Some(plan) = self.padded(&[digest_info(hash), digest(hash)?.as_ref()].concat())? {
                    return Ok(plan);
                }
                self.whole_message(rsa_with_hash(hash), input)
            }
            (KeyType::Rsa, Scheme::RsaPkcs1v15Raw) => self.padded(input.bytes())?.ok_or(NO_MECHANISM),
            (KeyType::Rsa, Scheme::RsaPss(hash)) => {
                // As much as EMSA-PSS needs (RFC 8017, 9.1.1) with a salt as long as the digest.
                if self.modulus < 2 * hash.digest_len() + 2 {
                    return Err(DeviceError::unsupported("the modulus is too short for a signature with this hash"));
                }
                if self.has(MechanismType::RSA_PKCS_PSS) {
                    return Ok(owned(Mechanism::RsaPkcsPss(pss(hash)), digest(hash)?.as_ref()));
                }
                self.whole_message(pss_with_hash(hash), input)
            }
            (KeyType::Ecdsa(curve), Scheme::Ecdsa(hash)) => {
                let digest = input.ecdsa_digest(hash, curve).ok_or(WRONG_DIGEST)?;
                if self.has(MechanismType::ECDSA) {
                    return Ok(owned(Mechanism::Ecdsa, digest.as_ref()));
                }
                self.whole_message(ecdsa_with_hash(hash), input)
            }
            (KeyType::Ed25519, Scheme::Ed25519) => {
                self.whole_message(Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519)), input)
            }
            _ => Err(NO_SUCH_SCHEME),
        }
    }

    /// With the padding of PKCS#1 v1.5 around `data`: the token's, or ours where it only has the bare arithmetic.
    fn padded<'a>(&self, data: &[u8]) -> Result<Option<Plan<'a>>, DeviceError> {
        let max = self.modulus.saturating_sub(PKCS1_OVERHEAD);
        if data.len() > max {
            return Err(DeviceError::TooLong { max });
        }
        let (mechanism, data) = if self.has(MechanismType::RSA_PKCS) {
            (Mechanism::RsaPkcs, data.to_vec())
        } else if self.has(MechanismType::RSA_X_509) {
            let mut padded = vec![0xff; self.modulus - data.len() - 1];
            padded[..2].copy_from_slice(&[0, 1]);
            padded.push(0);
            padded.extend_from_slice(data);
            (Mechanism::RsaX509, padded)
        } else {
            return Ok(None);
        };
        Ok(Some(Plan { mechanism, data: Cow::Owned(data) }))
    }

    /// A mechanism that takes the message as it is.
    fn whole_message<'a>(&self, mechanism: Mechanism<'static>, input: &'a Input<'_>) -> Result<Plan<'a>, DeviceError> {
        if !self.has(mechanism.mechanism_type()) {
            return Err(NO_MECHANISM);
        }
        let message = input
            .message()
            .ok_or(DeviceError::unsupported("the token signs whole messages with this key, no digests"))?;
        Ok(Plan { mechanism, data: Cow::Borrowed(message) })
    }

    /// How to decrypt.
    pub(super) fn decryption<'a>(&self, scheme: DecryptScheme, label: &'a [u8]) -> Result<Mechanism<'a>, DeviceError> {
        match scheme {
            DecryptScheme::RsaOaep(hash) => {
                let source =
                    if label.is_empty() { PkcsOaepSource::empty() } else { PkcsOaepSource::data_specified(label) };
                Ok(Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash_mechanism(hash), mgf(hash), source)))
            }
            DecryptScheme::RsaPkcs1v15 if label.is_empty() => Ok(Mechanism::RsaPkcs),
            DecryptScheme::RsaPkcs1v15 => Err(DeviceError::unsupported("PKCS#1 v1.5 has no label")),
        }
    }
}

const NO_SUCH_SCHEME: DeviceError = DeviceError::unsupported("such a key has no such scheme");
const NO_MECHANISM: DeviceError = DeviceError::unsupported("the token has no mechanism for this scheme");

/// The DER in front of a digest (RFC 8017, 9.2, note 1).
fn digest_info(hash: Hash) -> &'static [u8] {
    match hash {
        Hash::Sha1 => &[0x30, 0x21, 0x30, 9, 6, 5, 0x2b, 0x0e, 3, 2, 0x1a, 5, 0, 4, 0x14],
        Hash::Sha256 => &[0x30, 0x31, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20],
        Hash::Sha384 => &[0x30, 0x41, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 2, 5, 0, 4, 0x30],
        Hash::Sha512 => &[0x30, 0x51, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 3, 5, 0, 4, 0x40],
    }
}

fn rsa_with_hash(hash: Hash) -> Mechanism<'static> {
    match hash {
        Hash::Sha1 => Mechanism::Sha1RsaPkcs,
        Hash::Sha256 => Mechanism::Sha256RsaPkcs,
        Hash::Sha384 => Mechanism::Sha384RsaPkcs,
        Hash::Sha512 => Mechanism::Sha512RsaPkcs,
    }
}

fn pss_with_hash(hash: Hash) -> Mechanism<'static> {
    match hash {
        Hash::Sha1 => Mechanism::Sha1RsaPkcsPss(pss(hash)),
        Hash::Sha256 => Mechanism::Sha256RsaPkcsPss(pss(hash)),
        Hash::Sha384 => Mechanism::Sha384RsaPkcsPss(pss(hash)),
        Hash::Sha512 => Mechanism::Sha512RsaPkcsPss(pss(hash)),
    }
}

fn ecdsa_with_hash(hash: Hash) -> Mechanism<'static> {
    match hash {
        Hash::Sha1 => Mechanism::EcdsaSha1,
        Hash::Sha256 => Mechanism::EcdsaSha256,
        Hash::Sha384 => Mechanism::EcdsaSha384,
        Hash::Sha512 => Mechanism::EcdsaSha512,
    }
}

fn pss(hash: Hash) -> PkcsPssParams {
    let salt = Ulong::new(hash.digest_len() as _);
    PkcsPssParams { hash_alg: hash_mechanism(hash), mgf: mgf(hash), s_len: salt }
}

fn hash_mechanism(hash: Hash) -> MechanismType {
    match hash {
        Hash::Sha1 => MechanismType::SHA1,
        Hash::Sha256 => MechanismType::SHA256,
        Hash::Sha384 => MechanismType::SHA384,
        Hash::Sha512 => MechanismType::SHA512,
    }
}

fn mgf(hash: Hash) -> PkcsMgfType {
    match hash {
        Hash::Sha1 => PkcsMgfType::MGF1_SHA1,
        Hash::Sha256 => PkcsMgfType::MGF1_SHA256,
        Hash::Sha384 => PkcsMgfType::MGF1_SHA384,
        Hash::Sha512 => PkcsMgfType::MGF1_SHA512,
    }
}
