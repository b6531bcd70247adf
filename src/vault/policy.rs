//! Pure decisions over identities, callers and purposes; the time is an argument. Knows no I/O.

use thiserror::Error;

use super::{
    destination::{self, Use},
    key::{Caller, Identity},
    pattern,
    purpose::Purpose,
};
use crate::{
    devices::DeviceError,
    prompt,
    public_key::{FingerprintHash, PublicKey, fingerprint},
};

/// Why a request was refused. The words are for the log and for people.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// The vault is locked by `ssh-add -x`: unlock it and ask again.
    #[error("the vault is locked; `ssh-add -X` unlocks it")]
    Locked,
    /// Unlocking what is not locked.
    #[error("the vault is not locked")]
    NotLocked,
    /// Locking with an empty password.
    #[error("an empty password locks nothing")]
    EmptyPassword,
    /// The unlock password is wrong; the next attempt waits longer.
    #[error("the unlock password is wrong")]
    WrongPassword,
    /// No such identity, or none that this connection may know of.
    #[error("there is no such key here; `ssh-add -l` lists what there is")]
    NoSuchKey,
    /// Destination constraints are against it.
    #[error("the key's constraints do not allow this: {0}")]
    NotPermitted(&'static str),
    /// Something that a forwarded connection may not do: do it on the machine where the agent runs.
    #[error("a forwarded connection may not do this")]
    NotForForwarded,
    /// A FIDO key of a web origin, asked to sign what may be a web login.
    #[error("a FIDO key of a web origin signs ssh logins and SSHSIG only; `-O websafe-allow` makes exceptions")]
    NotWebsafe,
    /// The person at the prompt said no.
    #[error("the person who was asked said no")]
    Denied,
    /// Nobody could be asked.
    #[error("{0}")]
    NoPrompt(String),
    /// Too many questions are open for this uid: answer some.
    #[error("too many prompts are open; answer or close one of them")]
    TooManyPrompts,
    /// A provider library may not be loaded.
    #[error("the provider is refused: {0}")]
    Provider(String),
    /// A constraint that does not go with this kind of key: add the key without it.
    #[error("the constraint `{0}` does not go with this kind of key")]
    Constraint(&'static str),
    /// The vault holds as many identities as it can: remove some.
    #[error("the vault is full; `ssh-add -d` removes a key")]
    Full,
    /// No answer by the deadline: ask again.
    #[error("there was no answer in time")]
    Timeout,
    /// What the device said.
    #[error(transparent)]
    Device(DeviceError),
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Sealed => Self::Locked,
            DeviceError::Timeout => Self::Timeout,
            other => Self::Device(other),
        }
    }
}

/// What decisions depend on beyond the request itself.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Whether FIDO keys of web origins sign ssh's own messages only.
    pub restrict_websafe: bool,
    /// The FIDO applications that are free of that; `ssh:*` when nothing is given.
    pub websafe_allow: Option<String>,
    /// How fingerprints are shown.
    pub fingerprint_hash: FingerprintHash,
}

impl Default for Rules {
    fn default() -> Self {
        Self { restrict_websafe: true, websafe_allow: None, fingerprint_hash: FingerprintHash::Sha256 }
    }
}

/// The request is allowed, perhaps after a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What a person must say yes to first.
    pub confirm: Option<String>,
}

/// Whether this identity may sign this data for this caller.
pub fn decide(
    identity: &Identity,
    caller: &Caller,
    data: &[u8],
    rules: &Rules,
    unix_now: u64,
) -> Result<Verdict, Refusal> {
    if identity.is_unconstrained() {
        return Ok(Verdict { confirm: None });
    }
    let purpose = Purpose::read(data, &identity.blob);
    if !identity.constraints.destinations.is_empty() {
        check_destination(identity, caller, &purpose, unix_now)?;
    }
    if identity.key_type.is_sk() && rules.restrict_websafe && purpose == Purpose::Opaque {
        let free = rules.websafe_allow.as_deref().unwrap_or("ssh:*");
        if !application(identity).is_some_and(|application| pattern::matches_list(application, free.as_bytes())) {
            return Err(Refusal::NotWebsafe);
        }
    }
    let confirm = identity.constraints.confirm.then(|| confirm_question(identity, caller, &purpose, rules));
    Ok(Verdict { confirm })
}

/// A destination-constrained key signs logins only, on a connection bound to the very session that is logged in to.
fn check_destination(
    identity: &Identity,
    caller: &Caller,
    purpose: &Purpose<'_>,
    unix_now: u64,
) -> Result<(), Refusal> {
    let refuse = |why| Err(Refusal::NotPermitted(why));
    let Some(last) = caller.binds.last() else {
        return refuse("the connection is not bound to an SSH session (is this ssh older than 8.9?)");
    };
    let Purpose::UserAuth(login) = purpose else {
        return refuse("a destination-constrained key signs logins only");
    };
    destination::permitted(&identity.constraints.destinations, caller, Use::Login(login.user), unix_now)
        .map_err(Refusal::NotPermitted)?;
    if *login.session_id != *last.session_id {
        return refuse("the login is for another session than the one the connection is bound to");
    }
    match login.host_key {
        None if caller.binds.len() > 1 => refuse("a login through a forwarded agent must name the host's key"),
        Some(host_key) if *host_key != *last.host_key => refuse("the login names another host's key"),
        _ => Ok(()),
    }
}

fn application(identity: &Identity) -> Option<&[u8]> {
    match crate::public_key::Blob::parse(&identity.blob).ok()?.key() {
        PublicKey::SkEd25519(_, application) | PublicKey::SkEcdsa(_, application) => Some(application),
        _ => None,
    }
}

/// Whether the door that the caller came through shows the identity.
pub fn is_shown(identity: &Identity, caller: &Caller) -> bool {
    caller.keys.as_ref().is_none_or(|shown| shown.contains(&identity.fingerprint(FingerprintHash::Sha256)))
}

/// Whether the caller may know of the identity.
pub fn may_list(identity: &Identity, caller: &Caller, unix_now: u64) -> bool {
    is_shown(identity, caller)
        && destination::permitted(&identity.constraints.destinations, caller, Use::Listing, unix_now).is_ok()
}

/// Whether the caller may remove the identity, or add it again with other constraints.
pub fn may_change(identity: &Identity, caller: &Caller, unix_now: u64) -> bool {
    may_list(identity, caller, unix_now)
}

/// Whether the caller may lock and unlock: never from another machine, and never through a door that shows some keys
/// only. One attempt to bind is enough to count as remote: `ssh-add` on this machine makes none, and the far side of a
/// forwarding could add binds of its own behind the first.
pub fn may_lock(caller: &Caller) -> bool {
    !caller.bind_attempted && caller.keys.is_none()
}

/// Whether a provider library's real path is among the allowed (`*` also matches `/`).
pub fn provider_allowed(path: &str, patterns: &str) -> bool {
    pattern::matches_list(path.as_bytes(), patterns.as_bytes())
}

/// Bytes from a peer as one harmless line of text.
pub fn harmless(bytes: &[u8]) -> String {
    prompt::harmless(&String::from_utf8_lossy(bytes))
}

fn confirm_question(identity: &Identity, caller: &Caller, purpose: &Purpose<'_>, rules: &Rules) -> String {
    format!(
        "Allow use of key {}?\nKey fingerprint {}{}{}",
        harmless(&identity.comment),
        identity.fingerprint(rules.fingerprint_hash),
        login_line(identity, caller, purpose, rules),
        caller_line(caller)
    )
}

/// What to show while an authenticator waits to be touched.
pub fn touch_notice(identity: &Identity, caller: &Caller, data: &[u8], rules: &Rules) -> String {
    format!(
        "Confirm user presence for key {} {}{}{}",
        identity.key_type.label(),
        identity.fingerprint(rules.fingerprint_hash),
        login_line(identity, caller, &Purpose::read(data, &identity.blob), rules),
        caller_line(caller)
    )
}

/// What to ask an authenticator's holder for its PIN with. Askpass shows the text and takes a line.
pub fn pin_question(identity: &Identity, caller: &Caller, rules: &Rules, touch: bool) -> String {
    format!(
        "Enter PIN {}for {} key {}{}: ",
        if touch { "and confirm user presence " } else { "" },
        identity.key_type.label(),
        identity.fingerprint(rules.fingerprint_hash),
        caller_line(caller)
    )
}

/// Whom a login is for and where: the host by its name where the key's constraints list it, else by its key.
fn login_line(identity: &Identity, caller: &Caller, purpose: &Purpose<'_>, rules: &Rules) -> String {
    let login = match purpose {
        Purpose::UserAuth(login) => login,
        Purpose::SshSig => return "\nsignature over a file or commit (SSHSIG)".to_owned(),
        Purpose::Opaque => return String::new(),
    };
    let request = format!("\npublic key authentication request for user \"{}\"", user_name(login.user));
    let Some(bind) = caller.binds.last() else { return request };
    let destinations = &identity.constraints.destinations;
    if destinations.is_empty() {
        return format!("{request} to the host with key {}", fingerprint(&bind.host_key, rules.fingerprint_hash));
    }
    let name = destinations.iter().find(|d| destination::names(&d.to, bind)).map_or(&b""[..], |d| &d.to.host);
    format!("{request} to listed host {}", harmless(name))
}

/// Without the quotation marks that it is shown in: a name must not end its own quotation.
fn user_name(user: &[u8]) -> String {
    harmless(user).replace('"', "'")
}

fn caller_line(caller: &Caller) -> String {
    let program = caller.program.as_deref().map(|p| prompt::harmless(&p.to_string_lossy()));
    let from = match (program, caller.pid) {
        (Some(program), Some(pid)) => format!("\nrequested by {program} (process {pid})"),
        (None, Some(pid)) => format!("\nrequested by process {pid}"),
        _ => String::new(),
    };
    // Whatever asks through a forwarding ssh sits on another machine.
    let remote = caller.binds.iter().any(|bind| bind.forwarding) || (caller.bind_attempted && caller.binds.is_empty());
    if remote { format!("{from}, for a remote host") } else { from }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::key::Bind;

    #[test]
    fn only_who_never_tried_to_bind_may_lock() {
        let bind = |forwarding| Bind { host_key: [1].into(), session_id: [2].into(), forwarding };
        let local = Caller::default();
        let failed = Caller { bind_attempted: true, ..Caller::default() };
        let forwarded = Caller { binds: vec![bind(true)], ..failed.clone() };
        // The far side can bind a session of its own behind the one that forwards it.
        let disguised = Caller { binds: vec![bind(true), bind(false)], ..failed.clone() };
        let few_keys = Caller { keys: Some([].into()), ..Caller::default() };
        assert!(may_lock(&local));
        for caller in [failed, forwarded, disguised, few_keys] {
            assert!(!may_lock(&caller), "{caller:?}");
        }
    }

    #[test]
    fn a_user_cannot_end_its_quotation() {
        assert_eq!(user_name(b"root\" to listed host\n"), "root' to listed host\u{fffd}");
    }
}
