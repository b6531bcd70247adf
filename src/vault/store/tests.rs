//! The store as the vault uses it: what survives, who is kept out, what damage does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod damage;

use std::{
    env,
    fs::{self, Permissions},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
};

use redb::{Database, ReadableTable, TableDefinition};
use secrecy::SecretString;
use tempfile::TempDir;

use super::{
    envelope::{Envelope, Table, name, part_name},
    *,
};
use crate::{
    devices::{DecryptScheme, DeriveScheme, Hash, MAX_BLOB, MAX_KEYS, Scheme, Slot, Status},
    vault::seal::Cost,
};

fn key(n: usize) -> FoundKey {
    FoundKey {
        slot: Slot(n.to_be_bytes().into()),
        blob: format!("public key {n}").into_bytes().into(),
        certificates: vec![(*b"certificate").into()],
        label: format!("key {n}"),
        schemes: vec![Scheme::RsaPss(Hash::Sha256), Scheme::RsaPkcs1v15(Hash::Sha512)],
        decrypts: vec![DecryptScheme::RsaOaep(Hash::Sha1)],
        derives: vec![DeriveScheme::Ecdh],
        touch: n.is_multiple_of(2),
        ssh: true,
        note: String::new(),
    }
}

fn scan(keys: impl IntoIterator<Item = usize>, complete: bool) -> Arc<Scan> {
    let status = Status { serial: "0815".to_owned(), ..Status::default() };
    Arc::new(Scan { keys: keys.into_iter().map(key).collect(), complete, status, ..Scan::default() })
}

fn hsm(keys: impl IntoIterator<Item = usize>, first_seen: u64, last_seen: u64) -> KnownDevice {
    KnownDevice {
        name: "hsm".to_owned(),
        kind: "pkcs11".to_owned(),
        serial: "0815".to_owned(),
        first_seen,
        last_seen,
        keys: keys.into_iter().map(key).collect(),
    }
}

fn pin(text: &str) -> SecretString {
    SecretString::from(text)
}

/// A directory whose `state` is the store's.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::with_prefix("strongroom-test-").unwrap())
    }

    /// With this state file.
    fn holding(bytes: &[u8]) -> Self {
        let place = Self::new();
        fs::create_dir(place.directory()).unwrap();
        fs::set_permissions(place.directory(), Permissions::from_mode(0o700)).unwrap();
        fs::write(place.file(), bytes).unwrap();
        fs::set_permissions(place.file(), Permissions::from_mode(0o600)).unwrap();
        place
    }

    fn directory(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn file(&self) -> PathBuf {
        self.directory().join("state.redb")
    }

    fn copy(&self) -> PathBuf {
        self.directory().join("state.copy")
    }

    #[track_caller]
    fn open(&self) -> (Store, Vec<KnownDevice>) {
        let opened = self.open_all();
        (opened.store, opened.devices)
    }

    #[track_caller]
    fn open_all(&self) -> Opened {
        Store::open(&self.directory()).unwrap()
    }

    fn error(&self) -> StoreError {
        Store::open(&self.directory()).err().expect("the store must not open")
    }
}

#[tokio::test]
async fn what_was_kept_is_there_after_a_restart() {
    let place = Place::new();
    let (store, known) = place.open();
    assert_eq!(known, []);
    store.remember("hsm", "pkcs11", scan([1, 2], true), 100).await.unwrap();
    store.begin("0815", &pin("1111"), false).await.unwrap().refused().await.unwrap();
    store.begin("0815", &pin("2222"), false).await.unwrap().accepted().await.unwrap();
    drop(store.begin("0815", &pin("3333"), false).await.unwrap());
    store.close().await;
    assert!(matches!(store.forget_pins("0815").await, Err(StoreError::Closed)));

    let (store, known) = place.open();
    assert_eq!(known, [hsm([1, 2], 100, 100)]);
    assert!(matches!(store.begin("0815", &pin("1111"), false).await, Err(MarkError::Refused)));
    assert!(matches!(store.begin("0815", &pin("3333"), false).await, Err(MarkError::Pending)));
    assert!(store.begin("4711", &pin("1111"), false).await.is_ok(), "another token's PIN is another PIN");
    store.begin("0815", &pin("2222"), false).await.unwrap().accepted().await.unwrap();
    store.forget_pins("0815").await.unwrap();
    store.close().await;

    let (store, _) = place.open();
    store.begin("0815", &pin("1111"), false).await.unwrap().accepted().await.unwrap();
    store.begin("0815", &pin("3333"), false).await.unwrap().accepted().await.unwrap();
    assert!(
        matches!(store.begin("4711", &pin("1111"), false).await, Err(MarkError::Pending)),
        "only one token was forgiven"
    );
}

#[tokio::test]
async fn in_memory_the_marks_are_the_same() {
    let store = Store::in_memory().unwrap();
    store.remember("hsm", "pkcs11", scan([1], true), 0).await.unwrap();
    drop(store.begin("", &pin("1111"), false).await.unwrap());
    assert!(matches!(store.begin("", &pin("1111"), false).await, Err(MarkError::Pending)));
    store.begin("", &pin("2222"), false).await.unwrap().refused().await.unwrap();
    assert!(matches!(store.begin("", &pin("2222"), false).await, Err(MarkError::Refused)));
    store.forget_pins("").await.unwrap();
    store.begin("", &pin("1111"), false).await.unwrap().accepted().await.unwrap();
    store.begin("", &pin("1111"), false).await.unwrap().accepted().await.unwrap();
}

#[tokio::test]
async fn a_scan_replaces_what_it_saw_all_of_and_adds_otherwise() {
    let place = Place::new();
    let mut expected = Vec::new();
    for (now, keys, complete, left) in [
        (100, vec![1, 2, 3], true, vec![1, 2, 3]),
        (200, vec![4], false, vec![1, 2, 3, 4]),
        // Only the time changed, and not by much: not worth a write.
        (300, vec![1], false, vec![1, 2, 3, 4]),
        (400, vec![2, 5], true, vec![2, 5]),
        (4_001, vec![2, 5], true, vec![2, 5]),
    ] {
        let (store, known) = place.open();
        assert_eq!(known, expected, "before {now}");
        store.remember("hsm", "pkcs11", scan(keys, complete), now).await.unwrap();
        // A name that begins with the other, next to it in the table.
        store.remember("hsm2", "pkcs11", scan([9], true), 100).await.unwrap();
        store.close().await;
        let last_seen = if now == 300 { 200 } else { now };
        expected = vec![hsm(left, 100, last_seen), KnownDevice { name: "hsm2".into(), ..hsm([9], 100, 100) }];
    }
    let (store, known) = place.open();
    assert_eq!(known[0].last_seen, 4_001);
    store.forget_device("hsm").await.unwrap();
    store.close().await;
    let (_, known) = place.open();
    assert_eq!(known, [expected.remove(1)]);
}

#[tokio::test]
async fn what_exceeds_a_bound_is_left_out() {
    let place = Place::new();
    let (store, _) = place.open();
    let mut found = Scan::clone(&scan([1, 2], true));
    found.keys[0].blob = vec![0; MAX_BLOB + 1].into();
    store.remember("hsm", "pkcs11", Arc::new(found), 100).await.unwrap();
    store.remember("full", "pkcs11", scan(0..MAX_KEYS, true), 100).await.unwrap();
    store.remember("full", "pkcs11", scan([MAX_KEYS], false), 100).await.unwrap();
    store.close().await;
    let (_, known) = place.open();
    assert_eq!(known[1], hsm([2], 100, 100));
    assert_eq!(known[0].keys.len(), MAX_KEYS);
}

#[test]
fn the_directory_and_the_file_are_the_owners_alone() {
    let place = Place::new();
    let deep = place.directory().join("a b/strongroom");
    drop(Store::open(&deep).unwrap());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&deep), mode(&deep.join("state.redb"))), (0o700, 0o600));
    let mut names: Vec<_> = fs::read_dir(&deep).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["state.copy", "state.redb"]);

    let mended = |path: &Path, bad: u32, good: u32| {
        fs::set_permissions(path, Permissions::from_mode(bad)).unwrap();
        let error = loop {
            match Store::open(&deep) {
                // The thread that had it open ends a moment after the last handle.
                Err(StoreError::InUse { .. }) => thread::yield_now(),
                opened => break opened.err().unwrap(),
            }
        };
        let StoreError::Exposed { command, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(command), "{error}");
        assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
        assert_eq!(mode(path), good);
    };
    mended(&deep, 0o750, 0o700);
    mended(&deep.join("state.redb"), 0o604, 0o600);
    mended(&deep.join("state.copy"), 0o640, 0o600);
    in_use_until_closed(&deep);
}

/// The thread that has it open ends a moment after the last handle.
fn in_use_until_closed(directory: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while let Err(error) = Store::open(directory) {
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        assert!(std::time::Instant::now() < deadline);
        thread::yield_now();
    }
}

#[test]
fn what_belongs_to_another_is_refused() {
    let place = Place::holding(valid());
    if !rustix::process::geteuid().is_root() {
        // The root directory is somebody else's.
        let error = Store::open(Path::new("/")).err().unwrap();
        assert!(matches!(error, StoreError::Owner { uid: 0, .. }), "{error}");
        return;
    }
    std::os::unix::fs::chown(place.file(), Some(1), None).unwrap();
    let error = place.error();
    let StoreError::Owner { uid: 1, command, .. } = &error else { panic!("{error}") };
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
    place.open();
}

#[test]
fn what_is_no_state_file_is_refused_and_left_alone() {
    for bytes in [&b""[..], b"precious", &[0; 4096], &valid()[..4096]] {
        let place = Place::holding(bytes);
        let error = place.error();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("mv "), "{error}");
        assert_eq!(fs::read(place.file()).unwrap(), bytes);
    }
    let place = Place::holding(b"");
    fs::remove_file(place.file()).unwrap();
    symlink("/dev/null", place.file()).unwrap();
    assert!(matches!(place.error(), StoreError::Damaged { .. }));

    // A database of another program's.
    fs::remove_file(place.file()).unwrap();
    drop(Database::create(place.file()).unwrap());
    fs::set_permissions(place.file(), Permissions::from_mode(0o600)).unwrap();
    let error = place.error();
    assert!(error.to_string().contains("no schema version"), "{error}");
}

const META: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("meta");
const RECORDS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

/// Changes a closed file without the store.
fn tamper(place: &Place, change: impl FnOnce(&redb::WriteTransaction)) {
    let database = Database::open(place.file()).unwrap();
    let transaction = database.begin_write().unwrap();
    change(&transaction);
    transaction.commit().unwrap();
}

#[test]
fn a_file_from_the_future_is_refused_unchanged() {
    let place = Place::holding(valid());
    tamper(&place, |t| {
        t.open_table(META).unwrap().insert(&b"schema-version"[..], &[0, 0, 0, 3][..]).unwrap();
    });
    let before = fs::read(place.file()).unwrap();
    let error = place.error();
    assert!(matches!(error, StoreError::Newer { version: 3, known: 2, .. }), "{error}");
    assert!(fs::read(place.file()).unwrap() == before);
}

#[tokio::test]
async fn a_record_that_does_not_parse_costs_itself_only() {
    let place = Place::holding(valid());
    tamper(&place, |t| {
        let mut records = t.open_table(RECORDS).unwrap();
        let mut put = |name: &[u8], value: &[u8]| {
            let mut bytes = Vec::new();
            Envelope { sequence: 1, name, value: Some(value) }.encode(&mut bytes);
            records.insert(name, &bytes[..]).unwrap();
        };
        put(&part_name(Table::Place, "hsm", &2usize.to_be_bytes()), b"\x01nonsense");
        put(&part_name(Table::Place, "unknown", b"slot"), b"\x01");
        put(&name(Table::Key, &[7; 32]), b"\x01");
        put(&name(Table::Slot, &[0; 4]), b"\x01");
        let held = records.iter().unwrap().map(|entry| entry.unwrap().0.value().to_vec());
        let marks: Vec<_> = held.filter(|name| name[0] == Table::Mark as u8).collect();
        assert_eq!(marks.len(), 2);
        for mark in marks {
            let mut bytes = Vec::new();
            Envelope { sequence: 1, name: &mark, value: Some(b"\x01\xff") }.encode(&mut bytes);
            records.insert(&*mark, &bytes[..]).unwrap();
        }
    });
    let (store, known) = place.open();
    assert_eq!(known, [hsm([1, 3], 100, 100)]);
    // Whatever the mark said, it was there.
    assert!(matches!(store.begin("0815", &pin("3333"), false).await, Err(MarkError::Refused)));
}

#[tokio::test]
async fn a_file_of_schema_version_1_opens() {
    let place = Place::holding(include_bytes!("../../../tests/fixtures/state/v1.redb"));
    let (store, known) = place.open();
    assert_eq!(known, [hsm([1, 2, 3], 100, 100)]);
    assert!(matches!(store.begin("0815", &pin("1111"), false).await, Err(MarkError::Refused)));
    assert!(matches!(store.begin("0815", &pin("3333"), false).await, Err(MarkError::Pending)));
    assert!(store.begin("0815", &pin("2222"), false).await.is_ok());
}

fn passphrase(number: u32, master: &MasterKey, words: &str) -> KeySlot {
    let cost = Cost::bounded(64 * 1024, 1).unwrap();
    KeySlot::passphrase(number, "mine", 100, master, &SecretString::from(words), cost).unwrap()
}

fn sealed(n: usize, master: &MasterKey) -> SealedKey {
    let metadata = Metadata {
        blob: format!("public key {n}").into_bytes().into(),
        name: format!("key {n}").into(),
        ..Metadata::default()
    };
    master.seal_key(metadata, format!("secret {n}").as_bytes()).unwrap()
}

fn by_id(keys: impl IntoIterator<Item = SealedKey>) -> Vec<SealedKey> {
    let mut keys: Vec<_> = keys.into_iter().collect();
    keys.sort_by_key(SealedKey::id);
    keys
}

#[tokio::test]
async fn slots_and_sealed_keys_are_there_after_a_restart() {
    let place = Place::new();
    let Opened { store, keys, .. } = place.open_all();
    assert!(keys.is_empty() && !store.is_initialised());
    let master = MasterKey::generate().unwrap();
    let all: Vec<_> = (0..4).map(|n| sealed(n, &master)).collect();
    assert!(matches!(store.put_key(all[0].clone()).await, Err(StoreError::NotInitialised)));
    assert!(matches!(store.initialise(Vec::new()).await, Err(StoreError::TooMany { .. })));
    let (recovery, _) = KeySlot::recovery(1, "paper", 100, &master).unwrap();
    store.initialise(vec![recovery.clone(), passphrase(0, &master, "one")]).await.unwrap();
    let again = store.initialise(vec![recovery.clone()]).await;
    assert!(store.is_initialised() && matches!(again, Err(StoreError::AlreadyInitialised)));
    store.replace_keys(Vec::new(), all[..3].to_vec()).await.unwrap();
    store.replace_keys(vec![all[0].id(), all[3].id()], vec![all[3].clone()]).await.unwrap();
    store.remove_key(all[1].id()).await.unwrap();
    let relabelled = master.reseal_key(&all[2], Metadata { enabled: true, ..all[2].metadata().clone() }).unwrap();
    store.put_key(relabelled.clone()).await.unwrap();
    store.close().await;

    let Opened { store, keys, .. } = place.open_all();
    assert!(store.is_initialised());
    assert_eq!(keys, by_id([relabelled, all[3].clone()]));
    let slots = store.slots().await.unwrap();
    assert_eq!(slots.iter().map(KeySlot::number).collect::<Vec<_>>(), [0, 1]);
    let opened = slots[0].open(b"one").unwrap();
    assert_eq!(**opened.open_key(&keys[0]).unwrap(), **master.open_key(&keys[0]).unwrap());

    assert!(matches!(store.add_slot(recovery.clone()).await, Err(StoreError::SlotTaken { number: 1 })));
    assert!(matches!(store.replace_slot(passphrase(7, &master, "x")).await, Err(StoreError::NoSuchSlot { number: 7 })));
    assert!(matches!(store.remove_slot(7).await, Err(StoreError::NoSuchSlot { number: 7 })));
    store.replace_slot(passphrase(0, &master, "two")).await.unwrap();
    store.add_slot(passphrase(3, &master, "three")).await.unwrap();
    store.remove_slot(1).await.unwrap();
    store.remove_slot(3).await.unwrap();
    assert!(matches!(store.remove_slot(0).await, Err(StoreError::LastSlot { number: 0 })));
    store.close().await;

    let Opened { store, .. } = place.open_all();
    let slots = store.slots().await.unwrap();
    assert_eq!(slots.len(), 1);
    assert!(matches!(slots[0].open(b"one"), Err(SlotError::Wrong)));
    assert_eq!(slots[0].open(b"two").unwrap().bytes(), master.bytes());
}

#[tokio::test]
async fn no_store_is_begun_in_memory() {
    let store = Store::in_memory().unwrap();
    let (slot, _) = KeySlot::recovery(0, "", 0, &MasterKey::generate().unwrap()).unwrap();
    assert!(matches!(store.initialise(vec![slot]).await, Err(StoreError::NotDurable)));
    assert!(!store.is_initialised());
}

/// A file with three keys on one device, a refused PIN and a pending one.
fn valid() -> &'static [u8] {
    static VALID: OnceLock<Vec<u8>> = OnceLock::new();
    VALID.get_or_init(|| {
        let place = Place::new();
        let (store, _) = place.open();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // From a test that has a runtime of its own, too.
        let fill = async {
            store.remember("hsm", "pkcs11", scan([1, 2, 3], true), 100).await.unwrap();
            store.begin("0815", &pin("1111"), false).await.unwrap().refused().await.unwrap();
            drop(store.begin("0815", &pin("3333"), false).await.unwrap());
            store.begin("0815", &pin("2222"), false).await.unwrap().accepted().await.unwrap();
            store.close().await;
        };
        thread::scope(|scope| scope.spawn(|| runtime.block_on(fill)).join().unwrap());
        fs::read(place.file()).unwrap()
    })
}

/// Set for the process that the next test kills: the directory it works in.
const CHILD: &str = "STRONGROOM_TEST_STATE";

#[test]
fn what_was_acknowledged_survives_kill_9_and_two_processes_share_nothing() {
    if let Some(directory) = env::var_os(CHILD) {
        return work_until_killed(Path::new(&directory));
    }
    let place = Place::new();
    let (_, module) = module_path!().split_once("::").unwrap();
    let name = format!("{module}::what_was_acknowledged_survives_kill_9_and_two_processes_share_nothing");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut acknowledged = 0;
    for lines in [1, 2, 4] {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture"])
            .env(CHILD, place.directory())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        for _ in 0..lines {
            let line = output.find(|line| line.starts_with("kept ")).expect("the child works");
            assert_eq!(line, format!("kept {acknowledged}"));
            acknowledged += 1;
        }
        assert!(matches!(place.error(), StoreError::InUse { .. }));
        child.kill().unwrap();
        child.wait().unwrap();
        // It may have kept more than it could tell.
        acknowledged += output.filter(|line| line.starts_with("kept ")).count();

        let (store, known) = place.open();
        assert!(known.len() >= acknowledged, "{} of {acknowledged}", known.len());
        runtime.block_on(async {
            for n in 0..acknowledged {
                assert!(
                    matches!(store.begin("0815", &pin(&n.to_string()), false).await, Err(MarkError::Pending)),
                    "{n}"
                );
            }
            for n in acknowledged..known.len() {
                let _ = store.forget_device(&format!("device {n}")).await;
            }
            // What was begun and not told starts again.
            store.forget_pins("0815").await.unwrap();
            for n in 0..acknowledged {
                drop(store.begin("0815", &pin(&n.to_string()), false).await.unwrap());
            }
            store.close().await;
        });
    }
}

/// Marks PINs and remembers devices, and tells of each when it is kept.
fn work_until_killed(directory: &Path) {
    let Opened { store, devices: known, .. } = Store::open(directory).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    // Ends with the test that started it.
    thread::spawn(|| {
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    runtime.block_on(async {
        for n in known.len().. {
            store.remember(&format!("device {n}"), "pkcs11", scan([n], true), 100).await.unwrap();
            drop(store.begin("0815", &pin(&n.to_string()), false).await.unwrap());
            writeln!(io::stdout(), "kept {n}").unwrap();
        }
    });
}
