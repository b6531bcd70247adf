//! Which cards are where: the daemon's side of the process that watches the readers, and what starts the process of a card
//! where it is found. Knows no vault.

use std::{collections::BTreeMap, ffi::CString, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{Config, OpenPgp, watch::Readers};
use crate::{
    devices::{
        DeviceError, Driver, MAX_LABEL,
        call::Engine,
        host::{Host, HostEngine, HostSession, HostSettings, child::Watcher},
    },
    prompt::harmless,
    reactor::Registry,
    rfc4251::{Put, Reader},
};

/// The most readers that are followed.
const MAX_READERS: usize = 64;
/// The pause before the watching process is started again; doubled each time that it dies…
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// …up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A process that has lived this long died for the first time.
const STABLE: Duration = Duration::from_secs(60);
/// How long a card's opening waits for the first news of the readers.
const FIRST_NEWS: Duration = Duration::from_secs(5);

/// The longest reason that is told, in bytes: what [`harmless`] leaves of a text fits.
const MAX_TROUBLE: usize = 4 * (MAX_LABEL + 1);

/// What the watching process tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// The readers cannot be watched, for this reason for people.
    Trouble(String),
    /// The cards that are there, with the readers they are in.
    Cards(Vec<(CString, String)>),
}

impl Sighting {
    /// As the process writes it: at most 64 cards, in readers whose names have at most 256 bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Trouble(why) => {
                out.push(0);
                out.put_string(&why.as_bytes()[..why.floor_char_boundary(MAX_TROUBLE)]);
            }
            Self::Cards(cards) => {
                out.push(1);
                // A reader whose name is too long is none that could be named to a driver.
                let fitting =
                    || cards.iter().filter(|(reader, _)| reader.as_bytes().len() <= MAX_LABEL).take(MAX_READERS);
                out.put_u32(u32::try_from(fitting().count()).unwrap_or(0));
                for (reader, ident) in fitting() {
                    out.put_string(reader.as_bytes());
                    out.put_string(ident.as_bytes());
                }
            }
        }
        out
    }

    /// As the daemon reads it; `None` for what no such process writes, which ends the process.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader::new(bytes);
        let sighting = match r.u8().ok()? {
            0 => Self::Trouble(harmless(std::str::from_utf8(r.string().ok()?).ok()?)),
            1 => {
                let count = r.u32().ok().filter(|count| *count as usize <= MAX_READERS)?;
                let mut cards = Vec::new();
                for _ in 0..count {
                    let reader = r.string().ok().filter(|reader| reader.len() <= MAX_LABEL)?;
                    let ident = std::str::from_utf8(r.string().ok()?).ok().filter(|ident| is_ident(ident))?;
                    cards.push((CString::new(reader).ok()?, ident.to_owned()));
                }
                Self::Cards(cards)
            }
            _ => return None,
        };
        r.finish().ok()?;
        Some(sighting)
    }
}

/// Whether this names a card: manufacturer and serial in hexadecimal, as in `0006:12345678`.
pub fn is_ident(text: &str) -> bool {
    let digits =
        |text: &str, len| text.len() == len && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    text.split_once(':').is_some_and(|(manufacturer, serial)| digits(manufacturer, 4) && digits(serial, 8))
}

/// What is known of the readers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Why they cannot be watched, for people.
    pub trouble: Option<String>,
    /// The reader of each card that is there, by the card's manufacturer and serial.
    pub readers: BTreeMap<String, CString>,
}

/// Follows what is known; `None` before there was any news.
pub type News = watch::Receiver<Option<Arc<Found>>>;

/// The process that watches the readers, started again whenever it ends. Dropping it ends the process.
pub struct Finder {
    news: News,
    task: AbortHandle,
}

impl Finder {
    /// Starts to watch. Needs a Tokio runtime around it.
    pub fn start() -> Self {
        let (sender, news) = watch::channel(None);
        let task = tokio::spawn(follow(sender)).abort_handle();
        Self { news, task }
    }

    /// What it finds.
    pub fn news(&self) -> News {
        self.news.clone()
    }
}

impl Drop for Finder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(news: watch::Sender<Option<Arc<Found>>>) {
    let host = Host::new(Readers::KIND, Vec::new(), HostSettings::new("readers"));
    let mut pause = FIRST_PAUSE;
    loop {
        let born = Instant::now();
        let why = host.listen(|bytes| Sighting::from_bytes(bytes).map(|sighting| publish(&news, sighting))).await;
        warn!("the process that watches the readers ended: {why}");
        publish(&news, Sighting::Trouble(format!("the readers are not watched: {why}")));
        pause = if born.elapsed() >= STABLE { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
        sleep(pause).await;
    }
}

fn publish(news: &watch::Sender<Option<Arc<Found>>>, sighting: Sighting) {
    let found = match sighting {
        Sighting::Trouble(why) => {
            debug!("no cards are found: {why}");
            Found { trouble: Some(why), readers: BTreeMap::new() }
        }
        // Two cards of one name: the reader that comes last has it.
        Sighting::Cards(cards) => {
            Found { trouble: None, readers: cards.into_iter().map(|(reader, ident)| (ident, reader)).collect() }
        }
    };
    news.send_if_modified(|old| {
        let differs = old.as_deref() != Some(&found);
        if differs {
            *old = Some(Arc::new(found));
        }
        differs
    });
}

/// Runs the driver of one card, in the reader where it is found.
pub struct CardEngine {
    /// Its manufacturer and serial.
    pub ident: String,
    /// Whether RSA keys decrypt PKCS#1 v1.5.
    pub pkcs1_decrypt: bool,
    /// How long another program's transaction is waited for.
    pub patience: Duration,
    /// How its process is started.
    pub settings: HostSettings,
    /// Where the cards are.
    pub news: News,
    /// Where the process's socket is waited for.
    pub reactor: Registry,
}

impl Engine for CardEngine {
    type Session = HostSession;

    async fn open(&self) -> Result<HostSession, DeviceError> {
        let found = {
            let mut news = self.news.clone();
            let known = timeout(FIRST_NEWS, news.wait_for(Option::is_some)).await;
            match known {
                Ok(Ok(found)) => found.clone(),
                _ => None,
            }
        };
        let found = found.ok_or(DeviceError::Absent)?;
        let Some(reader) = found.readers.get(&self.ident) else {
            return Err(found.trouble.clone().map_or(DeviceError::Absent, DeviceError::Failed));
        };
        let config = Config {
            reader: reader.clone(),
            ident: self.ident.clone(),
            pkcs1_decrypt: self.pkcs1_decrypt,
            patience: self.patience,
        };
        let host = Host::new(OpenPgp::KIND, config.to_bytes(), self.settings.clone());
        HostEngine { host, reactor: self.reactor.clone() }.open().await
    }

    fn spawn(&self, worker: impl Future<Output = ()> + Send + 'static) {
        self.reactor.spawn(worker);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_told_reads_back() {
        let cards = vec![
            (CString::from(c"Reader A 00 00"), "0006:12345678".to_owned()),
            (CString::from(c"Reader B 00 00"), "FFFE:00000001".to_owned()),
        ];
        for sighting in [Sighting::Trouble("pcscd is gone".into()), Sighting::Cards(Vec::new()), Sighting::Cards(cards)]
        {
            let bytes = sighting.to_bytes();
            assert_eq!(Sighting::from_bytes(&bytes), Some(sighting));
            assert!((0..bytes.len()).all(|len| Sighting::from_bytes(&bytes[..len]).is_none()));
        }
    }

    #[test]
    fn what_is_out_of_bounds_is_not_told() {
        let card = |n: usize| (CString::new("R".repeat(n)).unwrap(), "0006:12345678".to_owned());
        let told = |cards| match Sighting::from_bytes(&Sighting::Cards(cards).to_bytes()) {
            Some(Sighting::Cards(cards)) => cards.len(),
            _ => usize::MAX,
        };
        assert_eq!(told(vec![card(MAX_LABEL + 1), card(MAX_LABEL)]), 1);
        assert_eq!(told(vec![card(1); MAX_READERS + 1]), MAX_READERS);
        let nameless = Sighting::Cards(vec![(CString::from(c"R"), "0006:1234".to_owned())]);
        assert_eq!(Sighting::from_bytes(&nameless.to_bytes()), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Sighting::from_bytes(&bytes);
        }
    }
}
