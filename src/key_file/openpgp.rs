//! OpenPGP's secret keys of version 4 (RFC 4880; RFC 9580, sections 3.7, 4 and 5.5), as `gpg --export-secret-keys` writes
//! them, armoured or not. Knows packets and their encryption by passphrases.
//!
//! A file has a primary key, its subkeys, user ids, and signatures that say what belongs together. Whoever has the
//! private keys is believed without those: no signature is verified, nothing is asked of expiry or revocation.
//!
//! The crate `pgp` brings 75 others, half as many as the whole program has, with ciphers that nobody should use and an RSA
//! that leaks its timing. What is needed is on this page, and the tests read what gpg writes.

use aws_lc_rs::{
    cipher::{AES_128, AES_192, AES_256, Algorithm, DecryptingKey, DecryptionContext, UnboundCipherKey},
    digest::{SHA1_FOR_LEGACY_USE_ONLY, digest},
};
use zeroize::Zeroizing;

use super::{
    Contents, KeyFile, KeyFileError,
    s2k::{EXPORT_AGAIN, S2k},
};
use crate::{
    public_key::PublicKey,
    rfc4251::{Reader, WireError},
    spki::CURVES,
    sys::rsa::RsaIntegers,
};

/// What stands in the armour's first line.
pub(super) const LABEL: &str = "PGP PRIVATE KEY BLOCK";
/// Keys in one file. Each may make its own key of the passphrase, which takes a tenth of a second at most.
const MAX_KEYS: usize = 32;

/// Types of packets (RFC 9580, section 5).
const SECRET_KEY: u8 = 5;
const PUBLIC_KEY: u8 = 6;
const SECRET_SUBKEY: u8 = 7;
const USER_ID: u8 = 13;

/// Curves that are named as they were before they had names of their own (RFC 9580, section 9.2).
const ED25519: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0xda, 0x47, 0x0f, 0x01];
const CV25519: &[u8] = &[0x2b, 0x06, 0x01, 0x04, 0x01, 0x97, 0x55, 0x01, 0x05, 0x01];

/// Whether a file without armour begins as keys of OpenPGP do.
pub(super) fn is_one(bytes: &[u8]) -> bool {
    matches!(bytes.first().map(|first| tag(*first)), Some(Some(SECRET_KEY | PUBLIC_KEY)))
}

/// The packet's type in its first byte (RFC 9580, section 4.2).
fn tag(first: u8) -> Option<u8> {
    match first {
        0xc0.. => Some(first & 0x3f),
        0x80.. => Some(first >> 2 & 0x0f),
        _ => None,
    }
}

/// Reads every key of the file, the primary ones and their subkeys. The comment of each is the first user id.
pub(super) fn read(bytes: &[u8], passphrase: Option<&[u8]>) -> Result<Contents, KeyFileError> {
    let mut r = Reader::new(bytes);
    let mut contents = Contents::default();
    // The first key that stands under the primary key that was read last, and that one's user id.
    let (mut under, mut comment) = (0, String::new());
    while !r.is_empty() {
        let (tag, body) = packet(&mut r)?;
        match tag {
            PUBLIC_KEY => return Err(KeyFileError::PublicKey),
            SECRET_KEY | SECRET_SUBKEY => {
                if contents.keys.len() + contents.left_out.len() == MAX_KEYS {
                    return Err(KeyFileError::unsupported("a file with more than 32 keys", ""));
                }
                if tag == SECRET_KEY {
                    under = contents.keys.len();
                    comment.clear();
                }
                match secret_key(body, passphrase) {
                    Ok(key) => contents.keys.push(key),
                    Err(error @ KeyFileError::Unsupported(..)) => contents.left_out.push(error),
                    Err(error) => return Err(error),
                }
            }
            USER_ID if comment.is_empty() => comment = super::comment(body),
            _ => {}
        }
        for key in &mut contents.keys[under..] {
            key.comment.clone_from(&comment);
        }
    }
    Ok(contents)
}

/// A packet's type and its body.
fn packet<'a>(r: &mut Reader<'a>) -> Result<(u8, &'a [u8]), KeyFileError> {
    let first = r.u8()?;
    let tag = tag(first).ok_or(KeyFileError::damaged("it does not consist of OpenPGP's packets"))?;
    let len = match first {
        0xc0.. => match r.u8()? {
            short @ ..192 => usize::from(short),
            high @ 192..224 => (usize::from(high - 192) << 8) + usize::from(r.u8()?) + 192,
            255 => r.u32()? as usize,
            _ => return Err(KeyFileError::damaged("it has a key in pieces")),
        },
        _ => match first & 3 {
            0 => r.u8()?.into(),
            1 => u16(r)?.into(),
            2 => r.u32()? as usize,
            _ => r.rest().len(),
        },
    };
    Ok((tag, r.take(len)?))
}

fn u16(r: &mut Reader<'_>) -> Result<u16, WireError> {
    Ok(u16::from_be_bytes([r.u8()?, r.u8()?]))
}

/// A number, without leading zeros (RFC 9580, section 3.2).
fn mpi<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let bits = u16(r)?;
    let digits = r.take(usize::from(bits).div_ceil(8))?;
    Ok(&digits[digits.iter().take_while(|digit| **digit == 0).count()..])
}

/// How the numbers of a key are written.
#[derive(Clone, Copy)]
enum Form {
    Rsa,
    /// One number, the highest byte first, short where it begins with zeros.
    Number,
    /// The same of a key whose own form has the lowest byte first.
    Reversed,
    /// 32 bytes as they are.
    Bytes,
}

fn secret_key(body: &[u8], passphrase: Option<&[u8]>) -> Result<KeyFile, KeyFileError> {
    let mut r = Reader::new(body);
    let version = r.u8()?;
    if version != 4 {
        return Err(KeyFileError::Unsupported(format!("an OpenPGP key of version {version}").into(), "version 4 is"));
    }
    let _created = r.u32()?;
    let (public, form) = public(&mut r)?;
    let secret = Protection::read(&mut r)?.remove(r.rest(), passphrase)?;
    let key = private(&public, form, &secret)?;
    if key.blob != public.to_blob() {
        return Err(KeyFileError::damaged("its private and its public half do not belong together"));
    }
    Ok(key)
}

/// The algorithm's number and the public numbers (RFC 9580, sections 5.5.5 and 9.1).
fn public<'a>(r: &mut Reader<'a>) -> Result<(PublicKey<'a>, Form), KeyFileError> {
    let algorithm = r.u8()?;
    let name = match algorithm {
        1..=3 => {
            let (n, e) = (mpi(r)?, mpi(r)?);
            return Ok((PublicKey::rsa(n, e)?, Form::Rsa));
        }
        18 | 19 | 22 => return on_a_curve(algorithm, r),
        25 => return Ok((PublicKey::X25519(r.take(32)?), Form::Bytes)),
        27 => return Ok((PublicKey::Ed25519(r.take(32)?), Form::Bytes)),
        16 | 20 => "an ElGamal key".to_owned(),
        17 => "a DSA key".to_owned(),
        other => format!("an OpenPGP key of the algorithm {other}"),
    };
    Err(KeyFileError::Unsupported(name.into(), ""))
}

fn on_a_curve<'a>(algorithm: u8, r: &mut Reader<'a>) -> Result<(PublicKey<'a>, Form), KeyFileError> {
    const EDDSA: u8 = 22;
    const ECDH: u8 = 18;
    let len = r.u8()?;
    let oid = r.take(len.into())?;
    let point = mpi(r)?;
    if algorithm == ECDH {
        let len = r.u8()?;
        r.take(len.into())?;
    }
    // A prefix that says that the point is in its curve's own form.
    let native = point.strip_prefix(&[0x40]).filter(|point| point.len() == 32);
    match (algorithm, oid) {
        (EDDSA, ED25519) => {
            Ok((PublicKey::Ed25519(native.ok_or(KeyFileError::damaged("its point is none"))?), Form::Number))
        }
        (ECDH, CV25519) => {
            Ok((PublicKey::X25519(native.ok_or(KeyFileError::damaged("its point is none"))?), Form::Reversed))
        }
        _ => {
            let curve = CURVES.iter().find(|known| known.1 == oid && algorithm != EDDSA).map(|known| known.0);
            let curve = curve.ok_or(KeyFileError::unsupported(
                "an OpenPGP key on this curve",
                "Curve25519, P-256, P-384 and P-521 are",
            ))?;
            Ok((PublicKey::Ecdsa(curve, point), Form::Number))
        }
    }
}

/// The key of its private numbers.
fn private(public: &PublicKey<'_>, form: Form, secret: &[u8]) -> Result<KeyFile, KeyFileError> {
    let mut r = Reader::new(secret);
    if let (PublicKey::Rsa { n, e }, Form::Rsa) = (public, form) {
        // The last is the inverse of the first prime modulo the second: SSH has them the other way round.
        let (d, p, q, inverse) = (mpi(&mut r)?, mpi(&mut r)?, mpi(&mut r)?, mpi(&mut r)?);
        r.finish()?;
        return KeyFile::rsa(&RsaIntegers { n, e, d, iqmp: inverse, p: q, q: p });
    }
    let digits = if let Form::Bytes = form { r.take(32)? } else { mpi(&mut r)? };
    r.finish()?;
    let len = if let PublicKey::Ecdsa(curve, _) = public { curve.scalar_len() } else { 32 };
    let zeros = len.checked_sub(digits.len()).ok_or(KeyFileError::damaged("its private number is too long"))?;
    let mut number = Zeroizing::new(vec![0; len]);
    number[zeros..].copy_from_slice(digits);
    if let Form::Reversed = form {
        number.reverse();
    }
    match public {
        PublicKey::Ecdsa(curve, _) => KeyFile::ecdsa(*curve, &number),
        PublicKey::X25519(_) => KeyFile::x25519(&number),
        _ => KeyFile::ed25519(&number),
    }
}

/// How the private numbers are kept (RFC 9580, section 3.7.2).
enum Protection {
    None,
    Encrypted {
        cipher: &'static Algorithm,
        key_len: usize,
        s2k: S2k,
        iv: [u8; 16],
        /// Whether a hash tells that the passphrase is right, or a mere sum.
        hashed: bool,
    },
}

impl Protection {
    fn read(r: &mut Reader<'_>) -> Result<Self, KeyFileError> {
        let hashed = match r.u8()? {
            0 => return Ok(Self::None),
            255 => false,
            254 => true,
            253 => return Err(KeyFileError::unsupported("OpenPGP's protection by AEAD", EXPORT_AGAIN)),
            _ => return Err(KeyFileError::unsupported("this old protection of OpenPGP's", EXPORT_AGAIN)),
        };
        let cipher = r.u8()?;
        let s2k = S2k::read(r)?;
        let (cipher, key_len) = match cipher {
            7 => (&AES_128, 16),
            8 => (&AES_192, 24),
            9 => (&AES_256, 32),
            _ => return Err(KeyFileError::unsupported("a cipher of OpenPGP's other than AES", EXPORT_AGAIN)),
        };
        let mut iv = [0; 16];
        iv.copy_from_slice(r.take(16)?);
        Ok(Self::Encrypted { cipher, key_len, s2k, iv, hashed })
    }

    /// The private numbers.
    fn remove(&self, bytes: &[u8], passphrase: Option<&[u8]>) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
        const FAILED: KeyFileError = KeyFileError::damaged("what is encrypted has the wrong length");
        let mut plain = Zeroizing::new(bytes.to_vec());
        let &Self::Encrypted { cipher, key_len, ref s2k, iv, hashed } = self else {
            let sums = split_sum(&mut plain);
            return if sums { Ok(plain) } else { Err(KeyFileError::damaged("its checksum is wrong")) };
        };
        let key = s2k.derive(passphrase.ok_or(KeyFileError::PassphraseNeeded)?, key_len);
        let key = UnboundCipherKey::new(cipher, &key).and_then(DecryptingKey::cfb128);
        let context = DecryptionContext::Iv128((&iv).into());
        key.and_then(|key| key.decrypt(&mut plain, context).map(drop)).map_err(|_| FAILED)?;
        let right = if hashed { split_hash(&mut plain) } else { split_sum(&mut plain) };
        if right { Ok(plain) } else { Err(KeyFileError::WrongPassphrase) }
    }
}

/// Takes SHA-1 of the rest off the end, and says whether it is that.
fn split_hash(bytes: &mut Vec<u8>) -> bool {
    let Some((plain, hash)) = bytes.split_last_chunk::<20>() else { return false };
    let right = digest(&SHA1_FOR_LEGACY_USE_ONLY, plain).as_ref() == hash;
    bytes.truncate(bytes.len() - 20);
    right
}

/// Takes the sum of the rest off the end, and says whether it is that.
fn split_sum(bytes: &mut Vec<u8>) -> bool {
    let Some((plain, sum)) = bytes.split_last_chunk::<2>() else { return false };
    let right = plain.iter().fold(0u16, |sum, byte| sum.wrapping_add((*byte).into())) == u16::from_be_bytes(*sum);
    bytes.truncate(bytes.len() - 2);
    right
}
