//! The order and the fate of what a driver is given before it has a lane for it, with a driver that the test plays itself.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{borrow::Cow, future::Future, sync::atomic::AtomicBool};

use tokio::{
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::{advance, sleep},
};

use super::*;
use crate::devices::{DecryptScheme, Device, Operation, Outcome, Patience, Settings, device::LoginError};

const LANES: usize = 2;
const AHEAD: usize = 2;
/// Longer than any timer here that the test does not wait for itself.
const QUIET: Duration = Duration::from_millis(1);
/// Shorter than the time that an operation may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// A driver's side, as the test sees it.
struct Desk {
    calls: mpsc::UnboundedReceiver<Made>,
    death: Arc<Notify>,
    device: Device,
    asked: u8,
    /// Whether scans come here, too, rather than find nothing.
    scans: Arc<AtomicBool>,
}

/// A call that came to the driver.
struct Made {
    call: Call,
    answer: oneshot::Sender<Answer>,
    withdrawn: Arc<Notify>,
}

#[derive(Clone)]
struct Played {
    calls: mpsc::UnboundedSender<Made>,
    death: Arc<Notify>,
    ahead: usize,
    scans: Arc<AtomicBool>,
}

struct PlayedCall {
    answer: oneshot::Receiver<Answer>,
    withdrawn: Arc<Notify>,
}

impl Future for PlayedCall {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| answer.unwrap_or(Err(DeviceError::Restarted)))
    }
}

impl Underway for PlayedCall {
    fn withdraw(&self) {
        self.withdrawn.notify_one();
    }
}

impl Engine for Played {
    type Session = Self;

    async fn open(&self) -> Result<Self, DeviceError> {
        Ok(self.clone())
    }
}

impl Session for Played {
    fn lanes(&self) -> usize {
        LANES
    }

    fn ahead(&self) -> usize {
        self.ahead
    }

    fn call(&self, call: Call) -> impl Underway {
        let (sender, answer) = oneshot::channel();
        let withdrawn = Arc::new(Notify::new());
        match call {
            Call::Scan if !self.scans.load(Ordering::Relaxed) => _ = sender.send(Ok(Reply::Scan(Scan::default()))),
            call => _ = self.calls.send(Made { call, answer: sender, withdrawn: Arc::clone(&withdrawn) }),
        }
        PlayedCall { answer, withdrawn }
    }

    fn died(&self) -> impl Future<Output = String> + Send + 'static {
        let death = Arc::clone(&self.death);
        async move {
            death.notified().await;
            "as the test wants it".to_owned()
        }
    }

    async fn end(self, _: Duration) {}
}

impl Made {
    /// What the operation is called.
    fn name(&self) -> u8 {
        match &self.call {
            Call::Operate(_, operation) => match &**operation {
                Operation::Decrypt { ciphertext, .. } => ciphertext[0],
                other => panic!("{} is not what was asked", other.name()),
            },
            other => panic!("{other:?} is no operation"),
        }
    }

    fn answers(self) {
        let name = self.name();
        self.answer.send(Ok(Reply::Bytes(vec![name].into()))).ok().unwrap();
    }

    async fn is_withdrawn(&self) {
        timeout(PATIENCE, self.withdrawn.notified()).await.unwrap();
    }

    fn was_withdrawn(self) {
        self.answer.send(Ok(Reply::Withdrawn)).ok().unwrap();
    }
}

impl Desk {
    fn new(ahead: usize) -> Self {
        let ((sender, calls), death) = (mpsc::unbounded_channel(), Arc::new(Notify::new()));
        let scans = Arc::default();
        let engine = Played { calls: sender, death: Arc::clone(&death), ahead, scans: Arc::clone(&scans) };
        let device = Device::start("played", "played", Settings::default(), engine);
        Self { calls, death, device, asked: 0, scans }
    }

    /// A device that has shown that it is brisk.
    async fn brisk() -> Self {
        Self::brisk_with(AHEAD).await
    }

    async fn brisk_with(ahead: usize) -> Self {
        let mut desk = Self::new(ahead);
        desk.makes(BRISK_RUN).await;
        desk
    }

    /// Makes so many operations one after the other, in no time.
    async fn makes(&mut self, count: u32) {
        for _ in 0..count {
            let answer = self.ask();
            self.next().await.answers();
            assert!(answer.await.unwrap().is_ok());
        }
    }

    async fn makes_one_slowly(&mut self) {
        let slow = self.ask();
        let made = self.next().await;
        advance(BRISK + QUIET).await;
        made.answers();
        assert!(slow.await.unwrap().is_ok());
    }

    /// Asks for an operation, which is called one more than the last.
    fn ask(&mut self) -> JoinHandle<Result<u8, DeviceError>> {
        self.ask_for(1)
    }

    fn ask_for(&mut self, owner: u64) -> JoinHandle<Result<u8, DeviceError>> {
        self.asked += 1;
        let (device, name) = (self.device.clone(), self.asked);
        let key = FoundKey {
            slot: Slot([].into()),
            blob: [].into(),
            certificates: Vec::new(),
            label: String::new(),
            schemes: Vec::new(),
            decrypts: vec![DecryptScheme::RsaPkcs1v15],
            derives: Vec::new(),
            touch: false,
            ssh: false,
            note: String::new(),
        };
        let operation = Operation::Decrypt {
            scheme: DecryptScheme::RsaPkcs1v15,
            label: Cow::Borrowed(b""),
            ciphertext: vec![name].into(),
        };
        tokio::spawn(async move {
            match device.operate(owner, &key, operation.into(), Patience::default()).await? {
                Outcome::Secret(bytes) => Ok(bytes[0]),
                Outcome::Signature(_) => panic!("a signature"),
            }
        })
    }

    /// What comes to the driver next.
    async fn next(&mut self) -> Made {
        self.calls.recv().await.unwrap()
    }

    async fn is_quiet(&mut self) {
        assert!(timeout(QUIET, self.calls.recv()).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn a_brisk_device_has_operations_ahead_and_no_more_than_it_takes() {
    let mut desk = Desk::brisk().await;
    let answers: Vec<_> = (0..6).map(|_| desk.ask()).collect();
    let mut made = Vec::new();
    for _ in 0..LANES + AHEAD {
        made.push(desk.next().await);
    }
    desk.is_quiet().await;
    assert_eq!(desk.device.load(), (4, LANES));
    for _ in 0..2 {
        made.remove(0).answers();
        made.push(desk.next().await);
    }
    made.into_iter().for_each(Made::answers);
    let names: Vec<u8> = join(answers).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(names, [5, 6, 7, 8, 9, 10]);
    assert_eq!(desk.device.load(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_is_not_brisk_has_none_ahead() {
    let mut desk = Desk::brisk().await;
    desk.makes_one_slowly().await;
    let answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
    let (first, second) = (desk.next().await, desk.next().await);
    desk.is_quiet().await;
    first.answers();
    let third = desk.next().await;
    [second, third].into_iter().for_each(Made::answers);
    assert!(join(answers).await.iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn a_device_that_is_brisk_no_more_gives_back_what_it_has_ahead_and_it_keeps_its_order() {
    // Lanes may have answered before the driver says what they have not begun.
    for answered in 0..=LANES {
        let mut desk = Desk::brisk_with(4).await;
        let (mut answers, mut made) = (Vec::new(), Vec::new());
        for name in 5..=10 {
            answers.push(desk.ask_for(name % 2));
            made.push(desk.next().await);
        }
        answers.push(desk.ask_for(1));
        desk.is_quiet().await;
        advance(BRISK).await;
        made.remove(0).answers();
        let ahead = made.split_off(LANES);
        for made in &ahead {
            made.is_withdrawn().await;
        }
        let seventh = made.last().unwrap();
        assert!(timeout(QUIET, seventh.withdrawn.notified()).await.is_err(), "it has begun");
        assert_eq!(desk.device.load(), (4, LANES));
        let late = made.split_off(answered);
        made.into_iter().for_each(Made::answers);
        for made in ahead {
            sleep(QUIET).await;
            made.was_withdrawn();
        }
        sleep(QUIET).await;
        late.into_iter().for_each(Made::answers);
        for name in 8..=11 {
            let again = desk.next().await;
            assert_eq!(again.name(), name, "{answered} answered");
            again.answers();
        }
        assert!(join(answers).await.iter().all(Result::is_ok));
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_turned_slow_must_be_brisk_for_longer() {
    let mut desk = Desk::brisk().await;
    desk.makes_one_slowly().await;
    desk.makes(BRISK_RUN).await;
    let answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
    let (first, second) = (desk.next().await, desk.next().await);
    desk.is_quiet().await;
    [first, second].into_iter().for_each(Made::answers);
    desk.next().await.answers();
    assert!(join(answers).await.iter().all(Result::is_ok));
    desk.makes(BRISK_RUN - 3).await;
    let answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
    for made in [desk.next().await, desk.next().await, desk.next().await] {
        made.answers();
    }
    assert!(join(answers).await.iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn who_gives_up_takes_back_what_has_not_begun_and_makes_room() {
    let mut desk = Desk::brisk().await;
    let answers: Vec<_> = (0..4).map(|_| desk.ask()).collect();
    let [first, second, third, fourth] = [desk.next().await, desk.next().await, desk.next().await, desk.next().await];
    answers[0].abort();
    answers[2].abort();
    third.is_withdrawn().await;
    assert!(timeout(QUIET, first.withdrawn.notified()).await.is_err(), "it has begun");
    // Until the driver has said so, it may have begun: then it has the lane that comes free.
    let waits = desk.ask();
    desk.is_quiet().await;
    second.answers();
    let fifth = desk.next().await;
    assert_eq!((fourth.name(), fifth.name()), (8, 9));
    assert_eq!(desk.device.load(), (2, LANES));
    third.was_withdrawn();
    desk.is_quiet().await;
    assert_eq!(desk.device.load(), (1, LANES));
    [first, fourth, fifth].into_iter().for_each(Made::answers);
    assert_eq!(waits.await.unwrap(), Ok(9));
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_back_too_late_has_its_time_like_any_other() {
    let mut desk = Desk::brisk().await;
    let answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
    let [first, second, third] = [desk.next().await, desk.next().await, desk.next().await];
    answers[2].abort();
    third.is_withdrawn().await;
    // A lane has begun it by then, and hangs.
    [first, second].into_iter().for_each(Made::answers);
    desk.is_quiet().await;
    assert_eq!(desk.device.load(), (0, 1));
    let restarts = desk.device.counters().restarts;
    advance(desk.device.settings().timeout).await;
    desk.is_quiet().await;
    assert_eq!(desk.device.counters().restarts, restarts + 1);
    assert_eq!(desk.device.load(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_has_not_begun_when_the_driver_dies_is_made_by_the_next() {
    let mut desk = Desk::brisk().await;
    let answers: Vec<_> = (0..5).map(|_| desk.ask()).collect();
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(desk.next().await);
    }
    // A lane answers, and begins the third, before the driver dies.
    made.remove(0).answers();
    made.push(desk.next().await);
    desk.death.notify_waiters();
    drop(made);
    for expected in [8, 9] {
        let made = desk.next().await;
        assert_eq!(made.name(), expected);
        made.answers();
    }
    let outcomes = join(answers).await;
    let restarted = Err(DeviceError::Restarted);
    assert_eq!(outcomes, [Ok(5), restarted.clone(), restarted, Ok(8), Ok(9)]);
}

#[tokio::test(start_paused = true)]
async fn what_is_ahead_when_a_lane_stalls_is_taken_back_and_made_later() {
    for comes_back in [true, false] {
        let mut desk = Desk::brisk().await;
        let hung = desk.ask();
        let first = desk.next().await;
        advance(desk.device.settings().timeout - QUIET).await;
        let answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
        let second = desk.next().await;
        for _ in 0..2 {
            let ahead = desk.next().await;
            ahead.is_withdrawn().await;
            ahead.was_withdrawn();
        }
        desk.is_quiet().await;
        // Where nothing but what is stalled is left, the driver is ended.
        let (now, later) = if comes_back { (first, Some(second)) } else { (second, None) };
        now.answers();
        for expected in [7, 8] {
            let again = desk.next().await;
            assert_eq!(again.name(), expected);
            again.answers();
        }
        later.into_iter().for_each(Made::answers);
        assert_eq!(hung.await.unwrap(), Err(DeviceError::Timeout));
        assert_eq!(join(answers).await, [Ok(6), Ok(7), Ok(8)]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_login_has_the_driver_for_itself_and_nothing_goes_before_it() {
    let mut desk = Desk::brisk().await;
    let mut answers: Vec<_> = (0..3).map(|_| desk.ask()).collect();
    let [first, second, third] = [desk.next().await, desk.next().await, desk.next().await];
    let device = desk.device.clone();
    let login = tokio::spawn(async move { device.unlock("1234".into()).await });
    desk.is_quiet().await;
    answers.push(desk.ask());
    desk.is_quiet().await;
    first.answers();
    second.answers();
    // What has the driver die would take the answer to the PIN with it.
    desk.is_quiet().await;
    third.answers();
    let unlock = desk.next().await;
    assert!(matches!(unlock.call, Call::Unlock(..)));
    desk.is_quiet().await;
    unlock.answer.send(Ok(Reply::Done)).ok().unwrap();
    desk.next().await.answers();
    assert_eq!(login.await.unwrap(), Ok(()));
    assert!(join(answers).await.iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn no_call_is_before_a_login_that_may_not_begin_before_it() {
    let mut desk = Desk::new(0);
    let mut answers = vec![desk.ask(), desk.ask()];
    let [first, second] = [desk.next().await, desk.next().await];
    answers.push(desk.ask_for(0));
    desk.is_quiet().await;
    let device = desk.device.clone();
    let login = tokio::spawn(async move { device.unlock("1234".into()).await });
    desk.is_quiet().await;
    first.answers();
    second.answers();
    let unlock = desk.next().await;
    assert!(matches!(unlock.call, Call::Unlock(..)));
    unlock.answer.send(Ok(Reply::Done)).ok().unwrap();
    desk.next().await.answers();
    assert_eq!(login.await.unwrap(), Ok(()));
    assert!(join(answers).await.iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn what_is_seen_during_a_logout_is_not_believed() {
    let mut desk = Desk::new(0);
    desk.makes(1).await;
    desk.scans.store(true, Ordering::Relaxed);
    let (device, other) = (desk.device.clone(), desk.device.clone());
    let known = device.state().scan.clone().unwrap();
    let scan = tokio::spawn(async move { other.scan().await });
    let scanned = desk.next().await;
    assert!(matches!(scanned.call, Call::Scan));
    let other = device.clone();
    let lock = tokio::spawn(async move { other.lock().await });
    let locked = desk.next().await;
    assert!(matches!(locked.call, Call::Lock), "it does not wait for the scan");
    locked.answer.send(Ok(Reply::Done)).ok().unwrap();
    assert_eq!(lock.await.unwrap(), Ok(()));
    // It had asked before the logout whether it was logged in, and found no private key after it.
    scanned.answer.send(Ok(Reply::Scan(Scan { complete: true, ..Scan::default() }))).ok().unwrap();
    scan.await.unwrap().unwrap();
    let again = desk.next().await;
    assert!(matches!(again.call, Call::Scan));
    assert!(device.is_locked() && Arc::ptr_eq(&known, device.state().scan.as_ref().unwrap()));
    let seen = Scan { status: Status { locked: true, ..Status::default() }, ..Scan::default() };
    again.answer.send(Ok(Reply::Scan(seen.clone()))).ok().unwrap();
    device.watch().wait_for(|state| state.scan.as_deref() == Some(&seen)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_token_is_not_looked_at_during_a_login() {
    let mut desk = Desk::new(0);
    desk.makes(1).await;
    desk.scans.store(true, Ordering::Relaxed);
    let (device, other) = (desk.device.clone(), desk.device.clone());
    let login = tokio::spawn(async move { device.unlock("1234".into()).await });
    let unlock = desk.next().await;
    let scan = tokio::spawn(async move { other.scan().await });
    desk.is_quiet().await;
    unlock.answer.send(Ok(Reply::Done)).ok().unwrap();
    assert_eq!(login.await.unwrap(), Ok(()));
    for _ in 0..2 {
        let scanned = desk.next().await;
        assert!(matches!(scanned.call, Call::Scan));
        scanned.answer.send(Ok(Reply::Scan(Scan::default()))).ok().unwrap();
    }
    scan.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_becomes_of_a_pin_is_heard_although_it_had_to_wait_for_a_lane() {
    let mut desk = Desk::new(0);
    let settings = desk.device.settings().clone();
    let answers = vec![desk.ask(), desk.ask()];
    let [first, second] = [desk.next().await, desk.next().await];
    let device = desk.device.clone();
    let login = tokio::spawn(async move { device.log_in("1234".into(), true).await });
    advance(settings.timeout - QUIET).await;
    first.answers();
    second.answers();
    let unlock = desk.next().await;
    advance(settings.timeout).await;
    let refused = DeviceError::PinWrong { left: Some(2) };
    unlock.answer.send(Err(refused.clone())).ok().unwrap();
    assert_eq!(login.await.unwrap(), Err(LoginError { error: refused, sent: true }));
    assert!(join(answers).await.iter().all(Result::is_ok));
}

async fn join(answers: Vec<JoinHandle<Result<u8, DeviceError>>>) -> Vec<Result<u8, DeviceError>> {
    let mut outcomes = Vec::new();
    for answer in answers {
        outcomes.push(answer.await.unwrap());
    }
    outcomes
}
