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
    key::{Caller, Grants, Identity, Place, PrivateKey},
    policy::{self, Refusal, Verdict},
    unix_now,
};
use crate::{
    devices::{Device, DeviceError, FoundKey, Hash, Input, Operation, Outcome, Patience, Scheme, sk::SkKey},
    public_key::KeyType,
    sys::peer,
};

/// How long a use may take when nobody has to be asked. A device's own time is shorter.
const DEADLINE: Duration = Duration::from_secs(30);

/// A refusal by a device that cannot work comes no sooner than this after the request: a client that asks again and again
/// without a pause would otherwise take the processor from everybody else.
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
    /// What the key does, by its type.
    fn operation(&self, key_type: KeyType) -> Operation<'_> {
        match self {
            Self::Ssh { data, rsa_hash } => {
                Operation::Sign { scheme: ssh_scheme(key_type, *rsa_hash), input: Input::Message(Cow::Borrowed(data)) }
            }
            Self::Operation(operation) => operation.borrowed(),
        }
    }

    /// What the key must grant; a plain signature needs no grant.
    fn needs(&self) -> Grants {
        match self {
            Self::Ssh { .. } => Grants::NONE,
            Self::Operation(operation) => Grants::for_operation(operation),
        }
    }
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
    operation: Operation<'static>,
    needs: Grants,
    verdict: Verdict,
    waits_for_place: bool,
    deadline: Instant,
}

impl Vault {
    /// Uses a key, after policy has agreed and whoever must be asked has. There is no other way to a private key.
    pub fn operate(self: &Arc<Self>, caller: &Arc<Caller>, wanted: Use<'_>) -> Answer<Result<Outcome, Refusal>> {
        let identity = match self.find(caller, wanted.blob) {
            Ok(identity) => identity,
            Err(refusal) => return Answer::Now(Err(refusal)),
        };
        if let Asked::Ssh { data, rsa_hash } = wanted.asked
            && let [Place { key: PrivateKey::Soft(key), .. }, ..] = &*identity.places
            && identity.is_unconstrained()
            && key.is_fast()
        {
            let signature = key.sign(ssh_scheme(identity.key_type, rsa_hash), data);
            return Answer::Now(signature.map(Outcome::Signature).map_err(Refusal::from));
        }
        // From here on a lock is noticed; one that came first is found by looking again.
        let locks = Arc::clone(&self.locks).notified_owned();
        if let Err(refusal) = self.check_open() {
            return Answer::Now(Err(refusal));
        }
        let caller = if identity.is_unconstrained() { Arc::clone(caller) } else { identified(caller) };
        let operation = wanted.asked.operation(identity.key_type);
        let rules = &self.settings().rules;
        let needs = wanted.asked.needs();
        match policy::decide(&identity, &caller, &operation, needs, rules, unix_now()) {
            Ok(verdict) => {
                let deadline = Instant::now() + self.patience(&identity, &verdict);
                let errand = Errand {
                    operation: operation.into_owned(),
                    needs,
                    verdict,
                    waits_for_place: wanted.waits_for_place,
                    deadline: wanted.deadline.map_or(deadline, |own| own.min(deadline)),
                    caller,
                };
                Answer::Later(Box::pin(Arc::clone(self).run(identity, errand, locks)))
            }
            Err(refusal) => Answer::Now(Err(refusal)),
        }
    }

    /// How long the use may take: longer where a person confirms, touches or may have to type a PIN.
    fn patience(&self, identity: &Identity, verdict: &Verdict) -> Duration {
        let alone = identity.places.iter().all(|place| matches!(place.key, PrivateKey::Soft(_)));
        if verdict.confirm.is_none() && alone { DEADLINE } else { self.settings().person_deadline.max(DEADLINE) }
    }

    async fn run(
        self: Arc<Self>,
        identity: Arc<Identity>,
        errand: Errand,
        locks: OwnedNotified,
    ) -> Result<Outcome, Refusal> {
        let work = async {
            let identity = match &errand.verdict.confirm {
                Some(question) => self.confirm(identity, &errand.caller, question).await?,
                None => identity,
            };
            self.use_places(&identity, &errand).await
        };
        let paced = async {
            let soonest = errand.deadline.min(Instant::now() + PACE);
            let result = timeout_at(errand.deadline, work).await.unwrap_or(Err(Refusal::Timeout));
            if let Err(Refusal::Device(error)) = &result
                && error.lets_another_try()
            {
                sleep_until(soonest).await;
            }
            result
        };
        tokio::select! {
            biased;
            () = locks => Err(self.check_open().err().unwrap_or(Refusal::Locked)),
            result = paced => result,
        }
    }

    /// Asks a person, and returns the identity if they agree and it is still the same.
    async fn confirm(
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
        self.check_same(caller, &identity)?;
        Ok(identity)
    }

    /// The first place that can has it done.
    async fn use_places(self: &Arc<Self>, identity: &Arc<Identity>, errand: &Errand) -> Result<Outcome, Refusal> {
        let mut result = Err(Refusal::NoSuchKey);
        for place in identity.places.iter().filter(|place| place.grants.include(errand.needs)) {
            result = self.use_place(identity, place, errand).await;
            match &result {
                Err(Refusal::Device(error)) if error.lets_another_try() => {
                    debug!(key = %identity.name(), device = place.key.device(), "not in this place: {error}");
                }
                _ => break,
            }
        }
        result
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
                let (key, operation) = (Arc::clone(key), operation.clone());
                Ok(self.compute.run(caller.connection, move || key.operate(&operation)).await?)
            }
            PrivateKey::Sk(key) => match operation {
                Operation::Sign { scheme: Scheme::Sk, input: Input::Message(data) } => {
                    self.sign_sk(identity, key, caller, data, *deadline).await
                }
                _ => Err(DeviceError::unsupported("a FIDO key makes ssh's signatures only").into()),
            },
            PrivateKey::OnDevice(device, key) => self.use_device(identity, device, key, errand).await,
        }
    }

    /// Uses a key on a device: a notice while it waits for a touch, a login when it asks for one, once.
    async fn use_device(
        self: &Arc<Self>,
        identity: &Arc<Identity>,
        device: &Device,
        key: &FoundKey,
        errand: &Errand,
    ) -> Result<Outcome, Refusal> {
        let Errand { caller, operation, deadline, waits_for_place, .. } = errand;
        let patience = Patience { deadline: Some(*deadline), waits_for_place: *waits_for_place };
        let notice = || {
            let data = match operation {
                Operation::Sign { input: Input::Message(data), .. } => data,
                _ => &[][..],
            };
            let rules = &self.settings().rules;
            key.touch
                .then(|| self.prompter.notice(caller.uid, &policy::touch_notice(identity, caller, data, rules)))
                .flatten()
        };
        let mut logged_in = false;
        loop {
            let shown = notice();
            match device.operate(caller.connection, key, operation.clone(), patience).await {
                Err(DeviceError::PinRequired) if !logged_in => {
                    drop(shown);
                    self.login(device, caller).await?;
                    self.check_same(caller, identity)?;
                    logged_in = true;
                }
                result => return Ok(result?),
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

/// The caller with its program's name, for a question to a person.
pub(super) fn identified(caller: &Arc<Caller>) -> Arc<Caller> {
    match (&caller.program, caller.pid) {
        (None, Some(pid)) => Arc::new(Caller { program: peer::program(pid), ..Caller::clone(caller) }),
        _ => Arc::clone(caller),
    }
}
