//! One use of a key in one session: the calls for each operation, and what their errors mean there.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
    mechanism::{
        Mechanism,
        elliptic_curve::{EcKdf, Ecdh1DeriveParams},
    },
    object::{Attribute, AttributeType, KeyType as TokenKeyType, ObjectClass},
};
use zeroize::Zeroizing;

use super::{
    driver::Pkcs11,
    object::KeyObject,
    session::{Fault, Known, Lane},
};
use crate::{
    devices::{DecryptScheme, DeriveScheme, DeviceError, Hash, Input, Scheme, Slot, operation::MAX_RESULT},
    public_key::{Curve, KeyType},
};

impl Pkcs11 {
    pub(super) fn sign_in(
        &self,
        lane: &mut Lane,
        slot: &Slot,
        scheme: Scheme,
        input: &Input<'_>,
    ) -> Result<Vec<u8>, Fault> {
        let key = self.key(lane, slot)?;
        let plan = key.ability.plan(scheme, input)?;
        let signature = if key.ability.always_authenticate() {
            lane.session.sign_init(&plan.mechanism, key.handle)?;
            self.authenticate(lane)?;
            self.single_part()?.sign(&lane.session, &plan.data, MAX_RESULT)
        } else {
            lane.session.sign(&plan.mechanism, key.handle, &plan.data)
        };
        match signature {
            Ok(signature) => Ok(fitted(key.ability.key_type(), signature)),
            // A token that takes only so much does not say how much.
            Err(Error::Pkcs11(RvError::DataLenRange, _)) if matches!(scheme, Scheme::Ed25519) => {
                Err(DeviceError::TooLong { max: input.bytes().len().saturating_sub(1) }.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn decrypt_in(
        &self,
        lane: &mut Lane,
        slot: &Slot,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let key = self.key(lane, slot)?;
        if scheme == DecryptScheme::RsaPkcs1v15 && !self.pkcs1_decrypt {
            return Err(DeviceError::unsupported("set `pkcs1_decrypt = true` to decrypt PKCS#1 v1.5 on a token").into());
        }
        let mechanism = key.ability.decryption(scheme, label)?;
        let plaintext = if key.ability.always_authenticate() {
            lane.session.decrypt_init(&mechanism, key.handle)?;
            self.authenticate(lane)?;
            self.single_part()?.decrypt(&lane.session, ciphertext, MAX_RESULT)
        } else {
            lane.session.decrypt(&mechanism, key.handle, ciphertext).map(Zeroizing::new)
        };
        plaintext.map_err(undecryptable)
    }

    pub(super) fn derive_in(
        &self,
        lane: &mut Lane,
        slot: &Slot,
        scheme: DeriveScheme,
        peer: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let key = self.key(lane, slot)?;
        let (len, curve) = match (scheme, key.ability.key_type()) {
            (DeriveScheme::Ecdh, KeyType::Ecdsa(curve)) => (curve.scalar_len(), Some(curve)),
            (DeriveScheme::X25519, KeyType::X25519) => (32, None),
            _ => return Err(DeviceError::unsupported("the key agrees on no such secrets").into()),
        };
        if !is_public(curve, peer) {
            return Err(DeviceError::unsupported("the peer's public key is none of this key's curve").into());
        }
        match derived(lane, &key, peer, len) {
            // Some modules want the point in its DER form, which the standard allows as well (PKCS#11 3.1, 6.3.16).
            Err(Fault::Module(Error::Pkcs11(
                RvError::ArgumentsBad | RvError::MechanismParamInvalid | RvError::PublicKeyInvalid,
                _,
            ))) => derived(lane, &key, &octet_string(peer), len),
            secret => secret,
        }
    }

    /// Finds out whether the token takes OAEP with another hash than SHA-1, which mechanisms do not tell: the beginning of
    /// a decryption is enough.
    pub(super) fn try_oaep(&self, lane: &mut Lane, keys: &[KeyObject], locked: bool) {
        if locked || self.oaep_sha256.get().is_some() {
            return;
        }
        let able = |key: &KeyObject| Some((key.handle, self.mechanisms.ability(&key.blob, &key.usage)?));
        let Some((handle, ability)) = keys.iter().filter_map(able).find(|(_, ability)| ability.has_oaep()) else {
            return;
        };
        let Ok(mechanism) = ability.decryption(DecryptScheme::RsaOaep(Hash::Sha256), &[]) else { return };
        let begun = lane.session.decrypt_init(&mechanism, handle).is_ok();
        // Nothing will finish it.
        lane.stuck |= begun;
        let _ = self.oaep_sha256.set(begun);
    }
}

fn derived(lane: &Lane, key: &Known, peer: &[u8], len: usize) -> Result<Zeroizing<Vec<u8>>, Fault> {
    let mechanism = Mechanism::Ecdh1Derive(Ecdh1DeriveParams::new(EcKdf::null(), peer));
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(TokenKeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
        Attribute::ValueLen(len.try_into()?),
    ];
    let secret = lane.session.derive_key(&mechanism, key.handle, &template)?;
    let value = lane.session.get_attributes(secret, &[AttributeType::Value]);
    // It goes with the session at the latest.
    let _ = lane.session.destroy_object(secret);
    let value = value?.into_iter().find_map(|attribute| match attribute {
        Attribute::Value(value) => Some(Zeroizing::new(value)),
        _ => None,
    });
    match value {
        Some(value) if !value.is_empty() && value.len() <= len => {
            let mut secret = Zeroizing::new(vec![0; len - value.len()]);
            secret.extend_from_slice(&value);
            Ok(secret)
        }
        _ => Err(DeviceError::Failed("the token keeps the secret that it derived to itself".into()).into()),
    }
}

fn is_public(curve: Option<Curve>, peer: &[u8]) -> bool {
    match curve {
        Some(curve) => peer.len() == 1 + 2 * curve.scalar_len() && peer.first() == Some(&4),
        None => peer.len() == 32,
    }
}

fn octet_string(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![super::der::OCTET_STRING];
    match u8::try_from(bytes.len()) {
        Ok(short) if short < 0x80 => out.push(short),
        Ok(len) => out.extend([0x81, len]),
        Err(_) => out.extend([0x82, (bytes.len() >> 8) as u8, bytes.len() as u8]),
    }
    out.extend_from_slice(bytes);
    out
}

/// A signature in the form that the vault has. Some modules leave out zeros in front of both numbers alike.
fn fitted(key_type: KeyType, signature: Vec<u8>) -> Vec<u8> {
    let KeyType::Ecdsa(curve) = key_type else { return signature };
    let len = curve.scalar_len();
    if !signature.len().is_multiple_of(2) || signature.len() >= 2 * len {
        return signature;
    }
    let (r, s) = signature.split_at(signature.len() / 2);
    let zeros = vec![0; len - r.len()];
    [&zeros, r, &zeros, s].concat()
}

/// One reason for everything that is wrong with a ciphertext: which it was is what an attacker would like to know.
fn undecryptable(error: Error) -> Fault {
    match error {
        Error::Pkcs11(
            RvError::EncryptedDataInvalid
            | RvError::EncryptedDataLenRange
            | RvError::DataInvalid
            | RvError::DataLenRange
            | RvError::GeneralError
            | RvError::FunctionFailed
            | RvError::ArgumentsBad,
            Function::Decrypt,
        ) => DeviceError::unsupported("the ciphertext was not made for this key and scheme").into(),
        error => error.into(),
    }
}
