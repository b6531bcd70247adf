//! One line of the audit log while its request is under way: begun when it is asked, filled in as more is known, written
//! when it has an outcome. Knows what a line may tell of a key's use.

use std::{
    borrow::{Borrow, Cow},
    sync::{Arc, atomic::Ordering},
    time::{Instant, SystemTime},
};

use super::{
    Shared,
    line::{self, KeyName, Peer, Record},
};
use crate::{
    devices::{Operation, scheme},
    public_key::{FingerprintHash, fingerprint},
    vault::{
        key::{Caller, Identity},
        policy::Refusal,
        purpose::Purpose,
        reason::Code,
    },
};

/// What stands in a line for a key in memory.
pub const MEMORY: &str = "memory";

/// What will be a line of the audit log. One that is dropped without an outcome says that its request was given up.
/// Without a log it is nothing, and costs nothing.
#[must_use = "what has no outcome is recorded as given up"]
pub struct Note<S: Borrow<Arc<Shared>> = Arc<Shared>>(Option<Open<S>>);

/// A note while its request has not left the thread that it came to: most are over before they would. It borrows the log and
/// keeps no place in the queue unless it must, for what every request writes to costs more than what it writes.
pub(in crate::vault) type NoteHere<'a> = Note<&'a Arc<Shared>>;

struct Open<S> {
    shared: S,
    record: Record,
    began: Instant,
    /// Whether a place in the queue is kept for it.
    has_place: bool,
}

impl Note {
    /// Something that this caller asked for.
    pub(super) fn of(caller: &Caller, operation: &'static str, shared: &Arc<Shared>) -> Self {
        NoteHere::here(caller, operation, shared, false).into_note()
    }

    /// Something that nobody asked for.
    pub(super) fn ours(operation: &'static str, shared: &Arc<Shared>) -> Self {
        NoteHere::begun(Record::begun(operation, None), shared, false).into_note()
    }
}

impl<'a> NoteHere<'a> {
    /// Something that this caller asked for. `has_place`: one was taken for it.
    pub(super) fn here(caller: &Caller, operation: &'static str, shared: &'a Arc<Shared>, has_place: bool) -> Self {
        caller.program();
        Self::begun(Record::begun(operation, Some(Peer::of(caller))), shared, has_place)
    }

    fn begun(record: Record, shared: &'a Arc<Shared>, has_place: bool) -> Self {
        Self(Some(Open { shared, record, began: Instant::now(), has_place }))
    }

    /// The same for a request that goes elsewhere. One that has no place by now will not be recorded.
    pub(in crate::vault) fn into_note(mut self) -> Note {
        let Some(Open { shared, record, began, has_place }) = self.0.take() else { return Note::none() };
        if !has_place && !shared.take_place() {
            shared.lose();
            return Note::none();
        }
        Note(Some(Open { shared: Arc::clone(shared), record, began, has_place: true }))
    }
}

impl<S: Borrow<Arc<Shared>>> Note<S> {
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// It is about the key with this blob, which may be a stranger's.
    pub fn blob(mut self, blob: &[u8]) -> Self {
        if let Some(open) = &mut self.0 {
            open.record.key = Some(KeyName::of(&fingerprint(blob, FingerprintHash::Sha256)));
        }
        self
    }

    /// It is about this device, or a key on it.
    pub fn device(mut self, name: &str) -> Self {
        self.set_device(name.to_owned());
        self
    }

    /// It concerns so many keys.
    pub fn count(mut self, count: usize) -> Self {
        if let Some(open) = &mut self.0 {
            open.record.count = Some(count as u64);
        }
        self
    }

    /// It is had done here: by a device's name, or [`MEMORY`].
    pub(in crate::vault) fn set_device(&mut self, device: impl Into<Cow<'static, str>>) {
        if let Some(open) = &mut self.0 {
            open.record.device = Some(device.into());
        }
    }

    /// It is this use of this key.
    pub(in crate::vault) fn set_use(&mut self, identity: &Identity, operation: &Operation<'_>, caller: &Caller) {
        let Some(Open { record, .. }) = &mut self.0 else { return };
        record.key = Some(KeyName::of(identity.sha256()));
        let named = match operation {
            Operation::Sign { scheme, input } => {
                let purpose = input.message().map_or(Purpose::Opaque, |data| Purpose::read(data, &identity.blob));
                record.purpose = Some(told(&purpose, caller));
                scheme::sign_name(*scheme)
            }
            Operation::Decrypt { scheme, .. } => scheme::decrypt_name(*scheme),
            Operation::Derive { scheme, .. } => scheme::derive_name(*scheme),
        };
        record.scheme = Some(named.unwrap_or(scheme::SSH));
    }

    /// It is about a stored key: its use must not go unrecorded, unless that is configured.
    pub(in crate::vault) fn insist(&mut self) -> Result<(), Refusal> {
        let Some(Open { shared, has_place, .. }) = &mut self.0 else { return Ok(()) };
        let shared = (*shared).borrow();
        if !*has_place && shared.refuses_stored.load(Ordering::Relaxed) {
            *has_place = shared.is_sure_of_a_place();
            if !*has_place {
                return Err(Refusal::Unrecorded);
            }
        }
        Ok(())
    }

    /// Records the outcome, and passes it on.
    pub fn end<T>(mut self, outcome: Result<T, Refusal>) -> Result<T, Refusal> {
        if let Some(open) = self.0.take() {
            open.end(outcome.as_ref().map_or_else(|refusal| Code::from(refusal).as_str(), |_| "ok"));
        }
        outcome
    }
}

impl<S: Borrow<Arc<Shared>>> Drop for Note<S> {
    fn drop(&mut self) {
        if let Some(open) = self.0.take() {
            open.end(Code::Cancelled.as_str());
        }
    }
}

impl<S: Borrow<Arc<Shared>>> Open<S> {
    fn end(self, outcome: &'static str) {
        let Self { shared, record, began, has_place } = self;
        // What nobody asked for takes no time that anybody waits for.
        let latency = record.peer.is_some().then(|| began.elapsed());
        shared.borrow().push(Record { outcome, latency, at: SystemTime::now(), ..record }, has_place);
    }
}

/// What a line tells of a purpose. A login names the server's key, or is for the host that the connection is bound to.
fn told(purpose: &Purpose<'_>, caller: &Caller) -> line::Purpose {
    match purpose {
        Purpose::UserAuth(login) => {
            let bound = caller.binds.iter().rfind(|bind| *bind.session_id == *login.session_id);
            let host = login.host_key.or(bound.map(|bind| &*bind.host_key));
            let host = host.map(|key| fingerprint(key, FingerprintHash::Sha256));
            line::Purpose::Login { user: line::cut(login.user), host }
        }
        Purpose::SshSig { namespace } => line::Purpose::SshSig { namespace: line::cut(namespace) },
        Purpose::Certificate { key_id } => line::Purpose::Certificate { key_id: line::cut(key_id) },
        Purpose::Opaque => line::Purpose::Opaque,
    }
}
