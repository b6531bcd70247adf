//! The key that seals the vault while it is locked: made from the lock password, kept nowhere. Knows no identities.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use std::{
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use aws_lc_rs::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand,
};
use zeroize::{Zeroize, Zeroizing};

use crate::{devices::DeviceError, sys::memory};

/// What Argon2id costs, for whoever knows the secret and for whoever guesses at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    memory_kib: u32,
    passes: u32,
}

impl Default for Cost {
    /// About 50 ms on one core of 2023: a locked vault's memory is worth guessing at offline.
    fn default() -> Self {
        Self { memory_kib: 24 * 1024, passes: 2 }
    }
}

/// What a passphrase of the store may cost, in KiB: what a phone has, up to what a laptop spares.
const STORE_MEMORY_KIB: RangeInclusive<u32> = 64 * 1024..=1024 * 1024;
/// The same in passes.
const STORE_PASSES: RangeInclusive<u32> = 1..=1024;

impl Cost {
    /// What a passphrase of the store costs, when that is within bounds: 64 MiB to 1 GiB, up to 1024 passes.
    pub fn bounded(memory_kib: u32, passes: u32) -> Option<Self> {
        (STORE_MEMORY_KIB.contains(&memory_kib) && STORE_PASSES.contains(&passes))
            .then_some(Self { memory_kib, passes })
    }

    /// The most that takes about as long as `target` here and now, memory first: it is what guessing machines lack. At most
    /// 1/16 of the machine's. Blocks for a tenth of a second: not for a task.
    pub fn calibrated(target: Duration) -> Self {
        let least = *STORE_MEMORY_KIB.start();
        let started = Instant::now();
        let once = Self { memory_kib: least, passes: 1 };
        let tried = stretch(&[0; 32], &[0; 16], once);
        let unit = started.elapsed().max(Duration::from_millis(1));
        let units = (target.as_millis() / unit.as_millis()).clamp(1, 1 << 14) as u32;
        if tried.is_err() || units == 1 {
            return once;
        }
        let system = rustix::system::sysinfo();
        let spare = u64::from(system.mem_unit).saturating_mul(system.totalram) / 1024 / 16;
        let most = (*STORE_MEMORY_KIB.end()).min(u32::try_from(spare).unwrap_or(u32::MAX)).max(least);
        let memory = 1 << (units.min(most / least)).ilog2();
        Self { memory_kib: least * memory, passes: (units / memory).clamp(1, *STORE_PASSES.end()) }
    }

    /// In KiB.
    pub fn memory_kib(self) -> u32 {
        self.memory_kib
    }

    /// How often the memory is gone through.
    pub fn passes(self) -> u32 {
        self.passes
    }

    /// As little as there is, for simulations that lock a thousand times a second.
    pub fn least() -> Self {
        Self { memory_kib: Params::MIN_M_COST, passes: 1 }
    }
}

/// Made anew for each lock, so counted nonces never meet the same key twice.
pub struct SealKey {
    key: LessSafeKey,
    sealed: u64,
}

/// What is kept while the vault is locked: enough to tell the right password.
pub struct Lock {
    salt: [u8; 16],
    cost: Cost,
    proof: Box<[u8]>,
}

/// What the proof seals. Its secret is the key, not the words.
const PROOF: &[u8] = b"strongroom lock";

impl SealKey {
    /// Derives a key from a password. Blocks as [`stretch`] does.
    fn derive(password: &[u8], salt: &[u8; 16], cost: Cost) -> Result<Self, DeviceError> {
        let key = stretch(password, salt, cost)
            .map_err(|_| DeviceError::Failed("the lock password could not be made into a key".into()))?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &*key)
            .map_err(|_| DeviceError::Failed("the sealing key was refused".into()))?;
        Ok(Self { key: LessSafeKey::new(key), sealed: 0 })
    }

    /// Seals a secret: the nonce, then ciphertext and tag.
    pub fn seal(&mut self, secret: &[u8]) -> Result<Box<[u8]>, DeviceError> {
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&self.sealed.to_be_bytes());
        self.sealed += 1;
        let mut text = Zeroizing::new(secret.to_vec());
        let tag = self
            .key
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut text)
            .map_err(|_| DeviceError::Failed("the key could not be sealed".into()))?;
        Ok([&nonce[..], &text, tag.as_ref()].concat().into_boxed_slice())
    }

    /// Undoes [`SealKey::seal`].
    pub fn open(&self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let damaged = || DeviceError::Failed("a sealed key does not open".into());
        let (nonce, text) = sealed.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let mut text = Zeroizing::new(text.to_vec());
        let len = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::empty(), &mut text)
            .map_err(|_| damaged())?
            .len();
        text.truncate(len);
        Ok(text)
    }
}

/// Argon2id of a secret that can be guessed, so that each guess costs as much: by default some 50 ms and 24 MiB. Never
/// where something else waits.
pub(super) fn stretch(secret: &[u8], salt: &[u8; 16], cost: Cost) -> Result<Zeroizing<[u8; 32]>, argon2::Error> {
    let params = Params::new(cost.memory_kib, cost.passes, 1, Some(32))?;
    let mut key = Zeroizing::new([0; 32]);
    // The key is a hash of the last block, so the blocks are as secret as the key. Each attempt gives them back.
    memory::return_large_blocks();
    let mut blocks = Vec::new();
    blocks.try_reserve_exact(params.block_count()).map_err(|_| argon2::Error::MemoryTooMuch)?;
    blocks.resize(params.block_count(), Block::default());
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hashed = argon2.hash_password_into_with_memory(secret, salt, &mut *key, &mut blocks);
    blocks.zeroize();
    hashed.map(|()| key)
}

impl Lock {
    /// A new lock and the key to seal with. Blocks as [`SealKey`] does.
    pub fn new(password: &[u8], cost: Cost) -> Result<(Self, SealKey), DeviceError> {
        let mut salt = [0; 16];
        rand::fill(&mut salt).map_err(|_| DeviceError::Failed("the system gives no random numbers".into()))?;
        let mut key = SealKey::derive(password, &salt, cost)?;
        let proof = key.seal(PROOF)?;
        Ok((Self { salt, cost, proof }, key))
    }

    /// The key again, when the password is the right one. Blocks as [`SealKey`] does.
    pub fn open(&self, password: &[u8]) -> Result<Option<SealKey>, DeviceError> {
        let key = SealKey::derive(password, &self.salt, self.cost)?;
        Ok(key.open(&self.proof).is_ok().then_some(key))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_calibrated_cost_is_within_bounds_and_grows_with_the_time() {
        let [short, long] = [1, 400].map(|ms| Cost::calibrated(Duration::from_millis(ms)));
        for cost in [short, long] {
            assert_eq!(Cost::bounded(cost.memory_kib, cost.passes), Some(cost));
        }
        assert_eq!((short.memory_kib, short.passes), (64 * 1024, 1));
    }

    #[test]
    fn only_the_password_opens_what_it_sealed() {
        let (lock, mut key) = Lock::new(b"right", Cost::default()).unwrap();
        let (one, two) = (key.seal(b"one").unwrap(), key.seal(b"one").unwrap());
        assert_ne!(one, two);
        assert!(lock.open(b"wrong").unwrap().is_none());
        let again = lock.open(b"right").unwrap().unwrap();
        assert_eq!(**again.open(&one).unwrap(), *b"one");
        let mut damaged = two;
        *damaged.last_mut().unwrap() ^= 1;
        assert!(again.open(&damaged).is_err());
        assert!(again.open(&[]).is_err());
    }
}
