//! The store on a disk that fails, in a process that dies: whatever happens, every acknowledged change is there, and of one
//! that was not, all or nothing.
//!
//! A process of this very program makes changes upon a disk that `tests/c/faults.c` plays, until it dies, is killed or has
//! done them; then the store is opened and compared with what the process was told. `STORE_ROUNDS=1000` does more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use strongroom::vault::store::{KeyId, KeySlot, MasterKey, Metadata, Opened, SealedKey, Store, StoreError};
use support::faults::{random, shim};
use tempfile::TempDir;

/// Set for the process that makes changes: the directory, a seed, and the numbers of the first change and of the one
/// behind the last.
const CHILD: &str = "STRONGROOM_TEST_CHANGES";
const CHANGES: u64 = 12;
/// How many different keys and slots there are.
const KEYS: u64 = 24;
const SLOTS: u64 = 4;

fn rounds() -> u64 {
    env::var("STORE_ROUNDS").ok().map_or(40, |rounds| rounds.parse().unwrap())
}

fn master() -> MasterKey {
    MasterKey::from_bytes(&[7; 32]).unwrap()
}

fn blob(key: u64) -> Vec<u8> {
    format!("public key {key}").into_bytes()
}

/// Some longer than a page. `version` is told by what can be read and by what is sealed.
fn key(key: u64, version: u64) -> SealedKey {
    let metadata = Metadata { blob: blob(key).into(), created: version, ..Metadata::default() };
    let secret = vec![version as u8; if key.is_multiple_of(7) { 9000 } else { 32 }];
    master().seal_key(metadata, &secret).unwrap()
}

fn slot(number: u64, version: u64) -> KeySlot {
    KeySlot::key_file(number as u32, "", version, &master(), Path::new("/key"), &[5; 32]).unwrap()
}

/// What a store holds, by its keys' and slots' versions.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    keys: BTreeMap<u64, u64>,
    slots: BTreeMap<u64, u64>,
}

/// The `version`th change; both sides know it.
#[derive(Debug)]
enum Change {
    Put(u64),
    Remove(u64),
    Replace([u64; 2], [u64; 2]),
    AddSlot(u64),
    ReplaceSlot(u64),
    RemoveSlot(u64),
}

impl Change {
    fn nth(seed: u64, version: u64) -> Self {
        let part = |n, below| random(seed, version * 8 + n) % below;
        let key = |n| part(n, KEYS);
        match part(0, 10) {
            0..4 => Self::Put(key(1)),
            4 => Self::Remove(key(1)),
            5..7 => Self::Replace([key(1), key(2)], [key(3), key(4)]),
            7 => Self::AddSlot(part(1, SLOTS)),
            8 => Self::ReplaceSlot(part(1, SLOTS)),
            _ => Self::RemoveSlot(part(1, SLOTS)),
        }
    }

    /// What becomes of a state; `None` where the store must refuse.
    fn after(&self, before: &State, version: u64) -> Option<State> {
        let State { mut keys, mut slots } = before.clone();
        let _ = match *self {
            Self::Put(key) => keys.insert(key, version),
            Self::Remove(key) => keys.remove(&key),
            Self::Replace(remove, put) => {
                keys.retain(|key, _| !remove.contains(key));
                keys.extend(put.map(|key| (key, version)));
                None
            }
            Self::AddSlot(slot) if slots.contains_key(&slot) => return None,
            Self::ReplaceSlot(slot) if !slots.contains_key(&slot) => return None,
            Self::RemoveSlot(slot) if !slots.contains_key(&slot) || slots.len() == 1 => return None,
            Self::AddSlot(slot) | Self::ReplaceSlot(slot) => slots.insert(slot, version),
            Self::RemoveSlot(slot) => slots.remove(&slot),
        };
        Some(State { keys, slots })
    }

    async fn make(&self, store: &Store, version: u64) -> Result<(), StoreError> {
        let id = |key| KeyId::of(&blob(key));
        match *self {
            Self::Put(k) => store.put_key(key(k, version)).await,
            Self::Remove(k) => store.remove_key(id(k)).await,
            Self::Replace(remove, put) => {
                store.replace_keys(remove.map(id).to_vec(), put.map(|k| key(k, version)).to_vec()).await
            }
            Self::AddSlot(number) => store.add_slot(slot(number, version)).await,
            Self::ReplaceSlot(number) => store.replace_slot(slot(number, version)).await,
            Self::RemoveSlot(number) => store.remove_slot(number as u32).await,
        }
    }
}

/// Makes changes and tells of each: `ok`, `refused` or `failed`, on a line of its own.
fn change_until_done(order: &str) {
    let words: Vec<_> = order.split(' ').collect();
    let [seed, from, to] = [1, 2, 3].map(|n| words[n].parse::<u64>().unwrap());
    let tell = |what: &str| println!("\n@{what}");
    let Ok(Opened { store, .. }) = Store::open(Path::new(words[0])) else { return tell("shut") };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        for version in from..to {
            tell(match Change::nth(seed, version).make(&store, version).await {
                Ok(()) => "ok",
                Err(StoreError::SlotTaken { .. } | StoreError::NoSuchSlot { .. } | StoreError::LastSlot { .. }) => {
                    "refused"
                }
                Err(StoreError::Io { .. }) => "failed",
                Err(error) => panic!("{error}"),
            });
        }
        store.close().await;
    });
}

/// A store, and what may be in it.
struct World {
    dir: TempDir,
    seed: u64,
    version: u64,
    states: BTreeSet<State>,
}

impl World {
    async fn new(seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let opened = Store::open(dir.path()).unwrap();
        opened.store.initialise(vec![slot(0, 0)]).await.unwrap();
        opened.store.close().await;
        let first = State { slots: [(0, 0)].into(), ..State::default() };
        Self { dir, seed, version: 1, states: [first].into() }
    }

    /// One process that changes the store until something happens.
    fn round(&mut self, kind: &str, n: u64) {
        let to = self.version + CHANGES;
        let directory = self.dir.path().canonicalize().unwrap();
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "what_was_acknowledged_is_there_whatever_happens", "--nocapture"])
            .env(CHILD, format!("{} {} {} {to}", directory.display(), self.seed, self.version))
            .env("LD_PRELOAD", shim())
            .env("FAULT_DIRECTORY", &directory)
            .env("FAULT_KIND", kind)
            .env("FAULT_AT", (1 + random(self.seed, n) % 120).to_string())
            .env("FAULT_SEED", random(self.seed, n + 1).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let killed_after = (kind == "outside").then(|| random(self.seed, n + 2) % CHANGES);
        let mut answered = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap) {
            let Some(said) = line.strip_prefix('@') else { continue };
            if said == "shut" {
                break;
            }
            self.told(self.version + answered, said);
            answered += 1;
            if killed_after == Some(answered) {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        // The one that was being made when it died.
        if self.version + answered < to {
            self.told(self.version + answered, "failed");
        }
        self.version = to;
    }

    /// Keeps the states that go with what was said of a change.
    fn told(&mut self, version: u64, said: &str) {
        let change = Change::nth(self.seed, version);
        let mut next = BTreeSet::new();
        for state in std::mem::take(&mut self.states) {
            match (change.after(&state, version), said) {
                (Some(after), "ok") => next.extend([after]),
                (None, "refused" | "failed") => next.extend([state]),
                (Some(after), "failed") => next.extend([state, after]),
                _ => {}
            }
        }
        assert!(!next.is_empty(), "seed {}: {said} to {change:?} goes with no state", self.seed);
        self.states = next;
    }

    /// Opens the store: its state is one of those that may be, and every key opens.
    async fn check(&mut self, what: &str) {
        let Opened { store, keys, .. } = Store::open(self.dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(store.recovery().is_none_or(|recovery| recovery.complete), "{what}: {:?}", store.recovery());
        let mut state = State::default();
        for key in keys {
            let number = (0..KEYS).find(|&n| *blob(n) == *key.metadata().blob).unwrap();
            let secret = master().open_key(&key).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(secret.iter().all(|&byte| byte == key.metadata().created as u8), "{what}");
            state.keys.insert(number, key.metadata().created);
        }
        for slot in store.slots().await.unwrap() {
            assert_eq!(slot.open(&[5; 32]).unwrap().bytes(), master().bytes(), "{what}");
            state.slots.insert(slot.number().into(), slot.created());
        }
        store.close().await;
        assert!(self.states.contains(&state), "{what}: {state:#?} is none of {:#?}", self.states);
        self.states = [state].into();
    }
}

#[test]
fn what_was_acknowledged_is_there_whatever_happens() {
    if let Ok(order) = env::var(CHILD) {
        return change_until_done(&order);
    }
    let seed = env::var("STORE_SEED").ok().map_or(1, |seed| seed.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let mut world = World::new(seed).await;
        let mut uncertain = 0;
        for round in 0..rounds() {
            let kind = ["kill", "tear", "power", "eio", "full", "outside"][round as usize % 6];
            world.round(kind, round * 1_000_003);
            uncertain += usize::from(world.states.len() > 1);
            world.check(&format!("seed {seed}, round {round}, {kind}")).await;
        }
        println!("{} rounds, {} changes, {uncertain} of unknown outcome", rounds(), world.version);
        assert!(uncertain > 0, "nothing ever failed");
    });
}
