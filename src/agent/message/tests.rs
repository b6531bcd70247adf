#![allow(clippy::unwrap_used)]
use std::{borrow::Cow, time::Duration};

use proptest::prelude::*;
use zeroize::Zeroizing;

use super::*;
use crate::{
    agent::frame::MAX_FRAME,
    devices::{
        Algorithm, CardChange, CardSlot, CardStatus, DecryptScheme, DeriveScheme, Hash, Input, NewKey, Operation,
        Scheme, Touch,
    },
    vault::{
        Move,
        key::Grants,
        stored::{ExportForm, KeyChange, NewStored},
    },
};

/// The name and the body of a frame.
fn taken_apart(frame: &[u8]) -> (Name, &[u8]) {
    let mut r = Reader::new(&frame[4..]);
    assert_eq!((frame.len() - 4, r.u8().unwrap()), (u32::from_be_bytes(*frame.first_chunk().unwrap()) as usize, 27));
    let name = Name::from_bytes(r.string().unwrap()).unwrap();
    (name, r.rest())
}

/// Writes the request, reads it and writes it again: a PIN's request cannot be compared otherwise.
fn round_trip(request: &Request<'_>) {
    let (mut frame, mut again) = (Vec::new(), Vec::new());
    request.put(&mut frame);
    let (name, body) = taken_apart(&frame);
    assert_eq!(name, request.name());
    Request::read(name, body).unwrap().put(&mut again);
    assert_eq!(frame, again);
    // These may leave something out at their end.
    let optional = matches!(name, Name::Generate | Name::Import | Name::Allow | Name::Delete);
    for cut in 0..body.len() {
        if let Ok(shorter) = Request::read(name, &body[..cut]) {
            let mut written = Vec::new();
            shorter.put(&mut written);
            assert!(optional && taken_apart(&written) == (name, &body[..cut]), "{name:?} cut at {cut}");
        }
    }
    let longer = [body, &[0]].concat();
    let error = Request::read(name, &longer).err();
    if optional {
        assert!(matches!(error, Some(RequestError::Malformed(_))), "{name:?}: {error:?}");
    } else {
        assert_eq!(error, Some(RequestError::Malformed(WireError::Trailing)));
    }
}

fn answer_round_trip<'a, T: Answer<'a>>(answer: &T, bytes: &'a mut Vec<u8>) -> T {
    answer.put(bytes);
    assert_eq!(bytes.len(), answer.encoded_len());
    T::read(&mut Reader::new(bytes)).unwrap()
}

/// The reason for which a sign request is refused.
fn refused(scheme: &str, flags: u32, prehashed: bool, data: &[u8]) -> Option<RequestError> {
    let mut body = Vec::new();
    body.put_u32(0);
    body.put_string(b"blob");
    body.put_string(scheme.as_bytes());
    body.put_u32(flags);
    body.push(prehashed.into());
    body.put_string(data);
    Request::read(Name::Sign, &body).err()
}

/// A use of each kind. Uses do not print, so no strategy of proptest makes them.
fn uses<'a>(data: &'a [u8], other: &'a [u8], digest: &'a [u8; 48], flags: u32) -> Vec<How<'a>> {
    let sign = |scheme| Operation::Sign { scheme, input: Input::Message(data.into()) };
    let decrypt = |scheme| Operation::Decrypt { scheme, label: data.into(), ciphertext: other.into() };
    let derive = |scheme| Operation::Derive { scheme, peer: data.into() };
    [
        sign(Scheme::RsaPkcs1v15(Hash::Sha1)),
        sign(Scheme::RsaPkcs1v15Raw),
        sign(Scheme::RsaPss(Hash::Sha384)),
        sign(Scheme::Ed25519),
        sign(Scheme::Ed25519BlindedTor),
        Operation::Sign { scheme: Scheme::Ecdsa(Hash::Sha384), input: Input::Digest(Cow::Borrowed(digest)) },
        decrypt(DecryptScheme::RsaOaep(Hash::Sha1)),
        Operation::Decrypt { scheme: DecryptScheme::RsaPkcs1v15, label: b"".into(), ciphertext: data.into() },
        derive(DeriveScheme::Ecdh),
        derive(DeriveScheme::X25519),
    ]
    .into_iter()
    .map(How::Operation)
    .chain([How::Ssh { flags, data }])
    .collect()
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(body in any::<Vec<u8>>()) {
        for name in Name::ALL {
            if let Ok(request) = Request::read(*name, &body) {
                round_trip(&request);
            }
        }
        let mut r = Reader::new(&body);
        let _ = (Page::<KeyEntry<'_>>::read(&mut r), Page::<DeviceEntry<'_>>::read(&mut r));
        let _ = (Vec::<RefusalEntry<'_>>::read(&mut r), Collected::read(&mut r), Cancelled::read(&mut r));
        let _ = (Made::read(&mut r), Checked::read(&mut r), CardStatus::read(&mut r));
        let _ = read_reply::<Collected>(Name::Collect, &body);
    }

    #[test]
    fn uses_of_keys_round_trip(
        key in prop::collection::vec(any::<u8>(), 1..100),
        (data, other) in any::<(Vec<u8>, Vec<u8>)>(),
        digest in prop::array::uniform(any::<u8>()),
        (id, flags) in any::<(u64, u32)>(),
        ms in 0..=MAX_WAIT_MS,
    ) {
        let deadline = Some(ms).filter(|&ms| ms > 0).map(|ms| Duration::from_millis(ms.into()));
        for how in uses(&data, &other, &digest, flags) {
            let task = KeyUse { key: &key, how };
            round_trip(&Request::Use(task.clone(), deadline));
            let submit = Submit { id, deadline, task };
            round_trip(&Request::Submit(submit.clone()));
            let mut frame = Vec::new();
            Request::Submit(submit.clone()).put(&mut frame);
            let read = Request::read(Name::Submit, taken_apart(&frame).1);
            prop_assert!(matches!(read, Ok(Request::Submit(read)) if read == submit));
        }
    }

    #[test]
    fn other_requests_round_trip(
        cursor in prop::collection::vec(any::<u8>(), 0..=MAX_CURSOR),
        blob in prop::collection::vec(any::<u8>(), 1..100),
        text in "\\PC{1,60}",
        ms in 0..=MAX_WAIT_MS,
        (max, id, all) in any::<(u32, u64, bool)>(),
        len in 1..=MAX_RANDOM,
    ) {
        let paging = Paging { cursor: &cursor, max };
        let deadline = Some(ms).filter(|&ms| ms > 0).map(|ms| Duration::from_millis(ms.into()));
        for request in [
            Request::Keys(paging),
            Request::Devices(paging),
            Request::Collect(Collect { wait: Duration::from_millis(ms.into()), max }),
            Request::Cancel(id),
            Request::Unlock(Target::Device(&text), text.clone().into()),
            Request::Unlock(Target::Key(&blob), text.clone().into()),
            Request::Lock(Target::Device(&text)),
            Request::Forget(Target::Everything),
            Request::Forget(Target::Key(&blob)),
            Request::Why { all, max },
            Request::Random { len, device: &text },
            Request::Audit { flush: all },
            Request::Check(KeyUse { key: &blob, how: How::Ssh { flags: max, data: &cursor } }),
            Request::Generate {
                deadline,
                device: &text,
                new: NewKey {
                    slot: Some(CardSlot::Decrypt),
                    secret: Some(text.clone().into()),
                    ..NewKey::new(text.clone(), Algorithm::X25519)
                },
                terms: NewStored { exportable: all, grants: Grants::NONE },
            },
            Request::Import {
                deadline,
                key: &blob,
                to: Move {
                    device: text.clone(),
                    label: text.clone(),
                    slot: None,
                    touch: Some(Touch::Off),
                    secret: None,
                    terms: NewStored { exportable: false, grants: Grants { sign: all, ..Grants::NONE } },
                },
            },
            Request::Rename { key: &blob, name: &text },
            Request::Allow {
                key: &blob,
                operations: Grants { sign: all, decrypt: true, derive: !all },
                proof: all.then(|| text.clone().into()),
            },
            Request::CardStatus(&text),
            Request::ChangeCard(&text, CardChange::FactoryReset { serial: text.clone() }),
            Request::Delete { key: &blob, device: &text, name: &text, proof: all.then(|| text.clone().into()) },
            Request::Unlock(Target::Store, text.clone().into()),
            Request::Store(StoreRequest::Status),
            Request::Store(StoreRequest::Init { passphrase: text.clone().into(), recovery: all }),
            Request::Store(StoreRequest::AddSlot {
                proof: text.clone().into(),
                label: &text,
                add: NewSlot::Passphrase(text.clone().into()),
            }),
            Request::Store(StoreRequest::RemoveSlot { proof: text.clone().into(), number: max }),
            Request::Stored(StoredRequest::Set {
                key: &blob,
                proof: all.then(|| text.clone().into()),
                change: KeyChange::Expires(Some(id).filter(|at| *at != 0)),
            }),
            Request::Stored(StoredRequest::Attach(&blob)),
            Request::Stored(StoredRequest::Export {
                key: &blob,
                proof: all.then(|| text.clone().into()),
                form: ExportForm::OpenSsh,
                passphrase: text.clone().into(),
            }),
            Request::Stored(StoredRequest::Rotate { key: &blob, retires: Some(id).filter(|at| *at != 0) }),
            Request::Store(StoreRequest::ChangePassphrase { old: text.clone().into(), new: text.clone().into() }),
        ] {
            round_trip(&request);
        }
    }

    #[test]
    fn answers_round_trip(
        bytes in any::<Vec<u8>>(),
        text in "[^,]{0,40}",
        (n, id) in any::<(u32, u64)>(),
        tries in prop::option::of(0..u32::MAX),
    ) {
        let (mut a, mut b, mut c, mut d) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let names: Vec<&str> = Some(text.as_str()).into_iter().filter(|name| !name.is_empty()).collect();
        let key = KeyEntry {
            blob: &bytes,
            certificates: vec![&bytes, b""],
            name: &text,
            comment: &bytes,
            places: vec![Place { device: &text, state: "ready" }],
            operations: vec!["sign", "decrypt"],
            signs: names,
            password: "prompt",
            note: &text,
            ..KeyEntry::default()
        };
        let keys = Page { entries: vec![key.clone(), key], next: bytes.clone() };
        prop_assert_eq!(&answer_round_trip(&keys, &mut a), &keys);
        let device = DeviceEntry {
            id: &text, kind: "pkcs11", serial: &text, state: "failed", reason: &text, lanes: n, running: n, waiting: n,
            pin: PinState::Blocked, tries_left: tries, done: id, failed: id, timed_out: id, restarts: id,
            notes: vec![&text, "another"],
            wants: "touch", wanted_for: &text,
        };
        let devices = Page { entries: vec![device], next: Vec::new() };
        prop_assert_eq!(&answer_round_trip(&devices, &mut b), &devices);
        let refusals = vec![RefusalEntry {
            unix_ms: id, message: "sign", key: &text, caller: &text, code: Code::Busy, reason: &text,
        }];
        prop_assert_eq!(&answer_round_trip(&refusals, &mut c), &refusals);
        let failure = Failure { code: Code::PinWrong, message: text.clone(), retry_after_ms: n, tries_left: tries };
        let collected = Collected {
            finished: vec![
                Finished { id, reply: Ok(Zeroizing::new(bytes.clone())) },
                Finished { id, reply: Err(failure) },
            ],
            more: id % 2 == 0,
        };
        prop_assert_eq!(&answer_round_trip(&collected, &mut d).finished, &collected.finished);
    }
}

#[test]
fn names_lead_back() {
    for name in Name::ALL {
        assert_eq!(Name::from_bytes(name.as_str().as_bytes()), Some(*name));
        assert_eq!(format!("{}{DOMAIN}", name.short()), name.as_str());
    }
    assert_eq!(Name::from_bytes(b"sign"), None);
}

#[test]
fn what_makes_no_sense_is_told_from_what_cannot_be_read() {
    for (scheme, flags, prehashed, data, code) in [
        ("ssh", 4, false, &b"data"[..], None),
        ("ssh", 0, true, &[0; 32], Some(Code::BadRequest)),
        ("ecdsa-sha256", 1, false, b"", Some(Code::BadRequest)),
        ("ecdsa-sha256", 0, true, &[0; 32], None),
        ("ecdsa-sha256", 0, true, &[0; 31], Some(Code::BadRequest)),
        ("ed25519", 0, true, &[0; 64], Some(Code::BadRequest)),
        ("rsa-pkcs1v15-raw", 0, true, &[0; 32], Some(Code::BadRequest)),
        ("rsa-pss-sha1", 0, false, b"", Some(Code::Unsupported)),
        ("", 0, false, b"", Some(Code::Unsupported)),
    ] {
        let error = refused(scheme, flags, prehashed, data);
        assert_eq!(error.and_then(|error| error.failure()).map(|failure| failure.code), code, "{scheme} {flags}");
    }
    let read = |name, body: &[u8]| Request::read(name, body).err().map(|error| error.failure().map(|f| f.code));
    assert_eq!(read(Name::Cancel, b"short"), Some(None), "answered with 28");
    assert_eq!(
        read(Name::Collect, &[0, 0x36, 0xee, 0x81, 0, 0, 0, 0]),
        Some(Some(Code::BadRequest)),
        "an hour and 1 ms"
    );
    assert_eq!(read(Name::Collect, &[0, 0x36, 0xee, 0x80, 0, 0, 0, 0]), None, "an hour");
    assert_eq!(read(Name::Random, &[0; 8]), Some(Some(Code::BadRequest)));
    let mut everything = Vec::new();
    everything.put_string(b"everything");
    everything.put_string(b"");
    assert_eq!(read(Name::Lock, &everything), Some(Some(Code::BadRequest)));
    assert_eq!(read(Name::Forget, &everything), None);
}

#[test]
fn replies_tell_why_there_is_no_answer() {
    let (mut done, mut refused) = (Vec::new(), Vec::new());
    put_reply(&mut done, Name::Sign, Ok(&Zeroizing::new(b"signature".to_vec())));
    let failure = Failure::new(Code::Timeout, "late");
    put_reply::<()>(&mut refused, Name::Lock, Err(&failure));
    let read = |name, body| read_reply::<Zeroizing<Vec<u8>>>(name, body);
    assert_eq!(read(Name::Sign, &done[4..]).unwrap().unwrap().as_slice(), b"signature");
    assert_eq!(read_reply::<()>(Name::Lock, &refused[4..]), Ok(Err(failure)));
    assert_eq!(read(Name::Decrypt, &done[4..]).err(), Some(ReplyError::Unexpected), "the reply to another message");
    assert_eq!(read(Name::Sign, &[5]).err(), Some(ReplyError::NotSpoken));
    assert_eq!(read(Name::Sign, &[28]).err(), Some(ReplyError::Unreadable));
    assert_eq!(read(Name::Sign, &[6]).err(), Some(ReplyError::Unexpected));
    assert_eq!(read(Name::Sign, &done[4..done.len() - 1]).err(), Some(ReplyError::Malformed(WireError::Truncated)));
}

#[test]
fn a_page_fits_its_frame() {
    let large = |id| Finished { id, reply: Ok(Zeroizing::new(vec![7; 60_000])) };
    let (finished, more) = fitting((0..9).map(large), 0);
    assert_eq!((finished.len(), more), (4, true));
    let mut frame = Vec::new();
    put_reply(&mut frame, Name::Collect, Ok(&Collected { finished, more }));
    assert!(frame.len() <= 4 + MAX_FRAME);
    assert_eq!(fitting((0..9).map(large), 2).0.len(), 2);
    assert!(!fitting((0..2).map(large), 2).1, "both were taken, and there are no others");
    let small = |id| Finished { id, reply: Ok(Zeroizing::new(Vec::new())) };
    let (many, _) = fitting((0..100_000).map(small), 0);
    let mut frame = Vec::new();
    put_reply(&mut frame, Name::Collect, Ok(&Collected { finished: many, more: true }));
    assert!((MAX_FRAME - 1024..=4 + MAX_FRAME).contains(&frame.len()), "{}", frame.len());
}
