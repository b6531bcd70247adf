//! The encryption that PKCS#12 has for passphrases with SHA-1 and Triple DES (RFC 7292, appendix B): what tor-gencert
//! writes authorities' identity keys with. Knows that one only.

use aws_lc_rs::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA1_OUTPUT_LEN};
use pkcs8::{
    ObjectIdentifier,
    der::{Decode, Reader, SliceReader, asn1::OctetStringRef},
    spki::AlgorithmIdentifierRef,
};
use zeroize::Zeroizing;

use super::{KeyFileError, pem::des_ede3};

/// pbeWithSHAAnd3-KeyTripleDES-CBC
const SHA1_DES_EDE3: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.12.1.3");
/// SHA-1's block.
const BLOCK: usize = 64;
/// Rounds of SHA-1: some seconds' time. OpenSSL makes 2,048.
const MAX_ROUNDS: u32 = 10_000_000;

/// The encryption's parameters.
pub(super) struct Pbe<'a> {
    salt: &'a [u8],
    rounds: u32,
}

impl<'a> Pbe<'a> {
    /// `None` for another encryption.
    pub(super) fn new(algorithm: &AlgorithmIdentifierRef<'a>) -> Result<Option<Self>, KeyFileError> {
        const WRONG: KeyFileError = KeyFileError::damaged("its encryption has no salt and no number of rounds");
        if algorithm.oid != SHA1_DES_EDE3 {
            return Ok(None);
        }
        let value = algorithm.parameters.ok_or(WRONG)?;
        let mut r = SliceReader::new(value.value()).map_err(|_| WRONG)?;
        let salt = OctetStringRef::decode(&mut r).map_err(|_| WRONG)?.as_bytes();
        let rounds = u32::decode(&mut r).map_err(|_| WRONG)?;
        if salt.is_empty() || salt.len() > BLOCK || rounds == 0 || !r.is_finished() {
            return Err(WRONG);
        }
        if rounds > MAX_ROUNDS {
            return Err(KeyFileError::unsupported("a passphrase that takes so much time to check", ""));
        }
        Ok(Some(Self { salt, rounds }))
    }

    pub(super) fn decrypt(&self, bytes: &[u8], passphrase: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
        let passphrase = std::str::from_utf8(passphrase).map_err(|_| KeyFileError::WrongPassphrase)?;
        // Two bytes a character, and two of zeros at the end.
        let mut wide = Zeroizing::new(Vec::with_capacity(2 * passphrase.len() + 2));
        passphrase.encode_utf16().chain([0]).for_each(|unit| wide.extend_from_slice(&unit.to_be_bytes()));
        let (key, iv) = (self.derive(1, &wide, 24), self.derive(2, &wide, 8));
        des_ede3(&key, &iv, bytes)
    }

    /// RFC 7292, B.2, with SHA-1. `purpose` is 1 for a key, 2 for an initialization vector.
    fn derive(&self, purpose: u8, passphrase: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let filled = |bytes: &[u8]| bytes.iter().copied().cycle().take(bytes.len().next_multiple_of(BLOCK)).collect();
        let mut input: Zeroizing<Vec<u8>> = Zeroizing::new(filled(self.salt));
        input.extend_from_slice(&Zeroizing::<Vec<u8>>::new(filled(passphrase)));
        let mut out = Zeroizing::new(Vec::with_capacity(len + SHA1_OUTPUT_LEN));
        while out.len() < len {
            let mut hash = Zeroizing::new([0; SHA1_OUTPUT_LEN]);
            hash.copy_from_slice(&sha1(&[&[purpose; BLOCK], &input]));
            for _ in 1..self.rounds {
                let again = sha1(&[&*hash]);
                hash.copy_from_slice(&again);
            }
            out.extend_from_slice(&*hash);
            for block in input.chunks_mut(BLOCK) {
                add(block, &hash);
            }
        }
        out.truncate(len);
        out
    }
}

/// Adds the hash, repeated, and one to a block: as numbers, without the carry beyond the block.
fn add(block: &mut [u8], hash: &[u8; SHA1_OUTPUT_LEN]) {
    let mut carry = 1;
    for (index, byte) in block.iter_mut().enumerate().rev() {
        let sum = u16::from(*byte) + u16::from(hash[index % SHA1_OUTPUT_LEN]) + carry;
        *byte = (sum & 0xff) as u8;
        carry = sum >> 8;
    }
}

fn sha1(parts: &[&[u8]]) -> [u8; SHA1_OUTPUT_LEN] {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    parts.iter().for_each(|part| context.update(part));
    let mut out = [0; SHA1_OUTPUT_LEN];
    out.copy_from_slice(context.finish().as_ref());
    out
}
