//! Keys in this process's memory: how they are made, used and sealed. Knows private values and arithmetic; no policy.

use std::{
    fmt,
    sync::{PoisonError, RwLock},
};

use aws_lc_rs::{
    digest,
    rand::SystemRandom,
    signature::{self as lc, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
};
use fips204::{
    ml_dsa_44,
    traits::{KeyGen, SerDes, Signer as _},
};
use zeroize::Zeroizing;

use super::{DeviceError, Hash, Input, Open, Operation, Outcome, Scheme, Seal, Signature};
use crate::{
    public_key::{Curve, KeyType, MLDSA44_ED25519_LABEL, mldsa44_ed25519_message},
    sys::rsa::{RsaIntegers, RsaKey},
};

/// The private values of a key as SSH writes them, borrowed from the message that brought them.
pub enum SoftParts<'a> {
    /// The seed and the public point.
    Ed25519 {
        /// 32 bytes.
        seed: &'a [u8],
        /// 32 bytes.
        public: &'a [u8],
    },
    /// The scalar's magnitude and the uncompressed point.
    Ecdsa {
        /// The curve of both.
        curve: Curve,
        /// At most as long as the curve's scalars.
        scalar: &'a [u8],
        /// `04 ‖ x ‖ y`.
        point: &'a [u8],
    },
    /// The six integers.
    Rsa(RsaIntegers<'a>),
    /// Two seeds and two public keys.
    MlDsa44Ed25519 {
        /// ML-DSA's seed, then Ed25519's, 32 bytes each.
        seeds: &'a [u8],
        /// The public halves, as in the key's blob.
        public: (&'a [u8], &'a [u8]),
    },
}

/// A private key that is open for signing, or sealed while the vault is locked.
pub struct SoftKey {
    key_type: KeyType,
    state: RwLock<State>,
}

enum State {
    Open(Signer),
    Sealed(Box<[u8]>),
}

/// Parsed once, when the key is added. The seeds stay beside what aws-lc makes of them, since aws-lc-rs gives them
/// back only in buffers that it does not wipe. They are boxed: a value that moves leaves copies on the stack.
enum Signer {
    Ed25519 { pair: Ed25519KeyPair, seed: Zeroizing<Box<[u8]>> },
    Ecdsa { curve: Curve, pair: EcdsaKeyPair, scalar: Zeroizing<Box<[u8]>> },
    Rsa(RsaKey),
    MlDsa44Ed25519 { mldsa: Box<ml_dsa_44::PrivateKey>, ed25519: Ed25519KeyPair, seeds: Zeroizing<Box<[u8]>> },
}

impl fmt::Debug for SoftKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SoftKey({})", self.key_type.name())
    }
}

const MISMATCH: DeviceError = DeviceError::unsupported("the private and the public half do not belong together");

impl SoftKey {
    /// Parses and checks a key: its private half must make its public half.
    pub fn new(parts: &SoftParts<'_>) -> Result<Self, DeviceError> {
        let signer = match parts {
            SoftParts::Ed25519 { seed, public } => Signer::ed25519(seed, public)?,
            SoftParts::Ecdsa { curve, scalar, point } => Signer::ecdsa(*curve, scalar, point)?,
            SoftParts::Rsa(integers) => Signer::Rsa(RsaKey::from_integers(integers).ok_or(MISMATCH)?),
            SoftParts::MlDsa44Ed25519 { seeds, public: (mldsa, ed25519) } => {
                let (signer, made) = Signer::mldsa44_ed25519(seeds)?;
                if made != [*mldsa, *ed25519].concat() {
                    return Err(MISMATCH);
                }
                signer
            }
        };
        Ok(Self { key_type: signer.key_type(), state: RwLock::new(State::Open(signer)) })
    }

    /// Whether a signature takes so little time (some ten microseconds) that handing it to another thread costs more.
    pub fn is_fast(&self) -> bool {
        matches!(self.key_type, KeyType::Ed25519 | KeyType::Ecdsa(Curve::P256 | Curve::P384))
    }

    /// Does what it is asked.
    pub fn operate(&self, operation: &Operation<'_>) -> Result<Outcome, DeviceError> {
        match operation {
            Operation::Sign { scheme, input: Input::Message(data) } => self.sign(*scheme, data).map(Outcome::Signature),
            _ => Err(DeviceError::unsupported("soft keys make signatures only")),
        }
    }

    /// Signs `data`, hashing it as the scheme says.
    pub fn sign(&self, scheme: Scheme, data: &[u8]) -> Result<Signature, DeviceError> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => signer.sign(scheme, data),
            State::Sealed(_) => Err(DeviceError::Sealed),
        }
    }

    /// Replaces the key by what `seal` makes of its private values. Waits for signatures that are being made.
    pub fn seal(&self, seal: Seal<'_>) -> Result<(), DeviceError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Open(signer) = &*state {
            *state = State::Sealed(seal(&signer.secret()?)?);
        }
        Ok(())
    }

    /// Brings a sealed key back; `open` undoes what `seal` did.
    pub fn unseal(&self, open: Open<'_>) -> Result<(), DeviceError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if let State::Sealed(sealed) = &*state {
            *state = State::Open(Signer::from_secret(self.key_type, &open(sealed)?)?);
        }
        Ok(())
    }
}

/// The hash that RFC 5656, section 6.2.1, gives a curve.
pub fn curve_hash(curve: Curve) -> Hash {
    match curve {
        Curve::P256 => Hash::Sha256,
        Curve::P384 => Hash::Sha384,
        Curve::P521 => Hash::Sha512,
    }
}

impl Signer {
    fn ed25519(seed: &[u8], public: &[u8]) -> Result<Self, DeviceError> {
        if seed.len() != 32 {
            return Err(MISMATCH);
        }
        let pair = Ed25519KeyPair::from_seed_and_public_key(seed, public).map_err(|_| MISMATCH)?;
        Ok(Self::Ed25519 { pair, seed: Zeroizing::new(seed.into()) })
    }

    fn ecdsa(curve: Curve, scalar: &[u8], point: &[u8]) -> Result<Self, DeviceError> {
        let zeros = curve.scalar_len().checked_sub(scalar.len()).ok_or(MISMATCH)?;
        let mut fixed = Zeroizing::new(vec![0; curve.scalar_len()].into_boxed_slice());
        fixed[zeros..].copy_from_slice(scalar);
        let scheme = match curve {
            Curve::P256 => &lc::ECDSA_P256_SHA256_FIXED_SIGNING,
            Curve::P384 => &lc::ECDSA_P384_SHA384_FIXED_SIGNING,
            Curve::P521 => &lc::ECDSA_P521_SHA512_FIXED_SIGNING,
        };
        let pair = EcdsaKeyPair::from_private_key_and_public_key(scheme, &fixed, point).map_err(|_| MISMATCH)?;
        Ok(Self::Ecdsa { curve, pair, scalar: fixed })
    }

    /// The signer, and the public key that the seeds make.
    fn mldsa44_ed25519(seeds: &[u8]) -> Result<(Self, Vec<u8>), DeviceError> {
        let (ml_seed, ed_seed) = seeds.split_first_chunk::<32>().ok_or(MISMATCH)?;
        if ed_seed.len() != 32 {
            return Err(MISMATCH);
        }
        let (ml_public, mldsa) = ml_dsa_44::KG::keygen_from_seed(ml_seed);
        let ed25519 = Ed25519KeyPair::from_seed_unchecked(ed_seed).map_err(|_| MISMATCH)?;
        let public = [&ml_public.into_bytes()[..], ed25519.public_key().as_ref()].concat();
        Ok((Self::MlDsa44Ed25519 { mldsa: Box::new(mldsa), ed25519, seeds: Zeroizing::new(seeds.into()) }, public))
    }

    fn key_type(&self) -> KeyType {
        match self {
            Self::Ed25519 { .. } => KeyType::Ed25519,
            Self::Ecdsa { curve, .. } => KeyType::Ecdsa(*curve),
            Self::Rsa(_) => KeyType::Rsa,
            Self::MlDsa44Ed25519 { .. } => KeyType::MlDsa44Ed25519,
        }
    }

    fn sign(&self, scheme: Scheme, data: &[u8]) -> Result<Signature, DeviceError> {
        const FAILED: fn() -> DeviceError = || DeviceError::Failed("the signature could not be computed".into());
        match (self, scheme) {
            (Self::Ed25519 { pair, .. }, Scheme::Ed25519) => {
                let signature = pair.try_sign(data).map_err(|_| FAILED())?;
                Ok(Signature::Ed25519(signature.as_ref().try_into().map_err(|_| FAILED())?))
            }
            (Self::Ecdsa { curve, pair, .. }, Scheme::Ecdsa(hash)) if hash == curve_hash(*curve) => {
                let signature = pair.sign(&SystemRandom::new(), data).map_err(|_| FAILED())?;
                Ok(Signature::Ecdsa(*curve, signature.as_ref().to_vec()))
            }
            (Self::Rsa(key), Scheme::RsaPkcs1v15(hash)) => {
                let algorithm = match hash {
                    Hash::Sha1 => &digest::SHA1_FOR_LEGACY_USE_ONLY,
                    Hash::Sha256 => &digest::SHA256,
                    Hash::Sha384 => &digest::SHA384,
                    Hash::Sha512 => &digest::SHA512,
                };
                let digest = digest::digest(algorithm, data);
                Ok(Signature::Rsa(hash, key.sign_digest(hash, digest.as_ref()).ok_or_else(FAILED)?))
            }
            (Self::MlDsa44Ed25519 { mldsa, ed25519, .. }, Scheme::MlDsa44Ed25519) => {
                let message = mldsa44_ed25519_message(data);
                let mut both = mldsa.try_sign(&message, MLDSA44_ED25519_LABEL).map_err(|_| FAILED())?.to_vec();
                both.extend_from_slice(ed25519.try_sign(&message).map_err(|_| FAILED())?.as_ref());
                Ok(Signature::MlDsa44Ed25519(both))
            }
            _ => Err(DeviceError::unsupported("the scheme is not one of this key type")),
        }
    }

    /// The private values, from which [`Signer::from_secret`] makes the signer again.
    fn secret(&self) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        Ok(match self {
            Self::Ed25519 { seed, .. } => Zeroizing::new(seed.to_vec()),
            // The scalar, then the point.
            Self::Ecdsa { pair, scalar, .. } => {
                let point = pair.public_key().as_ref();
                let mut secret = Zeroizing::new(Vec::with_capacity(scalar.len() + point.len()));
                secret.extend_from_slice(scalar);
                secret.extend_from_slice(point);
                secret
            }
            Self::Rsa(key) => {
                key.to_der().ok_or_else(|| DeviceError::Failed("the RSA key could not be written".into()))?
            }
            Self::MlDsa44Ed25519 { seeds, .. } => Zeroizing::new(seeds.to_vec()),
        })
    }

    fn from_secret(key_type: KeyType, secret: &[u8]) -> Result<Self, DeviceError> {
        match key_type {
            KeyType::Ed25519 => {
                let pair = Ed25519KeyPair::from_seed_unchecked(secret).map_err(|_| MISMATCH)?;
                Ok(Self::Ed25519 { pair, seed: Zeroizing::new(secret.into()) })
            }
            KeyType::Ecdsa(curve) => {
                let (scalar, point) = secret.split_at_checked(curve.scalar_len()).ok_or(MISMATCH)?;
                Self::ecdsa(curve, scalar, point)
            }
            KeyType::Rsa => Ok(Self::Rsa(RsaKey::from_der(secret).ok_or(MISMATCH)?)),
            KeyType::MlDsa44Ed25519 => Ok(Self::mldsa44_ed25519(secret)?.0),
            KeyType::SkEd25519 | KeyType::SkEcdsa => Err(MISMATCH),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{public_key::PublicKey, rfc4251::Put};

    fn composite() -> (SoftKey, Vec<u8>) {
        let seeds = [[3; 32], [4; 32]].concat();
        let (ml_public, _) = ml_dsa_44::KG::keygen_from_seed(&[3; 32]);
        let ed25519 = Ed25519KeyPair::from_seed_unchecked(&[4; 32]).unwrap();
        let (mldsa, ed25519) = (ml_public.into_bytes(), ed25519.public_key().as_ref().to_vec());
        let parts = SoftParts::MlDsa44Ed25519 { seeds: &seeds, public: (&mldsa, &ed25519) };
        (SoftKey::new(&parts).unwrap(), PublicKey::MlDsa44Ed25519(&mldsa, &ed25519).to_blob())
    }

    #[test]
    fn the_composite_signs_with_both_halves_and_survives_a_lock() {
        let (key, blob) = composite();
        let public = PublicKey::parse(&blob).unwrap();
        let signed = || match key.sign(Scheme::MlDsa44Ed25519, b"data").unwrap() {
            Signature::MlDsa44Ed25519(bytes) => {
                let mut signature = Vec::new();
                signature.put_string(KeyType::MlDsa44Ed25519.name().as_bytes());
                signature.put_string(&bytes);
                signature
            }
            other => unreachable!("{other:?}"),
        };
        let signature = signed();
        assert!(public.verify(b"data", &signature).is_ok());
        assert!(public.verify(b"other", &signature).is_err());
        // Either half alone is no signature.
        for at in [signature.len() - 1, signature.len() - 65] {
            let mut broken = signature.clone();
            broken[at] ^= 1;
            assert!(public.verify(b"data", &broken).is_err());
        }
        key.seal(&mut |secret| Ok(secret.iter().map(|b| b ^ 0xff).collect())).unwrap();
        assert_eq!(key.sign(Scheme::MlDsa44Ed25519, b"data"), Err(DeviceError::Sealed));
        key.unseal(&mut |sealed| Ok(Zeroizing::new(sealed.iter().map(|b| b ^ 0xff).collect()))).unwrap();
        assert!(public.verify(b"data", &signed()).is_ok());
    }

    #[test]
    fn halves_that_do_not_belong_together_are_refused() {
        let seeds = [[3; 32], [4; 32]].concat();
        let (ml_public, _) = ml_dsa_44::KG::keygen_from_seed(&[5; 32]);
        let parts = SoftParts::MlDsa44Ed25519 { seeds: &seeds, public: (&ml_public.into_bytes(), &[0; 32]) };
        assert_eq!(SoftKey::new(&parts).unwrap_err(), MISMATCH);
        let parts = SoftParts::Ed25519 { seed: &[1; 32], public: &[2; 32] };
        assert_eq!(SoftKey::new(&parts).unwrap_err(), MISMATCH);
        assert_eq!(
            composite().0.sign(Scheme::Ed25519, b"").unwrap_err().to_string().split(':').next(),
            Some("the key cannot do this")
        );
    }
}
