//! Public keys as JSON Web Keys (RFC 7517; RFC 7518, section 6; RFC 8037). Knows their members; no file.

use aws_lc_rs::digest::{SHA256, digest};
use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::{Map, Value};

use crate::public_key::{Curve, PublicKey};

/// The key, with its thumbprint (RFC 7638) as `kid`; `None` for types that have no form: those of FIDO authenticators, and
/// ML-DSA with Ed25519.
pub fn encode(key: &PublicKey<'_>) -> Option<Map<String, Value>> {
    let mut members = required(key)?;
    members.insert("kid".to_owned(), thumbprint(key)?.into());
    Some(members)
}

/// SHA-256 of the members that the type requires, in base64url (RFC 7638, section 3).
pub fn thumbprint(key: &PublicKey<'_>) -> Option<String> {
    // The map is ordered by name, and prints without spaces, which is what is to be hashed.
    let text = Value::Object(required(key)?).to_string();
    Some(Base64UrlUnpadded::encode_string(digest(&SHA256, text.as_bytes()).as_ref()))
}

fn required(key: &PublicKey<'_>) -> Option<Map<String, Value>> {
    let bytes = Base64UrlUnpadded::encode_string;
    let members = match key {
        PublicKey::Rsa { e, n } => vec![("kty", "RSA".to_owned()), ("e", bytes(e)), ("n", bytes(n))],
        PublicKey::Ecdsa(curve, point) => {
            let name = match curve {
                Curve::P256 => "P-256",
                Curve::P384 => "P-384",
                Curve::P521 => "P-521",
            };
            let (x, y) = point.get(1..)?.split_at_checked(curve.scalar_len())?;
            vec![("kty", "EC".to_owned()), ("crv", name.to_owned()), ("x", bytes(x)), ("y", bytes(y))]
        }
        PublicKey::Ed25519(point) => {
            vec![("kty", "OKP".to_owned()), ("crv", "Ed25519".to_owned()), ("x", bytes(point))]
        }
        PublicKey::X25519(point) => vec![("kty", "OKP".to_owned()), ("crv", "X25519".to_owned()), ("x", bytes(point))],
        PublicKey::SkEd25519(..) | PublicKey::SkEcdsa(..) | PublicKey::MlDsa44Ed25519(..) => return None,
    };
    Some(members.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn decode(text: &str) -> Vec<u8> {
        Base64UrlUnpadded::decode_vec(text).unwrap()
    }

    #[test]
    fn the_example_of_rfc_7638() {
        let n = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3ok\
            njhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qM\
            QvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJz\
            KnqDKgw";
        let (e, n) = (decode("AQAB"), decode(n));
        let key = PublicKey::Rsa { e: &e, n: &n };
        assert_eq!(thumbprint(&key).unwrap(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }

    #[test]
    fn the_example_of_rfc_8037() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let key = decode(x);
        let expected = json!({
            "kty": "OKP", "crv": "Ed25519", "x": x, "kid": "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k",
        });
        assert_eq!(Value::Object(encode(&PublicKey::Ed25519(&key)).unwrap()), expected);
    }

    #[test]
    fn the_example_of_rfc_7517() {
        // Appendix A.1.
        let x = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4";
        let y = "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM";
        let point = [vec![4], decode(x), decode(y)].concat();
        let key = encode(&PublicKey::Ecdsa(Curve::P256, &point)).unwrap();
        assert_eq!(
            (&key["kty"], &key["crv"], &key["x"], &key["y"]),
            (&"EC".into(), &"P-256".into(), &x.into(), &y.into())
        );
        assert_eq!(encode(&PublicKey::SkEd25519(&[0; 32], b"ssh:")), None);
    }
}
