//! What the vault holds: identities, their keys and constraints. Knows no socket and no policy.

use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    devices::{sk::SkKey, soft::SoftKey},
    public_key::{FingerprintHash, KeyType, fingerprint},
};

/// Where a private key lives. Cheap to clone.
#[derive(Clone, Debug)]
pub enum PrivateKey {
    /// In this process's memory.
    Soft(Arc<SoftKey>),
    /// In a FIDO authenticator, reached through `ssh-sk-helper`.
    Sk(Arc<SkKey>),
}

/// What ssh is offered: a key, or a key with a certificate.
#[derive(Debug)]
pub struct Identity {
    /// The blob that names the identity: the plain key's, or the whole certificate.
    pub blob: Box<[u8]>,
    /// The key's type.
    pub key_type: KeyType,
    /// The private half.
    pub key: PrivateKey,
    /// Free bytes for people; not necessarily UTF-8, never with a NUL.
    pub comment: Box<[u8]>,
    /// Under what conditions the key may be used.
    pub constraints: Constraints,
}

impl Identity {
    /// Whether nothing has to be decided or asked before it signs. A lifetime is no such condition.
    pub fn is_unconstrained(&self) -> bool {
        !self.constraints.confirm && self.constraints.destinations.is_empty() && !self.key_type.is_sk()
    }

    /// What a log line calls it: type, fingerprint and comment.
    pub fn name(&self) -> String {
        let comment = crate::prompt::harmless(&String::from_utf8_lossy(&self.comment));
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
