//! Our messages over a connection of a test, through the codecs that tests/protocol_vectors.rs holds to the specification.

use std::{io::Write, sync::LazyLock, time::Duration};

use strongroom::{
    agent::message::{
        Answer, Code, Collect, Collected, Failure, Finished, How, KeyUse, Name, NewSlot, Paging, ReplyError, Request,
        StoreRequest, StoredRequest, Submit, Target, compatible, read_reply,
    },
    devices::{Algorithm, CardChange, DecryptScheme, DeriveScheme, Hash, Input, NewKey, Operation, Scheme},
    vault::{
        MEMORY, Move,
        key::Grants,
        stored::{ExportForm, KeyChange, NewStored},
    },
};
use zeroize::Zeroizing;

use super::client::{Client, EXTENSION, message, put, take};

/// A signature, a plaintext, a secret or random bytes.
pub type Bytes = Zeroizing<Vec<u8>>;

/// A reply to one of our messages.
pub struct Reply {
    name: Name,
    /// The frame's body.
    pub body: Vec<u8>,
}

impl Reply {
    /// The result, or the failure.
    #[track_caller]
    pub fn read<'a, T: Answer<'a>>(&'a self) -> Result<T, Failure> {
        read_reply(self.name, &self.body).unwrap_or_else(|error| panic!("{:?}: {error}", self.name))
    }

    /// The result of what must succeed.
    #[track_caller]
    pub fn ok<'a, T: Answer<'a>>(&'a self) -> T {
        self.read().unwrap_or_else(|failure| panic!("{:?}: {failure:?}", self.name))
    }

    /// The bytes that a use of a key gave.
    #[track_caller]
    pub fn bytes(&self) -> Vec<u8> {
        self.ok::<Bytes>().to_vec()
    }

    /// The failure of what must fail, whatever its result would have been.
    #[track_caller]
    pub fn failure(&self) -> Failure {
        match self.read::<()>() {
            Err(failure) => failure,
            Ok(()) => panic!("{:?} succeeded", self.name),
        }
    }

    /// Its reason code.
    #[track_caller]
    pub fn code(&self) -> Code {
        self.failure().code
    }

    /// Why it is no reply of ours.
    #[track_caller]
    pub fn error(&self) -> ReplyError {
        match read_reply::<()>(self.name, &self.body) {
            Err(error) => error,
            Ok(_) => panic!("{:?} is answered", self.name),
        }
    }
}

/// The request's frame.
pub fn frame_of(request: &Request<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    request.put(&mut frame);
    frame
}

impl Client {
    /// Sends one of our messages.
    pub fn tell(&mut self, request: &Request<'_>) {
        self.stream.write_all(&frame_of(request)).expect("the agent reads");
    }

    /// Waits for the reply to one of our messages.
    #[track_caller]
    pub fn hear(&mut self, name: Name) -> Reply {
        Reply { name, body: self.receive().expect("a reply") }
    }

    /// Sends one of our messages and waits for its reply.
    #[track_caller]
    pub fn ask(&mut self, request: &Request<'_>) -> Reply {
        self.tell(request);
        self.hear(request.name())
    }

    /// The same of a daemon that may be gone: then `None`.
    pub fn try_ask(&mut self, request: &Request<'_>) -> Option<Reply> {
        self.stream.write_all(&frame_of(request)).ok()?;
        Some(Reply { name: request.name(), body: self.receive().ok()? })
    }

    /// Submits and is accepted.
    #[track_caller]
    pub fn submit(&mut self, id: u64, task: KeyUse<'_>, deadline_ms: u64) {
        self.ask(&submit(id, task, deadline_ms)).ok::<()>();
    }

    /// Collects once.
    #[track_caller]
    pub fn collect(&mut self, wait: Duration, max: u32) -> Collected {
        self.ask(&collect(wait, max)).ok()
    }

    /// Collects until `count` tickets are here.
    #[track_caller]
    pub fn collect_all(&mut self, count: usize) -> Vec<Finished> {
        let mut all = Vec::new();
        while all.len() < count {
            let some = self.collect(super::PATIENCE, 0);
            assert!(!some.finished.is_empty(), "{} of {count} tickets are finished, and no more", all.len());
            all.extend(some.finished);
        }
        assert_eq!(all.len(), count);
        all
    }
}

/// `list` from its beginning.
pub fn first_page(max: u32) -> Paging<'static> {
    Paging { cursor: &[], max }
}

/// A use with its deadline; 0 for the default.
pub fn use_key(task: KeyUse<'_>, deadline_ms: u64) -> Request<'_> {
    Request::Use(task, deadline(deadline_ms))
}

/// A submit with its deadline; 0 for the default.
pub fn submit(id: u64, task: KeyUse<'_>, deadline_ms: u64) -> Request<'_> {
    Request::Submit(Submit { id, deadline: deadline(deadline_ms), task })
}

fn deadline(ms: u64) -> Option<Duration> {
    (ms > 0).then(|| Duration::from_millis(ms))
}

/// A collect.
pub fn collect(wait: Duration, max: u32) -> Request<'static> {
    Request::Collect(Collect { wait, max })
}

/// The refusals of this connection.
pub fn why() -> Request<'static> {
    Request::Why { all: false, max: 0 }
}

/// `unlock` of a device.
pub fn unlock<'a>(device: &'a str, pin: &str) -> Request<'a> {
    Request::Unlock(Target::Device(device), pin.into())
}

/// What a plain sign request does.
pub fn ssh<'a>(key: &'a [u8], data: &'a [u8]) -> KeyUse<'a> {
    KeyUse { key, how: How::Ssh { flags: 0, data } }
}

/// A signature over a message.
pub fn sign<'a>(key: &'a [u8], scheme: Scheme, data: &'a [u8]) -> KeyUse<'a> {
    KeyUse { key, how: How::Operation(Operation::Sign { scheme, input: Input::Message(data.into()) }) }
}

/// An ECDSA signature over a SHA-256 digest.
pub fn sign_digest<'a>(key: &'a [u8], digest: &'a [u8]) -> KeyUse<'a> {
    let operation = Operation::Sign { scheme: Scheme::Ecdsa(Hash::Sha256), input: Input::Digest(digest.into()) };
    KeyUse { key, how: How::Operation(operation) }
}

/// A decryption without label.
pub fn decrypt<'a>(key: &'a [u8], scheme: DecryptScheme, ciphertext: &'a [u8]) -> KeyUse<'a> {
    let operation = Operation::Decrypt { scheme, label: (&[]).into(), ciphertext: ciphertext.into() };
    KeyUse { key, how: How::Operation(operation) }
}

/// An agreement on a secret.
pub fn derive<'a>(key: &'a [u8], scheme: DeriveScheme, peer: &'a [u8]) -> KeyUse<'a> {
    KeyUse { key, how: How::Operation(Operation::Derive { scheme, peer: peer.into() }) }
}

/// An X25519 key's private half, which no test needs to fit its public one.
static PRIVATE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut private = Vec::new();
    [&b"x25519@spec.torproject.org"[..], &[7; 32], &[7; 32]].into_iter().for_each(|field| put(&mut private, field));
    private
});

/// A request of each name, well formed.
pub fn one_of_each(key: &[u8]) -> Vec<Request<'_>> {
    vec![
        Request::Keys(first_page(0)),
        Request::Devices(first_page(0)),
        use_key(ssh(key, b"data"), 0),
        use_key(decrypt(key, DecryptScheme::RsaPkcs1v15, b"data"), 0),
        use_key(derive(key, DeriveScheme::Ecdh, b"data"), 0),
        submit(1, ssh(key, b"data"), 0),
        collect(Duration::ZERO, 0),
        Request::Cancel(1),
        unlock("token", "1234"),
        Request::Lock(Target::Device("token")),
        Request::Forget(Target::Device("token")),
        why(),
        Request::Random { len: 1, device: "" },
        Request::Audit { flush: false },
        Request::Check(ssh(key, b"data")),
        Request::Generate {
            deadline: None,
            device: "token",
            new: NewKey::new("new", Algorithm::Ed25519),
            terms: NewStored::default(),
        },
        Request::Import { deadline: None, key, to: to("token") },
        Request::Rename { key, name: "name" },
        Request::Allow { key, operations: Grants::ALL, proof: None },
        Request::CardStatus("token"),
        Request::ChangeCard("token", CardChange::FactoryReset { serial: String::new() }),
        Request::Delete { key, device: MEMORY, name: "name", proof: None },
        Request::Store(StoreRequest::Status),
        Request::Store(StoreRequest::Init { passphrase: "passphrase".into(), recovery: true }),
        Request::Store(StoreRequest::AddSlot { proof: "passphrase".into(), label: "label", add: NewSlot::Recovery }),
        Request::Store(StoreRequest::RemoveSlot { proof: "passphrase".into(), number: 0 }),
        Request::Store(StoreRequest::ChangePassphrase { old: "passphrase".into(), new: "another".into() }),
        Request::Stored(StoredRequest::Import {
            key: &PRIVATE,
            comment: b"comment",
            label: "label",
            confirm: false,
            terms: NewStored::default(),
        }),
        Request::Stored(StoredRequest::Set { key, proof: None, change: KeyChange::Disable }),
        Request::Stored(StoredRequest::Attach(key)),
        Request::Stored(StoredRequest::Export {
            key,
            proof: None,
            form: ExportForm::OpenSsh,
            passphrase: "passphrase".into(),
        }),
        Request::Stored(StoredRequest::Rotate { key, retires: None }),
    ]
}

/// A move to a device, and all else as it likes it.
pub fn to(device: &str) -> Move {
    Move {
        device: device.to_owned(),
        label: String::new(),
        slot: None,
        touch: None,
        secret: None,
        terms: NewStored::default(),
    }
}

/// The names that `query` lists.
pub fn query(client: &mut Client) -> Vec<String> {
    let reply = client.request(&message(EXTENSION, &[b"query"]));
    let mut rest = &reply[1..];
    assert_eq!((reply[0], take(&mut rest)), (29, &b"query"[..]));
    let mut names = Vec::new();
    while !rest.is_empty() {
        names.push(String::from_utf8(take(&mut rest).to_vec()).unwrap());
    }
    names
}

/// The names of our messages and of those of other agents.
pub fn all_names() -> Vec<&'static str> {
    let ours = Name::ALL.iter().map(|name| name.as_str());
    ours.chain(compatible::Name::ALL.iter().map(|name| name.as_str())).collect()
}

/// Every use that other agents' messages have for a key.
pub fn compatible_requests(key: &[u8]) -> Vec<compatible::Request<'_>> {
    vec![
        compatible::Request::DecryptDerive { key, data: &[4; 65] },
        compatible::Request::DecryptDerive { key, data: &[1; 256] },
        compatible::Request::Ecdh { key, partner: key },
        compatible::Request::SignPrehash { key, digest: &[1; 32] },
    ]
}

/// Sends a message of another agent.
pub fn compatible(client: &mut Client, request: &compatible::Request<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    request.put(&mut frame);
    client.request(&frame[4..])
}
