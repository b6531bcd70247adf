//! The daemon dies while it changes its store: by kill -9, before a write, in the middle of one, and by a power cut that loses
//! what was not synced. Whatever it acknowledged is there and signs; of what it was doing, all or nothing.
//!
//! `STORE_CRASHES=1000` does more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod support;

use std::{collections::BTreeSet, env, fs, thread, time::Duration};

use rustix::process::{Pid, Signal, kill_process};
use secrecy::SecretString;
use strongroom::{
    agent::message::{
        KeyEntry, Made, NewSlot, Page, Paging, Request, SlotMade, StoreRequest, StoreStatus, StoredRequest, Target,
    },
    devices::{Algorithm, NewKey},
    public_key::{FingerprintHash, fingerprint},
    vault::{STORE, stored::NewStored},
};
use support::{
    client::{Client, Key},
    daemon::Home,
    faults::{random, shim},
    service::{Bytes, ssh, to, use_key},
};

const DATA: &[u8] = b"what is signed";
/// What a daemon is asked to do at most before it dies.
const CHANGES: u64 = 10;

fn crashes() -> u64 {
    env::var("STORE_CRASHES").ok().map_or(16, |crashes| crashes.parse().unwrap())
}

/// What is known of the store: what was acknowledged, and what was being done when the daemon died.
struct World {
    seed: u64,
    keys: BTreeSet<Vec<u8>>,
    slots: BTreeSet<u32>,
    passphrase: String,
    doing: Option<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Generate(u64),
    /// A key of memory's is kept.
    Keep(Vec<u8>),
    Delete(Vec<u8>),
    /// It gets a successor, and stays.
    Rotate(Vec<u8>),
    AddSlot,
    RemoveSlot(u32),
    Passphrase(String),
}

impl World {
    fn secret(&self) -> SecretString {
        self.passphrase.clone().into()
    }

    fn next(&self, n: u64) -> Change {
        let pick = |n, from: usize| random(self.seed, n) as usize % from.max(1);
        let last = |slots: &BTreeSet<u32>| slots.last().copied().filter(|slot| *slot > 0);
        match (random(self.seed, n) % 12, self.keys.iter().nth(pick(n + 1, self.keys.len()))) {
            (0..2, _) if self.slots.len() < 6 => Change::AddSlot,
            (2, _) if let Some(slot) = last(&self.slots) => Change::RemoveSlot(slot),
            (3, _) => Change::Passphrase(format!("passphrase {n}")),
            (4..6, Some(key)) => Change::Delete(key.clone()),
            (6, _) => Change::Keep(Vec::new()),
            (7..9, Some(key)) => Change::Rotate(key.clone()),
            _ => Change::Generate(n),
        }
    }

    /// Makes a change; whether it was acknowledged. Whatever is not is remembered as being done.
    fn change(&mut self, home: &Home, client: &mut Client, change: Change) -> bool {
        self.doing = Some(change.clone());
        let Some(done) = self.acknowledged(home, client, change) else { return false };
        match done {
            Change::Generate(_) | Change::Rotate(_) => {}
            Change::Keep(key) => drop(self.keys.insert(key)),
            Change::Delete(key) => drop(self.keys.remove(&key)),
            Change::AddSlot => {}
            Change::RemoveSlot(slot) => drop(self.slots.remove(&slot)),
            Change::Passphrase(new) => self.passphrase = new,
        }
        self.doing = None;
        true
    }

    fn acknowledged(&mut self, home: &Home, client: &mut Client, change: Change) -> Option<Change> {
        match &change {
            Change::Generate(n) => {
                let new = NewKey::new(format!("key {n}"), Algorithm::Ed25519);
                let request = Request::Generate { deadline: None, device: STORE, new, terms: NewStored::default() };
                let reply = client.try_ask(&request)?;
                self.keys.insert(reply.ok::<Made<'_>>().blob.to_vec());
            }
            Change::Keep(_) => {
                let key = Key::random();
                client.send(&key.add_message(b"kept", &[]));
                client.receive().ok()?;
                self.doing = Some(Change::Keep(key.blob()));
                let request = Request::Import { deadline: None, key: &key.blob(), to: to(STORE) };
                client.try_ask(&request)?.ok::<Made<'_>>();
                return Some(Change::Keep(key.blob()));
            }
            Change::Delete(key) => {
                let name = fingerprint(key, FingerprintHash::Sha256);
                let request = Request::Delete { key, device: STORE, name: &name, proof: Some(self.secret()) };
                client.try_ask(&request)?.ok::<()>();
            }
            Change::Rotate(key) => {
                let reply = client.try_ask(&Request::Stored(StoredRequest::Rotate { key, retires: None }))?;
                self.keys.insert(reply.ok::<Made<'_>>().blob.to_vec());
            }
            Change::AddSlot => {
                let path = home.path("key");
                let add = NewSlot::KeyFile(path.to_str().unwrap());
                let request = StoreRequest::AddSlot { proof: self.secret(), label: "boot", add };
                let reply = client.try_ask(&Request::Store(request))?;
                let made: SlotMade<'_> = reply.ok();
                self.slots.insert(made.number);
            }
            Change::RemoveSlot(number) => {
                let request = StoreRequest::RemoveSlot { proof: self.secret(), number: *number };
                client.try_ask(&Request::Store(request))?.ok::<()>();
            }
            Change::Passphrase(new) => {
                let request = StoreRequest::ChangePassphrase { old: self.secret(), new: new.clone().into() };
                client.try_ask(&Request::Store(request))?.ok::<()>();
            }
        }
        Some(change)
    }

    /// Holds what the store has against what is known, and takes over what turned out to be done.
    fn check(&mut self, client: &mut Client, what: &str) {
        let doing = self.doing.take();
        if let Some(Change::Passphrase(new)) = &doing
            && client.try_ask(&Request::Unlock(Target::Store, new.clone().into())).unwrap().read::<()>().is_ok()
        {
            self.passphrase.clone_from(new);
        } else {
            client.try_ask(&Request::Unlock(Target::Store, self.secret())).unwrap().ok::<()>();
        }
        let is = listed(client);
        let (mut more, mut less) = (&is - &self.keys, &self.keys - &is);
        match &doing {
            Some(Change::Generate(_) | Change::Rotate(_)) if more.len() == 1 => more.clear(),
            Some(Change::Keep(key)) => drop(more.remove(key)),
            Some(Change::Delete(key)) => drop(less.remove(key)),
            _ => {}
        }
        assert!(more.is_empty() && less.is_empty(), "{what}, {doing:?}: {} more, {} less", more.len(), less.len());
        self.keys = is;
        for key in &self.keys {
            client.try_ask(&use_key(ssh(key, DATA), 0)).unwrap().ok::<Bytes>();
        }
        let status = client.try_ask(&Request::Store(StoreRequest::Status)).unwrap();
        let status: StoreStatus<'_> = status.ok();
        assert!(status.report.is_empty() || status.report.contains("nothing was lost"), "{what}: {}", status.report);
        let is: BTreeSet<_> = status.slots.iter().map(|slot| slot.number).collect();
        let (mut more, mut less) = (&is - &self.slots, &self.slots - &is);
        match &doing {
            Some(Change::AddSlot) if more.len() == 1 => more.clear(),
            Some(Change::RemoveSlot(slot)) => drop(less.remove(slot)),
            _ => {}
        }
        assert!(more.is_empty() && less.is_empty(), "{what}, {doing:?}: slots {more:?} more, {less:?} less");
        self.slots = is;
    }
}

/// The blobs of all keys in the store.
fn listed(client: &mut Client) -> BTreeSet<Vec<u8>> {
    let (mut all, mut cursor) = (BTreeSet::new(), Vec::new());
    loop {
        let reply = client.ask(&Request::Keys(Paging { cursor: &cursor, max: 0 }));
        let page: Page<KeyEntry<'_>> = reply.ok();
        let stored = |entry: &&KeyEntry<'_>| entry.places.iter().any(|place| place.device == STORE);
        all.extend(page.entries.iter().filter(stored).map(|entry| entry.blob.to_vec()));
        if page.next.is_empty() {
            return all;
        }
        cursor.clone_from(&page.next);
    }
}

#[test]
fn what_the_daemon_acknowledged_outlives_it() {
    let seed = env::var("STORE_SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    let mut home = Home::with_cheap_tries();
    home.env("LD_PRELOAD", shim());
    home.env("FAULT_DIRECTORY", home.path("state"));
    home.env("FAULT_ARM", home.path("armed"));
    fs::write(home.path("key"), [7; 32]).unwrap();
    let mut world = World {
        seed,
        keys: BTreeSet::new(),
        slots: BTreeSet::new(),
        passphrase: "the first one".to_owned(),
        doing: None,
    };
    let daemon = home.start();
    let mut client = daemon.connect_service();
    let init = StoreRequest::Init { passphrase: world.secret(), recovery: true };
    client.try_ask(&Request::Store(init)).unwrap();
    let status = client.try_ask(&Request::Store(StoreRequest::Status)).unwrap();
    world.slots = status.ok::<StoreStatus<'_>>().slots.iter().map(|slot| slot.number).collect();
    assert_eq!(world.slots.len(), 2);
    daemon.end(Signal::KILL);

    let mut unfinished = 0;
    for round in 0..crashes() {
        let n = round * 1000;
        let kind = ["kill", "tear", "power", "outside"][round as usize % 4];
        home.env("FAULT_KIND", kind);
        home.env("FAULT_AT", (1 + random(seed, n) % 200).to_string());
        home.env("FAULT_SEED", random(seed, n + 1).to_string());
        let daemon = home.start();
        let mut client = daemon.connect_service();
        world.check(&mut client, &format!("seed {seed}, before round {round} ({kind})"));
        fs::write(home.path("armed"), "").unwrap();
        let pid = Pid::from_raw(daemon.pid().cast_signed()).unwrap();
        let killer = (kind == "outside").then(|| {
            let after = Duration::from_micros(random(seed, n + 2) % 100_000);
            thread::spawn(move || {
                // Some moment: no event says when a machine loses its power.
                thread::sleep(after);
                kill_process(pid, Signal::KILL).unwrap();
            })
        });
        for m in 0..CHANGES {
            let change = world.next(n + 10 + m * 10);
            if !world.change(&home, &mut client, change) {
                unfinished += 1;
                break;
            }
        }
        killer.into_iter().for_each(|killer| killer.join().unwrap());
        daemon.end(Signal::KILL);
        fs::remove_file(home.path("armed")).unwrap();
    }
    let daemon = home.start();
    world.check(&mut daemon.connect_service(), "in the end");
    println!(
        "{} crashes, {unfinished} amid a change; {} keys, {} slots",
        crashes(),
        world.keys.len(),
        world.slots.len()
    );
    assert!(unfinished > 0, "no daemon ever died while it was changing something");
}
