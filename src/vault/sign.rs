//! The one path for the use of a key: find it, decide, ask whoever must be asked, have it done in the first place that
//! can. Knows policy and devices; not what the answer looks like on the wire.

use std::{borrow::Cow, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::{
    sync::futures::OwnedNotified,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::debug;

use super::{
    Vault,
    audit::{MEMORY, Note},
    key::{Caller, Grants, Identity, Place, PrivateKey},
    person,
    pins::{Turn, WantedPin},
    policy::{self, Refusal, Verdict},
    stored::{STORE, StoredKey},
    unix_now,
};
use crate::{
    devices::{
        Deed, Device, DeviceError, FoundKey, Hash, Input, Operation, Outcome, Patience, Scheme, Signature, sk::SkKey,
        soft::kind,
    },
    public_key::KeyType,
};

/// How long a use may take when nobody has to be asked. A device's own time is shorter.
const DEADLINE: Duration = Duration::from_secs(30);

/// A refusal by a device that cannot work comes no sooner than this after the request, and up to as much later: a client that asks
/// again and again without a pause would otherwise take the processor from everybody else.
const PACE: Duration = Duration::from_millis(100);

/// What a request becomes: most are answered where they were read, the others by a future. Dropping the future cancels.
pub enum Answer<T> {
    /// Here it is.
    Now(T),
    /// It waits for arithmetic, a device or a person.
    Later(Pin<Box<dyn Future<Output = T> + Send>>),
}

/// One use of a key.
pub struct Use<'a> {
    /// The identity's blob.
    pub blob: &'a [u8],
    /// What is asked of it.
    pub asked: Asked<'a>,
    /// The caller's own deadline; the vault's and the device's apply where they are sooner.
    pub deadline: Option<Instant>,
    /// Whether it is for keys only that ssh is offered.
    pub offered: bool,
    /// Whether a device's full queue makes it wait, as a plain sign request does, rather than be refused.
    pub waits_for_place: bool,
}

/// What is asked of a key.
pub enum Asked<'a> {
    /// What a sign request of RFC 9987, section 3.6, asks: the scheme follows from the key's type and the flags.
    Ssh {
        /// What is signed.
        data: &'a [u8],
        /// The hash, for RSA keys.
        rsa_hash: Hash,
    },
    /// An operation by name, which the key must grant.
    Operation(Operation<'a>),
}

impl Asked<'_> {
    /// What it is called: `sign`, `decrypt` or `derive`.
    fn name(&self) -> &'static str {
        match self {
            Self::Ssh { .. } | Self::Operation(Operation::Sign { .. }) => "sign",
            Self::Operation(Operation::Decrypt { .. }) => "decrypt",
            Self::Operation(Operation::Derive { .. }) => "derive",
        }
    }

    /// What the key does, by its type.
    pub(super) fn operation(&self, key_type: KeyType) -> Operation<'_> {
        match self {
            Self::Ssh { data, rsa_hash } => {
                Operation::Sign { scheme: ssh_scheme(key_type, *rsa_hash), input: Input::Message(Cow::Borrowed(data)) }
            }
            Self::Operation(operation) => operation.borrowed(),
        }
    }

    /// What the key must grant. A plain signature needs no grant, unless the key is not for ssh.
    fn needs(&self, identity: &Identity) -> Grants {
        match self {
            Self::Ssh { .. } if !identity.places.iter().any(Place::is_for_ssh) => Grants { sign: true, ..Grants::NONE },
            Self::Ssh { .. } => Grants::NONE,
            Self::Operation(operation) => Grants::for_operation(operation),
        }
    }
}

/// How much later than [`PACE`] a connection is refused: each after another time, so that those who are refused together do not all
/// come back together.
fn delay(connection: u64) -> Duration {
    // The fractions of multiples of the golden ratio lie far apart, however many there are.
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let fraction = connection.wrapping_mul(GOLDEN) >> 32;
    PACE.mul_f64(fraction as f64 / f64::from(u32::MAX))
}

fn ssh_scheme(key_type: KeyType, rsa_hash: Hash) -> Scheme {
    match key_type {
        // An X25519 key signs nothing, and says so.
        KeyType::Ed25519 | KeyType::Ed25519Expanded | KeyType::X25519 => Scheme::Ed25519,
        KeyType::Ecdsa(curve) => Scheme::Ecdsa(Hash::of_curve(curve)),
        KeyType::Rsa => Scheme::RsaPkcs1v15(rsa_hash),
        KeyType::MlDsa44Ed25519 => Scheme::MlDsa44Ed25519,
        KeyType::SkEd25519 | KeyType::SkEcdsa => Scheme::Sk,
    }
}

/// A use on its way, when it is not answered at once.
struct Errand {
    caller: Arc<Caller>,
    operation: Arc<Operation<'static>>,
    needs: Grants,
    offered: bool,
    verdict: Verdict,
    waits_for_place: bool,
    deadline: Instant,
}

impl Vault {
    /// Uses a key, after policy has agreed and whoever must be asked has. There is no other way to a private key. The
    /// audit log has a line of it, whatever comes of it.
    pub fn operate(self: &Arc<Self>, caller: &Arc<Caller>, wanted: Use<'_>) -> Answer<Result<Outcome, Refusal>> {
        let mut note = match self.audit.admit_here(caller, wanted.asked.name()) {
            Ok(note) => note,
            Err(refusal) => return Answer::Now(Err(refusal)),
        };
        let found = if wanted.offered { self.find(caller, wanted.blob) } else { self.find_key(caller, wanted.blob) };
        let identity = match found {
            Ok(identity) if identity.is_offered() || !wanted.offered => identity,
            Ok(_) => return Answer::Now(note.blob(wanted.blob).end(Err(Refusal::NoSuchKey))),
            Err(refusal) => return Answer::Now(note.blob(wanted.blob).end(Err(refusal))),
        };
        let operation = wanted.asked.operation(identity.key_type);
        note.set_use(&identity, &operation, caller);
        if identity.is_stored()
            && let Err(refusal) = note.insist()
        {
            return Answer::Now(note.end(Err(refusal)));
        }
        if let Asked::Ssh { data, rsa_hash } = wanted.asked
            && identity.is_unconstrained()
            && !caller.forbidden.sign
            && let Some((place, signature)) = self.sign_on_the_spot(&identity, rsa_hash, data)
        {
            note.set_device(place);
            return Answer::Now(note.end(signature.map(Outcome::Signature).map_err(Refusal::from)));
        }
        // From here on a lock is noticed; one that came first is found by looking again.
        let locks = Arc::clone(&self.locks).notified_owned();
        if let Err(refusal) = self.check_open() {
            return Answer::Now(note.end(Err(refusal)));
        }
        if wanted.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Answer::Now(note.end(Err(Refusal::Timeout)));
        }
        match self.consider(caller, &identity, &wanted.asked, &operation) {
            Ok((needs, verdict)) => {
                let deadline = Instant::now() + self.patience(&identity, &verdict);
                let errand = Errand {
                    operation: Arc::new(operation.into_owned()),
                    needs,
                    offered: wanted.offered,
                    verdict,
                    waits_for_place: wanted.waits_for_place,
                    deadline: wanted.deadline.map_or(deadline, |own| own.min(deadline)),
                    caller: Arc::clone(caller),
                };
                Answer::Later(Box::pin(Arc::clone(self).run(identity, errand, note.into_note(), locks)))
            }
            Err(refusal) => Answer::Now(note.end(Err(refusal))),
        }
    }

    /// Signs with a key that is here and quick, and tells where.
    fn sign_on_the_spot(
        &self,
        identity: &Identity,
        rsa_hash: Hash,
        data: &[u8],
    ) -> Option<(&'static str, Result<Signature, DeviceError>)> {
        let scheme = ssh_scheme(identity.key_type, rsa_hash);
        match &identity.places.first()?.key {
            PrivateKey::Soft(key) if key.is_fast() => Some((MEMORY, key.sign(scheme, data))),
            PrivateKey::Stored(key) if kind::is_fast(key.key_type()) => {
                let signature = key.sign(scheme, data)?;
                self.access.note_use();
                Some((STORE, signature))
            }
            _ => None,
        }
    }

    /// Decides about a use, before anything is done about it: what it needs, and what policy says.
    pub(super) fn consider(
        &self,
        caller: &Caller,
        identity: &Identity,
        asked: &Asked<'_>,
        operation: &Operation<'_>,
    ) -> Result<(Grants, Verdict), Refusal> {
        if !identity.is_unconstrained() {
            // Read here, for the question to a person.
            caller.program();
        }
        let needs = asked.needs(identity);
        let verdict = policy::decide(identity, caller, operation, needs, &self.settings().rules, unix_now())?;
        Ok((needs, verdict))
    }

    /// How long the use may take: longer where a person confirms, touches or may have to type a PIN.
    fn patience(&self, identity: &Identity, verdict: &Verdict) -> Duration {
        let alone = identity.places.iter().all(|place| match place.key {
            PrivateKey::Soft(_) => true,
            PrivateKey::Stored(_) => self.store_is_open(),
            PrivateKey::Sk(_) | PrivateKey::OnDevice(..) => false,
        });
        if verdict.confirm.is_none() && alone { DEADLINE } else { self.settings().person_deadline.max(DEADLINE) }
    }

    /// Until it is done, its deadline, or a lock.
    #[expect(clippy::manual_async_fn, reason = "an async fn keeps what it is given twice")]
    fn run(
        self: Arc<Self>,
        identity: Arc<Identity>,
        errand: Errand,
        mut note: Note,
        locks: OwnedNotified,
    ) -> impl Future<Output = Result<Outcome, Refusal>> + Send {
        async move {
            let result = tokio::select! {
                biased;
                () = locks => Err(self.check_open().err().unwrap_or(Refusal::Locked)),
                result = self.use_in_time(identity, &errand, &mut note) => result,
            };
            note.end(result)
        }
    }

    async fn use_in_time(
        self: &Arc<Self>,
        identity: Arc<Identity>,
        errand: &Errand,
        note: &mut Note,
    ) -> Result<Outcome, Refusal> {
        let soonest = errand.deadline.min(Instant::now() + PACE + delay(errand.caller.connection));
        let result = timeout_at(errand.deadline, self.use_as_agreed(identity, errand, note)).await;
        let result = result.unwrap_or(Err(Refusal::Timeout));
        if let Err(Refusal::Device(error)) = &result
            && error.lets_another_try()
        {
            sleep_until(soonest).await;
        }
        result
    }

    async fn use_as_agreed(
        self: &Arc<Self>,
        identity: Arc<Identity>,
        errand: &Errand,
        note: &mut Note,
    ) -> Result<Outcome, Refusal> {
        let identity = match &errand.verdict.confirm {
            Some(question) => self.confirm(identity, &errand.caller, question).await?,
            None => identity,
        };
        self.use_places(&identity, errand, note).await
    }

    /// Asks a person, and returns the identity if they agree and it is still the same.
    pub(super) async fn confirm(
        &self,
        identity: Arc<Identity>,
        caller: &Caller,
        question: &str,
    ) -> Result<Arc<Identity>, Refusal> {
        // Not held while a person thinks: a key that is removed meanwhile is wiped at once.
        let asked_for = Arc::downgrade(&identity);
        drop(identity);
        self.prompter.confirm(caller.uid, question).await?;
        let identity = asked_for.upgrade().ok_or(Refusal::NoSuchKey)?;
        // Nor is one used that was replaced, perhaps under other constraints, or that has expired.
        self.check_same(caller, &identity)
    }

    /// The first place that can has it done.
    async fn use_places(
        self: &Arc<Self>,
        identity: &Arc<Identity>,
        errand: &Errand,
        note: &mut Note,
    ) -> Result<Outcome, Refusal> {
        let mut identity = Arc::clone(identity);
        loop {
            let (result, absent) = self.try_places(&identity, errand, note).await;
            if absent.is_empty() || !matches!(&result, Err(Refusal::Device(error)) if error.lets_another_try()) {
                return result;
            }
            let Errand { caller, operation, deadline, .. } = errand;
            let ask = |(device, key): &(&Device, &FoundKey)| {
                self.ask_for(Deed::Insert, device, key, &identity, caller, operation)
            };
            let asking: Vec<_> = absent.iter().map(ask).collect();
            let back = person::any_is_back(absent.iter().map(|(device, _)| *device));
            if timeout_at(*deadline, back).await.is_err() {
                return Err(DeviceError::Absent.into());
            }
            drop(asking);
            identity = self.check_same(caller, &identity)?;
        }
    }

    /// The same, without waiting for a device; besides the result, the absent devices that may be waited for, with the
    /// key on them.
    async fn try_places<'a>(
        self: &Arc<Self>,
        identity: &'a Arc<Identity>,
        errand: &Errand,
        note: &mut Note,
    ) -> (Result<Outcome, Refusal>, Vec<(&'a Device, &'a FoundKey)>) {
        let (mut result, mut absent) = (Err(Refusal::NoSuchKey), Vec::new());
        let now = unix_now();
        let serves = |place: &&Place| {
            place.grants.include(errand.needs)
                && (place.is_for_ssh() || !errand.offered)
                && place.is_out_of_use(now).is_none()
        };
        for place in identity.places.iter().filter(serves) {
            note.set_device(place.key.place());
            result = self.use_place(identity, place, errand).await;
            match &result {
                Err(Refusal::Device(error)) if error.lets_another_try() => {
                    debug!(key = %identity.name(), device = place.key.device(), "not in this place: {error}");
                    if let PrivateKey::OnDevice(device, key) = &place.key
                        && *error == DeviceError::Absent
                        && device.settings().wait
                    {
                        absent.push((device, &**key));
                    }
                }
                _ => break,
            }
        }
        (result, absent)
    }

    async fn use_place(
        self: &Arc<Self>,
        identity: &Arc<Identity>,
        place: &Place,
        errand: &Errand,
    ) -> Result<Outcome, Refusal> {
        let Errand { caller, operation, deadline, .. } = errand;
        match &place.key {
            PrivateKey::Soft(key) if key.is_fast() => Ok(key.operate(operation)?),
            PrivateKey::Soft(key) => {
                let (key, operation) = (Arc::clone(key), Arc::clone(operation));
                let length = kind::length(key.key_type(), &identity.blob);
                Ok(self.compute.run(caller.connection, length, move || key.operate(&operation)).await?)
            }
            PrivateKey::Sk(key) => match &**operation {
                Operation::Sign { scheme: Scheme::Sk, input: Input::Message(data) } => {
                    self.sign_sk(identity, key, caller, data, *deadline).await
                }
                _ => Err(DeviceError::unsupported("a FIDO key makes ssh's signatures only").into()),
            },
            PrivateKey::OnDevice(device, key) => self.use_device(identity, device, key, errand).await,
            PrivateKey::Stored(key) => self.use_stored(identity, key, errand).await,
        }
    }

    /// Uses a key of the store, which is opened before where it is locked.
    async fn use_stored(
        self: &Arc<Self>,
        identity: &Arc<Identity>,
        key: &Arc<StoredKey>,
        errand: &Errand,
    ) -> Result<Outcome, Refusal> {
        let Errand { caller, operation, .. } = errand;
        let mut waited = false;
        loop {
            if !self.store_is_open() {
                self.open_store(caller).await?;
                waited = true;
            }
            if waited {
                // Meanwhile it may have been deleted, or put under other constraints.
                self.check_same(caller, identity)?;
            }
            match self.access.with_master(|master| key.open(master)) {
                Ok(opened) => opened?,
                // It was locked this moment.
                Err(_) => continue,
            }
            self.access.note_use();
            let result = if kind::is_fast(key.key_type()) {
                key.operate(operation)
            } else {
                let (key, operation) = (Arc::clone(key), Arc::clone(operation));
                let length = kind::length(key.key_type(), &identity.blob);
                let work = move || key.operate(&operation).transpose();
                self.compute.run(caller.connection, length, work).await.transpose()
            };
            // Nothing comes of it when the store was locked meanwhile, or the key deleted: once more, by the same ways.
            if let Some(result) = result {
                return Ok(result?);
            }
            waited = true;
        }
    }

    /// Uses a key on a device: a notice while it waits for a touch, a login when it asks for one, once; and, for a key that
    /// wants the PIN given for each use, one use after the other.
    async fn use_device(
        self: &Arc<Self>,
        identity: &Arc<Identity>,
        device: &Device,
        key: &Arc<FoundKey>,
        errand: &Errand,
    ) -> Result<Outcome, Refusal> {
        let Errand { caller, operation, deadline, waits_for_place, .. } = errand;
        let mut key = Arc::clone(key);
        let patience = Patience { deadline: Some(*deadline), waits_for_place: *waits_for_place };
        let (mut logged_in, mut given, mut turn) = (false, false, None);
        loop {
            if turn.is_none() {
                turn = self.pins.turn(device, &key.slot).await;
            }
            let asks = key.touch && !device.is_locked() && device.is_available();
            let asking = asks.then(|| self.ask_for(Deed::Touch, device, &key, identity, caller, operation));
            let result = if !given && turn.as_ref().is_some_and(Turn::has_leftover) {
                Err(DeviceError::PinEachTime)
            } else {
                device.operate(caller.connection, &key, Arc::clone(operation), patience).await
            };
            drop(asking);
            match result {
                Err(DeviceError::PinEachTime) if turn.is_none() => self.pins.take_turns(device, &key.slot),
                Err(DeviceError::PinRequired | DeviceError::PinEachTime)
                    if !given && (turn.is_some() || !logged_in) =>
                {
                    let wanted = match &turn {
                        Some(turn) => {
                            turn.gives();
                            given = true;
                            WantedPin::GivenNow
                        }
                        None => WantedPin::Any,
                    };
                    self.login(device, caller, wanted).await?;
                    // A login may have shown what the key can do besides.
                    let held = self.check_same(caller, identity)?;
                    key = Arc::clone(held.on(device).ok_or(Refusal::NoSuchKey)?);
                    logged_in = true;
                }
                // The driver sent by itself what the token had accepted before.
                Err(error @ (DeviceError::PinWrong { .. } | DeviceError::PinBlocked)) => {
                    self.accepted_pin_refused(device).await;
                    return Err(error.into());
                }
                result => {
                    // What is given for a signature is good for no less and no more.
                    if let (Ok(Outcome::Signature(_)), Some(turn)) = (&result, &turn) {
                        turn.used();
                    }
                    return Ok(result?);
                }
            }
        }
    }

    /// Signs with an authenticator: a notice while it waits for a touch, a PIN when it asks for one, once.
    async fn sign_sk(
        &self,
        identity: &Arc<Identity>,
        key: &SkKey,
        caller: &Caller,
        data: &[u8],
        deadline: Instant,
    ) -> Result<Outcome, Refusal> {
        let rules = &self.settings().rules;
        let notice = || {
            key.wants_touch()
                .then(|| self.prompter.notice(caller.uid, &policy::touch_notice(identity, caller, data, rules)))
                .flatten()
        };
        let shown = notice();
        match key.sign(data, None, deadline).await {
            Err(DeviceError::PinRequired) => {
                drop(shown);
                let question = policy::pin_question(identity, caller, rules, key.wants_touch());
                let pin = self.prompter.pin(caller.uid, &question).await?;
                self.check_same(caller, identity)?;
                let _shown = notice();
                Ok(Outcome::Signature(key.sign(data, Some(&pin), deadline).await?))
            }
            result => Ok(Outcome::Signature(result?)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        devices::{
            Driver, Settings, Slot,
            in_process::InProcess,
            scripted::{Control, Script, Scripted},
        },
        prompt::{self, Prompter},
        public_key::PublicKey,
        vault::{Parts, registry::Terms, store::Store},
    };

    #[test]
    fn those_who_are_refused_together_do_not_come_back_together() {
        let mut delays: Vec<_> = (1000..1064).map(delay).collect();
        delays.sort_unstable();
        assert!(delays.last().unwrap() <= &PACE);
        let widest = delays.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(widest < PACE / 32, "{widest:?}");
    }

    #[tokio::test]
    async fn a_key_that_is_not_for_ssh_signs_for_ssh_only_where_it_grants_signatures() {
        let parts = Parts::new(Prompter::new(prompt::Settings::default()), Store::in_memory().unwrap());
        let vault = Vault::new(crate::vault::Settings::default(), parts);
        let blob = PublicKey::Ed25519(&[1; 32]).to_blob();
        let known = FoundKey {
            slot: Slot([1].into()),
            blob: blob.as_slice().into(),
            certificates: Vec::new(),
            label: String::new(),
            schemes: vec![Scheme::Ed25519],
            decrypts: Vec::new(),
            derives: Vec::new(),
            touch: false,
            ssh: false,
            note: String::new(),
        };
        let engine = || InProcess::<Scripted>::new(|| Control::new(Script::parse("").unwrap()));
        let ask = || {
            let asked = Asked::Ssh { data: b"data", rsa_hash: Hash::Sha256 };
            let wanted = Use { blob: &blob, asked, deadline: None, offered: false, waits_for_place: false };
            vault.operate(&Arc::new(Caller::default()), wanted)
        };
        let device = Device::start("one", Scripted::KIND, Settings::default(), engine());
        let add = |device, grants| {
            vault.add_device(device, Terms { grants, ..Terms::default() }, std::slice::from_ref(&known)).unwrap();
        };
        add(device, Grants { sign: false, ..Grants::ALL });
        assert!(matches!(ask(), Answer::Now(Err(Refusal::NotGranted))));
        let device = Device::start("two", Scripted::KIND, Settings::default(), engine());
        add(device, Grants::ALL);
        assert!(matches!(ask(), Answer::Later(_)));
    }
}
