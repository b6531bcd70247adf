//! OpenSSH's own format (its PROTOCOL.key), as ssh-keygen and arti's key store write it. Knows its container and which
//! fields each type of key has.

use aws_lc_rs::{
    aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    cipher::{AES_128, AES_192, AES_256, Algorithm, DecryptingKey, DecryptionContext, UnboundCipherKey},
};
use chacha20::{
    ChaCha20Legacy,
    cipher::{KeyIvInit, StreamCipher, StreamCipherSeek},
};
use poly1305::{Poly1305, universal_hash::KeyInit};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::{KeyFile, KeyFileError};
use crate::{
    public_key::{KeyType, PublicKey},
    rfc4251::{Reader, WireError},
};

/// What stands in the armour's first line.
pub(super) const LABEL: &str = "OPENSSH PRIVATE KEY";
pub(super) const MAGIC: &[u8] = b"openssh-key-v1\0";
/// Rounds of the key derivation, which ssh-keygen makes 16 or 24: the time of these many is about an hour.
const MAX_ROUNDS: u32 = 100_000;

/// How the private part is encrypted.
#[derive(Clone, Copy)]
enum Cipher {
    Ctr(&'static Algorithm, usize),
    Cbc(&'static Algorithm, usize),
    Gcm(&'static aws_lc_rs::aead::Algorithm),
    ChaCha20Poly1305,
}

impl Cipher {
    fn from_name(name: &[u8]) -> Result<Option<Self>, KeyFileError> {
        Ok(Some(match name {
            b"none" => return Ok(None),
            b"aes128-ctr" => Self::Ctr(&AES_128, 16),
            b"aes192-ctr" => Self::Ctr(&AES_192, 24),
            b"aes256-ctr" => Self::Ctr(&AES_256, 32),
            b"aes128-cbc" => Self::Cbc(&AES_128, 16),
            b"aes192-cbc" => Self::Cbc(&AES_192, 24),
            b"aes256-cbc" => Self::Cbc(&AES_256, 32),
            b"aes128-gcm@openssh.com" => Self::Gcm(&AES_128_GCM),
            b"aes256-gcm@openssh.com" => Self::Gcm(&AES_256_GCM),
            b"chacha20-poly1305@openssh.com" => Self::ChaCha20Poly1305,
            other => {
                let name = String::from_utf8_lossy(other);
                return Err(KeyFileError::Unsupported(
                    format!("the cipher {}", name.escape_debug()).into(),
                    "`ssh-keygen -p -Z aes256-ctr -f FILE` changes it",
                ));
            }
        }))
    }

    /// Of key and initialization vector, in bytes.
    fn lengths(self) -> (usize, usize) {
        match self {
            Self::Ctr(_, key) | Self::Cbc(_, key) => (key, 16),
            Self::Gcm(algorithm) => (algorithm.key_len(), 12),
            // The second half is for the lengths of packets, which a file does not have.
            Self::ChaCha20Poly1305 => (64, 0),
        }
    }

    /// Decrypts in place; `rest` is what stands behind the private part.
    fn decrypt(self, key: &[u8], iv: &[u8], bytes: &mut Zeroizing<Vec<u8>>, rest: &[u8]) -> Result<(), KeyFileError> {
        const FAILED: KeyFileError = KeyFileError::damaged("what is encrypted has the wrong length");
        let done = match self {
            Self::Ctr(algorithm, _) | Self::Cbc(algorithm, _) => {
                let iv: [u8; 16] = iv.try_into().map_err(|_| FAILED)?;
                let context = DecryptionContext::Iv128(iv.into());
                let key = UnboundCipherKey::new(algorithm, key);
                let key = key.and_then(|key| match self {
                    Self::Cbc(..) => DecryptingKey::cbc(key),
                    _ => DecryptingKey::ctr(key),
                });
                key.and_then(|key| key.decrypt(bytes, context).map(|plain| plain.len())).map_err(|_| FAILED)?
            }
            Self::Gcm(algorithm) => {
                bytes.extend_from_slice(rest);
                let key = UnboundKey::new(algorithm, key).map(LessSafeKey::new).map_err(|_| FAILED)?;
                let nonce = Nonce::try_assume_unique_for_key(iv).map_err(|_| FAILED)?;
                let opened = key.open_in_place(nonce, Aad::empty(), bytes).map(|plain| plain.len());
                opened.map_err(|_| KeyFileError::WrongPassphrase)?
            }
            Self::ChaCha20Poly1305 => {
                open_chacha20_poly1305(key, bytes, rest)?;
                bytes.len()
            }
        };
        bytes.truncate(done);
        Ok(())
    }
}

/// OpenSSH's own joining of the two (its PROTOCOL.chacha20poly1305), as packet number 0 without a length: the first block
/// of the stream is the authenticator's key, the others encrypt, and what is authenticated is the ciphertext alone.
fn open_chacha20_poly1305(key: &[u8], bytes: &mut [u8], tag: &[u8]) -> Result<(), KeyFileError> {
    const FAILED: KeyFileError = KeyFileError::damaged("what is encrypted has the wrong length");
    let mut stream = ChaCha20Legacy::new_from_slices(key.get(..32).ok_or(FAILED)?, &[0; 8]).map_err(|_| FAILED)?;
    let mut once = Zeroizing::new([0; 32]);
    stream.apply_keystream(&mut *once);
    let expected = Poly1305::new((&*once).into()).compute_unpadded(bytes);
    if !bool::from(expected.as_slice().ct_eq(tag)) {
        return Err(KeyFileError::WrongPassphrase);
    }
    stream.seek(64u64);
    stream.apply_keystream(bytes);
    Ok(())
}

/// Reads what stood in the armour.
pub(super) fn read(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(KeyFileError::damaged("it does not begin as OpenSSH's keys do"))?;
    let mut r = Reader::new(rest);
    let cipher = Cipher::from_name(r.string()?)?;
    let (kdf, options) = (r.string()?, r.string()?);
    if r.u32()? != 1 {
        return Err(KeyFileError::unsupported("a file with several keys", ""));
    }
    let (_public, private) = (r.string()?, r.string()?);
    let mut plain = Zeroizing::new(Vec::with_capacity(private.len() + r.rest().len()));
    plain.extend_from_slice(private);
    if let Some(cipher) = cipher {
        let passphrase = passphrase.ok_or(KeyFileError::PassphraseNeeded)?;
        let (key_len, iv_len) = cipher.lengths();
        let key = derive(kdf, options, passphrase, key_len + iv_len)?;
        let (key, iv) = key.split_at(key_len);
        cipher.decrypt(key, iv, &mut plain, r.rest())?;
    }
    let mut r = Reader::new(&plain);
    // Twice the same number: what tells that the passphrase was right.
    if r.u32()? != r.u32()? {
        return Err(match cipher {
            Some(_) => KeyFileError::WrongPassphrase,
            None => KeyFileError::damaged("its two check numbers differ"),
        });
    }
    key(&mut r)
}

fn derive(kdf: &[u8], options: &[u8], passphrase: &[u8], len: usize) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    if kdf != b"bcrypt" {
        return Err(KeyFileError::unsupported("its way of making a key of the passphrase", ""));
    }
    let mut r = Reader::new(options);
    let (salt, rounds) = (r.string()?, r.u32()?);
    if rounds > MAX_ROUNDS {
        return Err(KeyFileError::unsupported("a passphrase that takes hours to check", ""));
    }
    let mut key = Zeroizing::new(vec![0; len]);
    match bcrypt_pbkdf::bcrypt_pbkdf(passphrase, salt, rounds, &mut key) {
        Ok(()) => Ok(key),
        // An empty passphrase is none that a file was encrypted with.
        Err(_) if passphrase.is_empty() => Err(KeyFileError::WrongPassphrase),
        Err(_) => Err(KeyFileError::damaged("its way of making a key of the passphrase makes no sense")),
    }
}

/// A key's type, its fields and the comment.
fn key(r: &mut Reader<'_>) -> Result<KeyFile, KeyFileError> {
    let name = r.string()?;
    let Some((key_type, false)) = KeyType::from_name(name) else {
        let name = String::from_utf8_lossy(name);
        return Err(KeyFileError::Unsupported(format!("a key of the type {}", name.escape_debug()).into(), ""));
    };
    let before = r.rest();
    let public = public(key_type, &mut r.clone())?;
    skip(key_type, r)?;
    let fields = &before[..before.len() - r.rest().len()];
    let file = KeyFile::new(key_type, &public, |out| out.extend_from_slice(fields));
    Ok(file.commented(r.string()?))
}

fn public<'a>(key_type: KeyType, r: &mut Reader<'a>) -> Result<PublicKey<'a>, KeyFileError> {
    Ok(match key_type {
        // Here the modulus comes first, other than in the blob.
        KeyType::Rsa => {
            let (n, e) = (r.mpint()?, r.mpint()?);
            PublicKey::rsa(n, e)?
        }
        KeyType::Ed25519Expanded => PublicKey::Ed25519(r.string()?),
        _ => PublicKey::read(key_type, r)?,
    })
}

/// Moves behind the fields. Integers are strings of another name.
fn skip(key_type: KeyType, r: &mut Reader<'_>) -> Result<(), WireError> {
    let strings = |r: &mut Reader<'_>, count| (0..count).try_for_each(|_| r.string().map(drop));
    match key_type {
        KeyType::Ed25519 | KeyType::Ed25519Expanded | KeyType::X25519 | KeyType::MlDsa44Ed25519 => strings(r, 2),
        KeyType::Ecdsa(_) => strings(r, 3),
        KeyType::Rsa => strings(r, 6),
        KeyType::SkEd25519 | KeyType::SkEcdsa => {
            strings(r, if key_type == KeyType::SkEcdsa { 3 } else { 2 })?;
            r.u8()?;
            strings(r, 2)
        }
    }
}
