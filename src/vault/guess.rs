//! Attempts at a secret that can be guessed: one at a time, and each wrong one makes itself and the next wait. Knows times;
//! not what the secret opens.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout_at},
};

use super::policy::Refusal;

/// A wrong attempt delays the next by this much more than the one before…
const DELAY: Duration = Duration::from_millis(100);
/// …up to this.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// How long an attempt may wait for its turn.
const PATIENCE: Duration = Duration::from_secs(60);

/// The attempts at one secret.
pub(super) struct Guesses {
    turn: Arc<Semaphore>,
    wrong: Mutex<Wrong>,
}

#[derive(Default)]
struct Wrong {
    count: u32,
    /// Nothing is tried before this.
    next: Option<Instant>,
}

impl Default for Guesses {
    fn default() -> Self {
        Self { turn: Arc::new(Semaphore::new(1)), wrong: Mutex::default() }
    }
}

impl Guesses {
    fn wrong(&self) -> MutexGuard<'_, Wrong> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the attempts before have ended, and for as long as they make it wait. The delay is the vault's, not the
    /// caller's, and the turn is to end with the attempt: hanging up shortens neither.
    pub(super) async fn turn(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        let turn = timeout_at(Instant::now() + PATIENCE, Arc::clone(&self.turn).acquire_owned());
        let Ok(Ok(turn)) = turn.await else { return Err(Refusal::Timeout) };
        self.pause().await;
        Ok(turn)
    }

    /// Completes when the next may be tried.
    pub(super) async fn pause(&self) {
        let next = self.wrong().next;
        if let Some(at) = next {
            sleep_until(at).await;
        }
    }

    /// Counts a wrong attempt, and returns how many there were in a row.
    pub(super) fn count_wrong(&self) -> u32 {
        let mut wrong = self.wrong();
        wrong.count = wrong.count.saturating_add(1);
        let delay = DELAY.saturating_mul(wrong.count).min(DELAY_MAX);
        wrong.next = Some(Instant::now() + delay);
        wrong.count
    }

    /// Forgives those that there were: there was a right one.
    pub(super) fn forgive(&self) {
        *self.wrong() = Wrong::default();
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> &Semaphore {
        &self.turn
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> (u32, bool) {
        let wrong = self.wrong();
        (wrong.count, wrong.next.is_some())
    }
}
