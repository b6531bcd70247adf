//! Random damage to the state file and its second copy: bits, pages, cut and grown ends, a file that is gone. Each round
//! has a seed; `STORE_ROUNDS=5000` does more of them.

use std::{collections::BTreeMap, time::Instant};

use super::*;

/// Longer than any round may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

fn rounds() -> u64 {
    env::var("STORE_ROUNDS").ok().map_or(60, |rounds| rounds.parse().unwrap())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Both files, and what is in them.
struct Pair {
    main: Vec<u8>,
    copy: Vec<u8>,
    keys: BTreeMap<KeyId, SealedKey>,
    slots: Vec<KeySlot>,
    removed: KeyId,
}

fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        thread::scope(|scope| scope.spawn(|| runtime.block_on(fill())).join().unwrap())
    })
}

/// Some in the snapshot, some changed and some removed after it, of all sizes.
async fn fill() -> Pair {
    let place = Place::new();
    let master = MasterKey::generate().unwrap();
    let key = |n: usize, long: usize| {
        let metadata =
            Metadata { blob: n.to_be_bytes().into(), comment: vec![b'c'; n * 7].into(), ..Metadata::default() };
        master.seal_key(metadata, &vec![7; 32 + long]).unwrap()
    };
    let store = place.open_all().store;
    let (slot, _) = KeySlot::recovery(0, "paper", 1, &master).unwrap();
    store.initialise(vec![slot]).await.unwrap();
    store.remember("hsm", "pkcs11", scan([1, 2, 3], true), 100).await.unwrap();
    store.begin("0815", &pin("1111"), false).await.unwrap().refused().await.unwrap();
    drop(store.begin("0815", &pin("3333"), false).await.unwrap());
    let mut keys: Vec<_> = (0..100).map(|n| key(n, if n % 20 == 3 { 9000 } else { 0 })).collect();
    store.replace_keys(Vec::new(), keys.clone()).await.unwrap();
    store.close().await;

    // With what there is so far in its snapshot.
    fs::remove_file(place.copy()).unwrap();
    let store = place.open_all().store;
    let second = KeySlot::key_file(1, "boot", 1, &master, Path::new("/etc/key"), &[1; 32]).unwrap();
    store.add_slot(second).await.unwrap();
    let removed = keys.remove(50).id();
    store.remove_key(removed).await.unwrap();
    for n in 100..120 {
        keys.push(key(n, 0));
        store.put_key(keys.last().unwrap().clone()).await.unwrap();
    }
    keys[5] = master.reseal_key(&keys[5], Metadata { enabled: true, ..keys[5].metadata().clone() }).unwrap();
    store.put_key(keys[5].clone()).await.unwrap();
    let slots = store.slots().await.unwrap();
    store.close().await;
    Pair {
        main: fs::read(place.file()).unwrap(),
        copy: fs::read(place.copy()).unwrap(),
        keys: keys.into_iter().map(|key| (key.id(), key)).collect(),
        slots,
        removed,
    }
}

/// Damages a file; `None`: it is gone. Always something is changed.
fn damaged(bytes: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let mut out = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(out.len().max(1));
        match random.below(12) {
            0 => return None,
            1 => out.truncate(at),
            2 => out.resize(out.len() + 1 + random.below(9000), 0),
            3..6 => {
                let (from, with) = (at / 4096 * 4096, random.below(256) as u8);
                let to = out.len().min(from + 4096);
                out[from..to].fill(with);
            }
            6 => {
                let to = out.len().min(at + 512);
                out[at..to].iter_mut().for_each(|byte| *byte = random.below(256) as u8);
            }
            _ if out.is_empty() => {}
            _ => out[at] ^= 1 << random.below(8),
        }
    }
    if out == bytes {
        out.pop();
    }
    Some(out)
}

fn place_of(main: Option<&[u8]>, copy: Option<&[u8]>) -> Place {
    let place = Place::holding(main.unwrap_or_default());
    if main.is_none() {
        fs::remove_file(place.file()).unwrap();
    }
    if let Some(copy) = copy {
        fs::write(place.copy(), copy).unwrap();
        fs::set_permissions(place.copy(), Permissions::from_mode(0o600)).unwrap();
    }
    place
}

/// What is there, when it opens: everything, or each that is there as it was written.
fn checked(place: &Place, seed: u64, everything: bool) -> Result<Option<Recovery>, StoreError> {
    let pair = pair();
    let started = Instant::now();
    let opened = StateFile::open(&place.directory());
    assert!(started.elapsed() < PATIENCE, "seed {seed}: it took {:?}", started.elapsed());
    let (_, contents, recovery) = opened?;
    let lossy = recovery.as_ref().is_some_and(|recovery| !recovery.complete);
    for key in contents.keys.iter().filter(|key| !lossy || key.id() != pair.removed) {
        let written = pair.keys.get(&key.id());
        // Of one that was changed the older form may be all that there is.
        let older = lossy && written.is_some_and(|written| written.metadata().enabled);
        assert!(written == Some(key) || older, "seed {seed}: {:?}", key.id());
    }
    for slot in &contents.slots {
        assert!(pair.slots.contains(slot), "seed {seed}");
    }
    if everything {
        assert_eq!(contents.keys.len(), pair.keys.len(), "seed {seed}: {recovery:?}");
        assert_eq!(contents.slots, pair.slots, "seed {seed}: {recovery:?}");
        assert_eq!(contents.devices, [hsm([1, 2, 3], 100, 100)], "seed {seed}");
        assert_eq!((contents.marks.len(), contents.held), (2, None), "seed {seed}");
    } else {
        assert!(lossy || contents.keys.len() == pair.keys.len(), "seed {seed}: keys are missing and nobody says so");
        assert_eq!(contents.held.is_some(), lossy, "seed {seed}");
    }
    Ok(recovery)
}

#[test]
fn damage_to_one_of_the_two_files_costs_nothing() {
    let pair = pair();
    for seed in 0..rounds() {
        let random = &mut Random(seed);
        let (main, copy);
        if random.below(3) == 0 {
            (main, copy) = (Some(pair.main.clone()), damaged(&pair.copy, random));
        } else {
            (main, copy) = (damaged(&pair.main, random), Some(pair.copy.clone()));
        }
        let place = place_of(main.as_deref(), copy.as_deref());
        let recovery = checked(&place, seed, true).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        for moved in recovery.iter().flat_map(|recovery| &recovery.moved) {
            let is = fs::read(moved).unwrap();
            assert!(Some(&is) == main.as_ref() || Some(&is) == copy.as_ref(), "seed {seed}: {moved:?}");
        }
        assert_eq!(checked(&place, seed, true).unwrap(), None, "seed {seed}: it is mended once and for all");
    }
}

#[test]
fn of_two_damaged_files_what_can_be_read_comes_back() {
    let pair = pair();
    let (mut opened, mut whole, mut keys, mut removed) = (0, 0, 0, 0);
    for seed in 0..rounds() {
        let random = &mut Random(!seed);
        let (main, copy) = (damaged(&pair.main, random), damaged(&pair.copy, random));
        if main.is_none() && copy.is_none() {
            // That is a new store.
            continue;
        }
        let place = place_of(main.as_deref(), copy.as_deref());
        match checked(&place, seed, false) {
            Ok(recovery) => {
                opened += 1;
                let contents = StateFile::open(&place.directory()).unwrap().1;
                let back = contents.keys.iter().filter(|key| pair.keys.get(&key.id()) == Some(key)).count();
                keys += back;
                whole += usize::from(back == pair.keys.len());
                removed += usize::from(contents.keys.iter().any(|key| key.id() == pair.removed));
                for moved in recovery.iter().flat_map(|recovery| &recovery.moved) {
                    assert!(moved.exists(), "seed {seed}");
                }
            }
            Err(error) => assert!(matches!(error, StoreError::Damaged { .. }), "seed {seed}: {error}"),
        }
    }
    writeln!(
        io::stdout(),
        "{} rounds: {opened} opened, {whole} with every key, {:.2} % of the keys of those that opened; {removed} times a \
         removed one came back",
        rounds(),
        100.0 * keys as f64 / (opened * pair.keys.len()).max(1) as f64,
    )
    .unwrap();
    assert!(opened as u64 * 10 >= rounds() * 9, "{opened} of {}", rounds());
}

#[test]
fn what_was_lost_is_named_and_pins_are_held() {
    let pair = pair();
    let at = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|window| window == what).unwrap();
    // The same key is damaged in both: its ciphertext, behind its name.
    let (id, key) = pair.keys.iter().find(|(_, key)| key.metadata().comment.len() == 7 * 110).unwrap();
    let (mut main, mut copy) = (pair.main.clone(), pair.copy.clone());
    let places: Vec<_> = [&mut main, &mut copy].into_iter().map(|bytes| (at(bytes, &key.ciphertext), bytes)).collect();
    for (at, bytes) in places {
        bytes[at] ^= 1;
    }
    let place = place_of(Some(&main), Some(&copy));
    let opened = place.open_all();
    let recovery = opened.store.recovery().unwrap().clone();
    assert_eq!(opened.keys.len(), pair.keys.len() - 1);
    assert_eq!((recovery.complete, recovery.lost.len()), (false, 1), "{recovery}");
    assert!(recovery.to_string().contains(&id.to_string()), "{recovery}");
    assert_eq!(recovery.moved.len(), 2, "{recovery}");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = opened.store;
        assert!(matches!(store.begin("4711", &pin("1"), false).await, Err(MarkError::Pending)));
        store.begin("4711", &pin("1"), true).await.unwrap().accepted().await.unwrap();
        store.forget_pins("4711").await.unwrap();
        store.close().await;
        let opened = place.open_all();
        assert_eq!(opened.store.recovery(), None);
        opened.store.begin("4711", &pin("1"), false).await.unwrap().accepted().await.unwrap();
        assert!(matches!(opened.store.begin("0", &pin("1"), false).await, Err(MarkError::Pending)));
    });
}

#[test]
fn the_copy_of_another_store_is_not_believed() {
    let other = Place::new();
    drop(StateFile::open(&other.directory()).unwrap());
    let place = place_of(Some(&pair().main), Some(&fs::read(other.copy()).unwrap()));
    let recovery = checked(&place, 0, true).unwrap().unwrap();
    assert_eq!(recovery.moved.len(), 1, "{recovery}");
    assert_eq!(fs::read(&recovery.moved[0]).unwrap(), fs::read(other.copy()).unwrap());
}
