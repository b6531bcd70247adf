//! PKCS#8 (RFC 5958), PKCS#1 (RFC 8017, A.1.2) and SEC1 (RFC 5915), in PEM and DER, encrypted or not. Knows algorithm
//! identifiers.

use pkcs8::{
    EncryptedPrivateKeyInfo, ObjectIdentifier, PrivateKeyInfo,
    der::{Decode, Reader, SliceReader, asn1::OctetStringRef},
    pkcs5::{self, EncryptionScheme, pbes2::Kdf},
    spki::AlgorithmIdentifierRef,
};
use zeroize::Zeroizing;

use super::{KeyFile, KeyFileError, MAX_MEMORY, pem::Block, pkcs12};
use crate::{public_key::Curve, sys::rsa::RsaIntegers};

pub(super) const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
pub(super) const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
pub(super) const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
pub(super) const X25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.110");
pub(super) const CURVES: [(ObjectIdentifier, Curve); 3] = [
    (ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7"), Curve::P256),
    (ObjectIdentifier::new_unwrap("1.3.132.0.34"), Curve::P384),
    (ObjectIdentifier::new_unwrap("1.3.132.0.35"), Curve::P521),
];

/// Rounds of PBKDF2: about a minute's time. OpenSSL makes 2,048, careful people a million.
const MAX_ROUNDS: u32 = 50_000_000;

/// Reads what stood in an armour.
pub(super) fn read_pem(block: Block, passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    let Block { label, cipher, mut bytes } = block;
    let encrypted = cipher.is_some();
    if let Some(cipher) = cipher {
        bytes = cipher.decrypt(&bytes, passphrase.ok_or(KeyFileError::PassphraseNeeded)?)?;
    }
    let key = match label.as_str() {
        "PRIVATE KEY" => pkcs8(&bytes),
        "ENCRYPTED PRIVATE KEY" => return encrypted_pkcs8(&bytes, passphrase),
        "RSA PRIVATE KEY" => pkcs1(&bytes),
        "EC PRIVATE KEY" => sec1(&bytes, None),
        "DSA PRIVATE KEY" => return Err(KeyFileError::unsupported("DSA", "")),
        other => return Err(KeyFileError::Unsupported(format!("what is called {}", other.escape_debug()).into(), "")),
    };
    // A wrong passphrase passes for the right one once in 256 times, as far as the padding tells.
    key.map_err(|error| if encrypted { wrong(error) } else { error })
}

/// Reads a file without armour.
pub(super) fn read_der(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    if PrivateKeyInfo::try_from(bytes).is_ok() {
        return pkcs8(bytes);
    }
    if pkcs1::RsaPrivateKey::from_der(bytes).is_ok() {
        return pkcs1(bytes);
    }
    if sec1::EcPrivateKey::from_der(bytes).is_ok() {
        return sec1(bytes, None);
    }
    if encrypted_parts(bytes).is_some() {
        return encrypted_pkcs8(bytes, passphrase);
    }
    Err(KeyFileError::UnknownFormat)
}

/// What a wrong passphrase makes of a file is no key.
fn wrong(error: KeyFileError) -> KeyFileError {
    match error {
        KeyFileError::Damaged(_) => KeyFileError::WrongPassphrase,
        other => other,
    }
}

fn encrypted_parts(bytes: &[u8]) -> Option<(AlgorithmIdentifierRef<'_>, &[u8])> {
    let parts = SliceReader::new(bytes).ok()?.sequence(|r| {
        let algorithm = AlgorithmIdentifierRef::decode(r)?;
        Ok((algorithm, OctetStringRef::decode(r)?.as_bytes()))
    });
    parts.ok()
}

fn encrypted_pkcs8(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    const NONE: KeyFileError = KeyFileError::damaged("it is no EncryptedPrivateKeyInfo");
    let (algorithm, ciphertext) = encrypted_parts(bytes).ok_or(NONE)?;
    let old = pkcs12::Pbe::new(&algorithm)?;
    let passphrase = passphrase.ok_or(KeyFileError::PassphraseNeeded)?;
    if let Some(old) = old {
        return pkcs8(&old.decrypt(ciphertext, passphrase)?).map_err(wrong);
    }
    let info = EncryptedPrivateKeyInfo::try_from(bytes).map_err(|_| unknown_encryption())?;
    check_cost(&info.encryption_algorithm)?;
    match info.decrypt(passphrase) {
        Ok(document) => pkcs8(document.as_bytes()).map_err(wrong),
        Err(pkcs8::Error::EncryptedPrivateKey(pkcs5::Error::UnsupportedAlgorithm { .. })) => Err(unknown_encryption()),
        Err(_) => Err(KeyFileError::WrongPassphrase),
    }
}

fn unknown_encryption() -> KeyFileError {
    KeyFileError::unsupported("its encryption", "`openssl pkcs8 -topk8 -in OLD -out NEW` writes a file with AES-256")
}

fn check_cost(scheme: &EncryptionScheme<'_>) -> Result<(), KeyFileError> {
    let EncryptionScheme::Pbes2(parameters) = scheme else { return Ok(()) };
    let affordable = match &parameters.kdf {
        Kdf::Pbkdf2(pbkdf2) => pbkdf2.iteration_count <= MAX_ROUNDS,
        Kdf::Scrypt(scrypt) => {
            let memory = scrypt.cost_parameter.checked_mul(128 * u64::from(scrypt.block_size));
            memory.is_some_and(|memory| memory <= MAX_MEMORY as u64) && scrypt.parallelization <= 16
        }
        _ => true,
    };
    if affordable {
        Ok(())
    } else {
        Err(KeyFileError::unsupported("a passphrase that takes so much memory or time to check", ""))
    }
}

fn pkcs8(bytes: &[u8]) -> Result<KeyFile, KeyFileError> {
    const NONE: KeyFileError = KeyFileError::damaged("it is no PrivateKeyInfo");
    let info = PrivateKeyInfo::try_from(bytes).map_err(|_| NONE)?;
    // Both wrap their bytes once more (RFC 8410, 7).
    let inner = || OctetStringRef::from_der(info.private_key).map(|string| string.as_bytes()).map_err(|_| NONE);
    match info.algorithm.oid {
        RSA | RSA_PSS => pkcs1(info.private_key),
        EC => sec1(info.private_key, info.algorithm.parameters_oid().ok()),
        ED25519 => KeyFile::ed25519(inner()?),
        X25519 => KeyFile::x25519(inner()?),
        other => Err(KeyFileError::Unsupported(format!("a key of the algorithm {other}").into(), "")),
    }
}

pub(super) fn pkcs1(bytes: &[u8]) -> Result<KeyFile, KeyFileError> {
    let key = pkcs1::RsaPrivateKey::from_der(bytes);
    let key = key.map_err(|_| KeyFileError::damaged("it is no RSAPrivateKey of two primes"))?;
    KeyFile::rsa(&RsaIntegers {
        n: key.modulus.as_bytes(),
        e: key.public_exponent.as_bytes(),
        d: key.private_exponent.as_bytes(),
        iqmp: key.coefficient.as_bytes(),
        p: key.prime1.as_bytes(),
        q: key.prime2.as_bytes(),
    })
}

/// The curve is named outside the key in PKCS#8, inside it otherwise.
fn sec1(bytes: &[u8], outside: Option<ObjectIdentifier>) -> Result<KeyFile, KeyFileError> {
    let key = sec1::EcPrivateKey::from_der(bytes).map_err(|_| KeyFileError::damaged("it is no ECPrivateKey"))?;
    let inside = key.parameters.and_then(sec1::EcParameters::named_curve);
    let named = outside.or(inside).ok_or(KeyFileError::unsupported("a curve without a name", ""))?;
    let curve = CURVES.iter().find(|(oid, _)| *oid == named).map(|(_, curve)| *curve);
    let curve = curve
        .ok_or_else(|| KeyFileError::Unsupported(format!("the curve {named}").into(), "P-256, P-384 and P-521 are"))?;
    // Some programs leave out leading zeros.
    let len = curve.scalar_len();
    let mut scalar = Zeroizing::new(vec![0; len.saturating_sub(key.private_key.len())]);
    scalar.extend_from_slice(key.private_key);
    KeyFile::ecdsa(curve, &scalar)
}
