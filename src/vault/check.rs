//! What would become of a use of a key, as far as that shows without doing it. Decides by the same policy as
//! [`Vault::operate`]; knows devices by their state.

use super::{
    Vault,
    key::{Caller, Place, PrivateKey},
    policy::Refusal,
    sign::Asked,
    unix_now,
};
use crate::devices::{DeviceError, Operation, Scheme, soft::kind};

/// What would become of a use that is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Whether a person would be asked to confirm it.
    pub confirm: bool,
    /// The first place that could do it now: a device's name, `memory`, `store` or `fido`.
    pub device: String,
    /// For a person: what they would be asked, a line each; may be empty.
    pub note: String,
}

impl Vault {
    /// What would become of a use. Nobody is asked, nothing is waited for, and no try is spent.
    pub fn check(&self, caller: &Caller, blob: &[u8], asked: &Asked<'_>) -> Result<Checked, Refusal> {
        let identity = self.find_key(caller, blob)?;
        let operation = asked.operation(identity.key_type);
        let (needs, verdict) = self.consider(caller, &identity, asked, &operation)?;
        let (mut refusal, now) = (Refusal::NoSuchKey, unix_now());
        let serves = |place: &&Place| place.grants.include(needs) && place.is_out_of_use(now).is_none();
        for place in identity.places.iter().filter(serves) {
            match self.foresee(place, &operation) {
                Ok(notes) => {
                    let notes: Vec<_> = verdict.confirm.iter().cloned().chain(notes).collect();
                    let confirm = verdict.confirm.is_some();
                    return Ok(Checked { confirm, device: place.key.place().into_owned(), note: notes.join("\n") });
                }
                Err(error) if error.lets_another_try() => refusal = error.into(),
                Err(error) => return Err(error.into()),
            }
        }
        Err(refusal)
    }

    /// Whether a place could do this now, and what a person would be asked there.
    fn foresee(&self, place: &Place, operation: &Operation<'_>) -> Result<Vec<String>, DeviceError> {
        let touch = "the device wants a touch".to_owned();
        let mut notes = Vec::new();
        let able = match &place.key {
            PrivateKey::Soft(key) => operation.is_among(key.schemes(), key.decrypts(), key.derives()),
            PrivateKey::Stored(key) => {
                let locked = !self.store_is_open();
                notes.extend(locked.then(|| "the store wants its passphrase (prompt)".to_owned()));
                let of = key.key_type();
                operation.is_among(kind::schemes(of), kind::decrypts(of), kind::derives(of))
            }
            PrivateKey::Sk(key) => {
                notes.extend(key.wants_touch().then_some(touch));
                matches!(operation, Operation::Sign { scheme: Scheme::Sk, .. })
            }
            PrivateKey::OnDevice(device, key) => {
                if let Some(refusal) = device.refusal() {
                    return Err(refusal);
                }
                let status = device.state().status.clone().unwrap_or_default();
                if status.tries_left == Some(0) {
                    return Err(DeviceError::PinBlocked);
                }
                let source = self.password_source(device);
                notes.extend(status.locked.then(|| format!("{} wants its PIN ({source})", device.name())));
                notes.extend(key.touch.then_some(touch));
                operation.is_among(&key.schemes, &key.decrypts, &key.derives)
            }
        };
        if able { Ok(notes) } else { Err(DeviceError::unsupported("the key has no such scheme in its first place")) }
    }
}
