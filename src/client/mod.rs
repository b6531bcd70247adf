//! A client of the service door: for our own command line, and for other daemons in Rust. Knows our messages and the
//! socket; no vault.
//!
//! One [`Client`] is one connection, shared by its clones. Uses of keys are submitted as tickets, so that thousands can be
//! under way at once, each with its deadline; dropping the future of one cancels it. A task of its own owns the socket.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use strongroom::{
//!     client::{self, Client},
//!     devices::{Hash, Input, Scheme},
//! };
//!
//! # async fn sign() -> Result<(), client::ClientError> {
//! let client = Client::connect(client::default_path()).await?;
//! let keys = client.keys().await?;
//! if let Some(key) = keys.iter().find(|key| key.name == "authority") {
//!     let vote = Input::Message(b"the vote".into());
//!     let deadline = Some(Duration::from_secs(5));
//!     match client.sign(&key.blob, Scheme::RsaPss(Hash::Sha256), vote, deadline).await {
//!         Ok(signature) => println!("{} bytes", signature.len()),
//!         Err(error) => println!("no signature: {error}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! When the daemon ends or is restarted, what was under way fails with [`ClientError::Lost`]: whether it was done is not
//! known. The next request connects again, for up to five seconds. Nothing is ever sent twice.
//!
//! At a socket where none of our messages is spoken, any ssh-agent's, a client does what the agent protocol can
//! (RFC 9987): it lists the keys, and signs in the scheme `ssh` and in those that are hidden in it (Ed25519, ECDSA with
//! the curve's own hash, RSA PKCS#1 v1.5 with SHA-256 and SHA-512) over messages. All else is
//! [`ClientError::Unsupported`].

mod connection;
mod error;
mod list;
mod plain;

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use secrecy::{SecretSlice, SecretString};
use zeroize::Zeroizing;

use self::connection::Link;
pub use self::{
    error::ClientError,
    list::{Device, Key, Place, Refusal, Slot, Store},
};
use crate::{
    agent::{
        message::{
            Answer, Failure, How, KeyUse, Name, Paging, ReplyError, Request, StoreRequest, Target, read_reply, scheme,
        },
        wire::number,
    },
    config::DoorKind,
    devices::{CardChange, CardStatus, DecryptScheme, DeriveScheme, Input, Operation, Scheme},
    key_file::KeyFile,
    rfc4251::{Put, Reader},
    vault::audit::Head,
};

/// How much longer than a request's deadline its answer is waited for: the daemon's own `timeout` should come first.
pub const GRACE: Duration = Duration::from_millis(250);
/// How long an answer may take that needs no device and no person. A daemon that is slower than this is given up.
const PROMPT: Duration = Duration::from_secs(10);
/// How long any other message may take, where nobody says.
const PATIENT: Duration = Duration::from_secs(150);
/// The most pages of a list that are fetched.
const MAX_PAGES: usize = 1024;

/// The service door's default socket: `$XDG_RUNTIME_DIR/strongroom/service`, or `/run/strongroom/service`.
pub fn default_path() -> PathBuf {
    DoorKind::Service.default_path()
}

/// Whether a signature of this scheme by this key can be taken out of one in SSH's form: Ed25519, ECDSA with the curve's
/// own hash, RSA PKCS#1 v1.5 with SHA-256 and SHA-512.
pub fn through_ssh(key: &[u8], scheme: Scheme) -> bool {
    plain::Hidden::find(key, scheme).is_some()
}

/// A connection to the service door, or to another agent. Clones share it; it closes with the last of them.
///
/// Every method fails with [`ClientError`], whose documentation says what each reason means. Beyond 16,384 uses of keys
/// at once, and 1 MiB of requests that the daemon has not read, requests wait for room, up to their deadline.
#[derive(Clone)]
pub struct Client {
    link: Link,
    spoken: Arc<[Name]>,
}

/// The reply to a message: an answer that borrows from it. It is wiped when it is dropped.
pub struct Reply {
    name: Name,
    body: Zeroizing<Vec<u8>>,
}

impl Reply {
    /// The answer, or why there is none.
    pub fn read<'a, T: Answer<'a>>(&'a self) -> Result<T, ClientError> {
        read_reply(self.name, &self.body)?.map_err(ClientError::Refused)
    }
}

impl Client {
    /// Connects to the daemon that listens at `path`, and asks what it speaks. It must be called within a tokio runtime,
    /// which runs the connection from then on.
    pub async fn connect(path: impl Into<PathBuf>) -> Result<Self, ClientError> {
        let link = Link::connect(path.into()).await?;
        let mut query = Vec::new();
        query.put_string(&[&[number::EXTENSION][..], &[0, 0, 0, 5], b"query"].concat());
        let spoken = spoken(&link.message(query.into(), PROMPT).await?);
        Ok(Self { link, spoken })
    }

    /// The path it was connected to.
    pub fn path(&self) -> &Path {
        self.link.path()
    }

    /// Whether the message is spoken there. Of other agents none is.
    pub fn speaks(&self, name: Name) -> bool {
        self.spoken.contains(&name)
    }

    /// Signs `input`. The signature has the scheme's own form (docs/protocol.md, section 4).
    ///
    /// `key` is a public key's blob, or a certificate's. Without a deadline the device's default holds.
    pub async fn sign(
        &self,
        key: &[u8],
        scheme: Scheme,
        input: Input<'_>,
        deadline: Option<Duration>,
    ) -> Result<Vec<u8>, ClientError> {
        let task = KeyUse { key, how: How::Operation(Operation::Sign { scheme, input }) };
        Ok(std::mem::take(&mut *self.operate(task, deadline).await?))
    }

    /// Does what a plain sign request does, the scheme `ssh`: gives an SSH signature blob over `data`. The flags are the
    /// request's (RFC 9987, section 3.6.1): 2 for RSA with SHA-256, 4 for RSA with SHA-512.
    pub async fn sign_ssh(
        &self,
        key: &[u8],
        data: &[u8],
        flags: u32,
        deadline: Option<Duration>,
    ) -> Result<Vec<u8>, ClientError> {
        let task = KeyUse { key, how: How::Ssh { flags, data } };
        Ok(std::mem::take(&mut *self.operate(task, deadline).await?))
    }

    /// Signs a message by way of a plain sign request, and takes the signature out of SSH's form: for keys that are
    /// granted no more than that, those that came by `ssh-add` among them. The schemes are those that [`through_ssh`]
    /// admits; all others are [`ClientError::Unsupported`].
    pub async fn sign_through_ssh(
        &self,
        key: &[u8],
        scheme: Scheme,
        message: &[u8],
        deadline: Option<Duration>,
    ) -> Result<Vec<u8>, ClientError> {
        let Some(hidden) = plain::Hidden::find(key, scheme) else {
            return Err(ClientError::Unsupported(scheme::sign_name(scheme).unwrap_or("sign")));
        };
        Ok(hidden.unwrap(&self.sign_ssh(key, message, hidden.flags, deadline).await?)?)
    }

    /// Decrypts. The label is OAEP's, and empty with other schemes.
    pub async fn decrypt(
        &self,
        key: &[u8],
        scheme: DecryptScheme,
        label: &[u8],
        ciphertext: &[u8],
        deadline: Option<Duration>,
    ) -> Result<SecretSlice<u8>, ClientError> {
        let operation = Operation::Decrypt { scheme, label: label.into(), ciphertext: ciphertext.into() };
        self.operate(KeyUse { key, how: How::Operation(operation) }, deadline).await.map(secret)
    }

    /// Agrees on a secret with a peer, whose public key has the scheme's form.
    pub async fn derive(
        &self,
        key: &[u8],
        scheme: DeriveScheme,
        peer: &[u8],
        deadline: Option<Duration>,
    ) -> Result<SecretSlice<u8>, ClientError> {
        let operation = Operation::Derive { scheme, peer: peer.into() };
        self.operate(KeyUse { key, how: How::Operation(operation) }, deadline).await.map(secret)
    }

    /// Lists the keys: all pages.
    pub async fn keys(&self) -> Result<Vec<Key>, ClientError> {
        if !self.speaks(Name::Keys) {
            return plain::keys(&self.link).await;
        }
        self.pages(Name::Keys, list::keys).await
    }

    /// Lists the devices: all pages.
    pub async fn devices(&self) -> Result<Vec<Device>, ClientError> {
        self.pages(Name::Devices, list::devices).await
    }

    /// Lists the last refusals, the newest first: at most `max`, 0 for all there are. They are those of this connection,
    /// or of all of this uid.
    pub async fn why(&self, all: bool, max: u32) -> Result<Vec<Refusal>, ClientError> {
        list::refusals(&self.request(&Request::Why { all, max }).await?)
    }

    /// Puts a key into the agent's memory, as `ssh-add` does (RFC 9987, section 3.2): for `lifetime` seconds where that is
    /// said, and with each use confirmed by a person where that is asked. Any agent does this.
    ///
    /// Where our messages are spoken, a refusal has its reason.
    pub async fn add(
        &self,
        key: &KeyFile,
        comment: &str,
        lifetime: Option<NonZeroU32>,
        confirm: bool,
    ) -> Result<(), ClientError> {
        let body = self.link.message(plain::add_request(key, comment, lifetime, confirm), PATIENT).await?;
        match body.first() {
            Some(&number::SUCCESS) => Ok(()),
            Some(&number::FAILURE) => Err(self.last_refusal("add").await),
            _ => Err(ReplyError::Unexpected.into()),
        }
    }

    /// Why a plain message of this connection was just refused.
    async fn last_refusal(&self, message: &str) -> ClientError {
        let refusals = if self.speaks(Name::Why) { self.why(false, 1).await } else { Ok(Vec::new()) };
        match refusals.map(|refusals| refusals.into_iter().find(|refusal| refusal.message == message)) {
            Ok(Some(refusal)) => ClientError::Refused(Failure::new(refusal.code, refusal.reason)),
            Ok(None) => plain::refused("the agent refuses, and does not say why"),
            Err(error) => error,
        }
    }

    /// Gives 1 to 1,024 random bytes, of this device or of the daemon's own generator.
    pub async fn random(&self, len: u32, device: Option<&str>) -> Result<SecretSlice<u8>, ClientError> {
        let reply = self.request(&Request::Random { len, device: device.unwrap_or_default() }).await?;
        reply.read().map(secret)
    }

    /// Gives a device its PIN, or the device that holds a key; the store its passphrase or recovery key. A refused PIN has
    /// cost a try.
    pub async fn unlock(&self, target: Target<'_>, secret: SecretString) -> Result<(), ClientError> {
        self.request(&Request::Unlock(target, secret)).await?.read()
    }

    /// Makes a device want its PIN again.
    pub async fn lock(&self, target: Target<'_>) -> Result<(), ClientError> {
        self.request(&Request::Lock(target)).await?.read()
    }

    /// Wipes cached secrets; keys stay registered.
    pub async fn forget(&self, target: Target<'_>) -> Result<(), ClientError> {
        self.request(&Request::Forget(target)).await?.read()
    }

    /// Tells how far the audit log is written, everything recorded before included.
    pub async fn audit(&self) -> Result<Head, ClientError> {
        self.request(&Request::Audit { flush: true }).await?.read()
    }

    /// What there is of the encrypted store, for the vault's own user and root.
    pub async fn store(&self) -> Result<Store, ClientError> {
        list::store(&self.request(&Request::Store(StoreRequest::Status)).await?)
    }

    /// What the OpenPGP card that is this device says of itself.
    pub async fn card_status(&self, device: &str) -> Result<CardStatus, ClientError> {
        self.request(&Request::CardStatus(device)).await?.read()
    }

    /// Changes the OpenPGP card that is this device. A PIN in it that the card refuses has cost a try.
    pub async fn change_card(&self, device: &str, change: CardChange) -> Result<(), ClientError> {
        self.request(&Request::ChangeCard(device, change)).await?.read()
    }

    /// Sends any message but those about tickets, which are the client's own affair, and waits for its reply: up to two
    /// and a half minutes, unless it needs neither a device nor a person. Messages have their turn one after the other.
    pub async fn request(&self, request: &Request<'_>) -> Result<Reply, ClientError> {
        let time = match request.name() {
            Name::Keys | Name::Devices | Name::Why | Name::Audit | Name::Store => PROMPT,
            _ => PATIENT,
        };
        self.request_within(request, time).await
    }

    /// The same, with as much time as its answer may take once its turn has come. A daemon that takes longer is given up:
    /// the connection ends, and whatever else was under way fails with it.
    pub async fn request_within(&self, request: &Request<'_>, time: Duration) -> Result<Reply, ClientError> {
        let name = request.name();
        if matches!(name, Name::Submit | Name::Collect | Name::Cancel) || !self.speaks(name) {
            return Err(ClientError::Unsupported(name.short()));
        }
        let mut frame = Zeroizing::new(Vec::new());
        request.put(&mut frame);
        let body = self.link.message(frame, time).await?;
        Ok(Reply { name, body })
    }

    /// Uses a key, in whatever way this agent offers.
    async fn operate(&self, task: KeyUse<'_>, deadline: Option<Duration>) -> Result<Zeroizing<Vec<u8>>, ClientError> {
        if [Name::Submit, Name::Collect, Name::Cancel].iter().all(|name| self.speaks(*name)) {
            return self.link.ticket(task, deadline).await;
        }
        let answer = async {
            if self.speaks(task.name()) {
                let time = connection::patience(deadline);
                self.request_within(&Request::Use(task, deadline), time).await?.read()
            } else {
                plain::operate(&self.link, task, deadline).await
            }
        };
        connection::within(deadline, answer).await
    }

    async fn pages<T>(
        &self,
        list: Name,
        read: fn(&Reply) -> Result<list::Part<T>, ClientError>,
    ) -> Result<Vec<T>, ClientError> {
        let (mut all, mut cursor) = (Vec::new(), Vec::new());
        for _ in 0..MAX_PAGES {
            let paging = Paging { cursor: &cursor, max: 0 };
            let request = if list == Name::Keys { Request::Keys(paging) } else { Request::Devices(paging) };
            let (entries, next) = read(&self.request(&request).await?)?;
            all.extend(entries);
            if next.is_empty() {
                return Ok(all);
            }
            cursor = next;
        }
        Err(ReplyError::Unexpected.into())
    }
}

/// Which of our messages the answer to `query` lists.
fn spoken(body: &[u8]) -> Arc<[Name]> {
    let mut r = Reader::new(body);
    if r.u8() != Ok(number::EXTENSION_RESPONSE) || r.string() != Ok(b"query") {
        return Arc::default();
    }
    std::iter::from_fn(|| r.string().ok()).filter_map(Name::from_bytes).collect()
}

/// The bytes, in a type that does not print. They have no spare capacity, so none is left behind.
fn secret(mut bytes: Zeroizing<Vec<u8>>) -> SecretSlice<u8> {
    std::mem::take(&mut *bytes).into()
}
