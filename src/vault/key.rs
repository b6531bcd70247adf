//! What the vault holds: identities, their keys and constraints. Knows no socket and no policy.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    devices::{Device, FoundKey, Operation, sk::SkKey, soft::SoftKey},
    public_key::{FingerprintHash, KeyType, fingerprint},
};

/// Where a private key lives. Cheap to clone.
#[derive(Clone, Debug)]
pub enum PrivateKey {
    /// In this process's memory.
    Soft(Arc<SoftKey>),
    /// In a FIDO authenticator, reached through `ssh-sk-helper`.
    Sk(Arc<SkKey>),
    /// On a device, which may be away.
    OnDevice(Device, Arc<FoundKey>),
}

impl PrivateKey {
    /// The device's name; `None` for a key that came by `ssh-add` and is in memory, or in an authenticator by its handle.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::OnDevice(device, _) => Some(device.name()),
            Self::Soft(_) | Self::Sk(_) => None,
        }
    }
}

/// One private half of an identity, and under what conditions it came.
#[derive(Clone, Debug)]
pub struct Place {
    /// The private half.
    pub key: PrivateKey,
    /// Free bytes for people; not necessarily UTF-8, never with a NUL.
    pub comment: Box<[u8]>,
    /// Under what conditions the key may be used.
    pub constraints: Constraints,
    /// What it may be used for beyond plain signatures.
    pub grants: Grants,
}

/// What a key does beyond the plain signatures of RFC 9987, section 3.6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Signatures by a named scheme.
    pub sign: bool,
    /// Decryption.
    pub decrypt: bool,
    /// Agreement on secrets.
    pub derive: bool,
}

impl Grants {
    /// Nothing.
    pub const NONE: Self = Self { sign: false, decrypt: false, derive: false };
    /// Everything that the key can do.
    pub const ALL: Self = Self { sign: true, decrypt: true, derive: true };

    /// What this operation needs.
    pub fn for_operation(operation: &Operation<'_>) -> Self {
        match operation {
            Operation::Sign { .. } => Self { sign: true, ..Self::NONE },
            Operation::Decrypt { .. } => Self { decrypt: true, ..Self::NONE },
            Operation::Derive { .. } => Self { derive: true, ..Self::NONE },
        }
    }

    /// Whether all of `needed` is granted.
    pub fn include(self, needed: Self) -> bool {
        (self.sign || !needed.sign) && (self.decrypt || !needed.decrypt) && (self.derive || !needed.derive)
    }
}

/// What ssh is offered: a key, or a key with a certificate. The same one in two places is one identity, under the
/// constraints of both.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The blob that names the identity: the plain key's, or the whole certificate.
    pub blob: Box<[u8]>,
    /// The key's type.
    pub key_type: KeyType,
    /// Where its private half is, at least once. The first place that is available signs.
    pub places: Vec<Place>,
}

impl Identity {
    /// Whether nothing has to be decided or asked before it signs. A lifetime is no such condition.
    pub fn is_unconstrained(&self) -> bool {
        let free = |place: &Place| !place.constraints.confirm && place.constraints.destinations.is_empty();
        !self.key_type.is_sk() && self.places.iter().all(free)
    }

    /// Whether a person confirms each use.
    pub fn is_confirmed(&self) -> bool {
        self.places.iter().any(|place| place.constraints.confirm)
    }

    /// The sets of destinations that it is restricted to: every one of them must permit a use.
    pub fn restrictions(&self) -> impl Iterator<Item = &[Destination]> {
        self.places.iter().map(|place| &*place.constraints.destinations).filter(|set| !set.is_empty())
    }

    /// What it is called by people.
    pub fn comment(&self) -> &[u8] {
        self.places.first().map_or(&[], |place| &place.comment)
    }

    /// What a log line calls it: type, fingerprint and comment.
    pub fn name(&self) -> String {
        let comment = crate::prompt::harmless(&String::from_utf8_lossy(self.comment()));
        format!("{} {} ({comment})", self.key_type.label(), self.fingerprint(FingerprintHash::Sha256))
    }

    /// The key's fingerprint for people.
    pub fn fingerprint(&self, hash: FingerprintHash) -> String {
        fingerprint(&self.blob, hash)
    }
}

/// Conditions given with a key when it was added. None is ever dropped: what cannot be enforced refuses the key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Constraints {
    /// When the key goes, on the clock of [`crate::sys::clock`].
    pub expires: Option<Duration>,
    /// Each use is confirmed by a person (`ssh-add -c`).
    pub confirm: bool,
    /// Where the key may be used (`ssh-add -h`); empty means anywhere.
    pub destinations: Box<[Destination]>,
}

/// One permitted step, from a host to the next (PROTOCOL.agent, `restrict-destination-v00@openssh.com`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Where the step starts; without a host and keys it is where the agent runs.
    pub from: Hop,
    /// Where it leads.
    pub to: Hop,
}

/// One end of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// A pattern for the user on that host; empty means any.
    pub user: Box<[u8]>,
    /// The host's name; empty only for the origin.
    pub host: Box<[u8]>,
    /// The keys by which the host is recognised.
    pub keys: Box<[HostKey]>,
}

/// A key that a host, or the authority behind its certificate, is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostKey {
    /// The plain key's blob.
    pub blob: Box<[u8]>,
    /// Whether it is an authority that certifies hosts.
    pub is_ca: bool,
}

/// One `session-bind@openssh.com` that was accepted on a connection: its signature was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// The host's key blob, or its certificate.
    pub host_key: Box<[u8]>,
    /// The SSH session's identifier.
    pub session_id: Box<[u8]>,
    /// Whether the agent was forwarded through this host, rather than used to log in to it.
    pub forwarding: bool,
}

/// Who asks: one connection, seen from the vault.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Tells connections apart for as long as the process lives.
    pub connection: u64,
    /// The uid at the other end of the socket (SO_PEERCRED).
    pub uid: u32,
    /// Its process, where the system says.
    pub pid: Option<i32>,
    /// The program that process runs, where it can be read.
    pub program: Option<PathBuf>,
    /// The sessions this connection is bound to, nearest first.
    pub binds: Vec<Bind>,
    /// The fingerprints of the keys that the door shows; `None` for all.
    pub keys: Option<Arc<[String]>>,
    /// Whether a fence of the door caught the connection: everything it asks is refused.
    pub denied: bool,
    /// Whether a bind was ever tried here, accepted or not: from then on the connection counts as remote.
    pub bind_attempted: bool,
}
