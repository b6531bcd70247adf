//! The inside of the process that watches the readers: which of them hold an OpenPGP card, and which one. Waits for PC/SC
//! to say that something changed, reads a card's name once each time that it is put in, and tells what there is whenever
//! that is something else than before.
//!
//! A card is read by a thread of its own, since one that hangs hangs its reader for ever. Its reading neither resets it
//! nor, where somebody uses another of its applications, selects ours.

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString},
    io,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use pcsc::{Card, Context, Disposition, Error, PNP_NOTIFICATION, Protocols, ReaderState, Scope, ShareMode, State};

use super::{
    finder::Sighting,
    link::{self, GET_AID, NO_SERVICE, OPENPGP, exchange, ident_of},
};
use crate::devices::host::child::Watcher;

/// While pcscd is not there, it is looked for after this…
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// …and after twice as long each time, up to this: nothing announces that it comes.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// How soon what a thread has read is fetched…
const SOON: Duration = Duration::from_millis(20);
/// …while it has not been at it for longer than this. After that, and where another program has the card for itself…
const QUICK: Duration = Duration::from_secs(1);
/// …this is how often it is looked at.
const LATER: Duration = Duration::from_secs(2);

/// Watches the readers.
pub struct Readers;

impl Watcher for Readers {
    const KIND: &'static str = "openpgp-readers";

    fn watch(tell: &mut dyn FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()> {
        let mut told = None;
        let mut pause = FIRST_PAUSE;
        let mut tell_once = |sighting: Sighting| -> io::Result<()> {
            if told.as_ref() != Some(&sighting) {
                tell(sighting.to_bytes())?;
                told = Some(sighting);
            }
            Ok(())
        };
        loop {
            let error = match Context::establish(Scope::User) {
                Ok(context) => {
                    pause = FIRST_PAUSE;
                    Watch::new(context).run(&mut tell_once)?
                }
                Err(error) => error,
            };
            let why = match error {
                error if link::is_service_gone(error) => NO_SERVICE.to_owned(),
                error => format!("pcscd does not let the readers be watched: {error}"),
            };
            tell_once(Sighting::Trouble(why))?;
            thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// A connection to pcscd, and what is known of its readers.
struct Watch {
    context: Context,
    states: Vec<ReaderState>,
    readers: BTreeMap<CString, Reader>,
    read: (Sender<Reading>, Receiver<Reading>),
    has_told: bool,
}

/// What came of reading the card in a reader.
struct Reading {
    reader: CString,
    insertion: u32,
    found: Result<Option<String>, Later>,
}

/// The card cannot be read now.
struct Later;

#[derive(Default)]
struct Reader {
    /// Whether PC/SC has said what is in it.
    asked: bool,
    /// The number of the card that is in it; it is another one each time.
    insertion: Option<u32>,
    /// That of the card which was read, and its name where it is one of ours.
    known: Option<(u32, Option<String>)>,
    /// Since when a thread has been reading.
    reading: Option<Instant>,
    /// Not before this is it read again.
    after: Option<Instant>,
}

impl Watch {
    fn new(context: Context) -> Self {
        let states = vec![ReaderState::new(PNP_NOTIFICATION(), State::UNAWARE)];
        Self { context, states, readers: BTreeMap::new(), read: channel(), has_told: false }
    }

    /// Until pcscd goes, for the reason returned, or nobody listens any more.
    fn run(mut self, tell: &mut dyn FnMut(Sighting) -> io::Result<()>) -> io::Result<Error> {
        loop {
            if let Err(error) = self.list() {
                return Ok(error);
            }
            self.fetch();
            self.begin_readings();
            if self.has_news() {
                tell(Sighting::Cards(self.cards()))?;
                self.has_told = true;
            }
            match self.context.get_status_change(self.patience(), &mut self.states) {
                Ok(()) | Err(Error::Timeout | Error::UnknownReader | Error::ReaderUnavailable) => {}
                Err(error) => return Ok(error),
            }
            self.learn();
        }
    }

    /// Takes up readers that are new, and drops those that are there no more.
    fn list(&mut self) -> Result<(), Error> {
        let names = match self.context.list_readers_owned() {
            Err(Error::NoReadersAvailable) => Vec::new(),
            names => names?,
        };
        self.states
            .retain(|state| state.name() == PNP_NOTIFICATION() || names.iter().any(|name| **name == *state.name()));
        self.readers.retain(|name, _| names.contains(name));
        for name in names {
            if !self.readers.contains_key(&name) {
                self.states.push(ReaderState::new(name.clone(), State::UNAWARE));
                self.readers.insert(name, Reader::default());
            }
        }
        Ok(())
    }

    fn learn(&mut self) {
        for state in &mut self.states {
            state.sync_current_state();
            let Some(reader) = self.readers.get_mut(state.name()) else { continue };
            let now = state.event_state();
            reader.asked = true;
            let present = now.contains(State::PRESENT) && !now.contains(State::MUTE);
            reader.insertion = present.then(|| state.event_count());
            // Whoever had it may be done with it.
            reader.after = None;
        }
    }

    /// Takes over what the threads have read.
    fn fetch(&mut self) {
        while let Ok(Reading { reader, insertion, found }) = self.read.1.try_recv() {
            let Some(reader) = self.readers.get_mut(&reader) else { continue };
            reader.reading = None;
            match found {
                Ok(ident) => reader.known = Some((insertion, ident)),
                Err(Later) => reader.after = Some(Instant::now() + LATER),
            }
        }
    }

    /// Has the cards read that are not known yet. One that hangs keeps its thread; there is one for each reader.
    fn begin_readings(&mut self) {
        let now = Instant::now();
        for (name, reader) in &mut self.readers {
            let Some(insertion) = reader.insertion else { continue };
            let is_known = reader.known.as_ref().is_some_and(|(known, _)| *known == insertion);
            if is_known || reader.reading.is_some() || reader.after.is_some_and(|after| now < after) {
                continue;
            }
            let (reply, name) = (self.read.0.clone(), name.clone());
            let read = move || {
                let found = read_ident(&name);
                let _ = reply.send(Reading { reader: name, insertion, found });
            };
            match thread::Builder::new().name("read".into()).spawn(read) {
                Ok(_) => reader.reading = Some(now),
                Err(_) => reader.after = Some(now + LATER),
            }
        }
    }

    /// How long nothing is to be done unless PC/SC says so; `None`: for ever.
    fn patience(&self) -> Option<Duration> {
        let now = Instant::now();
        let wait = |reader: &Reader| match (reader.reading, reader.after) {
            (Some(since), _) if now.duration_since(since) < QUICK => Some(SOON),
            (Some(_), _) => Some(LATER),
            (None, Some(after)) => Some(after.saturating_duration_since(now).max(SOON)),
            (None, None) => None,
        };
        self.readers.values().filter_map(wait).min()
    }

    /// Whether it is known what there is. At first that takes until the cards are read, but for those that take long.
    fn has_news(&self) -> bool {
        let now = Instant::now();
        let pending = |reader: &Reader| reader.reading.is_some_and(|since| now.duration_since(since) < QUICK);
        self.readers.values().all(|reader| reader.asked && (self.has_told || !pending(reader)))
    }

    fn cards(&self) -> Vec<(CString, String)> {
        let ours = |(name, reader): (&CString, &Reader)| match &reader.known {
            Some((insertion, Some(ident))) if reader.insertion == Some(*insertion) => {
                Some((name.clone(), ident.clone()))
            }
            _ => None,
        };
        self.readers.iter().filter_map(ours).collect()
    }
}

/// The manufacturer and serial of the card in a reader; `None` for a card that is none of OpenPGP.
fn read_ident(reader: &CStr) -> Result<Option<String>, Later> {
    let context = Context::establish(Scope::User).map_err(|_| Later)?;
    let in_use = {
        let mut states = [ReaderState::new(reader, State::UNAWARE)];
        context.get_status_change(Duration::ZERO, &mut states).map_err(|_| Later)?;
        states[0].event_state().contains(State::INUSE)
    };
    let mut card = match context.connect(reader, ShareMode::Shared, Protocols::ANY) {
        Ok(card) => card,
        Err(Error::SharingViolation) => return Err(Later),
        // A card of another kind, or none any more: there will be news of it.
        Err(_) => return Ok(None),
    };
    let found = ask_ident(&mut card, in_use);
    // An error: there will be news of it.
    let _ = link::disconnect(card, Disposition::LeaveCard);
    found
}

fn ask_ident(card: &mut Card, in_use: bool) -> Result<Option<String>, Later> {
    let transaction = link::begin(card, &mut false).map_err(|_| Later)?;
    if let Some(ident) = exchange(&transaction, &GET_AID).map_err(|_| Later)?.as_deref().and_then(ident_of) {
        return Ok(Some(ident));
    }
    // Another application is selected. If somebody uses it, ours has to wait.
    if in_use {
        return Err(Later);
    }
    let select = [&[0x00, 0xa4, 0x04, 0x00, 6][..], &OPENPGP, &[0]].concat();
    if exchange(&transaction, &select).map_err(|_| Later)?.is_none() {
        return Ok(None);
    }
    Ok(exchange(&transaction, &GET_AID).map_err(|_| Later)?.as_deref().and_then(ident_of))
}
