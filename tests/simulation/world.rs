//! What is known of a run from outside, and what must hold: the trace, the requests in flight, the invariants. Knows
//! requests and answers; not how they travel.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use strongroom::{
    agent::wire::number,
    devices::{DeviceError, Outcome},
    public_key::PublicKey,
    rfc4251::Reader,
    vault::policy::Refusal,
};
use tokio::time::Instant;

use crate::{
    keys::{self, CONFIRMED, DOUBLE, SHARED, SOFT, own, touched},
    plan::{Plan, Request},
};

/// Timers tick in milliseconds; a chain of three may be late by as many.
const SLACK: Duration = Duration::from_millis(5);
/// How long a person, or whatever else on the way, may take (`Settings::person_deadline`).
pub const PERSON: Duration = Duration::from_secs(60);
/// Waiting for the turn, then the delay before and after the attempt.
const UNLOCK: Duration = Duration::from_secs(60 + 10 + 10);

/// What a device has done that excuses failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    Absent,
    /// It crashed, or hung, or was restarted.
    Died,
    Lied,
    Busy,
    NotTouched,
    Failed,
}

/// Something that requests change, of which it is known for certain how it is as long as none is under way.
#[derive(Default)]
struct Fact {
    value: Option<bool>,
    changing: u32,
    /// Whether two changes were under way at the same time: which came first is not known.
    overlapped: bool,
    generation: u64,
}

/// A [`Fact`] at one time.
#[derive(Clone, Copy)]
struct Known {
    value: Option<bool>,
    generation: u64,
}

impl Fact {
    fn begin(&mut self) {
        self.overlapped |= self.changing > 0;
        self.changing += 1;
        self.generation += 1;
        self.value = None;
    }

    fn end(&mut self, value: Option<bool>) {
        self.changing -= 1;
        self.generation += 1;
        if self.changing == 0 {
            self.value = value.filter(|_| !self.overlapped);
            self.overlapped = false;
        }
    }

    fn now(&self) -> Known {
        Known { value: self.value, generation: self.generation }
    }

    /// What was known then and has not changed since.
    fn since(&self, then: Known) -> Option<bool> {
        then.value.filter(|_| then.generation == self.generation)
    }
}

/// A request that has no answer yet.
struct Pending {
    number: u64,
    request: Request,
    sent: Instant,
    seal: Known,
    key: Known,
}

/// A connection as its client sees it.
struct Line {
    pending: VecDeque<Pending>,
    last_answer: Instant,
    open: bool,
}

pub struct World {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    trace: String,
    violations: Vec<String>,
    requests: u64,
    lines: BTreeMap<u64, Line>,
    /// Uses by callers inside the daemon that have no answer yet.
    uses: u64,
    sealed: Fact,
    sealed_since: Instant,
    password: Option<&'static str>,
    locks: u64,
    soft: [Fact; SOFT.len()],
    ending: bool,
    yes: u64,
    confirmed: u64,
    devices: Vec<Standing>,
}

/// A device's bounds, and its deeds.
struct Standing {
    timeout: Duration,
    has_pin: bool,
    deeds: BTreeSet<Deed>,
}

/// What was known when a key was asked for.
pub struct Asked {
    pub number: u64,
    key: usize,
    sent: Instant,
    sealed: Known,
    held: Known,
    deadline: Option<Duration>,
}

/// What is signed for a request: no two are alike.
pub fn data(number: u64) -> Vec<u8> {
    format!("request {number}").into_bytes()
}

impl World {
    pub fn new(plan: &Plan) -> Arc<Self> {
        let now = Instant::now();
        let open = || Fact { value: Some(false), ..Fact::default() };
        let held = || Fact { value: Some(true), ..Fact::default() };
        let standing = |device: &crate::plan::DevicePlan| Standing {
            timeout: device.settings.timeout,
            has_pin: device.has_pin,
            deeds: BTreeSet::new(),
        };
        Arc::new(Self {
            start: now,
            state: Mutex::new(State {
                trace: String::new(),
                violations: Vec::new(),
                requests: 0,
                lines: BTreeMap::new(),
                uses: 0,
                sealed: open(),
                sealed_since: now,
                password: None,
                locks: 0,
                soft: std::array::from_fn(|_| held()),
                ending: false,
                yes: 0,
                confirmed: 0,
                devices: plan.devices.iter().map(standing).collect(),
            }),
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap())
    }

    pub fn event(&self, event: &str) {
        let at = self.start.elapsed().as_millis();
        self.with(|state| writeln!(state.trace, "{at:>8} {event}").unwrap());
    }

    /// Notes that something happened that must not.
    pub fn violation(&self, what: &str) {
        self.event(&format!("VIOLATION {what}"));
        self.with(|state| state.violations.push(what.to_owned()));
    }

    /// The trace, and what must not have happened.
    pub fn close(&self) -> (String, Vec<String>) {
        self.with(|state| (std::mem::take(&mut state.trace), std::mem::take(&mut state.violations)))
    }

    /// How often the vault was locked: PINs that were accepted before the last time are forgotten.
    pub fn locks(&self) -> u64 {
        self.with(|state| state.locks)
    }

    pub fn excuse(&self, device: usize, deed: Deed) {
        self.with(|state| state.devices[device].deeds.insert(deed));
    }

    pub fn said_yes(&self) {
        self.with(|state| state.yes += 1);
    }

    /// A device begins a signature: not while the vault is sealed. What came to it in the very moment of the lock may.
    pub fn device_signs(&self, device: usize) {
        if self.with(|state| state.is_sealed_for_long()) {
            self.violation(&format!("device {device} began a signature while the vault was sealed"));
        }
    }

    pub fn connected(&self, line: u64) {
        let line_now = Line { pending: VecDeque::new(), last_answer: Instant::now(), open: true };
        self.with(|state| state.lines.insert(line, line_now));
    }

    /// The client has gone; what it asked for may be done still.
    pub fn hung_up(&self, line: u64) {
        self.event(&format!("line {line} hangs up"));
        self.with(|state| state.lines.get_mut(&line).unwrap().open = false);
    }

    /// The daemon has ended the connection: what it was asked for is done, or never will be.
    pub fn ended(&self, line: u64) {
        self.event(&format!("line {line} is over"));
        let left = self.with(|state| {
            let line = state.lines.remove(&line).unwrap();
            for pending in &line.pending {
                state.end_change(&pending.request, None);
            }
            line.open && !state.ending
        });
        if left {
            self.violation("the daemon closed a connection");
        }
    }

    /// Notes what a client sends, and returns its body.
    pub fn send(&self, line: u64, request: Request) -> Vec<u8> {
        use strongroom::rfc4251::Put;
        let number = self.with(|state| {
            state.requests += 1;
            let (sealed, held) = (state.sealed.now(), state.held(&request));
            let number = state.requests;
            let pending = Pending { number, request, sent: Instant::now(), seal: sealed, key: held };
            state.lines.get_mut(&line).unwrap().pending.push_back(pending);
            state.begin_change(&request);
            number
        });
        self.event(&format!("line {line} asks {number}: {request:?}"));
        let mut body = Vec::new();
        match request {
            Request::Sign(key) => {
                body.push(number::SIGN_REQUEST);
                body.put_string(&keys::all()[key].blob);
                body.put_string(&data(number));
                body.put_u32(0);
            }
            Request::List => body.push(number::REQUEST_IDENTITIES),
            Request::Add(key) => body.extend(&keys::all()[key].add),
            Request::Remove(key) => {
                body.push(number::REMOVE_IDENTITY);
                body.put_string(&keys::all()[key].blob);
            }
            Request::RemoveAll => body.push(number::REMOVE_ALL),
            Request::Lock(password) | Request::Unlock(password) => {
                body.push(if matches!(request, Request::Lock(_)) { number::LOCK } else { number::UNLOCK });
                body.put_string(password.as_bytes());
            }
        }
        body
    }

    /// Judges an answer.
    pub fn answered(&self, line: u64, body: &[u8]) {
        let now = Instant::now();
        let pending = self.with(|state| {
            let line = state.lines.get_mut(&line).unwrap();
            let pending = line.pending.pop_front()?;
            let began = pending.sent.max(line.last_answer);
            line.last_answer = now;
            Some((pending, began))
        });
        let Some((pending, began)) = pending else {
            return self.violation(&format!("line {line}: an answer to nothing"));
        };
        let Pending { number, request, .. } = pending;
        let kind = body.first().copied().unwrap_or_default();
        self.event(&format!("line {line} is answered {number}: {kind}"));
        let took = now - began;
        let found = self.with(|state| {
            let mut found = Vec::new();
            if took > state.patience(&request) + SLACK {
                found.push(format!("{request:?} took {took:?}"));
            }
            state.judge(&pending, kind, body, took, &mut found);
            state.end_change(&request, outcome(&request, kind));
            found
        });
        for what in found {
            self.violation(&format!("request {number}: {what}"));
        }
    }

    /// Notes that a caller inside the daemon asks for a signature.
    pub fn uses(&self, key: usize, deadline: Option<Duration>) -> Asked {
        let asked = self.with(|state| {
            state.requests += 1;
            state.uses += 1;
            let (sealed, held) = (state.sealed.now(), state.held(&Request::Sign(key)));
            Asked { number: state.requests, key, sent: Instant::now(), sealed, held, deadline }
        });
        self.event(&format!("a caller asks {}: sign with {key}, within {deadline:?}", asked.number));
        asked
    }

    /// Judges the answer to that; `None` when the caller gave up.
    pub fn used(&self, asked: &Asked, result: Option<&Result<Outcome, Refusal>>) {
        self.with(|state| state.uses -= 1);
        let words = match result {
            None => "given up".to_owned(),
            Some(Ok(_)) => "signed".to_owned(),
            Some(Err(refusal)) => refusal.to_string(),
        };
        self.event(&format!("a caller has {}: {words}", asked.number));
        let Some(result) = result else { return };
        let found = self.with(|state| state.judge_use(asked, result));
        for what in found {
            self.violation(&format!("request {}: {what}", asked.number));
        }
    }

    /// How many requests have no answer.
    pub fn in_flight(&self) -> u64 {
        self.with(|state| {
            let lines = state.lines.values().map(|line| if line.open { line.pending.len() as u64 } else { 0 });
            lines.sum::<u64>() + state.uses
        })
    }

    /// From now on everything may be refused.
    pub fn ending(&self) {
        self.event("the end");
        self.with(|state| {
            state.ending = true;
            state.sealed.begin();
            state.soft.iter_mut().for_each(Fact::begin);
        });
    }
}

impl State {
    /// Whether the vault is locked for certain, and not since this moment only: what was done before is seen in the
    /// same moment.
    fn is_sealed_for_long(&self) -> bool {
        self.sealed.value == Some(true) && Instant::now() > self.sealed_since
    }

    fn held(&self, request: &Request) -> Known {
        match request {
            Request::Sign(key) | Request::Add(key) | Request::Remove(key) => match self.soft.get(soft(*key)) {
                Some(fact) => fact.now(),
                None => Known { value: Some(true), generation: 0 },
            },
            _ => Known { value: None, generation: 0 },
        }
    }

    fn held_since(&self, key: usize, then: Known) -> Option<bool> {
        self.soft.get(soft(key)).map_or(Some(true), |fact| fact.since(then))
    }

    fn changed_by(&mut self, request: &Request) -> Vec<&mut Fact> {
        match request {
            Request::Add(key) | Request::Remove(key) => self.soft.get_mut(soft(*key)).into_iter().collect(),
            Request::RemoveAll => self.soft.iter_mut().collect(),
            Request::Lock(_) | Request::Unlock(_) => vec![&mut self.sealed],
            Request::Sign(_) | Request::List => vec![],
        }
    }

    fn begin_change(&mut self, request: &Request) {
        self.changed_by(request).into_iter().for_each(Fact::begin);
    }

    fn end_change(&mut self, request: &Request, value: Option<bool>) {
        self.changed_by(request).into_iter().for_each(|fact| fact.end(value));
        if self.sealed.value == Some(true) && matches!(request, Request::Lock(_) | Request::Unlock(_)) {
            self.sealed_since = Instant::now();
        }
    }

    /// The devices that a key is on.
    fn places(&self, key: usize) -> impl Iterator<Item = &Standing> {
        let of = self.devices.len();
        let here = move |device: &usize| keys::on_device(*device, of).contains(&key);
        (0..of).filter(here).map(|device| &self.devices[device])
    }

    fn patience(&self, request: &Request) -> Duration {
        match request {
            Request::Sign(CONFIRMED) => PERSON,
            Request::Sign(key) if self.wants_person(*key) => PERSON,
            Request::Sign(key) => self.places(*key).map(|place| place.timeout).sum(),
            Request::Unlock(_) => UNLOCK,
            _ => Duration::ZERO,
        }
    }

    fn wants_person(&self, key: usize) -> bool {
        key == CONFIRMED || (0..self.devices.len()).any(|n| touched(n) == key) || self.places(key).any(|p| p.has_pin)
    }

    fn judge(&mut self, pending: &Pending, kind: u8, body: &[u8], took: Duration, found: &mut Vec<String>) {
        let Pending { request, seal, .. } = pending;
        let sealed = self.sealed.since(*seal);
        let allowed: &[u8] = match request {
            Request::Sign(_) => &[number::SIGN_RESPONSE],
            Request::List => &[number::IDENTITIES_ANSWER],
            _ => &[number::SUCCESS],
        };
        if kind != number::FAILURE && !allowed.contains(&kind) {
            found.push(format!("{request:?} is answered {kind}"));
        }
        let done = allowed.contains(&kind);
        match *request {
            Request::Sign(key) if done => {
                let signature = Reader::new(&body[1..]).string().unwrap_or_default().to_vec();
                self.judge_signature(key, &data(pending.number), &signature, sealed, pending.key, found);
            }
            Request::Sign(key) => {
                if sealed != Some(true) && !self.may_fail(key, sealed, pending.key, took) {
                    found.push(format!("{request:?} failed for no reason"));
                }
            }
            Request::List => {
                let listed = blobs(body);
                let held = |key: usize| soft(key) >= SOFT.len() || self.soft[soft(key)].value == Some(true);
                let expected = (0..self.devices.len()).flat_map(|d| [own(d), touched(d)]).chain(SOFT).chain([SHARED]);
                match sealed {
                    Some(true) if !listed.is_empty() => found.push("a sealed vault lists keys".to_owned()),
                    // What was there before and after was there meanwhile only if nothing was under way: the list came
                    // in the moment it was asked for, or behind others.
                    Some(false) if took.is_zero() => {
                        let missing = |key: &usize| held(*key) && !listed.contains(&keys::all()[*key].blob);
                        found.extend(expected.filter(missing).map(|key| format!("key {key} is not listed")));
                    }
                    _ => {}
                }
            }
            Request::Add(_) => match sealed {
                Some(true) if done => found.push("a sealed vault takes a key".to_owned()),
                Some(false) if !done => found.push(format!("{request:?} failed for no reason")),
                _ => {}
            },
            Request::Remove(_) | Request::RemoveAll => {}
            Request::Lock(password) => {
                // Certain only if this is the only change under way, which began when it was sent.
                let alone = self.sealed.changing == 1 && self.sealed.generation == seal.generation + 1;
                if alone && seal.value.is_some_and(|sealed| sealed == done) {
                    found.push(format!("{request:?} answered {kind}, though sealed was {:?}", seal.value));
                }
                if done {
                    self.locks += 1;
                    self.password = alone.then_some(password);
                }
            }
            Request::Unlock(password) => {
                let alone = self.sealed.changing == 1 && self.sealed.generation == seal.generation + 1;
                if alone && seal.value == Some(false) && done {
                    found.push("an open vault was unlocked".to_owned());
                }
                if alone && seal.value == Some(true) && self.password.is_some_and(|known| (known == password) != done) {
                    found.push(format!("{request:?} answered {kind}, the password is {:?}", self.password));
                }
                if done {
                    self.password = None;
                }
            }
        }
    }

    fn judge_signature(
        &mut self,
        key: usize,
        data: &[u8],
        signature: &[u8],
        sealed: Option<bool>,
        held: Known,
        found: &mut Vec<String>,
    ) {
        if !keys::all()[key].verifies(data, signature) {
            found.push("the signature is not one".to_owned());
        }
        if sealed == Some(true) || self.is_sealed_for_long() {
            found.push("signed while sealed".to_owned());
        }
        if self.places(key).next().is_none() && self.held_since(key, held) == Some(false) {
            found.push("signed with a key that is not held".to_owned());
        }
        if key == CONFIRMED {
            self.confirmed += 1;
            if self.confirmed > self.yes {
                found.push("signed though nobody said yes".to_owned());
            }
        }
    }

    /// Whether there is a reason that a signature failed.
    fn may_fail(&self, key: usize, sealed: Option<bool>, held: Known, took: Duration) -> bool {
        if self.ending || sealed != Some(false) || key == CONFIRMED || self.places(key).any(|place| place.has_pin) {
            return true;
        }
        let on_devices = self.places(key).next().is_some();
        if !on_devices {
            return self.held_since(key, held) != Some(true);
        }
        // A key in memory, too, is only reached when its device lets another try.
        self.places(key).any(|place| !place.deeds.is_empty() || took + SLACK >= place.timeout)
    }

    fn judge_use(&mut self, asked: &Asked, result: &Result<Outcome, Refusal>) -> Vec<String> {
        let mut found = Vec::new();
        let &Asked { key, sealed, held, deadline, .. } = asked;
        let took = asked.sent.elapsed();
        let sealed = self.sealed.since(sealed);
        let patience = self.patience(&Request::Sign(key));
        if took > deadline.map_or(patience, |own| own.min(patience)) + SLACK {
            found.push(format!("sign took {took:?}"));
        }
        let refusal = match result {
            Ok(outcome) => {
                let Outcome::Signature(signature) = outcome else { return vec!["no signature".to_owned()] };
                let blob = wire_form(key, signature.as_bytes());
                self.judge_signature(key, &data(asked.number), &blob, sealed, held, &mut found);
                return found;
            }
            Err(refusal) => refusal,
        };
        let did = |deeds: &[Deed]| self.places(key).any(|place| deeds.iter().any(|deed| place.deeds.contains(deed)));
        let has_pin = self.places(key).any(|place| place.has_pin);
        let asks = has_pin || key == CONFIRMED;
        let soonest = self.places(key).map(|place| place.timeout).min().unwrap_or(PERSON);
        let in_time = deadline.map_or(soonest, |own| own.min(soonest));
        let allowed = match refusal {
            Refusal::Locked => sealed != Some(false),
            Refusal::Ending => self.ending,
            Refusal::NoSuchKey => SOFT.contains(&key) && self.held_since(key, held) != Some(true),
            Refusal::Denied | Refusal::TooManyPrompts => asks,
            Refusal::Timeout => has_pin || took + SLACK >= in_time,
            Refusal::PinRefusedBefore(_) => has_pin,
            Refusal::Device(DeviceError::PinWrong { .. } | DeviceError::PinBlocked) => has_pin,
            Refusal::LastTry(_) => has_pin,
            // A device that lost its login between the login and the use.
            Refusal::Device(DeviceError::PinRequired) => has_pin,
            Refusal::Device(DeviceError::Absent) => did(&[Deed::Absent]),
            Refusal::Device(DeviceError::Restarted) => did(&[Deed::Died]),
            Refusal::Device(DeviceError::Busy) => has_pin || did(&[Deed::Busy]),
            Refusal::Device(DeviceError::NotTouched) => did(&[Deed::NotTouched]),
            // A device that cannot be opened is failed, whatever the reason.
            Refusal::Device(DeviceError::Failed(_)) => {
                self.ending || did(&[Deed::Lied, Deed::Died, Deed::Failed, Deed::Busy, Deed::NotTouched])
            }
            _ => false,
        };
        if !allowed {
            found.push(format!("key {key} was refused for no reason after {took:?}: {refusal}"));
        }
        found
    }
}

/// The position of a key's fact; beyond the end for keys on devices only.
fn soft(key: usize) -> usize {
    SOFT.iter().position(|soft| *soft == key).unwrap_or(SOFT.len())
}

/// What is certain after a change, if nothing else changes it at the same time.
fn outcome(request: &Request, kind: u8) -> Option<bool> {
    let done = kind == number::SUCCESS;
    match request {
        Request::Add(_) => done.then_some(true),
        // A key on a device, too, is refused although its place in memory goes; one that was not held fails as well.
        Request::Remove(DOUBLE) => None,
        Request::Remove(_) | Request::RemoveAll => done.then_some(false),
        Request::Lock(_) => done.then_some(true),
        Request::Unlock(_) => done.then_some(false),
        Request::Sign(_) | Request::List => None,
    }
}

/// A device's or a soft key's signature as the wire has it.
fn wire_form(key: usize, bytes: &[u8]) -> Vec<u8> {
    use strongroom::{devices::Signature, public_key::Curve};
    let signature = match PublicKey::parse(&keys::all()[key].blob).unwrap() {
        PublicKey::Ecdsa(..) => Signature::Ecdsa(Curve::P521, bytes.to_vec()),
        _ => Signature::Ed25519(bytes.try_into().unwrap()),
    };
    let mut blob = Vec::new();
    strongroom::agent::wire::put_signature_blob(&mut blob, &signature);
    blob
}

fn blobs(body: &[u8]) -> Vec<Vec<u8>> {
    let mut reader = Reader::new(body.get(1..).unwrap_or_default());
    let count = reader.u32().unwrap_or_default();
    let next = |_| {
        let blob = reader.string().ok()?.to_vec();
        reader.string().ok().map(|_| blob)
    };
    (0..count).map_while(next).collect()
}
