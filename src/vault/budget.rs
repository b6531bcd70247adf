//! How much of something each uid may take, over all its connections. Knows uids and amounts.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Bytes of requests and results that all tickets of one uid may take.
pub const MAX_BYTES_OF_UID: usize = 64 << 20;

/// What each uid has taken, and the most that one may have.
#[derive(Debug)]
pub struct Budget {
    most: usize,
    taken: Mutex<BTreeMap<u32, usize>>,
}

impl Default for Budget {
    /// For the bytes of tickets.
    fn default() -> Self {
        Self::new(MAX_BYTES_OF_UID)
    }
}

impl Budget {
    /// Nothing is taken yet, and each uid may take so much.
    pub fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// Takes so much, unless the uid would then have more than it may.
    pub fn take(&self, uid: u32, amount: usize) -> bool {
        let mut taken = self.all();
        let of_uid = taken.get(&uid).copied().unwrap_or(0).saturating_add(amount);
        let fits = of_uid <= self.most;
        if fits {
            taken.insert(uid, of_uid);
        }
        fits
    }

    /// Gives back what was taken.
    pub fn give_back(&self, uid: u32, amount: usize) {
        let mut taken = self.all();
        if let Some(of_uid) = taken.get_mut(&uid) {
            *of_uid = of_uid.saturating_sub(amount);
            if *of_uid == 0 {
                taken.remove(&uid);
            }
        }
    }

    /// What a uid has taken.
    pub fn taken(&self, uid: u32) -> usize {
        self.all().get(&uid).copied().unwrap_or(0)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
