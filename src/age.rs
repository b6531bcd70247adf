//! age files (<https://age-encryption.org/v1>) with X25519 recipients, whole in memory. Knows no store and no key of ssh's.
//!
//! The crate `age` brings seventy others, a translation system and a second generation of hashes among them. What is needed of
//! the format is on this page, over aws-lc-rs, and the tests read and write with the real `age`.

use std::fmt;

use aws_lc_rs::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    agreement::{self, PrivateKey, UnparsedPublicKey, agree},
    constant_time, hkdf, hmac, rand,
};
use base64ct::{Base64Unpadded, Encoding};
use thiserror::Error;
use zeroize::Zeroizing;

const INTRO: &str = "age-encryption.org/v1";
const X25519_INFO: &[u8] = b"age-encryption.org/v1/X25519";
const RECIPIENT: &str = "age";
const SECRET_KEY: &str = "age-secret-key-";
/// Plaintext bytes of a full chunk.
const CHUNK: usize = 64 * 1024;
const TAG: usize = 16;
const FILE_KEY: usize = 16;
const PAYLOAD_NONCE: usize = 16;
/// A line of a stanza's body, in characters; the last is shorter.
const LINE: usize = 64;
/// The longest header that is read, in bytes.
const MAX_HEADER: usize = 64 * 1024;

/// Why something is no age file, or does not open.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AgeError {
    /// Not an `age1…` or `AGE-SECRET-KEY-1…`: look for a missing or mistyped character.
    #[error("this is no age key: a character is missing or mistyped")]
    NoKey,
    /// Not in the format, or cut off within its header.
    #[error("this is no age file of version 1")]
    NoFile,
    /// It is encrypted to others.
    #[error("the file is not encrypted to this key")]
    NotForThisKey,
    /// It was changed or cut off.
    #[error("the age file was changed or cut off")]
    Damaged,
    /// The system gives no random numbers, or the cryptography refused a recipient.
    #[error("the file cannot be encrypted")]
    Failed,
}

/// To whom a file is encrypted: `age1…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Recipient([u8; 32]);

/// What opens it: `AGE-SECRET-KEY-1…`. Wiped when it is dropped, and not printed.
pub struct SecretKey(Zeroizing<[u8; 32]>);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

impl fmt::Display for Recipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bech32_encode(RECIPIENT, &self.0))
    }
}

impl std::str::FromStr for Recipient {
    type Err = AgeError;

    fn from_str(text: &str) -> Result<Self, AgeError> {
        bech32_decode(RECIPIENT, text).map(|key| Self(*key))
    }
}

impl SecretKey {
    /// A new one.
    pub fn generate() -> Result<Self, AgeError> {
        let mut key = Zeroizing::new([0; 32]);
        rand::fill(&mut *key).map_err(|_| AgeError::Failed)?;
        Ok(Self(key))
    }

    /// Reads `AGE-SECRET-KEY-1…`, in capitals or small letters.
    pub fn parse(text: &str) -> Result<Self, AgeError> {
        bech32_decode(SECRET_KEY, text).map(Self)
    }

    /// As `age-keygen` writes it, in capitals.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = bech32_encode(SECRET_KEY, &*self.0);
        text.make_ascii_uppercase();
        text
    }

    /// Whom to encrypt to, so that this key opens it.
    pub fn recipient(&self) -> Result<Recipient, AgeError> {
        public_of(&self.private()?).map(Recipient)
    }

    fn private(&self) -> Result<PrivateKey, AgeError> {
        PrivateKey::from_private_key(&agreement::X25519, &*self.0).map_err(|_| AgeError::Failed)
    }

    /// The file key of a stanza that was made for this key.
    fn unwrap(&self, share: &[u8], body: &[u8]) -> Result<Option<FileKey>, AgeError> {
        let recipient = self.recipient()?;
        let Ok(share) = share.try_into() else { return Ok(None) };
        let Some(key) = wrapping_key(&self.private()?, share, share, &recipient.0) else { return Ok(None) };
        let mut text = Zeroizing::new(body.to_vec());
        let opened = key.open_in_place(Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::empty(), &mut text);
        Ok(opened.ok().and_then(|key| <[u8; FILE_KEY]>::try_from(&*key).ok()).map(Zeroizing::new))
    }
}

type FileKey = Zeroizing<[u8; FILE_KEY]>;

/// Encrypts `plaintext` so that each of `recipients` can read it.
pub fn encrypt(recipients: &[Recipient], plaintext: &[u8]) -> Result<Vec<u8>, AgeError> {
    let mut file_key = FileKey::default();
    let mut nonce = [0; PAYLOAD_NONCE];
    rand::fill(&mut *file_key).and_then(|()| rand::fill(&mut nonce)).map_err(|_| AgeError::Failed)?;
    let mut header = format!("{INTRO}\n");
    for recipient in recipients {
        stanza(&mut header, recipient, &file_key)?;
    }
    header.push_str("---");
    let mac = hmac::sign(&header_key(&file_key)?, header.as_bytes());
    header.push_str(&format!(" {}\n", Base64Unpadded::encode_string(mac.as_ref())));

    let mut out = header.into_bytes();
    out.reserve(PAYLOAD_NONCE + plaintext.len() + (plaintext.len() / CHUNK + 1) * TAG);
    out.extend_from_slice(&nonce);
    let key = payload_key(&file_key, &nonce)?;
    let count = plaintext.len().div_ceil(CHUNK).max(1);
    for n in 0..count {
        let chunk = &plaintext[n * CHUNK..plaintext.len().min((n + 1) * CHUNK)];
        let mut text = Zeroizing::new(chunk.to_vec());
        let tag = key
            .seal_in_place_separate_tag(chunk_nonce(n, n + 1 == count), Aad::empty(), &mut text)
            .map_err(|_| AgeError::Failed)?;
        out.extend_from_slice(&text);
        out.extend_from_slice(tag.as_ref());
    }
    Ok(out)
}

/// What [`encrypt`], or any age, encrypted to `key`. All of it is authenticated before any of it is returned.
pub fn decrypt(key: &SecretKey, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, AgeError> {
    let (file_key, payload) = open_header(key, file)?;
    let (nonce, mut rest) = payload.split_first_chunk::<PAYLOAD_NONCE>().ok_or(AgeError::Damaged)?;
    let key = payload_key(&file_key, nonce)?;
    let mut plaintext = Zeroizing::new(Vec::with_capacity(rest.len()));
    for n in 0.. {
        let (chunk, after) = rest.split_at(rest.len().min(CHUNK + TAG));
        let mut text = Zeroizing::new(chunk.to_vec());
        let last = after.is_empty();
        let opened = key.open_in_place(chunk_nonce(n, last), Aad::empty(), &mut text).map_err(|_| AgeError::Damaged)?;
        if opened.is_empty() && n > 0 {
            return Err(AgeError::Damaged);
        }
        plaintext.extend_from_slice(opened);
        rest = after;
        if last {
            break;
        }
    }
    Ok(plaintext)
}

/// The file key, once the header proved to be made with it, and what follows the header.
fn open_header<'a>(key: &SecretKey, file: &'a [u8]) -> Result<(FileKey, &'a [u8]), AgeError> {
    let mut at = 0;
    let mut line = || {
        let rest = &file[at..file.len().min(MAX_HEADER)];
        let len = rest.iter().position(|&b| b == b'\n').ok_or(AgeError::NoFile)?;
        let start = at;
        at += len + 1;
        std::str::from_utf8(&rest[..len]).map(|line| (start, line)).map_err(|_| AgeError::NoFile)
    };
    if line()?.1 != INTRO {
        return Err(AgeError::NoFile);
    }
    let mut file_key = None;
    loop {
        let (start, first) = line()?;
        if let Some(mac) = first.strip_prefix("--- ") {
            let mac = Base64Unpadded::decode_vec(mac).map_err(|_| AgeError::NoFile)?;
            let file_key: FileKey = file_key.ok_or(AgeError::NotForThisKey)?;
            let header = &file[..start + "---".len()];
            hmac::verify(&header_key(&file_key)?, header, &mac).map_err(|_| AgeError::Damaged)?;
            return Ok((file_key, &file[at..]));
        }
        let mut arguments = first.strip_prefix("-> ").ok_or(AgeError::NoFile)?.split(' ');
        let mut body = String::new();
        loop {
            let (_, part) = line()?;
            body.push_str(part);
            if part.len() < LINE {
                break;
            }
        }
        let (kind, share, more) = (arguments.next(), arguments.next(), arguments.next());
        if let (Some("X25519"), Some(share), None, None) = (kind, share, more, &file_key) {
            let decoded = |text| Base64Unpadded::decode_vec(text).map_err(|_| AgeError::NoFile);
            file_key = key.unwrap(&decoded(share)?, &decoded(&body)?)?;
        }
    }
}

/// Appends the stanza that gives `recipient` the file key.
fn stanza(header: &mut String, recipient: &Recipient, file_key: &FileKey) -> Result<(), AgeError> {
    let ephemeral = PrivateKey::generate(&agreement::X25519).map_err(|_| AgeError::Failed)?;
    let share = public_of(&ephemeral)?;
    let key = wrapping_key(&ephemeral, &recipient.0, &share, &recipient.0).ok_or(AgeError::Failed)?;
    let mut body = Zeroizing::new(file_key.to_vec());
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key([0; NONCE_LEN]), Aad::empty(), &mut *body)
        .map_err(|_| AgeError::Failed)?;
    let encoded = [&share[..], &body].map(Base64Unpadded::encode_string);
    header.push_str(&format!("-> X25519 {}\n{}\n", encoded[0], encoded[1]));
    Ok(())
}

fn public_of(key: &PrivateKey) -> Result<[u8; 32], AgeError> {
    let public = key.compute_public_key().map_err(|_| AgeError::Failed)?;
    public.as_ref().try_into().map_err(|_| AgeError::Failed)
}

/// `None` for a peer of low order.
fn wrapping_key(own: &PrivateKey, peer: &[u8; 32], share: &[u8; 32], recipient: &[u8; 32]) -> Option<LessSafeKey> {
    let salt = [*share, *recipient].concat();
    agree(own, UnparsedPublicKey::new(&agreement::X25519, peer), (), |secret| {
        expand(&salt, secret, X25519_INFO).map_err(|_| ())
    })
    .ok()
    .and_then(|key| aead(&key).ok())
}

fn header_key(file_key: &FileKey) -> Result<hmac::Key, AgeError> {
    Ok(hmac::Key::new(hmac::HMAC_SHA256, &*expand(&[], &**file_key, b"header")?))
}

fn payload_key(file_key: &FileKey, nonce: &[u8; PAYLOAD_NONCE]) -> Result<LessSafeKey, AgeError> {
    aead(&*expand(nonce, &**file_key, b"payload")?)
}

fn aead(key: &[u8; 32]) -> Result<LessSafeKey, AgeError> {
    UnboundKey::new(&CHACHA20_POLY1305, key).map(LessSafeKey::new).map_err(|_| AgeError::Failed)
}

/// HKDF-SHA-256 (RFC 5869), 32 bytes of it.
fn expand(salt: &[u8], secret: &[u8], info: &[u8]) -> Result<Zeroizing<[u8; 32]>, AgeError> {
    let mut key = Zeroizing::new([0; 32]);
    let made = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    made.expand(&[info], hkdf::HKDF_SHA256).and_then(|okm| okm.fill(&mut *key)).map_err(|_| AgeError::Failed)?;
    Ok(key)
}

/// Eleven bytes of counter, then whether it is the last chunk.
fn chunk_nonce(n: usize, last: bool) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[3..11].copy_from_slice(&(n as u64).to_be_bytes());
    nonce[11] = u8::from(last);
    Nonce::assume_unique_for_key(nonce)
}

const BECH32: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";

/// Bech32 (BIP 173), without its bound on the length.
fn bech32_encode(hrp: &str, data: &[u8]) -> Zeroizing<String> {
    let mut values = Zeroizing::new(Vec::with_capacity(data.len() * 2 + 8));
    let (mut bits, mut held) = (0u32, 0);
    for &byte in data {
        bits = (bits & 0x1f) << 8 | u32::from(byte);
        held += 8;
        while held >= 5 {
            held -= 5;
            values.push((bits >> held) as u8 & 31);
        }
    }
    if held > 0 {
        values.push((bits << (5 - held)) as u8 & 31);
    }
    let sum = checksum(hrp, values.iter().copied().chain([0; 6])) ^ 1;
    values.extend((0..6).map(|n| (sum >> (5 * (5 - n))) as u8 & 31));
    let mut text = Zeroizing::new(String::with_capacity(hrp.len() + 1 + values.len()));
    text.push_str(hrp);
    text.push('1');
    text.extend(values.iter().map(|&v| char::from(BECH32[usize::from(v)])));
    text
}

fn bech32_decode(hrp: &str, text: &str) -> Result<Zeroizing<[u8; 32]>, AgeError> {
    let text = text.trim();
    if text.len() != hrp.len() + 1 + 52 + 6
        || text.chars().any(|c| c.is_ascii_uppercase()) && text.chars().any(|c| c.is_ascii_lowercase())
    {
        return Err(AgeError::NoKey);
    }
    let text = Zeroizing::new(text.to_ascii_lowercase());
    let data = text.strip_prefix(hrp).and_then(|rest| rest.strip_prefix('1')).ok_or(AgeError::NoKey)?;
    let value = |b: u8| BECH32.iter().position(|&c| c == b).map(|v| v as u8).ok_or(AgeError::NoKey);
    let values = Zeroizing::new(data.bytes().map(value).collect::<Result<Vec<u8>, _>>()?);
    if checksum(hrp, values.iter().copied()) != 1 {
        return Err(AgeError::NoKey);
    }
    let mut key = Zeroizing::new([0; 32]);
    let (mut bits, mut held, mut at) = (0u32, 0, 0);
    for &v in &values[..52] {
        bits = (bits & 0xff) << 5 | u32::from(v);
        held += 5;
        if held >= 8 {
            held -= 8;
            key[at] = (bits >> held) as u8;
            at += 1;
        }
    }
    // The four bits that are left say nothing; another than zero would be a second name of the same key.
    if constant_time::verify_slices_are_equal(&[bits as u8 & 0xf], &[0]).is_err() {
        return Err(AgeError::NoKey);
    }
    Ok(key)
}

fn checksum(hrp: &str, values: impl Iterator<Item = u8>) -> u32 {
    const GENERATOR: [u32; 5] = [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3];
    let expanded = hrp.bytes().map(|b| b >> 5).chain([0]).chain(hrp.bytes().map(|b| b & 31));
    expanded.chain(values).fold(1, |sum, value| {
        let top = sum >> 25;
        let next = (sum & 0x01ff_ffff) << 5 ^ u32::from(value);
        (0..5).filter(|n| top >> n & 1 == 1).fold(next, |sum, n| sum ^ GENERATOR[n])
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::{fs, process::Command};

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_real_age_reads_what_is_written_here_and_the_other_way_round() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let keygen = Command::new("age-keygen").output().expect("the package age");
        let text = String::from_utf8(keygen.stdout).unwrap();
        let secret = text.lines().find(|line| line.starts_with("AGE-")).unwrap();
        let recipient = text.lines().find_map(|line| line.strip_prefix("# public key: ")).unwrap();
        let key = SecretKey::parse(secret).unwrap();
        assert_eq!((&**key.to_text(), key.recipient().unwrap().to_string()), (secret, recipient.to_owned()));
        fs::write(at("key"), secret).unwrap();

        let other = SecretKey::generate().unwrap().recipient().unwrap();
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let plain = vec![7; len];
            fs::write(at("ours"), encrypt(&[other, recipient.parse().unwrap()], &plain).unwrap()).unwrap();
            let read = Command::new("age").arg("-d").arg("-i").args([at("key"), at("ours")]).output().unwrap();
            assert!(read.status.success() && read.stdout == plain, "{len}: {}", String::from_utf8_lossy(&read.stderr));

            fs::write(at("plain"), &plain).unwrap();
            let made = Command::new("age")
                .args(["-r", &other.to_string(), "-r", recipient, "-o"])
                .args([at("theirs"), at("plain")])
                .status()
                .unwrap();
            assert!(made.success());
            assert_eq!(**decrypt(&key, &fs::read(at("theirs")).unwrap()).unwrap(), plain);
            fs::remove_file(at("theirs")).unwrap();
        }
    }

    #[test]
    fn a_file_opens_whole_and_for_its_recipients_only() {
        let [key, other] = [(); 2].map(|()| SecretKey::generate().unwrap());
        let file = encrypt(&[key.recipient().unwrap()], &[1; CHUNK + 5]).unwrap();
        assert_eq!(decrypt(&key, &file).unwrap().len(), CHUNK + 5);
        assert_eq!(decrypt(&other, &file).unwrap_err(), AgeError::NotForThisKey);
        for len in (0..file.len()).step_by(997).chain([file.len() - 1, file.len() - 5 - TAG]) {
            assert!(decrypt(&key, &file[..len]).is_err(), "{len}");
        }
        assert!(decrypt(&key, &[&file[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_mistyped_key_is_none() {
        let key = SecretKey::generate().unwrap();
        let text = key.to_text();
        assert_eq!(*SecretKey::parse(&text.to_lowercase()).unwrap().0, *key.0);
        assert_eq!(*SecretKey::parse(&format!(" {}\n", *text)).unwrap().0, *key.0);
        for at in SECRET_KEY.len() + 1..text.len() {
            let other = if text.as_bytes()[at] == b'Q' { "P" } else { "Q" };
            let wrong = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            assert_eq!(SecretKey::parse(&wrong).unwrap_err(), AgeError::NoKey);
        }
        let mixed = format!("{}{}", &text[..20], text[20..].to_lowercase());
        assert_eq!(SecretKey::parse(&mixed).unwrap_err(), AgeError::NoKey);
        assert_eq!("age1".parse::<Recipient>().unwrap_err(), AgeError::NoKey);
    }

    proptest! {
        #[test]
        fn a_changed_byte_does_not_pass(at: prop::sample::Index, bit in 0u8..8) {
            let key = SecretKey(Zeroizing::new([9; 32]));
            let mut file = encrypt(&[key.recipient().unwrap()], b"plain").unwrap();
            let at = at.index(file.len());
            file[at] ^= 1 << bit;
            prop_assert!(decrypt(&key, &file).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, text: String) {
            let key = SecretKey(Zeroizing::new([9; 32]));
            let headed = [b"age-encryption.org/v1\n-> X25519 ", &bytes[..]].concat();
            let _ = (decrypt(&key, &bytes), decrypt(&key, &headed), SecretKey::parse(&text), text.parse::<Recipient>());
        }
    }
}
