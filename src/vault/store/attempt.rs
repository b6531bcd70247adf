//! PINs on their way to tokens: one at a time for each token, and a mark for each that stays unless the token says that the
//! PIN is right. Knows serials and marks; sends nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use secrecy::SecretString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    MarkError, Store, StoreError,
    marks::{self, Digest},
    record::MarkState,
};

/// How many PINs may be on their way at a time.
const MAX_ON_THEIR_WAY: u32 = 65_536;

/// The PINs that are on their way now.
pub(super) struct OnTheirWay {
    /// A place for each.
    places: Arc<Semaphore>,
    /// By serial, who is next: two devices may have one token, and its tries.
    turns: Mutex<HashMap<String, Weak<Semaphore>>>,
}

impl Default for OnTheirWay {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_ON_THEIR_WAY as usize)), turns: Mutex::default() }
    }
}

impl OnTheirWay {
    fn turns_at(&self, serial: &str) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turns) = turns.get(serial).and_then(Weak::upgrade) {
            return turns;
        }
        turns.retain(|_, turns| turns.strong_count() > 0);
        let own = Arc::new(Semaphore::new(1));
        turns.insert(serial.to_owned(), Arc::downgrade(&own));
        own
    }
}

/// The right to send a PIN to a token. Whoever waits for it next has it when it, or the [`Attempt`] made of it, is dropped.
pub struct PinTurn {
    store: Store,
    serial: String,
    _turn: OwnedSemaphorePermit,
}

impl PinTurn {
    /// Before a PIN is sent: marks it as pending, durably. An error means that it must not be sent.
    ///
    /// A PIN that a person has just typed is sent although what became of it the last time is not known, but not when it was
    /// refused.
    pub async fn begin(self, pin: &SecretString, typed: bool) -> Result<Attempt, MarkError> {
        let inner = &self.store.0;
        let place = Arc::clone(&inner.on_their_way.places).acquire_owned().await.map_err(|_| StoreError::Closed)?;
        let tag = marks::tag(&inner.key, &self.serial, pin);
        let serial = self.serial.clone();
        let (digest, was_pending) = self.store.run(move |ledger| ledger.begin(&tag, &serial, typed)).await??;
        Ok(Attempt { turn: self, digest, was_pending, _place: place })
    }
}

/// A PIN on its way to a token. Dropped without an answer, as when the device's process died or the time was up, it
/// stays pending and is not sent again.
#[must_use = "a PIN whose outcome is not told is never sent again"]
pub struct Attempt {
    turn: PinTurn,
    digest: Digest,
    /// Whether it was pending before.
    was_pending: bool,
    _place: OwnedSemaphorePermit,
}

impl Attempt {
    /// The token took it: it may be sent again. Wait for this to the end; if it fails the PIN stays pending.
    pub async fn accepted(self) -> Result<(), StoreError> {
        self.end(None).await
    }

    /// It was not sent after all: what is known of it is what was known before.
    pub async fn withdrawn(self) -> Result<(), StoreError> {
        if self.was_pending { Ok(()) } else { self.end(None).await }
    }

    /// The token refused it.
    pub async fn refused(self) -> Result<(), StoreError> {
        self.end(Some(MarkState::Refused)).await
    }

    async fn end(self, state: Option<MarkState>) -> Result<(), StoreError> {
        let Self { turn, digest, .. } = &self;
        let (serial, digest) = (turn.serial.clone(), *digest);
        turn.store.run(move |ledger| ledger.mark(&serial, &digest, state)).await?
    }
}

impl Store {
    /// Waits until no other PIN is on its way to the token with this serial. Tokens without one share theirs, and a try.
    pub async fn turn(&self, serial: &str) -> Result<PinTurn, StoreError> {
        let turn = self.0.on_their_way.turns_at(serial).acquire_owned().await.map_err(|_| StoreError::Closed)?;
        Ok(PinTurn { store: self.clone(), serial: serial.to_owned(), _turn: turn })
    }

    /// [`PinTurn::begin`], as soon as it is its turn.
    pub async fn begin(&self, serial: &str, pin: &SecretString, typed: bool) -> Result<Attempt, MarkError> {
        self.turn(serial).await?.begin(pin, typed).await
    }

    /// Completes when no PIN is on its way: what became of each is known, or will never be. None sets out meanwhile.
    pub async fn pins_have_arrived(&self) {
        let _ = self.0.on_their_way.places.acquire_many(MAX_ON_THEIR_WAY).await;
    }

    /// Whether no PIN is on its way.
    pub fn have_pins_arrived(&self) -> bool {
        self.0.on_their_way.places.available_permits() == MAX_ON_THEIR_WAY as usize
    }
}
