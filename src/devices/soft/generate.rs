//! How keys in this process are made. Knows algorithms and random numbers; no policy.

use aws_lc_rs::{agreement, rand};
use zeroize::Zeroizing;

use super::{SoftKey, failed};
use crate::{
    devices::{Algorithm, DeviceError},
    public_key::{Curve, KeyType},
    sys::rsa::RsaKey,
};

impl SoftKey {
    /// A new key. RSA takes its time, some seconds with 4,096 bits: not for a thread where others wait.
    pub fn generate(algorithm: Algorithm) -> Result<Self, DeviceError> {
        let (key_type, secret) = match algorithm {
            Algorithm::Ed25519 => (KeyType::Ed25519, random(32)?),
            Algorithm::X25519 => (KeyType::X25519, random(32)?),
            Algorithm::MlDsa44Ed25519 => (KeyType::MlDsa44Ed25519, random(64)?),
            Algorithm::Ecdsa(curve) => (KeyType::Ecdsa(curve), ecdsa(curve)?),
            Algorithm::Rsa(bits) => {
                let key = RsaKey::generate(bits).ok_or_else(failed)?;
                (KeyType::Rsa, key.to_der().ok_or_else(failed)?)
            }
        };
        Self::from_secret(key_type, &secret)
    }
}

fn random(len: usize) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
    let mut bytes = Zeroizing::new(vec![0; len]);
    rand::fill(&mut bytes).map_err(|_| DeviceError::Failed("the system gives no random numbers".into()))?;
    Ok(bytes)
}

/// The scalar, then the point.
fn ecdsa(curve: Curve) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
    let algorithm = match curve {
        Curve::P256 => &agreement::ECDH_P256,
        Curve::P384 => &agreement::ECDH_P384,
        Curve::P521 => &agreement::ECDH_P521,
    };
    // A number of the right length is a scalar of the curve almost always, and P-521's first byte has one bit.
    for _ in 0..64 {
        let mut scalar = random(curve.scalar_len())?;
        if curve == Curve::P521 {
            scalar[0] &= 1;
        }
        let Ok(key) = agreement::PrivateKey::from_private_key(algorithm, &scalar) else { continue };
        let point = key.compute_public_key().map_err(|_| failed())?;
        let mut secret = Zeroizing::new(Vec::with_capacity(scalar.len() + point.as_ref().len()));
        secret.extend_from_slice(&scalar);
        secret.extend_from_slice(point.as_ref());
        return Ok(secret);
    }
    Err(failed())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::public_key::PublicKey;

    #[test]
    fn every_kind_is_made_and_comes_back_from_its_secret() {
        for algorithm in [
            Algorithm::Ed25519,
            Algorithm::X25519,
            Algorithm::MlDsa44Ed25519,
            Algorithm::Ecdsa(Curve::P256),
            Algorithm::Ecdsa(Curve::P384),
            Algorithm::Ecdsa(Curve::P521),
            Algorithm::Rsa(2048),
        ] {
            let [one, other] = [(); 2].map(|()| SoftKey::generate(algorithm).unwrap());
            let blob = one.public_blob().unwrap();
            assert_ne!(blob, other.public_blob().unwrap(), "{algorithm}");
            assert_eq!(Algorithm::of(&PublicKey::parse(&blob).unwrap()), Some(algorithm));
            let again = SoftKey::from_secret(one.key_type(), &one.secret().unwrap()).unwrap();
            assert_eq!(again.public_blob().unwrap(), blob, "{algorithm}");
        }
    }
}
