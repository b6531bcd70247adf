//! What a scripted device is and how it behaves, as TOML. Knows no driver.
//!
//! ```toml
//! serial = "T-1"
//! lanes = 2
//! [pin]
//! value = "1234"
//! [[key]]
//! slot = "a"
//! type = "ed25519"
//! [[rule]]
//! on = "sign"
//! from = 3
//! do = { crash = "abort" }
//! ```

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::devices::{DeviceError, MAX_KEYS, MAX_LABEL, MAX_SLOT};

/// The most lanes that a script may ask for.
const MAX_LANES: usize = 64;

/// A whole script.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Script {
    /// The token's serial.
    pub serial: String,
    /// How many calls it makes at once: 1 to 64.
    pub lanes: usize,
    /// The PIN, if the token has one.
    pub pin: Option<Pin>,
    /// What it asks of whoever makes keys; without it, nothing. It is never blocked.
    pub admin: Option<String>,
    /// Whether it opens locked. Needs a PIN.
    pub locked: bool,
    /// How long each call takes, in milliseconds.
    #[serde(rename = "latency_ms", deserialize_with = "milliseconds")]
    pub latency: Duration,
    /// What [`Rule::chance`] is drawn from.
    pub seed: u64,
    /// Where the control files are (see [`Control`](super::Control)): a device in a child process has no other memory,
    /// and nobody to talk to.
    pub control: Option<PathBuf>,
    /// The keys.
    #[serde(rename = "key")]
    pub keys: Vec<ScriptKey>,
    /// What is to go wrong.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            serial: "SCRIPTED".to_owned(),
            lanes: 1,
            pin: None,
            admin: None,
            locked: false,
            latency: Duration::ZERO,
            seed: 0,
            control: None,
            keys: Vec::new(),
            rules: Vec::new(),
        }
    }
}

impl Script {
    /// Reads and checks a script. [`DeviceError::Failed`] says where it is wrong.
    pub fn parse(text: &str) -> Result<Self, DeviceError> {
        let wrong = |why: &dyn fmt::Display| DeviceError::Failed(format!("the script is wrong: {why}"));
        let script: Self = toml::from_str(text).map_err(|e| wrong(&e))?;
        let slots = script.keys.iter().map(|key| key.slot.len());
        if !(1..=MAX_LANES).contains(&script.lanes) {
            return Err(wrong(&format_args!("lanes are 1 to {MAX_LANES}")));
        }
        if script.keys.len() > MAX_KEYS || slots.into_iter().any(|len| len == 0 || len > MAX_SLOT) {
            return Err(wrong(&format_args!("at most {MAX_KEYS} keys, with slots of 1 to {MAX_SLOT} bytes")));
        }
        if script.serial.len() > MAX_LABEL {
            return Err(wrong(&format_args!("the serial has at most {MAX_LABEL} bytes")));
        }
        if script.locked && script.pin.is_none() {
            return Err(wrong(&"what opens locked needs a PIN"));
        }
        Ok(script)
    }
}

/// A PIN and how often it may be wrong.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Not a secret: it stands in a test.
    pub value: String,
    /// Wrong PINs in a row that block it.
    #[serde(default = "three")]
    pub tries: u8,
}

fn three() -> u8 {
    3
}

/// A key on the token.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScriptKey {
    /// Its name there.
    pub slot: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: KeyKind,
    /// Keys of one type and seed are the same key. There is one RSA key only.
    #[serde(default)]
    pub seed: u64,
    /// For people.
    #[serde(default)]
    pub label: String,
    /// Whether each use wants a touch. It is not waited for: that is a rule.
    #[serde(default)]
    pub touch: bool,
    /// Whether it shows after a login only.
    #[serde(default)]
    pub hidden: bool,
    /// The first generation that has it (see [`Control`](super::Control)).
    #[serde(default)]
    pub appears: u64,
    /// The first generation that has it no more.
    #[serde(default)]
    pub vanishes: Option<u64>,
    /// A key that was brought, in place of type and seed: [`PrivateHalf`](crate::devices::PrivateHalf) in base64.
    #[serde(skip)]
    pub private: Option<String>,
}

/// The types that a scripted key can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyKind {
    /// Ed25519
    Ed25519,
    /// NIST P-256
    P256,
    /// RSA with 2048 bits
    Rsa,
}

/// Something that goes wrong, and when. All conditions must hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The call: any without it.
    pub on: Option<CallName>,
    /// The key's slot: any without it, and calls that use no key.
    pub slot: Option<String>,
    /// The first of the calls matching so far, counted from 1. The count is one of the process.
    #[serde(default = "one")]
    pub from: u64,
    /// How many of them: all without it.
    pub count: Option<u64>,
    /// In how many cases of a hundred.
    pub chance: Option<u8>,
    /// Only while this control is set.
    pub when: Option<String>,
    /// Only for the one call that finds this control set and clears it.
    pub once: Option<String>,
    /// What happens.
    #[serde(rename = "do")]
    pub action: Action,
}

fn one() -> u64 {
    1
}

impl Rule {
    /// `action` at every call.
    pub fn always(action: Action) -> Self {
        Self { on: None, slot: None, from: 1, count: None, chance: None, when: None, once: None, action }
    }

    /// `action` at every call of this name.
    pub fn on(on: CallName, action: Action) -> Self {
        Self { on: Some(on), ..Self::always(action) }
    }
}

/// What can be asked of a scripted device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "each is the function of `Driver` that has its name")]
pub enum CallName {
    Open,
    Scan,
    Health,
    Unlock,
    Lock,
    Sign,
    Decrypt,
    Derive,
    Generate,
    Import,
    Rename,
    Delete,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The call begins this much later, in milliseconds.
    #[serde(rename = "sleep_ms", deserialize_with = "milliseconds")]
    Sleep(Duration),
    /// The work is done, and the answer comes this much later, in milliseconds.
    #[serde(rename = "late_ms", deserialize_with = "milliseconds")]
    Late(Duration),
    /// The call never ends. In a child process it blocks its thread.
    Hang,
    /// The driver dies.
    Crash(Crash),
    /// The last bit of the answer is not right: a signature does not verify.
    Wrong,
    /// The answer is the one to the use of a key before it; empty for the first.
    Swapped,
    /// In a child process: bytes that are no frame go to the socket on standard input, then the answer. In process: an
    /// answer that no scheme has.
    Garbage,
    /// The device is not here.
    Absent,
    /// Somebody else uses the device.
    Busy,
    /// Nobody touches it for so many milliseconds.
    #[serde(rename = "not_touched_ms", deserialize_with = "milliseconds")]
    NotTouched(Duration),
    /// Another reason.
    Fail(String),
    /// So many lines are written to standard error, as foreign libraries do, and the call goes on.
    Stderr(usize),
}

/// How a driver dies. In process, where it has no process to itself, all but a panic are the error
/// [`Restarted`](DeviceError::Restarted).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Crash {
    /// A panic of Rust.
    Panic,
    /// abort(3)
    Abort,
    /// SIGSEGV
    Segv,
    /// exit(3) with this code.
    Exit(i32),
}

fn milliseconds<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    const DAY: u64 = 24 * 60 * 60 * 1000;
    let time = u64::deserialize(from)?;
    if time > DAY { Err(D::Error::custom("a wait is at most a day")) } else { Ok(Duration::from_millis(time)) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_script_may_say_everything() {
        let script = Script::parse(
            r#"
            serial = "T-1"
            lanes = 4
            locked = true
            admin = "87654321"
            latency_ms = 2
            seed = 9
            control = "/dir"
            [pin]
            value = "1234"
            tries = 5
            [[key]]
            slot = "a"
            type = "p256"
            seed = 7
            label = "the first"
            touch = true
            hidden = true
            appears = 1
            vanishes = 3
            [[rule]]
            on = "sign"
            slot = "a"
            from = 2
            count = 4
            chance = 50
            when = "x"
            once = "y"
            do = { late_ms = 1500 }
            "#,
        )
        .unwrap();
        assert_eq!((script.serial.as_str(), script.lanes, script.locked, script.seed), ("T-1", 4, true, 9));
        assert_eq!(script.admin.as_deref(), Some("87654321"));
        assert_eq!((script.latency, script.control), (Duration::from_millis(2), Some("/dir".into())));
        let pin = script.pin.unwrap();
        assert_eq!((pin.value.as_str(), pin.tries), ("1234", 5));
        let [key] = &script.keys[..] else { panic!("{:?}", script.keys) };
        assert_eq!((key.slot.as_str(), key.kind, key.seed, key.label.as_str()), ("a", KeyKind::P256, 7, "the first"));
        assert_eq!((key.touch, key.hidden, key.appears, key.vanishes), (true, true, 1, Some(3)));
        let [rule] = &script.rules[..] else { panic!("{:?}", script.rules) };
        assert_eq!((rule.on, rule.slot.as_deref()), (Some(CallName::Sign), Some("a")));
        assert_eq!((rule.from, rule.count, rule.chance), (2, Some(4), Some(50)));
        assert_eq!((rule.when.as_deref(), rule.once.as_deref()), (Some("x"), Some("y")));
        assert_eq!(rule.action, Action::Late(Duration::from_millis(1500)));
    }

    #[test]
    fn every_action_can_be_written() {
        let ms = Duration::from_millis;
        for (text, action) in [
            ("{ sleep_ms = 5 }", Action::Sleep(ms(5))),
            ("{ late_ms = 5 }", Action::Late(ms(5))),
            ("'hang'", Action::Hang),
            ("{ crash = 'panic' }", Action::Crash(Crash::Panic)),
            ("{ crash = 'abort' }", Action::Crash(Crash::Abort)),
            ("{ crash = 'segv' }", Action::Crash(Crash::Segv)),
            ("{ crash = { exit = 3 } }", Action::Crash(Crash::Exit(3))),
            ("'wrong'", Action::Wrong),
            ("'swapped'", Action::Swapped),
            ("'garbage'", Action::Garbage),
            ("'absent'", Action::Absent),
            ("'busy'", Action::Busy),
            ("{ not_touched_ms = 15000 }", Action::NotTouched(ms(15_000))),
            ("{ fail = 'reason' }", Action::Fail("reason".to_owned())),
            ("{ stderr = 3 }", Action::Stderr(3)),
        ] {
            assert_eq!(Script::parse(&format!("[[rule]]\ndo = {text}")).unwrap().rules[0].action, action, "{text}");
        }
    }

    #[test]
    fn what_a_script_cannot_mean_is_refused() {
        for text in [
            "lane = 1",
            "lanes = 0",
            "lanes = 65",
            "locked = true",
            "latency_ms = 86400001",
            "[[key]]\nslot = ''\ntype = 'rsa'",
            "[[key]]\nslot = 'a'\ntype = 'dsa'",
            "[[rule]]\non = 'sing'\ndo = 'hang'",
            "[[rule]]\ndo = 'hung'",
            "[[rule]]\non = 'sign'",
            "[pin]\nvalue = '1'\ntries = 256",
        ] {
            assert!(Script::parse(text).is_err(), "{text}");
        }
    }
}
