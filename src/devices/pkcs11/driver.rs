//! The driver of PKCS#11 tokens: one token, with as many sessions as lanes. Knows what a token says of itself, and what is
//! to become of each error.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash as _, Hasher},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

use cryptoki::{
    error::{Error, RvError},
    object::ObjectHandle,
    session::{Session, SessionState, UserType},
    slot::Slot as TokenSlot,
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::{
    Config, Module, Token, TokenUri,
    error::{device_error, words},
    mechanism::Mechanisms,
    module::Loaded,
    object::{self, KeyObject},
    session::{Fault, Known, Lane, Pool},
    token,
};
use crate::{
    devices::{
        DecryptScheme, DeriveScheme, DeviceError, Driver, FoundKey, Input, MAX_KEYS, NewKey, PrivateHalf, Scan, Scheme,
        Slot, Status, host::child::Hosted,
    },
    sys::pkcs11::SinglePart,
};

/// The most looks at a token between two attempts to read what cannot be read: some minutes.
const MAX_PAUSE: u32 = 64;

/// The driver.
pub struct Pkcs11 {
    pub(super) module: Module,
    pub(super) loaded: Loaded,
    pub(super) token_slot: TokenSlot,
    /// What the token said when it was opened: another one in its place is noticed.
    uri: TokenUri,
    pub(super) mechanisms: Mechanisms,
    pub(super) pool: Pool,
    /// Held while one is sent or a session is logged out: logins are the token's, whichever
    /// session makes them.
    pin: Mutex<SentPin>,
    /// Held by who looks for a key, and alone by who writes one: of an object that is read while it is written SoftHSM says,
    /// until it is loaded again, that it is gone. Scans and writes do not overlap anyway.
    pub(super) objects: RwLock<()>,
    unread: Mutex<Unread>,
    pub(super) pkcs1_decrypt: bool,
    /// Whether the token takes OAEP with SHA-256, once that was tried.
    pub(super) oaep_sha256: OnceLock<bool>,
    /// The calls that finish what `cryptoki` would finish at once; loaded when they are first needed.
    pub(super) single_part: OnceLock<Result<SinglePart, String>>,
    /// Sessions that were wanted and could not be had.
    missing_sessions: usize,
}

impl Driver for Pkcs11 {
    type Config = Config;
    const KIND: &'static str = "pkcs11";

    async fn open(config: Config) -> Result<Self, DeviceError> {
        let loaded = config.module.load()?;
        let token = choose(token::list(&loaded)?, &config.token)?;
        if !token.initialized {
            return Err(DeviceError::Failed(format!(
                "the token in slot {} is not initialised; make it one with its own tools",
                token.slot_id
            )));
        }
        let token_slot = TokenSlot::try_from(token.slot_id).map_err(|error| device_error(&error))?;
        let mechanisms = loaded.context.get_mechanism_list(token_slot).map_err(|error| device_error(&error))?;
        let most = token.max_sessions.filter(|most| *most > 0).and_then(|most| usize::try_from(most).ok());
        let wanted = config.sessions.min(most.unwrap_or(usize::MAX));
        let pool = Pool::open(&loaded.context, token_slot, wanted)?;
        Ok(Self {
            module: config.module,
            missing_sessions: config.sessions - pool.count(),
            uri: TokenUri::of(&token),
            loaded,
            token_slot,
            mechanisms: Mechanisms::new(mechanisms),
            pool,
            pin: Mutex::default(),
            objects: RwLock::default(),
            unread: Mutex::default(),
            pkcs1_decrypt: config.pkcs1_decrypt,
            oaep_sha256: OnceLock::new(),
            single_part: OnceLock::new(),
        })
    }

    fn lanes(&self) -> usize {
        self.pool.count()
    }

    async fn scan(&self) -> Result<Scan, DeviceError> {
        let token = self.token()?;
        // What was remembered before may have changed since.
        self.pool.forget_handles();
        self.pool.with(|lane| {
            let status = self.status(&lane.session, &token)?;
            let object::Found { keys, notes, unread, is_complete } = object::keys(&lane.session, status.locked)?;
            self.unread().scanned(unread);
            self.try_oaep(lane, &keys, status.locked);
            Ok(Scan {
                keys: keys.iter().filter_map(|key| self.found(key)).take(MAX_KEYS).collect(),
                complete: !status.locked && is_complete,
                status,
                notes: self.notes(&token).into_iter().chain(notes).collect(),
            })
        })
    }

    async fn sign(&self, slot: &Slot, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        self.pool.with(|lane| self.sign_in(lane, slot, scheme, input))
    }

    async fn decrypt(
        &self,
        slot: &Slot,
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        self.pool.with(|lane| self.decrypt_in(lane, slot, scheme, label, ciphertext))
    }

    async fn derive(&self, slot: &Slot, scheme: DeriveScheme, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        self.pool.with(|lane| self.derive_in(lane, slot, scheme, peer))
    }

    async fn random(&self, len: usize) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        self.pool.with(|lane| {
            let mut bytes = Zeroizing::new(vec![0; len]);
            lane.session.generate_random_slice(&mut bytes)?;
            Ok(bytes)
        })
    }

    async fn generate(&self, new: &NewKey) -> Result<FoundKey, DeviceError> {
        self.make(new)
    }

    async fn import(&self, new: &NewKey, private: &PrivateHalf) -> Result<FoundKey, DeviceError> {
        self.bring(new, private)
    }

    async fn rename(&self, slot: &Slot, label: &str) -> Result<(), DeviceError> {
        self.call(slot, label)
    }

    async fn delete(&self, slot: &Slot) -> Result<(), DeviceError> {
        self.destroy(slot)
    }

    async fn unlock(&self, pin: SecretString, even_last: bool) -> Result<(), DeviceError> {
        let mut sent = self.sent_pin();
        if sent.was_refused(&pin) {
            return Err(self.refused());
        }
        let token = self.token()?;
        if token.tries_left() == Some(1) && !even_last {
            return Err(DeviceError::PinRequired);
        }
        let result = self.pool.with(|lane| self.log_in(lane, &pin, &sent, &token));
        self.pool.forget_handles();
        *sent = match &result {
            Ok(()) => SentPin::Accepted(pin),
            Err(DeviceError::PinWrong { .. } | DeviceError::PinBlocked) => SentPin::Refused(pin),
            Err(_) => SentPin::None,
        };
        result.map_err(|error| match error {
            DeviceError::PinWrong { .. } => self.refused(),
            error => error,
        })
    }

    async fn lock(&self) -> Result<(), DeviceError> {
        let mut sent = self.sent_pin();
        *sent = SentPin::None;
        self.pool.forget_handles();
        self.pool.with(|lane| match lane.session.logout() {
            Ok(()) | Err(Error::Pkcs11(RvError::UserNotLoggedIn, _)) => Ok(()),
            Err(error) => Err(error.into()),
        })
    }

    async fn health(&self) -> Result<Status, DeviceError> {
        let token = self.token()?;
        let mut status = self.pool.with(|lane| Ok(self.status(&lane.session, &token)?))?;
        // What could not be read is looked at again, although nothing else has changed.
        status.generation ^= u64::from(self.unread().is_due());
        Ok(status)
    }
}

impl Hosted for Pkcs11 {
    fn config(bytes: &[u8]) -> Result<Config, DeviceError> {
        Config::decode(bytes)
    }
}

/// The one token that is meant.
fn choose(tokens: Vec<Result<Token, token::BadSlot>>, uri: &TokenUri) -> Result<Token, DeviceError> {
    let mut bad = Vec::new();
    let mut matching = Vec::new();
    for token in tokens {
        match token {
            Ok(token) if uri.matches(&token) => matching.push(token),
            Ok(_) => {}
            Err(slot) => bad.push(slot),
        }
    }
    // A token that is still to be made has nothing that could be asked for.
    if matching.len() > 1 {
        matching.retain(|token| token.initialized);
    }
    match (matching.len(), bad.first()) {
        (1, _) => matching.pop().ok_or(DeviceError::Absent),
        (0, None) => Err(DeviceError::Absent),
        // It may be the one that cannot be read.
        (0, Some(bad)) => Err(DeviceError::Failed(format!(
            "no token is {uri}, and the one in slot {} cannot be read: {}",
            bad.slot_id, bad.reason
        ))),
        (n, _) => {
            let each: Vec<_> = matching.iter().take(8).map(|token| TokenUri::of(token).to_string()).collect();
            Err(DeviceError::Failed(format!("{n} tokens are {uri}; say which is meant: {}", each.join(", "))))
        }
    }
}

impl Pkcs11 {
    /// The token as it is now. [`Absent`](DeviceError::Absent) when it is gone or another one is in its place: the driver is
    /// then opened anew.
    fn token(&self) -> Result<Token, DeviceError> {
        match token::look(&self.loaded, self.token_slot) {
            Ok(Some(token)) if self.uri.matches(&token) => Ok(token),
            Ok(_) => Err(DeviceError::Absent),
            Err(bad) => Err(DeviceError::Failed(bad.reason)),
        }
    }

    fn sent_pin(&self) -> MutexGuard<'_, SentPin> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unread(&self) -> MutexGuard<'_, Unread> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notes(&self, token: &Token) -> Vec<String> {
        let mut notes = Vec::new();
        if token.pin_count_low {
            notes.push("a wrong PIN has been tried since the last login".to_owned());
        }
        if token.pin_to_be_changed {
            notes.push("the PIN is to be changed, with the token's own tools, before keys can be used".to_owned());
        }
        if self.missing_sessions > 0 {
            let count = self.pool.count();
            notes.push(format!("the token allows {count} of the {} sessions", count + self.missing_sessions));
        }
        notes
    }

    fn status(&self, session: &Session, token: &Token) -> Result<Status, Error> {
        let state = session.get_session_info()?.session_state();
        let logged_in = matches!(state, SessionState::RoUser | SessionState::RwUser);
        Ok(Status {
            serial: token.serial.clone(),
            locked: token.login_required && !logged_in,
            tries_left: token.tries_left(),
            generation: generation(session, token)?,
        })
    }

    fn log_in(&self, lane: &Lane, pin: &SecretString, sent: &SentPin, token: &Token) -> Result<(), Fault> {
        // Where the token has its own keys for it, a PIN from here is not wanted (PKCS#11 3.1, 5.6.8).
        let pin = (!token.protected_path).then_some(pin);
        match lane.session.login(UserType::User, pin) {
            Ok(()) => Ok(()),
            Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                // With which PIN is not known, and this one would count as accepted: only the token can say.
                if pin.is_some_and(|pin| sent.was_accepted(pin)) {
                    return Ok(());
                }
                lane.session.logout()?;
                Ok(lane.session.login(UserType::User, pin)?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The login that a key with CKA_ALWAYS_AUTHENTICATE wants between the beginning and the end of an operation: with the PIN
    /// that the token accepted, which may have been changed since. It is sent once more at most, and never as the last try.
    pub(super) fn authenticate(&self, lane: &mut Lane) -> Result<(), Fault> {
        // What has begun cannot be taken back in every version of the standard, but for a new session.
        lane.stuck = true;
        let mut sent = self.sent_pin();
        let pin = match &*sent {
            SentPin::Accepted(pin) => pin.clone(),
            SentPin::None | SentPin::Refused(_) => return Err(DeviceError::PinRequired.into()),
        };
        let token = self.token()?;
        if token.tries_left() == Some(1) {
            *sent = SentPin::None;
            return Err(DeviceError::PinRequired.into());
        }
        match lane.session.login(UserType::ContextSpecific, (!token.protected_path).then_some(&pin)) {
            Ok(()) => {
                lane.stuck = false;
                Ok(())
            }
            Err(error) => match device_error(&error) {
                DeviceError::PinWrong { .. } | DeviceError::PinBlocked => {
                    *sent = SentPin::Refused(pin);
                    Err(self.refused().into())
                }
                _ => Err(error.into()),
            },
        }
    }

    /// That the PIN was refused, with the tries that are left now. Some modules say of a blocked PIN only that it is wrong.
    fn refused(&self) -> DeviceError {
        match self.token().ok().and_then(|token| token.tries_left()) {
            Some(0) => DeviceError::PinBlocked,
            left => DeviceError::PinWrong { left },
        }
    }

    pub(super) fn found(&self, key: &KeyObject) -> Option<FoundKey> {
        let ability = self.mechanisms.ability(&key.blob, &key.usage)?;
        Some(FoundKey {
            slot: key.slot(),
            blob: key.blob.clone().into(),
            certificates: Vec::new(),
            label: key.label.clone(),
            schemes: ability.schemes(),
            decrypts: ability.decrypts(self.pkcs1_decrypt, self.oaep_sha256.get() == Some(&true)),
            derives: ability.derives(),
            touch: false,
            ssh: true,
            note: String::new(),
        })
    }

    /// The private key of a slot, in this session.
    pub(super) fn key(&self, lane: &mut Lane, slot: &Slot) -> Result<Known, Fault> {
        if let Some(known) = lane.known(slot) {
            return Ok(known);
        }
        let looking = self.objects.read().unwrap_or_else(PoisonError::into_inner);
        let Some(key) = object::find_key(&lane.session, slot)? else { return Err(self.no_key(&lane.session)?.into()) };
        drop(looking);
        let ability = self.mechanisms.ability(&key.blob, &key.usage).ok_or(DeviceError::NoSuchKey)?;
        let known = Known { handle: key.handle, ability };
        lane.remember(slot, &known);
        Ok(known)
    }

    /// Why a key is not to be seen: it may show after a login.
    pub(super) fn no_key(&self, session: &Session) -> Result<DeviceError, Fault> {
        let token = self.token()?;
        Ok(if self.status(session, &token)?.locked { DeviceError::PinRequired } else { DeviceError::NoSuchKey })
    }

    /// The calls for keys that want a login with each use.
    pub(super) fn single_part(&self) -> Result<&SinglePart, DeviceError> {
        let single_part = self.single_part.get_or_init(|| SinglePart::of(&self.module.path).map_err(|e| words(&e)));
        single_part.as_ref().map_err(|why| DeviceError::Failed(why.clone()))
    }
}

/// Objects that could not be read, and when to try again: at the next look at the token, and where that changes nothing less and
/// less often.
#[derive(Default)]
struct Unread {
    count: usize,
    /// After how many looks, and how many there were.
    pause: u32,
    looks: u32,
}

impl Unread {
    fn scanned(&mut self, count: usize) {
        let pause = if count == self.count { (2 * self.pause).min(MAX_PAUSE) } else { 1 };
        *self = Self { count, pause, looks: 0 };
    }

    fn is_due(&mut self) -> bool {
        self.looks = self.looks.saturating_add(1);
        self.count > 0 && self.looks >= self.pause
    }
}

/// The PIN that was sent last, and what the token made of it.
#[derive(Default)]
enum SentPin {
    /// None was, or what became of it is not known, or it is to be forgotten.
    #[default]
    None,
    Accepted(SecretString),
    /// It is not sent again. Whoever waited meanwhile comes with it once more, until word of the refusal has got around.
    Refused(SecretString),
}

impl SentPin {
    fn was_accepted(&self, pin: &SecretString) -> bool {
        matches!(self, Self::Accepted(accepted) if accepted.expose_secret() == pin.expose_secret())
    }

    fn was_refused(&self, pin: &SecretString) -> bool {
        matches!(self, Self::Refused(refused) if refused.expose_secret() == pin.expose_secret())
    }
}

/// A number that changes when objects come or go, when the token does, and with what it says of its PIN.
fn generation(session: &Session, token: &Token) -> Result<u64, Error> {
    let mut hasher = DefaultHasher::new();
    let mut handles: Vec<_> = object::find(session, &[])?.iter().map(ObjectHandle::handle).collect();
    handles.sort_unstable();
    handles.hash(&mut hasher);
    (&token.serial, &token.label, token.pin_count_low, token.pin_to_be_changed).hash(&mut hasher);
    Ok(hasher.finish())
}
