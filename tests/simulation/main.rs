//! The vault and its devices under a clock that the simulation moves: clients, hang-ups, locks, PINs, people who take
//! their time, and devices that crash, hang, lie, vanish and return, all drawn from a seed. What must hold: one answer to
//! each request, by its deadline, the right one; nothing signed while sealed; no PIN tried twice; nothing left at the end.
//!
//! A seed replays: `SIM_SEED=17 cargo test --test simulation replay -- --nocapture` prints its trace. `SIM_SEEDS=100000`
//! runs so many from `SIM_FROM` (0) on.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub,
    reason = "these are tests"
)]

mod device;
mod keys;
mod person;
mod plan;
mod random;
mod world;

use std::{
    env,
    sync::{Arc, Mutex},
    time::Duration,
};

use secrecy::SecretString;
use strongroom::{
    agent::{door::Door, session},
    devices::{Device, compute::Compute},
    prompt::{self, Prompter},
    rfc4251::Put,
    vault::{
        Answer, Asked as AskedFor, Parts, Settings, Use, Vault,
        audit::Audit,
        key::{Caller, Grants},
        registry::Terms,
        seal::Cost,
        store::Store,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    runtime::Builder,
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, sleep, sleep_until, timeout},
};

use device::{Mortal, RIGHT_PIN, Token, WRONG_PINS};
use person::Person;
use plan::{Act, Plan};
use random::Random;
use world::{PERSON, World};

/// Seeds of each of the tests that cargo runs side by side.
const SEEDS: u64 = 1000;
/// More than all requests of a connection take together.
const SOCKET: usize = 1 << 20;
/// How long the end may take.
const END: Duration = Duration::from_secs(10);

/// What came of a seed.
struct Run {
    trace: String,
    violations: Vec<String>,
}

fn run(seed: u64) -> Run {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let run = runtime.block_on(simulate(seed));
    // Whoever waits for a task that nobody ends would hang here for real: the tasks are counted instead.
    runtime.shutdown_background();
    run
}

async fn simulate(seed: u64) -> Run {
    let plan = Plan::of(seed);
    let world = World::new(&plan);
    let of = plan.devices.len();
    let tokens: Vec<_> =
        plan.devices.iter().enumerate().map(|(n, plan)| Token::new(seed, n, of, plan, Arc::clone(&world))).collect();
    let vault = vault(seed, &tokens, &world);
    for (n, (plan, token)) in plan.devices.iter().zip(&tokens).enumerate() {
        let device = Device::start(format!("device{n}"), "card", plan.settings.clone(), Mortal::new(token));
        vault.add_device(device, Terms { grants: Grants::ALL, ..Terms::default() }, &[]).unwrap();
    }
    let mut clients =
        Clients { world: Arc::clone(&world), vault: Arc::clone(&vault), ends: Vec::new(), lines: Vec::new(), made: 0 };
    add_keys(&vault).await;
    // Devices that are listed from the beginning, as they are after a restart.
    sleep(Duration::from_secs(40)).await;
    for _ in 0..plan.connections {
        clients.connect();
    }
    let mut random = Random::part(seed, 200);
    let mut callers = Vec::new();
    let begin = Instant::now();
    for step in plan.steps {
        sleep_until(begin + step.at).await;
        match step.act {
            Act::Send(line, requests) => clients.send(line, &requests).await,
            Act::HangUp(line) => clients.hang_up(line),
            Act::Use { key, deadline, gives_up } => {
                callers.push(tokio::spawn(use_key(Arc::clone(&vault), Arc::clone(&world), key, deadline, gives_up)));
            }
            Act::Unlock { device, right } => {
                let pin = if right { RIGHT_PIN } else { random.pick(&WRONG_PINS) };
                tokens[device].typed(pin);
                let (vault, handle) = (Arc::clone(&vault), vault.device(&format!("device{device}")).unwrap());
                callers.push(tokio::spawn(async move {
                    let _ = vault.unlock_device(&handle, &Arc::default(), SecretString::from(pin)).await;
                }));
            }
            Act::Mood(device, mood) => tokens[device].set_mood(mood),
            Act::Die(device) => tokens[device].die(),
        }
    }
    if plan.patient {
        // The longest that anything may take, for each of those that may stand in one another's way on a connection.
        let longest = Instant::now() + PERSON * 64;
        while world.in_flight() > 0 && Instant::now() < longest {
            sleep(Duration::from_secs(1)).await;
        }
        if world.in_flight() > 0 {
            world.violation("requests have no answer");
        }
        // What the vault asked on its own account has had its time by then.
        sleep(PERSON).await;
        for device in vault.devices() {
            if device.load().0 > 0 {
                world.violation(&format!("calls wait for {} and nobody for them", device.name()));
            }
        }
    }
    world.ending();
    vault.begin_end();
    for end in clients.ends.drain(..) {
        let _ = end.send(());
    }
    finish(clients, callers, &vault, &world).await;
    let (trace, violations) = world.close();
    Run { trace, violations }
}

fn vault(seed: u64, tokens: &[Arc<Token>], world: &Arc<World>) -> Arc<Vault> {
    let person = Person::new(seed, tokens.to_vec(), Arc::clone(world));
    let prompter = Prompter::through(prompt::Settings { timeout: PERSON, ..prompt::Settings::default() }, person);
    let parts = Parts {
        prompter,
        store: Store::in_memory().unwrap(),
        audit: Audit::off(),
        compute: Compute::inline(),
        lock_cost: Cost::least(),
        slot_time: Duration::ZERO,
        reactor: None,
    };
    Vault::new(Settings { person_deadline: PERSON, ..Settings::default() }, parts)
}

/// All keys that come by `ssh-add`, by the way that they take in life.
async fn add_keys(vault: &Arc<Vault>) {
    let (mut ours, theirs) = duplex(SOCKET);
    let session = tokio::spawn(session::serve(
        theirs,
        Arc::clone(vault),
        Arc::new(Door::ssh_agent()),
        Caller::default(),
        std::future::pending(),
    ));
    for key in keys::SOFT {
        let mut frame = Vec::new();
        frame.put_string(&keys::all()[key].add);
        ours.write_all(&frame).await.unwrap();
        assert_eq!(read(&mut ours).await, Some(vec![6]), "key {key}");
    }
    drop(ours);
    session.await.unwrap();
}

async fn read(from: &mut (impl AsyncReadExt + Unpin)) -> Option<Vec<u8>> {
    let mut body = vec![0; from.read_u32().await.ok()? as usize];
    from.read_exact(&mut body).await.ok()?;
    Some(body)
}

/// Uses a key as a caller inside the daemon does.
async fn use_key(
    vault: Arc<Vault>,
    world: Arc<World>,
    key: usize,
    deadline: Option<Duration>,
    gives_up: Option<Duration>,
) {
    let asked = world.uses(key, deadline);
    let data = world::data(asked.number);
    let wanted = Use {
        blob: &keys::all()[key].blob,
        asked: AskedFor::Ssh { data: &data, rsa_hash: strongroom::devices::Hash::Sha256 },
        deadline: deadline.map(|deadline| Instant::now() + deadline),
        offered: true,
        waits_for_place: true,
    };
    let result = match vault.operate(&Arc::default(), wanted) {
        Answer::Now(result) => Some(result),
        Answer::Later(work) => match gives_up {
            Some(after) => timeout(after, work).await.ok(),
            None => Some(work.await),
        },
    };
    world.used(&asked, result.as_ref());
}

/// The connections, each with the end that a client writes to and the tasks at both ends.
struct Clients {
    world: Arc<World>,
    vault: Arc<Vault>,
    /// Each tells one connection to end: in their order, which a broadcast would not keep.
    ends: Vec<oneshot::Sender<()>>,
    lines: Vec<Line>,
    made: u64,
}

struct Line {
    id: u64,
    to: Arc<Mutex<Option<WriteHalf<DuplexStream>>>>,
    reader: JoinHandle<()>,
}

impl Clients {
    fn connect(&mut self) {
        let line = self.open();
        self.lines.push(line);
    }

    fn open(&mut self) -> Line {
        self.made += 1;
        let id = self.made;
        let (ours, theirs) = duplex(SOCKET);
        let (from, to) = split(ours);
        self.world.connected(id);
        let caller = Caller { connection: id, ..Caller::default() };
        let (end, ended) = oneshot::channel();
        let (reads, all_read) = oneshot::channel::<()>();
        self.ends.push(end);
        let (vault, world) = (Arc::clone(&self.vault), Arc::clone(&self.world));
        tokio::spawn(async move {
            let end = async move { drop(ended.await) };
            session::serve(theirs, vault, Arc::new(Door::ssh_agent()), caller, end).await;
            // Closed when the client has read what there was, or has gone.
            let _ = all_read.await;
            world.ended(id);
        });
        let reader = tokio::spawn(answers(from, id, Arc::clone(&self.world), reads));
        Line { id, to: Arc::new(Mutex::new(Some(to))), reader }
    }

    async fn send(&mut self, line: usize, requests: &[plan::Request]) {
        let line = &self.lines[line];
        let mut frames = Vec::new();
        for request in requests {
            frames.put_string(&self.world.send(line.id, *request));
        }
        let to = line.to.lock().unwrap().take();
        if let Some(mut to) = to {
            // The socket holds all that a run sends.
            let _ = to.write_all(&frames).await;
            *line.to.lock().unwrap() = Some(to);
        }
    }

    fn hang_up(&mut self, line: usize) {
        self.world.hung_up(self.lines[line].id);
        let new = self.open();
        let old = std::mem::replace(&mut self.lines[line], new);
        old.reader.abort();
        drop(old.to);
    }
}

async fn answers(mut from: ReadHalf<DuplexStream>, line: u64, world: Arc<World>, _reads: oneshot::Sender<()>) {
    while let Some(body) = read(&mut from).await {
        world.answered(line, &body);
    }
}

/// Waits for the end of everything, and looks whether that is all.
async fn finish(clients: Clients, callers: Vec<JoinHandle<()>>, vault: &Arc<Vault>, world: &Arc<World>) {
    let ended = timeout(END, async {
        for line in clients.lines {
            let _ = line.reader.await;
        }
        for caller in callers {
            let _ = caller.await;
        }
        vault.end_devices().await;
    });
    if ended.await.is_err() {
        world.violation("the end took too long");
    }
    for device in vault.devices() {
        if device.load() != (0, 0) {
            world.violation(&format!("{} is not at rest: {:?}", device.name(), device.load()));
        }
    }
    if world.in_flight() > 0 {
        world.violation("requests had no answer in the end");
    }
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    // Those that follow a device live as long as the vault; the others end by themselves within moments.
    let following = vault.devices().len();
    for _ in 0..100 {
        if alive() <= following {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    world.violation(&format!("{} tasks are left", alive() - following));
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Runs seeds, and tells the first that fails with the end of its trace.
fn check(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let run = run(seed);
        if !run.violations.is_empty() {
            let lines: Vec<&str> = run.trace.lines().collect();
            let tail = lines[lines.len().saturating_sub(60)..].join("\n");
            panic!(
                "seed {seed}: {:?}\n{tail}\nreplay it: SIM_SEED={seed} cargo test --test simulation replay -- --nocapture",
                run.violations
            );
        }
    }
}

macro_rules! parts {
    ($($name:ident: $part:literal;)*) => {
        $(#[test]
        fn $name() {
            check($part * SEEDS..($part + 1) * SEEDS);
        })*
    };
}

parts! {
    the_first_thousand_seeds_hold: 0;
    the_second_thousand_seeds_hold: 1;
    the_third_thousand_seeds_hold: 2;
    the_fourth_thousand_seeds_hold: 3;
}

/// As many more as the environment asks for; a few otherwise, so that it is known to work.
#[test]
fn more_seeds_hold() {
    let from = number("SIM_FROM").unwrap_or(4 * SEEDS);
    check(from..from + number("SIM_SEEDS").unwrap_or(10));
}

#[test]
fn a_seed_replays() {
    for seed in 0..50 {
        let [one, two] = [run(seed), run(seed)];
        assert_eq!(one.trace, two.trace, "seed {seed}");
    }
}

/// Prints the trace of the seed in `SIM_SEED`.
#[test]
fn replay() {
    let Some(seed) = number("SIM_SEED") else { return };
    let run = run(seed);
    println!("{}", run.trace);
    assert!(run.violations.is_empty(), "seed {seed}: {:?}", run.violations);
}
