//! Keys in this process's memory: how they are made, used and sealed. Knows private values and arithmetic; no policy.

pub mod ed25519;
mod generate;
pub mod kind;
mod pkcs1;

use std::{
    borrow::Cow,
    fmt,
    sync::{PoisonError, RwLock},
};

use aws_lc_rs::{
    agreement::{self, UnparsedPublicKey, agree},
    signature::{self as lc, EcdsaKeyPair, KeyPair},
};
use fips204::{
    ml_dsa_44,
    traits::{KeyGen, SerDes, Signer as _},
};
use zeroize::Zeroizing;

use super::{
    DecryptScheme, DeriveScheme, DeviceError, Input, Open, Operation, Outcome, PrivateHalf, Scheme, Seal, Signature,
};
use crate::{
    public_key::{Curve, KeyType, MLDSA44_ED25519_LABEL, PublicKey, mldsa44_ed25519_message},
    sys::{
        ed25519::Ed25519Key,
        rsa::{RsaIntegers, RsaKey},
    },
};
use ed25519::ExpandedKey;

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
    /// The scalar with its nonce prefix, and the public point.
    Ed25519Expanded {
        /// 64 bytes.
        secret: &'a [u8],
        /// 32 bytes.
        public: &'a [u8],
    },
    /// The scalar and the public u coordinate.
    X25519 {
        /// 32 bytes; clamped when it is used, as RFC 7748 says.
        secret: &'a [u8],
        /// 32 bytes.
        public: &'a [u8],
    },
}

impl<'a> SoftParts<'a> {
    /// The public half, as it was given.
    pub fn public(&self) -> PublicKey<'a> {
        match *self {
            Self::Ed25519 { public, .. } | Self::Ed25519Expanded { public, .. } => PublicKey::Ed25519(public),
            Self::Ecdsa { curve, point, .. } => PublicKey::Ecdsa(curve, point),
            Self::Rsa(RsaIntegers { n, e, .. }) => PublicKey::Rsa { e, n },
            Self::MlDsa44Ed25519 { public: (mldsa, ed25519), .. } => PublicKey::MlDsa44Ed25519(mldsa, ed25519),
            Self::X25519 { public, .. } => PublicKey::X25519(public),
        }
    }
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

/// Parsed once, when the key is added. The private values stay beside what aws-lc makes of them, since aws-lc-rs gives them
/// back only in buffers that it does not wipe. They are boxed: a value that moves leaves copies on the stack.
enum Signer {
    Ed25519(Ed25519Key),
    Ecdsa { curve: Curve, pair: EcdsaKeyPair, scalar: Zeroizing<Box<[u8]>> },
    Rsa(RsaKey),
    MlDsa44Ed25519 { mldsa: Box<ml_dsa_44::PrivateKey>, ed25519: Ed25519Key, seeds: Zeroizing<Box<[u8]>> },
    Ed25519Expanded(Box<ExpandedKey>),
    X25519 { key: agreement::PrivateKey, scalar: Zeroizing<Box<[u8]>> },
}

impl fmt::Debug for SoftKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SoftKey({})", self.key_type.name())
    }
}

const MISMATCH: DeviceError = DeviceError::unsupported("the private and the public half do not belong together");
const WRONG_SCHEME: DeviceError = DeviceError::unsupported("the scheme is not one of this key type");
const WRONG_DIGEST: DeviceError = DeviceError::unsupported("the digest is not as long as the scheme's hash makes them");
const WANTS_MESSAGE: DeviceError = DeviceError::unsupported("the scheme signs messages, not digests");
const WRONG_CIPHERTEXT: DeviceError = DeviceError::unsupported(
    "the ciphertext is not a number below the key's modulus, written with as many bytes as the modulus",
);
const NOT_FOR_THIS_KEY: DeviceError =
    DeviceError::unsupported("the ciphertext was not made for this key with this hash and label");
const WRONG_PEER: DeviceError =
    DeviceError::unsupported("the peer's public key is not one of the key's curve, in the scheme's form");

fn failed() -> DeviceError {
    DeviceError::Failed("the arithmetic of the key failed".into())
}

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
            SoftParts::Ed25519Expanded { secret, public } => {
                let key = ExpandedKey::new((*secret).try_into().map_err(|_| MISMATCH)?).ok_or(MISMATCH)?;
                if key.public() != *public {
                    return Err(MISMATCH);
                }
                Signer::Ed25519Expanded(Box::new(key))
            }
            SoftParts::X25519 { secret, public } => {
                let (signer, made) = Signer::x25519(secret)?;
                if made.as_ref() != *public {
                    return Err(MISMATCH);
                }
                signer
            }
        };
        Ok(Self { key_type: signer.key_type(), state: RwLock::new(State::Open(signer)) })
    }

    /// Its type.
    pub fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// [`kind::is_fast`] of its type.
    pub fn is_fast(&self) -> bool {
        kind::is_fast(self.key_type)
    }

    /// [`kind::schemes`] of its type.
    pub fn schemes(&self) -> &'static [Scheme] {
        kind::schemes(self.key_type)
    }

    /// [`kind::decrypts`] of its type.
    pub fn decrypts(&self) -> &'static [DecryptScheme] {
        kind::decrypts(self.key_type)
    }

    /// [`kind::derives`] of its type.
    pub fn derives(&self) -> &'static [DeriveScheme] {
        kind::derives(self.key_type)
    }

    /// Does what the key's type claims. [`Unsupported`](DeviceError::Unsupported) for everything else, for digests of a
    /// wrong length, for ciphertexts and peers that are none of this key's; never for bad padding of PKCS#1 v1.5.
    pub fn operate(&self, operation: &Operation<'_>) -> Result<Outcome, DeviceError> {
        let claimed = operation.is_among(self.schemes(), self.decrypts(), self.derives());
        if !claimed {
            return Err(WRONG_SCHEME);
        }
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => match operation {
                Operation::Sign { scheme, input } => signer.sign(*scheme, input).map(Outcome::Signature),
                Operation::Decrypt { scheme, label, ciphertext } => {
                    signer.decrypt(*scheme, label, ciphertext).map(Outcome::Secret)
                }
                Operation::Derive { peer, .. } => signer.derive(peer).map(Outcome::Secret),
            },
            State::Sealed(_) => Err(DeviceError::Sealed),
        }
    }

    /// Signs `data`, hashing it as the scheme says.
    pub fn sign(&self, scheme: Scheme, data: &[u8]) -> Result<Signature, DeviceError> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => signer.sign(scheme, &Input::Message(Cow::Borrowed(data))),
            State::Sealed(_) => Err(DeviceError::Sealed),
        }
    }

    /// A copy of its private values, for a device that takes the key over. [`Unsupported`](DeviceError::Unsupported) for
    /// kinds that none does.
    pub fn private_half(&self) -> Result<PrivateHalf, DeviceError> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => signer.private_half(),
            State::Sealed(_) => Err(DeviceError::Sealed),
        }
    }

    /// Its private values in the form that [`from_secret`](Self::from_secret) takes: of each type its own, and of a length
    /// that the type or the values themselves tell.
    pub fn secret(&self) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => signer.secret(),
            State::Sealed(_) => Err(DeviceError::Sealed),
        }
    }

    /// The key of this type with these private values. Only what [`secret`](Self::secret) gave is for it: that an ECDSA
    /// key's halves belong together shows here, and of other types nothing else is there.
    pub fn from_secret(key_type: KeyType, secret: &[u8]) -> Result<Self, DeviceError> {
        Ok(Self { key_type, state: RwLock::new(State::Open(Signer::from_secret(key_type, secret)?)) })
    }

    /// The blob of its public half.
    pub fn public_blob(&self) -> Result<Vec<u8>, DeviceError> {
        match &*self.state.read().unwrap_or_else(PoisonError::into_inner) {
            State::Open(signer) => signer.public_blob(),
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

impl Signer {
    fn ed25519(seed: &[u8], public: &[u8]) -> Result<Self, DeviceError> {
        let key = Ed25519Key::from_seed(seed).filter(|key| key.public() == public).ok_or(MISMATCH)?;
        Ok(Self::Ed25519(key))
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
        let ed25519 = Ed25519Key::from_seed(ed_seed).ok_or(MISMATCH)?;
        let (ml_public, mldsa) = ml_dsa_44::KG::keygen_from_seed(ml_seed);
        let public = [&ml_public.into_bytes()[..], ed25519.public()].concat();
        Ok((Self::MlDsa44Ed25519 { mldsa: Box::new(mldsa), ed25519, seeds: Zeroizing::new(seeds.into()) }, public))
    }

    /// The key, and the public key that the scalar makes.
    fn x25519(scalar: &[u8]) -> Result<(Self, agreement::PublicKey), DeviceError> {
        let key = agreement::PrivateKey::from_private_key(&agreement::X25519, scalar).map_err(|_| MISMATCH)?;
        let public = key.compute_public_key().map_err(|_| MISMATCH)?;
        Ok((Self::X25519 { key, scalar: Zeroizing::new(scalar.into()) }, public))
    }

    fn key_type(&self) -> KeyType {
        match self {
            Self::Ed25519Expanded(_) => KeyType::Ed25519Expanded,
            Self::X25519 { .. } => KeyType::X25519,
            Self::Ed25519(_) => KeyType::Ed25519,
            Self::Ecdsa { curve, .. } => KeyType::Ecdsa(*curve),
            Self::Rsa(_) => KeyType::Rsa,
            Self::MlDsa44Ed25519 { .. } => KeyType::MlDsa44Ed25519,
        }
    }

    fn sign(&self, scheme: Scheme, input: &Input<'_>) -> Result<Signature, DeviceError> {
        let bytes = match (self, scheme) {
            (Self::Ed25519(key), Scheme::Ed25519) => {
                key.sign(input.message().ok_or(WANTS_MESSAGE)?).ok_or_else(failed)?.to_vec()
            }
            (Self::Ed25519(key), Scheme::Ed25519BlindedTor) => {
                sign_blinded(&ExpandedKey::from_seed(key.seed()).ok_or_else(failed)?, input)?
            }
            (Self::Ed25519Expanded(key), Scheme::Ed25519) => key.sign(input.message().ok_or(WANTS_MESSAGE)?).to_vec(),
            (Self::Ed25519Expanded(key), Scheme::Ed25519BlindedTor) => sign_blinded(key, input)?,
            (Self::Ecdsa { curve, pair, .. }, Scheme::Ecdsa(hash)) => {
                let digest = input.ecdsa_digest(hash, *curve).ok_or(WRONG_DIGEST)?;
                pair.sign_digest(&digest).as_ref().map_err(|_| failed())?.as_ref().to_vec()
            }
            (Self::Rsa(key), _) => sign_rsa(key, scheme, input)?,
            (Self::MlDsa44Ed25519 { mldsa, ed25519, .. }, Scheme::MlDsa44Ed25519) => {
                let message = mldsa44_ed25519_message(input.message().ok_or(WANTS_MESSAGE)?);
                let mut both = mldsa.try_sign(&message, MLDSA44_ED25519_LABEL).map_err(|_| failed())?.to_vec();
                both.extend_from_slice(&ed25519.sign(&message).ok_or_else(failed)?);
                both
            }
            _ => return Err(WRONG_SCHEME),
        };
        Signature::from_bytes(scheme, self.key_type(), bytes).ok_or_else(failed)
    }

    fn decrypt(
        &self,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let Self::Rsa(key) = self else { return Err(WRONG_SCHEME) };
        if ciphertext.len() != key.size() {
            return Err(WRONG_CIPHERTEXT);
        }
        match scheme {
            DecryptScheme::RsaOaep(hash) => key.decrypt_oaep(hash, label, ciphertext).ok_or(NOT_FOR_THIS_KEY),
            DecryptScheme::RsaPkcs1v15 => {
                let encoded = key.decrypt_raw(ciphertext).ok_or(WRONG_CIPHERTEXT)?;
                Ok(pkcs1::unpad(&encoded, ciphertext, &key.private_exponent().ok_or_else(failed)?))
            }
        }
    }

    fn derive(&self, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let made;
        let (algorithm, key, len) = match self {
            Self::X25519 { key, .. } => (&agreement::X25519, key, 32),
            Self::Ecdsa { curve, scalar, .. } => {
                let algorithm = match curve {
                    Curve::P256 => &agreement::ECDH_P256,
                    Curve::P384 => &agreement::ECDH_P384,
                    Curve::P521 => &agreement::ECDH_P521,
                };
                // Made for each use: cheap beside the agreement, and most ECDSA keys never come here.
                made = agreement::PrivateKey::from_private_key(algorithm, scalar).map_err(|_| failed())?;
                (algorithm, &made, 1 + 2 * curve.scalar_len())
            }
            _ => return Err(WRONG_SCHEME),
        };
        // aws-lc-rs would take other forms of a point, too.
        if peer.len() != len || matches!(self, Self::Ecdsa { .. }) && peer[0] != 4 {
            return Err(WRONG_PEER);
        }
        agree(key, UnparsedPublicKey::new(algorithm, peer), WRONG_PEER, |secret| Ok(Zeroizing::new(secret.to_vec())))
    }

    fn private_half(&self) -> Result<PrivateHalf, DeviceError> {
        let parts = match self {
            Self::Ed25519(key) => SoftParts::Ed25519 { seed: key.seed(), public: key.public() },
            Self::Ecdsa { curve, pair, scalar } => {
                SoftParts::Ecdsa { curve: *curve, scalar, point: pair.public_key().as_ref() }
            }
            Self::Rsa(key) => {
                let half = key.with_integers(|&RsaIntegers { n, e, d, iqmp, p, q }| {
                    PrivateHalf::of(&SoftParts::Rsa(RsaIntegers { n, e, d, iqmp, p, q }))
                });
                return half.ok_or_else(failed)?;
            }
            Self::X25519 { key, scalar } => {
                let public = key.compute_public_key().map_err(|_| failed())?;
                return PrivateHalf::of(&SoftParts::X25519 { secret: scalar, public: public.as_ref() });
            }
            Self::MlDsa44Ed25519 { .. } | Self::Ed25519Expanded(_) => {
                return Err(DeviceError::unsupported("no device takes a key of this kind"));
            }
        };
        PrivateHalf::of(&parts)
    }

    fn public_blob(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(match self {
            Self::Ed25519(key) => PublicKey::Ed25519(key.public()).to_blob(),
            Self::Ed25519Expanded(key) => PublicKey::Ed25519(key.public()).to_blob(),
            Self::Ecdsa { curve, pair, .. } => PublicKey::Ecdsa(*curve, pair.public_key().as_ref()).to_blob(),
            Self::Rsa(key) => key
                .with_integers(|integers| PublicKey::rsa(integers.n, integers.e).map(|public| public.to_blob()))
                .and_then(Result::ok)
                .ok_or_else(failed)?,
            Self::X25519 { key, .. } => {
                PublicKey::X25519(key.compute_public_key().map_err(|_| failed())?.as_ref()).to_blob()
            }
            Self::MlDsa44Ed25519 { seeds, .. } => {
                let (_, public) = Self::mldsa44_ed25519(seeds)?;
                let (mldsa, ed25519) = public.split_at_checked(ml_dsa_44::PK_LEN).ok_or_else(failed)?;
                PublicKey::MlDsa44Ed25519(mldsa, ed25519).to_blob()
            }
        })
    }

    /// The private values, from which [`Signer::from_secret`] makes the signer again.
    fn secret(&self) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        Ok(match self {
            Self::Ed25519(key) => Zeroizing::new(key.seed().to_vec()),
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
            Self::Ed25519Expanded(key) => Zeroizing::new(key.to_bytes().to_vec()),
            Self::X25519 { scalar, .. } => Zeroizing::new(scalar.to_vec()),
        })
    }

    fn from_secret(key_type: KeyType, secret: &[u8]) -> Result<Self, DeviceError> {
        match key_type {
            KeyType::Ed25519 => Ok(Self::Ed25519(Ed25519Key::from_seed(secret).ok_or(MISMATCH)?)),
            KeyType::Ecdsa(curve) => {
                let (scalar, point) = secret.split_at_checked(curve.scalar_len()).ok_or(MISMATCH)?;
                Self::ecdsa(curve, scalar, point)
            }
            KeyType::Rsa => Ok(Self::Rsa(RsaKey::from_der(secret).ok_or(MISMATCH)?)),
            KeyType::MlDsa44Ed25519 => Ok(Self::mldsa44_ed25519(secret)?.0),
            KeyType::Ed25519Expanded => {
                let secret = secret.try_into().map_err(|_| MISMATCH)?;
                ExpandedKey::new(secret).map(|key| Self::Ed25519Expanded(Box::new(key))).ok_or(MISMATCH)
            }
            KeyType::X25519 => Ok(Self::x25519(secret)?.0),
            KeyType::SkEd25519 | KeyType::SkEcdsa => Err(MISMATCH),
        }
    }
}

/// The input is the parameter, then the message.
fn sign_blinded(key: &ExpandedKey, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
    const NO_PARAMETER: DeviceError =
        DeviceError::unsupported("a blinded signature's input begins with the 32 bytes of its parameter");
    let (parameter, message) = input.message().ok_or(WANTS_MESSAGE)?.split_first_chunk().ok_or(NO_PARAMETER)?;
    Ok(key.sign_blinded(parameter, message).to_vec())
}

fn sign_rsa(key: &RsaKey, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
    const TOO_SHORT: DeviceError = DeviceError::unsupported("the key is too short for PSS with this hash");
    match scheme {
        Scheme::RsaPkcs1v15(hash) => {
            key.sign_digest(hash, input.digest(hash).ok_or(WRONG_DIGEST)?.as_ref()).ok_or_else(failed)
        }
        Scheme::RsaPkcs1v15Raw => {
            let max = key.size() - pkcs1::OVERHEAD;
            if input.bytes().len() > max {
                return Err(DeviceError::TooLong { max });
            }
            key.sign_raw(input.bytes()).ok_or_else(failed)
        }
        Scheme::RsaPss(hash) => {
            // The shortest keys with SHA-512 are the only ones that PSS does not fit in.
            key.sign_pss(hash, input.digest(hash).ok_or(WRONG_DIGEST)?.as_ref()).ok_or(TOO_SHORT)
        }
        _ => Err(WRONG_SCHEME),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{devices::verify::verify, rfc4251::Put};

    fn composite() -> (SoftKey, Vec<u8>) {
        let seeds = [[3; 32], [4; 32]].concat();
        let (ml_public, _) = ml_dsa_44::KG::keygen_from_seed(&[3; 32]);
        let ed25519 = Ed25519Key::from_seed(&[4; 32]).unwrap();
        let (mldsa, ed25519) = (ml_public.into_bytes(), ed25519.public().to_vec());
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
        let own_form = key.sign(Scheme::MlDsa44Ed25519, b"data").unwrap();
        for (data, is_signed) in [(b"data", true), (b"else", false)] {
            assert_eq!(verify(&blob, Scheme::MlDsa44Ed25519, &Input::Message(data.into()), &own_form), is_signed);
        }
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
    fn a_key_that_leaves_is_the_same_elsewhere() {
        let x25519 = agreement::PrivateKey::from_private_key(&agreement::X25519, &[9; 32]).unwrap();
        let ed25519 = Ed25519Key::from_seed(&[9; 32]).unwrap();
        let scalar = [&[0; 4][..], &[9; 28]].concat();
        let p256 = agreement::PrivateKey::from_private_key(&agreement::ECDH_P256, &scalar).unwrap();
        let (x25519, p256) = (x25519.compute_public_key().unwrap(), p256.compute_public_key().unwrap());
        for parts in [
            SoftParts::Ed25519 { seed: &[9; 32], public: ed25519.public() },
            SoftParts::X25519 { secret: &[9; 32], public: x25519.as_ref() },
            SoftParts::Ecdsa { curve: Curve::P256, scalar: &scalar, point: p256.as_ref() },
        ] {
            let key = SoftKey::new(&parts).unwrap();
            let half = key.private_half().unwrap();
            let again = SoftKey::new(&half.parts().unwrap()).unwrap();
            assert_eq!(again.private_half().unwrap().as_bytes(), half.as_bytes());
            assert_eq!(again.key_type, key.key_type);
        }
        assert!(matches!(composite().0.private_half(), Err(DeviceError::Unsupported(_))));
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
            Some("this cannot be done")
        );
    }
}
