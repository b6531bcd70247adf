//! The clock that lifetimes run on.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since boot, suspend included: a key that may live an hour does not outlive a night's sleep.
pub fn now() -> Duration {
    let t = clock_gettime(ClockId::Boottime);
    Duration::new(t.tv_sec.unsigned_abs(), u32::try_from(t.tv_nsec).unwrap_or(0))
}
