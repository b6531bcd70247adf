//! OpenSC's module on virtual OpenPGP cards: it makes a token of each of a card's two user PINs, `User PIN (sig)` with the
//! signing key and `User PIN` with the others.
//!
//! Not in the suite: making, naming and deleting keys, since OpenSC does nothing lasting there, and counting tries, of which
//! it tells the last only. The tests at the end have what it says itself.

use strongroom::{
    devices::{
        Algorithm, Device, DeviceError, Health, NewKey, Patience, PrivateHalf, Scheme, Settings,
        pkcs11::{Config, Module},
        soft::SoftParts,
    },
    public_key::Curve,
};

use crate::{
    pkcs11::{config, device, patient},
    room::CardInRoom,
    subject::{HasPin, Removable, Subject, settings},
    support::library,
};

/// The cards of tests/fixtures, and how many schemes the keys of a token claim: with RSA there is no PSS.
const CARDS: [(&str, usize); 5] = [("25519", 1), ("p256", 3), ("p384", 3), ("p521", 3), ("rsa2048", 5)];

/// The signing key of an Ed25519 card.
pub(crate) type Sign25519 = Token<0, true>;
/// The other keys of an Ed25519 card.
pub(crate) type Others25519 = Token<0, false>;
/// The authentication and decryption keys of a card with NIST's curve P-256.
pub(crate) type OthersP256 = Token<1, false>;
/// The same with P-384.
pub(crate) type OthersP384 = Token<2, false>;
/// The same with P-521.
pub(crate) type OthersP521 = Token<3, false>;
/// The same with RSA.
pub(crate) type OthersRsa2048 = Token<4, false>;

/// One token of a card with the keys of one of [`CARDS`].
pub(crate) struct Token<const KEYS: usize, const SIGNING: bool> {
    device: Device,
    card: CardInRoom,
}

impl<const KEYS: usize, const SIGNING: bool> Token<KEYS, SIGNING> {
    fn of(card: CardInRoom, settings: Settings) -> Self {
        let pin = if SIGNING { "User%20PIN%20%28sig%29" } else { "User%20PIN" };
        let token = format!("pkcs11:token=OpenPGP%20card%20%28{pin}%29");
        // The only way to decrypt that the module has.
        let config = Config { pkcs1_decrypt: true, ..config(Module::new(library("opensc-pkcs11.so")), &token) };
        let device = device(&config, card.program(), [("HOME", "/nonexistent")], patient(settings));
        Self { device, card }
    }

    /// The same card, after its module was loaded anew.
    async fn again(self) -> Self {
        self.device.begin_end(DeviceError::Gone);
        self.device.ended().await;
        let subject = Self::of(self.card, settings());
        subject.ready().await;
        subject
    }

    fn labels(&self) -> Vec<String> {
        let scan = self.device.state().scan.clone().unwrap();
        scan.keys.iter().map(|key| key.label.clone()).collect()
    }
}

impl<const KEYS: usize, const SIGNING: bool> Subject for Token<KEYS, SIGNING> {
    const SCHEMES: usize = CARDS[KEYS].1;
    const QUICK_KEYS: usize = 1;

    async fn start(settings: Settings) -> Self {
        let subject = Self::of(CardInRoom::new(CARDS[KEYS].0), settings);
        subject.ready().await;
        subject
    }

    fn device(&self) -> &Device {
        &self.device
    }

    /// A card that was put in wants its PIN.
    async fn ready(&self) {
        self.becomes("ready", |state| state.health == Health::Ready).await;
        self.device.unlock(Self::PIN.into()).await.unwrap();
        self.becomes("all keys found", |state| state.scan.as_ref().is_some_and(|scan| scan.complete)).await;
    }
}

impl<const KEYS: usize, const SIGNING: bool> HasPin for Token<KEYS, SIGNING> {
    const PIN: &'static str = "123456";
    const WRONG: &'static str = "654321";
    const TRIES: u8 = 3;

    async fn start_locked(settings: Settings) -> Self {
        let subject = Self::of(CardInRoom::new(CARDS[KEYS].0), settings);
        subject.becomes("ready", |state| state.health == Health::Ready).await;
        subject
    }
}

impl<const KEYS: usize, const SIGNING: bool> Removable for Token<KEYS, SIGNING> {
    fn remove(&self) {
        self.card.pull();
    }

    fn put_back(&self) {
        self.card.put_back();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_its_tries_it_tells_the_last() {
    let subject = OthersP256::start_locked(settings()).await;
    let try_pin = async |pin: &str| subject.device.unlock(pin.into()).await;
    assert_eq!(try_pin(OthersP256::WRONG).await, Err(DeviceError::PinWrong { left: None }));
    // The same is not sent again.
    assert_eq!(try_pin(OthersP256::WRONG).await, Err(DeviceError::PinWrong { left: None }));
    assert_eq!(try_pin("111111").await, Err(DeviceError::PinWrong { left: Some(1) }));
    assert_eq!(try_pin("222222").await, Err(DeviceError::PinBlocked));
    // It answers CKR_PIN_INCORRECT to the right one, too.
    assert_eq!(subject.device.unlock(OthersP256::PIN.into()).await, Err(DeviceError::PinBlocked));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_it_cannot_do_has_the_modules_reason() {
    let subject = OthersRsa2048::start(settings()).await;
    let (device, patience) = (&subject.device, Patience::default());
    let says = |result: Result<(), DeviceError>, why: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    for (algorithm, why) in [
        (Algorithm::Ed25519, "the token makes no ed25519 keys"),
        (Algorithm::Ecdsa(Curve::P256), "C_GenerateKeyPair answered CKR_ARGUMENTS_BAD"),
        (Algorithm::Rsa(2048), "C_GenerateKeyPair answered CKR_ARGUMENTS_BAD"),
    ] {
        says(device.generate(0, NewKey::new("new", algorithm), patience).await.map(drop), why);
    }
    let half = PrivateHalf::of(&SoftParts::Ed25519 { seed: &[1; 32], public: &[2; 32] }).unwrap();
    let brought = device.import(0, NewKey::new("new", Algorithm::Ed25519), half, patience).await;
    says(brought.map(drop), "C_CreateObject answered CKR_ATTRIBUTE_VALUE_INVALID");
    let random = device.random(0, 16, patience).await;
    says(random.map(drop), "C_GenerateRandom answered CKR_FUNCTION_NOT_SUPPORTED");
    let scan = device.state().scan.clone().unwrap();
    assert!(scan.keys.iter().flat_map(|key| &key.schemes).all(|scheme| !matches!(scheme, Scheme::RsaPss(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn labels_and_deletions_last_until_the_module_is_loaded_anew() {
    let subject = OthersP256::start(settings()).await;
    let before = subject.labels();
    let slot = subject.device.state().scan.as_ref().unwrap().keys[0].slot.clone();
    subject.device.rename(0, slot.clone(), "mine".to_owned(), Patience::default()).await.unwrap();
    assert!(subject.labels().contains(&"mine".to_owned()));
    let deleted = subject.device.delete(0, slot, Patience::default()).await.unwrap_err().to_string();
    assert!(deleted.contains("C_DestroyObject answered CKR_PIN_"), "{deleted}");
    assert_eq!(subject.again().await.labels(), before);
}
