//! Public keys from what tokens say of them: a SubjectPublicKeyInfo, its parts, or a certificate. Knows RFC 5280, RFC 5480
//! and RFC 8410 as far as SSH's key types go; asks no token.

use super::der::{
    BIT_STRING, CONTEXT_0, Der, INTEGER, OBJECT_IDENTIFIER, OCTET_STRING, PRINTABLE_STRING, SEQUENCE, SET, UTF8_STRING,
    only,
};
use crate::public_key::{Curve, PublicKey};

/// Why there is no public key to be had, for a person.
pub(super) type Reason = &'static str;

const RSA_ENCRYPTION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
const COMMON_NAME: &[u8] = &[0x55, 4, 3];
/// The object identifiers of curves.
const CURVES: [(&[u8], EcKind); 7] = [
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7], EcKind::Nist(Curve::P256)),
    (&[0x2b, 0x81, 4, 0, 0x22], EcKind::Nist(Curve::P384)),
    (&[0x2b, 0x81, 4, 0, 0x23], EcKind::Nist(Curve::P521)),
    (&[0x2b, 0x65, 0x70], EcKind::Ed25519),
    (&[0x2b, 0x65, 0x6e], EcKind::X25519),
    // What was in use before RFC 8410.
    (&[0x2b, 6, 1, 4, 1, 0xda, 0x47, 0x0f, 1], EcKind::Ed25519),
    (&[0x2b, 6, 1, 4, 1, 0x97, 0x55, 1, 5, 1], EcKind::X25519),
];
/// The names of curves (PKCS#11 3.1, 6.3.5).
const CURVE_NAMES: [(&[u8], EcKind); 2] = [(b"edwards25519", EcKind::Ed25519), (b"curve25519", EcKind::X25519)];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EcKind {
    Nist(Curve),
    Ed25519,
    X25519,
}

/// The blob of an RSA key, from unsigned integers.
pub(super) fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<Vec<u8>, Reason> {
    let plain = |number: &[u8]| number.iter().position(|byte| *byte != 0).map_or(number.len(), |zeros| zeros);
    let (n, e) = (&modulus[plain(modulus)..], &exponent[plain(exponent)..]);
    match PublicKey::rsa(n, e) {
        Ok(key) => Ok(key.to_blob()),
        Err(_) => Err("an RSA key is used from 1024 to 16384 bits, with a small odd exponent"),
    }
}

/// The blob of a key on a curve, from CKA_EC_PARAMS and CKA_EC_POINT.
pub(super) fn ec(params: &[u8], point: &[u8]) -> Result<Vec<u8>, Reason> {
    let kind = curve(params)?;
    let len = match kind {
        EcKind::Nist(curve) => 1 + 2 * curve.scalar_len(),
        EcKind::Ed25519 | EcKind::X25519 => 32,
    };
    // The standard wants an OCTET STRING around it; some modules leave that out, and one had a BIT STRING.
    let inner = match point {
        raw if raw.len() == len => raw,
        der => only(der, OCTET_STRING)
            .or_else(|| only(der, BIT_STRING).and_then(|bits| bits.strip_prefix(&[0])))
            .ok_or("its point is no DER")?,
    };
    ec_blob(kind, inner)
}

/// The blob of a key in a SubjectPublicKeyInfo (RFC 5280, 4.1.2.7).
pub(super) fn spki(der: &[u8]) -> Result<Vec<u8>, Reason> {
    const MALFORMED: Reason = "its public key is malformed";
    let parts = || {
        let mut info = Der::new(only(der, SEQUENCE)?);
        let mut algorithm = info.inside(SEQUENCE)?;
        let key = info.take(BIT_STRING)?.strip_prefix(&[0])?;
        Some((algorithm.take(OBJECT_IDENTIFIER)?, algorithm.any().map(|(whole, _)| whole), key))
    };
    let (algorithm, params, key) = parts().ok_or(MALFORMED)?;
    match (algorithm, params) {
        (RSA_ENCRYPTION, _) => {
            let mut numbers = Der::new(only(key, SEQUENCE).ok_or(MALFORMED)?);
            let (n, e) = (numbers.take(INTEGER).ok_or(MALFORMED)?, numbers.take(INTEGER).ok_or(MALFORMED)?);
            rsa(n, e)
        }
        (EC_PUBLIC_KEY, Some(params)) => ec_blob(curve(params)?, key),
        (oid, _) => ec_blob(by_identifier(oid).ok_or("its algorithm is not one that is used here")?, key),
    }
}

/// CKA_EC_PARAMS of a NIST curve.
pub(super) fn params_of_nist(curve: Curve) -> Vec<Vec<u8>> {
    params(EcKind::Nist(curve))
}

/// CKA_EC_PARAMS of Ed25519, by every name that modules have for it.
pub(super) fn params_of_ed25519() -> Vec<Vec<u8>> {
    params(EcKind::Ed25519)
}

/// The same of X25519.
pub(super) fn params_of_x25519() -> Vec<Vec<u8>> {
    params(EcKind::X25519)
}

/// The names of a curve: the object identifier of today, the name, the object identifier of before.
fn params(kind: EcKind) -> Vec<Vec<u8>> {
    let element = |tag: u8, name: &[u8]| {
        let len = u8::try_from(name.len()).unwrap_or(u8::MAX);
        [&[tag, len], name].concat()
    };
    let of = |known: &&(&[u8], EcKind)| known.1 == kind;
    let identifiers = || CURVES.iter().filter(of).map(|(oid, _)| element(OBJECT_IDENTIFIER, oid));
    let names = CURVE_NAMES.iter().filter(of).map(|(name, _)| element(PRINTABLE_STRING, name));
    identifiers().take(1).chain(names).chain(identifiers().skip(1)).collect()
}

/// What is wanted of an X.509 certificate. Nobody has verified it: it only says what the token has.
pub(super) struct Certificate<'a> {
    /// A SubjectPublicKeyInfo.
    pub(super) spki: &'a [u8],
    /// The subject's common name, where it has one in plain text.
    pub(super) common_name: Option<&'a str>,
}

/// Reads an X.509 certificate (RFC 5280, 4.1).
pub(super) fn certificate(der: &[u8]) -> Option<Certificate<'_>> {
    let mut signed = Der::new(der).inside(SEQUENCE)?.inside(SEQUENCE)?;
    if signed.tag() == Some(CONTEXT_0) {
        signed.any()?;
    }
    // Serial, signature algorithm, issuer, validity.
    signed.take(INTEGER)?;
    (0..3).try_for_each(|_| signed.take(SEQUENCE).map(drop))?;
    let subject = signed.inside(SEQUENCE)?;
    let (spki, _) = signed.any()?;
    Some(Certificate { spki, common_name: common_name(subject) })
}

fn common_name(mut subject: Der<'_>) -> Option<&str> {
    let mut found = None;
    while let Some(mut set) = subject.inside(SET) {
        while let Some(mut attribute) = set.inside(SEQUENCE) {
            if attribute.take(OBJECT_IDENTIFIER) == Some(COMMON_NAME)
                && let Some(text) = attribute.take(UTF8_STRING).or_else(|| attribute.take(PRINTABLE_STRING))
            {
                found = std::str::from_utf8(text).ok();
            }
        }
    }
    found
}

fn curve(params: &[u8]) -> Result<EcKind, Reason> {
    let named =
        || CURVE_NAMES.iter().find(|(name, _)| only(params, PRINTABLE_STRING) == Some(name)).map(|(_, kind)| *kind);
    match only(params, OBJECT_IDENTIFIER) {
        Some(oid) => by_identifier(oid),
        None => named(),
    }
    .ok_or("its curve is not one of P-256, P-384, P-521, Ed25519 and X25519")
}

fn by_identifier(oid: &[u8]) -> Option<EcKind> {
    CURVES.iter().find(|(known, _)| *known == oid).map(|(_, kind)| *kind)
}

fn ec_blob(kind: EcKind, point: &[u8]) -> Result<Vec<u8>, Reason> {
    let key = match kind {
        EcKind::Nist(curve) => PublicKey::Ecdsa(curve, point),
        EcKind::Ed25519 => PublicKey::Ed25519(point),
        EcKind::X25519 => PublicKey::X25519(point),
    };
    let blob = key.to_blob();
    match PublicKey::parse(&blob) {
        Ok(_) => Ok(blob),
        Err(_) => Err("its point is not an uncompressed point of its curve"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const P256: &[u8] = &[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];

    fn point(len: usize) -> Vec<u8> {
        let mut point = vec![7; len];
        point[0] = 4;
        point
    }

    fn wrapped(tag: u8, contents: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(contents.len()).unwrap()], contents].concat()
    }

    #[test]
    fn a_point_is_read_with_and_without_its_wrapping() {
        let raw = point(65);
        let blob = PublicKey::Ecdsa(Curve::P256, &raw).to_blob();
        assert_eq!(ec(P256, &raw).unwrap(), blob);
        assert_eq!(ec(P256, &wrapped(OCTET_STRING, &raw)).unwrap(), blob);
        let edwards = wrapped(PRINTABLE_STRING, b"edwards25519");
        let blob = PublicKey::Ed25519(&[4; 32]).to_blob();
        assert_eq!(ec(&edwards, &[4; 32]).unwrap(), blob);
        assert_eq!(ec(&[6, 3, 0x2b, 0x65, 0x70], &wrapped(OCTET_STRING, &[4; 32])).unwrap(), blob);
        let bits = [&[BIT_STRING, 33, 0][..], &[4; 32]].concat();
        assert_eq!(ec(&edwards, &bits).unwrap(), blob);
        let montgomery = wrapped(PRINTABLE_STRING, b"curve25519");
        assert_eq!(ec(&montgomery, &[4; 32]).unwrap(), PublicKey::X25519(&[4; 32]).to_blob());
    }

    #[test]
    fn what_ssh_has_no_key_for_is_refused_with_the_reason() {
        assert!(ec(&[6, 5, 0x2b, 0x81, 4, 0, 0x0a], &point(65)).unwrap_err().contains("curve"));
        assert!(ec(&[0x30, 0], &point(65)).unwrap_err().contains("curve"));
        assert!(ec(P256, &point(33)).unwrap_err().contains("point"));
        let compressed = [&[2][..], &[7; 32]].concat();
        assert!(ec(P256, &wrapped(OCTET_STRING, &compressed)).unwrap_err().contains("uncompressed"));
        assert!(rsa(&[0x80; 64], &[1, 0, 1]).unwrap_err().contains("1024"));
        assert!(spki(&[0x30, 0]).unwrap_err().contains("malformed"));
    }

    #[test]
    fn the_integers_of_rsa_may_have_zeros_in_front() {
        let n = [0x91; 256];
        let padded = [&[0, 0][..], &n].concat();
        assert_eq!(rsa(&padded, &[0, 1, 0, 1]).unwrap(), PublicKey::rsa(&n, &[1, 0, 1]).unwrap().to_blob());
    }
}
