//! When the store is locked by itself: after a time without use, and after a time in any case. Knows times; not what is
//! locked.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;
use tracing::info;

use super::STORE;
use crate::{
    sys::clock,
    vault::{EXPIRY_TICK, Vault},
};

/// When the store is locked by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AutoLock {
    /// When no stored key was used for so long.
    pub after_idle: Option<Duration>,
    /// So long after it was unlocked, used or not.
    pub after: Option<Duration>,
}

impl AutoLock {
    /// When a store is to be locked that was opened and last used then.
    fn due(&self, since: Duration, used: Duration) -> Option<Duration> {
        let idle = self.after_idle.map(|time| used.saturating_add(time));
        let aged = self.after.map(|time| since.saturating_add(time));
        idle.into_iter().chain(aged).min()
    }
}

impl Vault {
    /// Locks the store when its time has come. Never returns.
    pub async fn lock_by_itself(self: Arc<Self>) {
        loop {
            let (opened, settings) = (self.access.next_open(), self.access.next_settings());
            let due = self.access.times().and_then(|(since, used)| self.settings().auto_lock.due(since, used));
            let left = due.map(|due| due.saturating_sub(clock::now()));
            match left {
                None => tokio::select! { () = opened => {} () = settings => {} },
                // Timers stand still while the machine sleeps; these times do not.
                Some(left) if !left.is_zero() => {
                    tokio::select! { () = sleep(left.min(EXPIRY_TICK)) => {} () = settings => {} }
                }
                Some(_) => {
                    info!("the store was open for long enough");
                    self.audit.act("lock").device(STORE).end(Ok(())).ok();
                    self.lock_store();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sooner_of_both_counts() {
        let [s1, s5, s9] = [1, 5, 9].map(Duration::from_secs);
        assert_eq!(AutoLock::default().due(s1, s5), None);
        assert_eq!(AutoLock { after_idle: Some(s5), after: None }.due(s1, s5), Some(s5 + s5));
        assert_eq!(AutoLock { after_idle: Some(s5), after: Some(s5) }.due(s1, s5), Some(s1 + s5));
        assert_eq!(AutoLock { after_idle: Some(s1), after: Some(s9) }.due(s1, s5), Some(s1 + s5));
    }
}
