//! The devices that the vault holds and the places of their keys: followed as they change, remembered while they are
//! away. Knows devices and the keyring.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use thiserror::Error;
use tokio::{sync::Semaphore, task::JoinHandle};
use tracing::{info, warn};

use super::{
    State, Vault,
    key::{Caller, Constraints, Grants, Identity, Place, PrivateKey},
    keyring::{Full, Keyring},
    policy::Refusal,
    unix_now,
};
use crate::{
    devices::{Device, DeviceError, FoundKey, Health, Scan, Slot, pkcs11::TokenUri},
    public_key::{Blob, KeyType},
};

/// The most devices in a vault.
pub const MAX_DEVICES: usize = 1024;

/// What a device's keys may be used for, and under what conditions.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Conditions of every key on it.
    pub constraints: Constraints,
    /// What its keys grant beyond plain signatures.
    pub grants: Grants,
    /// The module and the token that it is, where `ssh-add -s` could name them, too.
    pub token: Option<(PathBuf, TokenUri)>,
}

/// Why a device was not taken into the vault.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum NotAdded {
    /// Another device has its name: give it another.
    #[error("another device has this name already")]
    NameTaken,
    /// There are [`MAX_DEVICES`]: take one out first.
    #[error("the vault holds {MAX_DEVICES} devices and takes no more")]
    TooMany,
}

/// A device in the vault.
pub(super) struct Member {
    pub(super) device: Device,
    pub(super) origin: Origin,
    /// Its number among the devices, from 1 on: in this order they are asked for a key that several have.
    pub(super) rank: usize,
    /// Keeps up with the device, and ends with it.
    follower: JoinHandle<()>,
    taken: Arc<Taken>,
}

/// The scan of a device that was taken over last. One is taken over at a time, in the order in which they came.
pub(super) struct Taken {
    turn: Semaphore,
    scan: Mutex<Option<Arc<Scan>>>,
}

/// How a device came.
pub(super) enum Origin {
    /// By the configuration: all of its keys are here, on the same terms, and are remembered.
    Configured(Terms),
    /// By `ssh-add -s` with this library: the keys that were added so are here, each on its own terms, and the device goes
    /// with the last of them. And which of its tokens it is.
    Loaded(Arc<str>, TokenUri),
}

impl Vault {
    /// Takes a device into the vault, behind those that are there, and keeps up with it for as long as it stays. `known`
    /// are its keys from an earlier run: they are listed before it has answered.
    ///
    /// A device that is not taken is ended.
    pub fn add_device(self: &Arc<Self>, device: Device, terms: Terms, known: &[FoundKey]) -> Result<(), NotAdded> {
        let mut state = self.write();
        let added = self.insert(&mut state, &device, Origin::Configured(terms));
        drop(state);
        match added {
            Ok(_) => self.keep(&device, known, false),
            Err(_) => device.begin_end(DeviceError::Gone),
        }
        added.map(drop)
    }

    /// Puts a device among the others, and starts to follow it; returns its rank.
    pub(super) fn insert(
        self: &Arc<Self>,
        state: &mut State,
        device: &Device,
        origin: Origin,
    ) -> Result<usize, NotAdded> {
        if state.devices.iter().any(|member| member.device.name() == device.name()) {
            return Err(NotAdded::NameTaken);
        }
        if state.devices.len() >= MAX_DEVICES {
            return Err(NotAdded::TooMany);
        }
        let rank = state.devices.iter().map(|member| member.rank).max().unwrap_or(0) + 1;
        let follower = tokio::spawn(follow(Arc::downgrade(self), device.clone()));
        let taken = Arc::new(Taken { turn: Semaphore::new(1), scan: Mutex::default() });
        state.devices.push(Member { device: device.clone(), origin, rank, follower, taken });
        Ok(rank)
    }

    /// Takes a device out of the vault: its keys are listed no more in this place, requests to it are refused, and nothing
    /// of its driver is left when this completes. `forget` also drops what is remembered of it for the next start; the PINs
    /// that it refused stay known.
    pub async fn remove_device(&self, device: &Device, forget: bool) {
        let Some(member) = self.take_out(device) else { return };
        member.device.ended().await;
        // It may be writing down what it saw last.
        let _ = member.follower.await;
        if forget && let Err(error) = self.store.forget_device(device.name()).await {
            warn!(device = device.name(), "it is still remembered: {error}");
        }
    }

    fn take_out(&self, device: &Device) -> Option<Member> {
        let member = {
            let mut state = self.write();
            let at = state.devices.iter().position(|member| member.device.is(device))?;
            state.ring.remove_places(|_, place| place.key.device() == Some(device.name()));
            state.devices.remove(at)
        };
        member.end();
        self.drop_pins_of(device);
        info!(device = device.name(), "taken out of the vault");
        Some(member)
    }

    /// Ends the devices that came by `ssh-add -s` and have no key left here. Called when keys were removed.
    pub(super) fn end_unused(&self) {
        let unused: Vec<Member> = {
            let mut state = self.write();
            let State { ring, devices, .. } = &mut *state;
            if !devices.iter().any(Member::is_loaded) {
                return;
            }
            let places = ring.iter().flat_map(|identity| &identity.places);
            let used: BTreeSet<&str> = places.filter_map(|place| place.key.device()).collect();
            devices.extract_if(.., |member| member.is_loaded() && !used.contains(member.device.name())).collect()
        };
        for member in unused {
            member.end();
            self.drop_pins_of(&member.device);
            info!(device = member.device.name(), "ended: the last of its keys was removed");
        }
    }

    /// Has the devices asked in this order for a key that several have; others come behind these, as they were.
    pub fn order_devices(&self, names: &[&str]) {
        let mut state = self.write();
        let State { ring, devices, .. } = &mut *state;
        let place = |member: &Member| names.iter().position(|name| *name == member.device.name());
        devices.sort_by_key(|member| (place(member).unwrap_or(usize::MAX), member.rank));
        for (n, member) in devices.iter_mut().enumerate() {
            member.rank = n + 1;
        }
        ring.rank(|name| devices.iter().find(|member| member.device.name() == name).map(|member| member.rank));
    }

    /// The devices, in the order of the configuration; those that came by `ssh-add -s` behind them.
    pub fn devices(&self) -> Vec<Device> {
        self.read().devices.iter().map(|member| member.device.clone()).collect()
    }

    /// The device of this name.
    pub fn device(&self, name: &str) -> Option<Device> {
        self.read().devices.iter().find(|member| member.device.name() == name).map(|member| member.device.clone())
    }

    /// The device that holds this key: the first, where there are several.
    pub fn device_of(&self, caller: &Caller, blob: &[u8]) -> Result<Device, Refusal> {
        let identity = self.find_key(caller, blob)?;
        let mut devices = identity.places.iter().filter_map(|place| match &place.key {
            PrivateKey::OnDevice(device, _) => Some(device.clone()),
            PrivateKey::Soft(_) | PrivateKey::Sk(_) | PrivateKey::Stored(_) => None,
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
        let devices = self.devices();
        for device in &devices {
            device.begin_end(DeviceError::Failed("the vault is shutting down".to_owned()));
        }
        for device in &devices {
            device.ended().await;
        }
    }

    /// Whether what is learned here outlives the process.
    pub fn keeps_state(&self) -> bool {
        self.store.is_durable()
    }

    /// Whether no PIN is on its way to a device.
    pub fn have_pins_arrived(&self) -> bool {
        self.store.have_pins_arrived()
    }

    /// Completes when the devices have answered to each PIN that is on its way, and the state file has the answers. A PIN
    /// whose answer nobody waits for is not sent by itself again.
    pub async fn pins_have_arrived(&self) {
        self.store.pins_have_arrived().await;
    }

    /// Closes the state file, so that another process can open it.
    pub async fn close_store(&self) {
        self.store.close().await;
    }

    /// Takes over what the device's last scan found, if that has not been done. When this completes, the keyring and the
    /// state file are as the device was when this was called, or later.
    pub(super) async fn catch_up(&self, device: &Device) {
        let member = |state: &State| {
            let member = state.devices.iter().find(|member| member.device.is(device));
            member.map(|member| Arc::clone(&member.taken))
        };
        let Some(taken) = member(&self.read()) else { return };
        let Ok(_turn) = taken.turn.acquire().await else { return };
        let last = || taken.scan.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(scan) = device.state().scan.clone() else { return };
        if last().as_ref().is_some_and(|last| Arc::ptr_eq(last, &scan)) {
            return;
        }
        self.take_over(device, &scan).await;
        *last() = Some(scan);
    }

    /// Drops one key's place on a device, here and in the state file: it was deleted there.
    pub(super) async fn forget_key(&self, device: &Device, slot: &Slot) {
        let on = |place: &Place| matches!(&place.key, PrivateKey::OnDevice(other, key) if other.is(device) && key.slot == *slot);
        self.write().ring.remove_places(|_, place| on(place));
        self.end_unused();
        if let Err(error) = self.store.forget_key(device.name(), slot).await {
            warn!(device = device.name(), "a deleted key is still remembered: {error}");
        }
    }

    /// What the configuration grants the keys of a device; `None` for one that came by `ssh-add -s`.
    pub(super) fn terms_of(&self, device: &Device) -> Option<Grants> {
        let state = self.read();
        match &state.devices.iter().find(|member| member.device.is(device))?.origin {
            Origin::Configured(terms) => Some(terms.grants),
            Origin::Loaded(..) => None,
        }
    }

    /// Takes over what a scan found.
    async fn take_over(&self, device: &Device, scan: &Arc<Scan>) {
        self.keep(device, &scan.keys, scan.complete);
        let is_configured = |member: &Member| member.device.is(device) && !member.is_loaded();
        if self.read().devices.iter().any(is_configured)
            && let Err(error) = self.store.remember(device.name(), device.kind(), Arc::clone(scan), unix_now()).await
        {
            // Without that, its keys are not listed after a restart until it answers.
            warn!(device = device.name(), "its keys are not remembered: {error}");
        }
    }

    /// Puts the keys of a device into the keyring, or what is new of those that were added. Those that it had and has no
    /// more go only when `all` are here: what could not be read is not gone.
    fn keep(&self, device: &Device, keys: &[FoundKey], all: bool) {
        {
            let mut state = self.write();
            let State { ring, devices, .. } = &mut *state;
            // It may have been taken out meanwhile.
            let Some(member) = devices.iter().find(|member| member.device.is(device)) else { return };
            let gone = match &member.origin {
                Origin::Configured(terms) => keep_all(ring, device, member.rank, terms, keys, all),
                Origin::Loaded(..) => keep_added(ring, device, keys, all),
            };
            if gone > 0 {
                info!(device = device.name(), gone, "keys are not on the device any more");
            }
        }
        self.end_unused();
    }
}

impl Member {
    pub(super) fn is_loaded(&self) -> bool {
        matches!(self.origin, Origin::Loaded(..))
    }

    fn end(&self) {
        self.device.begin_end(DeviceError::Gone);
    }
}

/// Keeps up with a device until it has ended.
async fn follow(vault: Weak<Vault>, device: Device) {
    let mut states = device.watch();
    states.mark_changed();
    loop {
        tokio::select! {
            biased;
            Ok(()) = states.changed() => {}
            () = device.ended() => return,
        }
        let absent = states.borrow_and_update().health == Health::Absent;
        let Some(vault) = vault.upgrade() else { return };
        if absent {
            vault.forget_absent(&device);
        }
        vault.catch_up(&device).await;
    }
}

/// Puts all keys of a configured device into the keyring; returns how many are gone.
fn keep_all(ring: &mut Keyring, device: &Device, rank: usize, terms: &Terms, keys: &[FoundKey], all: bool) -> usize {
    let name = device.name();
    let mut blobs: HashSet<&[u8]> = HashSet::new();
    for key in keys {
        let shared = Arc::new(key.clone());
        // What was allowed stays allowed, and no certificate that comes later is allowed more.
        let here = |place: &&Place| place.key.device() == Some(name);
        let known = ring.find(&key.blob).and_then(|identity| identity.places.iter().find(here));
        let (grants, given) = known.map_or((terms.grants, "".into()), |place| (place.grants, place.name.clone()));
        let place = || Place {
            key: PrivateKey::OnDevice(device.clone(), Arc::clone(&shared)),
            comment: comment(key),
            constraints: terms.constraints.clone(),
            grants,
            rank,
            added: false,
            name: given.clone(),
        };
        for blob in std::iter::once(&key.blob).chain(&key.certificates) {
            blobs.insert(blob);
            if let Err(why) = put(ring, blob, device, key, place) {
                warn!(device = name, slot = ?key.slot, "a key is left out: {why}");
            }
        }
    }
    if !all {
        return 0;
    }
    ring.remove_places(|identity, place| place.key.device() == Some(name) && !blobs.contains(&*identity.blob))
}

/// Puts what is new of the keys that came by `ssh-add -s` into the keyring; returns how many are gone.
fn keep_added(ring: &mut Keyring, device: &Device, keys: &[FoundKey], all: bool) -> usize {
    let name = device.name();
    let keys: HashMap<&[u8], &FoundKey> = keys.iter().map(|key| (&*key.blob, key)).collect();
    // A certificate that came with them is on no token: its key is.
    let found = |identity: &Identity| {
        let plain = Blob::parse(&identity.blob).ok()?.key().to_blob();
        keys.get(&*plain).copied()
    };
    for identity in ring.identities() {
        let here = identity.places.iter().find(|place| place.key.device() == Some(name));
        if let (Some(place), Some(key)) = (here, found(&identity)) {
            let key = Arc::new(key.clone());
            let place = || Place { key: PrivateKey::OnDevice(device.clone(), Arc::clone(&key)), ..place.clone() };
            if let Err(why) = put(ring, &identity.blob, device, &key, place) {
                warn!(device = name, slot = ?key.slot, "a key stays as it was: {why}");
            }
        }
    }
    if !all {
        return 0;
    }
    ring.remove_places(|identity, place| place.key.device() == Some(name) && found(identity).is_none())
}

/// A key's label as the comment of its identities.
pub(super) fn comment(key: &FoundKey) -> Box<[u8]> {
    key.label.replace('\0', "").into_bytes().into()
}

/// Puts one identity of a device into the keyring, unless it is there just so.
fn put(
    ring: &mut Keyring,
    blob: &[u8],
    device: &Device,
    key: &FoundKey,
    place: impl FnOnce() -> Place,
) -> Result<(), &'static str> {
    let key_type = key_type(blob)?;
    let here = |place: &&Place| place.key.device() == Some(device.name());
    if let Some(place) = ring.find(blob).and_then(|identity| identity.places.iter().find(here))
        && matches!(&place.key, PrivateKey::OnDevice(_, known) if **known == *key)
    {
        return Ok(());
    }
    ring.put(blob, key_type, place()).map_err(|Full| "the vault is full")
}

fn key_type(blob: &[u8]) -> Result<KeyType, &'static str> {
    let blob = Blob::parse(blob)
        .map_err(|_| "its public key or certificate is malformed, or of a type that is not known here")?;
    Ok(blob.key().key_type())
}
