//! The agent protocol (RFC 9987) by hand, so that a test can also say what no honest client says.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use rustix::rand::{GetRandomFlags, getrandom};
use ssh_key::private::Ed25519Keypair;

use super::{PATIENCE, eventually};

pub const FAILURE: u8 = 5;
pub const SUCCESS: u8 = 6;
pub const REQUEST_IDENTITIES: u8 = 11;
pub const IDENTITIES_ANSWER: u8 = 12;
pub const SIGN_REQUEST: u8 = 13;
pub const SIGN_RESPONSE: u8 = 14;
pub const ADD_IDENTITY: u8 = 17;
pub const REMOVE_IDENTITY: u8 = 18;
pub const REMOVE_ALL: u8 = 19;
pub const LOCK: u8 = 22;
pub const UNLOCK: u8 = 23;
pub const ADD_ID_CONSTRAINED: u8 = 25;
pub const EXTENSION: u8 = 27;
pub const EXTENSION_FAILURE: u8 = 28;

/// The longest message an agent takes.
pub const MAX_MESSAGE: usize = 262_144;

/// Appends an SSH `string`.
pub fn put(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    to.extend(bytes);
}

/// A message: its type, then `strings`.
pub fn message(kind: u8, strings: &[&[u8]]) -> Vec<u8> {
    let mut body = vec![kind];
    strings.iter().for_each(|s| put(&mut body, s));
    body
}

/// A message with its length in front.
pub fn frame(body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(body.len() + 4);
    put(&mut frame, body);
    frame
}

/// Takes an SSH `string` off the front.
pub fn take<'a>(from: &mut &'a [u8]) -> &'a [u8] {
    let len = take_u32(from) as usize;
    let (head, tail) = from.split_at(len);
    *from = tail;
    head
}

/// Takes a `uint32` off the front.
pub fn take_u32(from: &mut &[u8]) -> u32 {
    let (head, tail) = from.split_first_chunk().expect("four bytes");
    *from = tail;
    u32::from_be_bytes(*head)
}

/// An Ed25519 key made for one test.
pub struct Key {
    pair: Ed25519Keypair,
}

impl Key {
    /// A new key.
    pub fn random() -> Self {
        Self { pair: Ed25519Keypair::from_seed(&random()) }
    }

    /// The secret.
    pub fn seed(&self) -> [u8; 32] {
        self.pair.private.to_bytes()
    }

    /// The public key blob.
    pub fn blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        put(&mut blob, b"ssh-ed25519");
        put(&mut blob, self.pair.public.as_ref());
        blob
    }

    /// The message that adds this key under `constraints`, which are written as on the wire.
    pub fn add_message(&self, comment: &[u8], constraints: &[u8]) -> Vec<u8> {
        let kind = if constraints.is_empty() { ADD_IDENTITY } else { ADD_ID_CONSTRAINED };
        let mut body = message(kind, &[b"ssh-ed25519", self.pair.public.as_ref(), &self.pair.to_bytes(), comment]);
        body.extend(constraints);
        body
    }

    /// The message that asks for a signature over `data`.
    pub fn sign_message(&self, data: &[u8]) -> Vec<u8> {
        let mut body = message(SIGN_REQUEST, &[&self.blob(), data]);
        body.extend([0; 4]);
        body
    }

    /// Whether `reply` is a sign response with this key's signature over `data`.
    pub fn signed(&self, data: &[u8], reply: &[u8]) -> bool {
        let Some((&SIGN_RESPONSE, mut rest)) = reply.split_first() else { return false };
        let mut signature = take(&mut rest);
        take(&mut signature) == b"ssh-ed25519"
            && UnparsedPublicKey::new(&ED25519, self.pair.public.as_ref()).verify(data, take(&mut signature)).is_ok()
    }

    /// The fingerprint as OpenSSH prints it.
    pub fn fingerprint(&self) -> String {
        ssh_key::PublicKey::from_bytes(&self.blob()).unwrap().fingerprint(ssh_key::HashAlg::Sha256).to_string()
    }
}

/// 32 unpredictable bytes.
pub fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    getrandom(&mut bytes, GetRandomFlags::empty()).unwrap();
    bytes
}

/// `SSH_AGENT_CONSTRAIN_LIFETIME`.
pub fn lifetime(seconds: u32) -> Vec<u8> {
    let mut constraint = vec![1];
    constraint.extend(seconds.to_be_bytes());
    constraint
}

/// `SSH_AGENT_CONSTRAIN_CONFIRM`.
pub const CONFIRM: &[u8] = &[2];

/// One connection.
pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    /// Connects to the agent at `socket`.
    pub fn connect(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).expect("the agent accepts"))
    }

    /// The same, of one that is just starting: a socket's file is there before anybody listens.
    #[track_caller]
    pub fn connect_to_starting(what: &str, socket: &Path) -> Self {
        let mut stream = None;
        eventually(what, || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        Self::over(stream.expect("a connection"))
    }

    fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// Connects as another user, which only root can play.
    pub fn connect_as(socket: &Path, uid: u32) -> Self {
        let socket = socket.to_owned();
        // The credentials are those of the thread that connects, and end with it.
        let connecting = std::thread::spawn(move || {
            let uid = rustix::process::Uid::from_raw(uid);
            rustix::thread::set_thread_res_uid(uid, uid, uid).expect("root plays another user");
            Self::connect(&socket)
        });
        connecting.join().expect("the agent accepts")
    }

    /// The socket, to end the connection from elsewhere.
    pub fn socket(&self) -> UnixStream {
        self.stream.try_clone().expect("a descriptor")
    }

    /// Sends a message.
    pub fn send(&mut self, body: &[u8]) {
        self.stream.write_all(&frame(body)).expect("the agent reads");
    }

    /// Waits for the next reply.
    pub fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut len = [0; 4];
        self.stream.read_exact(&mut len)?;
        let mut body = vec![0; u32::from_be_bytes(len) as usize];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    /// Sends a message and waits for its reply.
    #[track_caller]
    pub fn request(&mut self, body: &[u8]) -> Vec<u8> {
        self.send(body);
        self.receive().expect("a reply")
    }

    /// Adds a key.
    #[track_caller]
    pub fn add(&mut self, key: &Key, comment: &str, constraints: &[u8]) {
        assert_eq!(self.request(&key.add_message(comment.as_bytes(), constraints)), [SUCCESS], "adding {comment}");
    }

    /// A signature that verifies.
    #[track_caller]
    pub fn sign(&mut self, key: &Key) {
        let data = random();
        let reply = self.request(&key.sign_message(&data));
        assert!(key.signed(&data, &reply), "no signature: {reply:?}");
    }

    /// The identities: blob and comment.
    #[track_caller]
    pub fn list(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        identities(&self.request(&[REQUEST_IDENTITIES]))
    }

    /// The identities' comments.
    #[track_caller]
    pub fn comments(&mut self) -> Vec<String> {
        self.list().into_iter().map(|(_, comment)| String::from_utf8_lossy(&comment).into_owned()).collect()
    }

    /// Whether the agent has closed this connection, without a further byte.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(n) => n == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

/// Reads a list of identities; nothing may follow it.
#[track_caller]
pub fn identities(reply: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (&kind, mut rest) = reply.split_first().expect("a message");
    assert_eq!(kind, IDENTITIES_ANSWER);
    let count = take_u32(&mut rest);
    let list = (0..count).map(|_| (take(&mut rest).to_vec(), take(&mut rest).to_vec())).collect();
    assert!(rest.is_empty(), "bytes after the list");
    list
}
