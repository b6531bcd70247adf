//! OpenPGP cards that become devices by themselves: the process that finds them, and who is told of what it finds. Knows
//! the vault's devices; what a card is, the driver knows.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::task::AbortHandle;
use tracing::{debug, error, info, warn};

use crate::{
    config::{Config, DriverConfig},
    devices::{
        Device, Driver, FoundKey, Settings,
        host::HostSettings,
        openpgp::{CardEngine, Finder, Found, News, OpenPgp, is_ident},
    },
    reactor::Registry,
    vault::{Vault, key::Grants, registry::Terms, store::KnownDevice},
};

/// How much of an operation's time a card may be waited for that another program keeps: the rest is for the card.
const OTHERS: u32 = 2;
/// Another program's transaction is waited for no longer than this.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

/// The cards of a vault.
pub(super) struct Cards {
    vault: Arc<Vault>,
    reactor: Registry,
    /// Started when the first card is looked for: who has no use for cards has no process for them.
    finder: OnceLock<Finder>,
    devices: Arc<Mutex<Devices>>,
    task: OnceLock<AbortHandle>,
    finds: Arc<AtomicBool>,
}

/// The devices that are cards, by their manufacturer and serial.
#[derive(Default)]
struct Devices {
    configured: BTreeMap<String, Device>,
    found: BTreeMap<String, Device>,
}

impl Cards {
    /// Finds nothing yet.
    pub(super) fn new(vault: &Arc<Vault>, reactor: &Registry) -> Self {
        Self {
            vault: Arc::clone(vault),
            reactor: reactor.clone(),
            finder: OnceLock::new(),
            devices: Arc::default(),
            task: OnceLock::new(),
            finds: Arc::default(),
        }
    }

    /// Starts the device of a card that the configuration names. Needs a runtime around it.
    pub(super) fn start(&self, ident: &str, pkcs1_decrypt: bool, settings: Settings, host: HostSettings) -> Device {
        let name = host.name.clone();
        let device = start(&self.reactor, &self.news(), ident, pkcs1_decrypt, &name, settings, host);
        self.devices().configured.insert(ident.to_owned(), device.clone());
        device
    }

    /// Makes devices of the cards that no `[[device]]` names, or of none of them, as the configuration says. `known` are
    /// those of the last run. Called when the configured devices have been started. Needs a runtime around it.
    pub(super) fn find(&self, config: &Config, known: &[KnownDevice]) {
        let finds = config.openpgp.find;
        let named = |ident: &str| {
            config
                .devices
                .iter()
                .any(|config| matches!(&config.driver, DriverConfig::OpenPgp { card, .. } if card == ident))
        };
        let unwanted: Vec<Device> = {
            let mut devices = self.devices();
            devices.configured.retain(|ident, _| named(ident));
            devices.found.extract_if(.., |ident, _| !finds || named(ident)).map(|(_, device)| device).collect()
        };
        for device in unwanted {
            let vault = Arc::clone(&self.vault);
            tokio::spawn(async move { vault.remove_device(&device, false).await });
        }
        self.finds.store(finds, Ordering::Relaxed);
        if finds {
            let before = known.iter().filter(|known| known.kind == OpenPgp::KIND && is_ident(&known.serial));
            for known in before.filter(|known| known.name == name_of(&known.serial)) {
                add(&self.vault, &self.reactor, &self.news(), &self.devices, &known.serial, &known.keys);
            }
            let here = self.news().borrow().clone().unwrap_or_default();
            here.readers
                .keys()
                .for_each(|ident| add(&self.vault, &self.reactor, &self.news(), &self.devices, ident, &[]));
        }
        if finds || !self.devices().configured.is_empty() {
            let follow = || {
                let (vault, reactor) = (Arc::clone(&self.vault), self.reactor.clone());
                follow(vault, reactor, self.news(), Arc::clone(&self.devices), Arc::clone(&self.finds))
            };
            self.task.get_or_init(|| tokio::spawn(follow()).abort_handle());
        }
    }

    fn news(&self) -> News {
        self.finder.get_or_init(Finder::start).news()
    }

    fn devices(&self) -> std::sync::MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Cards {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

/// Takes up cards that are new, and has those looked at that came, went or moved.
async fn follow(
    vault: Arc<Vault>,
    reactor: Registry,
    mut news: News,
    devices: Arc<Mutex<Devices>>,
    finds: Arc<AtomicBool>,
) {
    let mut before = Arc::<Found>::default();
    loop {
        let now = news.borrow_and_update().clone().unwrap_or_default();
        let known: Vec<(String, Device)> = {
            let devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
            devices
                .configured
                .iter()
                .chain(&devices.found)
                .map(|(ident, device)| (ident.clone(), device.clone()))
                .collect()
        };
        tell_trouble(&before, &now, !known.is_empty());
        for (ident, device) in known {
            if before.readers.get(&ident) != now.readers.get(&ident) || before.trouble != now.trouble {
                device.probe();
            }
        }
        // Those that are new look for themselves.
        for ident in now.readers.keys().filter(|_| finds.load(Ordering::Relaxed)) {
            add(&vault, &reactor, &news, &devices, ident, &[]);
        }
        before = now;
        if news.changed().await.is_err() {
            return;
        }
    }
}

/// Says why there are no cards, to those who have some.
fn tell_trouble(before: &Found, now: &Found, has_cards: bool) {
    match (&before.trouble, &now.trouble) {
        (old, Some(why)) if old.as_ref() != Some(why) && has_cards => warn!("no cards: {why}"),
        (old, Some(why)) if old.as_ref() != Some(why) => debug!("no cards: {why}"),
        (Some(_), None) => debug!("cards are found again"),
        _ => {}
    }
}

/// Makes a device of a card, unless it is one.
fn add(vault: &Arc<Vault>, reactor: &Registry, news: &News, devices: &Mutex<Devices>, ident: &str, known: &[FoundKey]) {
    let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
    if devices.configured.contains_key(ident) || devices.found.contains_key(ident) {
        return;
    }
    let name = name_of(ident);
    if vault.device(&name).is_some() {
        warn!(
            device = name,
            "a configured device has the name of the card {ident}, which is left alone; name it otherwise"
        );
        return;
    }
    let device = start(reactor, news, ident, false, &name, Settings::default(), HostSettings::new(&name));
    let terms = Terms { grants: Grants::ALL, ..Terms::default() };
    match vault.add_device(device.clone(), terms, known) {
        Ok(()) => {
            info!(device = name, "found a card");
            devices.found.insert(ident.to_owned(), device);
        }
        Err(why) => error!(device = name, "the card cannot be used: {why}"),
    }
}

fn start(
    reactor: &Registry,
    news: &News,
    ident: &str,
    pkcs1_decrypt: bool,
    name: &str,
    settings: Settings,
    host: HostSettings,
) -> Device {
    let engine = CardEngine {
        ident: ident.to_owned(),
        pkcs1_decrypt,
        patience: (settings.timeout / OTHERS).min(LONGEST_WAIT),
        settings: host,
        news: news.clone(),
        reactor: reactor.clone(),
    };
    Device::start(name, OpenPgp::KIND, settings, engine)
}

/// `card-000612345678`: what a card's device is called that nobody named.
fn name_of(ident: &str) -> String {
    format!("card-{}", ident.replace(':', "").to_ascii_lowercase())
}
