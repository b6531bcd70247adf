//! The audit log on a disk: what is written, what a restart makes of it, what `verify` finds.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use proptest::{prelude::*, sample::Index};
use tempfile::TempDir;

use super::{
    verify::{Fault, FaultKind, Report, verify},
    writer::KeepHead,
    *,
};
use crate::vault::store::StoreError;

/// A state file of which only the head counts.
#[derive(Clone, Default)]
struct State(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    heads: Vec<Head>,
    is_full: bool,
}

impl KeepHead for State {
    fn keep(&mut self, head: &Head) -> Result<(), StoreError> {
        let mut kept = self.0.lock().unwrap();
        if kept.is_full {
            return Err(StoreError::NoRandom);
        }
        kept.heads.push(head.clone());
        Ok(())
    }
}

/// A log in a directory of its own.
struct Place {
    dir: TempDir,
    state: State,
    max_size: u64,
    on_full: OnFull,
}

impl Place {
    fn new(max_size: u64) -> Self {
        let dir = TempDir::with_prefix("strongroom-test-").unwrap();
        Self { dir, state: State::default(), max_size, on_full: OnFull::Warn }
    }

    fn directory(&self) -> PathBuf {
        self.dir.path().join("audit")
    }

    fn head(&self) -> Option<Head> {
        self.state.0.lock().unwrap().heads.last().cloned()
    }

    fn set_full(&self, is_full: bool) {
        self.state.0.lock().unwrap().is_full = is_full;
    }

    fn start(&self) -> Audit {
        self.start_with(self.head())
    }

    fn start_with(&self, head: Option<Head>) -> Audit {
        let settings = Settings { directory: self.directory(), max_size: self.max_size, on_full: self.on_full };
        Audit(Some(Writer::start(&settings, head, self.state.clone()).unwrap()))
    }

    fn verify(&self) -> Report {
        verify(&self.directory(), self.head().as_ref(), &[]).unwrap()
    }

    fn path(&self, number: u64) -> PathBuf {
        path_of(&self.directory(), number)
    }

    fn size(&self) -> u64 {
        fs::read_dir(self.directory()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }
}

/// Writes lines and has each group of them on the disk.
fn write(audit: &Audit, groups: &[usize]) {
    for lines in groups {
        for _ in 0..*lines {
            audit.note(&Caller::default(), "sign").end(Ok(())).unwrap();
        }
        wait(audit.flushed());
    }
}

/// Ends the log as a daemon does.
fn close(audit: Audit) {
    wait(audit.close());
}

fn wait<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
}

fn places(report: &Report) -> Vec<(&Path, u64)> {
    report.faults.iter().map(|fault| (fault.file.as_path(), fault.line)).collect()
}

#[test]
fn the_chain_goes_on_after_a_restart() {
    let place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    write(&audit, &[3, 2]);
    close(audit);
    let first = place.head().unwrap();
    assert_eq!((first.last.seq, first.file), (6, 1), "five lines and the end");
    let audit = place.start();
    write(&audit, &[1]);
    let report = place.verify();
    assert_eq!((report.faults, report.lines, report.first, report.files), (vec![], 7, 1, 1));
    assert_eq!(report.last, place.head().unwrap().last);
    assert_eq!(wait(audit.flushed_head()), place.head());
    close(audit);
}

#[test]
fn a_chain_that_was_made_anew_does_not_hold_what_was_known() {
    let (place, other) = (Place::new(DEFAULT_SIZE), Place::new(DEFAULT_SIZE));
    let audit = place.start();
    write(&audit, &[5]);
    let known = place.head().unwrap().last;
    write(&audit, &[5]);
    close(audit);
    assert_eq!(verify(&place.directory(), None, &[known]).unwrap().faults, []);
    // As many lines, all of them right, of another time.
    let audit = other.start();
    write(&audit, &[3, 7]);
    close(audit);
    assert_eq!(verify(&other.directory(), None, &[]).unwrap().faults, []);
    let faults = verify(&other.directory(), None, &[known]).unwrap().faults;
    assert_eq!(faults, [Fault { file: other.path(1), line: 5, kind: FaultKind::NotAsKnown }]);
    let faults = verify(&other.directory(), None, &[Position { seq: 20, ..known }]).unwrap().faults;
    assert_eq!(faults, [Fault { file: other.path(1), line: 11, kind: FaultKind::Cut { missing: 9 } }]);
}

#[test]
fn full_files_make_room_for_others_and_the_chain_holds() {
    let place = Place::new(8 * 1024);
    let audit = place.start();
    for _ in 0..30 {
        write(&audit, &[5]);
        assert!(place.size() <= place.max_size, "{}", place.size());
        assert_eq!(place.verify().faults, []);
    }
    // A group that is larger than a file, and one that is larger than all of them.
    write(&audit, &[20, 100]);
    assert!(place.size() <= place.max_size);
    close(audit);
    let report = place.verify();
    assert_eq!((report.faults, report.last.seq), (vec![], 271));
    assert!(report.first > 100 && report.lines == 272 - report.first && report.unrelated == 0);
    let audit = place.start();
    audit.configure(&Settings { directory: place.directory(), max_size: 4 * 1024, on_full: OnFull::Warn });
    write(&audit, &[10]);
    assert!(place.size() <= 4 * 1024);
    assert_eq!(place.verify().faults, []);
    close(audit);
}

#[test]
fn a_log_is_written_by_one_daemon_and_read_by_nobody_else() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    write(&audit, &[1]);
    let settings = Settings { directory: place.directory(), max_size: DEFAULT_SIZE, on_full: OnFull::Warn };
    let second = Writer::start(&settings, place.head(), place.state.clone());
    assert!(matches!(second, Err(AuditError::InUse { .. })));
    assert_eq!(fs::metadata(place.path(1)).unwrap().permissions().mode() & 0o777, 0o600);
    close(audit);
    fs::set_permissions(place.directory(), fs::Permissions::from_mode(0o750)).unwrap();
    let exposed = Writer::start(&settings, place.head(), place.state.clone());
    assert!(exposed.err().unwrap().to_string().contains("chmod 700"));
}

#[test]
fn what_the_state_file_does_not_know_is_taken_over() {
    let place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    write(&audit, &[4]);
    close(audit);
    let bytes = fs::read(place.path(1)).unwrap();
    // Without its last line end it has no last line.
    fs::write(place.path(1), &bytes[..bytes.len() - 1]).unwrap();
    let audit = place.start_with(None);
    write(&audit, &[1]);
    let report = place.verify();
    assert_eq!((report.faults, report.lines, report.last.seq), (vec![], 5, 5));
    close(audit);
}

#[test]
fn a_log_that_was_damaged_goes_on_in_another_file_and_the_damage_stays_for_all_to_see() {
    let place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    write(&audit, &[4]);
    close(audit);
    let bytes = fs::read(place.path(1)).unwrap();
    fs::write(place.path(1), &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(place.verify().faults[..], [Fault { kind: FaultKind::Cut { missing: 3 }, line: 2, .. }]));
    let audit = place.start();
    write(&audit, &[2]);
    let report = place.verify();
    let missing = FaultKind::Missing { from: 3, to: 5 };
    assert!(report.faults.contains(&Fault { file: place.path(2), line: 1, kind: missing }), "{report:?}");
    assert_eq!(report.last.seq, 7);
    close(audit);
    fs::remove_dir_all(place.directory()).unwrap();
    let audit = place.start();
    write(&audit, &[1]);
    assert!(matches!(place.verify().faults[..], [Fault { kind: FaultKind::Missing { from: 1, to: 8 }, .. }]));
    close(audit);
}

#[test]
fn a_log_that_moves_keeps_its_count() {
    let mut place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    write(&audit, &[2]);
    close(audit);
    let elsewhere = Head { directory: place.dir.path().join("elsewhere"), ..place.head().unwrap() };
    place.state = State::default();
    let audit = place.start_with(Some(elsewhere));
    write(&audit, &[1]);
    let report = place.verify();
    assert_eq!((report.faults, report.first, report.lines, report.unrelated), (vec![], 4, 1, 1));
    close(audit);
}

#[test]
fn while_nothing_can_be_written_keys_are_used_or_not_as_it_is_configured() {
    let mut place = Place::new(DEFAULT_SIZE);
    place.on_full = OnFull::Refuse;
    let audit = place.start();
    place.set_full(true);
    write(&audit, &[1]);
    let refused = audit.admit(&Caller::default(), "sign").err();
    assert_eq!(refused, Some(Refusal::Unrecorded));
    // What makes keys safer happens all the same, and is written later.
    write(&audit, &[1]);
    place.set_full(false);
    wait(audit.flushed());
    while audit.0.as_ref().unwrap().failing.load(Ordering::Relaxed) {
        wait(audit.flushed());
    }
    audit.admit(&Caller::default(), "sign").unwrap().end(Ok(())).unwrap();
    wait(audit.flushed());
    let text = fs::read_to_string(place.path(1)).unwrap();
    assert_eq!(text.matches("\"operation\":\"sign\"").count(), 3, "{text}");
    assert_eq!(text.matches("\"operation\":\"unrecorded\"").count(), 1, "{text}");
    assert!(text.contains("\"count\":1"), "{text}");
    assert_eq!(place.verify().faults, []);

    place.set_full(true);
    audit.configure(&Settings { directory: place.directory(), max_size: DEFAULT_SIZE, on_full: OnFull::Warn });
    write(&audit, &[1]);
    assert!(audit.admit(&Caller::default(), "sign").is_ok());
    place.set_full(false);
    close(audit);
    assert_eq!(place.verify().faults, []);
}

#[test]
fn the_queue_is_bounded_and_says_what_it_did_not_take() {
    let place = Place::new(DEFAULT_SIZE);
    let audit = place.start();
    let caller = Caller::default();
    // Under way: each has its place kept.
    let notes: Vec<_> = (0..MAX_WAITING).map(|_| audit.admit(&caller, "sign").unwrap()).collect();
    for _ in 0..7 {
        audit.admit(&caller, "sign").unwrap().end(Ok(())).unwrap();
    }
    audit.configure(&Settings { directory: place.directory(), max_size: DEFAULT_SIZE, on_full: OnFull::Refuse });
    assert_eq!(audit.admit(&caller, "sign").err(), Some(Refusal::Unrecorded));
    drop(notes);
    wait(audit.flushed());
    let text = fs::read_to_string(place.path(1)).unwrap();
    assert_eq!(text.matches("\"outcome\":\"cancelled\"").count(), MAX_WAITING);
    assert!(text.contains("\"operation\":\"unrecorded\"") && text.contains("\"count\":8"));
    assert!(audit.admit(&caller, "sign").is_ok());
    close(audit);
    assert_eq!(place.verify().faults, []);
}

/// Some lines in three files, and the head.
fn sample() -> (Place, Vec<Vec<u8>>) {
    let place = Place::new(8 * 700);
    let audit = place.start();
    write(&audit, &[3, 4, 5]);
    close(audit);
    let files = (1..).map(|number| place.path(number)).map_while(|path| fs::read(path).ok()).collect();
    (place, files)
}

/// Where each line of a file begins, and where the file ends.
fn bounds(file: &[u8]) -> Vec<usize> {
    let ends = file.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1);
    std::iter::once(0).chain(ends).collect()
}

#[derive(Clone, Debug)]
enum Tampering {
    Replace(u8),
    Insert(u8),
    Delete,
    RemoveLine,
    RepeatLine,
    SwapLines,
    CutHere,
    RemoveFile,
}

fn tampering() -> impl Strategy<Value = Tampering> {
    prop_oneof![
        4 => any::<u8>().prop_map(Tampering::Replace),
        2 => prop_oneof![Just(b'\n'), b'0'..=b'9', any::<u8>()].prop_map(Tampering::Insert),
        2 => Just(Tampering::Delete),
        1 => Just(Tampering::RemoveLine),
        1 => Just(Tampering::RepeatLine),
        1 => Just(Tampering::SwapLines),
        1 => Just(Tampering::CutHere),
        1 => Just(Tampering::RemoveFile),
    ]
}

#[test]
fn any_single_change_is_found_and_named() {
    let (place, files) = sample();
    assert!(files.len() >= 3, "{}", files.len());
    assert_eq!(place.verify().faults, []);
    let change = (any::<Index>(), any::<Index>(), tampering());
    let mut runner = proptest::test_runner::TestRunner::default();
    let checked = runner.run(&change, |(file, at, tampering)| {
        let number = file.index(files.len());
        let original = &files[number];
        let at = at.index(original.len());
        let bounds = bounds(original);
        let line = bounds.iter().filter(|begin| **begin <= at).count();
        let here = bounds[line - 1]..bounds[line];
        let next = bounds.get(line + 1).map(|end| bounds[line]..*end);
        let mut changed = original.clone();
        match tampering {
            Tampering::Replace(byte) => changed[at] = byte,
            Tampering::Insert(byte) => changed.insert(at, byte),
            Tampering::Delete => drop(changed.remove(at)),
            Tampering::RemoveLine => drop(changed.drain(here.clone())),
            Tampering::RepeatLine => drop(changed.splice(here.start..here.start, original[here.clone()].to_vec())),
            Tampering::SwapLines => {
                prop_assume!(next.is_some());
                let (here, next) = (here.clone(), next.clone().unwrap());
                let swapped = [&original[next.clone()], &original[here.clone()]].concat();
                changed.splice(here.start..next.end, swapped);
            }
            Tampering::CutHere => changed.truncate(at),
            Tampering::RemoveFile => {}
        }
        prop_assume!(changed != *original || matches!(tampering, Tampering::RemoveFile));
        let path = place.path(number as u64 + 1);
        match tampering {
            Tampering::RemoveFile => fs::remove_file(&path).unwrap(),
            _ => fs::write(&path, &changed).unwrap(),
        }
        let report = place.verify();
        fs::write(&path, original).unwrap();
        prop_assert!(!report.faults.is_empty(), "{tampering:?} in file {number} at {at}, line {line}");
        if let Tampering::Replace(_) | Tampering::Insert(_) | Tampering::Delete = tampering {
            let named = places(&report).contains(&(path.as_path(), line as u64));
            // A line whose end is gone is none, and the last that is one is named.
            let was_end = at + 1 == original.len();
            // A second end is a line of its own, behind one that is as it was.
            let is_second_end = matches!(tampering, Tampering::Insert(b'\n')) && original[at] == b'\n';
            let behind = is_second_end && places(&report).contains(&(path.as_path(), line as u64 + 1));
            let named = named || behind || (was_end && !report.faults.is_empty());
            prop_assert!(named, "{tampering:?} at {at} of line {line}: {report:?}");
        }
        Ok(())
    });
    checked.unwrap();
    assert_eq!(place.verify().faults, []);
}

/// What a kill leaves: the head of some group, and behind it any part of what was written next.
#[test]
fn wherever_a_kill_strikes_verify_is_content_and_the_log_goes_on() {
    let place = Place::new(8 * 700);
    let audit = place.start();
    // The files as they are when a head was kept are the same from then on, but for what is written next.
    let mut moments = Vec::new();
    for group in [1, 2, 1, 3, 1, 1, 2] {
        write(&audit, &[group]);
        let numbers = numbers(&place.directory()).unwrap();
        let files: Vec<_> = numbers.iter().map(|n| (*n, fs::read(place.path(*n)).unwrap())).collect();
        moments.push((place.head().unwrap(), files));
    }
    close(audit);
    for pair in moments.windows(2) {
        let [(head, before), (_, after)] = pair else { unreachable!() };
        for (number, bytes) in after {
            let from = before.iter().find(|(n, _)| n == number).map_or(0, |(_, bytes)| bytes.len());
            if before.last().is_some_and(|(last, _)| number < last) {
                continue;
            }
            for end in (from..=bytes.len()).step_by(13).chain([bytes.len()]) {
                let killed = Place::new(8 * 700);
                fs::create_dir(killed.directory()).unwrap();
                fs::set_permissions(killed.directory(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
                for (n, whole) in after.iter().filter(|(n, _)| n <= number) {
                    let end = if n == number { end } else { whole.len() };
                    fs::write(killed.path(*n), &whole[..end]).unwrap();
                }
                let head = Head { directory: killed.directory(), ..head.clone() };
                assert_eq!(verify(&killed.directory(), Some(&head), &[]).unwrap().faults, [], "{number} {end}");
                let audit = killed.start_with(Some(head));
                write(&audit, &[1]);
                close(audit);
                assert_eq!(killed.verify().faults, [], "after a restart: {number} {end}");
            }
        }
    }
}
