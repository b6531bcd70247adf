//! Files with private keys, as other programs write them: OpenSSH, PKCS#8, PKCS#1 and SEC1 in PEM and DER, PuTTY, OpenPGP,
//! tor. Knows their bytes, encryption included; no vault and no file system.
//!
//! Whatever a file is, a [`KeyFile`] holds the key in one form: the fields by which it is added to an agent.

mod asn1;
mod openpgp;
mod openssh;
pub mod pem;
mod pkcs12;
mod putty;
mod s2k;
mod tor;
mod write;

use std::borrow::Cow;

use aws_lc_rs::{
    agreement,
    signature::{Ed25519KeyPair, KeyPair},
};
use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    devices::soft::ed25519::ExpandedKey,
    public_key::{Curve, KeyError, KeyType, PublicKey},
    rfc4251::{Put, WireError},
    sys::rsa::RsaIntegers,
};

pub use write::WriteError;

/// The longest file, in bytes: an RSA key of 16,384 bits takes less than a fifth of it.
pub const MAX_FILE: usize = 64 * 1024;
/// The most memory that making a key of a passphrase may take, in bytes. Files ask for what they like.
const MAX_MEMORY: usize = 1 << 30;

/// Why a file gives no key.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum KeyFileError {
    /// It is of none of the formats that are known here.
    #[error(
        "this is no private key in a format that is known here: OpenSSH, PKCS#8, PKCS#1 and SEC1 in PEM or DER, PuTTY, \
         OpenPGP, and tor's secret keys are"
    )]
    UnknownFormat,
    /// It holds a public key, and no private one.
    #[error("this is a public key; the private one is in another file, often of the same name without .pub")]
    PublicKey,
    /// It is encrypted: ask its owner for the passphrase, and read it again.
    #[error("the file is encrypted; a passphrase is needed")]
    PassphraseNeeded,
    /// The passphrase is not the file's, or the file was changed.
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    /// The format is known, and this part of it is not supported.
    #[error("{0} is not supported{hint}", hint = hint(.1))]
    Unsupported(Cow<'static, str>, &'static str),
    /// It is not what its format says.
    #[error("the file is damaged: {0}")]
    Damaged(Cow<'static, str>),
    /// Longer than any key is.
    #[error(
        "the file is longer than {MAX_FILE} bytes, which no key is; of an OpenPGP key with many signatures, \
         `gpg --export-options export-minimal` writes a short one"
    )]
    TooLong,
    /// It holds several keys, where one is wanted: [`KeyFile::read_all`] gives them all.
    #[error("the file holds {0} keys, and one is wanted")]
    Several(usize),
}

fn hint(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!("; {hint}") }
}

impl KeyFileError {
    const fn damaged(why: &'static str) -> Self {
        Self::Damaged(Cow::Borrowed(why))
    }

    const fn unsupported(what: &'static str, hint: &'static str) -> Self {
        Self::Unsupported(Cow::Borrowed(what), hint)
    }
}

impl From<WireError> for KeyFileError {
    fn from(error: WireError) -> Self {
        Self::Damaged(error.to_string().into())
    }
}

impl From<KeyError> for KeyFileError {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::UnknownType => Self::unsupported("this type of key", ""),
            error => Self::Damaged(error.to_string().into()),
        }
    }
}

/// A private key that was read from a file, or is about to be written to one. It does not print, and is wiped when it is dropped.
pub struct KeyFile {
    fields: Zeroizing<Vec<u8>>,
    blob: Vec<u8>,
    comment: String,
}

/// What a file holds. All formats but OpenPGP's hold one key.
#[derive(Default)]
pub struct Contents {
    /// The keys that can be used, at least one, in the order of the file.
    pub keys: Vec<KeyFile>,
    /// Why others that stand beside them cannot be used.
    pub left_out: Vec<KeyFileError>,
}

impl From<KeyFile> for Contents {
    fn from(key: KeyFile) -> Self {
        Self { keys: vec![key], left_out: Vec::new() }
    }
}

impl KeyFile {
    /// Reads a file that holds one key; [`Several`](KeyFileError::Several) where it holds more. As [`KeyFile::read_all`]
    /// else.
    pub fn read(bytes: &[u8], passphrase: Option<&SecretString>) -> Result<Self, KeyFileError> {
        let mut keys = Self::read_all(bytes, passphrase)?.keys;
        match keys.pop() {
            Some(key) if keys.is_empty() => Ok(key),
            _ => Err(KeyFileError::Several(keys.len() + 1)),
        }
    }

    /// Reads the file, whatever it is. The passphrase is used only where the file is encrypted.
    ///
    /// Reading an encrypted file takes as long as its maker wanted, half a second as a rule: not for a thread that others
    /// wait for.
    pub fn read_all(bytes: &[u8], passphrase: Option<&SecretString>) -> Result<Contents, KeyFileError> {
        if bytes.len() > MAX_FILE {
            return Err(KeyFileError::TooLong);
        }
        let passphrase = passphrase.map(|passphrase| passphrase.expose_secret().as_bytes());
        if let Some(key) = tor::read(bytes, passphrase)? {
            return Ok(key.into());
        }
        if putty::is_one(bytes) {
            return putty::read(bytes, passphrase).map(Contents::from);
        }
        if openpgp::is_one(bytes) {
            return of_openpgp(bytes, passphrase);
        }
        match pem::read(bytes)? {
            Some(block) if block.label == openssh::LABEL => openssh::read(&block.bytes, passphrase),
            Some(block) if block.label == openpgp::LABEL => return of_openpgp(&block.bytes, passphrase),
            Some(block) => asn1::read_pem(block, passphrase),
            None if is_public(bytes) => Err(KeyFileError::PublicKey),
            None => asn1::read_der(bytes, passphrase),
        }
        .map(Contents::from)
    }

    /// The key of a stored private half, as [`SoftKey`](crate::devices::soft::SoftKey) seals it, with its public half's
    /// blob. [`Damaged`](KeyFileError::Damaged) when they do not belong together.
    pub fn from_secret(key_type: KeyType, blob: &[u8], secret: &[u8]) -> Result<Self, KeyFileError> {
        const MISMATCH: KeyFileError = KeyFileError::damaged("its private and its public half do not belong together");
        let key = match key_type {
            KeyType::Ed25519 => Self::ed25519(secret),
            KeyType::X25519 => Self::x25519(secret),
            // The point follows.
            KeyType::Ecdsa(curve) => Self::ecdsa(curve, secret.get(..curve.scalar_len()).ok_or(MISMATCH)?),
            KeyType::Rsa => asn1::pkcs1(secret),
            KeyType::Ed25519Expanded => {
                let key = secret.try_into().ok().and_then(ExpandedKey::new);
                Ok(tor::expanded(&key.ok_or(MISMATCH)?))
            }
            KeyType::MlDsa44Ed25519 => match PublicKey::parse(blob)? {
                public @ PublicKey::MlDsa44Ed25519(mldsa, ed25519) => Ok(Self::new(key_type, &public, |out| {
                    out.put_string(&[mldsa, ed25519].concat());
                    out.put_string(secret);
                })),
                _ => Err(MISMATCH),
            },
            KeyType::SkEd25519 | KeyType::SkEcdsa => Err(KeyFileError::unsupported("a key of an authenticator", "")),
        }?;
        if key.blob == blob { Ok(key) } else { Err(MISMATCH) }
    }

    /// The same key under another comment.
    pub fn with_comment(self, comment: &str) -> Self {
        self.commented(comment.as_bytes())
    }

    /// What follows the message's number in SSH_AGENTC_ADD_IDENTITY (RFC 9987, section 3.2), up to the comment, which is
    /// not in it: the key's type and its fields.
    pub fn fields(&self) -> &[u8] {
        &self.fields
    }

    /// The public key's blob.
    pub fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// What the file calls the key; empty in formats that have no place for it.
    pub fn comment(&self) -> &str {
        &self.comment
    }

    fn commented(mut self, comment: &[u8]) -> Self {
        self.comment = self::comment(comment);
        self
    }

    /// From the private key's type, its public half, and the fields behind the type.
    fn new(key_type: KeyType, public: &PublicKey<'_>, write: impl FnOnce(&mut Vec<u8>)) -> Self {
        // Room from the start: a buffer that grows leaves copies behind.
        let mut fields = Zeroizing::new(Vec::with_capacity(MAX_FILE));
        fields.put_string(key_type.name().as_bytes());
        write(&mut fields);
        Self { fields, blob: public.to_blob(), comment: String::new() }
    }

    fn ed25519(seed: &[u8]) -> Result<Self, KeyFileError> {
        const WRONG: KeyFileError = KeyFileError::damaged("an Ed25519 private key has 32 bytes");
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| WRONG)?;
        let public = pair.public_key().as_ref();
        Ok(Self::new(KeyType::Ed25519, &PublicKey::Ed25519(public), |out| {
            out.put_string(public);
            out.put_u32(64);
            out.extend_from_slice(seed);
            out.extend_from_slice(public);
        }))
    }

    /// An X25519 key in the form of `x25519@spec.torproject.org`.
    fn x25519(secret: &[u8]) -> Result<Self, KeyFileError> {
        let public = public_of(&agreement::X25519, secret);
        let public = public.ok_or(KeyFileError::damaged("an X25519 private key has 32 bytes"))?;
        let public = public.as_ref();
        Ok(Self::new(KeyType::X25519, &PublicKey::X25519(public), |out| {
            out.put_string(public);
            out.put_string(secret);
        }))
    }

    fn ecdsa(curve: Curve, scalar: &[u8]) -> Result<Self, KeyFileError> {
        let algorithm = match curve {
            Curve::P256 => &agreement::ECDH_P256,
            Curve::P384 => &agreement::ECDH_P384,
            Curve::P521 => &agreement::ECDH_P521,
        };
        let public = public_of(algorithm, scalar);
        let public = public.ok_or(KeyFileError::damaged("its number is no private key on its curve"))?;
        let point = public.as_ref();
        Ok(Self::new(KeyType::Ecdsa(curve), &PublicKey::Ecdsa(curve, point), |out| {
            out.put_string(curve.name().as_bytes());
            out.put_string(point);
            out.put_mpint(scalar);
        }))
    }

    fn rsa(key: &RsaIntegers<'_>) -> Result<Self, KeyFileError> {
        let public = PublicKey::rsa(key.n, key.e)?;
        Ok(Self::new(KeyType::Rsa, &public, |out| {
            [key.n, key.e, key.d, key.iqmp, key.p, key.q].into_iter().for_each(|integer| out.put_mpint(integer));
        }))
    }
}

/// The keys of an OpenPGP file, if there is one that can be used.
fn of_openpgp(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<Contents, KeyFileError> {
    let mut contents = openpgp::read(bytes, passphrase)?;
    if !contents.keys.is_empty() {
        return Ok(contents);
    }
    Err(contents.left_out.pop().unwrap_or(KeyFileError::damaged("there is no key in it")))
}

fn comment(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "")
}

fn public_of(algorithm: &'static agreement::Algorithm, secret: &[u8]) -> Option<agreement::PublicKey> {
    agreement::PrivateKey::from_private_key(algorithm, secret).ok()?.compute_public_key().ok()
}

/// Whether it is a public key that somebody took for the private one.
fn is_public(bytes: &[u8]) -> bool {
    let first = bytes.split(u8::is_ascii_whitespace).next().unwrap_or_default();
    KeyType::from_name(first).is_some() || first.starts_with(b"ssh-")
}
