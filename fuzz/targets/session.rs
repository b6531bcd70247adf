//! The whole front, from a connection's bytes to the vault and back. Every request gets one reply, of a kind that its
//! number allows, in its turn; every signature verifies; whatever was done, the vault can be used afterwards.
//!
//! Input: the length of the pieces in which the client writes (0 for one piece), how it ends (odd: it hangs up without
//! waiting for replies), the stream.
#![no_main]

use std::{
    sync::{Arc, LazyLock},
    thread,
    time::{Duration, Instant},
};

use libfuzzer_sys::fuzz_target;
use strongroom::{
    agent::{
        door::Door,
        frame::{self, MAX_FRAME},
        session,
        wire::{Request, number},
    },
    devices::soft::SoftParts,
    prompt::{self, Environment, Prompter},
    public_key::{Blob, FingerprintHash, KeyType, PublicKey},
    rfc4251::Reader,
    vault::{Candidate, Parts, Settings, Vault, key::Caller, policy::Rules, soft_key, store::Store},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf},
    runtime::{Builder, Runtime},
    task::{spawn_blocking, yield_now},
    time::advance,
};

/// RFC 8032, section 7.1, test 1: the key that the vault holds when a client comes. The seeds sign with it.
const SEED: [u8; 32] = [
    0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44, 0x49, 0xc5,
    0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
];
const PUBLIC: [u8; 32] = [
    0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e, 0xe1, 0x72,
    0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
];

/// Each lock and unlock costs 50 ms by design. An input with more of them teaches nothing new.
const MAX_LOCKS: usize = 2;
/// No lock takes as long as this, in real time.
const PATIENCE: Duration = Duration::from_secs(20);

/// One runtime and one vault for all inputs: a vault's compute threads live as long as the process. The clock stands
/// still but for [`time_flies`].
static WORLD: LazyLock<(Runtime, Arc<Vault>)> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    let settings = Settings {
        rules: Rules { restrict_websafe: true, websafe_allow: None, fingerprint_hash: FingerprintHash::Sha256 },
        default_lifetime: None,
        allowed_providers: "/nonexistent/*".into(),
        allow_remote_providers: true,
        ..Settings::default()
    };
    // No display: whatever asks a person is refused at once.
    let prompts = prompt::Settings { environment: Environment::Only(Default::default()), ..Default::default() };
    (runtime, Vault::new(settings, Parts::new(Prompter::new(prompts), Store::in_memory().unwrap())))
});

fuzz_target!(
    init: {
        // SAFETY: no other thread runs yet. No authenticator of this machine is to be asked for a touch.
        unsafe { std::env::set_var("SSH_SK_HELPER", "/nonexistent/ssh-sk-helper") };
    },
    |input: &[u8]| {
        let [piece, ending, stream @ ..] = input else { return };
        let (bodies, broken) = split(stream);
        if bodies.iter().filter(|body| [number::LOCK, number::UNLOCK].contains(&body[0])).count() > MAX_LOCKS {
            return;
        }
        let client = Client { stream, piece: *piece, hangs_up: ending & 1 != 0, bodies, broken };
        let (runtime, vault) = &*WORLD;
        runtime.block_on(async {
            tokio::select! {
                () = one_connection(vault, &client) => {}
                () = time_flies() => {}
            }
        });
    }
);

struct Client<'a> {
    stream: &'a [u8],
    piece: u8,
    hangs_up: bool,
    /// The complete frames.
    bodies: Vec<&'a [u8]>,
    /// Whether what follows them breaks the framing.
    broken: bool,
}

fn split(mut stream: &[u8]) -> (Vec<&[u8]>, bool) {
    let mut bodies = Vec::new();
    loop {
        match frame::first(stream) {
            Ok(Some(body)) => {
                bodies.push(body);
                stream = &stream[4 + body.len()..];
            }
            Ok(None) => return (bodies, false),
            Err(_) => return (bodies, true),
        }
    }
}

/// A hundred times as fast as outside: a deadline of 30 s takes 0.3 s, so the compute threads still beat it. The task
/// that sleeps keeps the runtime from jumping to the next timer whenever it is idle.
async fn time_flies() {
    loop {
        let _ = spawn_blocking(|| thread::sleep(Duration::from_millis(1))).await;
        advance(Duration::from_millis(100)).await;
    }
}

async fn one_connection(vault: &Arc<Vault>, client: &Client<'_>) {
    let caller = Caller::default();
    let key = soft_key(&SoftParts::Ed25519 { seed: &SEED, public: &PUBLIC }).expect("a good key");
    let candidate = Candidate {
        blob: PublicKey::Ed25519(&PUBLIC).to_blob(),
        key_type: KeyType::Ed25519,
        comment: (*b"fuzz").into(),
        lifetime: None,
        confirm: false,
        destinations: Box::default(),
    };
    vault.add(&caller, candidate, key).expect("an open vault");
    let (near, far) = tokio::io::duplex(64 * 1024);
    tokio::join!(
        session::serve(far, Arc::clone(vault), Arc::new(Door::ssh_agent()), caller.clone(), std::future::pending()),
        client.talk(near)
    );
    reopen(vault, client).await;
    vault.wipe();
}

impl Client<'_> {
    async fn talk(&self, stream: DuplexStream) {
        let (mut replies, mut requests) = tokio::io::split(stream);
        let write = async {
            let piece = if self.piece == 0 { self.stream.len().max(1) } else { self.piece.into() };
            for piece in self.stream.chunks(piece) {
                if requests.write_all(piece).await.is_err() {
                    break;
                }
                yield_now().await;
            }
        };
        if self.hangs_up {
            tokio::select! {
                () = write => {}
                () = self.take_replies(&mut replies) => {}
            }
            return;
        }
        tokio::join!(write, self.take_replies(&mut replies));
        let _ = requests.shutdown().await;
        let mut more = Vec::new();
        let _ = replies.read_to_end(&mut more).await;
        assert!(more.is_empty(), "more replies than requests: {more:?}");
    }

    /// Takes a reply to each request. A broken frame ends the connection, and with it what was still in flight.
    async fn take_replies(&self, replies: &mut ReadHalf<DuplexStream>) {
        for (n, request) in self.bodies.iter().enumerate() {
            let Some(reply) = read_frame(replies).await else {
                assert!(self.broken, "{n} replies to {} requests", self.bodies.len());
                return;
            };
            check(request, &reply);
        }
        if self.broken {
            assert!(read_frame(replies).await.is_none(), "a reply to a broken frame");
        }
    }
}

async fn read_frame(replies: &mut ReadHalf<DuplexStream>) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    if replies.read(&mut head[..1]).await.ok()? == 0 {
        return None;
    }
    replies.read_exact(&mut head[1..]).await.expect("a reply's length");
    let len = u32::from_be_bytes(head) as usize;
    assert!((1..=MAX_FRAME).contains(&len), "a reply of {len} bytes");
    let mut body = vec![0; len];
    replies.read_exact(&mut body).await.expect("a complete reply");
    Some(body)
}

/// Whether the reply is one that the request can have.
fn check(request: &[u8], reply: &[u8]) {
    use number::*;
    let mut r = Reader::new(&reply[1..]);
    match (request[0], reply[0]) {
        (_, FAILURE) => {}
        (SIGN_REQUEST | REQUEST_IDENTITIES, SUCCESS) => panic!("success is no answer to message {}", request[0]),
        (_, SUCCESS) | (EXTENSION, EXTENSION_FAILURE) => {}
        (REQUEST_IDENTITIES, IDENTITIES_ANSWER) => {
            for _ in 0..r.u32().expect("the count") {
                Blob::parse(r.string().expect("a blob")).expect("a key");
                r.string().expect("a comment");
            }
        }
        (SIGN_REQUEST, SIGN_RESPONSE) => {
            let Ok(Request::Sign(request)) = Request::read(request) else { panic!("it was signed but does not read") };
            let signature = r.string().expect("a signature");
            let blob = Blob::parse(request.blob).expect("it was signed with this key");
            blob.key().verify(request.data, signature).expect("a signature that verifies");
        }
        (EXTENSION, EXTENSION_RESPONSE) => {
            assert_eq!(r.string(), Ok(&b"query"[..]));
            while !r.is_empty() {
                r.string().expect("a name");
            }
        }
        (request, reply) => panic!("reply {reply} to message {request}"),
    }
    r.finish().expect("nothing behind the reply");
}

/// Unlocks the vault if the client locked it: the password is in what it sent.
async fn reopen(vault: &Arc<Vault>, client: &Client<'_>) {
    let passwords: Vec<&[u8]> = (client.bodies.iter())
        .filter_map(|body| match Request::read(body) {
            Ok(Request::Lock(password)) => Some(password),
            _ => None,
        })
        .collect();
    let began = Instant::now();
    while vault.check_open().is_err() {
        assert!(began.elapsed() < PATIENCE, "the vault stays locked");
        for password in &passwords {
            let caller = Arc::new(Caller::default());
            let _ = Arc::clone(vault).unlock(caller, password.to_vec().into()).await;
        }
    }
}
