//! Sessions on a token: one for each operation that is under way, replaced when they die. Knows what a session remembers;
//! knows no scheme.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use cryptoki::{
    context::Pkcs11,
    error::{Error, RvError},
    object::ObjectHandle,
    session::Session,
};

use super::{error::device_error, mechanism::Ability};
use crate::devices::{DeviceError, Slot};

/// Keys that a session remembers the handles of.
const MAX_KNOWN: usize = 4096;

/// A session, and what is known in it.
pub(super) struct Lane {
    pub(super) session: Session,
    /// Keys by their slots, as long as `epoch` is the pool's.
    known: HashMap<Slot, Known>,
    epoch: u64,
    /// Whether an operation was begun that nothing will finish: the session is of no more use.
    pub(super) stuck: bool,
}

/// A private key in a session.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) handle: ObjectHandle,
    pub(super) ability: Ability,
}

/// Why an operation in a session has no result.
pub(super) enum Fault {
    /// The module said so.
    Module(Error),
    /// We did.
    Ours(DeviceError),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Module(error)
    }
}

impl From<DeviceError> for Fault {
    fn from(error: DeviceError) -> Self {
        Self::Ours(error)
    }
}

impl Lane {
    pub(super) fn known(&self, slot: &Slot) -> Option<Known> {
        self.known.get(slot).cloned()
    }

    pub(super) fn remember(&mut self, slot: &Slot, known: &Known) {
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(slot.clone(), known.clone());
    }
}

/// The sessions that nobody uses at the moment. Closing the last one would log out, so a dead one is closed only after
/// another has been opened.
pub(super) struct Pool {
    context: Pkcs11,
    slot: cryptoki::slot::Slot,
    idle: Mutex<Vec<Lane>>,
    /// Changes when handles may have: with each login, logout and scan.
    epoch: AtomicU64,
    count: usize,
}

impl Pool {
    /// Opens up to `wanted` sessions: fewer when the token has no more, an error when it has none.
    pub(super) fn open(context: &Pkcs11, slot: cryptoki::slot::Slot, wanted: usize) -> Result<Self, DeviceError> {
        let pool =
            Self { context: context.clone(), slot, idle: Mutex::default(), epoch: AtomicU64::new(0), count: wanted };
        let mut lanes = vec![pool.lane().map_err(|error| device_error(&error))?];
        while lanes.len() < wanted {
            match pool.lane() {
                Ok(lane) => lanes.push(lane),
                Err(Error::Pkcs11(RvError::SessionCount, _)) => break,
                Err(error) => return Err(device_error(&error)),
            }
        }
        let count = lanes.len();
        Ok(Self { count, idle: Mutex::new(lanes), ..pool })
    }

    /// How many operations can be under way.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Has all sessions forget their handles.
    pub(super) fn forget_handles(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Does something in a session; once more in another one when the session turns out to be dead, or with fresh handles
    /// when those that were remembered are no more good.
    pub(super) fn with<T>(&self, mut act: impl FnMut(&mut Lane) -> Result<T, Fault>) -> Result<T, DeviceError> {
        let mut lane = self.take()?;
        for repeated in [false, false, true] {
            let error = match act(&mut lane) {
                Ok(value) => {
                    self.put(lane);
                    return Ok(value);
                }
                Err(Fault::Ours(error)) => {
                    self.put(lane);
                    return Err(error);
                }
                Err(Fault::Module(error)) => error,
            };
            if !repeated && session_is_dead(&error) {
                if !matches!(error, Error::Pkcs11(RvError::OperationActive, _)) {
                    // Somebody else closed it, and the token may be another.
                    lane.known.clear();
                }
                // The dead one goes when the new one is there.
                lane = self.in_place_of(&mut lane).map_err(|error| device_error(&error))?;
            } else if !repeated && handle_is_stale(&error) {
                lane.known.clear();
            } else {
                self.put(lane);
                return Err(device_error(&error));
            }
        }
        Err(DeviceError::NoSuchKey)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Lane>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lane(&self) -> Result<Lane, Error> {
        let session = self.context.open_ro_session(self.slot)?;
        let epoch = self.epoch.load(Ordering::Relaxed);
        Ok(Lane { session, known: HashMap::new(), epoch, stuck: false })
    }

    /// A new session, which knows what the old one knew: handles are good in all sessions on a token (PKCS#11 3.1, 2.3), and to look
    /// for a key takes longer than to open a session. One that is not good any more shows by that.
    fn in_place_of(&self, old: &mut Lane) -> Result<Lane, Error> {
        let mut lane = self.lane()?;
        if lane.epoch == old.epoch {
            lane.known = std::mem::take(&mut old.known);
        }
        Ok(lane)
    }

    fn take(&self) -> Result<Lane, DeviceError> {
        let idle = self.idle().pop();
        // There are as many as lanes, unless one could not be replaced when it died.
        let mut lane = idle.map_or_else(|| self.lane(), Ok).map_err(|error| device_error(&error))?;
        let epoch = self.epoch.load(Ordering::Relaxed);
        if lane.epoch != epoch {
            lane.known.clear();
            lane.epoch = epoch;
        }
        Ok(lane)
    }

    fn put(&self, mut lane: Lane) {
        if !lane.stuck {
            self.idle().push(lane);
        } else if let Ok(fresh) = self.in_place_of(&mut lane) {
            self.idle().push(fresh);
        }
        // A stuck one that could not be replaced is closed, and the next to come opens another.
    }
}

/// Whether the session is dead, or holds an operation that is not ours: another one may do.
fn session_is_dead(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::SessionHandleInvalid | RvError::SessionClosed | RvError::OperationActive, _))
}

/// Whether what a handle stood for is gone: the key may have another one by now.
fn handle_is_stale(error: &Error) -> bool {
    matches!(error, Error::Pkcs11(RvError::KeyHandleInvalid | RvError::ObjectHandleInvalid, _))
}
