//! PEM's armour (RFC 7468) and OpenPGP's, and the encryption inside it that OpenSSL's older formats have (RFC 1421). Knows
//! no key.

use aws_lc_rs::cipher::{
    AES_128, AES_192, AES_256, Algorithm, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey,
};
use base64ct::{Base64, Decoder, Encoding};
use cbc::cipher::{BlockDecryptMut, KeyIvInit, block_padding::Pkcs7};
use md5::{Digest, Md5};
use zeroize::Zeroizing;

use super::{KeyFileError, MAX_FILE, openpgp};

const BEGIN: &str = "-----BEGIN ";
const DASHES: &str = "-----";

/// What stood between the first pair of lines that belong to a private key.
pub(super) struct Block {
    /// What the armour says it is: `RSA PRIVATE KEY`.
    pub(super) label: String,
    /// The key by which the bytes are encrypted, where the headers say that they are.
    pub(super) cipher: Option<Dek>,
    /// What is armoured.
    pub(super) bytes: Zeroizing<Vec<u8>>,
}

/// `DEK-Info`: a cipher's name and its initialization vector.
pub(super) struct Dek {
    name: String,
    iv: [u8; 16],
}

/// Finds the private key in a text, which may have others around it: parameters, certificates. `None` where there is no
/// armour at all.
pub(super) fn read(text: &[u8]) -> Result<Option<Block>, KeyFileError> {
    let Ok(text) = std::str::from_utf8(text) else { return Ok(None) };
    let mut lines = text.lines().map(str::trim_end);
    let mut other = None;
    while let Some(line) = lines.next() {
        let Some(label) = line.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(DASHES)) else { continue };
        if label.ends_with("PRIVATE KEY") || label == openpgp::LABEL {
            return block(label, &mut lines).map(Some);
        }
        other.get_or_insert(label);
    }
    match other {
        Some(label) if label.ends_with("PUBLIC KEY") || label == "PGP PUBLIC KEY BLOCK" => Err(KeyFileError::PublicKey),
        Some(label) => Err(KeyFileError::Unsupported(format!("what is called {}", label.escape_debug()).into(), "")),
        None => Ok(None),
    }
}

/// Base64 in lines of so many characters, between BEGIN and END.
pub fn armour(label: &str, bytes: &[u8], width: usize) -> String {
    let mut text = format!("{BEGIN}{label}{DASHES}\n");
    for (n, c) in Base64::encode_string(bytes).chars().enumerate() {
        if n > 0 && n % width == 0 {
            text.push('\n');
        }
        text.push(c);
    }
    text.push_str(&format!("\n-----END {label}{DASHES}\n"));
    text
}

fn block<'a>(label: &str, lines: &mut impl Iterator<Item = &'a str>) -> Result<Block, KeyFileError> {
    const UNENDED: KeyFileError = KeyFileError::damaged("its last line, -----END, is missing");
    let end = format!("-----END {label}{DASHES}");
    let (mut cipher, mut base64) = (None, Zeroizing::new(String::with_capacity(MAX_FILE)));
    loop {
        let line = lines.next().ok_or(UNENDED)?;
        match line.split_once(':') {
            _ if line == end => break,
            Some(("DEK-Info", value)) => cipher = Some(dek(value)?),
            Some(_) => {}
            // OpenPGP's checksum of the lines, which readers need not look at (RFC 9580, section 6.1).
            None if line.len() == 5 && line.starts_with('=') => {}
            None => base64.push_str(line.trim()),
        }
    }
    Ok(Block { label: label.to_owned(), cipher, bytes: decode(&base64)? })
}

/// Base64 without its line ends.
pub(super) fn decode(base64: &str) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    const NONE: KeyFileError = KeyFileError::damaged("its lines are no base64");
    if base64.is_empty() {
        return Err(KeyFileError::damaged("there is nothing in it"));
    }
    let mut decoder = Decoder::<Base64>::new(base64.as_bytes()).map_err(|_| NONE)?;
    let mut bytes = Zeroizing::new(vec![0; decoder.remaining_len()]);
    decoder.decode(&mut bytes).map_err(|_| NONE)?;
    Ok(bytes)
}

fn dek(value: &str) -> Result<Dek, KeyFileError> {
    const NONE: KeyFileError = KeyFileError::damaged("its line DEK-Info has no initialization vector");
    let (name, hex) = value.trim().split_once(',').ok_or(NONE)?;
    let mut iv = [0; 16];
    let hex = hex.trim();
    if hex.len() > 32 {
        return Err(NONE);
    }
    for (byte, digits) in iv.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| NONE)?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| NONE)?;
    }
    Ok(Dek { name: name.trim().to_owned(), iv })
}

impl Dek {
    /// Decrypts in place what the block holds, as OpenSSL's PEM_read does: the key comes from one round of MD5.
    pub(super) fn decrypt(&self, bytes: &[u8], passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
        let aes = |algorithm: &'static Algorithm, len| {
            let key = key_of(passphrase, &self.iv, len);
            let key = UnboundCipherKey::new(algorithm, &key).and_then(PaddedBlockDecryptingKey::cbc_pkcs7);
            let mut bytes = Zeroizing::new(bytes.to_vec());
            let context = DecryptionContext::Iv128((&self.iv).into());
            let len = key.and_then(|key| key.decrypt(&mut bytes, context).map(|plain| plain.len()));
            let len = len.map_err(|_| KeyFileError::WrongPassphrase)?;
            bytes.truncate(len);
            Ok(bytes)
        };
        match self.name.as_str() {
            "AES-128-CBC" => aes(&AES_128, 16),
            "AES-192-CBC" => aes(&AES_192, 24),
            "AES-256-CBC" => aes(&AES_256, 32),
            "DES-EDE3-CBC" => des_ede3(&key_of(passphrase, &self.iv, 24), &self.iv[..8], bytes),
            other => Err(KeyFileError::Unsupported(
                format!("the cipher {}", other.escape_debug()).into(),
                "`openssl pkcs8 -topk8 -in OLD -out NEW` writes a file with a newer one",
            )),
        }
    }
}

/// OpenSSL's EVP_BytesToKey with MD5 and one round; the salt is the initialization vector's first half.
fn key_of(passphrase: &[u8], iv: &[u8; 16], len: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(Vec::with_capacity(48));
    let mut last = Zeroizing::new(Vec::with_capacity(16));
    while key.len() < len {
        let hash = Md5::new().chain_update(&*last).chain_update(passphrase).chain_update(&iv[..8]).finalize();
        *last = hash.to_vec();
        key.extend_from_slice(&last);
    }
    key.truncate(len);
    key
}

/// Triple DES in CBC mode, which aws-lc-rs leaves to its legacy features.
pub(super) fn des_ede3(key: &[u8], iv: &[u8], bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let decryptor = cbc::Decryptor::<des::TdesEde3>::new_from_slices(key, iv);
    let decryptor = decryptor.map_err(|_| KeyFileError::damaged("its initialization vector has the wrong length"))?;
    let plain = decryptor.decrypt_padded_vec_mut::<Pkcs7>(bytes);
    plain.map(Zeroizing::new).map_err(|_| KeyFileError::WrongPassphrase)
}
