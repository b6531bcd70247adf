//! The codecs against tests/vectors/messages.txt, whose frames were made from docs/protocol.md without them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop here")]

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use secrecy::SecretString;
use strongroom::{
    agent::message::{
        Answer, Cancelled, CarryRequest, Checked, Code, Collect, Collected, DeviceEntry, Failure, Finished, How,
        KeyEntry, KeyUse, Made, Name, NewSlot, OfferEntry, PackedEntry, Page, Paging, PinState, Place, RefusalEntry,
        Request, RequestError, SlotEntry, SlotMade, StoreRequest, StoreStatus, StoredRequest, Submit, TakenInEntry,
        Target, compatible, put_reply, read_reply,
    },
    devices::{
        Algorithm, CardChange, CardPin, CardSlot, CardStatus, CardText, DecryptScheme, DeriveScheme, Hash, Input,
        NewKey, Operation, Scheme, Touch,
        card::{SlotStatus, TouchPolicy},
    },
    rfc4251::Reader,
    vault::{
        Move,
        audit::{Head, Position},
        key::{Destination, Grants, Hop, HostKey},
        stored::{ExportForm, KeyChange, NewStored},
    },
};
use zeroize::Zeroizing;

type Bytes = Zeroizing<Vec<u8>>;

fn vectors() -> BTreeMap<String, Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/messages.txt");
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| {
            let (name, hex) = line.split_once(' ').unwrap();
            let bytes = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap());
            (name.to_owned(), bytes.collect())
        })
        .collect()
}

/// The name and the fields of an extension's frame.
fn extension(frame: &[u8]) -> (&[u8], &[u8]) {
    let mut r = Reader::new(frame);
    assert_eq!((r.u32().unwrap() as usize, r.u8().unwrap()), (frame.len() - 4, 27));
    let name = r.string().unwrap();
    (name, r.rest())
}

fn read(frame: &[u8]) -> Result<Request<'_>, RequestError> {
    let (name, fields) = extension(frame);
    Request::read(Name::from_bytes(name).unwrap(), fields)
}

fn written(request: &Request<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    request.put(&mut out);
    out
}

fn message(data: &[u8]) -> Input<'_> {
    Input::Message(data.into())
}

fn a_card(key: &[u8]) -> CardStatus {
    CardStatus {
        ident: "0006:12345678".to_owned(),
        version: [3, 4],
        manufacturer: "Yubico".to_owned(),
        name: "Example<<Ann".to_owned(),
        language: "en".to_owned(),
        url: "https://example.org/ann.asc".to_owned(),
        login: "ann".to_owned(),
        tries: [3, 0, 2],
        pin_per_signature: false,
        signatures: 7,
        default_pins: vec![CardPin::Admin],
        slots: vec![SlotStatus {
            slot: CardSlot::Auth,
            algorithm: "ed25519".to_owned(),
            key: key.to_vec(),
            fingerprint: "A".repeat(40),
            created: 1_700_000_000,
            touch: Some(TouchPolicy::Fixed),
        }],
    }
}

#[test]
fn requests() {
    let key: Vec<u8> = [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], &(0..32).collect::<Vec<u8>>()].concat();
    let digest: Vec<u8> = (100..132).collect();
    let blinded = [&[0; 32], &b"data"[..]].concat();
    let task = |how| KeyUse { key: &key, how };
    let change = |change| Request::ChangeCard("card", change);
    let [user, other, admin] = ["123456", "654321", "12345678"].map(|pin| move || pin.into());
    let sign = |scheme, input| task(How::Operation(Operation::Sign { scheme, input }));
    let ms = |n| Some(Duration::from_millis(n));
    let hour = Duration::from_secs(3600);
    let proof = || SecretString::from("pass phrase");
    let add_slot = |add| Request::Store(StoreRequest::AddSlot { proof: proof(), label: "label", add });
    let stored = Request::Stored;
    let set = |proof, change| stored(StoredRequest::Set { key: &key, proof, change });
    let private: Vec<u8> = [
        &b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..],
        &(0..32).collect::<Vec<u8>>(),
        b"\0\0\0\x40",
        &[7; 32],
        &(0..32).collect::<Vec<u8>>(),
    ]
    .concat();
    let host_key = HostKey { blob: key.as_slice().into(), is_ca: false };
    let destination = Destination {
        from: Hop::default(),
        to: Hop { user: (*b"me").into(), host: (*b"example.org").into(), keys: [host_key].into() },
    };
    let expected = [
        ("sign-ssh", Request::Use(task(How::Ssh { flags: 4, data: b"data" }), None)),
        ("sign-raw", Request::Use(sign(Scheme::RsaPkcs1v15Raw, message(&digest)), ms(5000))),
        (
            "sign-prehashed",
            Request::Use(sign(Scheme::Ecdsa(Hash::Sha256), Input::Digest(digest.as_slice().into())), Some(hour)),
        ),
        ("sign-blinded", Request::Use(sign(Scheme::Ed25519BlindedTor, message(&blinded)), ms(1))),
        (
            "decrypt-oaep",
            Request::Use(
                task(How::Operation(Operation::Decrypt {
                    scheme: DecryptScheme::RsaOaep(Hash::Sha256),
                    label: b"label".into(),
                    ciphertext: b"ciphertext".into(),
                })),
                None,
            ),
        ),
        (
            "decrypt-pkcs1",
            Request::Use(
                task(How::Operation(Operation::Decrypt {
                    scheme: DecryptScheme::RsaPkcs1v15,
                    label: b"".into(),
                    ciphertext: b"ciphertext".into(),
                })),
                None,
            ),
        ),
        (
            "derive-x25519",
            Request::Use(
                task(How::Operation(Operation::Derive { scheme: DeriveScheme::X25519, peer: (&[0; 32]).into() })),
                ms(250),
            ),
        ),
        (
            "submit-sign",
            Request::Submit(Submit {
                id: 1 << 63,
                deadline: ms(10),
                task: sign(Scheme::RsaPss(Hash::Sha512), message(b"data")),
            }),
        ),
        (
            "submit-derive",
            Request::Submit(Submit {
                id: 0,
                deadline: None,
                task: task(How::Operation(Operation::Derive { scheme: DeriveScheme::Ecdh, peer: b"\x04point".into() })),
            }),
        ),
        ("collect", Request::Collect(Collect { wait: hour, max: 0 })),
        ("cancel", Request::Cancel(0x0102_0304_0506_0708)),
        ("keys-first", Request::Keys(Paging::default())),
        ("devices-next", Request::Devices(Paging { cursor: &[0; 64], max: 10 })),
        ("unlock-device", Request::Unlock(Target::Device("hsm"), "123456".into())),
        ("unlock-key", Request::Unlock(Target::Key(&key), "pass phrase".into())),
        ("lock", Request::Lock(Target::Device("hsm"))),
        ("forget-everything", Request::Forget(Target::Everything)),
        ("why", Request::Why { all: true, max: 5 }),
        ("random", Request::Random { len: 1024, device: "hsm" }),
        ("random-own", Request::Random { len: 1, device: "" }),
        ("audit", Request::Audit { flush: true }),
        ("check", Request::Check(sign(Scheme::Ed25519, message(b"data")))),
        (
            "generate",
            Request::Generate {
                deadline: None,
                device: "hsm",
                new: NewKey::new("label", Algorithm::Rsa(3072)),
                terms: NewStored::default(),
            },
        ),
        (
            "generate-store",
            Request::Generate {
                deadline: None,
                device: "store",
                new: NewKey::new("label", Algorithm::MlDsa44Ed25519),
                terms: NewStored { exportable: true, grants: Grants { sign: true, ..Grants::NONE } },
            },
        ),
        (
            "generate-card",
            Request::Generate {
                deadline: ms(60_000),
                device: "card",
                new: NewKey {
                    slot: Some(CardSlot::Auth),
                    touch: Some(Touch::Fixed),
                    secret: Some("12345678".into()),
                    ..NewKey::new("", Algorithm::Ed25519)
                },
                terms: NewStored::default(),
            },
        ),
        (
            "import",
            Request::Import {
                deadline: None,
                key: &key,
                to: Move {
                    device: "card".to_owned(),
                    label: "name".to_owned(),
                    slot: Some(CardSlot::Sign),
                    touch: Some(Touch::On),
                    secret: Some("12345678".into()),
                    terms: NewStored::default(),
                },
            },
        ),
        (
            "import-store",
            Request::Import {
                deadline: ms(1),
                key: &key,
                to: Move {
                    device: "store".to_owned(),
                    label: String::new(),
                    slot: None,
                    touch: None,
                    secret: None,
                    terms: NewStored { exportable: false, grants: Grants::ALL },
                },
            },
        ),
        ("rename", Request::Rename { key: &key, name: "authority" }),
        (
            "allow",
            Request::Allow { key: &key, operations: Grants { sign: true, decrypt: false, derive: true }, proof: None },
        ),
        ("allow-nothing", Request::Allow { key: &key, operations: Grants::NONE, proof: None }),
        ("allow-stored", Request::Allow { key: &key, operations: Grants::ALL, proof: Some("pass phrase".into()) }),
        ("card-status", Request::CardStatus("card")),
        ("change-card-set-pin", change(CardChange::SetPin { pin: CardPin::User, secret: user(), new: other() })),
        (
            "change-card-reset-pin",
            change(CardChange::ResetPin { by: CardPin::ResetCode, secret: "87654321".into(), new: other() }),
        ),
        (
            "change-card-set-touch",
            change(CardChange::SetTouch { slot: CardSlot::Auth, touch: Touch::On, secret: admin() }),
        ),
        (
            "change-card-set-text",
            change(CardChange::SetText { text: CardText::Name, value: "Example<<Ann".to_owned(), secret: admin() }),
        ),
        ("change-card-factory-reset", change(CardChange::FactoryReset { serial: "12345678".to_owned() })),
        ("delete", Request::Delete { key: &key, device: "memory", name: "authority", proof: None }),
        (
            "delete-stored",
            Request::Delete { key: &key, device: "store", name: "authority", proof: Some("pass phrase".into()) },
        ),
        ("unlock-store", Request::Unlock(Target::Store, "pass phrase".into())),
        ("lock-store", Request::Lock(Target::Store)),
        ("forget-store", Request::Forget(Target::Store)),
        ("store", Request::Store(StoreRequest::Status)),
        ("init", Request::Store(StoreRequest::Init { passphrase: proof(), recovery: true })),
        ("add-slot-passphrase", add_slot(NewSlot::Passphrase("another".into()))),
        ("add-slot-recovery", add_slot(NewSlot::Recovery)),
        ("add-slot-key-file", add_slot(NewSlot::KeyFile("/etc/strongroom.key"))),
        ("add-slot-credential", add_slot(NewSlot::Credential("strongroom-store"))),
        (
            "import-key",
            stored(StoredRequest::Import {
                key: &private,
                comment: b"me@home",
                label: "work",
                confirm: true,
                terms: NewStored { exportable: true, grants: Grants { sign: true, ..Grants::NONE } },
            }),
        ),
        ("set-key-enable", set(Some(proof()), KeyChange::Enable)),
        ("set-key-disable", set(None, KeyChange::Disable)),
        ("set-key-confirm", set(None, KeyChange::Confirm(true))),
        ("set-key-expires", set(None, KeyChange::Expires(Some(1_800_000_000)))),
        ("set-key-never", set(Some(proof()), KeyChange::Expires(None))),
        ("set-key-destinations", set(None, KeyChange::Destinations([destination].into()))),
        ("set-key-not-exportable", set(None, KeyChange::NotExportable)),
        ("set-key-detach", set(None, KeyChange::Detach((*b"certificate").into()))),
        ("attach", stored(StoredRequest::Attach(b"certificate"))),
        (
            "export",
            stored(StoredRequest::Export {
                key: &key,
                proof: Some(proof()),
                form: ExportForm::Pkcs8,
                passphrase: "another".into(),
            }),
        ),
        ("rotate", stored(StoredRequest::Rotate { key: &key, retires: Some(1_800_000_000) })),
        ("rotate-never", stored(StoredRequest::Rotate { key: &key, retires: None })),
        ("remove-slot", Request::Store(StoreRequest::RemoveSlot { proof: proof(), number: 7 })),
        ("change-passphrase", Request::Store(StoreRequest::ChangePassphrase { old: proof(), new: "another".into() })),
        ("backup", Request::Carry(CarryRequest::Backup { proof: proof(), recipients: vec!["age1qqqq"] })),
        ("fetch", Request::Carry(CarryRequest::Fetch(131_072))),
        ("upload", Request::Carry(CarryRequest::Upload { offset: 131_072, bytes: b"piece" })),
        ("restore", Request::Carry(CarryRequest::Restore { proof: proof(), key: "AGE-SECRET-KEY-1QQQQ".into() })),
        ("transfer-offer", Request::Carry(CarryRequest::TransferOffer { proof: proof(), name: "target" })),
        (
            "transfer-wrap",
            Request::Carry(CarryRequest::TransferWrap {
                proof: proof(),
                offer: b"offer",
                fingerprint: "SHA256:qqqq",
                keys: vec![&key],
            }),
        ),
        ("transfer-look", Request::Carry(CarryRequest::TransferLook)),
        (
            "transfer-accept",
            Request::Carry(CarryRequest::TransferAccept { proof: proof(), fingerprint: "SHA256:qqqq" }),
        ),
    ];
    let vectors = vectors();
    let of_requests = vectors.keys().filter(|name| {
        let others = ["malformed-", "bad_request-", "unsupported-", "reply-", "metacode-", "joyent-", "arekinath-"];
        !others.iter().any(|other| name.starts_with(other))
    });
    assert_eq!(of_requests.count(), expected.len(), "each vector has its meaning here");
    for (name, request) in &expected {
        let frame = &vectors[*name];
        assert_eq!(written(request), *frame, "{name}");
        // Writing is tested above, so what reads and writes to the same bytes was understood.
        assert_eq!(written(&read(frame).unwrap()), *frame, "{name}");
    }
    // Where two fields of one type could be mistaken for each other:
    let Ok(Request::Use(KeyUse { how: How::Operation(Operation::Decrypt { label, ciphertext, .. }), .. }, _)) =
        read(&vectors["decrypt-oaep"])
    else {
        panic!("not read as a decryption")
    };
    assert_eq!((&*label, &*ciphertext), (&b"label"[..], &b"ciphertext"[..]));
}

#[test]
fn refused_requests() {
    let mut seen = 0;
    for (name, frame) in vectors() {
        let code = match name.split('-').next().unwrap() {
            "malformed" => None,
            "bad_request" => Some(Code::BadRequest),
            "unsupported" => Some(Code::Unsupported),
            _ => continue,
        };
        let error = if name == "malformed-joyent" {
            compatible::Request::read(compatible::Name::Ecdh, extension(&frame).1).err().unwrap()
        } else {
            read(&frame).err().unwrap()
        };
        assert_eq!(error.failure().map(|failure| failure.code), code, "{name}: {error}");
        seen += 1;
    }
    assert!(seen > 10);
}

#[test]
fn requests_of_other_agents() {
    let key: Vec<u8> = [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], &(0..32).collect::<Vec<u8>>()].concat();
    let digest: Vec<u8> = (100..132).collect();
    let vectors = vectors();
    for (name, request) in [
        ("metacode-ids", compatible::Request::DecryptDeriveIds),
        ("metacode-decrypt", compatible::Request::DecryptDerive { key: &key, data: b"data" }),
        ("joyent-ecdh", compatible::Request::Ecdh { key: &key, partner: &key }),
        ("arekinath-sign", compatible::Request::SignPrehash { key: &key, digest: &digest }),
    ] {
        let (of, fields) = extension(&vectors[name]);
        assert_eq!(compatible::Request::read(compatible::Name::from_bytes(of).unwrap(), fields), Ok(request));
        let mut out = Vec::new();
        request.put(&mut out);
        assert_eq!(out, vectors[name], "{name}");
    }
}

/// Checks that the vector reads as `meaning`, and that this writes as the vector.
fn reply<'a, T: Answer<'a> + PartialEq>(
    vectors: &'a BTreeMap<String, Vec<u8>>,
    vector: &str,
    name: Name,
    meaning: Result<T, Failure>,
) {
    let frame = &vectors[vector];
    let mut out = Vec::new();
    put_reply(&mut out, name, meaning.as_ref());
    assert_eq!(out, *frame, "{vector}");
    assert!(read_reply::<T>(name, &frame[4..]).unwrap() == meaning, "{vector}");
}

#[test]
fn replies() {
    let vectors = vectors();
    let signature = || Bytes::new(b"signature".to_vec());
    reply(&vectors, "reply-result", Name::Sign, Ok(signature()));
    reply(&vectors, "reply-empty", Name::Submit, Ok(()));
    reply::<Bytes>(&vectors, "reply-busy", Name::Sign, Err(Failure::new(Code::Busy, "too much is waiting")));
    let pin = Failure { tries_left: Some(2), ..Failure::new(Code::PinWrong, "the PIN is wrong") };
    reply::<()>(&vectors, "reply-pin", Name::Unlock, Err(pin));
    let late = Failure::new(Code::Timeout, "late");
    let finished = vec![Finished { id: 7, reply: Ok(signature()) }, Finished { id: 8, reply: Err(late) }];
    reply(&vectors, "reply-collect", Name::Collect, Ok(Collected { finished, more: false }));
    reply(&vectors, "reply-cancel", Name::Cancel, Ok(Cancelled::Abandoned));
    let key: Vec<u8> = [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], &(0..32).collect::<Vec<u8>>()].concat();
    let entry = KeyEntry {
        blob: &key,
        certificates: vec![b"certificate"],
        name: "work",
        comment: b"me@home",
        places: vec![Place { device: "hsm", state: "ready" }, Place { device: "soft", state: "absent" }],
        operations: vec!["sign", "derive"],
        signs: vec!["ssh", "ed25519"],
        decrypts: vec![],
        derives: vec![],
        password: "credential",
        constraints: vec!["confirm", "touch"],
        note: "OpenPGP 5C1D",
        created: 1_700_000_000,
        not_after: 1_800_000_000,
        traits: vec!["exportable"],
    };
    let frame = vectors["reply-keys"].clone();
    let page = Page { entries: vec![entry], next: b"next".to_vec() };
    assert_eq!(read_reply(Name::Keys, &frame[4..]), Ok(Ok(page.clone())));
    let mut out = Vec::new();
    put_reply(&mut out, Name::Keys, Ok(&page));
    assert_eq!(out, frame);
    let device = DeviceEntry {
        id: "hsm",
        kind: "pkcs11",
        serial: "0123",
        state: "failed",
        reason: "it keeps dying",
        lanes: 4,
        running: 3,
        waiting: 2,
        pin: PinState::Needed,
        tries_left: None,
        done: 1000,
        failed: 10,
        timed_out: 5,
        restarts: 1,
        notes: vec!["the key \"a\" is left out: its type is unknown"],
        wants: "touch",
        wanted_for: "Touch hsm for git",
    };
    reply(&vectors, "reply-devices", Name::Devices, Ok(Page { entries: vec![device], next: Vec::new() }));
    let refusal = RefusalEntry {
        unix_ms: 1_700_000_000_123,
        message: "sign",
        key: "SHA256:abc",
        caller: "git (process 7)",
        code: Code::Denied,
        reason: "the person who was asked said no",
    };
    reply(&vectors, "reply-why", Name::Why, Ok(vec![refusal]));
    let head = Head {
        directory: "/var/lib/strongroom/audit".into(),
        last: Position { seq: 1234, hash: [0xab; 32] },
        file: 3,
        length: 56_789,
        oldest_file: 2,
        before_oldest: Position { seq: 800, hash: [0xcd; 32] },
    };
    reply(&vectors, "reply-audit", Name::Audit, Ok(head));
    reply(&vectors, "reply-made", Name::Generate, Ok(Made { blob: &key, spki: b"spki", identifier: &[0; 20] }));
    reply(&vectors, "reply-card-status", Name::CardStatus, Ok(a_card(&key)));
    let slots =
        vec![SlotEntry { number: 1, kind: "recovery", label: "paper", created: 1_700_000_000, what: "age1qqqq" }];
    reply(&vectors, "reply-store", Name::Store, Ok(StoreStatus { state: "locked", slots, report: "it was mended" }));
    let made = SlotMade { number: 1, recovery: "AGE-SECRET-KEY-1QQQQ" };
    let frame = &vectors["reply-slot"];
    let mut out = Vec::new();
    put_reply(&mut out, Name::AddSlot, Ok(&made));
    assert_eq!(out, *frame);
    assert!(read_reply::<SlotMade<'_>>(Name::AddSlot, &frame[4..]).unwrap() == Ok(made));
    let packed = PackedEntry { length: 512, keys: 2, left_out: 1, damaged: 0, fingerprint: "SHA256:qqqq" };
    reply(&vectors, "reply-packed", Name::TransferWrap, Ok(packed));
    reply(&vectors, "reply-taken-in", Name::Restore, Ok(TakenInEntry { new: 2, present: 1, damaged: 0 }));
    let offer = OfferEntry { offer: b"offer", fingerprint: "SHA256:qqqq" };
    reply(&vectors, "reply-offer", Name::TransferOffer, Ok(offer));
    let checked = Checked { verdict: "confirm", device: "hsm", note: "Allow use of key?" };
    reply(&vectors, "reply-check", Name::Check, Ok(checked));
}

#[test]
fn replies_of_a_newer_daemon() {
    let vectors = vectors();
    let burns = read_reply::<Bytes>(Name::Sign, &vectors["reply-newer-code"][4..]);
    assert_eq!(burns.unwrap().unwrap_err(), Failure::new(Code::Failed, "it burns"));
    let collected = read_reply::<Collected>(Name::Collect, &vectors["reply-newer-fields"][4..]).unwrap().unwrap();
    assert!(collected.more);
    assert_eq!(collected.finished, [Finished { id: 9, reply: Ok(Bytes::new(b"signature".to_vec())) }]);
}
