//! What the vault holds: identities, their keys and constraints. Knows no socket and no policy.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use super::{
    audit::{MEMORY, Peer},
    stored::{STORE, StoredKey},
};
use crate::{
    devices::{Device, FoundKey, Operation, sk::SkKey, soft::SoftKey},
    public_key::{FingerprintHash, KeyType, fingerprint},
    sys::peer,
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
    /// In the encrypted store, which may be locked.
    Stored(Arc<StoredKey>),
}

impl PrivateKey {
    /// The device's name, or [`STORE`]; `None` for a key in memory, or in an authenticator by its handle.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::OnDevice(device, _) => Some(device.name()),
            Self::Stored(_) => Some(STORE),
            Self::Soft(_) | Self::Sk(_) => None,
        }
    }

    /// What its place is called: the device's name, `memory`, `store` or `fido`.
    pub fn place(&self) -> Cow<'static, str> {
        match self {
            Self::Soft(_) => Cow::Borrowed(MEMORY),
            Self::Sk(_) => Cow::Borrowed("fido"),
            Self::Stored(_) => Cow::Borrowed(STORE),
            Self::OnDevice(device, _) => Cow::Owned(device.name().to_owned()),
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
    /// Its turn among the identity's places, the lowest first: 0 for memory, then the devices as they are configured,
    /// then those that came by `ssh-add -s`.
    pub rank: usize,
    /// Whether it came by `ssh-add` and goes by it, rather than with the configuration.
    pub added: bool,
    /// What the key was named in this vault; empty where it was not. It goes with the place.
    pub name: Box<str>,
}

impl Place {
    /// Whether it is the same private half under the same conditions. What a device says of its key may differ: some tell
    /// more after a login.
    pub fn is_same(&self, other: &Self) -> bool {
        let same_key = match (&self.key, &other.key) {
            (PrivateKey::Soft(key), PrivateKey::Soft(other)) => Arc::ptr_eq(key, other),
            (PrivateKey::Sk(key), PrivateKey::Sk(other)) => Arc::ptr_eq(key, other),
            (PrivateKey::OnDevice(device, key), PrivateKey::OnDevice(other, other_key)) => {
                device.is(other) && key.ssh == other_key.ssh
            }
            (PrivateKey::Stored(key), PrivateKey::Stored(other)) => key.id() == other.id(),
            _ => false,
        };
        same_key && self.constraints == other.constraints && self.grants == other.grants
    }

    /// Whether plain ssh signatures are made here.
    pub fn is_for_ssh(&self) -> bool {
        !matches!(&self.key, PrivateKey::OnDevice(_, key) if !key.ssh)
    }

    /// Why the key is not used here now, if it is not.
    pub fn is_out_of_use(&self, unix_now: u64) -> Option<OutOfUse> {
        let Constraints { disabled, not_after, .. } = self.constraints;
        match not_after {
            Some(at) if at <= unix_now => Some(OutOfUse::Expired),
            _ => disabled.then_some(OutOfUse::Disabled),
        }
    }
}

/// Why a key that is there is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfUse {
    /// Its owner has disabled it.
    Disabled,
    /// Its time is over.
    Expired,
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

    /// What is granted here and not there.
    pub fn without(self, other: Self) -> Self {
        Self {
            sign: self.sign && !other.sign,
            decrypt: self.decrypt && !other.decrypt,
            derive: self.derive && !other.derive,
        }
    }

    /// What is granted, by name: `sign`, `decrypt`, `derive`.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [(self.sign, "sign"), (self.decrypt, "decrypt"), (self.derive, "derive")];
        all.into_iter().filter(|(granted, _)| *granted).map(|(_, name)| name)
    }

    /// The grants with these names; `None` where one is no name of any.
    pub fn from_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut grants = Self::NONE;
        for name in names {
            match name {
                "sign" => grants.sign = true,
                "decrypt" => grants.decrypt = true,
                "derive" => grants.derive = true,
                _ => return None,
            }
        }
        Some(grants)
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
    /// Where its private half is, at least once, by rank. The first place that is available signs.
    pub places: Vec<Place>,
    sha256: OnceLock<Arc<str>>,
}

impl Identity {
    /// An identity in these places.
    pub fn new(blob: &[u8], key_type: KeyType, places: Vec<Place>) -> Self {
        Self { blob: blob.into(), key_type, places, sha256: OnceLock::new() }
    }

    /// The key's fingerprint by SHA-256, which is made once.
    pub fn sha256(&self) -> &Arc<str> {
        self.sha256.get_or_init(|| self.fingerprint(FingerprintHash::Sha256).into())
    }

    /// Whether ssh is offered it: its type is one of ssh's, and in one of its places it is for ssh and in use.
    pub fn is_offered(&self) -> bool {
        let offered = |place: &Place| place.is_for_ssh() && !place.constraints.disabled;
        self.key_type.is_ssh() && self.places.iter().any(offered)
    }

    /// Whether nothing has to be decided or asked before it signs. A lifetime is no such condition.
    pub fn is_unconstrained(&self) -> bool {
        let free = |Place { constraints, .. }: &Place| {
            !constraints.confirm
                && constraints.destinations.is_empty()
                && !constraints.disabled
                && constraints.not_after.is_none()
        };
        !self.key_type.is_sk() && self.places.iter().all(free)
    }

    /// Whether it is in the encrypted store.
    pub fn is_stored(&self) -> bool {
        self.places.iter().any(|place| matches!(place.key, PrivateKey::Stored(_)))
    }

    /// The key as this device has it.
    pub fn on(&self, device: &Device) -> Option<&Arc<FoundKey>> {
        self.places.iter().find_map(|place| match &place.key {
            PrivateKey::OnDevice(other, key) if other.is(device) => Some(key),
            _ => None,
        })
    }

    /// Whether a person confirms each use.
    pub fn is_confirmed(&self) -> bool {
        self.places.iter().any(|place| place.constraints.confirm)
    }

    /// The sets of destinations that it is restricted to: every one of them must permit a use.
    pub fn restrictions(&self) -> impl Iterator<Item = &[Destination]> {
        self.places.iter().map(|place| &*place.constraints.destinations).filter(|set| !set.is_empty())
    }

    /// Its name in this vault: the one that it was given, or else the label that its device keeps; may be empty.
    pub fn given_name(&self) -> &str {
        let given = self.places.iter().map(|place| &*place.name).find(|name| !name.is_empty());
        let label = |place| match place {
            &Place { key: PrivateKey::OnDevice(_, ref key), .. } => Some(&*key.label),
            _ => None,
        };
        given.or_else(|| self.places.iter().filter_map(label).find(|label| !label.is_empty())).unwrap_or_default()
    }

    /// What it is called by people.
    pub fn comment(&self) -> &[u8] {
        self.places.first().map_or(&[], |place| &place.comment)
    }

    /// What a log line calls it: type, fingerprint and comment.
    pub fn name(&self) -> String {
        let comment = crate::prompt::harmless(&String::from_utf8_lossy(self.comment()));
        format!("{} {} ({comment})", self.key_type.label(), self.sha256())
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
    /// Whether the key is listed and not used: its owner says so, or its time is over.
    pub disabled: bool,
    /// From when on the key is not used, in seconds since 1970. It stays listed.
    pub not_after: Option<u64>,
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
    /// The program that process runs.
    pub program: Arc<Program>,
    /// Who it is, in the audit log's words.
    pub peer: Arc<Peer>,
    /// What kind of door the connection came through: `ssh` or `service`.
    pub door: &'static str,
    /// The sessions this connection is bound to, nearest first.
    pub binds: Vec<Bind>,
    /// The fingerprints of the keys that the door shows; `None` for all.
    pub keys: Option<Arc<[String]>>,
    /// What the door does not let this caller do, whatever keys grant.
    pub forbidden: Grants,
    /// Whether a fence of the door caught the connection: everything it asks is refused.
    pub denied: bool,
    /// Whether a bind was ever tried here, accepted or not: from then on the connection counts as remote.
    pub bind_attempted: bool,
}

impl Caller {
    /// The program that the caller's process runs, where it can be read: when it is first asked for, and then never again.
    pub fn program(&self) -> Option<&Path> {
        self.program.0.get_or_init(|| self.pid.and_then(peer::program)).as_deref()
    }
}

/// The program behind a connection, once it has been read. Good for telling people, and for refusing; never for allowing.
#[derive(Debug, Default)]
pub struct Program(OnceLock<Option<PathBuf>>);

impl Program {
    /// The program, if it has been read and could be.
    pub fn known(&self) -> Option<&Path> {
        self.0.get()?.as_deref()
    }
}

impl From<PathBuf> for Program {
    fn from(path: PathBuf) -> Self {
        Self(Some(path).into())
    }
}
