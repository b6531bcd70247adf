//! What opens the store, and how it comes to be open: a passphrase, one prompt for all who wait, the recovery key, what
//! the daemon finds at its start. Knows slots and prompts; not what a key is used for.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Notify, Semaphore, broadcast, futures::Notified};
use tracing::{info, warn};

use super::{STORE, slots};
use crate::{
    devices::{DeviceError, Open, Seal},
    sys::clock,
    vault::{
        Vault,
        guess::Guesses,
        key::{Caller, PrivateKey},
        policy::{self, Refusal},
        store::{KeySlot, MasterKey, SlotError, SlotKind, looks_like_recovery_key},
    },
};

/// How often one prompt after the other asks for the passphrase when it was wrong.
const ATTEMPTS: u32 = 3;
/// Backups and wraps that are carried in pieces at a time, over all connections.
const MAX_PARCELS: usize = 4;

/// The master key while the store is open, and who waits for it.
pub(in crate::vault) struct Access {
    /// Whoever opens a key holds it for reading: a lock waits for them, and they for nothing.
    master: RwLock<Option<MasterKey>>,
    /// An unlock under way: its outcome, for everybody who waits for it.
    unlock: Mutex<Option<Arc<Unlocking>>>,
    /// Tells whoever asks a person that nobody needs to be asked any more, and the clock that its time has begun.
    opened: Notify,
    /// Tells that clock of other settings.
    settings: Notify,
    /// Attempts at what opens it.
    guesses: Guesses,
    /// One change of what is stored at a time.
    pub(super) changes: Semaphore,
    /// When the store was opened, and when one of its keys was last used: milliseconds on the clock of lifetimes.
    since: AtomicU64,
    used: AtomicU64,
    /// What is carried out of the vault or into it in pieces, each as long as a backup may be.
    pub(super) parcels: Arc<Semaphore>,
    /// The master key under the lock password, while the vault is locked as a whole and the store was open before. Held
    /// while the master key is on its way here or back, so that a lock of the store meets it in one place.
    sealed: Mutex<Option<Box<[u8]>>>,
    /// How often the store was locked. What was begun before a lock does not open it afterwards.
    locks: AtomicU64,
}

/// Those who wait are told in the order of their waiting, so that simulations replay.
type Unlocking = broadcast::Sender<Result<(), Refusal>>;

impl Default for Access {
    fn default() -> Self {
        Self {
            master: RwLock::default(),
            unlock: Mutex::default(),
            opened: Notify::new(),
            settings: Notify::new(),
            guesses: Guesses::default(),
            changes: Semaphore::new(1),
            since: AtomicU64::new(0),
            used: AtomicU64::new(0),
            parcels: Arc::new(Semaphore::new(MAX_PARCELS)),
            sealed: Mutex::default(),
            locks: AtomicU64::new(0),
        }
    }
}

impl Access {
    fn unlocking(&self) -> MutexGuard<'_, Option<Arc<Unlocking>>> {
        self.unlock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the store is open.
    pub(in crate::vault) fn is_open(&self) -> bool {
        self.master.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Does something with the master key, quickly: a lock waits for it.
    pub(in crate::vault) fn with_master<T>(&self, work: impl FnOnce(&MasterKey) -> T) -> Result<T, Refusal> {
        let master = self.master.read().unwrap_or_else(PoisonError::into_inner);
        master.as_ref().map(work).ok_or(Refusal::StoreLocked)
    }

    fn take(&self) -> Option<MasterKey> {
        self.master.write().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn put(&self, master: MasterKey) {
        *self.master.write().unwrap_or_else(PoisonError::into_inner) = Some(master);
        self.opened.notify_waiters();
    }

    /// How often the store was locked so far: for [`put_unless_locked`](Self::put_unless_locked).
    pub(super) fn locks(&self) -> u64 {
        self.locks.load(Ordering::Relaxed)
    }

    /// Opens the store, unless it was locked since there were so many locks.
    fn put_unless_locked(&self, master: MasterKey, locks: u64) -> Result<(), Refusal> {
        let _sealed = self.sealed();
        if self.locks() != locks {
            return Err(Refusal::StoreLocked);
        }
        self.put(master);
        Ok(())
    }

    /// Takes the master key out, wherever it is. Whether there was one.
    fn lock(&self) -> bool {
        let mut sealed = self.sealed();
        self.locks.fetch_add(1, Ordering::Relaxed);
        let was_sealed = sealed.take().is_some();
        self.take().is_some() || was_sealed
    }

    fn sealed(&self) -> MutexGuard<'_, Option<Box<[u8]>>> {
        self.sealed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the master key away, sealed, until [`unseal`](Self::unseal).
    pub(in crate::vault) fn seal(&self, seal: Seal<'_>) -> Result<(), DeviceError> {
        let mut sealed = self.sealed();
        let Some(master) = self.take() else { return Ok(()) };
        *sealed = Some(seal(master.bytes())?);
        Ok(())
    }

    /// The store is open again if it was before [`seal`](Self::seal), and its time has gone on.
    pub(in crate::vault) fn unseal(&self, open: Open<'_>) -> Result<(), DeviceError> {
        let mut sealed = self.sealed();
        let Some(master) = sealed.take() else { return Ok(()) };
        if let Some(master) = MasterKey::from_bytes(&open(&master)?) {
            self.put(master);
        }
        Ok(())
    }

    /// One of its keys is used.
    pub(in crate::vault) fn note_use(&self) {
        self.used.store(milliseconds(clock::now()), Ordering::Relaxed);
    }

    /// When the store was opened, and when it was last used, on the clock of lifetimes; `None` while it is locked.
    pub(super) fn times(&self) -> Option<(Duration, Duration)> {
        let time = |of: &AtomicU64| Duration::from_millis(of.load(Ordering::Relaxed));
        self.is_open().then(|| (time(&self.since), time(&self.used)))
    }

    /// Completes when the store is opened the next time.
    pub(super) fn next_open(&self) -> Notified<'_> {
        self.opened.notified()
    }

    /// Completes when other settings are in force.
    pub(super) fn next_settings(&self) -> Notified<'_> {
        self.settings.notified()
    }

    /// Other settings are in force.
    pub(in crate::vault) fn settings_changed(&self) {
        self.settings.notify_waiters();
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Vault {
    /// Whether the store is open, so that its keys are used without a question.
    pub fn store_is_open(&self) -> bool {
        self.access.is_open()
    }

    /// Opens the store, or waits for the unlock that is under way: a hundred callers make one prompt. Dropping the future gives up; when nobody waits any
    /// more, an open prompt closes, but a passphrase that was typed is tried.
    pub(in crate::vault) async fn open_store(self: &Arc<Self>, caller: &Arc<Caller>) -> Result<(), Refusal> {
        if self.access.is_open() {
            return Ok(());
        }
        if !self.store.is_initialised() {
            return Err(Refusal::NoStore);
        }
        let mut outcome = {
            let mut unlocking = self.access.unlocking();
            match &*unlocking {
                Some(unlock) => unlock.subscribe(),
                None => {
                    let unlock = Arc::new(Unlocking::new(1));
                    let outcome = unlock.subscribe();
                    *unlocking = Some(Arc::clone(&unlock));
                    tokio::spawn(Arc::clone(self).ask_and_open(Arc::clone(caller), unlock));
                    outcome
                }
            }
        };
        outcome.recv().await.unwrap_or(Err(Refusal::Timeout))
    }

    /// Asks a person for the passphrase, a few times, and tells everybody what came of it: a task of its own, so that the
    /// one who asked first may give up while others wait.
    async fn ask_and_open(self: Arc<Self>, caller: Arc<Caller>, outcome: Arc<Unlocking>) {
        let mut opened = pin!(self.access.opened.notified());
        opened.as_mut().enable();
        let mut locks = pin!(self.locks.notified());
        caller.program();
        let mut attempt = 1;
        let result = loop {
            let question = policy::store_question(&caller, attempt > 1);
            let typed = tokio::select! {
                biased;
                () = &mut locks => break Err(self.check_open().err().unwrap_or(Refusal::Locked)),
                () = &mut opened => break Ok(()),
                typed = self.prompter.passphrase(caller.uid, &question) => typed,
                () = outcome.closed() => {
                    let mut unlocking = self.access.unlocking();
                    if outcome.receiver_count() == 0 {
                        *unlocking = None;
                        return;
                    }
                    continue;
                }
            };
            let tried = match typed {
                Ok(typed) => self.try_open(&caller, typed).await,
                Err(error) => Err(unlock_hint(error.into())),
            };
            match tried {
                Err(Refusal::WrongPassphrase) if attempt < ATTEMPTS => attempt += 1,
                tried => break tried,
            }
        };
        *self.access.unlocking() = None;
        let _ = outcome.send(result);
    }

    /// Opens the store with a passphrase, or the recovery key, that a person has just given.
    pub async fn unlock_store(self: &Arc<Self>, secret: SecretString) -> Result<(), Refusal> {
        self.check_open()?;
        let locks = self.access.locks();
        let (master, slot) = self.prove(secret).await?;
        self.opened_with(master, slot, locks)
    }

    /// The same for a prompt, with a line in the audit log for it.
    async fn try_open(self: &Arc<Self>, caller: &Caller, secret: SecretString) -> Result<(), Refusal> {
        let note = self.audit.admit(caller, "unlock")?.device(STORE);
        note.end(self.unlock_store(secret).await)
    }

    /// The store is open from now on, unless the vault was locked meanwhile, or the store since there were so many locks.
    pub(super) fn opened_with(&self, master: MasterKey, slot: u32, locks: u64) -> Result<(), Refusal> {
        let state = self.read();
        state.check_open()?;
        let now = milliseconds(clock::now());
        self.access.since.store(now, Ordering::Relaxed);
        self.access.used.store(now, Ordering::Relaxed);
        self.access.put_unless_locked(master, locks)?;
        drop(state);
        info!(slot, "the store is unlocked");
        Ok(())
    }

    /// Whether this passphrase or recovery key opens the store: the master key, and the number of the slot. Attempts take
    /// turns, each costs what Argon2id costs, and a wrong one makes itself and the next wait.
    pub(in crate::vault) async fn prove(self: &Arc<Self>, secret: SecretString) -> Result<(MasterKey, u32), Refusal> {
        let turn = self.access.guesses.turn().await?;
        // Behind those whose turn was before: what they removed opens nothing any more.
        let slots = self.key_slots().await?;
        let vault = Arc::clone(self);
        let opened = self.compute.apart("store", move || {
            let opened = open_by_hand(&slots, &secret);
            match opened {
                Ok(_) => vault.access.guesses.forgive(),
                // A slot that is damaged makes a wrong guess at another no better.
                Err(_) => {
                    let failures = vault.access.guesses.count_wrong();
                    warn!(failures, "a wrong passphrase for the store");
                }
            }
            drop(turn);
            opened
        });
        let died = || Refusal::from(DeviceError::Failed("the attempt died; try again".into()));
        let opened = opened.await.ok_or_else(died)?;
        if opened.is_err() {
            self.access.guesses.pause().await;
        }
        let opened = opened?;
        // It was locked meanwhile: nothing is done for those who asked before.
        self.check_open()?;
        Ok(opened)
    }

    /// Opens the store with a key file or a credential that is there. `false` when there is none that fits, which is no
    /// error: a person will be asked.
    pub async fn unlock_unattended(self: &Arc<Self>) -> Result<bool, Refusal> {
        let slots = match self.key_slots().await {
            Ok(slots) => slots,
            Err(Refusal::NoStore) => return Ok(false),
            Err(refusal) => return Err(refusal),
        };
        if slots.iter().all(|slot| slot.kind().is_for_people()) {
            return Ok(false);
        }
        let locks = self.access.locks();
        // Files may lie on a disk that does not answer.
        let opened = self.compute.apart("store", move || slots.iter().find_map(open_by_file));
        let Some((master, slot)) = opened.await.flatten() else { return Ok(false) };
        let note = self.audit.act("unlock").device(STORE);
        note.end(self.opened_with(master, slot, locks)).map(|()| true)
    }

    /// Locks the store: when this returns neither its master key nor one of its private keys is in memory. `false` when
    /// it was locked.
    pub fn lock_store(&self) -> bool {
        let was_open = self.access.lock();
        self.close_stored();
        if was_open {
            info!("the store is locked");
        }
        was_open
    }

    /// Wipes what is open of the stored keys.
    pub(in crate::vault) fn close_stored(&self) {
        let identities = self.read().ring.identities();
        for place in identities.iter().flat_map(|identity| &identity.places) {
            if let PrivateKey::Stored(key) = &place.key {
                key.close();
            }
        }
    }
}

/// What this passphrase or recovery key opens. Takes as long as the slots' Argon2id.
fn open_by_hand(slots: &[KeySlot], secret: &SecretString) -> Result<(MasterKey, u32), Refusal> {
    let text = secret.expose_secret();
    let is_recovery = looks_like_recovery_key(text);
    let secret = if is_recovery { text.trim() } else { text };
    let mut refusal = Refusal::WrongPassphrase;
    for slot in slots {
        let fits = match slot.kind() {
            SlotKind::Passphrase { .. } => !is_recovery,
            SlotKind::Recovery { .. } => is_recovery,
            SlotKind::KeyFile { .. } | SlotKind::Credential { .. } => false,
        };
        match fits.then(|| slot.open(secret.as_bytes())) {
            Some(Ok(master)) => return Ok((master, slot.number())),
            None | Some(Err(SlotError::Wrong | SlotError::Age(_))) => {}
            Some(Err(error)) => refusal = Refusal::Slot(error.to_string()),
        }
    }
    Err(refusal)
}

/// What a slot's file opens, where it is there.
fn open_by_file(slot: &KeySlot) -> Option<(MasterKey, u32)> {
    let contents = match slot.kind() {
        SlotKind::KeyFile { path, .. } => slots::read_key_file(path),
        SlotKind::Credential { name, .. } => slots::read_credential(name),
        SlotKind::Passphrase { .. } | SlotKind::Recovery { .. } => return None,
    };
    let opened = contents.and_then(|contents| slot.open(&contents).map_err(|error| error.to_string()));
    opened
        .map(|master| (master, slot.number()))
        .inspect_err(|why| warn!(slot = slot.number(), "it does not open the store: {why}"))
        .ok()
}

/// A person who cannot be asked is told of the other way.
fn unlock_hint(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::NoPrompt(why) => {
            Refusal::NoPrompt(format!("the store is locked; `strongroom unlock` unlocks it ({why})"))
        }
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn master() -> MasterKey {
        MasterKey::from_bytes(&[7; 32]).unwrap()
    }

    #[test]
    fn what_was_begun_before_a_lock_does_not_open_the_store_after_it() {
        let access = Access::default();
        let locks = access.locks();
        assert!(!access.lock(), "there was nothing to lock, and it counts all the same");
        assert_eq!(access.put_unless_locked(master(), locks), Err(Refusal::StoreLocked));
        assert!(!access.is_open());
        access.put_unless_locked(master(), access.locks()).unwrap();
        assert!(access.is_open() && access.lock() && !access.is_open());
    }

    #[test]
    fn a_store_that_was_locked_while_the_vault_was_stays_locked() {
        let access = Access::default();
        access.put_unless_locked(master(), access.locks()).unwrap();
        access.seal(&mut |secret: &[u8]| Ok(secret.into())).unwrap();
        assert!(access.lock());
        access.unseal(&mut |sealed: &[u8]| Ok(sealed.to_vec().into())).unwrap();
        assert!(!access.is_open());
    }
}
