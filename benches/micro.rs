//! What single steps on the way of a request cost: decode, lookup, policy, the whole use of a key, encode.
//!
//! `cargo bench --bench micro` compares with the run before; `-- --save-baseline NAME` keeps one, and `-- --baseline NAME`
//! compares with that.
#![allow(clippy::unwrap_used, missing_docs)]

use std::{hint::black_box, sync::Arc, time::Duration};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use criterion::{Criterion, criterion_group, criterion_main};
use strongroom::{
    agent::wire::{self, Request, number},
    devices::{Hash, Input, Operation, Outcome, Scheme, Signature, soft::SoftKey},
    prompt::{self, Prompter},
    public_key::{KeyType, PublicKey},
    rfc4251::Put,
    vault::{
        Answer, Asked, Candidate, Parts, Settings, Use, Vault,
        audit::{self, Audit, OnFull},
        key::{Caller, Constraints, Destination, Grants, Hop, HostKey, Identity, Place, PrivateKey},
        keyring::Keyring,
        policy::{self, Rules},
        purpose::Purpose,
        store::Store,
    },
};

const DATA: [u8; 600] = [0x5a; 600];
const MANY: u32 = 10_000;

fn seed(n: u32) -> [u8; 32] {
    let mut seed = [7; 32];
    seed[..4].copy_from_slice(&n.to_be_bytes());
    seed
}

fn blob(n: u32) -> Vec<u8> {
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed(n)).unwrap();
    PublicKey::Ed25519(pair.public_key().as_ref()).to_blob()
}

fn key(n: u32) -> PrivateKey {
    PrivateKey::Soft(Arc::new(SoftKey::from_secret(KeyType::Ed25519, &seed(n)).unwrap()))
}

/// A vault with the keys 0 to `count`.
fn vault(count: u32, audit: Audit) -> Arc<Vault> {
    let parts = Parts::new(Prompter::new(prompt::Settings::default()), Store::in_memory().unwrap());
    let vault = Vault::new(Settings::default(), Parts { audit, ..parts });
    for n in 0..count {
        let candidate = Candidate {
            blob: blob(n),
            key_type: KeyType::Ed25519,
            comment: format!("key {n}").as_bytes().into(),
            lifetime: None,
            confirm: false,
            destinations: [].into(),
        };
        vault.add(&Caller::default(), candidate, key(n)).unwrap();
    }
    vault
}

/// What ssh asks to have signed at a login as `user` (RFC 4252, section 7).
fn login(blob: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_string(&[1; 32]);
    data.push(50);
    for part in [&b"user"[..], b"ssh-connection", b"publickey"] {
        data.put_string(part);
    }
    data.push(1);
    data.put_string(b"ssh-ed25519");
    data.put_string(blob);
    data
}

fn uses<'a>(blob: &'a [u8], data: &'a [u8]) -> Use<'a> {
    let asked = Asked::Ssh { data, rsa_hash: Hash::Sha256 };
    Use { blob, asked, deadline: None, offered: true, waits_for_place: true }
}

fn operate(vault: &Arc<Vault>, caller: &Arc<Caller>, blob: &[u8]) -> Signature {
    match vault.operate(caller, uses(blob, &DATA)) {
        Answer::Now(Ok(Outcome::Signature(signature))) => signature,
        _ => unreachable!("a soft Ed25519 key signs on the spot"),
    }
}

fn decode(c: &mut Criterion) {
    let blob = blob(0);
    let mut body = vec![number::SIGN_REQUEST];
    body.put_string(&blob);
    body.put_string(&DATA);
    body.put_u32(0);
    c.bench_function("decode/sign request", |b| b.iter(|| Request::read(black_box(&body)).is_ok()));
    let login = login(&blob);
    c.bench_function("decode/purpose of a login", |b| b.iter(|| Purpose::read(black_box(&login), &blob).is_ssh()));
}

fn place(n: u32, destinations: Vec<Destination>) -> Place {
    Place {
        key: key(n),
        comment: [].into(),
        constraints: Constraints { destinations: destinations.into(), ..Constraints::default() },
        grants: Grants::NONE,
        rank: 0,
        added: true,
        name: "".into(),
    }
}

fn lookup(c: &mut Criterion) {
    let caller = Caller::default();
    for count in [1, MANY] {
        let mut ring = Keyring::default();
        for n in 0..count {
            ring.put(&blob(n), KeyType::Ed25519, place(n, Vec::new())).unwrap();
        }
        let blob = blob(count / 2);
        c.bench_function(&format!("lookup/one of {count} keys"), |b| b.iter(|| ring.find(black_box(&blob)).is_some()));
        let vault = vault(count, Audit::off());
        c.bench_function(&format!("list/{count} keys"), |b| {
            b.iter(|| vault.list(&caller).encoded(|identities| wire::identities_answer(identities, |_| ())).len());
        });
    }
}

fn decide(c: &mut Criterion) {
    let (blob, host) = (blob(0), blob(1));
    let login = login(&blob);
    let identity = |destinations| Identity::new(&blob, KeyType::Ed25519, vec![place(0, destinations)]);
    let hop = || Hop {
        user: (*b"user").into(),
        host: (*b"host").into(),
        keys: [HostKey { blob: host.clone().into(), is_ca: false }].into(),
    };
    let destinations = (0..16).map(|_| Destination { from: Hop::default(), to: hop() }).collect();
    let operation = Operation::Sign { scheme: Scheme::Ed25519, input: Input::Message(login.as_slice().into()) };
    let (caller, rules) = (Caller::default(), Rules::default());
    for (name, identity) in
        [("no condition", identity(Vec::new())), ("16 destinations, none bound", identity(destinations))]
    {
        c.bench_function(&format!("policy/{name}"), |b| {
            b.iter(|| policy::decide(black_box(&identity), &caller, &operation, Grants::NONE, &rules, 0).is_ok());
        });
    }
}

fn whole(c: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let settings = audit::Settings {
        directory: directory.path().join("audit"),
        max_size: audit::DEFAULT_SIZE,
        on_full: OnFull::Warn,
    };
    let log = Audit::start(&settings, None, &Store::in_memory().unwrap()).unwrap();
    let (blob, caller) = (blob(0), Arc::new(Caller::default()));
    let signer = SoftKey::from_secret(KeyType::Ed25519, &seed(0)).unwrap();
    c.bench_function("use/the bare signature", |b| b.iter(|| signer.sign(Scheme::Ed25519, black_box(&DATA)).is_ok()));
    for (name, audit) in [("without an audit log", Audit::off()), ("with it", log)] {
        let vault = vault(1, audit);
        c.bench_function(&format!("use/{name}"), |b| b.iter(|| operate(&vault, &caller, black_box(&blob))));
    }
}

fn encode(c: &mut Criterion) {
    let signature = operate(&vault(1, Audit::off()), &Arc::default(), &blob(0));
    let mut out = Vec::with_capacity(1024);
    c.bench_function("encode/signature", |b| {
        b.iter(|| {
            out.clear();
            wire::put_signature(&mut out, black_box(&signature));
            out.len()
        });
    });
}

criterion_group! {
    name = steps;
    config = Criterion::default().measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_millis(500));
    targets = decode, lookup, decide, whole, encode
}
criterion_main!(steps);
