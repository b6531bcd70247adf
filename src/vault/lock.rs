//! Locking the vault as a whole (`ssh-add -x`) and unlocking it. Knows the keyring and the seal.

use std::sync::Arc;

use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::{
    Seal, Vault, in_memory,
    key::{Caller, Identity, PrivateKey},
    policy::{self, Refusal},
    seal::{Lock, SealKey},
};
use crate::devices::DeviceError;

impl Vault {
    /// Locks: from the first moment nothing is signed and open prompts close; when it returns, no plaintext key is in
    /// memory.
    pub async fn lock(self: Arc<Self>, caller: Arc<Caller>, password: Zeroizing<Vec<u8>>) -> Result<(), Refusal> {
        let note = self.audit.note(&caller, "lock");
        if let Err(refusal) = self.begin_lock(&caller, &password) {
            return note.end(Err(refusal));
        }
        self.locks.notify_waiters();
        self.forget_pins();
        // A task of its own: a caller that hangs up does not leave the vault half locked.
        let vault = Arc::clone(&self);
        let done = vault.compute.apart("lock", move || {
            let sealed = Lock::new(&password, self.lock_cost).and_then(|(lock, key)| self.seal_all(key).map(|()| lock));
            let mut state = self.write();
            note.end(match sealed {
                Ok(lock) => {
                    state.seal = Seal::Sealed(Arc::new(lock));
                    self.unlocks.forgive();
                    info!("locked");
                    Ok(())
                }
                Err(e) => {
                    // What is sealed already cannot be opened again: it is removed rather than kept for nothing.
                    warn!("locking failed, all keys are removed: {e}");
                    state.ring.remove_places(|_, place| in_memory(place));
                    state.seal = Seal::Open;
                    Err(Refusal::from(e))
                }
            })
        });
        done.await.unwrap_or_else(|| Err(vault.give_up()))
    }

    fn begin_lock(&self, caller: &Caller, password: &[u8]) -> Result<(), Refusal> {
        if !policy::may_lock(caller) {
            return Err(Refusal::NotForForwarded);
        }
        if password.is_empty() {
            return Err(Refusal::EmptyPassword);
        }
        let mut state = self.write();
        state.check_open()?;
        state.seal = Seal::Changing;
        Ok(())
    }

    /// After a lock or unlock that died half-way: which keys are sealed under what is not known any more.
    fn give_up(&self) -> Refusal {
        let mut state = self.write();
        state.ring.remove_places(|_, place| in_memory(place));
        state.seal = Seal::Open;
        error!("a lock or unlock died half-way; all keys are removed");
        Refusal::Device(DeviceError::Failed("the lock died half-way; add the keys again".into()))
    }

    /// The private keys in memory.
    fn memory(&self) -> Vec<(Arc<Identity>, PrivateKey)> {
        let identities = self.read().ring.identities();
        let keys = |identity: Arc<Identity>| {
            let keys: Vec<_> = identity.places.iter().map(|place| place.key.clone()).collect();
            keys.into_iter().map(move |key| (Arc::clone(&identity), key))
        };
        identities.into_iter().flat_map(keys).collect()
    }

    fn seal_all(&self, mut key: SealKey) -> Result<(), DeviceError> {
        let mut seal = |secret: &[u8]| key.seal(secret);
        for (_, key) in self.memory() {
            match key {
                PrivateKey::Soft(soft) => soft.seal(&mut seal)?,
                PrivateKey::Sk(sk) => sk.seal(&mut seal)?,
                PrivateKey::OnDevice(..) | PrivateKey::Stored(_) => {}
            }
        }
        // Stored keys are sealed as they are, once nothing opens them any more.
        let sealed = self.access.seal(&mut seal);
        self.close_stored();
        sealed
    }

    /// Unlocks. Attempts take turns, and a wrong one makes itself and the next wait; nothing else does.
    pub async fn unlock(self: Arc<Self>, caller: Arc<Caller>, password: Zeroizing<Vec<u8>>) -> Result<(), Refusal> {
        let note = self.audit.admit(&caller, "unlock")?;
        if !policy::may_lock(&caller) {
            return note.end(Err(Refusal::NotForForwarded));
        }
        let turn = match self.unlocks.turn().await {
            Ok(turn) => turn,
            Err(refusal) => return note.end(Err(refusal)),
        };
        let vault = Arc::clone(&self);
        let opened = self.compute.apart("unlock", move || {
            let result = note.end(vault.try_unlock(&password));
            drop(turn);
            result
        });
        match opened.await.unwrap_or_else(|| Err(self.give_up())) {
            Err(Refusal::WrongPassword) => {
                self.unlocks.pause().await;
                Err(Refusal::WrongPassword)
            }
            result => result,
        }
    }

    fn try_unlock(&self, password: &[u8]) -> Result<(), Refusal> {
        let lock = match &self.read().seal {
            Seal::Sealed(lock) => Arc::clone(lock),
            _ => return Err(Refusal::NotLocked),
        };
        let Some(key) = lock.open(password)? else {
            let failures = self.unlocks.count_wrong();
            warn!(failures, "a wrong unlock password");
            return Err(Refusal::WrongPassword);
        };
        self.write().seal = Seal::Changing;
        for (identity, private) in self.memory() {
            let mut open = |sealed: &[u8]| key.open(sealed);
            let opened = match &private {
                PrivateKey::Soft(soft) => soft.unseal(&mut open),
                PrivateKey::Sk(sk) => sk.unseal(&mut open),
                PrivateKey::OnDevice(..) | PrivateKey::Stored(_) => Ok(()),
            };
            if let Err(e) = opened {
                warn!(key = %identity.name(), "the key did not survive the lock and is removed: {e}");
                self.write().ring.remove_places_of(&identity.blob, in_memory);
            }
        }
        if let Err(e) = self.access.unseal(&mut |sealed: &[u8]| key.open(sealed)) {
            warn!("the store did not survive the lock, and is locked: {e}");
        }
        let mut state = self.write();
        state.seal = Seal::Open;
        self.unlocks.forgive();
        info!("unlocked");
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::{
        prompt::Prompter,
        vault::{Parts, Settings, store::Store},
    };

    fn vault() -> Arc<Vault> {
        let prompter = Prompter::new(crate::prompt::Settings::default());
        Vault::new(Settings::default(), Parts::new(prompter, Store::in_memory().unwrap()))
    }

    fn password(text: &str) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(text.into())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_hangs_up_gets_no_second_try_beside_the_first() {
        let (vault, caller) = (vault(), Arc::new(Caller::default()));
        Arc::clone(&vault).lock(Arc::clone(&caller), password("right")).await.unwrap();
        let attempt = tokio::spawn(Arc::clone(&vault).unlock(Arc::clone(&caller), password("wrong")));
        // It has its turn, or has had it already.
        let begins = async {
            while vault.unlocks.free().available_permits() > 0 && vault.unlocks.count().0 == 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(60), begins).await.unwrap();
        attempt.abort();
        // The turn comes when the attempt is over and counted, not when its caller has gone.
        let turn = timeout(Duration::from_secs(60), vault.unlocks.free().acquire()).await.unwrap().unwrap();
        assert_eq!(vault.unlocks.count(), (1, true));
        drop(turn);
        assert_eq!(Arc::clone(&vault).unlock(caller, password("right")).await, Ok(()));
    }
}
