//! OpenPGP cards: YubiKeys, Nitrokeys, Gnuk and every other card of that specification (3.4.1), by PC/SC. One device for
//! each card, in a process of its own: a card that hangs hangs its callers for ever.
//!
//! `card` knows what is verified on a card, `operate` what it computes, `keys` what its keys are, `life` how they come to
//! it, `admin` its administration, `link` the connection.
//! A thread owns all of it, so that a program which keeps the card to itself is noticed: the caller gives up waiting.
//! One more process watches the readers (`watch`), for `finder` in the daemon.

mod admin;
mod card;
mod finder;
mod keys;
mod life;
mod link;
mod operate;
mod pin;
mod watch;

use std::{
    ffi::CString,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use secrecy::SecretString;
use zeroize::Zeroizing;

use self::{
    card::{Identity, Known, Token},
    link::Observed,
};
pub use self::{
    finder::{CardEngine, Finder, Found, News, Sighting, is_ident},
    watch::Readers,
};
use super::{
    CardChange, CardStatus, DecryptScheme, DeriveScheme, DeviceError, Driver, FoundKey, Input, MAX_LABEL, NewKey,
    PrivateHalf, Scan, Scheme, Slot, Status, host::child::Hosted,
};
use crate::rfc4251::{Put, Reader};

/// How long a card that nobody uses is kept open: then programs that want it for themselves can have it.
const IDLE: Duration = Duration::from_secs(2);

/// Which card to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The reader that it is in, as PC/SC names it: at most 256 bytes.
    pub reader: CString,
    /// Its manufacturer and serial, in hexadecimal: `0006:12345678`.
    pub ident: String,
    /// Whether RSA keys decrypt PKCS#1 v1.5, of which the card tells whether the padding was good.
    pub pkcs1_decrypt: bool,
    /// How long another program's transaction is waited for.
    pub patience: Duration,
}

impl Config {
    /// As its process reads it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_string(self.reader.as_bytes());
        out.put_string(self.ident.as_bytes());
        out.push(self.pkcs1_decrypt.into());
        out.put_u32(u32::try_from(self.patience.as_millis()).unwrap_or(u32::MAX));
        out
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let reader = r.string().ok().filter(|reader| reader.len() <= MAX_LABEL)?;
        let config = Self {
            reader: CString::new(reader).ok()?,
            ident: std::str::from_utf8(r.string().ok()?).ok()?.to_owned(),
            pkcs1_decrypt: r.bool().ok()?,
            patience: Duration::from_millis(r.u32().ok()?.into()),
        };
        r.finish().ok()?;
        Some(config)
    }
}

/// One card.
pub struct OpenPgp {
    config: Config,
    /// The number that the reader gave the card when it was put in.
    insertion: u32,
    thread: CardThread,
    observed: Arc<Observed>,
    known: Arc<Mutex<Known>>,
}

/// The thread that owns the card. Dropping it waits until the card is let go, with no PIN verified: pcscd resets the card of a
/// process that ends without that, under whoever else has it open.
struct CardThread {
    /// `None` once it is to end.
    jobs: Option<SyncSender<Job>>,
    handle: Option<JoinHandle<()>>,
}

impl CardThread {
    fn start(mut token: Token) -> io::Result<Self> {
        // There is room: nobody asks twice at a time, and who gave up leaves one job behind.
        let (jobs, inbox) = sync_channel(2);
        let handle = thread::Builder::new().name("card".into()).spawn(move || serve(&mut token, &inbox))?;
        Ok(Self { jobs: Some(jobs), handle: Some(handle) })
    }

    /// [`DeviceError::InUse`] when it still has enough to do.
    fn take(&self, job: Job) -> Result<(), DeviceError> {
        let jobs = self.jobs.as_ref().ok_or(DeviceError::Restarted)?;
        jobs.try_send(job).map_err(|_| DeviceError::InUse)
    }
}

impl Drop for CardThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(handle) = self.handle.take() {
            // A panic of it has ended the process before.
            let _ = handle.join();
        }
    }
}

/// What the card's thread is to do next.
struct Job {
    work: Box<dyn FnOnce(&mut Token) + Send>,
    /// [`QUEUED`], [`BEGUN`] or [`GIVEN_UP`].
    progress: Arc<AtomicU8>,
}

const QUEUED: u8 = 0;
const BEGUN: u8 = 1;
const GIVEN_UP: u8 = 2;

impl OpenPgp {
    /// Has the card's thread do something. [`DeviceError::InUse`] when another program keeps the card from it: then it is
    /// not done later either.
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Token) -> Result<T, DeviceError> + Send + 'static,
    ) -> Result<T, DeviceError> {
        let (reply, answer) = sync_channel(1);
        let progress = Arc::new(AtomicU8::new(QUEUED));
        let work = Box::new(move |token: &mut Token| _ = reply.send(work(token)));
        let job = Job { work, progress: Arc::clone(&progress) };
        self.thread.take(job)?;
        loop {
            match answer.recv_timeout(self.config.patience) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Disconnected) => return Err(DeviceError::Restarted),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Whatever else takes long is the card's own affair.
            let given_up = match progress.load(Ordering::SeqCst) {
                // What the thread waits for is for us.
                BEGUN => self.observed.give_up(),
                _ => self.observed.is_waiting() && change(&progress, GIVEN_UP),
            };
            if given_up {
                return Err(DeviceError::InUse);
            }
        }
    }
}

/// Whether the job was still in the queue, and now is what is said here.
fn change(progress: &AtomicU8, to: u8) -> bool {
    progress.compare_exchange(QUEUED, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
}

/// The life of the thread that owns the card.
fn serve(token: &mut Token, jobs: &Receiver<Job>) {
    loop {
        let next = if token.is_open() { jobs.recv_timeout(IDLE) } else { jobs.recv().map_err(Into::into) };
        match next {
            Ok(job) => {
                if change(&job.progress, BEGUN) {
                    (job.work)(token);
                }
            }
            Err(RecvTimeoutError::Timeout) => token.let_go(),
            Err(RecvTimeoutError::Disconnected) => {
                // Whoever else has the card open could go on with the PIN that was given to us.
                let _ = token.lock();
                return;
            }
        }
    }
}

impl Driver for OpenPgp {
    type Config = Config;
    const KIND: &'static str = "openpgp";

    async fn open(config: Config) -> Result<Self, DeviceError> {
        let insertion = link::insertion(&config.reader).map_err(|error| match error {
            DeviceError::Restarted => DeviceError::Failed(link::NO_SERVICE.to_owned()),
            other => other,
        })?;
        let identity = Identity {
            reader: config.reader.clone(),
            insertion,
            ident: config.ident.clone(),
            decrypts_pkcs1: config.pkcs1_decrypt,
        };
        let (observed, known) = (Arc::<Observed>::default(), Arc::<Mutex<Known>>::default());
        let token = Token::open(identity, Arc::clone(&observed), Arc::clone(&known))?;
        let thread =
            CardThread::start(token).map_err(|e| DeviceError::Failed(format!("cannot start a thread: {e}")))?;
        Ok(Self { config, insertion, thread, observed, known })
    }

    /// A card does one thing at a time.
    fn lanes(&self) -> usize {
        1
    }

    async fn scan(&self) -> Result<Scan, DeviceError> {
        self.ask(Token::scan)
    }

    async fn sign(&self, slot: &Slot, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let (slot, input) = (slot.clone(), input.clone().into_owned());
        self.ask(move |token| token.sign(&slot, scheme, &input))
    }

    async fn decrypt(
        &self,
        slot: &Slot,
        scheme: DecryptScheme,
        _: &[u8],
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        if scheme != DecryptScheme::RsaPkcs1v15 {
            return Err(DeviceError::unsupported("cards decrypt PKCS#1 v1.5 only"));
        }
        let (slot, ciphertext) = (slot.clone(), ciphertext.to_vec());
        self.ask(move |token| token.decrypt(&slot, &ciphertext))
    }

    async fn derive(&self, slot: &Slot, _: DeriveScheme, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let (slot, peer) = (slot.clone(), peer.to_vec());
        self.ask(move |token| token.derive(&slot, &peer))
    }

    async fn generate(&self, new: &NewKey) -> Result<FoundKey, DeviceError> {
        let new = new.clone();
        self.ask(move |token| token.generate(&new))
    }

    async fn import(&self, new: &NewKey, private: &PrivateHalf) -> Result<FoundKey, DeviceError> {
        let (new, private) = (new.clone(), private.clone());
        self.ask(move |token| token.import(&new, &private))
    }

    async fn card_status(&self) -> Result<CardStatus, DeviceError> {
        self.ask(Token::card_status)
    }

    async fn change_card(&self, change: &CardChange) -> Result<(), DeviceError> {
        let change = change.clone();
        self.ask(move |token| token.change(&change))
    }

    async fn unlock(&self, pin: SecretString, even_last: bool) -> Result<(), DeviceError> {
        self.ask(move |token| token.unlock(pin, even_last))
    }

    async fn lock(&self) -> Result<(), DeviceError> {
        self.ask(Token::lock)
    }

    /// Looks into the reader, and leaves the card alone.
    async fn health(&self) -> Result<Status, DeviceError> {
        if link::insertion(&self.config.reader)? != self.insertion {
            return Err(DeviceError::Absent);
        }
        Ok(self.known.lock().unwrap_or_else(PoisonError::into_inner).tell())
    }
}

impl Hosted for OpenPgp {
    fn config(bytes: &[u8]) -> Result<Config, DeviceError> {
        Config::from_bytes(bytes).ok_or_else(|| DeviceError::Failed("the card's configuration makes no sense".into()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_reads_back_as_it_was_written() {
        let config = Config {
            reader: c"Virtual PCD A 00 00".into(),
            ident: "FFFE:00000001".into(),
            pkcs1_decrypt: true,
            patience: Duration::from_millis(1500),
        };
        let bytes = config.to_bytes();
        assert_eq!(Config::from_bytes(&bytes), Some(config));
        assert!((0..bytes.len()).all(|len| Config::from_bytes(&bytes[..len]).is_none()));
    }
}
