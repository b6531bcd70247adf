//! The behaviours, each as a test of any subject that can be put to it.

use std::{collections::HashSet, time::Duration};

use strongroom::devices::{
    Algorithm, DeviceError, FoundKey, Hash, Health, Input, MAX_LABEL, MAX_SLOT, NewKey, Operation, Outcome, Patience,
    PrivateHalf, Scheme, Settings, Signature, Slot, soft::SoftParts,
};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    subject::{Fault, Faulty, HasPin, MakesKeys, Removable, Subject, settings},
    verify,
};

const HASHES: [Hash; 4] = [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512];

fn all_schemes() -> Vec<Scheme> {
    let hashed = [Scheme::RsaPkcs1v15, Scheme::RsaPss, Scheme::Ecdsa];
    let mut all: Vec<_> = hashed.iter().flat_map(|scheme| HASHES.map(scheme)).collect();
    all.extend([Scheme::RsaPkcs1v15Raw, Scheme::Ed25519, Scheme::Ed25519BlindedTor]);
    all.extend([Scheme::MlDsa44Ed25519, Scheme::Sk]);
    all
}

/// The hash of a scheme that takes digests.
fn hash_of(scheme: Scheme) -> Option<Hash> {
    match scheme {
        Scheme::RsaPkcs1v15(hash) | Scheme::RsaPss(hash) | Scheme::Ecdsa(hash) => Some(hash),
        _ => None,
    }
}

fn keys(subject: &impl Subject) -> Vec<FoundKey> {
    subject.device().state().scan.as_ref().expect("a device that is ready was scanned").keys.clone()
}

/// The keys whose signatures can be verified by the hundred, with their schemes.
fn quick_keys<S: Subject>(subject: &S) -> Vec<(FoundKey, Scheme)> {
    let quick = [Scheme::Ed25519, Scheme::Ecdsa(Hash::Sha256)];
    let scheme = |key: &FoundKey| quick.into_iter().find(|scheme| key.schemes.contains(scheme));
    let of_256_bits = |key: &FoundKey| {
        !matches!(verify::parse(&key.blob).algorithm().as_str(), "ecdsa-sha2-nistp384" | "ecdsa-sha2-nistp521")
    };
    let keys: Vec<_> =
        keys(subject).into_iter().filter(of_256_bits).filter_map(|key| Some((key.clone(), scheme(&key)?))).collect();
    assert!(keys.len() >= S::QUICK_KEYS, "{} quick keys", keys.len());
    keys
}

async fn sign_as(
    subject: &impl Subject,
    owner: u64,
    key: &FoundKey,
    scheme: Scheme,
    input: Input<'static>,
    patience: Patience,
) -> Result<Signature, DeviceError> {
    let outcome = subject.device().operate(owner, key, Operation::Sign { scheme, input }.into(), patience).await?;
    match outcome {
        Outcome::Signature(signature) => Ok(signature),
        Outcome::Secret(_) => panic!("a signature was asked for"),
    }
}

async fn sign(
    subject: &impl Subject,
    key: &FoundKey,
    scheme: Scheme,
    input: Input<'static>,
) -> Result<Signature, DeviceError> {
    sign_as(subject, 0, key, scheme, input, Patience::default()).await
}

/// Signs with the first quick key, and sees whether it has.
async fn signs(subject: &impl Subject) -> Result<(), DeviceError> {
    let (key, scheme) = quick_keys(subject).swap_remove(0);
    let signature = sign(subject, &key, scheme, Input::Message(b"data".into())).await?;
    assert!(verify::verifies_quickly(&key.blob, b"data", &signature));
    Ok(())
}

pub(crate) async fn lists_its_keys<S: Subject>() {
    let subject = S::start(settings()).await;
    let found = keys(&subject);
    let slots: HashSet<_> = found.iter().map(|key| &key.slot).collect();
    assert_eq!(slots.len(), found.len(), "each slot is one key's");
    for key in &found {
        assert!((1..=MAX_SLOT).contains(&key.slot.0.len()));
        assert!(key.label.len() <= MAX_LABEL);
        // It parses, and is written as others write it.
        let parsed = ssh_key::PublicKey::from_bytes(&key.blob).unwrap();
        assert_eq!(parsed.to_bytes().unwrap(), &*key.blob);
        assert!(
            !(key.schemes.is_empty() && key.decrypts.is_empty() && key.derives.is_empty()),
            "a key can do something"
        );
        for (n, scheme) in key.schemes.iter().enumerate() {
            assert!(!key.schemes[..n].contains(scheme), "{scheme:?} is listed once");
        }
    }
}

pub(crate) async fn signs_with_every_scheme_it_claims<S: Subject>() {
    let subject = S::start(settings()).await;
    let mut schemes = HashSet::new();
    for key in keys(&subject) {
        for &scheme in &key.schemes {
            // Blinded keys: a parameter of 32 bytes stands before the message.
            let message = vec![0x5a; 100];
            let mut inputs = vec![Input::Message(message.clone().into())];
            if let Some(hash) = hash_of(scheme) {
                inputs.push(Input::Digest(verify::digest(hash, &message).into()));
            }
            for input in inputs {
                let signature = sign(&subject, &key, scheme, input.clone()).await;
                let signature = signature.unwrap_or_else(|e| panic!("{scheme:?} of {input:?}: {e}"));
                assert!(verify::verifies(&key.blob, scheme, &input, &signature), "{scheme:?} of {input:?}");
                let other = match input {
                    Input::Message(message) => Input::Message([&message[..99], &[0]].concat().into()),
                    Input::Digest(digest) => Input::Digest([&[!digest[0]], &digest[1..]].concat().into()),
                };
                assert!(!verify::verifies(&key.blob, scheme, &other, &signature), "{scheme:?}: of anything");
            }
            schemes.insert(scheme);
        }
    }
    assert!(schemes.len() >= S::SCHEMES, "{schemes:?}");
}

pub(crate) async fn refuses_what_it_does_not_claim<S: Subject>() {
    let subject = S::start(settings()).await;
    let mut refused = 0;
    for key in keys(&subject) {
        for scheme in all_schemes().into_iter().filter(|scheme| !key.schemes.contains(scheme)) {
            // The second claims all, so that the driver itself is asked.
            let asked = FoundKey { schemes: vec![scheme], ..key.clone() };
            for key in [&key, &asked] {
                let result = sign(&subject, key, scheme, Input::Message(vec![1; 64].into())).await;
                assert!(matches!(result, Err(DeviceError::Unsupported(_))), "{scheme:?}: {result:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "no key does everything");
    signs(&subject).await.unwrap();
}

pub(crate) async fn knows_which_keys_it_has<S: Subject>() {
    let subject = S::start(settings()).await;
    let (key, scheme) = quick_keys(&subject).swap_remove(0);
    for slot in [&b"no such slot"[..], b"", b"\xff\xfe"] {
        let stranger = FoundKey { slot: Slot(slot.into()), ..key.clone() };
        let result = sign(&subject, &stranger, scheme, Input::Message(b"data".into())).await;
        assert_eq!(result, Err(DeviceError::NoSuchKey), "{slot:?}");
    }
    signs(&subject).await.unwrap();
}

pub(crate) async fn never_answers_one_request_with_anothers_result<S: Subject>() {
    const REQUESTS: u64 = 400;
    let subject = std::sync::Arc::new(S::start(settings()).await);
    let keys = quick_keys(&*subject);
    let before = subject.device().counters().done;
    let mut requests = JoinSet::new();
    for n in 0..REQUESTS {
        let subject = std::sync::Arc::clone(&subject);
        let (key, scheme) = keys[n as usize % keys.len()].clone();
        requests.spawn(async move {
            let message = format!("request {n}").into_bytes();
            let patience = Patience { waits_for_place: true, ..Patience::default() };
            let input = Input::Message(message.clone().into());
            let signature = sign_as(&*subject, n % 7, &key, scheme, input, patience).await;
            (key, message, signature.unwrap())
        });
    }
    // Verified afterwards, since unoptimised arithmetic would hold up what still waits.
    for (key, message, signature) in requests.join_all().await {
        assert!(verify::verifies_quickly(&key.blob, &message, &signature), "{}", String::from_utf8_lossy(&message));
    }
    assert_eq!(subject.device().counters().done - before, REQUESTS);
}

pub(crate) async fn asks_for_a_pin_and_no_try<S: HasPin>() {
    let subject = S::start_locked(settings()).await;
    assert!(subject.device().state().status.as_ref().unwrap().locked);
    for _ in 0..S::TRIES {
        assert_eq!(signs(&subject).await, Err(DeviceError::PinRequired));
    }
    // All tries are still there: the first wrong PIN leaves one less.
    let wrong = subject.device().unlock(S::WRONG.into()).await;
    assert_eq!(wrong, Err(DeviceError::PinWrong { left: Some(S::TRIES - 1) }));
}

pub(crate) async fn counts_tries_one_by_one<S: HasPin>() {
    let subject = S::start_locked(settings()).await;
    let device = subject.device();
    let left = async |left: u8| {
        device.probe();
        subject.becomes("tries", |state| state.status.as_ref().is_some_and(|s| s.tries_left == Some(left))).await;
    };
    for _ in 0..2 {
        left(S::TRIES).await;
        let wrong = device.unlock(S::WRONG.into()).await;
        assert_eq!(wrong, Err(DeviceError::PinWrong { left: Some(S::TRIES - 1) }));
        left(S::TRIES - 1).await;
        assert_eq!(signs(&subject).await, Err(DeviceError::PinRequired));
        // The right one gives the tries back.
        device.unlock(S::PIN.into()).await.unwrap();
        signs(&subject).await.unwrap();
        left(S::TRIES).await;
        device.lock().await.unwrap();
        assert_eq!(signs(&subject).await, Err(DeviceError::PinRequired));
    }
}

pub(crate) async fn is_blocked_when_no_try_is_left<S: HasPin>() {
    let subject = S::start_locked(settings()).await;
    let device = subject.device();
    for left in (0..S::TRIES).rev() {
        match device.unlock(S::WRONG.into()).await {
            Err(DeviceError::PinWrong { left: told }) => assert_eq!(told, Some(left)),
            // Some say so at once.
            Err(DeviceError::PinBlocked) => assert_eq!(left, 0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(device.unlock(S::PIN.into()).await, Err(DeviceError::PinBlocked));
    assert_eq!(signs(&subject).await, Err(DeviceError::PinRequired));
}

pub(crate) async fn survives_removal_and_return<S: Removable>() {
    let subject = S::start(settings()).await;
    let here = keys(&subject);
    for _ in 0..3 {
        signs(&subject).await.unwrap();
        subject.remove();
        let (key, scheme) = quick_keys(&subject).swap_remove(0);
        let away = sign(&subject, &key, scheme, Input::Message(b"data".into())).await;
        assert_eq!(away, Err(DeviceError::Absent));
        subject.becomes("absent", |state| state.health == Health::Absent).await;
        // Absent is not deleted.
        assert_eq!(keys(&subject), here);
        assert_eq!(signs(&subject).await, Err(DeviceError::Absent));
        subject.put_back();
        subject.ready().await;
        assert_eq!(keys(&subject), here);
    }
    signs(&subject).await.unwrap();
}

pub(crate) async fn answers_by_its_deadline_when_it_hangs<S: Faulty>() {
    // A loaded machine may be that late; a caller that waits for the hung operation to end would be later.
    const SLACK: Duration = Duration::from_secs(10);
    let timeout = Duration::from_millis(300);
    let subject = S::start(Settings { timeout, ..settings() }).await;
    // A loaded machine may need more tries than one.
    recovers(&subject).await;
    subject.fail(Fault::Hang, true);
    let (key, scheme) = quick_keys(&subject).swap_remove(0);
    let begun = Instant::now();
    let soon = Patience { deadline: Some(begun + timeout / 3), ..Patience::default() };
    let sooner = sign_as(&subject, 1, &key, scheme, Input::Message(b"data".into()), soon);
    let (own, sooner) = tokio::join!(
        async { (sign(&subject, &key, scheme, Input::Message(b"data".into())).await, begun.elapsed()) },
        async { (sooner.await, begun.elapsed()) },
    );
    assert_eq!((own.0, sooner.0), (Err(DeviceError::Timeout), Err(DeviceError::Timeout)));
    assert!((timeout..timeout + SLACK).contains(&own.1), "{:?}", own.1);
    assert!((timeout / 3..timeout + SLACK).contains(&sooner.1), "{:?}", sooner.1);
    subject.fail(Fault::Hang, false);
    recovers(&subject).await;
}

pub(crate) async fn is_caught_when_it_lies<S: Faulty>() {
    for fault in [Fault::Wrong, Fault::Swapped, Fault::Garbage] {
        let subject = S::start(settings()).await;
        signs(&subject).await.unwrap();
        subject.fail(fault, true);
        let (key, scheme) = quick_keys(&subject).swap_remove(0);
        for n in 0..3 {
            let result =
                sign(&subject, &key, scheme, Input::Message(format!("{fault:?} {n}").into_bytes().into())).await;
            // Where nonsense breaks the line to the driver, the driver is ended.
            let caught = matches!(result, Err(DeviceError::Failed(_) | DeviceError::Restarted));
            assert!(caught, "{fault:?}: {result:?}");
            subject.ready().await;
        }
        subject.fail(fault, false);
        recovers(&subject).await;
    }
}

pub(crate) async fn comes_back_when_it_dies<S: Faulty>() {
    let subject = S::start(settings()).await;
    signs(&subject).await.unwrap();
    for _ in 0..2 {
        subject.fail(Fault::Crash, true);
        assert_eq!(signs(&subject).await, Err(DeviceError::Restarted));
        subject.fail(Fault::Crash, false);
        recovers(&subject).await;
    }
    assert!(subject.device().counters().restarts >= 2);
}

/// The key that the device shows in this slot.
fn shown(subject: &impl Subject, slot: &Slot) -> Option<FoundKey> {
    keys(subject).into_iter().find(|key| key.slot == *slot)
}

/// Waits until the device itself was asked for its keys anew.
async fn scanned(subject: &impl Subject) {
    let before = subject.device().state().scan.clone().unwrap();
    subject.device().probe();
    let differs = |scan: &std::sync::Arc<_>| !std::sync::Arc::ptr_eq(scan, &before);
    subject.becomes("scanned", |state| state.scan.as_ref().is_some_and(differs)).await;
}

/// Uses a key once, in whatever way it can be verified quickly.
async fn signs_with(subject: &impl Subject, key: &FoundKey) {
    let quick = [Scheme::Ed25519, Scheme::Ecdsa(Hash::Sha256), Scheme::RsaPkcs1v15(Hash::Sha256)];
    let Some(scheme) = quick.into_iter().find(|scheme| key.schemes.contains(scheme)) else {
        assert!(!key.decrypts.is_empty() || !key.derives.is_empty(), "a key can do something");
        return;
    };
    let input = Input::Message(b"data".into());
    let signature = sign(subject, key, scheme, input.clone()).await.unwrap();
    assert!(verify::verifies(&key.blob, scheme, &input, &signature));
}

/// A key that is made is shown before the answer, works, and is the one that scans find; a new label shows, and a deleted
/// key is gone, before their answers.
pub(crate) async fn makes_names_and_deletes_keys<S: MakesKeys>() {
    let subject = S::start_locked(settings()).await;
    let device = subject.device();
    device.unlock(S::PIN.into()).await.unwrap();
    let patience = Patience::default();
    for new in S::new_keys() {
        let before = keys(&subject);
        let made = device.generate(0, new.clone(), patience).await.unwrap();
        assert!(before.iter().all(|key| key.blob != made.blob), "the key is a new one");
        assert_eq!(shown(&subject, &made.slot).as_ref(), Some(&made));
        assert!(!S::KEEPS_LABELS || made.label == new.label);
        signs_with(&subject, &made).await;
        scanned(&subject).await;
        assert_eq!(shown(&subject, &made.slot).as_ref(), Some(&made), "as a scan finds it");

        if S::KEEPS_LABELS {
            device.rename(0, made.slot.clone(), "another name".to_owned(), patience).await.unwrap();
            let renamed = FoundKey { label: "another name".to_owned(), ..made.clone() };
            assert_eq!(shown(&subject, &made.slot).as_ref(), Some(&renamed));
            scanned(&subject).await;
            assert_eq!(shown(&subject, &made.slot), Some(renamed));
        }
        if S::DELETES {
            device.delete(0, made.slot.clone(), patience).await.unwrap();
            assert_eq!(shown(&subject, &made.slot), None);
            scanned(&subject).await;
            assert_eq!(keys(&subject), before);
            let again = device.delete(0, made.slot.clone(), patience).await;
            assert_eq!(again, Err(DeviceError::NoSuchKey));
        }
    }
}

/// Keys that are called something else while the device is looked at and others are used stay where they are.
pub(crate) async fn keeps_keys_that_are_renamed_while_it_is_looked_at<S: MakesKeys>() {
    let subject = S::start_locked(settings()).await;
    let device = subject.device();
    device.unlock(S::PIN.into()).await.unwrap();
    let patience = Patience::default();
    let mut made = Vec::new();
    for new in S::new_keys().into_iter().take(2) {
        made.push(device.generate(0, new, patience).await.unwrap());
    }
    for n in 0..100 {
        for key in &made {
            device.probe();
            let used = async {
                for key in &made {
                    signs_with(&subject, key).await;
                }
            };
            let named = device.rename(0, key.slot.clone(), format!("name {n}"), patience);
            tokio::join!(used, named).1.unwrap();
        }
    }
    scanned(&subject).await;
    for key in made {
        let renamed = FoundKey { label: "name 99".to_owned(), ..key };
        assert_eq!(shown(&subject, &renamed.slot), Some(renamed));
    }
}

/// P-256's generator: the private key is 1.
const ONE_P256: &str = "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296\
    4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5";

pub(crate) async fn takes_a_key_that_was_made_elsewhere<S: MakesKeys>() {
    let subject = S::start_locked(settings()).await;
    let device = subject.device();
    device.unlock(S::PIN.into()).await.unwrap();
    let curve = strongroom::public_key::Curve::P256;
    let point: Vec<u8> = (0..65).map(|at| u8::from_str_radix(&ONE_P256[2 * at..2 * at + 2], 16).unwrap()).collect();
    let parts = SoftParts::Ecdsa { curve, scalar: &[1], point: &point };
    let template = S::new_keys().swap_remove(0);
    let new = NewKey { label: "brought".to_owned(), algorithm: Algorithm::Ecdsa(curve), ..template };
    let made = device.import(0, new, PrivateHalf::of(&parts).unwrap(), Patience::default()).await.unwrap();
    assert_eq!(*made.blob, parts.public().to_blob());
    assert_eq!(shown(&subject, &made.slot).as_ref(), Some(&made));
    signs_with(&subject, &made).await;
    scanned(&subject).await;
    assert_eq!(shown(&subject, &made.slot), Some(made));
}

pub(crate) async fn wants_its_pin_before_it_makes_a_key<S: MakesKeys>() {
    let subject = S::start_locked(settings()).await;
    let before = keys(&subject);
    let new = S::new_keys().swap_remove(0);
    assert_eq!(subject.device().generate(0, new, Patience::default()).await, Err(DeviceError::PinRequired));
    scanned(&subject).await;
    assert_eq!(keys(&subject), before);
}

pub(crate) async fn says_that_it_makes_no_keys<S: Subject>() {
    let subject = S::start(settings()).await;
    let (device, patience, before) = (subject.device(), Patience::default(), keys(&subject));
    let new = NewKey::new("new", Algorithm::Ed25519);
    let half = PrivateHalf::of(&SoftParts::Ed25519 { seed: &[1; 32], public: &[2; 32] }).unwrap();
    let slot = before[0].slot.clone();
    for result in [
        device.generate(0, new.clone(), patience).await.map(drop),
        device.import(0, new, half, patience).await.map(drop),
        device.rename(0, slot.clone(), "name".to_owned(), patience).await,
        device.delete(0, slot, patience).await,
    ] {
        assert!(matches!(result, Err(DeviceError::Unsupported(_))), "{result:?}");
    }
    assert_eq!(keys(&subject), before);
    signs(&subject).await.unwrap();
}

/// Waits until a device without a fault signs, or signs again.
async fn recovers(subject: &impl Subject) {
    let begun = Instant::now();
    while let Err(error) = signs(subject).await {
        // What was inside is still being ended.
        let passing = matches!(error, DeviceError::Timeout | DeviceError::Restarted | DeviceError::Failed(_));
        assert!(passing && begun.elapsed() < crate::subject::PATIENCE, "{error}");
        subject.ready().await;
    }
}
