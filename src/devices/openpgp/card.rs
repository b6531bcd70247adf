//! One card: what is verified on it, and its operations, each in a transaction of its own. Knows PINs and slots; never a
//! thread or a queue.
//!
//! A PIN is sent to the card in two cases: somebody has just given it, or this very card accepted it before and has
//! forgotten since. Before each time the card is asked how many tries are left, and after a refusal the PIN is gone.

use std::{
    ffi::CString,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use openpgp_card::{
    Error as CardError,
    ocard::{
        KeyType as CardSlot, OpenPGP, StatusBytes, Transaction,
        data::{ApplicationRelatedData, KdfDo, KeyGenerationTime},
    },
};
use secrecy::SecretString;

use super::{
    keys::{self, CardKey, SLOTS},
    link::{self, Link, Observed},
    operate::Lengths,
    pin,
};
use crate::devices::{CardPin, DeviceError, Scan, Slot, Status};

/// A refusal that came this long after the question was a touch that did not come; a PIN that is missing is noticed at
/// once. Cards wait for fifteen seconds.
const TOUCH_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a command that are not its data: header and lengths in their extended form.
const COMMAND_OVERHEAD: usize = 9;
/// The data of a command that every card takes, in bytes.
pub(super) const SHORT_COMMAND: usize = 255;

pub(super) const WRONG_SCHEME: DeviceError = DeviceError::unsupported("the key has no such scheme");

/// Which card this is, and how it is to be used.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// The reader it is in.
    pub(super) reader: CString,
    /// The number that the reader gave it when it was put in.
    pub(super) insertion: u32,
    /// Its manufacturer and serial: `0006:12345678`.
    pub(super) ident: String,
    /// Whether PKCS#1 v1.5 decryption is offered.
    pub(super) decrypts_pkcs1: bool,
}

/// PW1 in its two modes (OpenPGP card, 7.2.2).
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// 81: for PSO:COMPUTE DIGITAL SIGNATURE.
    Sign,
    /// 82: for everything else.
    Other,
}

/// What is verified on an open connection.
#[derive(Clone, Copy, Default)]
pub(super) struct Verified {
    sign: bool,
    other: bool,
}

/// A connection and what is known through it.
struct Open {
    card: OpenPGP,
    verified: Verified,
    /// Resets by others that were seen when `verified` was true.
    resets: u64,
    kdf: Option<KdfDo>,
    /// The longest data of a command, in bytes, as the card says.
    longest: usize,
}

/// A card, open or let go.
pub(super) struct Token {
    pub(super) identity: Identity,
    observed: Arc<Observed>,
    open: Option<Open>,
    /// What this card accepted, and has not refused since.
    pub(super) pin: Option<SecretString>,
    /// Whether it has been used for no signature since it was given: where the card wants it for each, it serves for one.
    unused: bool,
    /// Which messages the card has taken and which it has refused for their length.
    pub(super) lengths: Lengths,
    /// Whether something may be verified on the card since it was last reset.
    pub(super) maybe_verified: bool,
    pub(super) keys: Vec<CardKey>,
    known: Arc<Mutex<Known>>,
}

/// What is known of a card without asking it.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    status: Status,
    /// The tries that people can have been told of.
    told: Option<u8>,
    /// The same of the resetting code and of the admin PIN.
    told_of_others: [Option<u8>; 2],
    /// Whether the admin PIN, when it was last accepted, was that of new cards.
    pub(super) default_admin_pin: bool,
}

impl Known {
    /// How the card is, for people.
    pub(super) fn tell(&mut self) -> Status {
        self.told = self.status.tries_left;
        self.status.clone()
    }

    pub(super) fn told_of(&mut self, which: CardPin) -> &mut Option<u8> {
        match which {
            CardPin::User => &mut self.told,
            CardPin::ResetCode => &mut self.told_of_others[0],
            CardPin::Admin => &mut self.told_of_others[1],
        }
    }
}

impl Token {
    /// Opens the card. [`DeviceError::Absent`] when another one is in the reader.
    pub(super) fn open(
        identity: Identity,
        observed: Arc<Observed>,
        known: Arc<Mutex<Known>>,
    ) -> Result<Self, DeviceError> {
        let mut token = Self {
            identity,
            observed,
            open: None,
            pin: None,
            unused: false,
            lengths: Lengths::default(),
            maybe_verified: false,
            keys: Vec::new(),
            known,
        };
        token.connect()?;
        Ok(token)
    }

    /// Lets other programs have the card, even those that want it for themselves.
    pub(super) fn let_go(&mut self) {
        self.open = None;
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// The longest data that the card says it takes at once, in bytes.
    pub(super) fn longest(&self) -> usize {
        self.open.as_ref().map_or(SHORT_COMMAND, |open| open.longest)
    }

    /// Whether PKCS#1 v1.5 decryption is offered.
    pub(super) fn decrypts_pkcs1(&self) -> bool {
        self.identity.decrypts_pkcs1
    }

    /// Takes the card up again. When that fails for a reason that is not the card's absence, this process has had its
    /// time: the next one finds the reason.
    fn reconnect(&mut self) -> Result<(), DeviceError> {
        if self.open.is_some() {
            return Ok(());
        }
        self.connect().map_err(|error| match error {
            DeviceError::Failed(why) => {
                note(&why);
                DeviceError::Restarted
            }
            other => other,
        })
    }

    fn connect(&mut self) -> Result<(), DeviceError> {
        let link = Link::connect(&self.identity.reader, &self.observed).map_err(link::not_connected)?;
        let made = OpenPGP::new(Box::new(link) as Box<dyn card_backend::CardBackend + Send + Sync>);
        let mut card = made.map_err(|error| self.not_opened(error))?;
        let ident = &self.identity.ident;
        let (data, kdf, longest) = describe(&mut card).map_err(|error| self.not_opened(error))?;
        let is_this = data.application_id().is_ok_and(|aid| aid.ident() == *ident);
        if !is_this {
            return Err(DeviceError::Absent);
        }
        self.open = Some(Open { card, verified: Verified::default(), resets: self.observed.resets(), kdf, longest });
        self.learn(&data);
        Ok(())
    }

    fn not_opened(&self, error: CardError) -> DeviceError {
        match (self.observed.take_fault(), error) {
            (Some(fault), _) => link::not_connected(fault),
            (None, CardError::ResponseLength(_)) => DeviceError::Absent,
            (None, CardError::CardStatus(StatusBytes::FileOrApplicationNotFound)) => DeviceError::Absent,
            (None, CardError::CardStatus(StatusBytes::TerminationState)) => {
                DeviceError::Failed("the card's OpenPGP application is terminated; reset it".to_owned())
            }
            (None, error) => DeviceError::Failed(format!("the card cannot be read: {error}")),
        }
    }

    /// What the card says of itself.
    fn learn(&mut self, data: &ApplicationRelatedData) {
        let left = data.pw_status_bytes().ok().map(|status| status.err_count_pw1());
        let generation = keys::generation(data);
        self.publish(|known| {
            known.status.tries_left = left.or(known.status.tries_left);
            known.status.generation = generation;
        });
    }

    pub(super) fn publish<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.status.serial.clone_from(&self.identity.ident);
        known.status.locked = self.pin.is_none();
        change(&mut known)
    }

    /// Does something in a transaction, on the OpenPGP application. A connection that broke is dropped.
    pub(super) fn with<T>(
        &mut self,
        act: impl FnOnce(&mut Transaction<'_>, &mut Verified, &mut Option<SecretString>) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        self.reconnect()?;
        let Some(open) = &mut self.open else { return Err(DeviceError::Absent.into()) };
        let result = open.card.transaction().map_err(Trouble::from).and_then(|mut tx| {
            if self.observed.resets() != open.resets {
                open.resets = self.observed.resets();
                open.verified = Verified::default();
            }
            act(&mut tx, &mut open.verified, &mut self.pin)
        });
        match result {
            Err(Trouble::Card(CardError::Smartcard(_) | CardError::ResponseLength(_))) => Err(self.broken().into()),
            result => result,
        }
    }

    /// Why a connection broke in the middle of something.
    fn broken(&mut self) -> DeviceError {
        let fault = self.observed.take_fault();
        if fault == Some(pcsc::Error::SharingViolation) {
            return DeviceError::InUse;
        }
        self.open = None;
        if fault.is_some_and(link::is_removal) {
            self.forget();
            return DeviceError::Absent;
        }
        if link::is_gone_soon(&self.identity.reader) {
            self.forget();
            return DeviceError::Absent;
        }
        // The card is there, or nobody can tell: whether it has done the work is not known.
        DeviceError::Restarted
    }

    pub(super) fn forget(&mut self) {
        self.pin = None;
        self.publish(|_| {});
    }

    // Keys.

    /// Reads the public keys. Needs no PIN.
    pub(super) fn scan(&mut self) -> Result<Scan, DeviceError> {
        let (data, aid, holder, materials) = self.with(|tx, _, _| {
            let data = selected(tx)?;
            let holder = tx.cardholder_related_data().ok().and_then(|holder| holder.name().map(<[u8]>::to_vec));
            let mut materials = Vec::new();
            for slot in SLOTS {
                match tx.public_key(slot) {
                    Ok(material) => materials.push((slot, material)),
                    Err(CardError::Smartcard(error)) => return Err(CardError::Smartcard(error).into()),
                    // An empty slot; cards say so in many ways.
                    Err(_) => {}
                }
            }
            Ok((data, tx.application_identifier()?, holder.unwrap_or_default(), materials))
        })?;
        self.learn(&data);
        self.keys.clear();
        for (slot, material) in materials {
            let Ok(attributes) = data.algorithm_attributes(slot) else { continue };
            let (kind, blob) = match keys::public_key(&material, &attributes) {
                Ok(key) => key,
                Err(why) => {
                    note(&format!("the key in the slot {} is left out: {why}", keys::slot_name(slot)));
                    continue;
                }
            };
            let flag = match slot {
                CardSlot::Signing => data.uif_pso_cds(),
                CardSlot::Decryption => data.uif_pso_dec(),
                _ => data.uif_pso_aut(),
            };
            let fingerprints = data.fingerprints().ok();
            let times = data.key_generation_times().ok();
            self.keys.push(CardKey {
                slot,
                kind,
                blob,
                touch: flag.ok().flatten().is_some_and(|flag| flag.touch_policy().touch_required()),
                fingerprint: fingerprints.and_then(|set| keys::of_slot(&set, slot).map(ToString::to_string)),
                made: times.and_then(|set| keys::of_slot(&set, slot).map(KeyGenerationTime::get)).unwrap_or(0),
            });
        }
        let keys = keys::found(&self.keys, &keys::label(&aid, &holder), self.identity.decrypts_pkcs1);
        Ok(Scan { keys, complete: true, status: self.publish(Known::tell), ..Scan::default() })
    }

    pub(super) fn key(&self, slot: &Slot, wanted: impl Fn(CardSlot) -> bool) -> Result<CardKey, DeviceError> {
        let slots: Vec<_> = keys::slots_of(slot).collect();
        if slots.is_empty() {
            return Err(DeviceError::NoSuchKey);
        }
        let slot = slots.into_iter().find(|slot| wanted(*slot)).ok_or(WRONG_SCHEME)?;
        self.keys.iter().find(|key| key.slot == slot).cloned().ok_or(DeviceError::NoSuchKey)
    }

    // PINs.

    /// Logs in with a PIN that somebody has just given.
    pub(super) fn unlock(&mut self, given: SecretString, even_last: bool) -> Result<(), DeviceError> {
        let (mut left, mut sent) = (None, false);
        let kdf = self.kdf()?;
        let result = self.with(|tx, verified, kept| {
            let data = selected(tx)?;
            let status = data.pw_status_bytes()?;
            left = Some(status.err_count_pw1());
            if left == Some(0) {
                return Err(DeviceError::PinBlocked.into());
            }
            // Whoever gave it was not told that this is the last try: they are told, and asked again.
            if left == Some(1) && !even_last {
                return Err(DeviceError::PinRequired.into());
            }
            if !pin::fits(&given, CardPin::User, &status) {
                return Err(DeviceError::PinWrong { left }.into());
            }
            *kept = None;
            sent = true;
            verify(tx, Mode::Other, &given, kdf.as_ref(), &mut left)?;
            verified.other = true;
            *kept = Some(given);
            Ok(())
        });
        // Even where the answer was lost.
        self.maybe_verified |= sent;
        self.unused |= result.is_ok();
        self.publish(|known| {
            known.status.tries_left = left.or(known.status.tries_left);
            if let Err(Trouble::Device(DeviceError::PinWrong { left })) = &result {
                known.told = *left;
            }
        });
        Ok(result?)
    }

    pub(super) fn kdf(&mut self) -> Result<Option<KdfDo>, DeviceError> {
        self.reconnect()?;
        Ok(self.open.as_ref().and_then(|open| open.kdf.clone()))
    }

    /// Forgets the PIN, and has the card forget that it was verified.
    pub(super) fn lock(&mut self) -> Result<(), DeviceError> {
        self.forget();
        self.open = None;
        self.unverify()
    }

    /// Has the card forget that PINs were verified, if there may be any.
    pub(super) fn unverify(&mut self) -> Result<(), DeviceError> {
        if !self.maybe_verified {
            return Ok(());
        }
        // Nothing is verified on a card that was without power, and what is in its place now is not ours.
        let is_there = match link::insertion(&self.identity.reader) {
            Ok(insertion) => insertion == self.identity.insertion,
            Err(error) => error != DeviceError::Absent,
        };
        if is_there {
            link::Link::unverify(&self.identity).or_else(|error| match link::not_connected(error) {
                DeviceError::Absent => Ok(()),
                error => Err(error),
            })?;
        }
        self.maybe_verified = false;
        Ok(())
    }

    /// Does what needs PW1 in this mode: verifies it where the card has forgotten, and once more where it has forgotten
    /// unnoticed.
    pub(super) fn with_pin<T>(
        &mut self,
        mode: Mode,
        touch: bool,
        mut act: impl FnMut(&mut Transaction<'_>) -> Result<T, CardError>,
    ) -> Result<T, DeviceError> {
        if self.pin.is_none() {
            let each_time = mode == Mode::Sign
                && self.with(|tx, _, _| Ok(selected(tx)?.pw_status_bytes()?.pw1_cds_valid_once()))?;
            return Err(if each_time { DeviceError::PinEachTime } else { DeviceError::PinRequired });
        }
        let kdf = self.kdf()?;
        let (unused, mut left) = (self.unused, None);
        self.maybe_verified = true;
        let result = self.with(|tx, verified, kept| {
            let mut again = true;
            loop {
                let fresh = !verified.has(mode);
                if fresh {
                    verify_again(tx, mode, kept, unused, kdf.as_ref(), &mut left, verified)?;
                }
                let begun = Instant::now();
                match act(tx) {
                    Ok(done) => return Ok(done),
                    Err(CardError::CardStatus(status))
                        if touch && begun.elapsed() >= TOUCH_PATIENCE && is_refusal(status) =>
                    {
                        return Err(DeviceError::NotTouched.into());
                    }
                    // Another program has made the card forget, or has selected another application.
                    Err(CardError::CardStatus(status)) if again && !fresh && has_forgotten(status) => {
                        again = false;
                        *verified = Verified::default();
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        });
        self.publish(|known| known.status.tries_left = left.or(known.status.tries_left));
        if mode == Mode::Sign && result.is_ok() {
            self.unused = false;
        }
        Ok(result?)
    }
}

impl Verified {
    fn has(self, mode: Mode) -> bool {
        match mode {
            Mode::Sign => self.sign,
            Mode::Other => self.other,
        }
    }
}

/// What goes wrong in a transaction.
pub(super) enum Trouble {
    Device(DeviceError),
    Card(CardError),
}

impl From<DeviceError> for Trouble {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<CardError> for Trouble {
    fn from(error: CardError) -> Self {
        Self::Card(error)
    }
}

impl From<Trouble> for DeviceError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Device(error) => error,
            Trouble::Card(CardError::CardStatus(StatusBytes::ReferencedDataNotFound)) => Self::NoSuchKey,
            Trouble::Card(CardError::CardStatus(status)) => Self::Failed(format!("the card refuses: {status}")),
            Trouble::Card(error) => Self::Failed(format!("the card's answer makes no sense: {error}")),
        }
    }
}

/// What a card says of itself, how it wants its PIN, and the longest data that it takes in a command.
fn describe(card: &mut OpenPGP) -> Result<(ApplicationRelatedData, Option<KdfDo>, usize), CardError> {
    let mut tx = card.transaction()?;
    let data = tx.application_related_data()?;
    let kdf = if tx.extended_capabilities()?.kdf_do() { tx.kdf_do().ok() } else { None };
    let longest = match tx.extended_length_info()? {
        Some(info) => usize::from(info.max_command_bytes()).saturating_sub(COMMAND_OVERHEAD),
        None => SHORT_COMMAND,
    };
    Ok((data, kdf, longest.max(SHORT_COMMAND)))
}

/// What the card says of itself. Another program may have left another application selected.
pub(super) fn selected(tx: &mut Transaction<'_>) -> Result<ApplicationRelatedData, CardError> {
    match tx.application_related_data() {
        Err(error @ (CardError::Smartcard(_) | CardError::ResponseLength(_))) => Err(error),
        Err(_) => {
            tx.select()?;
            tx.application_related_data()
        }
        read => read,
    }
}

/// Sends a PIN that this card accepted before, unless that could be its last try, or the card wants it given for each
/// signature and one was made with it.
fn verify_again(
    tx: &mut Transaction<'_>,
    mode: Mode,
    kept: &mut Option<SecretString>,
    unused: bool,
    kdf: Option<&KdfDo>,
    left: &mut Option<u8>,
    verified: &mut Verified,
) -> Result<(), Trouble> {
    let status = selected(tx)?.pw_status_bytes()?;
    *left = Some(status.err_count_pw1());
    let each_time = mode == Mode::Sign && status.pw1_cds_valid_once();
    if each_time && !unused {
        return Err(DeviceError::PinEachTime.into());
    }
    // Gone until the card accepts it again.
    let Some(pin) = kept.take() else { return Err(DeviceError::PinRequired.into()) };
    match *left {
        Some(0) => return Err(DeviceError::PinBlocked.into()),
        Some(1) => return Err(DeviceError::PinRequired.into()),
        _ => {}
    }
    verify(tx, mode, &pin, kdf, left)?;
    *kept = Some(pin);
    match mode {
        // Good for one, where the card wants it for each.
        Mode::Sign => verified.sign = !each_time,
        Mode::Other => verified.other = true,
    }
    Ok(())
}

/// Sends a PIN. When it was refused, the card is asked anew what is left: what it said before is stale.
fn verify(
    tx: &mut Transaction<'_>,
    mode: Mode,
    pin: &SecretString,
    kdf: Option<&KdfDo>,
    left: &mut Option<u8>,
) -> Result<(), Trouble> {
    let sent = pin::hashed(pin, kdf, CardPin::User)?;
    let result = match mode {
        Mode::Sign => tx.verify_pw1_sign(sent),
        Mode::Other => tx.verify_pw1_user(sent),
    };
    match result {
        Ok(()) => Ok(()),
        Err(CardError::CardStatus(_)) => {
            *left = Some(tx.application_related_data()?.pw_status_bytes()?.err_count_pw1());
            Err(if *left == Some(0) { DeviceError::PinBlocked } else { DeviceError::PinWrong { left: *left } }.into())
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the card refuses for want of a PIN or a touch.
fn is_refusal(status: StatusBytes) -> bool {
    matches!(
        status,
        StatusBytes::SecurityStatusNotSatisfied
            | StatusBytes::ConditionOfUseNotSatisfied
            | StatusBytes::SecurityRelatedIssues
    )
}

/// Whether the card may have forgotten the PIN, or which application is meant.
fn has_forgotten(status: StatusBytes) -> bool {
    is_refusal(status)
        || matches!(
            status,
            StatusBytes::INSNotSupported | StatusBytes::CLANotSupported | StatusBytes::FileOrApplicationNotFound
        )
}

/// A line for the daemon's log.
fn note(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}
