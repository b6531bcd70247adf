//! What the suite must be able to do with a device beyond using it.

use std::time::Duration;

use strongroom::devices::{Device, DeviceState, Health, NewKey, Settings};
use tokio::time::timeout;

/// Longer than anything here takes on a loaded machine; what is later than this hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A device of one driver, which nobody else uses.
pub(crate) trait Subject: Send + Sync + Sized + 'static {
    /// The fewest schemes that its keys claim together: less would be a test of nothing.
    const SCHEMES: usize;
    /// The fewest keys of Ed25519 or P-256 that it has.
    const QUICK_KEYS: usize = 2;

    /// Starts one, unlocked, with these keys and perhaps others.
    async fn start(settings: Settings) -> Self;

    /// The device.
    fn device(&self) -> &Device;

    /// Waits until it works.
    async fn ready(&self) {
        self.becomes("ready", |state| state.health == Health::Ready).await;
    }

    /// Waits until its state is as `good` says.
    async fn becomes(&self, what: &str, good: impl Fn(&DeviceState) -> bool) {
        let mut states = self.device().watch();
        let waited = timeout(PATIENCE, states.wait_for(|state| good(state))).await;
        assert!(waited.is_ok(), "{what}: not within {PATIENCE:?}, but {:?}", self.device().state());
    }
}

/// A device that has a PIN.
pub(crate) trait HasPin: Subject {
    const PIN: &'static str;
    const WRONG: &'static str;
    /// Wrong PINs in a row that block it.
    const TRIES: u8;

    /// Starts one that is locked, with all its tries.
    async fn start_locked(settings: Settings) -> Self;
}

/// A device that can be pulled out.
pub(crate) trait Removable: Subject {
    fn remove(&self);
    fn put_back(&self);
}

/// A device that can be made to fail.
pub(crate) trait Faulty: Subject {
    /// From now on, or no more.
    fn fail(&self, fault: Fault, fails: bool);
}

/// A device that makes keys, takes them over, renames and deletes them.
pub(crate) trait MakesKeys: HasPin {
    /// Keys that it makes, one of each kind that the suite is to see; at least one of them is quick to verify. Their
    /// labels differ.
    fn new_keys() -> Vec<NewKey>;

    /// Whether it keeps labels: an OpenPGP card does not.
    const KEEPS_LABELS: bool = true;
    /// Whether single keys can be deleted: not on an OpenPGP card.
    const DELETES: bool = true;
}

/// How it fails when it signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It does not come back.
    Hang,
    /// The signature does not verify.
    Wrong,
    /// The signature is another request's.
    Swapped,
    /// The answer is nonsense.
    Garbage,
    /// The driver dies.
    Crash,
}

/// Bounds under which a test takes no longer than it must.
pub(crate) fn settings() -> Settings {
    Settings { probe: Duration::from_millis(50), grace: Duration::from_millis(50), ..Settings::default() }
}
