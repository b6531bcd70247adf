//! Keys of the encrypted store in the vault: listed while the store is locked, opened one by one when they are used, closed
//! again when it is locked. Knows keys and the keyring; not what opens the store.

mod access;
mod auto_lock;
mod carry;
mod change;
mod life;
mod slots;

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use tracing::warn;

pub(super) use access::Access;
pub use auto_lock::AutoLock;
pub use carry::{Packed, TakenIn};
pub use change::{ExportForm, KeyChange};
pub use life::{Brought, NewStored};
pub use slots::{AddSlot, StoreState, StoreView};

use super::{
    Vault,
    key::{Caller, Constraints, Place, PrivateKey},
    keyring::{Full, Keyring},
    policy::Refusal,
    store::{KeyId, MasterKey, Metadata, SealedKey},
    unix_now,
};
use crate::{
    devices::{DeviceError, Operation, Outcome, Scheme, Signature, soft::SoftKey},
    public_key::{Blob, KeyType},
    sys::clock,
};

/// What the encrypted store is called where a device's name stands.
pub const STORE: &str = "store";

/// Seconds since 1970 at which a certificate that never expires does.
const FOREVER: u64 = u64::MAX;

/// A key of the store. Its private half is in memory as the file has it, sealed; it is opened when it is first used, and
/// dropped when the store is locked. Of ten thousand keys only those in use are parsed.
pub struct StoredKey {
    sealed: SealedKey,
    key_type: KeyType,
    /// Shared with what the key was before it was described anew, so that a lock finds it.
    open: Arc<RwLock<Option<Box<SoftKey>>>>,
}

impl fmt::Debug for StoredKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredKey({:?})", self.sealed.id())
    }
}

impl StoredKey {
    /// A key as the file has it; with the reason for a person where it is none that this version knows.
    pub fn new(sealed: SealedKey) -> Result<Self, String> {
        let key_type = match Blob::parse(&sealed.metadata().blob) {
            // Both forms have the same public half; the expanded one is longer.
            Ok(Blob::Key(key)) if key.key_type() == KeyType::Ed25519 && sealed.secret_len() == 64 => {
                KeyType::Ed25519Expanded
            }
            Ok(Blob::Key(key)) => key.key_type(),
            Ok(Blob::Certificate(_)) => return Err("it is named by a certificate".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        Ok(Self { sealed, key_type, open: Arc::default() })
    }

    /// The same key, described anew.
    fn described(&self, sealed: SealedKey) -> Self {
        Self { sealed, key_type: self.key_type, open: Arc::clone(&self.open) }
    }

    /// What it is known by.
    pub fn id(&self) -> KeyId {
        self.sealed.id()
    }

    /// Its type.
    pub fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// What is known of it while the store is locked.
    pub fn metadata(&self) -> &Metadata {
        self.sealed.metadata()
    }

    /// What it takes in memory beside its blobs, in bytes.
    pub(super) fn held(&self) -> usize {
        self.metadata().blob.len() + self.sealed.secret_len() + self.metadata().comment.len()
    }

    /// Does what the key's type claims, as [`SoftKey::operate`] does; `None` when it must be opened first.
    pub(super) fn operate(&self, operation: &Operation<'_>) -> Option<Result<Outcome, DeviceError>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|key| key.operate(operation))
    }

    /// Signs, as [`SoftKey::sign`] does; `None` when it must be opened first.
    pub(super) fn sign(&self, scheme: Scheme, data: &[u8]) -> Option<Result<Signature, DeviceError>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(|key| key.sign(scheme, data))
    }

    /// Opens it, unless it is open. Takes some hundred microseconds for RSA and ML-DSA.
    pub(super) fn open(&self, master: &MasterKey) -> Result<(), DeviceError> {
        if self.open.read().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let secret = master.open_key(&self.sealed).map_err(|error| DeviceError::Failed(error.to_string()))?;
        let key = Box::new(SoftKey::from_secret(self.key_type, &secret)?);
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = Some(key);
        Ok(())
    }

    /// Wipes what is open of it, when the uses under way are done.
    fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Vault {
    /// Lists the keys that the state file holds. Nothing is opened.
    pub fn hold_stored(&self, keys: Vec<SealedKey>) {
        let mut state = self.write();
        for sealed in keys {
            let id = sealed.id();
            let key = StoredKey::new(sealed).map(Arc::new).and_then(|key| {
                let room = check_room(&state.ring, [&key]).map_err(|Full| "the vault is full".to_owned());
                room.map(|()| key)
            });
            match key {
                Ok(key) => put(&mut state.ring, &key),
                Err(why) => {
                    warn!(key = ?id, "a stored key is left out: {why}");
                    state.unlisted.push(id);
                }
            }
        }
        drop(state);
        self.lifetimes.notify_one();
    }

    /// Whether this is a key of the store that is on no device.
    pub fn is_stored_only(&self, caller: &Caller, blob: &[u8]) -> bool {
        let Ok(identity) = self.find(caller, blob) else { return false };
        let on_device = |place: &Place| matches!(place.key, PrivateKey::OnDevice(..));
        let stored = |place: &Place| matches!(place.key, PrivateKey::Stored(_));
        identity.places.iter().any(stored) && !identity.places.iter().any(on_device)
    }

    /// Whether these can be listed once they are written.
    fn check_room<'a>(&self, keys: impl IntoIterator<Item = &'a Arc<StoredKey>>) -> Result<(), Refusal> {
        check_room(&self.read().ring, keys).map_err(|Full| Refusal::Full)
    }

    /// The stored key with this plain blob.
    pub(super) fn stored(&self, plain: &[u8]) -> Option<Arc<StoredKey>> {
        let state = self.read();
        state.ring.find(plain)?.places.iter().find_map(|place| match &place.key {
            PrivateKey::Stored(key) => Some(Arc::clone(key)),
            _ => None,
        })
    }
}

/// Whether the keyring has room for these and their certificates. Asked before they are written, since what is on the disk
/// is listed.
fn check_room<'a>(ring: &Keyring, keys: impl IntoIterator<Item = &'a Arc<StoredKey>>) -> Result<(), Full> {
    ring.check_room(keys.into_iter().flat_map(identities).map(|(blob, _, place)| (blob, place)))
}

/// Puts a key and its certificates into the keyring, which has room for them: behind those that are there, or in place of
/// the same.
fn put(ring: &mut Keyring, key: &Arc<StoredKey>) {
    for (blob, key_type, place) in identities(key) {
        if !ring.set_place(&blob, &place) {
            ring.put_checked(&blob, key_type, place);
        }
    }
}

/// Takes a key and its certificates out of the keyring.
fn take_out(ring: &mut Keyring, key: &StoredKey) {
    let metadata = key.metadata();
    for blob in std::iter::once(&metadata.blob).chain(&metadata.certificates) {
        ring.remove_places_of(blob, |place| matches!(place.key, PrivateKey::Stored(_)));
    }
}

/// What ssh is offered of a key: the key itself, and with each certificate that has not expired.
fn identities(key: &Arc<StoredKey>) -> Vec<(Box<[u8]>, KeyType, Place)> {
    let (metadata, now) = (key.metadata(), unix_now());
    let place = |until: Option<u64>| Place {
        key: PrivateKey::Stored(Arc::clone(key)),
        comment: metadata.comment.clone(),
        constraints: Constraints {
            expires: until.and_then(|until| on_boot_clock(until, now)),
            confirm: metadata.confirm,
            destinations: metadata.destinations.clone(),
            disabled: !metadata.enabled || metadata.expires.is_some_and(|at| at <= now),
            not_after: metadata.expires,
        },
        grants: metadata.grants,
        rank: 0,
        added: false,
        name: metadata.name.clone(),
    };
    let to_come = |at: &u64| *at > now;
    let mut all = vec![(metadata.blob.clone(), key.key_type, place(metadata.expires.filter(to_come)))];
    for blob in &metadata.certificates {
        let Ok(Blob::Certificate(certificate)) = Blob::parse(blob) else { continue };
        if to_come(&certificate.valid_before) {
            let until = Some(certificate.valid_before).filter(|at| *at != FOREVER);
            all.push((blob.clone(), certificate.key.key_type(), place(until)));
        }
    }
    all
}

/// A time on the clock that lifetimes run on.
fn on_boot_clock(at: u64, now: u64) -> Option<Duration> {
    clock::now().checked_add(Duration::from_secs(at.saturating_sub(now)))
}
