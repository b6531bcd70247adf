//! Tor's files of secret Ed25519 keys, and its encryption of master keys. Its RSA keys are PEM, and arti's keys OpenSSH's.

use std::num::NonZeroU32;

use aws_lc_rs::{
    cipher::{AES_128, DecryptingKey, DecryptionContext, UnboundCipherKey},
    hkdf, hmac, pbkdf2,
};
use pkcs8::pkcs5::scrypt;
use zeroize::Zeroizing;

use super::{KeyFile, KeyFileError, MAX_MEMORY, s2k::S2k};
use crate::{
    devices::soft::ed25519::{ExpandedKey, from_tor_file},
    public_key::{KeyType, PublicKey},
    rfc4251::{Put, Reader},
};

/// How the files begin that have a secret key.
const SECRET: &[u8] = b"== ed25519v1-secret: ";
const PUBLIC: &[u8] = b"== ed25519v1-public: ";
/// How the file of an encrypted master key begins; `tor --keygen` writes it.
const BOXED: &[u8; 32] = b"== Boxed Ed25519 key: master ==\0";
/// How what is encrypted begins, behind that.
const ENCRYPTED: &[u8] = b"TORBOX00";
const TAG: usize = 32;
const KEYS: usize = 16 + 32;
/// Rounds of PBKDF2, as a power of two: some ten seconds. Tor makes 2^19.
const MAX_LOG_ROUNDS: u8 = 25;

/// Reads the file if it is tor's.
pub(super) fn read(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<Option<KeyFile>, KeyFileError> {
    const SHORT: KeyFileError = KeyFileError::damaged("it does not hold a secret key of 64 bytes");
    if bytes.starts_with(PUBLIC) {
        return Err(KeyFileError::PublicKey);
    }
    let key = if let Some(boxed) = bytes.strip_prefix(BOXED) {
        let secret = open(boxed, passphrase)?;
        secret.as_slice().try_into().ok().and_then(ExpandedKey::new)
    } else if bytes.starts_with(SECRET) {
        from_tor_file(bytes).and_then(ExpandedKey::new)
    } else {
        return Ok(None);
    };
    Ok(Some(expanded(&key.ok_or(SHORT)?)))
}

pub(super) fn expanded(key: &ExpandedKey) -> KeyFile {
    let public = key.public();
    KeyFile::new(KeyType::Ed25519Expanded, &PublicKey::Ed25519(public), |out| {
        out.put_string(public);
        out.put_string(key.to_bytes());
    })
}

/// Decrypts what tor's crypto_pwbox made: the way of making keys of the passphrase, an initialization vector, the length
/// and the contents in AES-128 with a counter, and HMAC-SHA-256 of all that.
fn open(boxed: &[u8], passphrase: Option<&[u8]>) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    const SHORT: KeyFileError = KeyFileError::damaged("it ends too early");
    let (authenticated, tag) = boxed.split_at_checked(boxed.len().saturating_sub(TAG)).ok_or(SHORT)?;
    let rest = authenticated.strip_prefix(ENCRYPTED);
    let mut r = Reader::new(rest.ok_or(KeyFileError::unsupported("this version of tor's encryption", ""))?);
    let len = r.u8()?;
    let (how, iv) = (r.take(len.into())?, r.take(16)?);
    let keys = derive(how, passphrase)?;
    let (cipher, mac) = keys.split_at(16);
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, mac), authenticated, tag)
        .map_err(|_| KeyFileError::WrongPassphrase)?;
    let mut plain = Zeroizing::new(r.rest().to_vec());
    let key = UnboundCipherKey::new(&AES_128, cipher).and_then(DecryptingKey::ctr);
    let iv: [u8; 16] = iv.try_into().map_err(|_| SHORT)?;
    let context = DecryptionContext::Iv128(iv.into());
    key.and_then(|key| key.decrypt(&mut plain, context).map(drop)).map_err(|_| SHORT)?;
    let mut r = Reader::new(&plain);
    Ok(Zeroizing::new(r.string()?.to_vec()))
}

/// How long the keys are, together, in bytes.
struct Length;

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        KEYS
    }
}

/// The key of the cipher, 16 bytes, and that of the authentication code, 32 (tor's crypto_s2k).
fn derive(how: &[u8], passphrase: Option<&[u8]>) -> Result<Zeroizing<[u8; KEYS]>, KeyFileError> {
    const COSTLY: KeyFileError =
        KeyFileError::unsupported("a passphrase that takes so much memory or time to check", "");
    const WRONG: KeyFileError = KeyFileError::damaged("its way of making a key of the passphrase makes no sense");
    let mut keys = Zeroizing::new([0; KEYS]);
    match *how {
        // OpenPGP's, which is what a tor without libscrypt writes.
        [0, ref s2k @ ..] => {
            let mut r = Reader::new(s2k);
            let short = S2k::read_tor(&mut r)?;
            r.finish()?;
            let short = short.derive(passphrase.ok_or(KeyFileError::PassphraseNeeded)?, 20);
            let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &s2k[..8]);
            let long = salt.extract(&short);
            long.expand(&[b"EXPAND"], Length).and_then(|long| long.fill(&mut *keys)).map_err(|_| WRONG)?;
        }
        [1, ref salt @ .., log_rounds] => {
            if log_rounds > MAX_LOG_ROUNDS {
                return Err(COSTLY);
            }
            let rounds = NonZeroU32::new(1 << log_rounds).ok_or(WRONG)?;
            let passphrase = passphrase.ok_or(KeyFileError::PassphraseNeeded)?;
            pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA1, rounds, salt, passphrase, &mut *keys);
        }
        [2, ref salt @ .., log_n, log_r_p] => {
            let (log_r, log_p) = (log_r_p >> 4, log_r_p & 15);
            // 128 · N · r bytes, p times.
            if u32::from(log_n) + u32::from(log_r) + 7 > MAX_MEMORY.ilog2() || log_p > 4 {
                return Err(COSTLY);
            }
            let parameters = scrypt::Params::new(log_n, 1 << log_r, 1 << log_p, scrypt::Params::RECOMMENDED_LEN);
            let parameters = parameters.map_err(|_| WRONG)?;
            let passphrase = passphrase.ok_or(KeyFileError::PassphraseNeeded)?;
            scrypt::scrypt(passphrase, salt, &parameters, &mut *keys).map_err(|_| WRONG)?;
        }
        _ => return Err(KeyFileError::unsupported("its way of making a key of the passphrase", "")),
    }
    Ok(keys)
}
