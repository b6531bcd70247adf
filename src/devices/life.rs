//! The life of a key on a device, as drivers are asked for it: what a new key is to be, and a private key on its way to a
//! device. Knows keys and their forms; no driver.

use std::fmt;

use secrecy::SecretString;
use zeroize::Zeroizing;

use super::{DeviceError, FoundKey, soft::SoftParts};
use crate::{
    public_key::{Curve, KeyError, KeyType, PublicKey},
    rfc4251::{Put, Reader},
    sys::rsa::RsaIntegers,
};

/// The shortest RSA key that a device is asked for, in bits.
pub const MIN_RSA_BITS: u32 = 2048;
/// The longest.
pub const MAX_RSA_BITS: u32 = 4096;
/// The longest private key on its way to a device, in bytes: RSA with [`MAX_RSA_BITS`] takes less.
pub const MAX_PRIVATE: usize = 4096;

/// What a key is to be that a device makes, or is given.
#[derive(Clone)]
pub struct NewKey {
    /// What it is called, at most [`MAX_LABEL`](super::MAX_LABEL) bytes; empty where its name does not matter.
    pub label: String,
    /// Its kind. For a key that is brought it is the one that the key has.
    pub algorithm: Algorithm,
    /// Where on an OpenPGP card it goes, in place of the key that is there. Other devices have no such slots, and choose.
    pub slot: Option<CardSlot>,
    /// Whether its uses want a touch; `None` leaves that to the device.
    pub touch: Option<Touch>,
    /// What the device asks of an administrator: an OpenPGP card its admin PIN, a PKCS#11 token nothing. Tried once.
    pub secret: Option<SecretString>,
}

impl NewKey {
    /// A key of this kind, and everything else as the device likes it.
    pub fn new(label: impl Into<String>, algorithm: Algorithm) -> Self {
        Self { label: label.into(), algorithm, slot: None, touch: None, secret: None }
    }
}

/// The kinds of key that are made here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// With so many bits: a multiple of 8 from [`MIN_RSA_BITS`] to [`MAX_RSA_BITS`].
    Rsa(u32),
    /// On a NIST curve, for signatures and key agreement.
    Ecdsa(Curve),
    /// Ed25519
    Ed25519,
    /// X25519, for key agreement.
    X25519,
    /// ML-DSA-44 and Ed25519 in one key. The encrypted store makes such keys, and no device does.
    MlDsa44Ed25519,
}

impl Algorithm {
    /// RSA with so many bits, if devices are asked for such keys.
    pub fn rsa(bits: u32) -> Option<Self> {
        ((MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) && bits.is_multiple_of(8)).then_some(Self::Rsa(bits))
    }

    /// The kind of a public key; `None` for those that are not made here.
    pub fn of(key: &PublicKey<'_>) -> Option<Self> {
        match key {
            PublicKey::Rsa { n, .. } => {
                let bits = n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize);
                Self::rsa(u32::try_from(bits).ok()?)
            }
            PublicKey::Ecdsa(curve, _) => Some(Self::Ecdsa(*curve)),
            PublicKey::Ed25519(_) => Some(Self::Ed25519),
            PublicKey::X25519(_) => Some(Self::X25519),
            PublicKey::MlDsa44Ed25519(..) => Some(Self::MlDsa44Ed25519),
            PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..) => None,
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "nistp256" => Some(Self::Ecdsa(Curve::P256)),
            "nistp384" => Some(Self::Ecdsa(Curve::P384)),
            "nistp521" => Some(Self::Ecdsa(Curve::P521)),
            "ed25519" => Some(Self::Ed25519),
            "x25519" => Some(Self::X25519),
            "mldsa44-ed25519" => Some(Self::MlDsa44Ed25519),
            _ => Self::rsa(name.strip_prefix("rsa-")?.parse().ok()?).filter(|rsa| rsa.to_string() == name),
        }
    }
}

/// `rsa-2048` and the like, `nistp256`, `nistp384`, `nistp521`, `ed25519`, `x25519` or `mldsa44-ed25519`.
impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rsa(bits) => write!(f, "rsa-{bits}"),
            Self::Ecdsa(curve) => f.write_str(curve.name()),
            Self::Ed25519 => f.write_str("ed25519"),
            Self::X25519 => f.write_str("x25519"),
            Self::MlDsa44Ed25519 => f.write_str("mldsa44-ed25519"),
        }
    }
}

macro_rules! choices {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$of])* $variant,)*
        }

        impl $name {
            /// All there are.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name in messages and on the command line.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// The one with this name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|choice| choice.as_str() == name)
            }
        }
    };
}

pub(super) use choices;

choices! {
    /// The three keys of an OpenPGP card (OpenPGP card 3.4, section 4.3.1).
    CardSlot {
        /// For digital signatures.
        Sign = "sign",
        /// For decryption and key agreement.
        Decrypt = "decrypt",
        /// For authentication, as by ssh.
        Auth = "auth",
    }
}

choices! {
    /// Whether the uses of a key want a touch.
    Touch {
        /// They do not.
        Off = "off",
        /// They do, until somebody changes that.
        On = "on",
        /// They do for as long as the key lives.
        Fixed = "fixed",
    }
}

/// A private key on its way to a device, in the form of SSH_AGENTC_ADD_IDENTITY (RFC 9987, section 3.2): the type's name,
/// then its fields up to the comment. It does not print, and is wiped when it is dropped.
#[derive(Clone)]
pub struct PrivateHalf(Zeroizing<Vec<u8>>);

const NOT_MOVED: DeviceError =
    DeviceError::unsupported("only RSA, ECDSA, Ed25519 and X25519 keys can be brought to a device");

impl PrivateHalf {
    /// A copy of these parts. [`Unsupported`](DeviceError::Unsupported) for kinds that no device takes.
    pub fn of(parts: &SoftParts<'_>) -> Result<Self, DeviceError> {
        // Enough from the start: a buffer that grows leaves copies behind.
        let mut out = Zeroizing::new(Vec::with_capacity(MAX_PRIVATE));
        let begin = |out: &mut Vec<u8>, key_type: KeyType| out.put_string(key_type.name().as_bytes());
        match parts {
            SoftParts::Ed25519 { seed, public } => {
                begin(&mut out, KeyType::Ed25519);
                out.put_string(public);
                out.put_u32(64);
                out.extend_from_slice(seed);
                out.extend_from_slice(public);
            }
            SoftParts::Ecdsa { curve, scalar, point } => {
                begin(&mut out, KeyType::Ecdsa(*curve));
                out.put_string(curve.name().as_bytes());
                out.put_string(point);
                out.put_mpint(scalar);
            }
            SoftParts::Rsa(RsaIntegers { n, e, d, iqmp, p, q }) => {
                begin(&mut out, KeyType::Rsa);
                for integer in [n, e, d, iqmp, p, q] {
                    if out.len() + integer.len() + 5 > MAX_PRIVATE {
                        return Err(NOT_MOVED);
                    }
                    out.put_mpint(integer);
                }
            }
            SoftParts::X25519 { secret, public } => {
                begin(&mut out, KeyType::X25519);
                out.put_string(public);
                out.put_string(secret);
            }
            SoftParts::MlDsa44Ed25519 { .. } | SoftParts::Ed25519Expanded { .. } => return Err(NOT_MOVED),
        }
        Ok(Self(out))
    }

    /// Reads what [`as_bytes`](Self::as_bytes) gave; `None` for anything else. Whether the halves belong together shows
    /// when the key is used.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        (bytes.len() <= MAX_PRIVATE && parse(bytes).is_ok()).then(|| Self(Zeroizing::new(bytes.to_vec())))
    }

    /// As it passes to a device's process.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its values, public and private.
    pub fn parts(&self) -> Result<SoftParts<'_>, DeviceError> {
        parse(&self.0).map_err(|_| NOT_MOVED)
    }
}

impl fmt::Debug for PrivateHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateHalf(…)")
    }
}

fn parse(bytes: &[u8]) -> Result<SoftParts<'_>, KeyError> {
    let mut r = Reader::new(bytes);
    let parts = match KeyType::from_name(r.string()?) {
        Some((KeyType::Ed25519, false)) => {
            let public = r.string()?;
            match r.string()?.split_at_checked(32) {
                Some((seed, again)) if again == public && public.len() == 32 => SoftParts::Ed25519 { seed, public },
                _ => return Err(KeyError::Invalid("an Ed25519 private key is 32 bytes and the public key")),
            }
        }
        Some((key_type @ KeyType::Ecdsa(_), false)) => match PublicKey::read(key_type, &mut r)? {
            PublicKey::Ecdsa(curve, point) => SoftParts::Ecdsa { curve, scalar: r.mpint()?, point },
            _ => return Err(KeyError::UnknownType),
        },
        Some((KeyType::Rsa, false)) => {
            let mut next = || r.mpint();
            SoftParts::Rsa(RsaIntegers { n: next()?, e: next()?, d: next()?, iqmp: next()?, p: next()?, q: next()? })
        }
        Some((KeyType::X25519, false)) => {
            let public = r.string()?;
            SoftParts::X25519 { secret: r.string()?, public }
        }
        _ => return Err(KeyError::UnknownType),
    };
    r.finish()?;
    Ok(parts)
}

/// Whether a device answered with a key of the kind that it was asked for.
pub(super) fn check_made(key: &FoundKey, algorithm: Algorithm) -> Result<(), DeviceError> {
    match PublicKey::parse(&key.blob) {
        Ok(public) if Algorithm::of(&public) == Some(algorithm) => Ok(()),
        _ => Err(DeviceError::Failed("the device made another key than it was asked for".to_owned())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_nothing_else_is_one() {
        let algorithms = [
            Algorithm::Rsa(2048),
            Algorithm::Rsa(4096),
            Algorithm::Ecdsa(Curve::P256),
            Algorithm::Ecdsa(Curve::P384),
            Algorithm::Ecdsa(Curve::P521),
            Algorithm::Ed25519,
            Algorithm::X25519,
            Algorithm::MlDsa44Ed25519,
        ];
        for algorithm in algorithms {
            assert_eq!(Algorithm::from_name(&algorithm.to_string()), Some(algorithm));
        }
        for name in ["", "rsa", "rsa-1024", "rsa-2049", "rsa-4104", "rsa-+2048", "rsa-02048", "RSA-2048", "nistp192"] {
            assert_eq!(Algorithm::from_name(name), None, "{name}");
        }
        for slot in CardSlot::ALL {
            assert_eq!(CardSlot::from_name(slot.as_str()), Some(*slot));
        }
        for touch in Touch::ALL {
            assert_eq!(Touch::from_name(touch.as_str()), Some(*touch));
        }
    }

    #[test]
    fn a_private_half_is_read_as_it_was_written_or_not_at_all() {
        let point = [&[4][..], &[7; 64]].concat();
        for parts in [
            SoftParts::Ed25519 { seed: &[1; 32], public: &[2; 32] },
            SoftParts::Ecdsa { curve: Curve::P256, scalar: &[0, 0, 0x80, 1], point: &point },
            SoftParts::X25519 { secret: &[1; 32], public: &[2; 32] },
            SoftParts::Rsa(RsaIntegers { n: &[0x80; 256], e: &[1, 0, 1], d: &[3], iqmp: &[4], p: &[5], q: &[6] }),
        ] {
            let half = PrivateHalf::of(&parts).unwrap();
            assert_eq!(PrivateHalf::read(half.as_bytes()).unwrap().as_bytes(), half.as_bytes());
            assert!(half.0.capacity() <= MAX_PRIVATE);
            for cut in 0..half.as_bytes().len() {
                assert!(PrivateHalf::read(&half.as_bytes()[..cut]).is_none());
            }
            assert!(PrivateHalf::read(&[half.as_bytes(), &[0]].concat()).is_none());
        }
        let long = SoftParts::Rsa(RsaIntegers { n: &[1; 2048], e: &[3], d: &[1; 2048], iqmp: &[4], p: &[5], q: &[6] });
        assert!(PrivateHalf::of(&long).is_err());
        assert!(PrivateHalf::of(&SoftParts::Ed25519Expanded { secret: &[1; 64], public: &[2; 32] }).is_err());
    }
}
