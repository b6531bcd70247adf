//! Public keys as X.509 and OpenSSL have them: SubjectPublicKeyInfo (RFC 5280, 4.1.2.7; RFC 3279, RFC 5480, RFC 8410),
//! alone or in a certificate. Knows DER and SSH's blobs; no file.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use thiserror::Error;

use crate::{
    der::{self, BIT_STRING, DerError, NULL, OID, Reader, SEQUENCE},
    public_key::{Curve, KeyError, PublicKey},
};

const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
const X25519: &[u8] = &[0x2b, 0x65, 0x6e];
/// The object identifiers of the curves, as the contents of a DER value.
pub(crate) const CURVES: [(Curve, &[u8]); 3] = [
    (Curve::P256, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]),
    (Curve::P384, &[0x2b, 0x81, 0x04, 0x00, 0x22]),
    (Curve::P521, &[0x2b, 0x81, 0x04, 0x00, 0x23]),
];

/// Why bytes are no public key that SSH has, too.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SpkiError {
    /// The structure is broken.
    #[error(transparent)]
    Der(#[from] DerError),
    /// The key in it is broken.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The algorithm, the curve or the point's form is none that we have.
    #[error("the key is of a kind that is not supported")]
    Unsupported,
}

/// The SubjectPublicKeyInfo; `None` for keys that have none: those of FIDO authenticators, and ML-DSA with Ed25519.
pub fn encode(key: &PublicKey<'_>) -> Option<Vec<u8>> {
    let mut algorithm = Vec::new();
    match key {
        PublicKey::Rsa { .. } => {
            der::put(&mut algorithm, OID, RSA);
            der::put(&mut algorithm, NULL, &[]);
        }
        PublicKey::Ecdsa(curve, _) => {
            der::put(&mut algorithm, OID, EC);
            der::put(&mut algorithm, OID, CURVES.iter().find(|known| known.0 == *curve)?.1);
        }
        PublicKey::Ed25519(_) => der::put(&mut algorithm, OID, ED25519),
        PublicKey::X25519(_) => der::put(&mut algorithm, OID, X25519),
        PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..) | PublicKey::MlDsa44Ed25519(..) => return None,
    }
    let (mut info, mut out) = (Vec::new(), Vec::new());
    der::put(&mut info, SEQUENCE, &algorithm);
    der::put(&mut info, BIT_STRING, &[&[0], &bits(key)?[..]].concat());
    der::put(&mut out, SEQUENCE, &info);
    Some(out)
}

/// What stands in the BIT STRING.
fn bits(key: &PublicKey<'_>) -> Option<Vec<u8>> {
    match key {
        PublicKey::Rsa { e, n } => {
            let (mut integers, mut out) = (Vec::new(), Vec::new());
            der::put_unsigned(&mut integers, n);
            der::put_unsigned(&mut integers, e);
            der::put(&mut out, SEQUENCE, &integers);
            Some(out)
        }
        PublicKey::Ecdsa(_, point) | PublicKey::Ed25519(point) | PublicKey::X25519(point) => Some(point.to_vec()),
        PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..) | PublicKey::MlDsa44Ed25519(..) => None,
    }
}

/// The key identifier that most certificates have: SHA-1 of the BIT STRING's contents (RFC 5280, 4.2.1.2, method 1).
pub fn key_identifier(key: &PublicKey<'_>) -> Option<[u8; 20]> {
    digest(&SHA1_FOR_LEGACY_USE_ONLY, &bits(key)?).as_ref().try_into().ok()
}

/// The SSH blob of the key in a SubjectPublicKeyInfo.
pub fn decode(info: &[u8]) -> Result<Vec<u8>, SpkiError> {
    let mut r = Reader::new(info);
    let mut info = r.sequence()?;
    r.finish()?;
    let mut algorithm = info.sequence()?;
    let bits = info.bits()?;
    info.finish()?;
    match algorithm.value(OID)? {
        RSA => decode_rsa(bits),
        EC => {
            let curve = algorithm.value(OID)?;
            let (curve, _) = CURVES.into_iter().find(|known| known.1 == curve).ok_or(SpkiError::Unsupported)?;
            if bits.len() != 1 + 2 * curve.scalar_len() || bits[0] != 4 {
                return Err(SpkiError::Unsupported);
            }
            checked(&PublicKey::Ecdsa(curve, bits))
        }
        ED25519 => checked(&PublicKey::Ed25519(bits)),
        X25519 => checked(&PublicKey::X25519(bits)),
        _ => Err(SpkiError::Unsupported),
    }
}

/// The SSH blob of the key in an RSAPublicKey (RFC 8017, A.1.1).
pub fn decode_rsa(der: &[u8]) -> Result<Vec<u8>, SpkiError> {
    let mut r = Reader::new(der);
    let mut integers = r.sequence()?;
    r.finish()?;
    let (n, e) = (integers.unsigned()?, integers.unsigned()?);
    integers.finish()?;
    Ok(PublicKey::rsa(n, e)?.to_blob())
}

/// The SSH blob of the key that an X.509 certificate is about. Nobody's signature is looked at.
pub fn decode_certificate(der: &[u8]) -> Result<Vec<u8>, SpkiError> {
    const VERSION: u8 = 0xa0;
    let mut certificate = Reader::new(der).sequence()?;
    let mut fields = certificate.sequence()?;
    if fields.peek() == Some(VERSION) {
        fields.value(VERSION)?;
    }
    fields.value(der::INTEGER)?;
    for _ in ["signature", "issuer", "validity", "subject"] {
        fields.sequence()?;
    }
    decode(fields.whole(SEQUENCE)?)
}

/// The blob, if it reads as one.
fn checked(key: &PublicKey<'_>) -> Result<Vec<u8>, SpkiError> {
    let blob = key.to_blob();
    PublicKey::parse(&blob)?;
    Ok(blob)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_round_trip(point in prop::collection::vec(any::<u8>(), 132), n in prop::collection::vec(any::<u8>(), 256)) {
            let curve_point = |curve: Curve| [&[4], &point[..2 * curve.scalar_len()]].concat();
            let points = [Curve::P256, Curve::P384, Curve::P521].map(|curve| (curve, curve_point(curve)));
            let modulus = [&[0x80], &n[..]].concat();
            let mut keys: Vec<_> = points.iter().map(|(curve, point)| PublicKey::Ecdsa(*curve, point)).collect();
            keys.push(PublicKey::Ed25519(&point[..32]));
            keys.push(PublicKey::X25519(&point[..32]));
            keys.push(PublicKey::Rsa { e: &[1, 0, 1], n: &modulus });
            for key in keys {
                let info = encode(&key).ok_or_else(|| TestCaseError::fail("no form"))?;
                prop_assert_eq!(decode(&info), Ok(key.to_blob()));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
            let _ = decode_rsa(&bytes);
            let _ = decode_certificate(&bytes);
        }
    }
}
