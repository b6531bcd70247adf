//! Private keys written for other programs, encrypted: OpenSSH's own format and PKCS#8. Knows no file system; there is no way
//! to write a key that is not encrypted.

use aws_lc_rs::{
    cipher::{AES_256, EncryptingKey, EncryptionContext, UnboundCipherKey},
    rand,
};
use pkcs8::{
    PrivateKeyInfo, SecretDocument,
    der::asn1::{AnyRef, Null},
    pkcs5::{pbes2, scrypt},
    spki::AlgorithmIdentifierRef,
};
use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;
use zeroize::Zeroizing;

use super::{KeyFile, asn1, openssh, pem};
use crate::{
    public_key::KeyType,
    rfc4251::{Put, Reader},
    sys::rsa::{RsaIntegers, RsaKey},
};

/// Rounds of bcrypt's derivation, as ssh-keygen makes them: a third of a second.
const BCRYPT_ROUNDS: u32 = 24;
/// The cipher's block, to which OpenSSH fills up what is encrypted.
const BLOCK: usize = 16;
/// scrypt's cost: 16 MiB, which is all that OpenSSL reads without being told to, five times over.
const SCRYPT: (u8, u32, u32) = (14, 8, 5);

/// Why a key is not written.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum WriteError {
    /// Nothing protects the key: ask for another passphrase.
    #[error("an empty passphrase protects nothing")]
    EmptyPassphrase,
    /// The format has no place for keys of this type; OpenSSH's has.
    #[error("PKCS#8 has no form of keys of this type; OpenSSH's format has")]
    NoForm,
    /// The system gives no random numbers, or the arithmetic failed.
    #[error("the key could not be encrypted")]
    Failed,
}

impl KeyFile {
    /// OpenSSH's own format, with the comment, encrypted as ssh-keygen does it: bcrypt and AES-256 with a counter. For
    /// every type of key; ssh-keygen reads those that ssh knows. Takes a third of a second.
    pub fn to_openssh(&self, passphrase: &SecretString) -> Result<String, WriteError> {
        let passphrase = given(passphrase)?;
        let salt: [u8; 16] = random()?;
        let mut derived = Zeroizing::new([0; 32 + BLOCK]);
        bcrypt_pbkdf::bcrypt_pbkdf(passphrase, &salt, BCRYPT_ROUNDS, &mut *derived).map_err(|_| WriteError::Failed)?;
        let (key, iv) = derived.split_at(32);
        let iv: [u8; BLOCK] = iv.try_into().map_err(|_| WriteError::Failed)?;
        let mut private = self.private_part()?;
        let cipher = UnboundCipherKey::new(&AES_256, key).and_then(EncryptingKey::ctr);
        let context = EncryptionContext::Iv128(iv.into());
        cipher
            .and_then(|cipher| cipher.less_safe_encrypt(&mut private, context).map(drop))
            .map_err(|_| WriteError::Failed)?;

        let mut options = Vec::with_capacity(24);
        options.put_string(&salt);
        options.put_u32(BCRYPT_ROUNDS);
        let mut file = openssh::MAGIC.to_vec();
        [&b"aes256-ctr"[..], b"bcrypt", &options].into_iter().for_each(|part| file.put_string(part));
        file.put_u32(1);
        file.put_string(&self.public_part());
        file.put_string(&private);
        Ok(pem::armour(openssh::LABEL, &file, 70))
    }

    /// PKCS#8 in PEM, encrypted with PBES2: scrypt and AES-256 (RFC 5958, RFC 8018, RFC 7914); the comment is not in it.
    /// Takes some 200 ms. [`NoForm`](WriteError::NoForm) for keys that OpenSSL does not know.
    pub fn to_pkcs8(&self, passphrase: &SecretString) -> Result<String, WriteError> {
        let passphrase = given(passphrase)?;
        let (salt, iv): ([u8; 16], [u8; BLOCK]) = (random()?, random()?);
        let (log_n, r, p) = SCRYPT;
        let cost = scrypt::Params::new(log_n, r, p, 32).map_err(|_| WriteError::Failed)?;
        let parameters = pbes2::Parameters::scrypt_aes256cbc(cost, &salt, &iv).map_err(|_| WriteError::Failed)?;
        let sealed = self.encrypt_pkcs8(parameters, passphrase)?;
        Ok(pem::armour("ENCRYPTED PRIVATE KEY", sealed.as_bytes(), 64))
    }

    /// What OpenSSH encrypts: twice a random number, the key, the comment, and what fills the last block.
    fn private_part(&self) -> Result<Zeroizing<Vec<u8>>, WriteError> {
        // Room from the start: a buffer that grows leaves copies behind.
        let mut out = Zeroizing::new(Vec::with_capacity(self.fields.len() + self.comment.len() + 64));
        let check: [u8; 4] = random()?;
        out.extend_from_slice(&check);
        out.extend_from_slice(&check);
        out.extend_from_slice(&self.fields);
        out.put_string(self.comment.as_bytes());
        let padding = out.len().next_multiple_of(BLOCK) - out.len();
        out.extend((1..=BLOCK as u8).take(padding));
        Ok(out)
    }

    /// The public key as it stands in the file. Arti calls an expanded key's by its own name.
    fn public_part(&self) -> Vec<u8> {
        let expanded = KeyType::Ed25519Expanded.name();
        match Reader::new(&self.fields).string() {
            Ok(name) if name == expanded.as_bytes() => {
                let mut out = Vec::with_capacity(128);
                out.put_string(name);
                out.put_string(&self.blob[self.blob.len() - 32..]);
                out
            }
            _ => self.blob.clone(),
        }
    }

    fn encrypt_pkcs8(&self, how: pbes2::Parameters<'_>, passphrase: &[u8]) -> Result<SecretDocument, WriteError> {
        let failed = |_| WriteError::Failed;
        let mut r = Reader::new(&self.fields);
        let name = r.string().map_err(|_| WriteError::Failed)?;
        let (key_type, _) = KeyType::from_name(name).ok_or(WriteError::NoForm)?;
        let mut next = || r.string().map_err(|_| WriteError::Failed);
        let seal = |oid, parameters, private: &[u8]| {
            let algorithm = AlgorithmIdentifierRef { oid, parameters };
            PrivateKeyInfo::new(algorithm, private).encrypt_with_params(how.clone(), passphrase).map_err(failed)
        };
        match key_type {
            KeyType::Ed25519 | KeyType::X25519 => {
                let (_public, secret) = (next()?, next()?);
                // An OCTET STRING inside of one (RFC 8410, section 7).
                let mut inner = Zeroizing::new(Vec::with_capacity(2 + 32));
                inner.extend_from_slice(&[0x04, 32]);
                inner.extend_from_slice(secret.get(..32).ok_or(WriteError::Failed)?);
                let oid = if key_type == KeyType::Ed25519 { asn1::ED25519 } else { asn1::X25519 };
                seal(oid, None, &inner)
            }
            KeyType::Ecdsa(curve) => {
                let (_curve, point, short) = (next()?, next()?, next()?);
                // An mpint begins with zeros, or without them, as it likes.
                let digits = &short[short.iter().take_while(|digit| **digit == 0).count()..];
                let zeros = curve.scalar_len().checked_sub(digits.len()).ok_or(WriteError::Failed)?;
                let mut scalar = Zeroizing::new(vec![0; curve.scalar_len()]);
                scalar[zeros..].copy_from_slice(digits);
                let inner = sec1::EcPrivateKey { private_key: &scalar, parameters: None, public_key: Some(point) };
                let inner = SecretDocument::encode_msg(&inner).map_err(|_| WriteError::Failed)?;
                let oid = asn1::CURVES.iter().find(|known| known.1 == curve).ok_or(WriteError::NoForm)?.0;
                seal(asn1::EC, Some(AnyRef::from(&oid)), inner.as_bytes())
            }
            KeyType::Rsa => {
                let mut next = || r.mpint().map_err(|_| WriteError::Failed);
                let (n, e, d, iqmp, p, q) = (next()?, next()?, next()?, next()?, next()?, next()?);
                let key = RsaKey::from_integers(&RsaIntegers { n, e, d, iqmp, p, q });
                let inner = key.and_then(|key| key.to_der()).ok_or(WriteError::Failed)?;
                seal(asn1::RSA, Some(AnyRef::from(Null)), &inner)
            }
            KeyType::Ed25519Expanded | KeyType::MlDsa44Ed25519 | KeyType::SkEd25519 | KeyType::SkEcdsa => {
                Err(WriteError::NoForm)
            }
        }
    }
}

fn given(passphrase: &SecretString) -> Result<&[u8], WriteError> {
    let bytes = passphrase.expose_secret().as_bytes();
    if bytes.is_empty() { Err(WriteError::EmptyPassphrase) } else { Ok(bytes) }
}

fn random<const N: usize>() -> Result<[u8; N], WriteError> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| WriteError::Failed)?;
    Ok(bytes)
}
