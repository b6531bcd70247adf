//! The strings by which a scripted device is pulled while it runs, and what they tell of it. Knows scripts only.

use std::{
    collections::BTreeMap,
    fs, io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::script::{CallName, Rule, Script};
use crate::devices::DeviceError;

/// The file of what became of its keys.
const JOURNAL: &str = "journal";

/// A scripted device's script, its numbers and its counts. The device may be opened many times on one control, and be
/// told things meanwhile.
///
/// The numbers have names: `absent` while it is set, `generation` (0 unless set), `tries` (PIN tries left), and those
/// of rules. In process they are in memory. In a child process each is a file in the script's directory, with the
/// number in it, or nothing for 1: they outlive the child, and a test writes them.
pub struct Control {
    script: Script,
    place: Place,
    numbers: Numbers,
    /// What became of its keys, where it has no directory for that.
    journal: Mutex<String>,
    rules: Mutex<Rules>,
    counts: watch::Sender<Counts>,
}

/// Where the driver runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a process that others use, too.
    InProcess,
    /// In a process of its own, where it may block and die.
    Child,
}

enum Numbers {
    Memory(Mutex<BTreeMap<String, u64>>),
    Directory(PathBuf),
}

struct Rules {
    rules: Arc<[Rule]>,
    /// Calls that each has matched so far.
    matched: Vec<u64>,
}

impl Rules {
    fn new(rules: Vec<Rule>) -> Self {
        Self { matched: vec![0; rules.len()], rules: rules.into() }
    }
}

/// What a device did, since its control was made.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Calls that have begun.
    pub calls: BTreeMap<CallName, u64>,
    /// Signatures made, by slot, those that were not handed out included.
    pub signs: BTreeMap<String, u64>,
    /// PINs that came, in their order. They stand in the test anyway.
    pub logins: Vec<String>,
}

impl Counts {
    /// Calls of this name that have begun.
    pub fn calls(&self, name: CallName) -> u64 {
        self.calls.get(&name).copied().unwrap_or(0)
    }

    /// Signatures made with the key in this slot.
    pub fn signs(&self, slot: &str) -> u64 {
        self.signs.get(slot).copied().unwrap_or(0)
    }
}

impl Control {
    /// For a device in this process.
    pub fn new(script: Script) -> Arc<Self> {
        Self::at(Place::InProcess, Numbers::Memory(Mutex::default()), script)
    }

    /// For a device that has this process to itself. Without a directory in the script its numbers end with it.
    pub(super) fn of_child(script: Script) -> Arc<Self> {
        let numbers = script.control.clone().map_or_else(|| Numbers::Memory(Mutex::default()), Numbers::Directory);
        Self::at(Place::Child, numbers, script)
    }

    fn at(place: Place, numbers: Numbers, script: Script) -> Arc<Self> {
        let rules = Mutex::new(Rules::new(script.rules.clone()));
        Arc::new(Self { script, place, numbers, journal: Mutex::default(), rules, counts: watch::Sender::default() })
    }

    pub(super) fn script(&self) -> &Script {
        &self.script
    }

    pub(super) fn place(&self) -> Place {
        self.place
    }

    /// Changes the rules, and counts matching calls from now on.
    pub fn set_rules(&self, rules: Vec<Rule>) {
        *self.rules() = Rules::new(rules);
    }

    /// The rules whose turn a call is, in the script's order.
    pub(super) fn matching(&self, call: CallName, slot: Option<&str>) -> Result<Vec<Rule>, DeviceError> {
        let due: Vec<Rule> = {
            let mut rules = self.rules();
            let Rules { rules, matched } = &mut *rules;
            let mut due = Vec::new();
            for (n, (rule, matched)) in rules.iter().zip(matched).enumerate() {
                let meant =
                    rule.on.is_none_or(|on| on == call) && (rule.slot.is_none() || rule.slot.as_deref() == slot);
                if !meant {
                    continue;
                }
                *matched += 1;
                let past = matched.checked_sub(rule.from);
                let counted = past.is_some_and(|past| rule.count.is_none_or(|count| past < count));
                if counted && rule.chance.is_none_or(|chance| self.draw(n, *matched) % 100 < u64::from(chance)) {
                    due.push(rule.clone());
                }
            }
            due
        };
        let mut matching = Vec::new();
        for rule in due {
            let set = match &rule.when {
                Some(name) => self.get(name)?.is_some(),
                None => true,
            };
            if set && rule.once.as_ref().map_or(Ok(true), |name| self.clear(name))? {
                matching.push(rule);
            }
        }
        Ok(matching)
    }

    /// A number that follows from the seed, the rule and the call alone, whatever else happens at the same time
    /// (SplitMix64's output function).
    fn draw(&self, rule: usize, call: u64) -> u64 {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let mix = |x: u64| {
            let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        };
        let rule = mix((rule as u64).wrapping_add(1).wrapping_mul(ODD));
        mix(self.script.seed.wrapping_add(rule).wrapping_add(call.wrapping_mul(ODD)))
    }

    /// A number, if it is set.
    pub fn get(&self, name: &str) -> Result<Option<u64>, DeviceError> {
        match &self.numbers {
            Numbers::Memory(numbers) => Ok(lock(numbers).get(name).copied()),
            Numbers::Directory(directory) => match fs::read_to_string(directory.join(name)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(unusable(name, &e)),
                Ok(text) if text.trim().is_empty() => Ok(Some(1)),
                Ok(text) => text.trim().parse().map(Some).map_err(|e| unusable(name, &e)),
            },
        }
    }

    /// Sets a number.
    pub fn set(&self, name: &str, value: u64) -> Result<(), DeviceError> {
        match &self.numbers {
            Numbers::Memory(numbers) => {
                lock(numbers).insert(name.to_owned(), value);
                Ok(())
            }
            Numbers::Directory(directory) => {
                // A reader must not see it half written.
                let new = directory.join(format!(".{name}"));
                let written = fs::write(&new, value.to_string()).and_then(|()| fs::rename(&new, directory.join(name)));
                written.map_err(|e| unusable(name, &e))
            }
        }
    }

    /// Unsets a number; whether it was set.
    pub fn clear(&self, name: &str) -> Result<bool, DeviceError> {
        match &self.numbers {
            Numbers::Memory(numbers) => Ok(lock(numbers).remove(name).is_some()),
            Numbers::Directory(directory) => match fs::remove_file(directory.join(name)) {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(unusable(name, &e)),
            },
        }
    }

    /// The lines that [`record`](Self::record) was given: like the numbers, they outlive a child process that has a
    /// directory.
    pub(super) fn journal(&self) -> Result<String, DeviceError> {
        match &self.numbers {
            Numbers::Memory(_) => Ok(lock(&self.journal).clone()),
            Numbers::Directory(directory) => match fs::read_to_string(directory.join(JOURNAL)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
                read => read.map_err(|e| unusable(JOURNAL, &e)),
            },
        }
    }

    /// Adds a line to the journal of its keys.
    pub(super) fn record(&self, line: &str) -> Result<(), DeviceError> {
        let text = format!("{}{line}\n", self.journal()?);
        match &self.numbers {
            Numbers::Memory(_) => {
                *lock(&self.journal) = text;
                Ok(())
            }
            Numbers::Directory(directory) => {
                fs::write(directory.join(JOURNAL), text).map_err(|e| unusable(JOURNAL, &e))
            }
        }
    }

    /// What it did so far; tells of every change. Of a child process it knows nothing.
    pub fn counts(&self) -> watch::Receiver<Counts> {
        self.counts.subscribe()
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Counts)) {
        self.counts.send_modify(change);
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        lock(&self.rules)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unusable(name: &str, why: &dyn std::fmt::Display) -> DeviceError {
    DeviceError::Failed(format!("the control {name:?} is unusable: {why}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::devices::scripted::script::Action;

    fn hits(control: &Control, calls: u64) -> Vec<u64> {
        (1..=calls).filter(|_| !control.matching(CallName::Sign, Some("a")).unwrap().is_empty()).collect()
    }

    fn with(rule: Rule) -> Arc<Control> {
        Control::new(Script { rules: vec![rule], ..Script::default() })
    }

    #[test]
    fn a_rule_is_for_a_call_a_slot_and_some_of_their_number() {
        let on = Rule::on(CallName::Sign, Action::Hang);
        assert_eq!(hits(&with(on.clone()), 3), [1, 2, 3]);
        assert!(hits(&with(Rule::on(CallName::Scan, Action::Hang)), 3).is_empty());
        assert!(hits(&with(Rule { slot: Some("b".into()), ..on.clone() }), 3).is_empty());
        let control = with(Rule { slot: Some("a".into()), from: 2, count: Some(2), ..on });
        // Calls that the rule is not for do not count.
        assert!(control.matching(CallName::Sign, Some("b")).unwrap().is_empty());
        assert!(control.matching(CallName::Scan, None).unwrap().is_empty());
        assert_eq!(hits(&control, 5), [2, 3]);
    }

    #[test]
    fn chance_follows_from_the_seed() {
        let control = |seed| {
            let rule = Rule { chance: Some(30), ..Rule::always(Action::Hang) };
            Control::new(Script { seed, rules: vec![rule], ..Script::default() })
        };
        let first = hits(&control(1), 1000);
        assert!((200..400).contains(&first.len()), "{}", first.len());
        assert_eq!(first, hits(&control(1), 1000));
        assert_ne!(first, hits(&control(2), 1000));
    }

    #[test]
    fn numbers_switch_rules_in_memory_and_in_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let rules = vec![
            Rule { when: Some("on".into()), ..Rule::always(Action::Busy) },
            Rule { once: Some("next".into()), ..Rule::always(Action::Absent) },
        ];
        let script = Script { rules, control: Some(directory.path().to_owned()), ..Script::default() };
        for control in [Control::new(script.clone()), Control::of_child(script)] {
            let actions = || -> Vec<Action> {
                control.matching(CallName::Scan, None).unwrap().into_iter().map(|rule| rule.action).collect()
            };
            assert_eq!(actions(), []);
            control.set("on", 1).unwrap();
            control.set("next", 1).unwrap();
            assert_eq!(actions(), [Action::Busy, Action::Absent]);
            assert_eq!(actions(), [Action::Busy]);
            assert!(control.clear("on").unwrap());
            assert!(!control.clear("on").unwrap());
            assert_eq!(actions(), []);
            control.set("number", 17).unwrap();
            assert_eq!(control.get("number").unwrap(), Some(17));
        }
        fs::write(directory.path().join("empty"), "").unwrap();
        fs::write(directory.path().join("words"), "many").unwrap();
        let control = Control::of_child(Script { control: Some(directory.path().into()), ..Script::default() });
        assert_eq!(control.get("empty").unwrap(), Some(1));
        assert!(control.get("words").is_err());
    }

    #[test]
    fn new_rules_count_from_their_own_beginning() {
        let control = with(Rule { from: 2, ..Rule::always(Action::Hang) });
        assert_eq!(hits(&control, 2), [2]);
        control.set_rules(vec![Rule { from: 2, ..Rule::always(Action::Hang) }]);
        assert_eq!(hits(&control, 2), [2]);
    }
}
