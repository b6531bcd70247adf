//! `[store]` in the configuration file: when the encrypted store is locked by itself.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de::Error as _};

use super::parse_time;

/// When the encrypted store is locked by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// After so long without a use of its keys: 10 s to 31 d.
    #[serde(deserialize_with = "time")]
    pub lock_after_idle: Option<Duration>,
    /// So long after it was unlocked, used or not: 10 s to 31 d.
    #[serde(deserialize_with = "time")]
    pub lock_after: Option<Duration>,
    /// When the machine goes to sleep, as logind tells.
    pub lock_on_sleep: bool,
    /// When a session of the daemon's user is locked, as logind tells.
    pub lock_on_session_lock: bool,
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    match parse_time(&text) {
        Some(time) if (10..=31 * 24 * 3600).contains(&time.as_secs()) => Ok(Some(time)),
        _ => Err(D::Error::custom(format!("`{text}` is no time after which the store is locked: \"10s\" to \"31d\""))),
    }
}
