//! SSH public keys and certificates as blobs: parsing, fingerprints, verification. Knows RFC 4253, RFC 5656,
//! RFC 8709, OpenSSH's PROTOCOL.certkeys and PROTOCOL.u2f; knows no private key.
//!
//! A parsed key borrows from its blob, so parsing costs no memory that a peer could choose.

use aws_lc_rs::{digest, signature as lc};
use base64ct::{Base64Unpadded, Encoding};
use fips204::traits::{SerDes, Verifier};
use thiserror::Error;

use crate::rfc4251::{Put, Reader, WireError};

/// What a blob can be refused for.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum KeyError {
    /// The blob is not what its type says.
    #[error("the key is malformed: {0}")]
    Malformed(#[from] WireError),
    /// No such algorithm here. `ssh-dss` is among these: DSA is not supported.
    #[error("the key type is not supported")]
    UnknownType,
    /// A field has a value that the type does not allow.
    #[error("the key is invalid: {0}")]
    Invalid(&'static str),
    /// A signature does not verify.
    #[error("the signature does not verify")]
    BadSignature,
}

/// The NIST curves of RFC 5656.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Curve {
    /// nistp256
    P256,
    /// nistp384
    P384,
    /// nistp521
    P521,
}

impl Curve {
    /// The curve's name inside a key blob.
    pub fn name(self) -> &'static str {
        match self {
            Curve::P256 => "nistp256",
            Curve::P384 => "nistp384",
            Curve::P521 => "nistp521",
        }
    }

    /// Bytes of a scalar, and of one coordinate.
    pub fn scalar_len(self) -> usize {
        match self {
            Curve::P256 => 32,
            Curve::P384 => 48,
            Curve::P521 => 66,
        }
    }
}

/// The kinds of key that this program can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// `ssh-ed25519`
    Ed25519,
    /// `ecdsa-sha2-…`
    Ecdsa(Curve),
    /// `ssh-rsa`
    Rsa,
    /// `sk-ssh-ed25519@openssh.com`
    SkEd25519,
    /// `sk-ecdsa-sha2-nistp256@openssh.com`
    SkEcdsa,
    /// `ssh-mldsa44-ed25519@openssh.com`
    MlDsa44Ed25519,
    /// `ed25519-expanded@spec.torproject.org`: a private key in tor's form. Its public key is an `ssh-ed25519` one like
    /// any other, as tor's ssh-protocols specification demands, and nothing public bears this name.
    Ed25519Expanded,
    /// `x25519@spec.torproject.org`
    X25519,
}

/// Every key type of SSH's, with its plain name and the name of its certificates.
const NAMES: [(KeyType, &str, &str); 8] = [
    (KeyType::Ed25519, "ssh-ed25519", "ssh-ed25519-cert-v01@openssh.com"),
    (KeyType::Ecdsa(Curve::P256), "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256-cert-v01@openssh.com"),
    (KeyType::Ecdsa(Curve::P384), "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384-cert-v01@openssh.com"),
    (KeyType::Ecdsa(Curve::P521), "ecdsa-sha2-nistp521", "ecdsa-sha2-nistp521-cert-v01@openssh.com"),
    (KeyType::Rsa, "ssh-rsa", "ssh-rsa-cert-v01@openssh.com"),
    (KeyType::SkEd25519, "sk-ssh-ed25519@openssh.com", "sk-ssh-ed25519-cert-v01@openssh.com"),
    (KeyType::SkEcdsa, "sk-ecdsa-sha2-nistp256@openssh.com", "sk-ecdsa-sha2-nistp256-cert-v01@openssh.com"),
    (KeyType::MlDsa44Ed25519, "ssh-mldsa44-ed25519@openssh.com", "ssh-mldsa44-ed25519-cert-v01@openssh.com"),
];

/// The key types of the Tor Project's extensions, which have no certificates (tor's ssh-protocols specification).
const TOR_NAMES: [(KeyType, &str); 2] = [
    (KeyType::Ed25519Expanded, "ed25519-expanded@spec.torproject.org"),
    (KeyType::X25519, "x25519@spec.torproject.org"),
];

impl KeyType {
    /// The type behind an algorithm name, and whether that is the name of its certificates.
    pub fn from_name(name: &[u8]) -> Option<(Self, bool)> {
        let of_ssh = NAMES.iter().find_map(|&(t, plain, cert)| {
            if name == plain.as_bytes() {
                Some((t, false))
            } else if name == cert.as_bytes() {
                Some((t, true))
            } else {
                None
            }
        });
        of_ssh.or_else(|| TOR_NAMES.iter().find(|n| name == n.1.as_bytes()).map(|n| (n.0, false)))
    }

    /// The plain algorithm name, as the key's blob begins with, but for [`KeyType::Ed25519Expanded`].
    pub fn name(self) -> &'static str {
        let of_ssh = NAMES.iter().find(|n| n.0 == self).map(|n| n.1);
        of_ssh.or_else(|| TOR_NAMES.iter().find(|n| n.0 == self).map(|n| n.1)).unwrap_or_default()
    }

    /// Whether ssh knows such keys. Others are not in the listing that it is offered.
    pub fn is_ssh(self) -> bool {
        !matches!(self, KeyType::Ed25519Expanded | KeyType::X25519)
    }

    /// The short upper-case name that OpenSSH shows to people.
    pub fn label(self) -> &'static str {
        match self {
            KeyType::Ed25519 => "ED25519",
            KeyType::Ecdsa(_) => "ECDSA",
            KeyType::Rsa => "RSA",
            KeyType::SkEd25519 => "ED25519-SK",
            KeyType::SkEcdsa => "ECDSA-SK",
            KeyType::MlDsa44Ed25519 => "MLDSA44-ED25519",
            KeyType::Ed25519Expanded => "ED25519-EXPANDED",
            KeyType::X25519 => "X25519",
        }
    }

    /// Whether the private half lives in a FIDO authenticator.
    pub fn is_sk(self) -> bool {
        matches!(self, KeyType::SkEd25519 | KeyType::SkEcdsa)
    }
}

/// Length of an ML-DSA-44 public key (FIPS 204, table 2).
pub const MLDSA44_PUBLIC: usize = 1312;
/// Length of an ML-DSA-44 signature (FIPS 204, table 2).
pub const MLDSA44_SIGNATURE: usize = 2420;
/// OpenSSH accepts RSA keys from this size on, and so do we.
pub const RSA_MIN_BITS: usize = 1024;
/// OpenSSH's largest RSA key.
pub const RSA_MAX_BITS: usize = 16384;

/// The public values of a key, each borrowed from its blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublicKey<'a> {
    /// The 32-byte point.
    Ed25519(&'a [u8]),
    /// The curve and the uncompressed point (`04 ‖ x ‖ y`).
    Ecdsa(Curve, &'a [u8]),
    /// Magnitudes without leading zeros.
    Rsa {
        /// The public exponent.
        e: &'a [u8],
        /// The modulus.
        n: &'a [u8],
    },
    /// The point and the application, usually `ssh:`.
    SkEd25519(&'a [u8], &'a [u8]),
    /// The uncompressed P-256 point and the application.
    SkEcdsa(&'a [u8], &'a [u8]),
    /// The ML-DSA-44 key, then the Ed25519 point.
    MlDsa44Ed25519(&'a [u8], &'a [u8]),
    /// The 32 bytes of the u coordinate (RFC 7748, section 5).
    X25519(&'a [u8]),
}

impl<'a> PublicKey<'a> {
    /// Parses a plain key blob completely.
    pub fn parse(blob: &'a [u8]) -> Result<Self, KeyError> {
        match Blob::parse(blob)? {
            Blob::Key(key) => Ok(key),
            Blob::Certificate(_) => Err(KeyError::Invalid("a certificate where a plain key is needed")),
        }
    }

    /// Reads the fields that follow the algorithm name (and, in a certificate, the nonce).
    pub fn read(key_type: KeyType, r: &mut Reader<'a>) -> Result<Self, KeyError> {
        Ok(match key_type {
            KeyType::Ed25519 => Self::Ed25519(ed25519_point(r.string()?)?),
            KeyType::Ecdsa(curve) => Self::Ecdsa(curve, ec_point(curve, r)?),
            KeyType::Rsa => {
                let (e, n) = (r.mpint()?, r.mpint()?);
                Self::rsa(n, e)?
            }
            KeyType::SkEd25519 => Self::SkEd25519(ed25519_point(r.string()?)?, r.string()?),
            KeyType::SkEcdsa => Self::SkEcdsa(ec_point(Curve::P256, r)?, r.string()?),
            KeyType::MlDsa44Ed25519 => {
                let both = r.string()?;
                if both.len() != MLDSA44_PUBLIC + 32 {
                    return Err(KeyError::Invalid("an ML-DSA-44 and Ed25519 key has 1344 bytes"));
                }
                let (mldsa, ed25519) = both.split_at(MLDSA44_PUBLIC);
                Self::MlDsa44Ed25519(mldsa, ed25519)
            }
            KeyType::Ed25519Expanded => {
                return Err(KeyError::Invalid("the public half of an expanded key is an ssh-ed25519 key"));
            }
            KeyType::X25519 => match r.string()? {
                point if point.len() == 32 => Self::X25519(point),
                _ => return Err(KeyError::Invalid("an X25519 key has 32 bytes")),
            },
        })
    }

    /// An RSA key from its modulus and exponent, if they are ones that SSH uses.
    pub fn rsa(n: &'a [u8], e: &'a [u8]) -> Result<Self, KeyError> {
        check_rsa(n, e)?;
        Ok(Self::Rsa { e, n })
    }

    /// The key's type.
    pub fn key_type(&self) -> KeyType {
        match self {
            Self::Ed25519(_) => KeyType::Ed25519,
            Self::Ecdsa(curve, _) => KeyType::Ecdsa(*curve),
            Self::Rsa { .. } => KeyType::Rsa,
            Self::SkEd25519(..) => KeyType::SkEd25519,
            Self::SkEcdsa(..) => KeyType::SkEcdsa,
            Self::MlDsa44Ed25519(..) => KeyType::MlDsa44Ed25519,
            Self::X25519(_) => KeyType::X25519,
        }
    }

    /// The plain blob of this key.
    pub fn to_blob(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.put_string(self.key_type().name().as_bytes());
        match self {
            Self::Ed25519(point) | Self::X25519(point) => out.put_string(point),
            Self::Ecdsa(curve, point) => {
                out.put_string(curve.name().as_bytes());
                out.put_string(point);
            }
            Self::Rsa { e, n } => {
                out.put_mpint(e);
                out.put_mpint(n);
            }
            Self::SkEd25519(point, application) => {
                out.put_string(point);
                out.put_string(application);
            }
            Self::SkEcdsa(point, application) => {
                out.put_string(Curve::P256.name().as_bytes());
                out.put_string(point);
                out.put_string(application);
            }
            Self::MlDsa44Ed25519(mldsa, ed25519) => out.put_string(&[*mldsa, *ed25519].concat()),
        }
        out
    }

    /// Verifies an SSH signature blob over `data` and returns its algorithm's name. All algorithms of the key's
    /// type are accepted, SHA-1 included: whoever minds looks at the name.
    pub fn verify(&self, data: &[u8], signature: &'a [u8]) -> Result<&'a [u8], KeyError> {
        let mut r = Reader::new(signature);
        let algorithm = r.string()?;
        let body = r.string()?;
        let lc_verify = |scheme: &'static dyn lc::VerificationAlgorithm, key: &[u8], data: &[u8], signature: &[u8]| {
            lc::UnparsedPublicKey::new(scheme, key).verify(data, signature).map_err(|_| KeyError::BadSignature)
        };
        match self {
            Self::Rsa { e, n } => {
                let scheme = match algorithm {
                    b"rsa-sha2-256" => &lc::RSA_PKCS1_1024_8192_SHA256_FOR_LEGACY_USE_ONLY,
                    b"rsa-sha2-512" => &lc::RSA_PKCS1_1024_8192_SHA512_FOR_LEGACY_USE_ONLY,
                    b"ssh-rsa" => &lc::RSA_PKCS1_1024_8192_SHA1_FOR_LEGACY_USE_ONLY,
                    _ => return Err(KeyError::BadSignature),
                };
                r.finish()?;
                // Signers may drop leading zeros (OpenSSH pads them back too).
                let mut padded = vec![0; n.len().saturating_sub(body.len())];
                padded.extend_from_slice(body);
                lc::RsaPublicKeyComponents { n, e }
                    .verify(scheme, data, &padded)
                    .map_err(|_| KeyError::BadSignature)?;
                return Ok(algorithm);
            }
            _ if algorithm != self.key_type().name().as_bytes() => return Err(KeyError::BadSignature),
            Self::Ed25519(point) => lc_verify(&lc::ED25519, point, data, body)?,
            Self::Ecdsa(curve, point) => {
                let scheme = match curve {
                    Curve::P256 => &lc::ECDSA_P256_SHA256_FIXED,
                    Curve::P384 => &lc::ECDSA_P384_SHA384_FIXED,
                    Curve::P521 => &lc::ECDSA_P521_SHA512_FIXED,
                };
                lc_verify(scheme, point, data, &ecdsa_fixed(*curve, body)?)?;
            }
            Self::SkEd25519(point, application) => {
                let signed = sk_signed(application, r.u8()?, r.u32()?, data);
                lc_verify(&lc::ED25519, point, &signed, body)?;
            }
            Self::SkEcdsa(point, application) => {
                let signed = sk_signed(application, r.u8()?, r.u32()?, data);
                lc_verify(&lc::ECDSA_P256_SHA256_FIXED, point, &signed, &ecdsa_fixed(Curve::P256, body)?)?;
            }
            Self::MlDsa44Ed25519(mldsa, ed25519) => {
                let (ml_sig, ed_sig) = body.split_first_chunk::<MLDSA44_SIGNATURE>().ok_or(KeyError::BadSignature)?;
                let message = mldsa44_ed25519_message(data);
                let key = <[u8; MLDSA44_PUBLIC]>::try_from(*mldsa).map_err(|_| KeyError::BadSignature)?;
                let key = fips204::ml_dsa_44::PublicKey::try_from_bytes(key).map_err(|_| KeyError::BadSignature)?;
                if !key.verify(&message, ml_sig, MLDSA44_ED25519_LABEL) {
                    return Err(KeyError::BadSignature);
                }
                lc_verify(&lc::ED25519, ed25519, &message, ed_sig)?;
            }
            Self::X25519(_) => return Err(KeyError::BadSignature),
        }
        r.finish()?;
        Ok(algorithm)
    }
}

/// The composite's label, which is also the context of its ML-DSA half.
pub const MLDSA44_ED25519_LABEL: &[u8] = b"COMPSIG-MLDSA44-Ed25519-SHA512";

/// What both halves of `ssh-mldsa44-ed25519@openssh.com` sign: prefix, label, an empty context, SHA-512 of the data.
pub fn mldsa44_ed25519_message(data: &[u8]) -> Vec<u8> {
    let hash = digest::digest(&digest::SHA512, data);
    [b"CompositeAlgorithmSignatures2025", MLDSA44_ED25519_LABEL, &[0], hash.as_ref()].concat()
}

/// What an authenticator signs (PROTOCOL.u2f): SHA-256 of the application, flags, counter, SHA-256 of the data.
fn sk_signed(application: &[u8], flags: u8, counter: u32, data: &[u8]) -> Vec<u8> {
    let hash = |bytes| digest::digest(&digest::SHA256, bytes);
    [hash(application).as_ref(), &[flags], &counter.to_be_bytes(), hash(data).as_ref()].concat()
}

/// `mpint r, mpint s` (RFC 5656, 3.1.2) as two scalars of the curve's length.
pub fn ecdsa_fixed(curve: Curve, body: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut r = Reader::new(body);
    let halves = [r.mpint()?, r.mpint()?];
    r.finish()?;
    let mut fixed = Vec::with_capacity(2 * curve.scalar_len());
    for half in halves {
        let zeros = curve.scalar_len().checked_sub(half.len()).ok_or(KeyError::BadSignature)?;
        fixed.resize(fixed.len() + zeros, 0);
        fixed.extend_from_slice(half);
    }
    Ok(fixed)
}

fn ed25519_point(bytes: &[u8]) -> Result<&[u8], KeyError> {
    if bytes.len() == 32 { Ok(bytes) } else { Err(KeyError::Invalid("an Ed25519 key has 32 bytes")) }
}

fn ec_point<'a>(curve: Curve, r: &mut Reader<'a>) -> Result<&'a [u8], KeyError> {
    if r.string()? != curve.name().as_bytes() {
        return Err(KeyError::Invalid("the curve is not the one of the key type"));
    }
    let point = r.string()?;
    if point.len() != 1 + 2 * curve.scalar_len() || point[0] != 4 {
        return Err(KeyError::Invalid("the point is not an uncompressed point of the curve"));
    }
    Ok(point)
}

fn check_rsa(n: &[u8], e: &[u8]) -> Result<(), KeyError> {
    let bits = n.len() * 8 - n.first().map_or(0, |b| b.leading_zeros() as usize);
    if bits < RSA_MIN_BITS {
        return Err(KeyError::Invalid("RSA keys below 1024 bits are not accepted"));
    }
    if bits > RSA_MAX_BITS {
        return Err(KeyError::Invalid("RSA keys above 16384 bits are not accepted"));
    }
    // aws-lc takes exponents up to 33 bits.
    if e.is_empty() || e.len() > 5 || e.last().is_some_and(|b| b & 1 == 0) || e == [1] {
        return Err(KeyError::Invalid("the RSA exponent is not a small odd number above 1"));
    }
    Ok(())
}

/// Whom a certificate is for (PROTOCOL.certkeys).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateKind {
    /// A user, logging in.
    User,
    /// A host, proving who it is.
    Host,
}

/// An OpenSSH certificate, borrowed from its blob. Its own signature is verified by [`Certificate::verify`] only.
#[derive(Clone, Debug)]
pub struct Certificate<'a> {
    /// The key that is certified.
    pub key: PublicKey<'a>,
    /// The certificate authority's serial number.
    pub serial: u64,
    /// User or host.
    pub kind: CertificateKind,
    /// The free text that the authority gave it.
    pub key_id: &'a [u8],
    /// Names it is good for; empty means all.
    pub principals: Vec<&'a [u8]>,
    /// Seconds since 1970, inclusive.
    pub valid_after: u64,
    /// Seconds since 1970, exclusive.
    pub valid_before: u64,
    /// Names and values that must be understood.
    pub critical_options: &'a [u8],
    /// The authority's plain key blob.
    pub signature_key: &'a [u8],
    signature: &'a [u8],
    signed: &'a [u8],
}

/// OpenSSH refuses certificates with more principals.
const MAX_PRINCIPALS: usize = 256;

impl<'a> Certificate<'a> {
    fn read(key_type: KeyType, blob: &'a [u8], mut r: Reader<'a>) -> Result<Self, KeyError> {
        let unsigned = Self::read_fields(key_type, blob, &mut r)?;
        let signature = r.string()?;
        r.finish()?;
        Ok(Self { signature, ..unsigned })
    }

    /// Reads what an authority signs: a certificate that ends before its signature.
    pub fn read_unsigned(data: &'a [u8]) -> Result<Self, KeyError> {
        let mut r = Reader::new(data);
        let Some((key_type, true)) = KeyType::from_name(r.string()?) else { return Err(KeyError::UnknownType) };
        let unsigned = Self::read_fields(key_type, data, &mut r)?;
        r.finish()?;
        Ok(unsigned)
    }

    /// Reads everything up to the signature.
    fn read_fields(key_type: KeyType, blob: &'a [u8], r: &mut Reader<'a>) -> Result<Self, KeyError> {
        let _nonce = r.string()?;
        let key = PublicKey::read(key_type, r)?;
        let serial = r.u64()?;
        let kind = match r.u32()? {
            1 => CertificateKind::User,
            2 => CertificateKind::Host,
            _ => return Err(KeyError::Invalid("the certificate is neither a user's nor a host's")),
        };
        let key_id = r.string()?;
        let mut names = Reader::new(r.string()?);
        let mut principals = Vec::new();
        while !names.is_empty() {
            if principals.len() == MAX_PRINCIPALS {
                return Err(KeyError::Invalid("the certificate has more than 256 principals"));
            }
            principals.push(names.string()?);
        }
        let valid_after = r.u64()?;
        let valid_before = r.u64()?;
        let critical_options = r.string()?;
        check_options(critical_options)?;
        check_options(r.string()?)?;
        let _reserved = r.string()?;
        let signature_key = r.string()?;
        PublicKey::parse(signature_key)?;
        let signed = &blob[..blob.len() - r.rest().len()];
        Ok(Self {
            key,
            serial,
            kind,
            key_id,
            principals,
            valid_after,
            valid_before,
            critical_options,
            signature_key,
            signature: &[],
            signed,
        })
    }

    /// Verifies the authority's signature and returns its algorithm's name.
    pub fn verify(&self) -> Result<&'a [u8], KeyError> {
        PublicKey::parse(self.signature_key)?.verify(self.signed, self.signature)
    }
}

/// Options are pairs of strings.
fn check_options(bytes: &[u8]) -> Result<(), KeyError> {
    let mut r = Reader::new(bytes);
    while !r.is_empty() {
        r.string()?;
        r.string()?;
    }
    Ok(())
}

/// What a blob of a key or a certificate turns out to be.
#[derive(Clone, Debug)]
pub enum Blob<'a> {
    /// A plain key.
    Key(PublicKey<'a>),
    /// A certificate.
    Certificate(Box<Certificate<'a>>),
}

impl<'a> Blob<'a> {
    /// Parses a blob completely: left-over bytes are an error.
    pub fn parse(blob: &'a [u8]) -> Result<Self, KeyError> {
        let mut r = Reader::new(blob);
        match KeyType::from_name(r.string()?).ok_or(KeyError::UnknownType)? {
            (key_type, true) => Ok(Self::Certificate(Box::new(Certificate::read(key_type, blob, r)?))),
            (key_type, false) => {
                let key = PublicKey::read(key_type, &mut r)?;
                r.finish()?;
                Ok(Self::Key(key))
            }
        }
    }

    /// The key itself, or the key that the certificate is about.
    pub fn key(&self) -> &PublicKey<'a> {
        match self {
            Self::Key(key) => key,
            Self::Certificate(certificate) => &certificate.key,
        }
    }
}

/// The hashes that OpenSSH shows fingerprints in (`ssh-agent -E`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FingerprintHash {
    /// MD5, in hexadecimal.
    Md5,
    /// SHA-1.
    Sha1,
    /// SHA-256, the usual one.
    #[default]
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl FingerprintHash {
    /// The hash behind a name in any case, as `ssh-agent -E` takes it.
    pub fn from_name(name: &str) -> Option<Self> {
        [
            ("md5", Self::Md5),
            ("sha1", Self::Sha1),
            ("sha256", Self::Sha256),
            ("sha384", Self::Sha384),
            ("sha512", Self::Sha512),
        ]
        .into_iter()
        .find_map(|(n, hash)| n.eq_ignore_ascii_case(name).then_some(hash))
    }
}

/// The fingerprint of a key in OpenSSH's form. A certificate has that of its key, as in `ssh-add -l`.
pub fn fingerprint(blob: &[u8], hash: FingerprintHash) -> String {
    let plain = match Blob::parse(blob) {
        Ok(Blob::Certificate(certificate)) => certificate.key.to_blob(),
        _ => blob.to_vec(),
    };
    let (name, algorithm) = match hash {
        FingerprintHash::Md5 => {
            use md5::Digest;
            let hex: Vec<String> = md5::Md5::digest(&plain).iter().map(|b| format!("{b:02x}")).collect();
            return format!("MD5:{}", hex.join(":"));
        }
        FingerprintHash::Sha1 => ("SHA1", &digest::SHA1_FOR_LEGACY_USE_ONLY),
        FingerprintHash::Sha256 => ("SHA256", &digest::SHA256),
        FingerprintHash::Sha384 => ("SHA384", &digest::SHA384),
        FingerprintHash::Sha512 => ("SHA512", &digest::SHA512),
    };
    format!("{name}:{}", Base64Unpadded::encode_string(digest::digest(algorithm, &plain).as_ref()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
pub(crate) mod tests {
    use super::*;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
    use proptest::prelude::*;
    use std::{fs, path::PathBuf};

    const PLAIN: [&str; 5] = ["ed25519", "ecdsa256", "ecdsa384", "ecdsa521", "rsa"];

    fn fixture(name: &str) -> String {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/keys").join(name);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// The blob in a `.pub` file that ssh-keygen wrote.
    pub(crate) fn blob(name: &str) -> Vec<u8> {
        let line = fixture(&format!("{name}.pub"));
        base64ct::Base64::decode_vec(line.split(' ').nth(1).unwrap().trim()).unwrap()
    }

    fn certificate(blob: &[u8]) -> Certificate<'_> {
        match Blob::parse(blob).unwrap() {
            Blob::Certificate(certificate) => *certificate,
            Blob::Key(_) => panic!("a plain key"),
        }
    }

    /// Every blob of the fixtures, and of the types that this ssh-keygen does not make.
    fn blobs() -> Vec<Vec<u8>> {
        let mut all: Vec<Vec<u8>> = PLAIN.iter().map(|name| blob(name)).collect();
        all.extend(PLAIN.iter().flat_map(|n| [blob(&format!("user_{n}-cert")), blob(&format!("host_{n}-cert"))]));
        let point = [&[4][..], &[7; 64]].concat();
        all.push(PublicKey::SkEd25519(&[1; 32], b"ssh:").to_blob());
        all.push(PublicKey::SkEcdsa(&point, b"ssh:").to_blob());
        all.push(PublicKey::MlDsa44Ed25519(&[1; MLDSA44_PUBLIC], &[2; 32]).to_blob());
        all
    }

    #[test]
    fn keys_round_trip_and_another_parser_agrees() {
        for blob in blobs() {
            let parsed = Blob::parse(&blob).unwrap();
            if let Blob::Key(key) = parsed {
                assert_eq!(key.to_blob(), blob);
                assert_eq!(KeyType::from_name(key.key_type().name().as_bytes()), Some((key.key_type(), false)));
            }
        }
        for name in PLAIN {
            let other = ssh_key::PublicKey::from_openssh(&fixture(&format!("{name}.pub"))).unwrap();
            assert_eq!(other.to_bytes().unwrap(), blob(name));
            assert_eq!(Blob::parse(&blob(name)).unwrap().key().key_type().name(), other.algorithm().as_str());
        }
    }

    #[test]
    fn fingerprints_are_those_of_openssh() {
        for name in PLAIN {
            let other = ssh_key::PublicKey::from_openssh(&fixture(&format!("{name}.pub"))).unwrap();
            let expected = other.fingerprint(ssh_key::HashAlg::Sha256).to_string();
            assert_eq!(fingerprint(&blob(name), FingerprintHash::Sha256), expected);
            let certified = blob(&format!("user_{name}-cert"));
            assert_eq!(fingerprint(&certified, FingerprintHash::Sha256), expected, "a certificate has its key's");
            assert!(fixture("fingerprints.txt").contains(&expected), "ssh-keygen -l");
        }
        assert_eq!(fingerprint(&blob("rsa"), FingerprintHash::Md5).len(), "MD5:".len() + 16 * 3 - 1);
    }

    #[test]
    fn certificates_say_what_ssh_keygen_put_in() {
        for name in PLAIN {
            for (prefix, kind, serial, principals) in [
                ("user", CertificateKind::User, 7, [&b"alice"[..], b"bob"]),
                ("host", CertificateKind::Host, 8, [&b"host.example.com"[..], b"*.wild.example.com"]),
            ] {
                let blob = blob(&format!("{prefix}_{name}-cert"));
                let certificate = certificate(&blob);
                assert_eq!((certificate.kind, certificate.serial), (kind, serial));
                assert_eq!(certificate.key_id, format!("{prefix} {name}").as_bytes());
                assert_eq!(certificate.principals, principals);
                assert_eq!((certificate.valid_after, certificate.valid_before), (1_577_836_800, 1_893_456_000));
                assert_eq!(certificate.critical_options.is_empty(), kind == CertificateKind::Host);
                assert_eq!(certificate.signature_key, self::blob("ca_ed25519"));
                assert_eq!(certificate.key.to_blob(), self::blob(name));
                assert_eq!(certificate.verify(), Ok(&b"ssh-ed25519"[..]));
            }
        }
    }

    #[test]
    fn certificates_name_the_algorithm_of_their_authority() {
        for (name, algorithm) in [("host_rsa_sha1-cert", &b"ssh-rsa"[..]), ("host_rsa_sha512-cert", b"rsa-sha2-512")] {
            assert_eq!(certificate(&blob(name)).verify(), Ok(algorithm));
        }
    }

    #[test]
    fn every_byte_of_a_certificate_is_signed() {
        let good = blob("host_ed25519-cert");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            if let Ok(Blob::Certificate(certificate)) = Blob::parse(&bad) {
                assert!(certificate.verify().is_err(), "byte {at} is not covered");
            }
        }
    }

    #[test]
    fn signatures_of_ssh_keygen_verify() {
        for name in PLAIN {
            let signature = ssh_key::SshSig::from_pem(fixture(&format!("{name}.sig"))).unwrap();
            let data = ssh_key::SshSig::signed_data("file", signature.hash_alg(), b"strongroom").unwrap();
            let mut wire = Vec::new();
            wire.put_string(signature.signature().algorithm().as_str().as_bytes());
            wire.put_string(signature.signature_bytes());
            let blob = blob(name);
            let key = PublicKey::parse(&blob).unwrap();
            let algorithm = key.verify(&data, &wire).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(algorithm, if name == "rsa" { &b"rsa-sha2-512"[..] } else { key.key_type().name().as_bytes() });
            assert!(key.verify(b"other data", &wire).is_err());
            for bad in [&wire[..wire.len() - 1], &[&wire[..], &[0]].concat()] {
                assert!(key.verify(&data, bad).is_err(), "{name}: cut or longer");
            }
            let mut flipped = wire.clone();
            *flipped.last_mut().unwrap() ^= 1;
            assert!(key.verify(&data, &flipped).is_err());
        }
    }

    #[test]
    fn an_rsa_signature_may_lack_its_leading_zeros() {
        let file = fixture("rsa_leading_zero.txt");
        let (message, hex) = file.trim().split_once('\n').unwrap();
        let body: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        assert_eq!((body.len(), body[0]), (256, 0));
        let blob = blob("rsa");
        let key = PublicKey::parse(&blob).unwrap();
        for (body, good) in
            [(&body[..], true), (&body[1..], true), (&body[2..], false), (&[&[0], &body[..]].concat(), false)]
        {
            let mut wire = Vec::new();
            wire.put_string(b"rsa-sha2-256");
            wire.put_string(body);
            assert_eq!(key.verify(message.as_bytes(), &wire).is_ok(), good, "{} bytes", body.len());
        }
    }

    #[test]
    fn a_security_key_signs_application_flags_and_counter() {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[3; 32]).unwrap();
        let wire = |flags: u8, counter: u32| {
            let signed = sk_signed(b"ssh:", 1, 9, b"data");
            let mut wire = Vec::new();
            wire.put_string(b"sk-ssh-ed25519@openssh.com");
            wire.put_string(pair.sign(&signed).as_ref());
            wire.push(flags);
            wire.put_u32(counter);
            wire
        };
        let key = PublicKey::SkEd25519(pair.public_key().as_ref(), b"ssh:");
        assert!(key.verify(b"data", &wire(1, 9)).is_ok());
        assert!(key.verify(b"data", &wire(5, 9)).is_err(), "other flags");
        assert!(key.verify(b"data", &wire(1, 8)).is_err(), "another counter");
        let other = PublicKey::SkEd25519(pair.public_key().as_ref(), b"web:");
        assert!(other.verify(b"data", &wire(1, 9)).is_err(), "another application");
    }

    #[test]
    fn what_is_not_exact_is_refused() {
        let ed = blob("ed25519");
        assert_eq!(Blob::parse(&[&ed[..], &[0]].concat()).map(drop), Err(KeyError::Malformed(WireError::Trailing)));
        assert_eq!(Blob::parse(&ed[..ed.len() - 1]).map(drop), Err(KeyError::Malformed(WireError::Truncated)));
        assert!(matches!(PublicKey::parse(&blob("user_rsa-cert")), Err(KeyError::Invalid(_))));
        let typed = |name: &[u8], fields: &[&[u8]]| {
            let mut out = Vec::new();
            std::iter::once(&name).chain(fields).for_each(|f| out.put_string(f));
            out
        };
        let point = [&[4][..], &[7; 64]].concat();
        let compressed = [&[2][..], &[7; 32]].concat();
        for (bad, why) in [
            (typed(b"ssh-dss", &[&[1]]), "DSA"),
            (typed(b"ssh-ed25519", &[&[0; 31]]), "a short point"),
            (typed(b"ecdsa-sha2-nistp256", &[b"nistp384", &point]), "another curve"),
            (typed(b"ecdsa-sha2-nistp256", &[b"nistp256", &compressed]), "a compressed point"),
            (typed(b"ssh-rsa", &[&[3], &[&[0, 0xff][..], &[1; 126]].concat()]), "1016 bits"),
            (typed(b"ssh-rsa", &[&[4], &[&[0, 0xff][..], &[1; 255]].concat()]), "an even exponent"),
            (typed(b"ssh-rsa", &[&[1], &[&[0, 0xff][..], &[1; 255]].concat()]), "an exponent of 1"),
            (typed(b"ssh-rsa", &[&[0xff], &[&[0, 0xff][..], &[1; 255]].concat()]), "a negative exponent"),
            (typed(b"ssh-rsa", &[&[3], &[&[0, 0, 0xff][..], &[1; 255]].concat()]), "a padded modulus"),
            (typed(b"ssh-rsa", &[&[3], &[&[0, 0xff][..], &[1; 2048]].concat()]), "16392 bits"),
        ] {
            assert!(Blob::parse(&bad).is_err(), "{why}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, data: Vec<u8>) {
            let _ = Blob::parse(&bytes);
            let _ = fingerprint(&bytes, FingerprintHash::Sha256);
            for blob in blobs() {
                let _ = Blob::parse(&blob).unwrap().key().verify(&data, &bytes);
            }
        }

        #[test]
        fn damaged_blobs_and_signatures_never_panic(
            which in 0_usize..18, at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let mut bytes = blobs()[which].clone();
            let position = at.index(bytes.len());
            bytes[position] = byte;
            let end = cut.index(bytes.len() + 1);
            for bytes in [&bytes[..], &bytes[..end]] {
                if let Ok(Blob::Certificate(certificate)) = Blob::parse(bytes) {
                    let _ = certificate.verify();
                }
            }
        }

        #[test]
        fn a_signature_of_the_right_frame_never_panics(which in 0_usize..5, body: Vec<u8>, rest: Vec<u8>) {
            let blob = blob(PLAIN[which]);
            let key = PublicKey::parse(&blob).unwrap();
            let name = if key.key_type() == KeyType::Rsa { "rsa-sha2-256" } else { key.key_type().name() };
            let mut wire = Vec::new();
            wire.put_string(name.as_bytes());
            wire.put_string(&body);
            wire.extend_from_slice(&rest);
            prop_assert!(key.verify(b"data", &wire).is_err());
        }
    }
}
