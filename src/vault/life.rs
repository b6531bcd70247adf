//! The life of a key: made, brought to a device, named, allowed more or less, deleted. Knows who may, devices and the
//! keyring; nothing of the wire.

use std::{future::Future, sync::Arc};

use secrecy::SecretString;
use tokio::time::Instant;
use tracing::info;

use super::{
    Vault,
    audit::MEMORY,
    key::{Caller, Grants, Identity, Place, PrivateKey},
    pins::WantedPin,
    policy::{self, Refusal},
    stored::{NewStored, STORE},
};
use crate::{
    devices::{
        Algorithm, CardPin, CardSlot, Device, DeviceError, FoundKey, MAX_LABEL, NewKey, Patience, Touch, soft::SoftKey,
    },
    public_key::{Blob, FingerprintHash, PublicKey, fingerprint},
};

/// Where a key in memory is to go, and what it is to be there.
#[derive(Clone)]
pub struct Move {
    /// The device.
    pub device: String,
    /// What it is to be called there; empty for what it is called here.
    pub label: String,
    /// As in [`NewKey`].
    pub slot: Option<CardSlot>,
    /// As in [`NewKey`].
    pub touch: Option<Touch>,
    /// As in [`NewKey`].
    pub secret: Option<SecretString>,
    /// What it may do in the store; other places have no such terms.
    pub terms: NewStored,
}

impl Vault {
    /// Has a device or the store make a key, and returns its blob. It is listed before this completes, and remembered for
    /// when the device is away. `deadline` is the caller's own; the device's for making keys applies where it is sooner.
    pub async fn generate(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        device: &str,
        new: NewKey,
        terms: NewStored,
        deadline: Option<Instant>,
    ) -> Result<Box<[u8]>, Refusal> {
        self.check_owner(caller)?;
        if device == STORE {
            check_no_wishes(new.slot, new.touch, new.secret.as_ref())?;
            return self.generate_stored(caller, new.algorithm, &new.label, terms, deadline).await;
        }
        check_no_terms(terms)?;
        let device = self.maker(device)?;
        let make = |patience| device.generate(caller.connection, new.clone(), patience);
        let made = self.logged_in(&device, caller, deadline, make);
        let made = self.with_secret(&device, new.secret.as_ref(), made).await?;
        self.catch_up(&device).await;
        info!(device = device.name(), key = key_name(&made), "generated");
        Ok(made.blob)
    }

    /// Moves a key from memory to a device or into the store, and returns its plain blob. When this completes it is there
    /// and memory has it no more, nor its certificates; the store keeps these.
    pub async fn import(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        blob: &[u8],
        to: Move,
        deadline: Option<Instant>,
    ) -> Result<Box<[u8]>, Refusal> {
        self.check_owner(caller)?;
        if to.device == STORE {
            check_no_wishes(to.slot, to.touch, to.secret.as_ref())?;
            let identity = self.find(caller, blob)?;
            return self.keep_in_store(caller, &identity, &to.label, to.terms, deadline).await;
        }
        check_no_terms(to.terms)?;
        let device = self.maker(&to.device)?;
        let identity = self.find_key(caller, blob)?;
        let plain = plain_blob(&identity.blob);
        let key = self.unconstrained_soft_key(&plain)?;
        let algorithm = PublicKey::parse(&plain).ok().as_ref().and_then(Algorithm::of);
        let algorithm = algorithm.ok_or(DeviceError::unsupported("devices are given no keys of this kind or size"))?;
        let Move { label, slot, touch, secret, .. } = to;
        let label = if label.is_empty() { label_of(&identity) } else { label };
        let new = NewKey { label, algorithm, slot, touch, secret };
        let private = key.private_half()?;
        let bring = |patience| device.import(caller.connection, new.clone(), private.clone(), patience);
        let made = self.logged_in(&device, caller, deadline, bring);
        let made = self.with_secret(&device, new.secret.as_ref(), made).await?;
        self.catch_up(&device).await;
        if *made.blob != *plain {
            return Err(
                DeviceError::Failed("the device has made another key of the one that it was given".into()).into()
            );
        }
        self.write().ring.remove_places(|identity, place| is_in_memory(place) && is_of(identity, &plain));
        info!(device = device.name(), key = key_name(&made), "moved to the device");
        Ok(made.blob)
    }

    /// Names a key in this vault, and on its devices where these keep labels. An empty name takes the name away.
    pub async fn rename(self: &Arc<Self>, caller: &Arc<Caller>, blob: &[u8], name: &str) -> Result<(), Refusal> {
        self.check_owner(caller)?;
        let identity = self.find_key(caller, blob)?;
        let plain = plain_blob(&identity.blob);
        for (device, key) in on_devices(&identity) {
            let rename = |patience| device.rename(caller.connection, key.slot.clone(), name.to_owned(), patience);
            match self.logged_in(&device, caller, None, rename).await {
                // It has the name here.
                Ok(()) | Err(Refusal::Device(DeviceError::Unsupported(_))) => {}
                Err(refusal) => return Err(refusal),
            }
            self.catch_up(&device).await;
        }
        if self.stored(&plain).is_some() {
            let name: Box<str> = name.into();
            self.describe(caller, &plain, None, move |metadata| {
                metadata.name = name;
                Ok(())
            })
            .await?;
        }
        let given: Box<str> = name.into();
        self.change(|ring| {
            ring.change_places(|identity| is_of(identity, &plain), |place| place.name = given.clone());
            Ok(())
        })?;
        info!(key = fingerprint(&plain, FingerprintHash::Sha256), name, "renamed");
        Ok(())
    }

    /// Deletes a key from a device for good, from the store, or from [`MEMORY`]. `name` is what the key is called: its name,
    /// its label, its comment or its fingerprint. The store wants a passphrase as `proof`.
    pub async fn delete(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        blob: &[u8],
        device: &str,
        name: &str,
        proof: Option<SecretString>,
    ) -> Result<(), Refusal> {
        self.check_owner(caller)?;
        let identity = self.find_key(caller, blob)?;
        let plain = plain_blob(&identity.blob);
        if !is_called(&identity, &plain, name) {
            return Err(Refusal::WrongName);
        }
        let called = fingerprint(&plain, FingerprintHash::Sha256);
        if device == MEMORY {
            let removed = self.change(|ring| {
                Ok(ring.remove_places(|identity, place| is_in_memory(place) && is_of(identity, &plain)))
            })?;
            info!(key = called, "deleted from memory");
            return if removed > 0 { Ok(()) } else { Err(DeviceError::NoSuchKey.into()) };
        }
        if device == STORE {
            return self.delete_stored(&plain, proof).await;
        }
        let of_name = on_devices(&identity).find(|(other, _)| other.name() == device);
        let (device, key) = of_name.ok_or(DeviceError::NoSuchKey)?;
        let delete = |patience| device.delete(caller.connection, key.slot.clone(), patience);
        self.logged_in(&device, caller, None, delete).await?;
        self.catch_up(&device).await;
        self.forget_key(&device, &key.slot).await;
        info!(device = device.name(), key = called, "deleted");
        Ok(())
    }

    /// Grants a key exactly these operations from now on, more or fewer than before, until it goes or the daemon ends; in
    /// the store until somebody says otherwise. The key's certificates are granted the same. A key that asks before each use
    /// asks before this. A stored key is granted more only with a passphrase as `proof`.
    pub async fn allow(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        blob: &[u8],
        grants: Grants,
        proof: Option<SecretString>,
    ) -> Result<(), Refusal> {
        self.check_owner(caller)?;
        let mut identity = self.find_key(caller, blob)?;
        let plain = plain_blob(&identity.blob);
        self.check_grantable(&plain, grants)?;
        if identity.is_confirmed() {
            // Read here, for the question.
            caller.program();
            let question = policy::allow_question(&identity, caller, &operations(grants), &self.settings().rules);
            identity = self.confirm(identity, caller, &question).await?;
            // Another identity of the key may have come meanwhile.
            self.check_grantable(&plain, grants)?;
        }
        if let Some(key) = self.stored(&plain) {
            self.allow_stored(caller, &key, grants, proof).await?;
        }
        self.change(|ring| {
            ring.change_places(|identity| is_of(identity, &plain), |place| place.grants = grants);
            Ok(())
        })?;
        info!(key = %identity.name(), operations = operations(grants), "allowed");
        Ok(())
    }

    /// Whether the vault is this caller's: its owner's, or root's.
    pub fn check_owner(&self, caller: &Caller) -> Result<(), Refusal> {
        self.check_open()?;
        if policy::may_administer(caller, self.owner) { Ok(()) } else { Err(Refusal::NotOwner) }
    }

    /// A device that is to have a new key. One that came by `ssh-add -s` shows only what was added with it.
    pub(super) fn maker(&self, device: &str) -> Result<Device, Refusal> {
        let device = self.device(device).ok_or(Refusal::NoSuchDevice)?;
        match self.terms_of(&device) {
            Some(_) => Ok(device),
            None => Err(DeviceError::unsupported("keys are made on devices of the configuration only").into()),
        }
    }

    /// The private key in memory, unless one of its identities there is under conditions: these would be lost.
    fn unconstrained_soft_key(&self, plain: &[u8]) -> Result<Arc<SoftKey>, Refusal> {
        let state = self.read();
        let mut soft = None;
        for place in state.ring.iter().filter(|identity| is_of(identity, plain)).flat_map(|identity| &identity.places) {
            if let PrivateKey::Soft(key) = &place.key {
                let constraints = &place.constraints;
                if constraints.confirm || constraints.expires.is_some() || !constraints.destinations.is_empty() {
                    return Err(Refusal::NotPermitted(
                        "no device would keep its lifetime, its destinations or its confirmation",
                    ));
                }
                soft = Some(Arc::clone(key));
            }
        }
        soft.ok_or(DeviceError::unsupported("only a key that `ssh-add` put into memory can be moved").into())
    }

    /// Whether the key may be granted this in all its places.
    fn check_grantable(&self, plain: &[u8], grants: Grants) -> Result<(), Refusal> {
        let identities: Vec<_> = {
            let state = self.read();
            state.ring.iter().filter(|identity| is_of(identity, plain)).cloned().collect()
        };
        for identity in &identities {
            if identity.key_type.is_sk() || identity.restrictions().next().is_some() {
                return Err(Refusal::NotPermitted(
                    "a FIDO or destination-constrained key makes plain ssh signatures only",
                ));
            }
            for (device, _) in on_devices(identity) {
                if self.terms_of(&device).is_some_and(|terms| !terms.include(grants)) {
                    return Err(Refusal::BeyondConfiguration(device.name().to_owned()));
                }
            }
        }
        Ok(())
    }

    /// Does work that sends a device an administrator's secret, if there is one, and none that it has refused before.
    async fn with_secret<T>(
        &self,
        device: &Device,
        secret: Option<&SecretString>,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        match secret {
            Some(secret) => self.sent_once(device, CardPin::Admin, secret, work).await,
            None => work.await,
        }
    }

    /// Makes a call to a device; when it asks for its PIN, once more after a login.
    async fn logged_in<T, F: Future<Output = Result<T, DeviceError>>>(
        self: &Arc<Self>,
        device: &Device,
        caller: &Arc<Caller>,
        deadline: Option<Instant>,
        call: impl Fn(Patience) -> F,
    ) -> Result<T, Refusal> {
        let patience = Patience { deadline, waits_for_place: true };
        match call(patience).await {
            Err(DeviceError::PinRequired) => {
                self.login(device, caller, WantedPin::Any).await?;
                self.check_owner(caller)?;
                Ok(call(patience).await?)
            }
            result => Ok(result?),
        }
    }
}

/// What only devices know: a slot, a touch, an administrator's secret.
fn check_no_wishes(
    slot: Option<CardSlot>,
    touch: Option<Touch>,
    secret: Option<&SecretString>,
) -> Result<(), DeviceError> {
    match (slot, touch, secret) {
        (None, None, None) => Ok(()),
        _ => Err(DeviceError::unsupported("the store has no slots for keys, no touch and no administrator's PIN")),
    }
}

/// What only the store knows: whether a key may leave it, and what it is allowed from the start.
fn check_no_terms(terms: NewStored) -> Result<(), DeviceError> {
    match terms {
        NewStored { exportable: false, grants: Grants::NONE } => Ok(()),
        _ => Err(DeviceError::unsupported(
            "a device's keys are never exported, and its `operations` in the configuration say what they do",
        )),
    }
}

fn is_in_memory(place: &Place) -> bool {
    place.key.device().is_none()
}

/// The plain key's blob behind an identity's.
pub(super) fn plain_blob(blob: &[u8]) -> Vec<u8> {
    Blob::parse(blob).map_or_else(|_| blob.to_vec(), |blob| blob.key().to_blob())
}

/// Whether an identity is the plain key with this blob, or has a certificate of it.
pub(super) fn is_of(identity: &Identity, plain: &[u8]) -> bool {
    *identity.blob == *plain || plain_blob(&identity.blob) == plain
}

/// The devices that have the key, with what they call it.
fn on_devices(identity: &Identity) -> impl Iterator<Item = (Device, Arc<FoundKey>)> {
    identity.places.iter().filter_map(|place| match &place.key {
        PrivateKey::OnDevice(device, key) => Some((device.clone(), Arc::clone(key))),
        PrivateKey::Soft(_) | PrivateKey::Sk(_) | PrivateKey::Stored(_) => None,
    })
}

/// What a device is told to call a key that has no other name.
fn label_of(identity: &Identity) -> String {
    let name = match identity.given_name() {
        "" => policy::harmless(identity.comment()),
        name => name.to_owned(),
    };
    name[..name.floor_char_boundary(MAX_LABEL)].to_owned()
}

fn is_called(identity: &Identity, plain: &[u8], name: &str) -> bool {
    let of_place = |place: &Place| {
        let label = matches!(&place.key, PrivateKey::OnDevice(_, key) if key.label == name);
        label || *place.name == *name || *place.comment == *name.as_bytes()
    };
    !name.is_empty() && (identity.places.iter().any(of_place) || fingerprint(plain, FingerprintHash::Sha256) == name)
}

fn key_name(key: &FoundKey) -> String {
    fingerprint(&key.blob, FingerprintHash::Sha256)
}

/// The operations by their names, for people.
fn operations(grants: Grants) -> String {
    let names = grants.names().collect::<Vec<_>>().join(", ");
    if names.is_empty() { "plain ssh signatures only".to_owned() } else { names }
}
