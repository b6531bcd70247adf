//! What a connection sends or gets in pieces, since it is longer than a frame: backups and wraps, always encrypted. Knows
//! bytes; not what they are.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OwnedSemaphorePermit;

use super::message::carry::MAX_PART;
use crate::vault::backup::MAX_BACKUP;

/// At most one parcel, which ends with its connection.
#[derive(Default)]
pub(super) struct Parcel(Mutex<Option<Held>>);

/// A parcel, and the right to hold one.
struct Held {
    bytes: Arc<Vec<u8>>,
    room: OwnedSemaphorePermit,
}

/// Why a piece does not fit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Misfit {
    /// It does not follow the one before.
    OutOfOrder,
    /// All together would be longer than [`MAX_BACKUP`].
    TooLong,
    /// Others hold too many.
    NoRoom,
}

impl Parcel {
    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds this, in place of what was held.
    pub(super) fn put(&self, bytes: Vec<u8>, room: OwnedSemaphorePermit) {
        *self.held() = Some(Held { bytes: Arc::new(bytes), room });
    }

    /// The piece that begins here; empty at the end.
    pub(super) fn part(&self, offset: u64) -> Vec<u8> {
        let held = self.held();
        let bytes = held.as_ref().map_or(&[][..], |held| &held.bytes);
        let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
        rest[..rest.len().min(MAX_PART)].to_vec()
    }

    /// Puts a piece behind those that are here; one that begins at 0 begins anew.
    pub(super) fn append(
        &self,
        offset: u64,
        piece: &[u8],
        room: impl FnOnce() -> Option<OwnedSemaphorePermit>,
    ) -> Result<(), Misfit> {
        let mut held = self.held();
        if offset == 0 {
            let before = held.take().map(|held| held.room);
            let room = before.or_else(room).ok_or(Misfit::NoRoom)?;
            *held = Some(Held { bytes: Arc::default(), room });
        }
        let held = held.as_mut().filter(|held| held.bytes.len() as u64 == offset).ok_or(Misfit::OutOfOrder)?;
        if held.bytes.len() + piece.len() > MAX_BACKUP {
            return Err(Misfit::TooLong);
        }
        // Nobody shares it: whatever reads it is over before the next piece is looked at.
        Arc::make_mut(&mut held.bytes).extend_from_slice(piece);
        Ok(())
    }

    /// What is held; nothing where nothing is.
    pub(super) fn bytes(&self) -> Arc<Vec<u8>> {
        self.held().as_ref().map(|held| Arc::clone(&held.bytes)).unwrap_or_default()
    }

    /// Holds nothing any more.
    pub(super) fn clear(&self) {
        *self.held() = None;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    #[test]
    fn pieces_follow_each_other() {
        let places = Arc::new(Semaphore::new(1));
        let room = || Arc::clone(&places).try_acquire_owned().ok();
        let parcel = Parcel::default();
        assert_eq!(parcel.append(3, b"late", room), Err(Misfit::OutOfOrder));
        parcel.append(0, b"one", room).unwrap();
        assert_eq!(parcel.append(2, b"two", room), Err(Misfit::OutOfOrder));
        parcel.append(3, b"two", room).unwrap();
        assert_eq!(**parcel.bytes(), *b"onetwo");
        assert_eq!([4, 6, u64::MAX].map(|offset| parcel.part(offset)), [b"wo".to_vec(), vec![], vec![]]);
        // A second parcel finds no room until the first is gone.
        let other = Parcel::default();
        assert_eq!(other.append(0, b"x", room), Err(Misfit::NoRoom));
        parcel.append(0, b"anew", room).unwrap();
        assert_eq!(**parcel.bytes(), *b"anew");
        parcel.clear();
        assert!(parcel.bytes().is_empty());
        other.append(0, b"x", room).unwrap();
    }
}
