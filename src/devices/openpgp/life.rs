//! Keys made on a card and keys brought to it, with their OpenPGP fingerprints. Knows what a card wants of a private key;
//! the admin PIN is `admin`'s.

use openpgp_card::{
    Error as CardError,
    ocard::{
        KeyType as OpenPgpSlot,
        algorithm::{AlgoSimple, AlgorithmAttributes, Curve as CardCurve},
        crypto::{CardUploadableKey, EccKey, EccType, PrivateKeyMaterial, PublicKeyMaterial, RSAKey},
        data::{Fingerprint, KeyGenerationTime},
    },
};
use secrecy::SecretString;
use std::time::{SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

use super::{
    admin::{on_card, set_touch},
    card::{Token, Trouble},
    keys,
};
use crate::{
    devices::{Algorithm, CardSlot, DeviceError, FoundKey, NewKey, PrivateHalf, soft::SoftParts},
    public_key::{Curve, PublicKey},
    rfc4251::Put,
    sys::rsa::RsaKey,
};

const NO_SLOT: DeviceError = DeviceError::unsupported("a card has the slots sign, decrypt and auth: say which");
const NO_ADMIN_PIN: DeviceError = DeviceError::unsupported("a card wants its admin PIN for that");
const WRONG_SLOT: DeviceError =
    DeviceError::unsupported("X25519 keys are for the slot decrypt, and Ed25519 keys for the others");
const NO_SUCH_KEYS: DeviceError =
    DeviceError::unsupported("cards have RSA keys of 2048, 3072 and 4096 bits, NIST curves, Ed25519 and X25519");
const NO_KEY: DeviceError = DeviceError::unsupported("the private key makes no sense");

impl Token {
    /// Makes a key in a slot, in the place of the one that is there. Its touch policy is set before it is made.
    pub(super) fn generate(&mut self, new: &NewKey) -> Result<FoundKey, DeviceError> {
        let (slot, secret) = place(new)?;
        let simple = simple(new.algorithm)?;
        self.with_admin(secret, |tx| {
            let attributes = simple.matching_algorithm_attributes(tx, on_card(slot)).map_err(refused)?;
            if tx.extended_capabilities()?.algo_attrs_changeable() {
                tx.set_algorithm_attributes(on_card(slot), &attributes).map_err(refused)?;
            }
            if let Some(touch) = new.touch {
                set_touch(tx, slot, touch)?;
            }
            tx.generate_key(fingerprint_of_material, on_card(slot)).map_err(refused)?;
            Ok(())
        })?;
        self.made(slot)
    }

    /// Brings a private key into a slot, in the place of the one that is there.
    pub(super) fn import(&mut self, new: &NewKey, private: &PrivateHalf) -> Result<FoundKey, DeviceError> {
        let (slot, secret) = place(new)?;
        simple(new.algorithm)?;
        let upload = Upload::new(&private.parts()?, slot)?;
        self.with_admin(secret, |tx| {
            if let Some(touch) = new.touch {
                set_touch(tx, slot, touch)?;
            }
            tx.key_import(&upload, on_card(slot)).map_err(refused)?;
            Ok(())
        })?;
        self.made(slot)
    }

    /// The key that is in a slot now.
    fn made(&mut self, slot: CardSlot) -> Result<FoundKey, DeviceError> {
        let scan = self.scan()?;
        let is_there = |key: &&FoundKey| keys::slots_of(&key.slot).any(|other| other == on_card(slot));
        let found = scan.keys.iter().find(is_there).cloned();
        found.ok_or_else(|| DeviceError::Failed("the card does not show the key that it has made".to_owned()))
    }
}

/// Where the key goes, and what allows it.
fn place(new: &NewKey) -> Result<(CardSlot, &SecretString), DeviceError> {
    let slot = new.slot.ok_or(NO_SLOT)?;
    match (new.algorithm, slot) {
        (Algorithm::X25519, CardSlot::Sign | CardSlot::Auth) | (Algorithm::Ed25519, CardSlot::Decrypt) => {
            Err(WRONG_SLOT)
        }
        _ => Ok((slot, new.secret.as_ref().ok_or(NO_ADMIN_PIN)?)),
    }
}

/// What cards call an algorithm: 25519 is another curve in each slot.
fn simple(algorithm: Algorithm) -> Result<AlgoSimple, DeviceError> {
    Ok(match algorithm {
        Algorithm::Rsa(2048) => AlgoSimple::RSA2k,
        Algorithm::Rsa(3072) => AlgoSimple::RSA3k,
        Algorithm::Rsa(4096) => AlgoSimple::RSA4k,
        Algorithm::Rsa(_) | Algorithm::MlDsa44Ed25519 => return Err(NO_SUCH_KEYS),
        Algorithm::Ecdsa(Curve::P256) => AlgoSimple::NIST256,
        Algorithm::Ecdsa(Curve::P384) => AlgoSimple::NIST384,
        Algorithm::Ecdsa(Curve::P521) => AlgoSimple::NIST521,
        Algorithm::Ed25519 | Algorithm::X25519 => AlgoSimple::Curve25519,
    })
}

fn refused(error: CardError) -> Trouble {
    match error {
        CardError::UnsupportedAlgo(_) => {
            DeviceError::unsupported("the card has no keys of this kind in this slot").into()
        }
        error => error.into(),
    }
}

// Fingerprints (RFC 9580, 5.5.4.1): SHA-1 over the version 4 public key packet.

/// The numbers of algorithms (RFC 9580, 9.1).
const RSA: u8 = 1;
const ECDH: u8 = 18;
const ECDSA: u8 = 19;
const EDDSA: u8 = 22;

/// The hash and cipher that wrap a session key, by the curve's size (RFC 9580, 11.5.1).
const KDF_256: [u8; 4] = [3, 1, 8, 7];
const KDF_384: [u8; 4] = [3, 1, 9, 8];
const KDF_521: [u8; 4] = [3, 1, 10, 9];

fn fingerprint_of_material(
    material: &PublicKeyMaterial,
    created: KeyGenerationTime,
    slot: OpenPgpSlot,
) -> Result<Fingerprint, CardError> {
    let unused = AlgorithmAttributes::Unknown(Vec::new());
    let attributes = if let PublicKeyMaterial::E(point) = material { point.algo() } else { &unused };
    let (_, blob) = keys::public_key(material, attributes).map_err(CardError::UnsupportedAlgo)?;
    let public = PublicKey::parse(&blob).map_err(|error| CardError::UnsupportedAlgo(error.to_string()))?;
    Ok(fingerprint(&public, slot == OpenPgpSlot::Decryption, created.get()).into())
}

fn fingerprint(public: &PublicKey<'_>, decrypts: bool, created: u32) -> [u8; 20] {
    let body = packet(public, decrypts, created);
    let mut hashed = vec![0x99];
    // RSA with 4096 bits takes less.
    hashed.extend_from_slice(&u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    hashed.extend_from_slice(&body);
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &hashed);
    let mut out = [0; 20];
    out.copy_from_slice(digest.as_ref());
    out
}

/// The body of a version 4 public key packet (RFC 9580, 5.5.2.2).
fn packet(public: &PublicKey<'_>, decrypts: bool, created: u32) -> Vec<u8> {
    let mut out = vec![4];
    out.put_u32(created);
    let mut curve = |number: u8, curve: CardCurve, point: &[u8], kdf: Option<[u8; 4]>| {
        let oid = curve.oid();
        out.extend_from_slice(&[number, u8::try_from(oid.len()).unwrap_or(0)]);
        out.extend_from_slice(oid);
        put_mpi(&mut out, point);
        out.extend(kdf.into_iter().flatten());
    };
    match public {
        PublicKey::Rsa { e, n } => {
            out.push(RSA);
            put_mpi(&mut out, n);
            put_mpi(&mut out, e);
        }
        PublicKey::Ecdsa(nist, point) => {
            let kdf = match nist {
                Curve::P256 => KDF_256,
                Curve::P384 => KDF_384,
                Curve::P521 => KDF_521,
            };
            let (number, kdf) = if decrypts { (ECDH, Some(kdf)) } else { (ECDSA, None) };
            curve(number, card_curve(*nist), point, kdf);
        }
        PublicKey::Ed25519(point) => curve(EDDSA, CardCurve::Ed25519, &prefixed(point), None),
        PublicKey::X25519(point) => curve(ECDH, CardCurve::Curve25519, &prefixed(point), Some(KDF_256)),
        // Cards have no others.
        PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..) | PublicKey::MlDsa44Ed25519(..) => {}
    }
    out
}

fn card_curve(curve: Curve) -> CardCurve {
    match curve {
        Curve::P256 => CardCurve::NistP256r1,
        Curve::P384 => CardCurve::NistP384r1,
        Curve::P521 => CardCurve::NistP521r1,
    }
}

/// A point in its native form, as OpenPGP marks it (RFC 9580, 11.2).
fn prefixed(point: &[u8]) -> Vec<u8> {
    [&[0x40], point].concat()
}

/// A number with its length in bits (RFC 9580, 3.2).
fn put_mpi(out: &mut Vec<u8>, number: &[u8]) {
    let number = &number[number.iter().take_while(|byte| **byte == 0).count()..];
    let bits = number.first().map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize);
    out.extend_from_slice(&u16::try_from(bits).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(number);
}

// Private keys on their way.

/// A private key as openpgp-card takes it.
struct Upload {
    private: Private,
    created: u32,
    fingerprint: [u8; 20],
}

#[derive(Clone)]
enum Private {
    Rsa(RsaUpload),
    Ecc(EccUpload),
}

/// The numbers of an RSA key; those beside `n` and `e` are half as long as `n`.
#[derive(Clone)]
struct RsaUpload {
    n: Vec<u8>,
    e: Vec<u8>,
    p: Zeroizing<Vec<u8>>,
    q: Zeroizing<Vec<u8>>,
    iqmp: Zeroizing<Vec<u8>>,
    dmp1: Zeroizing<Vec<u8>>,
    dmq1: Zeroizing<Vec<u8>>,
}

#[derive(Clone)]
struct EccUpload {
    curve: CardCurve,
    kind: EccType,
    private: Zeroizing<Vec<u8>>,
    public: Vec<u8>,
}

impl Upload {
    fn new(parts: &SoftParts<'_>, slot: CardSlot) -> Result<Self, DeviceError> {
        let decrypts = slot == CardSlot::Decrypt;
        let (private, public) = match parts {
            SoftParts::Rsa(integers) => {
                let key = RsaKey::from_integers(integers).ok_or(NO_KEY)?;
                let [dmp1, dmq1] = key.crt_exponents().ok_or(NO_KEY)?;
                let half = integers.n.len().div_ceil(2);
                let upload = RsaUpload {
                    n: integers.n.to_vec(),
                    e: integers.e.to_vec(),
                    p: padded(integers.p, half).ok_or(NO_KEY)?,
                    q: padded(integers.q, half).ok_or(NO_KEY)?,
                    iqmp: padded(integers.iqmp, half).ok_or(NO_KEY)?,
                    dmp1: padded(&dmp1, half).ok_or(NO_KEY)?,
                    dmq1: padded(&dmq1, half).ok_or(NO_KEY)?,
                };
                (Private::Rsa(upload), PublicKey::Rsa { e: integers.e, n: integers.n })
            }
            SoftParts::Ecdsa { curve, scalar, point } => {
                let upload = EccUpload {
                    curve: card_curve(*curve),
                    kind: if decrypts { EccType::ECDH } else { EccType::ECDSA },
                    private: padded(scalar, curve.scalar_len()).ok_or(NO_KEY)?,
                    public: point.to_vec(),
                };
                (Private::Ecc(upload), PublicKey::Ecdsa(*curve, point))
            }
            SoftParts::Ed25519 { seed, public } => {
                let upload = EccUpload {
                    curve: CardCurve::Ed25519,
                    kind: EccType::EdDSA,
                    private: Zeroizing::new(seed.to_vec()),
                    public: prefixed(public),
                };
                (Private::Ecc(upload), PublicKey::Ed25519(public))
            }
            SoftParts::X25519 { secret, public } => {
                let upload = EccUpload {
                    curve: CardCurve::Curve25519,
                    kind: EccType::ECDH,
                    // A number to OpenPGP, the most significant byte first.
                    private: Zeroizing::new(secret.iter().rev().copied().collect()),
                    public: prefixed(public),
                };
                (Private::Ecc(upload), PublicKey::X25519(public))
            }
            SoftParts::MlDsa44Ed25519 { .. } | SoftParts::Ed25519Expanded { .. } => return Err(NO_SUCH_KEYS),
        };
        // When an ssh key was made is not known: it is as old as its life on the card.
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let created = u32::try_from(created).unwrap_or(u32::MAX);
        Ok(Self { private, created, fingerprint: fingerprint(&public, decrypts, created) })
    }
}

/// A number with so many bytes.
fn padded(number: &[u8], len: usize) -> Option<Zeroizing<Vec<u8>>> {
    let number = &number[number.iter().take_while(|byte| **byte == 0).count()..];
    let mut out = Zeroizing::new(vec![0; len]);
    let start = len.checked_sub(number.len())?;
    out[start..].copy_from_slice(number);
    Some(out)
}

impl CardUploadableKey for Upload {
    fn private_key(&self) -> Result<PrivateKeyMaterial, CardError> {
        Ok(match &self.private {
            Private::Rsa(rsa) => PrivateKeyMaterial::R(Box::new(rsa.clone())),
            Private::Ecc(ecc) => PrivateKeyMaterial::E(Box::new(ecc.clone())),
        })
    }

    fn timestamp(&self) -> KeyGenerationTime {
        self.created.into()
    }

    fn fingerprint(&self) -> Result<Fingerprint, CardError> {
        Ok(self.fingerprint.into())
    }
}

impl RSAKey for RsaUpload {
    fn e(&self) -> &[u8] {
        &self.e
    }

    fn p(&self) -> &[u8] {
        &self.p
    }

    fn q(&self) -> &[u8] {
        &self.q
    }

    fn pq(&self) -> &[u8] {
        &self.iqmp
    }

    fn dp1(&self) -> &[u8] {
        &self.dmp1
    }

    fn dq1(&self) -> &[u8] {
        &self.dmq1
    }

    fn n(&self) -> &[u8] {
        &self.n
    }
}

impl EccKey for EccUpload {
    fn oid(&self) -> &[u8] {
        self.curve.oid()
    }

    fn private(&self) -> &[u8] {
        &self.private
    }

    fn public(&self) -> &[u8] {
        &self.public
    }

    fn ecc_type(&self) -> EccType {
        self.kind
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_written_with_its_bits_and_without_zeros() {
        let mut out = Vec::new();
        put_mpi(&mut out, &[0, 0, 1, 0xff]);
        put_mpi(&mut out, &[]);
        assert_eq!(out, [0, 9, 1, 0xff, 0, 0]);
        assert_eq!(*padded(&[0, 0, 7], 2).unwrap(), [0, 7]);
        assert!(padded(&[1, 2, 3], 2).is_none());
    }

    #[test]
    fn slots_take_the_keys_that_work_there() {
        let new = |algorithm, slot| NewKey {
            slot: Some(slot),
            secret: Some("12345678".into()),
            ..NewKey::new("", algorithm)
        };
        assert!(place(&new(Algorithm::X25519, CardSlot::Decrypt)).is_ok());
        assert!(place(&new(Algorithm::Ecdsa(Curve::P256), CardSlot::Decrypt)).is_ok());
        assert_eq!(place(&new(Algorithm::X25519, CardSlot::Auth)).err(), Some(WRONG_SLOT));
        assert_eq!(place(&new(Algorithm::Ed25519, CardSlot::Decrypt)).err(), Some(WRONG_SLOT));
        assert_eq!(place(&NewKey::new("", Algorithm::Ed25519)).err(), Some(NO_SLOT));
        let without = NewKey { secret: None, ..new(Algorithm::Ed25519, CardSlot::Auth) };
        assert_eq!(place(&without).err(), Some(NO_ADMIN_PIN));
    }
}
