//! PuTTY's .ppk files of versions 2 and 3 (the PuTTY manual, appendix C). Knows their lines and which fields each type of
//! key has.

use std::{collections::HashMap, str::Lines};

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::{
    cipher::{AES_256, DecryptingKey, DecryptionContext, UnboundCipherKey},
    digest::{SHA1_FOR_LEGACY_USE_ONLY, digest},
    hmac,
};
use zeroize::Zeroizing;

use super::{KeyFile, KeyFileError, MAX_MEMORY, pem};
use crate::{
    public_key::{KeyType, PublicKey},
    rfc4251::{Put, Reader},
    sys::rsa::RsaIntegers,
};

const HEADER: &[u8] = b"PuTTY-User-Key-File-";
/// Passes of Argon2; PuTTY makes some ten of them.
const MAX_PASSES: u32 = 10_000;
const MAC_LABEL: &[u8] = b"putty-private-key-file-mac-key";

/// Whether a file begins as PuTTY's do.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    bytes.starts_with(HEADER)
}

/// A file's lines, by their names.
struct File<'a> {
    version: u8,
    key_type: &'a str,
    values: HashMap<&'a str, &'a str>,
    public: Zeroizing<Vec<u8>>,
    private: Zeroizing<Vec<u8>>,
}

impl<'a> File<'a> {
    fn parse(text: &'a str) -> Result<Self, KeyFileError> {
        let mut lines = text.lines();
        let (name, key_type) = pair(lines.next().unwrap_or_default())?;
        let version = match name.as_bytes().strip_prefix(HEADER) {
            Some(b"2") => 2,
            Some(b"3") => 3,
            _ => return Err(KeyFileError::unsupported("this version of PuTTY's format", "versions 2 and 3 are")),
        };
        let (mut values, mut public, mut private) = (HashMap::new(), None, None);
        while let Some(line) = lines.next() {
            let (name, value) = pair(line)?;
            match name {
                "Public-Lines" => public = Some(base64(value, &mut lines)?),
                "Private-Lines" => private = Some(base64(value, &mut lines)?),
                _ => drop(values.insert(name, value)),
            }
        }
        let missing = || KeyFileError::damaged("it lacks its public or its private lines");
        Ok(Self {
            version,
            key_type,
            values,
            public: public.ok_or_else(missing)?,
            private: private.ok_or_else(missing)?,
        })
    }

    fn value(&self, name: &'static str) -> Result<&'a str, KeyFileError> {
        let missing = || KeyFileError::Damaged(format!("the line {name} is missing").into());
        self.values.get(name).copied().ok_or_else(missing)
    }

    fn number(&self, name: &'static str) -> Result<u32, KeyFileError> {
        let wrong = || KeyFileError::Damaged(format!("the line {name} has no number").into());
        self.value(name)?.parse().map_err(|_| wrong())
    }

    fn hex(&self, name: &'static str) -> Result<Vec<u8>, KeyFileError> {
        let wrong = || KeyFileError::Damaged(format!("the line {name} is not hexadecimal").into());
        let value = self.value(name)?.as_bytes();
        if value.len() % 2 != 0 || value.len() > 1024 {
            return Err(wrong());
        }
        let digits = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
        value.chunks(2).map(|pair| digits(pair).ok_or_else(wrong)).collect()
    }
}

fn pair(line: &str) -> Result<(&str, &str), KeyFileError> {
    line.split_once(": ").ok_or(KeyFileError::damaged("a line has no name and no value"))
}

/// So many lines of base64.
fn base64(count: &str, lines: &mut Lines<'_>) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let count: usize = count.parse().map_err(|_| KeyFileError::damaged("a number of lines is none"))?;
    let mut text = Zeroizing::new(String::with_capacity(super::MAX_FILE));
    for _ in 0..count {
        let line = lines.next().ok_or(KeyFileError::damaged("lines are missing at its end"))?;
        text.push_str(line.trim());
    }
    pem::decode(&text)
}

/// What is made of the passphrase.
struct Keys {
    cipher: Zeroizing<Vec<u8>>,
    iv: [u8; 16],
    mac: hmac::Key,
}

impl Keys {
    fn derive(file: &File<'_>, passphrase: &[u8]) -> Result<Self, KeyFileError> {
        if file.version == 2 {
            let mut cipher = Zeroizing::new(Vec::with_capacity(40));
            for sequence in [[0; 4], [0, 0, 0, 1]] {
                let input = Zeroizing::new([&sequence, passphrase].concat());
                cipher.extend_from_slice(digest(&SHA1_FOR_LEGACY_USE_ONLY, &input).as_ref());
            }
            cipher.truncate(32);
            return Ok(Self { cipher, iv: [0; 16], mac: mac_of_version_2(passphrase) });
        }
        let algorithm = match file.value("Key-Derivation")? {
            "Argon2id" => Algorithm::Argon2id,
            "Argon2i" => Algorithm::Argon2i,
            "Argon2d" => Algorithm::Argon2d,
            _ => return Err(KeyFileError::unsupported("its way of making a key of the passphrase", "")),
        };
        let (memory, passes) = (file.number("Argon2-Memory")?, file.number("Argon2-Passes")?);
        if memory as usize > MAX_MEMORY / 1024 || passes > MAX_PASSES {
            return Err(KeyFileError::unsupported("a passphrase that takes so much memory or time to check", ""));
        }
        let wrong = |_| KeyFileError::damaged("its parameters of Argon2 make no sense");
        let parameters = Params::new(memory, passes, file.number("Argon2-Parallelism")?, None).map_err(wrong)?;
        let mut made = Zeroizing::new([0; 80]);
        Argon2::new(algorithm, Version::V0x13, parameters)
            .hash_password_into(passphrase, &file.hex("Argon2-Salt")?, &mut *made)
            .map_err(wrong)?;
        let mut iv = [0; 16];
        iv.copy_from_slice(&made[32..48]);
        let mac = hmac::Key::new(hmac::HMAC_SHA256, &made[48..]);
        Ok(Self { cipher: Zeroizing::new(made[..32].to_vec()), iv, mac })
    }
}

fn mac_of_version_2(passphrase: &[u8]) -> hmac::Key {
    let input = Zeroizing::new([MAC_LABEL, passphrase].concat());
    let key = digest(&SHA1_FOR_LEGACY_USE_ONLY, &input);
    hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key.as_ref())
}

/// Reads the file.
pub(super) fn read(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    let text = std::str::from_utf8(bytes).map_err(|_| KeyFileError::damaged("it is no text"))?;
    let mut file = File::parse(text)?;
    let encryption = file.value("Encryption")?;
    let mac = match encryption {
        "none" if file.version == 2 => mac_of_version_2(b""),
        "none" => hmac::Key::new(hmac::HMAC_SHA256, b""),
        "aes256-cbc" => {
            let keys = Keys::derive(&file, passphrase.ok_or(KeyFileError::PassphraseNeeded)?)?;
            let key = UnboundCipherKey::new(&AES_256, &keys.cipher).and_then(DecryptingKey::cbc);
            let context = DecryptionContext::Iv128((&keys.iv).into());
            let done = key.and_then(|key| key.decrypt(&mut file.private, context).map(drop));
            done.map_err(|_| KeyFileError::damaged("what is encrypted has the wrong length"))?;
            keys.mac
        }
        _ => return Err(KeyFileError::unsupported("its cipher", "PuTTYgen saves it with AES-256")),
    };
    let comment = file.values.get("Comment").copied().unwrap_or_default();
    let mut authenticated = Zeroizing::new(Vec::with_capacity(super::MAX_FILE));
    for part in [file.key_type.as_bytes(), encryption.as_bytes(), comment.as_bytes(), &file.public, &file.private] {
        authenticated.put_string(part);
    }
    if hmac::verify(&mac, &authenticated, &file.hex("Private-MAC")?).is_err() {
        return Err(match encryption {
            "none" => KeyFileError::damaged("its authentication code is wrong: it was changed"),
            _ => KeyFileError::WrongPassphrase,
        });
    }
    Ok(key(&file.public, &file.private)?.commented(comment.as_bytes()))
}

fn key(public: &[u8], private: &[u8]) -> Result<KeyFile, KeyFileError> {
    let mut r = Reader::new(private);
    match PublicKey::parse(public)? {
        PublicKey::Rsa { e, n } => {
            let (d, p, q, iqmp) = (r.mpint()?, r.mpint()?, r.mpint()?, r.mpint()?);
            KeyFile::rsa(&RsaIntegers { n, e, d, iqmp, p, q })
        }
        PublicKey::Ecdsa(curve, point) => Ok(KeyFile::new(KeyType::Ecdsa(curve), &PublicKey::Ecdsa(curve, point), {
            let scalar = r.mpint()?;
            move |out: &mut Vec<u8>| {
                out.put_string(curve.name().as_bytes());
                out.put_string(point);
                out.put_mpint(scalar);
            }
        })),
        PublicKey::Ed25519(_) => {
            // A number, the lowest byte first, without zeros at its end.
            let number = r.string()?;
            let mut seed = Zeroizing::new([0; 32]);
            let place = seed.get_mut(..number.len()).ok_or(KeyFileError::damaged("its Ed25519 key is too long"))?;
            place.copy_from_slice(number);
            KeyFile::ed25519(&*seed)
        }
        _ => Err(KeyFileError::unsupported("this type of key", "")),
    }
}
