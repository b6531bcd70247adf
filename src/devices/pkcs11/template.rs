//! What new keys are on a token: the attributes of the public and of the private object (PKCS#11 3.1, 4.8 and 4.9). Makes no
//! call.

use cryptoki::{
    mechanism::{Mechanism, MechanismType},
    object::{Attribute, KeyType, ObjectClass},
};
use zeroize::{Zeroize, Zeroizing};

use super::{
    der::{Der, INTEGER, OCTET_STRING, SEQUENCE, only},
    mechanism::Mechanisms,
    public,
};
use crate::{
    devices::{Algorithm, DeviceError, NewKey, soft::SoftParts},
    sys::rsa::RsaKey,
};

/// 65537
const PUBLIC_EXPONENT: [u8; 3] = [1, 0, 1];

/// The attributes of a key pair's objects. Its secret values are wiped when it is dropped.
pub(super) struct Pair {
    pub(super) public: Vec<Attribute>,
    pub(super) private: Vec<Attribute>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        for attribute in &mut self.private {
            if let Attribute::Value(secret)
            | Attribute::PrivateExponent(secret)
            | Attribute::Prime1(secret)
            | Attribute::Prime2(secret)
            | Attribute::Exponent1(secret)
            | Attribute::Exponent2(secret)
            | Attribute::Coefficient(secret) = attribute
            {
                secret.zeroize();
            }
        }
    }
}

const NO_COMPOSITE: DeviceError = DeviceError::unsupported("no token has keys of ML-DSA-44 and Ed25519 in one");

/// How a token makes a key, with every name that it may know of the curve, the best first.
pub(super) fn to_generate(
    new: &NewKey,
    id: &[u8],
    mechanisms: &Mechanisms,
) -> Result<(Mechanism<'static>, Vec<Pair>), DeviceError> {
    let mechanism = match new.algorithm {
        Algorithm::Rsa(_) => Mechanism::RsaPkcsKeyPairGen,
        Algorithm::Ecdsa(_) => Mechanism::EccKeyPairGen,
        Algorithm::Ed25519 => Mechanism::EccEdwardsKeyPairGen,
        Algorithm::X25519 if mechanisms.has(MechanismType::ECC_MONTGOMERY_KEY_PAIR_GEN) => {
            Mechanism::EccMontgomeryKeyPairGen
        }
        // SoftHSM makes both kinds by one mechanism.
        Algorithm::X25519 => Mechanism::EccEdwardsKeyPairGen,
        Algorithm::MlDsa44Ed25519 => return Err(NO_COMPOSITE),
    };
    if !mechanisms.has(mechanism.mechanism_type()) {
        return Err(DeviceError::Unsupported(format!("the token makes no {} keys", new.algorithm).into()));
    }
    let pair = |params: Option<Vec<u8>>| {
        let mut pair = both(new, id, mechanisms);
        pair.public.extend(params.map(Attribute::EcParams));
        if let Algorithm::Rsa(bits) = new.algorithm {
            pair.public.push(Attribute::ModulusBits(u64::from(bits).into()));
            pair.public.push(Attribute::PublicExponent(PUBLIC_EXPONENT.to_vec()));
        }
        pair
    };
    Ok((mechanism, each_curve(new.algorithm, pair)))
}

/// A key that was made elsewhere, likewise.
pub(super) fn to_bring(
    new: &NewKey,
    id: &[u8],
    parts: &SoftParts<'_>,
    mechanisms: &Mechanisms,
) -> Result<Vec<Pair>, DeviceError> {
    let invalid = || DeviceError::unsupported("the private key is none");
    let rsa = match parts {
        SoftParts::Rsa(integers) => {
            let der = RsaKey::from_integers(integers).and_then(|key| key.to_der()).ok_or_else(invalid)?;
            Some(rsa_values(&der).ok_or_else(invalid)?)
        }
        _ => None,
    };
    let key_type = key_type(new.algorithm)?;
    let pair = |params: Option<Vec<u8>>| {
        let mut pair = both(new, id, mechanisms);
        let Pair { public, private } = &mut pair;
        public.push(Attribute::Class(ObjectClass::PUBLIC_KEY));
        private.push(Attribute::Class(ObjectClass::PRIVATE_KEY));
        for of in [&mut *public, &mut *private] {
            of.push(Attribute::KeyType(key_type));
            of.extend(params.clone().map(Attribute::EcParams));
        }
        let mut curve = |point: &[u8], secret: Vec<u8>| {
            public.push(Attribute::EcPoint(octet_string(point)));
            private.push(Attribute::Value(secret));
        };
        match parts {
            SoftParts::Ecdsa { curve: its, scalar, point } => {
                // Without its leading zeros it would be shorter than modules expect.
                let mut padded = vec![0; its.scalar_len().saturating_sub(scalar.len())];
                padded.reserve_exact(scalar.len());
                padded.extend_from_slice(scalar);
                curve(point, padded);
            }
            SoftParts::Ed25519 { seed, public } => curve(public, seed.to_vec()),
            SoftParts::X25519 { secret, public } => curve(public, secret.to_vec()),
            SoftParts::Rsa(integers) => {
                public.push(Attribute::Modulus(integers.n.to_vec()));
                public.push(Attribute::PublicExponent(integers.e.to_vec()));
                private.extend(rsa.iter().flat_map(rsa_attributes));
            }
            SoftParts::Ed25519Expanded { .. } | SoftParts::MlDsa44Ed25519 { .. } => {}
        }
        pair
    };
    Ok(each_curve(new.algorithm, pair))
}

/// What every new key has.
fn both(new: &NewKey, id: &[u8], mechanisms: &Mechanisms) -> Pair {
    let of_both = || {
        let label = Attribute::Label(new.label.clone().into_bytes());
        vec![Attribute::Token(true), Attribute::Id(id.to_vec()), label]
    };
    let (mut public, mut private) = (of_both(), of_both());
    public.push(Attribute::Private(false));
    private.extend([Attribute::Private(true), Attribute::Sensitive(true), Attribute::Extractable(false)]);
    let derives = mechanisms.has(MechanismType::ECDH1_DERIVE);
    match new.algorithm {
        Algorithm::Rsa(_) => {
            let decrypts = mechanisms.has(MechanismType::RSA_PKCS_OAEP) || mechanisms.has(MechanismType::RSA_PKCS);
            public.extend([Attribute::Verify(true), Attribute::Encrypt(decrypts)]);
            private.extend([Attribute::Sign(true), Attribute::Decrypt(decrypts)]);
        }
        Algorithm::Ecdsa(_) => {
            public.push(Attribute::Verify(true));
            private.extend([Attribute::Sign(true), Attribute::Derive(derives)]);
        }
        Algorithm::Ed25519 => {
            public.push(Attribute::Verify(true));
            private.push(Attribute::Sign(true));
        }
        Algorithm::X25519 => private.extend([Attribute::Sign(false), Attribute::Derive(true)]),
        Algorithm::MlDsa44Ed25519 => {}
    }
    Pair { public, private }
}

/// One pair for each name of the algorithm's curve; one where it has none.
fn each_curve(algorithm: Algorithm, pair: impl Fn(Option<Vec<u8>>) -> Pair) -> Vec<Pair> {
    let params = match algorithm {
        Algorithm::Rsa(_) | Algorithm::MlDsa44Ed25519 => return vec![pair(None)],
        Algorithm::Ecdsa(curve) => public::params_of_nist(curve),
        Algorithm::Ed25519 => public::params_of_ed25519(),
        Algorithm::X25519 => public::params_of_x25519(),
    };
    params.into_iter().map(|params| pair(Some(params))).collect()
}

fn key_type(algorithm: Algorithm) -> Result<KeyType, DeviceError> {
    Ok(match algorithm {
        Algorithm::Rsa(_) => KeyType::RSA,
        Algorithm::Ecdsa(_) => KeyType::EC,
        Algorithm::Ed25519 => KeyType::EC_EDWARDS,
        Algorithm::X25519 => KeyType::EC_MONTGOMERY,
        Algorithm::MlDsa44Ed25519 => return Err(NO_COMPOSITE),
    })
}

/// A point as CKA_EC_POINT has it: none is longer than 255 bytes.
fn octet_string(point: &[u8]) -> Vec<u8> {
    let len = u8::try_from(point.len()).unwrap_or(u8::MAX);
    let head: &[u8] = if len < 0x80 { &[OCTET_STRING, len] } else { &[OCTET_STRING, 0x81, len] };
    [head, point].concat()
}

/// `n, e, d, p, q, d mod p-1, d mod q-1, q⁻¹ mod p` of an RSAPrivateKey (RFC 8017, A.1.2).
fn rsa_values(der: &[u8]) -> Option<[Zeroizing<Vec<u8>>; 8]> {
    let mut key = Der::new(only(der, SEQUENCE)?);
    key.take(INTEGER)?;
    let mut values: [Zeroizing<Vec<u8>>; 8] = Default::default();
    for value in &mut values {
        let integer = key.take(INTEGER)?;
        *value = Zeroizing::new(integer.strip_prefix(&[0]).unwrap_or(integer).to_vec());
    }
    Some(values)
}

fn rsa_attributes([n, e, d, p, q, dp, dq, qi]: &[Zeroizing<Vec<u8>>; 8]) -> [Attribute; 8] {
    [
        Attribute::Modulus(n.to_vec()),
        Attribute::PublicExponent(e.to_vec()),
        Attribute::PrivateExponent(d.to_vec()),
        Attribute::Prime1(p.to_vec()),
        Attribute::Prime2(q.to_vec()),
        Attribute::Exponent1(dp.to_vec()),
        Attribute::Exponent2(dq.to_vec()),
        Attribute::Coefficient(qi.to_vec()),
    ]
}
