//! What a listening socket admits: uids, programs, keys, operations, messages. Knows the peer's credentials and no request.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::process::geteuid;
use tracing::warn;

use super::{
    extension::{QUERY, SESSION_BIND},
    message::{Name, compatible},
};
use crate::{
    config::{DoorClient, DoorKind, Listen},
    sys::peer::{self, Credentials},
    vault::key::{Caller, Grants},
};

/// Programs that carry an agent to other machines. They have no business at the service door.
const SSH_PROGRAMS: [&str; 9] =
    ["ssh", "sshd", "sshd-session", "sshd-auth", "slogin", "dropbear", "dbclient", "plink", "ssh-agent"];

/// One listening socket's rules.
#[derive(Debug)]
pub struct Door {
    kind: DoorKind,
    uids: Vec<u32>,
    keys: Option<Arc<[String]>>,
    /// The uids that get something else.
    clients: Vec<DoorClient>,
    /// The extensions that are spoken here, beside session-bind.
    messages: Vec<&'static str>,
}

impl Door {
    /// The drop-in's only door: the standard messages for our own uid and root.
    pub fn ssh_agent() -> Self {
        let uids = vec![geteuid().as_raw(), 0];
        Self { kind: DoorKind::Ssh, uids, keys: None, clients: Vec::new(), messages: vec![QUERY] }
    }

    /// The door that the configuration describes.
    pub fn new(listen: &Listen) -> Self {
        let ours = Name::ALL.iter().map(|name| name.as_str());
        let all: Vec<_> = ours.chain(compatible::Name::ALL.iter().map(|name| name.as_str())).collect();
        for message in listen.messages.iter().filter(|message| !all.contains(&message.as_str())) {
            warn!(message, "the configuration opens a message that this version does not have");
        }
        let spoken = |message: &&'static str| {
            listen.door == DoorKind::Service || listen.messages.iter().any(|configured| configured == message)
        };
        Self {
            kind: listen.door,
            uids: listen.uids.clone(),
            keys: listen.keys.as_ref().map(|keys| keys.as_slice().into()),
            clients: listen.clients.clone(),
            messages: [QUERY].into_iter().chain(all.into_iter().filter(spoken)).collect(),
        }
    }

    /// The caller behind a new connection; `None` when the connection is to be closed without a word.
    pub fn admit(&self, Credentials { uid, pid }: Credentials) -> Option<Caller> {
        if !self.uids.contains(&uid) {
            warn!(uid, pid, "refused a connection of a foreign uid");
            return None;
        }
        static CONNECTIONS: AtomicU64 = AtomicU64::new(0);
        let connection = CONNECTIONS.fetch_add(1, Ordering::Relaxed);
        let door = self.kind.name();
        let client = self.clients.iter().find(|client| client.uid == uid);
        let own = client.and_then(|client| client.keys.as_ref());
        let keys = own.map(|keys| keys.as_slice().into()).or_else(|| self.keys.clone());
        let forbidden = client.map_or(Grants::NONE, |client| Grants::ALL.without(client.operations));
        let mut caller = Caller { connection, uid, pid, keys, forbidden, door, ..Caller::default() };
        if self.kind == DoorKind::Service {
            caller.denied = self.is_fenced_off(&caller);
        }
        Some(caller)
    }

    /// The service door's second fence: an agent socket that was forwarded by mistake is of no use to the far side.
    /// Another user's program is known by its short name only, which is enough against honest programs.
    fn is_fenced_off(&self, caller: &Caller) -> bool {
        let exe = caller.program().and_then(Path::file_name).map(|name| {
            let name = name.to_string_lossy();
            // A program that was replaced by a newer one while it ran.
            name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned()
        });
        let names = [exe, caller.pid.and_then(peer::short_name)];
        let mut known = names.iter().flatten().peekable();
        let fenced = known.peek().is_none() || known.any(|name| SSH_PROGRAMS.contains(&name.as_str()));
        if fenced {
            warn!(pid = caller.pid, "refused an ssh program, or one that cannot be read, at the service door");
        }
        fenced
    }

    /// Whether sessions may be bound here. At the service door an attempt gets the connection denied.
    pub fn binds_sessions(&self) -> bool {
        self.kind == DoorKind::Ssh
    }

    /// The extensions that are spoken here with this caller, as `query` lists them. Whatever comes from another machine
    /// gets the standard messages only.
    pub fn extensions(&self, caller: &Caller) -> impl Iterator<Item = &'static str> {
        let messages = self.messages.iter().copied().filter(|name| *name == QUERY || !caller.bind_attempted);
        messages.chain(self.binds_sessions().then_some(SESSION_BIND))
    }

    /// Whether this extension is spoken here with this caller.
    pub fn speaks(&self, caller: &Caller, name: &[u8]) -> bool {
        self.extensions(caller).any(|spoken| spoken.as_bytes() == name)
    }
}
