//! OpenPGP cards: two virtual ones at once behind one pcscd, in a room of their own, and in one vault. Their drivers run in
//! that room, too.

use std::{sync::Arc, time::Duration};

use strongroom::{
    devices::{
        Device, Driver, Health, Settings,
        host::{Host, HostSettings},
        openpgp::{Config, OpenPgp},
    },
    prompt::{self, Prompter},
    vault::{self, Parts, Vault, registry::Terms, store::Store},
};

use crate::{
    room::{CardInRoom, KeptRoom},
    subject::{HasPin, PATIENCE, Removable, Subject},
    support::{pcsc::Reader, reactor::engine},
};

const PIN: &str = "123456";

/// A card with Ed25519 and X25519 keys.
pub(crate) type Curve25519 = Card<0>;
/// A card with NIST's curve P-256.
pub(crate) type P256 = Card<1>;
/// A card with NIST's curve P-384.
pub(crate) type P384 = Card<2>;
/// A card with NIST's curve P-521.
pub(crate) type P521 = Card<3>;
/// A card with RSA keys.
pub(crate) type Rsa2048 = Card<4>;
/// A card with long RSA keys.
pub(crate) type Rsa4096 = Card<5>;

/// The cards of tests/fixtures, and the fewest schemes that each signs in.
const CARDS: [(&str, usize); 6] = [("25519", 1), ("p256", 3), ("p384", 3), ("p521", 3), ("rsa2048", 4), ("rsa4096", 4)];

/// A card with the keys of one of [`CARDS`].
pub(crate) struct Card<const KEYS: usize> {
    device: Device,
    card: CardInRoom,
}

tokio::task_local! {
    /// Where the card of a subject that is started here goes.
    static SPOT: (Arc<Shared>, Reader);
}

/// What two cards share.
struct Shared {
    room: Arc<KeptRoom>,
    vault: Arc<Vault>,
}

/// Puts two cards to something at once.
pub(crate) async fn at_once(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let parts = Parts::new(Prompter::new(prompt::Settings::default()), Store::in_memory().unwrap());
    let vault = Vault::new(vault::Settings::default(), parts);
    let shared = Arc::new(Shared { room: Arc::new(KeptRoom::new()), vault });
    let one = SPOT.scope((Arc::clone(&shared), Reader::A), one);
    let other = SPOT.scope((Arc::clone(&shared), Reader::B), other);
    tokio::join!(one, other);
    assert_eq!(shared.vault.devices().len(), 2);
}

impl<const KEYS: usize> Card<KEYS> {
    fn with(settings: Settings) -> Self {
        let (shared, reader) = SPOT.with(Clone::clone);
        let card = CardInRoom::beside_others(Arc::clone(&shared.room), reader, CARDS[KEYS].0);
        card.take_pin_for_many_signatures();
        let config = Config {
            reader: std::ffi::CString::new(card.reader().name()).unwrap(),
            ident: format!("0000:{}", card.serial()),
            pkcs1_decrypt: true,
            patience: Duration::from_secs(3),
        };
        let host = HostSettings { program: card.program(), ..HostSettings::new("card") };
        // A card is slow, and the suite is not.
        let settings = Settings { timeout: settings.timeout.max(PATIENCE), ..settings };
        let engine = engine(Host::new(OpenPgp::KIND, config.to_bytes(), host));
        let device = Device::start(card.serial(), OpenPgp::KIND, settings, engine);
        shared.vault.add_device(device.clone(), Terms::default(), &[]).unwrap();
        Self { device, card }
    }
}

impl<const KEYS: usize> Subject for Card<KEYS> {
    const SCHEMES: usize = CARDS[KEYS].1;

    async fn start(settings: Settings) -> Self {
        let subject = Self::with(settings);
        subject.ready().await;
        subject
    }

    fn device(&self) -> &Device {
        &self.device
    }

    /// A card that was put in wants its PIN.
    async fn ready(&self) {
        self.becomes("ready", |state| state.health == Health::Ready).await;
        self.device.unlock(PIN.into()).await.unwrap();
    }
}

impl<const KEYS: usize> HasPin for Card<KEYS> {
    const PIN: &'static str = PIN;
    const WRONG: &'static str = "654321";
    const TRIES: u8 = 3;

    async fn start_locked(settings: Settings) -> Self {
        let subject = Self::with(settings);
        subject.becomes("ready", |state| state.health == Health::Ready).await;
        subject
    }
}

impl<const KEYS: usize> Removable for Card<KEYS> {
    fn remove(&self) {
        self.card.pull();
    }

    fn put_back(&self) {
        self.card.put_back();
    }
}
