//! Pure decisions over identities, callers and purposes; the time is an argument. Knows no I/O.

use thiserror::Error;

use super::{
    backup::BackupError,
    destination::{self, Route, Use},
    key::{Caller, Destination, Grants, Identity, OutOfUse},
    pattern,
    purpose::Purpose,
    transfer::TransferError,
};
use crate::{
    devices::{Deed, Device, DeviceError, FoundKey, Input, Operation, Status},
    prompt,
    public_key::{FingerprintHash, PublicKey, fingerprint},
};

/// Why a request was refused. The words are for the log and for people.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// The vault is locked by `ssh-add -x`: unlock it and ask again.
    #[error("the vault is locked; `ssh-add -X` unlocks it")]
    Locked,
    /// The daemon is about to end: ask again when it has been started anew.
    #[error("the vault is shutting down")]
    Ending,
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
    /// No device of that name, or none that this connection may know of.
    #[error("there is no such device here; `devices` lists what there is")]
    NoSuchDevice,
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
    /// What a module or one of its tokens is about.
    #[error("{0}: {1}")]
    At(String, Box<Refusal>),
    /// `ssh-add -s` found nothing to add.
    #[error("nothing was added: {0}")]
    NothingNew(&'static str),
    /// The token is a device of the configuration: say there what its keys may do.
    #[error(
        "it is the device `{0}` of the configuration, under the conditions given there; add it without a lifetime, \
         confirmation, destinations or certificates"
    )]
    Configured(String),
    /// A constraint that does not go with this kind of key: add the key without it.
    #[error("the constraint `{0}` does not go with this kind of key")]
    Constraint(&'static str),
    /// The key is on a configured device, and can only be removed with it.
    #[error("the key is on the device `{0}`; take the device out of the configuration to remove it")]
    OnDevice(String),
    /// Nobody has allowed the key to do this: its owner can.
    #[error("the key was not allowed to do this; its owner can with `strongroom key allow`")]
    NotGranted,
    /// The configuration grants the device's keys less: change it there.
    #[error("`operations` of the device `{0}` in the configuration do not grant this")]
    BeyondConfiguration(String),
    /// The door does not let this uid do that, with any key.
    #[error("this door lets your uid do less; the daemon's owner can say more under `client` in the configuration")]
    Forbidden,
    /// Keys are made, named, allowed more and deleted by their owner only.
    #[error("only the vault's own user and root may do this, on this machine, at a door that shows all keys")]
    NotOwner,
    /// What is to be deleted has another name than was given: look again.
    #[error("the key has another name; give its name, its label, its comment or its fingerprint to delete it")]
    WrongName,
    /// One PIN try is left, and nobody typed the PIN: unlock the device by hand.
    #[error("one PIN try is left on `{0}`, and it is not spent unasked; unlock the device through the service door")]
    LastTry(String),
    /// The device refused this very PIN before: give another.
    #[error("`{0}` refused this PIN before; it is not sent again; unlock the device with another")]
    PinRefusedBefore(String),
    /// The PIN was sent before, and what became of it is not known: it may have cost a try.
    #[error("this PIN was sent to `{0}` before and there was no answer; unlock the device by hand to try it again")]
    PinUncertain(String),
    /// There is no PIN to send.
    #[error("no PIN: {0}")]
    NoPin(String),
    /// The store is locked, and nobody was asked: unlock it and ask again.
    #[error("the store is locked; `strongroom unlock` unlocks it")]
    StoreLocked,
    /// There is no encrypted store yet.
    #[error("there is no encrypted store yet; `strongroom init` makes one")]
    NoStore,
    /// There is a store already, with keys that another would lose.
    #[error("there is an encrypted store already; `strongroom slot add` adds another way to open it")]
    StoreExists,
    /// Neither a passphrase of the store nor its recovery key; the next attempt waits longer.
    #[error("this is neither a passphrase of the store nor its recovery key")]
    WrongPassphrase,
    /// The request must carry the store's passphrase, or its recovery key, whether the store is open or not.
    #[error("this wants a passphrase of the store, or its recovery key, each time")]
    ProofNeeded,
    /// Its owner has put the key out of use.
    #[error("the key is disabled; its owner can use it again after `strongroom key enable`")]
    Disabled,
    /// The key's time is over.
    #[error("the key has expired; its owner can give it more time with `strongroom key set`")]
    Expired,
    /// The key is in the store, and stays there until it is deleted.
    #[error("the key is in the encrypted store; `strongroom key delete` deletes it for good")]
    InStore,
    /// The key is in the store already, perhaps under other conditions.
    #[error("the key is in the encrypted store already; `strongroom key show` tells its conditions")]
    StoredAlready,
    /// The key was not made exportable, and never will be.
    #[error("the key was not made exportable: it never leaves the store")]
    NotExportable,
    /// No slot has this number.
    #[error("the store has no such slot; `strongroom slot list` lists them")]
    NoSuchSlot,
    /// The last slot that can open the store.
    #[error("it is the last slot that opens the store; add another first, with `strongroom slot add`")]
    LastSlot,
    /// What is to open the store does not.
    #[error("{0}")]
    Slot(String),
    /// The state file does not take it.
    #[error("{0}")]
    Store(String),
    /// There is no backup, or nothing is restored.
    #[error(transparent)]
    Backup(BackupError),
    /// Nothing is transferred.
    #[error(transparent)]
    Transfer(TransferError),
    /// The vault holds as many identities as it can: remove some.
    #[error("the vault is full; `ssh-add -d` removes a key")]
    Full,
    /// The audit log cannot be written, and nothing is to be done without it: make room on its disk.
    #[error("the audit log cannot be written; make room on its disk, or set `on_full = \"warn\"` in [audit]")]
    Unrecorded,
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

/// Whether this identity may do this for this caller. `needs` is what it must grant: nothing, for a plain signature.
pub fn decide(
    identity: &Identity,
    caller: &Caller,
    operation: &Operation<'_>,
    needs: Grants,
    rules: &Rules,
    unix_now: u64,
) -> Result<Verdict, Refusal> {
    let done = Grants::for_operation(operation);
    if done.without(caller.forbidden) != done {
        return Err(Refusal::Forbidden);
    }
    if needs != Grants::NONE {
        // Nothing about these tells what they are for, so that no restriction to hosts or applications could be kept.
        if identity.key_type.is_sk() || identity.restrictions().next().is_some() {
            return Err(Refusal::NotPermitted("a FIDO or destination-constrained key makes plain ssh signatures only"));
        }
        if !identity.places.iter().any(|place| place.grants.include(needs)) {
            return Err(Refusal::NotGranted);
        }
    }
    if identity.is_unconstrained() {
        return Ok(Verdict { confirm: None });
    }
    let mut out_of_use = identity.places.iter().map(|place| place.is_out_of_use(unix_now));
    if let Some(Some(why)) = out_of_use.clone().next()
        && out_of_use.all(|why| why.is_some())
    {
        return Err(match why {
            OutOfUse::Disabled => Refusal::Disabled,
            OutOfUse::Expired => Refusal::Expired,
        });
    }
    let purpose = match operation {
        Operation::Sign { input: Input::Message(data), .. } => Purpose::read(data, &identity.blob),
        _ => Purpose::Opaque,
    };
    for destinations in identity.restrictions() {
        check_destination(destinations, caller, &purpose, unix_now)?;
    }
    if identity.key_type.is_sk() && rules.restrict_websafe && !purpose.is_ssh() {
        let free = rules.websafe_allow.as_deref().unwrap_or("ssh:*");
        if !application(identity).is_some_and(|application| pattern::matches_list(application, free.as_bytes())) {
            return Err(Refusal::NotWebsafe);
        }
    }
    let confirm = identity.is_confirmed().then(|| confirm_question(identity, caller, operation, &purpose, rules));
    Ok(Verdict { confirm })
}

/// A destination-constrained key signs logins only, on a connection bound to the very session that is logged in to.
fn check_destination(
    destinations: &[Destination],
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
    Route::new(caller, unix_now).permits(destinations, Use::Login(login.user)).map_err(Refusal::NotPermitted)?;
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
    caller.keys.as_ref().is_none_or(|shown| shown.iter().any(|shown| **shown == **identity.sha256()))
}

/// Whether the caller at the end of this route may know of the identity. One route serves a whole listing.
pub fn may_list(identity: &Identity, route: &Route<'_>) -> bool {
    is_shown(identity, route.caller())
        && identity.restrictions().all(|destinations| route.permits(destinations, Use::Listing).is_ok())
}

/// Whether the caller may remove the identity, or add it again with other constraints.
pub fn may_change(identity: &Identity, route: &Route<'_>) -> bool {
    may_list(identity, route)
}

/// Whether the caller may lock and unlock: never from another machine, and never where the door shows it some keys or lets
/// it do some operations only. One attempt to bind is enough to count as remote: `ssh-add` on this machine makes none, and the far side of a
/// forwarding could add binds of its own behind the first.
pub fn may_lock(caller: &Caller) -> bool {
    !caller.bind_attempted && caller.keys.is_none() && caller.forbidden == Grants::NONE
}

/// Whether the caller may make, name and delete keys, and say what they may do: whoever may lock, and owns the vault, whose
/// uid is `owner`.
pub fn may_administer(caller: &Caller, owner: u32) -> bool {
    may_lock(caller) && (caller.uid == owner || caller.uid == 0)
}

/// Whether a provider library's real path is among the allowed (`*` also matches `/`).
pub fn provider_allowed(path: &str, patterns: &str) -> bool {
    pattern::matches_list(path.as_bytes(), patterns.as_bytes())
}

/// Bytes from a peer as one harmless line of text.
pub fn harmless(bytes: &[u8]) -> String {
    prompt::harmless(&String::from_utf8_lossy(bytes))
}

fn confirm_question(
    identity: &Identity,
    caller: &Caller,
    operation: &Operation<'_>,
    purpose: &Purpose<'_>,
    rules: &Rules,
) -> String {
    let use_of = match operation {
        Operation::Sign { .. } => "use of",
        Operation::Decrypt { .. } => "decryption with",
        Operation::Derive { .. } => "derivation of a secret with",
    };
    format!(
        "Allow {use_of} key {}?\nKey fingerprint {}{}{}",
        harmless(identity.comment()),
        identity.fingerprint(rules.fingerprint_hash),
        login_line(identity, caller, purpose, rules),
        caller_line(caller)
    )
}

/// What to ask before a key is allowed to do these operations.
pub fn allow_question(identity: &Identity, caller: &Caller, operations: &str, rules: &Rules) -> String {
    format!(
        "Allow key {} from now on: {operations}?\nKey fingerprint {}{}",
        harmless(identity.comment()),
        identity.fingerprint(rules.fingerprint_hash),
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

/// What to show while a request waits for a person to do something at a device.
pub fn device_notice(
    deed: Deed,
    device: &Device,
    key: &FoundKey,
    identity: &Identity,
    caller: &Caller,
    data: &[u8],
    rules: &Rules,
) -> String {
    format!(
        "{} {} ({}) for key {} {}{}{}",
        match deed {
            Deed::Touch => "Touch",
            Deed::Insert => "Insert",
        },
        prompt::harmless(device.name()),
        prompt::harmless(&key.label),
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

/// What to ask for the passphrase of the store with.
pub fn store_question(caller: &Caller, again: bool) -> String {
    let again = if again { "That is not it. " } else { "" };
    format!("{again}Passphrase of the encrypted store{}: ", caller_line(caller))
}

/// What to ask the holder of a device for its PIN with.
pub fn device_pin_question(device: &Device, status: &Status, caller: &Caller, each_time: bool) -> String {
    let serial = match &*status.serial {
        "" => String::new(),
        serial => format!(" (serial {})", prompt::harmless(serial)),
    };
    let tries = match status.tries_left {
        Some(1) => "\nThis is the LAST TRY: a wrong PIN blocks the device.".to_owned(),
        Some(left) => format!("\n{left} tries are left."),
        None => String::new(),
    };
    let each_time = if each_time { "\nIt wants its PIN for each use of this key." } else { "" };
    format!("Enter PIN for {}{serial}{tries}{each_time}{}: ", prompt::harmless(device.name()), caller_line(caller))
}

/// Whom a login is for and where: the host by its name where the key's constraints list it, else by its key.
fn login_line(identity: &Identity, caller: &Caller, purpose: &Purpose<'_>, rules: &Rules) -> String {
    let login = match purpose {
        Purpose::UserAuth(login) => login,
        Purpose::SshSig { .. } => return "\nsignature over a file or commit (SSHSIG)".to_owned(),
        Purpose::Certificate { .. } | Purpose::Opaque => return String::new(),
    };
    let request = format!("\npublic key authentication request for user \"{}\"", user_name(login.user));
    let Some(bind) = caller.binds.last() else { return request };
    let Some(destinations) = identity.restrictions().next() else {
        return format!("{request} to the host with key {}", fingerprint(&bind.host_key, rules.fingerprint_hash));
    };
    let name = destinations.iter().find(|d| destination::names(&d.to, bind)).map_or(&b""[..], |d| &d.to.host);
    format!("{request} to listed host {}", harmless(name))
}

/// Without the quotation marks that it is shown in: a name must not end its own quotation.
fn user_name(user: &[u8]) -> String {
    harmless(user).replace('"', "'")
}

fn caller_line(caller: &Caller) -> String {
    let program = caller.program.known().map(|p| prompt::harmless(&p.to_string_lossy()));
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        devices::{
            Scheme,
            sk::SkKey,
            soft::{SoftKey, SoftParts},
        },
        public_key::{Blob, Curve, KeyType},
        rfc4251::Put,
        vault::{
            key::{Bind, Constraints, Destination, Hop, HostKey, Place, PrivateKey},
            purpose::tests::{key, userauth},
        },
    };
    use std::sync::Arc;
    use zeroize::Zeroizing;

    /// A soft identity. Policy never looks at the private half, so any will do.
    fn soft(constraints: Constraints) -> Identity {
        let point: Vec<u8> = [
            "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
            "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5",
        ]
        .concat()
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
        let private = SoftKey::new(&SoftParts::Ecdsa { curve: Curve::P256, scalar: &[1], point: &point }).unwrap();
        let place = Place {
            key: PrivateKey::Soft(Arc::new(private)),
            comment: b"me@home".as_slice().into(),
            constraints,
            grants: Grants::NONE,
            rank: 0,
            added: true,
            name: "".into(),
        };
        Identity::new(&key(1), KeyType::Ed25519, vec![place])
    }

    fn sk(application: &[u8]) -> Identity {
        let public = PublicKey::SkEd25519(&[1; 32], application);
        let handle = Zeroizing::new(vec![1]);
        let private = SkKey::new(&public, application, 1, handle, b"", "internal".into()).unwrap();
        let place = Place {
            key: PrivateKey::Sk(Arc::new(private)),
            comment: b"token".as_slice().into(),
            constraints: Constraints::default(),
            grants: Grants::NONE,
            rank: 0,
            added: true,
            name: "".into(),
        };
        Identity::new(&public.to_blob(), KeyType::SkEd25519, vec![place])
    }

    fn signing(data: &[u8]) -> Operation<'_> {
        Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(data.into()) }
    }

    fn hop(user: &str, host: &str, keys: &[u8]) -> Hop {
        let keys = keys.iter().map(|&b| HostKey { blob: key(b).into(), is_ca: false }).collect();
        Hop { user: user.as_bytes().into(), host: host.as_bytes().into(), keys }
    }

    /// May log in to `a` (key 2) as anybody, and from there to `b` (key 3) as r….
    fn restricted(confirm: bool) -> Identity {
        let destinations = [
            Destination { from: Hop::default(), to: hop("", "a", &[2]) },
            Destination { from: hop("", "a", &[2]), to: hop("r*", "b", &[3]) },
        ];
        soft(Constraints { destinations: destinations.into(), confirm, ..Constraints::default() })
    }

    fn caller(binds: &[(u8, &[u8], bool)]) -> Caller {
        let bind = |&(host, sid, forwarding): &(u8, &[u8], bool)| Bind {
            host_key: key(host).into(),
            session_id: sid.into(),
            forwarding,
        };
        Caller { binds: binds.iter().map(bind).collect(), bind_attempted: !binds.is_empty(), ..Caller::default() }
    }

    fn decided(identity: &Identity, caller: &Caller, data: &[u8]) -> Result<Option<String>, Refusal> {
        decide(identity, caller, &signing(data), Grants::NONE, &Rules::default(), 0).map(|verdict| verdict.confirm)
    }

    fn sshsig() -> Vec<u8> {
        let mut data = b"SSHSIG".to_vec();
        [&b"git"[..], b"", b"sha512", &[7; 64]].iter().for_each(|part| data.put_string(part));
        data
    }

    #[test]
    fn a_constrained_key_signs_the_login_it_is_bound_to() {
        let identity = restricted(false);
        let login =
            |sid: &[u8], user: &[u8], host: Option<u8>| userauth(sid, user, &identity.blob, host.map(key).as_deref());
        let direct: &[(u8, &[u8], bool)] = &[(2, b"one", false)];
        let through: &[(u8, &[u8], bool)] = &[(2, b"one", true), (3, b"two", false)];
        for (binds, data, good, why) in [
            (direct, login(b"one", b"u", None), true, "the first hop need not name the host's key"),
            (direct, login(b"one", b"u", Some(2)), true, "but may"),
            (direct, login(b"one", b"u", Some(3)), false, "and then the right one"),
            (direct, login(b"two", b"u", None), false, "another session"),
            (direct, sshsig(), false, "no login"),
            (direct, b"anything".to_vec(), false, "no login at all"),
            (&[], login(b"one", b"u", None), false, "not bound"),
            (&[(2, b"one", true)], login(b"one", b"u", Some(2)), false, "bound for forwarding"),
            (through, login(b"two", b"root", Some(3)), true, "the second hop"),
            (through, login(b"two", b"root", None), false, "must name the host's key"),
            (through, login(b"two", b"root", Some(2)), false, "of the last host"),
            (through, login(b"one", b"root", Some(3)), false, "in the last session"),
            (through, login(b"two", b"alice", Some(3)), false, "as that user"),
        ] {
            let result = decided(&identity, &caller(binds), &data);
            assert_eq!(result.is_ok(), good, "{why}: {result:?}");
            assert!(good || matches!(result, Err(Refusal::NotPermitted(_))), "{why}: {result:?}");
        }
    }

    #[test]
    fn the_question_comes_after_the_destination() {
        let identity = restricted(true);
        let data = userauth(b"one", b"root", &identity.blob, None);
        let question = decided(&identity, &caller(&[(2, b"one", false)]), &data).unwrap().unwrap();
        assert!(question.starts_with("Allow use of key me@home?\nKey fingerprint SHA256:"), "{question}");
        assert!(
            question.contains("\npublic key authentication request for user \"root\" to listed host"),
            "{question}"
        );
        assert!(matches!(decided(&identity, &caller(&[]), &data), Err(Refusal::NotPermitted(_))), "nobody is asked");
    }

    #[test]
    fn a_question_cannot_be_dressed_up() {
        let mut identity = soft(Constraints { confirm: true, ..Constraints::default() });
        identity.places[0].comment = b"x\nKey fingerprint SHA256:fake\xe2\x80\xae\xff".as_slice().into();
        let data = userauth(b"sid", b"me\" to listed host\n", &identity.blob, None);
        let question = decided(&identity, &Caller::default(), &data).unwrap().unwrap();
        assert_eq!(question.lines().count(), 3, "{question}");
        assert!(!question.contains('\u{202e}'), "{question}");
        assert!(!question.contains("user \"me\" to listed host"), "a quote in the user's name: {question}");
    }

    #[test]
    fn web_keys_sign_ssh_messages_only() {
        let web = sk(b"https://example.com");
        let login = userauth(b"sid", b"u", &web.blob, None);
        let mut named = login.clone();
        let at = named.windows(11).position(|w| w == b"ssh-ed25519").unwrap();
        named.splice(at - 4..at + 11, {
            let mut name = Vec::new();
            name.put_string(b"sk-ssh-ed25519@openssh.com");
            name
        });
        let rules = |allow: Option<&str>, restrict| Rules {
            restrict_websafe: restrict,
            websafe_allow: allow.map(Into::into),
            ..Rules::default()
        };
        for (identity, data, rules, good) in [
            (&web, &named[..], rules(None, true), true),
            (&web, &login, rules(None, true), false),
            (&web, &sshsig(), rules(None, true), true),
            (&web, b"challenge", rules(None, true), false),
            (&web, b"challenge", rules(None, false), true),
            (&web, b"challenge", rules(Some("https://example.*"), true), true),
            (&web, b"challenge", rules(Some("!https://example.com,*"), true), false),
            (&sk(b"ssh:"), b"challenge", rules(None, true), true),
            (&sk(b"ssh:work"), b"challenge", rules(None, true), true),
            (&sk(b"xssh:"), b"challenge", rules(None, true), false),
            (&sk(b""), b"challenge", rules(Some(""), true), false),
            (&sk(b""), b"challenge", rules(Some("ssh:*,"), true), false),
        ] {
            let result = decide(identity, &Caller::default(), &signing(data), Grants::NONE, &rules, 0);
            let application = Blob::parse(&identity.blob).map(|_| application(identity));
            assert_eq!(result.is_ok(), good, "{application:?} {rules:?}: {result:?}");
        }
    }

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
        let forbidden = Grants { derive: true, ..Grants::NONE };
        let few_operations = Caller { forbidden, ..Caller::default() };
        for caller in [failed, forwarded, disguised, few_keys, few_operations] {
            assert!(!may_lock(&caller), "{caller:?}");
        }
    }

    #[test]
    fn only_the_owner_and_root_administer() {
        let caller = |uid| Caller { uid, ..Caller::default() };
        assert!(may_administer(&caller(1000), 1000) && may_administer(&caller(0), 1000));
        assert!(!may_administer(&caller(1001), 1000) && !may_administer(&caller(1000), 0));
        let forwarded = Caller { bind_attempted: true, ..caller(1000) };
        assert!(!may_administer(&forwarded, 1000));
    }

    #[test]
    fn a_user_cannot_end_its_quotation() {
        assert_eq!(user_name(b"root\" to listed host\n"), "root' to listed host\u{fffd}");
    }
}
