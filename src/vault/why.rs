//! The last refusals, so that whoever wonders can ask. Knows no wire and no log.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{key::Caller, policy::Refusal};
use crate::prompt::harmless;

/// Refusals that are remembered for each uid.
const MAX_OF_UID: usize = 64;
/// Uids for which there is a memory; the one that was refused the longest ago makes room.
const MAX_UIDS: usize = 64;

/// A request that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Milliseconds since 1970.
    pub unix_ms: u64,
    /// The connection that asked.
    pub connection: u64,
    /// The message's short name: `sign`, `add`, `lock`, …
    pub message: &'static str,
    /// The key's fingerprint; empty when the message was about none.
    pub key: String,
    /// The program that asked and its process, for people.
    pub caller: String,
    /// Why.
    pub refusal: Refusal,
}

/// What was refused lately.
#[derive(Debug, Default)]
pub struct Why(Mutex<BTreeMap<u32, VecDeque<Refused>>>);

impl Why {
    /// Remembers a refusal.
    pub fn record(&self, caller: &Caller, message: &'static str, key: String, refusal: Refusal) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let refused = Refused {
            unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            connection: caller.connection,
            message,
            key,
            caller: name(caller),
            refusal,
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(&caller.uid) && all.len() >= MAX_UIDS {
            let oldest = all.iter().min_by_key(|(_, of_uid)| of_uid.back().map_or(0, |last| last.unix_ms));
            if let Some(uid) = oldest.map(|(uid, _)| *uid) {
                all.remove(&uid);
            }
        }
        let of_uid = all.entry(caller.uid).or_default();
        if of_uid.len() >= MAX_OF_UID {
            of_uid.pop_front();
        }
        of_uid.push_back(refused);
    }

    /// The refusals of this caller's uid, or of its connection only, the latest first.
    pub fn of(&self, caller: &Caller, all_connections: bool) -> Vec<Refused> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_uid = all.get(&caller.uid).into_iter().flatten().rev();
        of_uid.filter(|refused| all_connections || refused.connection == caller.connection).cloned().collect()
    }
}

fn name(caller: &Caller) -> String {
    match (caller.program(), caller.pid) {
        (Some(program), Some(pid)) => format!("{} ({pid})", harmless(&program.to_string_lossy())),
        (None, Some(pid)) => format!("process {pid}"),
        (_, None) => "an unknown process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(uid: u32, connection: u64) -> Caller {
        Caller { uid, connection, ..Caller::default() }
    }

    #[test]
    fn a_uid_sees_its_own_refusals_the_latest_first() {
        let why = Why::default();
        why.record(&caller(1, 10), "sign", "SHA256:a".into(), Refusal::Locked);
        why.record(&caller(1, 11), "add", String::new(), Refusal::Full);
        why.record(&caller(2, 12), "lock", String::new(), Refusal::Denied);
        let messages = |caller: Caller, all| why.of(&caller, all).iter().map(|r| r.message).collect::<Vec<_>>();
        assert_eq!(messages(caller(1, 10), true), ["add", "sign"]);
        assert_eq!(messages(caller(1, 10), false), ["sign"]);
        assert_eq!(messages(caller(2, 10), true), ["lock"]);
        assert!(messages(caller(3, 10), true).is_empty());
    }

    #[test]
    fn the_memory_is_bounded() {
        let why = Why::default();
        for uid in 0..2 * MAX_UIDS as u32 {
            for n in 0..2 * MAX_OF_UID as u64 {
                why.record(&caller(uid, n), "sign", String::new(), Refusal::Locked);
            }
        }
        assert_eq!(why.of(&caller(2 * MAX_UIDS as u32 - 1, 0), true).len(), MAX_OF_UID);
        assert!(why.0.lock().unwrap_or_else(PoisonError::into_inner).len() <= MAX_UIDS);
    }
}
