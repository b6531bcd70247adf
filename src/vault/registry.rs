//! The devices that the vault holds and the places of their keys: followed as they change, remembered while they are
//! away. Knows devices and the keyring.

use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::{info, warn};

use super::{
    Vault,
    key::{Caller, Constraints, Grants, Identity, Place, PrivateKey},
    keyring::{Full, Keyring},
    policy::Refusal,
    unix_now,
};
use crate::{
    devices::{Device, DeviceState, FoundKey, Scan},
    public_key::{Blob, KeyType},
};

/// What a device's keys may be used for, and under what conditions.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Conditions of every key on it.
    pub constraints: Constraints,
    /// What its keys grant beyond plain signatures.
    pub grants: Grants,
}

/// A device, and the terms of its keys.
#[derive(Clone)]
pub struct Member {
    /// The device.
    pub device: Device,
    /// The terms of its keys.
    pub terms: Arc<Terms>,
}

impl Vault {
    /// Takes a device into the vault, and keeps up with it for as long as both live. `known` are its keys from an earlier
    /// run: they are listed before it has answered.
    pub fn add_device(self: &Arc<Self>, device: Device, terms: Terms, known: &[FoundKey]) {
        let member = Member { device: device.clone(), terms: Arc::new(terms) };
        self.keep(&member, known, false);
        self.write().devices.push(member.clone());
        let vault = Arc::downgrade(self);
        let mut states = device.watch();
        states.mark_changed();
        tokio::spawn(async move {
            let mut seen = None;
            while states.changed().await.is_ok() {
                let state = Arc::clone(&states.borrow_and_update());
                let Some(vault) = vault.upgrade() else { return };
                vault.follow(&member, &state, &mut seen).await;
            }
        });
    }

    /// The devices, in the order of the configuration.
    pub fn devices(&self) -> Vec<Device> {
        self.read().devices.iter().map(|member| member.device.clone()).collect()
    }

    /// The device of this name.
    pub fn device(&self, name: &str) -> Option<Device> {
        self.read().devices.iter().find(|member| member.device.name() == name).map(|member| member.device.clone())
    }

    /// The device that holds this key: the first, where there are several.
    pub fn device_of(&self, caller: &Caller, blob: &[u8]) -> Result<Device, Refusal> {
        let identity = self.find(caller, blob)?;
        let mut devices = identity.places.iter().filter_map(|place| match &place.key {
            PrivateKey::OnDevice(device, _) => Some(device.clone()),
            PrivateKey::Soft(_) | PrivateKey::Sk(_) => None,
        });
        devices.next().ok_or(Refusal::NoSuchDevice)
    }

    /// Whether the caller may know of the device: a door that shows some keys only shows the devices that hold them.
    pub fn shows_device(&self, caller: &Caller, device: &Device) -> bool {
        let holds =
            |identity: &Arc<Identity>| identity.places.iter().any(|place| place.key.device() == Some(device.name()));
        caller.keys.is_none() || self.list(caller).identities.iter().any(holds)
    }

    /// Ends all devices; completes when nothing of their drivers is left.
    pub async fn end_devices(&self) {
        let mut ending: JoinSet<()> =
            self.devices().into_iter().map(|device| async move { device.end().await }).collect();
        while ending.join_next().await.is_some() {}
    }

    /// Closes the state file, so that another process can open it.
    pub async fn close_store(&self) {
        self.store.close().await;
    }

    /// Takes over what a new scan found.
    async fn follow(&self, member: &Member, state: &DeviceState, seen: &mut Option<Arc<Scan>>) {
        let Some(scan) = &state.scan else { return };
        if seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, scan)) {
            return;
        }
        *seen = Some(Arc::clone(scan));
        self.keep(member, &scan.keys, scan.complete);
        self.remember(&member.device, scan).await;
    }

    /// Writes down what a scan found. Without that, the keys are not listed after a restart until the device answers.
    async fn remember(&self, device: &Device, scan: &Arc<Scan>) {
        if let Err(error) = self.store.remember(device.name(), device.kind(), Arc::clone(scan), unix_now()).await {
            warn!(device = device.name(), "its keys are not remembered: {error}");
        }
    }

    /// Puts the keys of a device into the keyring. Those that it had and has no more go only when `all` are here: what
    /// could not be read is not gone.
    fn keep(&self, member: &Member, keys: &[FoundKey], all: bool) {
        let name = member.device.name();
        let mut state = self.write();
        let ring = &mut state.ring;
        let mut blobs: Vec<&[u8]> = Vec::new();
        for key in keys {
            let shared = Arc::new(key.clone());
            for blob in std::iter::once(&key.blob).chain(&key.certificates) {
                blobs.push(blob);
                match put(ring, blob, member, &shared) {
                    Ok(()) => {}
                    Err(why) => warn!(device = name, slot = ?key.slot, "a key is left out: {why}"),
                }
            }
        }
        if all {
            let gone = ring
                .remove_places(|identity, place| place.key.device() == Some(name) && !blobs.contains(&&*identity.blob));
            if gone > 0 {
                info!(device = name, gone, "keys are not on the device any more");
            }
        }
    }
}

/// Puts one identity of a device into the keyring, unless it is there just so.
fn put(ring: &mut Keyring, blob: &[u8], member: &Member, key: &Arc<FoundKey>) -> Result<(), &'static str> {
    let key_type = key_type(blob)?;
    let here = |place: &&Place| place.key.device() == Some(member.device.name());
    if let Some(place) = ring.find(blob).and_then(|identity| identity.places.iter().find(here))
        && matches!(&place.key, PrivateKey::OnDevice(_, known) if *known == *key)
    {
        return Ok(());
    }
    let place = Place {
        key: PrivateKey::OnDevice(member.device.clone(), Arc::clone(key)),
        comment: key.label.replace('\0', "").into_bytes().into(),
        constraints: member.terms.constraints.clone(),
        grants: member.terms.grants,
    };
    ring.put(blob, key_type, place).map_err(|Full| "the vault is full")
}

fn key_type(blob: &[u8]) -> Result<KeyType, &'static str> {
    let blob = Blob::parse(blob)
        .map_err(|_| "its public key or certificate is malformed, or of a type that is not known here")?;
    Ok(blob.key().key_type())
}
