//! Clients of an agent that measure it: so many connections with so many requests in flight on each, from one thread over
//! one epoll set. A single connection with one request in flight blocks in read(2), as ssh does. Knows frames; no agent.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    event::{Timespec, epoll},
    net::{RecvFlags, recv},
    time::{ClockId, clock_gettime},
};
use signature::Verifier;
use ssh_key::{PublicKey, Signature};

use crate::support::client::{Client, REQUEST_IDENTITIES, SIGN_REQUEST, SIGN_RESPONSE, frame, message, take};

/// Before each window: until caches are warm and every thread has started.
const WARM_UP: Duration = Duration::from_millis(300);
/// How many bytes are signed.
const MESSAGE: usize = 600;
const READ: usize = 256 * 1024;

/// What is asked again and again, each time with another message, so that no answer can be an old one.
#[derive(Clone)]
pub struct Request {
    frame: Vec<u8>,
    /// Where the message begins; none in a list.
    message_at: Option<usize>,
    blob: Vec<u8>,
    count: u64,
}

impl Request {
    /// A signature; RSA keys sign with SHA-256.
    pub fn sign(blob: &[u8]) -> Self {
        let mut body = message(SIGN_REQUEST, &[blob, &[0x5a; MESSAGE]]);
        // SSH_AGENT_RSA_SHA2_256, which gpg-agent refuses for other keys.
        let flags = if take(&mut &*blob) == b"ssh-rsa" { 2 } else { 0 };
        body.extend([0, 0, 0, flags]);
        let message_at = Some(4 + 1 + 4 + blob.len() + 4);
        Self { frame: frame(&body), message_at, blob: blob.to_vec(), count: 0 }
    }

    /// A list of the keys.
    pub fn list() -> Self {
        Self { frame: frame(&[REQUEST_IDENTITIES]), message_at: None, blob: Vec::new(), count: 0 }
    }

    fn put(&mut self, out: &mut Vec<u8>) {
        self.count += 1;
        if let Some(at) = self.message_at {
            self.frame[at..at + 8].copy_from_slice(&self.count.to_be_bytes());
        }
        out.extend_from_slice(&self.frame);
    }

    /// Whether `reply` is a signature over the message that was sent last.
    fn is_signed(&self, reply: &[u8]) -> bool {
        let Some(at) = self.message_at else { return true };
        let (Ok(key), Some((&SIGN_RESPONSE, mut rest))) = (PublicKey::from_bytes(&self.blob), reply.split_first())
        else {
            return false;
        };
        let signature = Signature::try_from(take(&mut rest));
        signature.is_ok_and(|signature| key.key_data().verify(&self.frame[at..at + MESSAGE], &signature).is_ok())
    }
}

/// A load on one agent.
#[derive(Clone)]
pub struct Load {
    pub socket: PathBuf,
    pub request: Request,
    pub connections: usize,
    pub in_flight: usize,
    /// Whether behind each connection one more was opened, which sends nothing.
    pub with_idle: bool,
}

/// What a window of time showed.
pub struct Figures {
    /// Replies a second.
    pub rate: f64,
    /// From each request to its reply, in ns, sorted.
    latencies: Vec<u32>,
    /// What the clients' own thread used of a processor for one request, in µs.
    pub own_cpu_us: f64,
    /// How many replies there were.
    pub count: usize,
}

impl Figures {
    /// The latency that so many hundredths of the requests do not exceed, in µs.
    pub fn percentile(&self, percent: f64) -> f64 {
        let at = (self.latencies.len().saturating_sub(1)) as f64 * percent / 100.0;
        self.latencies.get(at as usize).map_or(0.0, |ns| f64::from(*ns) / 1000.0)
    }
}

struct Connection {
    stream: UnixStream,
    sent: VecDeque<Instant>,
    /// What arrived and is not a whole reply yet.
    input: Vec<u8>,
}

impl Load {
    /// Signatures of the key `blob`.
    pub fn sign(socket: &Path, blob: &[u8], connections: usize, in_flight: usize) -> Self {
        let request = Request::sign(blob);
        Self { socket: socket.to_owned(), request, connections, in_flight, with_idle: false }
    }

    /// Keeps the agent busy for the window, and a little before. `began` and `ended` are called around the window.
    pub fn run(&self, window: Duration, began: impl FnOnce(), ended: impl FnOnce()) -> Figures {
        let mut idle = Vec::new();
        let mut connections: Vec<_> = (0..self.connections)
            .map(|_| {
                let stream = UnixStream::connect(&self.socket).expect("the agent accepts");
                if self.with_idle {
                    idle.push(UnixStream::connect(&self.socket).expect("the agent accepts"));
                }
                Connection { stream, sent: VecDeque::new(), input: Vec::new() }
            })
            .collect();
        let mut request = self.request.clone();
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set");
        for (n, connection) in connections.iter().enumerate() {
            let data = epoll::EventData::new_u64(n as u64);
            epoll::add(&set, &connection.stream, data, epoll::EventFlags::IN).expect("a place in it");
        }
        for connection in &mut connections {
            connection.ask(&mut request, self.in_flight);
        }
        let blocks = self.connections == 1 && self.in_flight == 1;
        let (mut events, mut buffer, mut last) = (Vec::with_capacity(256), vec![0; READ], Vec::new());
        let mut clock = Clock { start: Instant::now() + WARM_UP, window, began: Some(began), ended: Some(ended) };
        let mut figures = Figures { rate: 0.0, latencies: Vec::new(), own_cpu_us: 0.0, count: 0 };
        let mut cpu = Duration::ZERO;
        loop {
            if blocks {
                let now = connections[0].take(&mut buffer, &mut last, |ns| figures.latencies.push(ns), true);
                // Some agents write a reply in pieces.
                if !connections[0].sent.is_empty() {
                    continue;
                }
                if now >= clock.start + window {
                    break;
                }
                // Nothing else is in flight: this is the reply to the last request.
                if clock.begins(now) {
                    assert!(request.is_signed(&last), "that is no signature");
                    (figures.latencies, cpu) = (Vec::with_capacity(1 << 16), own_cpu());
                }
                connections[0].ask(&mut request, 1);
                continue;
            }
            events.clear();
            let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
            epoll::wait(&set, spare_capacity(&mut events), Some(&patience)).expect("events");
            assert!(!events.is_empty(), "no reply for a minute");
            let mut now = Instant::now();
            for event in &events {
                let connection = &mut connections[event.data.u64() as usize];
                now = connection.take(&mut buffer, &mut last, |ns| figures.latencies.push(ns), false);
                connection.ask(&mut request, self.in_flight);
            }
            if now >= clock.start + window {
                break;
            }
            if clock.begins(now) {
                (figures.latencies, cpu) = (Vec::with_capacity(1 << 18), own_cpu());
            }
        }
        let elapsed = clock.start.elapsed();
        let cpu = own_cpu() - cpu;
        clock.ends();
        figures.count = figures.latencies.len();
        figures.rate = figures.count as f64 / elapsed.as_secs_f64();
        figures.own_cpu_us = cpu.as_secs_f64() * 1e6 / figures.count.max(1) as f64;
        figures.latencies.sort_unstable();
        figures
    }
}

/// When the window begins and ends.
struct Clock<B, E> {
    start: Instant,
    window: Duration,
    began: Option<B>,
    ended: Option<E>,
}

impl<B: FnOnce(), E: FnOnce()> Clock<B, E> {
    /// True once, when it begins.
    fn begins(&mut self, now: Instant) -> bool {
        if now < self.start {
            return false;
        }
        let Some(began) = self.began.take() else { return false };
        began();
        self.start = Instant::now();
        true
    }

    fn ends(&mut self) {
        debug_assert!(self.window > Duration::ZERO);
        if let Some(ended) = self.ended.take() {
            ended();
        }
    }
}

impl Connection {
    /// Sends as many requests as may be in flight.
    fn ask(&mut self, request: &mut Request, in_flight: usize) {
        let mut out = Vec::new();
        while self.sent.len() < in_flight {
            request.put(&mut out);
            self.sent.push_back(Instant::now());
        }
        self.stream.write_all(&out).expect("the agent reads");
    }

    /// Takes what has arrived; tells the latency of each reply, and leaves the last in `last`.
    fn take(&mut self, buffer: &mut [u8], last: &mut Vec<u8>, mut told: impl FnMut(u32), blocks: bool) -> Instant {
        let n = if blocks {
            self.stream.read(buffer).expect("a reply")
        } else {
            recv(&self.stream, &mut *buffer, RecvFlags::DONTWAIT).expect("a reply").1
        };
        assert!(n > 0, "the agent hung up");
        let now = Instant::now();
        let whole = self.input.is_empty();
        if !whole {
            self.input.extend_from_slice(&buffer[..n]);
        }
        let bytes = if whole { &buffer[..n] } else { &self.input[..] };
        let mut rest = bytes;
        while let Some((length, body)) = rest.split_first_chunk::<4>()
            && let Some((reply, behind)) = body.split_at_checked(u32::from_be_bytes(*length) as usize)
        {
            assert!(reply.len() > 1, "the agent refuses");
            let sent = self.sent.pop_front().expect("a request for the reply");
            told(u32::try_from((now - sent).as_nanos()).unwrap_or(u32::MAX));
            if blocks {
                last.clear();
                last.extend_from_slice(reply);
            }
            rest = behind;
        }
        let rest = rest.to_vec();
        self.input = rest;
        now
    }
}

/// What this thread has used of a processor.
fn own_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// How often a second so many threads connect, have one signature and close.
pub fn churn(socket: &Path, blob: &[u8], threads: usize, window: Duration) -> f64 {
    let (start, request) = (Instant::now(), Request::sign(blob));
    let counts = thread::scope(|scope| {
        let act = || {
            let (mut request, mut out, mut count) = (request.clone(), Vec::new(), 0u64);
            while start.elapsed() < window {
                out.clear();
                request.put(&mut out);
                let mut client = Client::connect(socket);
                client.stream.write_all(&out).expect("the agent reads");
                assert_eq!(client.receive().expect("a reply")[0], SIGN_RESPONSE);
                count += 1;
            }
            count
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(act)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).sum::<u64>()
    });
    counts as f64 / start.elapsed().as_secs_f64()
}
