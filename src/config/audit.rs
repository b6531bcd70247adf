//! `[audit]` in the configuration file: whether there is an audit log, where, how large, and what happens without it.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Spanned;

use super::{Fault, System, checked};
use crate::vault::audit::{DEFAULT_SIZE, MAX_SIZE, MIN_SIZE, OnFull};

/// Whether and how it is written down what keys are used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditConfig {
    /// Whether there is an audit log.
    pub enabled: bool,
    /// The directory of its files: absolute. Without one it is `audit` in the directory of the state.
    pub path: Option<PathBuf>,
    /// What all its files take at most, in bytes.
    pub max_size: u64,
    /// What becomes of requests that cannot be written down.
    pub on_full: OnFull,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self { enabled: true, path: None, max_size: DEFAULT_SIZE, on_full: OnFull::default() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AuditForm {
    enabled: bool,
    path: Option<Spanned<String>>,
    #[serde(deserialize_with = "max_size")]
    max_size: u64,
    #[serde(deserialize_with = "on_full")]
    on_full: OnFull,
}

impl Default for AuditForm {
    fn default() -> Self {
        let AuditConfig { enabled, path: _, max_size, on_full } = AuditConfig::default();
        Self { enabled, path: None, max_size, on_full }
    }
}

impl AuditForm {
    pub(super) fn check(self, system: &System) -> Result<AuditConfig, Fault> {
        let Self { enabled, path, max_size, on_full } = self;
        let path = path.map(|path| checked(&path, |path| system.expand(path))).transpose()?;
        Ok(AuditConfig { enabled, path, max_size, on_full })
    }
}

/// A number of bytes, with the units K, M, G and T of 1024 each: `64M`.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn max_size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    let size = parse_size(&text).filter(|size| (MIN_SIZE..=MAX_SIZE).contains(size));
    size.ok_or_else(|| {
        D::Error::custom(format!("`{text}` is no size for the audit log: it goes from \"1M\" to \"1T\""))
    })
}

fn on_full<'de, D: Deserializer<'de>>(from: D) -> Result<OnFull, D::Error> {
    match &*String::deserialize(from)? {
        "refuse" => Ok(OnFull::Refuse),
        "refuse-stored" => Ok(OnFull::RefuseStored),
        "warn" => Ok(OnFull::Warn),
        other => Err(D::Error::custom(format!("unknown choice `{other}`: it is `refuse`, `refuse-stored` or `warn`"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("1048576"), Some(1 << 20));
        assert_eq!(parse_size("64M"), Some(64 << 20));
        assert_eq!(parse_size("3G"), Some(3 << 30));
        for bad in ["", "M", "1m", "1MB", "-1", "1.5G", "99999999999999T", "1 M"] {
            assert_eq!(parse_size(bad), None, "{bad:?}");
        }
    }
}
