//! How much memory each uid's tickets may take, over all its connections. Knows uids and bytes.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// Bytes of requests and results that all tickets of one uid may take.
pub const MAX_BYTES_OF_UID: usize = 64 << 20;

/// Bytes that the tickets of each uid take.
#[derive(Debug, Default)]
pub struct Budget(Mutex<BTreeMap<u32, usize>>);

impl Budget {
    /// Takes so many bytes, unless that is more than the uid may have.
    pub fn take(&self, uid: u32, bytes: usize) -> bool {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_uid = taken.entry(uid).or_default();
        let fits = *of_uid + bytes <= MAX_BYTES_OF_UID;
        if fits {
            *of_uid += bytes;
        }
        fits
    }

    /// Gives back what was taken.
    pub fn give_back(&self, uid: u32, bytes: usize) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_uid) = taken.get_mut(&uid) {
            *of_uid = of_uid.saturating_sub(bytes);
            if *of_uid == 0 {
                taken.remove(&uid);
            }
        }
    }

    /// What a uid has taken.
    pub fn taken(&self, uid: u32) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&uid).copied().unwrap_or(0)
    }
}
