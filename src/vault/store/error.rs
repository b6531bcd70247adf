//! Why the store does not open, does not keep something, or does not let a PIN pass. The messages say what to do.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::file::quoted;

/// Why there is no store, or a change was not kept. The messages say what to do.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The system refused: make room or mend the directory, or name another.
    #[error("{path}: {source}; mend that, or name another directory with --state", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others can reach it.
    #[error("{path} has mode {mode:04o}, so that others can reach it; run: {command}", path = path.display())]
    Exposed {
        /// The file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What mends it.
        command: String,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to uid {uid}; start as that user, or run as root: {command}", path = path.display())]
    Owner {
        /// The file or directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// What mends it.
        command: String,
    },
    /// Another process has it open, or this one a second time.
    #[error("{path} is used by another strongroom; end that one, or name another directory with --state", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A later version of this program wrote it. Nothing was changed.
    #[error(
        "{path} was written by a newer strongroom (schema {version}; this one knows up to {known}); \
         start that one, or name another directory with --state",
        path = path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema version.
        version: u32,
        /// The newest version that this program knows.
        known: u32,
    },
    /// The file is not what was written, and neither is its second copy. It holds the refused PINs, so nothing goes on without
    /// a person.
    #[error(
        "{path} is damaged: {why}, and there is no second copy that can be read. Make sure that the PINs in the \
         configuration are right, since those that were refused are no longer known; then move the file away: \
         mv {quoted} {quoted}.damaged; keys on devices are found again by looking at them, those of the store come back \
         from a backup only",
        path = path.display(), quoted = quoted(path)
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, for a person.
        why: String,
    },
    /// There is no store yet.
    #[error("there is no store yet; make one with: strongroom init")]
    NotInitialised,
    /// There is a store already.
    #[error("there is a store already; to change what opens it: strongroom slot add, strongroom passphrase")]
    AlreadyInitialised,
    /// Nothing would be kept.
    #[error("this vault keeps nothing on disk; start strongroom agent with a directory: --state DIRECTORY")]
    NotDurable,
    /// Another slot has this number.
    #[error("slot {number} is in use; look at: strongroom slot list")]
    SlotTaken {
        /// The number.
        number: u32,
    },
    /// No slot has this number.
    #[error("there is no slot {number}; look at: strongroom slot list")]
    NoSuchSlot {
        /// The number.
        number: u32,
    },
    /// Without it nothing could ever be opened again.
    #[error("slot {number} is the last that opens the store; add another first: strongroom slot add")]
    LastSlot {
        /// The number.
        number: u32,
    },
    /// More than a store takes.
    #[error("the store takes up to {max} {what}; remove one first")]
    TooMany {
        /// Slots or keys.
        what: &'static str,
        /// How many it takes.
        max: usize,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoRandom,
    /// No thread can be started.
    #[error("no thread can be started: {0}; look at the limit on processes (ulimit -u)")]
    Thread(#[source] io::Error),
    /// The store was closed: the vault is ending.
    #[error("the vault is ending")]
    Closed,
}

/// Why a PIN must not be sent.
#[derive(Debug, Error)]
pub enum MarkError {
    /// It was sent before and nobody knows what became of it. A person has to say that it is right:
    /// [`Store::forget_pins`](super::Store::forget_pins).
    #[error("this PIN was sent before and the token's answer is not known; it is not sent again until you allow it")]
    Pending,
    /// The token refused it before: give another, or have a person say that it is right:
    /// [`Store::forget_pins`](super::Store::forget_pins).
    #[error("this PIN was refused before; it is not sent again until you allow it")]
    Refused,
    /// More PINs were refused than are remembered: [`Store::forget_pins`](super::Store::forget_pins).
    #[error("too many PINs were refused; none is sent until you allow it")]
    TooMany,
    /// Its mark could not be made; there may be too little memory.
    #[error("the PIN could not be marked as sent, so it was not sent")]
    Hash,
    /// Its mark could not be kept.
    #[error("the PIN could not be marked as sent, so it was not sent: {0}")]
    Store(#[from] StoreError),
}
