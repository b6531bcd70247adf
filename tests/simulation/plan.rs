//! What a seed makes: the devices, and who does what when. Knows no vault.

use std::time::Duration;

use strongroom::devices::Settings;

use crate::{
    keys::{CONFIRMED, DOUBLE, MAX_DEVICES, PLAIN, SHARED, SLOW, SPARE, own, touched},
    random::Random,
};

/// Everything that happens in a run, but for what devices and people draw by themselves.
pub struct Plan {
    pub devices: Vec<DevicePlan>,
    pub connections: usize,
    /// In the order of their times.
    pub steps: Vec<Step>,
    /// Whether everything in flight is awaited before the end.
    pub patient: bool,
}

pub struct DevicePlan {
    pub settings: Settings,
    pub lanes: usize,
    /// Calls that its driver takes besides.
    pub ahead: usize,
    /// Whether it is quick when it is well.
    pub is_brisk: bool,
    pub has_pin: bool,
}

#[derive(Debug)]
pub struct Step {
    pub at: Duration,
    pub act: Act,
}

#[derive(Debug)]
pub enum Act {
    /// A connection sends these in one piece.
    Send(usize, Vec<Request>),
    /// A connection ends, whatever it waits for; another takes its place.
    HangUp(usize),
    /// A caller inside the daemon uses a key, with a deadline of its own, and may give up before.
    Use { key: usize, deadline: Option<Duration>, gives_up: Option<Duration> },
    /// Somebody gives a device's PIN unasked.
    Unlock { device: usize, right: bool },
    /// A device is in another mood from now on.
    Mood(usize, Mood),
    /// A device's driver dies of itself.
    Die(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Sign(usize),
    List,
    Add(usize),
    Remove(usize),
    RemoveAll,
    Lock(&'static str),
    Unlock(&'static str),
}

/// How a device takes what it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Well,
    /// Right, but in seconds.
    Slow,
    /// Anything may happen.
    Flaky,
    /// Nothing ever comes.
    Hung,
    /// It answers with what is not a signature of what it was asked for.
    Lying,
    Gone,
    /// Each use kills it.
    Crashing,
}

const MOODS: [Mood; 7] = [Mood::Well, Mood::Slow, Mood::Flaky, Mood::Hung, Mood::Lying, Mood::Gone, Mood::Crashing];
const PASSWORDS: [&str; 2] = ["one", "two"];

impl Plan {
    pub fn of(seed: u64) -> Self {
        let random = &mut Random::part(seed, 0);
        let devices: Vec<_> = (0..random.between(1, MAX_DEVICES as u64 + 1)).map(|_| DevicePlan::of(random)).collect();
        let connections = random.between(2, 6) as usize;
        let locks = random.percent(60);
        let mut at = 0;
        let steps = (0..random.between(10, 45)).map(|_| {
            // Bursts, pauses for a device, and pauses for a person.
            at += match random.between(0, 10) {
                0..5 => 0,
                5..7 => random.between(1, 100),
                7..9 => random.between(100, 3_000),
                _ => random.between(3_000, 40_000),
            };
            Step { at: Duration::from_millis(at), act: Act::of(random, devices.len(), connections, locks) }
        });
        let steps = steps.collect();
        Self { steps, devices, connections, patient: random.percent(70) }
    }
}

impl DevicePlan {
    fn of(random: &mut Random) -> Self {
        let settings = Settings {
            queue: random.pick(&[1, 2, 4, 1024]),
            timeout: Duration::from_millis(random.pick(&[500, 2_000, 5_000])),
            touch_timeout: Duration::from_secs(30),
            generate_timeout: Duration::from_secs(120),
            open_timeout: Duration::from_secs(random.pick(&[3, 30])),
            grace: Duration::from_millis(random.pick(&[100, 1_000])),
            probe: Duration::from_secs(5),
            wait: false,
        };
        let lanes = random.between(1, 4) as usize;
        let ahead = random.pick(&[0, 1, lanes, 3 * lanes]);
        Self { settings, lanes, ahead, is_brisk: random.percent(70), has_pin: random.percent(40) }
    }
}

impl Act {
    fn of(random: &mut Random, devices: usize, connections: usize, locks: bool) -> Self {
        let device = random.between(0, devices as u64) as usize;
        let connection = random.between(0, connections as u64) as usize;
        match random.between(0, 100) {
            0..55 => {
                let count = random.pick(&[1, 1, 2, 5, 8]);
                Self::Send(connection, (0..count).map(|_| Request::of(random, devices, locks)).collect())
            }
            // More than a device has lanes for, so that it has some ahead.
            55..61 => {
                let key = own(device);
                Self::Send(connection, (0..random.between(6, 16)).map(|_| Request::Sign(key)).collect())
            }
            61..66 => Self::HangUp(connection),
            66..76 => {
                let key = any_key(random, devices);
                let time = |random: &mut Random, percent| {
                    random.percent(percent).then(|| Duration::from_millis(random.pick(&[1, 50, 700, 4_000, 90_000])))
                };
                Self::Use { key, deadline: time(random, 50), gives_up: time(random, 20) }
            }
            76..80 => Self::Unlock { device, right: random.percent(50) },
            80..97 => Self::Mood(device, random.pick(&MOODS)),
            _ => Self::Die(device),
        }
    }
}

impl Request {
    fn of(random: &mut Random, devices: usize, locks: bool) -> Self {
        let password = random.pick(&PASSWORDS);
        match random.between(0, 100) {
            0..70 => Self::Sign(any_key(random, devices)),
            70..78 => Self::List,
            78..83 => Self::Add(random.pick(&[PLAIN, SPARE, CONFIRMED, DOUBLE])),
            83..86 => Self::Remove(random.pick(&[SPARE, SPARE, CONFIRMED, DOUBLE])),
            86 => Self::RemoveAll,
            87..92 if locks => Self::Lock(password),
            92..100 if locks => Self::Unlock(password),
            _ => Self::Sign(PLAIN),
        }
    }
}

fn any_key(random: &mut Random, devices: usize) -> usize {
    let device = random.between(0, devices as u64) as usize;
    match random.between(0, 100) {
        0..25 => PLAIN,
        25..35 => SPARE,
        35..37 => SLOW,
        37..43 => CONFIRMED,
        43..52 => DOUBLE,
        52..62 => SHARED,
        62..68 => touched(device),
        _ => own(device),
    }
}
