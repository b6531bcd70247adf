//! How fast the store opens with ten thousand keys, and what a change costs then.
//!
//! `cargo bench --bench store [-- KEYS]`. Fails when opening takes longer than half a second, or a key in memory more than
//! 2 KiB.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs)]

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use strongroom::vault::store::{KeySlot, MasterKey, Metadata, Opened, SealedKey, Store};

const KEYS: usize = 10_000;
const OPENINGS: usize = 9;
const CHANGES: usize = 200;
const MAX_OPENING: Duration = Duration::from_millis(500);
const MAX_KEY: u64 = 2048;

/// As an Ed25519 key has it.
fn key(master: &MasterKey, n: usize) -> SealedKey {
    let mut blob = b"\0\0\0\x0bssh-ed25519\0\0\0\x20".to_vec();
    blob.extend_from_slice(&[0; 24]);
    blob.extend_from_slice(&n.to_be_bytes());
    let metadata = Metadata {
        blob: blob.into(),
        name: format!("key {n}").into(),
        comment: (*b"somebody@somewhere.example").into(),
        enabled: true,
        ..Metadata::default()
    };
    master.seal_key(metadata, &[7; 32]).unwrap()
}

fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let count = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(KEYS);
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("state");
    let master = MasterKey::generate().unwrap();
    let store = Store::open(&directory).unwrap().store;
    let slot = KeySlot::key_file(0, "", 0, &master, Path::new("/key"), &[1; 32]).unwrap();
    store.initialise(vec![slot]).await.unwrap();
    let began = Instant::now();
    for from in (0..count).step_by(1000) {
        let keys = (from..count.min(from + 1000)).map(|n| key(&master, n)).collect();
        store.replace_keys(Vec::new(), keys).await.unwrap();
    }
    println!("{count} keys kept in {:?}", began.elapsed());
    store.close().await;
    drop(store);
    let length = |name: &str| fs::metadata(directory.join(name)).unwrap().len() / 1024;
    println!("state.redb {} KiB, state.copy {} KiB", length("state.redb"), length("state.copy"));

    let mut openings = Vec::new();
    for _ in 0..OPENINGS {
        let began = Instant::now();
        let Opened { store, keys, .. } = Store::open(&directory).unwrap();
        openings.push(began.elapsed());
        assert!(keys.len() == count && store.recovery().is_none());
        store.close().await;
    }
    openings.sort();
    let opening = openings[OPENINGS / 2];
    println!("opened in {opening:?} ({:?} to {:?})", openings[0], openings[OPENINGS - 1]);

    let before = resident();
    let Opened { store, keys, .. } = Store::open(&directory).unwrap();
    // Copies in memory that was never used before: what they take shows.
    let copies: Vec<_> = (0..8).map(|_| keys.clone()).collect();
    let held = resident();
    let more: Vec<_> = copies.clone();
    let one_key = resident().saturating_sub(held) / (more.len() * count) as u64;
    println!(
        "resident {} KiB before, {} KiB with all open; a key takes {one_key} bytes",
        before / 1024,
        resident() / 1024
    );

    let began = Instant::now();
    for n in 0..CHANGES {
        store.put_key(key(&master, n)).await.unwrap();
    }
    println!("a change is kept in {:?}", began.elapsed() / CHANGES as u32);
    let began = Instant::now();
    for key in &keys {
        assert_eq!(master.open_key(key).unwrap().len(), 32);
    }
    println!("a key opens in {:?}", began.elapsed() / count as u32);
    store.close().await;
    if opening > MAX_OPENING || one_key > MAX_KEY { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
