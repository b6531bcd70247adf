#![allow(clippy::unwrap_used)]

use tokio::time::{Instant, timeout};

use super::*;
use crate::{
    devices::{Algorithm, CardSlot, Device, Hash, Health, Patience, Settings, Touch, in_process::InProcess},
    public_key::PublicKey,
    rfc4251::Put,
};

const KEYS: &str = "
    [[key]]
    slot = 'ed'
    type = 'ed25519'
    [[key]]
    slot = 'p256'
    type = 'p256'
    [[key]]
    slot = 'rsa'
    type = 'rsa'
";

fn control(script: &str) -> Arc<Control> {
    Control::new(Script::parse(&format!("{script}\n{KEYS}")).unwrap())
}

/// A device whose every signature meets one action.
async fn acting(action: Action) -> Scripted {
    let control = control("");
    control.set_rules(vec![Rule::on(CallName::Sign, action)]);
    Scripted::open(control).await.unwrap()
}

fn slot(name: &str) -> Slot {
    Slot(name.as_bytes().into())
}

async fn sign(device: &Scripted, data: &'static [u8]) -> Result<Vec<u8>, DeviceError> {
    device.sign(&slot("ed"), Scheme::Ed25519, &Input::Message(data.into())).await
}

/// Whether a signature by the Ed25519 key verifies.
async fn verifies(device: &Scripted, data: &[u8], signature: &[u8]) -> bool {
    let scan = device.scan().await.unwrap();
    let mut blob = Vec::new();
    blob.put_string(b"ssh-ed25519");
    blob.put_string(signature);
    PublicKey::parse(&scan.keys[0].blob).unwrap().verify(data, &blob).is_ok()
}

fn pin(pin: &str) -> SecretString {
    pin.into()
}

#[tokio::test]
async fn a_seed_makes_the_same_key_and_another_seed_another() {
    let keys = |seed: u64| {
        let script = format!(
            "[[key]]\nslot = 'a'\ntype = 'ed25519'\nseed = {seed}\n[[key]]\nslot = 'b'\ntype = 'p256'\nseed = {seed}"
        );
        async move {
            let device = Scripted::open(Control::new(Script::parse(&script).unwrap())).await.unwrap();
            device.scan().await.unwrap().keys.into_iter().map(|key| key.blob).collect::<Vec<_>>()
        }
    };
    let (first, again, other) = (keys(1).await, keys(1).await, keys(2).await);
    assert_eq!(first, again);
    assert!(first.iter().zip(&other).all(|(a, b)| a != b));
}

#[tokio::test]
async fn counts_tell_what_was_done() {
    let control = control("[pin]\nvalue = '1234'");
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    sign(&device, b"a").await.unwrap();
    sign(&device, b"b").await.unwrap();
    device.unlock(pin("1"), true).await.unwrap_err();
    device.unlock(pin("1234"), true).await.unwrap();
    let counts = control.counts().borrow().clone();
    assert_eq!((counts.calls(CallName::Open), counts.calls(CallName::Sign), counts.calls(CallName::Scan)), (1, 2, 0));
    assert_eq!((counts.signs("ed"), counts.signs("rsa")), (2, 0));
    assert_eq!(counts.logins, ["1", "1234"]);
}

#[tokio::test(start_paused = true)]
async fn sleep_late_latency_and_touch_take_their_time() {
    let took = async |device: &Scripted| {
        let begin = Instant::now();
        let result = sign(device, b"data").await;
        (begin.elapsed().as_millis(), result.map(drop))
    };
    assert_eq!(took(&acting(Action::Sleep(Duration::from_millis(50))).await).await, (50, Ok(())));
    assert_eq!(took(&acting(Action::Late(Duration::from_millis(70))).await).await, (70, Ok(())));
    assert_eq!(
        took(&acting(Action::NotTouched(Duration::from_secs(15))).await).await,
        (15_000, Err(DeviceError::NotTouched))
    );
    let device = Scripted::open(control("latency_ms = 3")).await.unwrap();
    assert_eq!(took(&device).await, (3, Ok(())));
}

#[tokio::test(start_paused = true)]
async fn who_sleeps_has_not_signed_and_who_is_late_has() {
    for (action, signs) in [(Action::Sleep(Duration::from_secs(9)), 0), (Action::Late(Duration::from_secs(9)), 1)] {
        let device = acting(action).await;
        timeout(Duration::from_secs(1), sign(&device, b"data")).await.unwrap_err();
        assert_eq!(device.control.counts().borrow().signs("ed"), signs);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hang_ends_never_and_holds_nobody_else() {
    let control = control("");
    control.set_rules(vec![Rule { slot: Some("ed".into()), ..Rule::always(Action::Hang) }]);
    let device = Scripted::open(control).await.unwrap();
    let hung = timeout(Duration::from_secs(1_000_000), sign(&device, b"data"));
    let other =
        async { device.sign(&slot("p256"), Scheme::Ecdsa(Hash::Sha256), &Input::Message(b"data".into())).await };
    let (hung, other) = tokio::join!(hung, other);
    assert!(hung.is_err());
    assert_eq!(other.unwrap().len(), 64);
}

#[tokio::test]
async fn in_process_a_crash_is_a_panic_or_restarted() {
    let device = acting(Action::Crash(Crash::Panic)).await;
    assert!(tokio::spawn(async move { sign(&device, b"data").await }).await.unwrap_err().is_panic());
    for how in [Crash::Abort, Crash::Segv, Crash::Exit(3)] {
        assert_eq!(sign(&acting(Action::Crash(how)).await, b"data").await, Err(DeviceError::Restarted));
    }
}

#[tokio::test]
async fn lies_do_not_verify() {
    let honest = acting(Action::Stderr(1)).await;
    let signature = sign(&honest, b"data").await.unwrap();
    assert!(verifies(&honest, b"data", &signature).await);

    let wrong = acting(Action::Wrong).await;
    let signature = sign(&wrong, b"data").await.unwrap();
    assert_eq!(signature.len(), 64);
    assert!(!verifies(&wrong, b"data", &signature).await);

    let swapped = acting(Action::Swapped).await;
    assert_eq!(sign(&swapped, b"first").await.unwrap(), b"");
    let second = sign(&swapped, b"second").await.unwrap();
    assert!(!verifies(&swapped, b"second", &second).await);
    assert!(verifies(&swapped, b"first", &second).await);

    assert_eq!(sign(&acting(Action::Garbage).await, b"data").await.unwrap().len(), 7);
}

#[tokio::test]
async fn reasons_are_given_as_scripted() {
    for (action, reason) in [
        (Action::Absent, DeviceError::Absent),
        (Action::Busy, DeviceError::Busy),
        (Action::Fail("why".into()), DeviceError::Failed("why".into())),
    ] {
        assert_eq!(sign(&acting(action).await, b"data").await, Err(reason));
    }
}

#[tokio::test]
async fn it_goes_and_comes_back() {
    let control = control("");
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    control.set(ABSENT, 1).unwrap();
    assert_eq!(sign(&device, b"data").await, Err(DeviceError::Absent));
    assert_eq!(device.health().await, Err(DeviceError::Absent));
    assert_eq!(Scripted::open(Arc::clone(&control)).await.err(), Some(DeviceError::Absent));
    control.clear(ABSENT).unwrap();
    sign(&Scripted::open(control).await.unwrap(), b"data").await.unwrap();
}

#[tokio::test]
async fn a_pin_has_its_tries_whatever_is_opened_anew() {
    let control = control("locked = true\n[pin]\nvalue = '1234'");
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    let tries = async |device: &Scripted| device.health().await.unwrap().tries_left;
    assert_eq!(sign(&device, b"data").await, Err(DeviceError::PinRequired));
    assert_eq!(tries(&device).await, Some(3));
    assert_eq!(device.unlock(pin("1"), true).await, Err(DeviceError::PinWrong { left: Some(2) }));
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    assert_eq!(tries(&device).await, Some(2));
    device.unlock(pin("1234"), true).await.unwrap();
    assert_eq!(tries(&device).await, Some(3));
    sign(&device, b"data").await.unwrap();
    device.lock().await.unwrap();
    assert_eq!(sign(&device, b"data").await, Err(DeviceError::PinRequired));
    for left in [2, 1, 0] {
        assert_eq!(device.unlock(pin("1"), true).await, Err(DeviceError::PinWrong { left: Some(left) }));
    }
    assert_eq!(device.unlock(pin("1234"), true).await, Err(DeviceError::PinBlocked));
    assert_eq!(tries(&device).await, Some(0));
}

#[tokio::test]
async fn keys_appear_vanish_and_hide() {
    let control = Control::new(
        Script::parse(
            "
            locked = true
            [pin]
            value = '1'
            [[key]]
            slot = 'old'
            type = 'ed25519'
            vanishes = 1
            [[key]]
            slot = 'new'
            type = 'ed25519'
            appears = 1
            [[key]]
            slot = 'hidden'
            type = 'p256'
            hidden = true
            ",
        )
        .unwrap(),
    );
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    let slots = async || {
        let scan = device.scan().await.unwrap();
        (scan.keys.into_iter().map(|key| key.slot).collect::<Vec<_>>(), scan.complete, scan.status.generation)
    };
    assert_eq!(slots().await, (vec![slot("old")], false, 0));
    device.unlock(pin("1"), true).await.unwrap();
    assert_eq!(slots().await, (vec![slot("old"), slot("hidden")], true, 0));
    control.set(GENERATION, 1).unwrap();
    assert_eq!(slots().await, (vec![slot("new"), slot("hidden")], true, 1));
    let gone = device.sign(&slot("old"), Scheme::Ed25519, &Input::Message(b"data".into())).await;
    assert_eq!(gone, Err(DeviceError::NoSuchKey));
}

#[tokio::test]
async fn what_became_of_its_keys_outlives_it() {
    let control = control("admin = '87654321'");
    let device = Scripted::open(Arc::clone(&control)).await.unwrap();
    let new = NewKey {
        slot: Some(CardSlot::Auth),
        touch: Some(Touch::Fixed),
        ..NewKey::new("tab\tand\nline", Algorithm::Ed25519)
    };
    assert_eq!(device.generate(&new).await, Err(DeviceError::PinWrong { left: None }));
    let new = NewKey { secret: Some("87654321".into()), ..new };
    let first = device.generate(&new).await.unwrap();
    assert_eq!((&*first.slot.0, &*first.label, first.touch), (&b"auth"[..], "tab and line", true));
    // A card's slot has one key.
    let second = device.generate(&new).await.unwrap();
    assert_ne!(first.blob, second.blob);
    device.rename(&slot("p256"), "renamed").await.unwrap();
    device.delete(&slot("rsa")).await.unwrap();
    let keys = |scan: Scan| scan.keys.into_iter().map(|key| (key.slot, key.label)).collect::<Vec<_>>();
    let expected = [("ed", ""), ("p256", "renamed"), ("auth", "tab and line")];
    let expected = expected.map(|(name, label)| (slot(name), label.to_owned()));
    assert_eq!(keys(device.scan().await.unwrap()), expected);
    let again = Scripted::open(control).await.unwrap();
    assert_eq!(keys(again.scan().await.unwrap()), expected);
    for gone in ["rsa", "nothing"] {
        assert_eq!(again.delete(&slot(gone)).await, Err(DeviceError::NoSuchKey));
        assert_eq!(again.rename(&slot(gone), "name").await, Err(DeviceError::NoSuchKey));
    }
}

#[tokio::test]
async fn a_secret_of_another_length_than_its_scheme_has_is_a_lie() {
    let control = control("");
    let engine = InProcess::<Scripted>::new({
        let control = Arc::clone(&control);
        move || Arc::clone(&control)
    });
    let device = Device::start("device", Scripted::KIND, Settings::default(), engine);
    let state = Arc::clone(&*device.watch().wait_for(|state| state.health == Health::Ready).await.unwrap());
    let key = state.scan.as_ref().unwrap().keys.iter().find(|key| &*key.slot.0 == b"p256").unwrap();
    let PublicKey::Ecdsa(_, peer) = PublicKey::parse(&key.blob).unwrap() else { unreachable!("a P-256 key") };
    let derive = || {
        let operation = Operation::Derive { scheme: DeriveScheme::Ecdh, peer: peer.to_vec().into() };
        device.operate(1, key, operation.into(), Patience::default())
    };
    assert_eq!(derive().await.unwrap().secret().unwrap().len(), 32);
    control.set_rules(vec![Rule::on(CallName::Derive, Action::Garbage)]);
    assert!(matches!(derive().await, Err(DeviceError::Failed(_))));
}
