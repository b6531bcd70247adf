//! Keys in FIDO authenticators, through OpenSSH's `ssh-sk-helper`. Knows the helper's protocol; asks nobody for a PIN.
//!
//! The helper loads the provider library and talks to the authenticator in a process of its own: one request, one
//! reply, the end. It is killed when the caller hangs up or the deadline passes.

use std::{
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    process::{Child, Command},
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, timeout, timeout_at},
};
use zeroize::Zeroizing;

use super::{DeviceError, Open, Seal, Signature};
use crate::{
    public_key::{KeyType, PublicKey},
    rfc4251::{Put, Reader, WireError},
};

/// The authenticator signs only when it is touched (`SSH_SK_USER_PRESENCE_REQD`).
const FLAG_TOUCH: u8 = 0x01;
/// The authenticator verifies who touches it, by PIN or finger (`SSH_SK_USER_VERIFICATION_REQD`).
const FLAG_VERIFY: u8 = 0x04;

/// The protocol's version (`SSH_SK_HELPER_VERSION`).
const HELPER_VERSION: u8 = 5;
const HELPER_ERROR: u32 = 0;
const HELPER_SIGN: u32 = 1;
/// The helper refuses longer messages.
const MAX_REQUEST: usize = 256 * 1024;
/// Signatures take about a hundred bytes.
const MAX_REPLY: usize = 16 * 1024;
/// Its messages go to our stderr, from `error` on.
const LOG_ON_STDERR: u8 = 1;
const LOG_LEVEL_ERROR: u32 = 2;
/// How long a helper that has answered may take to let go of the authenticator.
const LINGER: Duration = Duration::from_secs(2);
/// Signatures that may wait for one key, the running one included.
const MAX_QUEUE: usize = 64;
/// Where distributions put the helper; the first is Debian's.
const DEFAULT_HELPERS: [&str; 4] = [
    "/usr/lib/openssh/ssh-sk-helper",
    "/usr/libexec/openssh/ssh-sk-helper",
    "/usr/libexec/ssh-sk-helper",
    "/usr/lib/ssh/ssh-sk-helper",
];

/// A key pair whose private half an authenticator holds, or rebuilds from the key handle.
pub struct SkKey {
    key_type: KeyType,
    /// The plain public key.
    blob: Box<[u8]>,
    application: Box<[u8]>,
    flags: u8,
    reserved: Box<[u8]>,
    provider: String,
    helper: Option<PathBuf>,
    /// Never locked across an await.
    key_handle: RwLock<KeyHandle>,
    /// An authenticator does one thing at a time, and refuses a second one rather than queue it.
    lane: Arc<Semaphore>,
    queue: Arc<Semaphore>,
}

/// Not secret by FIDO's rules, but who has it and the authenticator can sign: it is treated as a private key.
enum KeyHandle {
    Open(Zeroizing<Vec<u8>>),
    Sealed(Box<[u8]>),
}

impl SkKey {
    /// A key from the parts of its private form. `provider` must be approved already: a library's path, or `internal`
    /// in any case for the helper's own. Refuses what the helper could not parse.
    pub fn new(
        public: &PublicKey<'_>,
        application: &[u8],
        flags: u8,
        key_handle: Zeroizing<Vec<u8>>,
        reserved: &[u8],
        provider: String,
    ) -> Result<Self, DeviceError> {
        let (PublicKey::SkEd25519(_, certified) | PublicKey::SkEcdsa(_, certified)) = *public else {
            return Err(DeviceError::unsupported("it is not of a type that authenticators hold"));
        };
        if certified != application {
            return Err(DeviceError::unsupported("its application is not the one of its public key"));
        }
        if application.contains(&0) || provider.contains('\0') {
            return Err(DeviceError::unsupported("its application or provider contains a NUL"));
        }
        Ok(Self {
            key_type: public.key_type(),
            blob: public.to_blob().into(),
            application: application.into(),
            flags,
            reserved: reserved.into(),
            provider: if provider.eq_ignore_ascii_case("internal") { "internal".into() } else { provider },
            helper: None,
            key_handle: RwLock::new(KeyHandle::Open(key_handle)),
            lane: Arc::new(Semaphore::new(1)),
            queue: Arc::new(Semaphore::new(MAX_QUEUE)),
        })
    }

    /// The bytes that its sender decided the number of, apart from its blob.
    pub fn held(&self) -> usize {
        let handle = match &*self.key_handle.read().unwrap_or_else(PoisonError::into_inner) {
            KeyHandle::Open(handle) => handle.len(),
            KeyHandle::Sealed(sealed) => sealed.len(),
        };
        // The blob of its own and the application in it, once more.
        self.blob.len() + self.application.len() + self.reserved.len() + self.provider.len() + handle
    }

    /// Uses this program in place of `$SSH_SK_HELPER` and the system's `ssh-sk-helper`.
    pub fn with_helper(mut self, helper: impl Into<PathBuf>) -> Self {
        self.helper = Some(helper.into());
        self
    }

    /// `sk-ssh-ed25519@openssh.com` or `sk-ecdsa-sha2-nistp256@openssh.com`.
    pub fn key_type(&self) -> KeyType {
        self.key_type
    }

    /// The plain public key blob.
    pub fn public_blob(&self) -> &[u8] {
        &self.blob
    }

    /// What the key was made for: `ssh:…`, or a web origin.
    pub fn application(&self) -> &[u8] {
        &self.application
    }

    /// The library behind the helper; `internal` is the helper's own.
    pub fn provider(&self) -> &str {
        &self.provider
    }

    /// Whether the authenticator waits for a touch before it signs: show a notice meanwhile.
    pub fn wants_touch(&self) -> bool {
        self.flags & FLAG_TOUCH != 0
    }

    /// Whether the authenticator verifies its holder. It may do so by finger, so a PIN is asked for only after
    /// [`DeviceError::PinRequired`].
    pub fn needs_pin(&self) -> bool {
        self.flags & FLAG_VERIFY != 0
    }

    /// Signs `data`. Waits for this key's earlier signatures, then for the authenticator, until `deadline`; dropping
    /// the future gives up. Without a PIN it is safe to try: no PIN try is spent.
    ///
    /// [`PinRequired`](DeviceError::PinRequired): ask for the PIN and call again, once.
    /// [`PinWrong`](DeviceError::PinWrong): a try is spent, never send this PIN again.
    pub async fn sign(
        &self,
        data: &[u8],
        pin: Option<&SecretString>,
        deadline: Instant,
    ) -> Result<Signature, DeviceError> {
        let _place = self.queue.try_acquire().map_err(|_| DeviceError::Busy)?;
        let signature = timeout_at(deadline, self.converse(data, pin)).await.unwrap_or(Err(DeviceError::Timeout))?;
        // A broken authenticator, or a provider that lies, must not pass for a signature.
        PublicKey::parse(&self.blob)
            .and_then(|key| key.verify(data, &signature).map(drop))
            .map_err(|_| DeviceError::Failed("the authenticator's signature does not verify".into()))?;
        Ok(Signature::Sk(signature))
    }

    async fn converse(&self, data: &[u8], pin: Option<&SecretString>) -> Result<Vec<u8>, DeviceError> {
        let lane = self.lane.clone().acquire_owned().await.map_err(|_| DeviceError::Busy)?;
        // Built only now: the key may have been sealed while it waited for its turn.
        let request = self.request(data, pin)?;
        let (mut child, mut socket) = start_helper(self.helper.clone()).await?;
        let reply = async {
            socket.write_all(&request).await?;
            drop(request);
            let len = socket.read_u32().await? as usize;
            if len > MAX_REPLY {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut reply = vec![0; len];
            socket.read_exact(&mut reply).await?;
            Ok(reply)
        }
        .await
        .map_err(|error: io::Error| no_reply(&error))?;
        // It has answered: what it still has to tidy up is no matter of the caller's, but the next one waits for it.
        tokio::spawn(async move {
            let _ = timeout(LINGER, child.wait()).await;
            drop(lane);
        });
        match parse_reply(&reply) {
            Ok(Reply::Signature(signature)) => Ok(signature.to_vec()),
            Ok(Reply::Error(code)) => Err(device_error(code, pin.is_some(), self.wants_touch())),
            Err(_) => Err(DeviceError::Failed("ssh-sk-helper's answer makes no sense".into())),
        }
    }

    /// The one message a helper is sent, its length in front. It never grows, so no copy of a secret stays behind.
    fn request(&self, data: &[u8], pin: Option<&SecretString>) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let key_handle = self.key_handle.read().unwrap_or_else(PoisonError::into_inner);
        let KeyHandle::Open(key_handle) = &*key_handle else { return Err(DeviceError::Sealed) };
        let pin = pin.map_or("", |pin| pin.expose_secret());
        if pin.contains('\0') {
            return Err(DeviceError::Failed("a PIN cannot contain a NUL".into()));
        }
        let key_len = self.blob.len() + 1 + 4 + key_handle.len() + 4 + self.reserved.len();
        let strings = [key_len, self.provider.len(), data.len(), 0, pin.len()];
        let len = 1 + 4 + 1 + 4 + strings.iter().map(|len| 4 + len).sum::<usize>() + 4;
        if len > MAX_REQUEST {
            return Err(DeviceError::Failed("the data is too long for ssh-sk-helper, which takes 256 KiB".into()));
        }
        let mut out = Zeroizing::new(Vec::with_capacity(4 + len));
        let put_len = |out: &mut Vec<u8>, len: usize| out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
        put_len(&mut out, len);
        out.push(HELPER_VERSION);
        out.put_u32(HELPER_SIGN);
        out.push(LOG_ON_STDERR);
        out.put_u32(LOG_LEVEL_ERROR);
        // The private key as OpenSSH serialises it: the public one and what follows.
        put_len(&mut out, key_len);
        out.extend_from_slice(&self.blob);
        out.push(self.flags);
        out.put_string(key_handle);
        out.put_string(&self.reserved);
        out.put_string(self.provider.as_bytes());
        out.put_string(data);
        out.put_string(b""); // the algorithm: the key's own
        out.put_u32(0); // compatibility flags: none
        out.put_string(pin.as_bytes());
        debug_assert_eq!(out.len(), 4 + len);
        Ok(out)
    }

    /// Replaces the key handle by what `seal` makes of it and wipes it. A sealed key stays as it is.
    pub fn seal(&self, seal: Seal<'_>) -> Result<(), DeviceError> {
        let mut key_handle = self.key_handle.write().unwrap_or_else(PoisonError::into_inner);
        if let KeyHandle::Open(plain) = &*key_handle {
            *key_handle = KeyHandle::Sealed(seal(plain)?);
        }
        Ok(())
    }

    /// Brings a sealed key handle back; `open` undoes what `seal` did. When it fails the key stays sealed.
    pub fn unseal(&self, open: Open<'_>) -> Result<(), DeviceError> {
        let mut key_handle = self.key_handle.write().unwrap_or_else(PoisonError::into_inner);
        if let KeyHandle::Sealed(sealed) = &*key_handle {
            *key_handle = KeyHandle::Open(open(sealed)?);
        }
        Ok(())
    }
}

impl fmt::Debug for SkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SkKey")
            .field("key_type", &self.key_type)
            .field("flags", &self.flags)
            .field("provider", &self.provider)
            .finish_non_exhaustive()
    }
}

/// Starts the helper, on a thread that may block, with a socket as its stdin and stdout.
async fn start_helper(program: Option<PathBuf>) -> Result<(Child, UnixStream), DeviceError> {
    let start = move || {
        let program = program
            .or_else(|| std::env::var_os("SSH_SK_HELPER").filter(|path| !path.is_empty()).map(PathBuf::from))
            .or_else(|| DEFAULT_HELPERS.iter().map(PathBuf::from).find(|path| path.exists()))
            .unwrap_or_else(|| PathBuf::from(DEFAULT_HELPERS[0]));
        spawn_helper(&program).map_err(|error| {
            DeviceError::Failed(format!(
                "{} does not start ({error}); install openssh-client or set SSH_SK_HELPER to its path",
                program.display()
            ))
        })
    };
    spawn_blocking(start)
        .await
        .unwrap_or_else(|error| Err(DeviceError::Failed(format!("ssh-sk-helper was not started: {error}"))))
}

fn spawn_helper(program: &Path) -> io::Result<(Child, UnixStream)> {
    let (ours, theirs) = StdUnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let ours = UnixStream::from_std(ours)?;
    let child = Command::new(program)
        .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .kill_on_drop(true)
        .spawn()?;
    Ok((child, ours))
}

enum Reply<'a> {
    Signature(&'a [u8]),
    /// An `SSH_ERR_…` of ssherr.h, without its minus sign.
    Error(u32),
}

fn parse_reply(reply: &[u8]) -> Result<Reply<'_>, WireError> {
    let mut r = Reader::new(reply);
    let reply = match (r.u8()?, r.u32()?) {
        (HELPER_VERSION, HELPER_SIGN) => Reply::Signature(r.string()?),
        (HELPER_VERSION, HELPER_ERROR) => Reply::Error(r.u32()?),
        _ => return Err(WireError::Trailing),
    };
    r.finish()?;
    Ok(reply)
}

/// What the helper's error means to the caller. It tells few reasons apart: `SSH_ERR_INVALID_FORMAT` is whatever has no
/// code of its own, a missed touch included.
fn device_error(code: u32, with_pin: bool, touch: bool) -> DeviceError {
    match code {
        43 if with_pin => DeviceError::PinWrong { left: None },
        43 => DeviceError::PinRequired,
        59 => DeviceError::unsupported("the authenticator does not support it"),
        60 => DeviceError::Absent,
        61 => DeviceError::Failed("the authenticator has no PIN yet; set one with `fido2-token -S`".into()),
        4 if touch => DeviceError::Failed("the authenticator refused, or was not touched in time; try again".into()),
        _ => DeviceError::Failed(format!("the authenticator or its provider failed (ssh-sk-helper: error {code})")),
    }
}

fn no_reply(error: &io::Error) -> DeviceError {
    DeviceError::Failed(match error.kind() {
        io::ErrorKind::InvalidData => "ssh-sk-helper's answer is too long".into(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            "ssh-sk-helper ended without an answer; it says why on the agent's stderr".into()
        }
        _ => format!("ssh-sk-helper cannot be talked to: {error}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(application: &[u8], key_handle: &[u8], provider: &str) -> Result<SkKey, DeviceError> {
        let public = PublicKey::SkEd25519(&[7; 32], b"ssh:");
        SkKey::new(&public, application, 0x25, key_handle.to_vec().into(), b"", provider.into())
    }

    #[test]
    fn only_what_the_helper_can_parse_becomes_a_key() {
        assert!(key(b"ssh:", b"handle", "internal").is_ok());
        assert!(matches!(key(b"ssh:other", b"handle", "internal"), Err(DeviceError::Unsupported(_))));
        assert!(matches!(key(b"ssh:", b"handle", "/lib\0"), Err(DeviceError::Unsupported(_))));
        let soft = PublicKey::Ed25519(&[7; 32]);
        let soft = SkKey::new(&soft, b"ssh:", 1, Zeroizing::default(), b"", String::new());
        assert!(matches!(soft, Err(DeviceError::Unsupported(_))));
    }

    #[test]
    fn a_key_tells_its_flags_and_no_secret() {
        let key = key(b"ssh:", b"handle", "INTERNAL").unwrap();
        assert!(key.wants_touch() && key.needs_pin());
        assert_eq!(key.provider(), "internal");
        assert!(!format!("{key:?}").contains("handle"));
    }

    #[test]
    fn a_sealed_key_is_not_sent_anywhere() {
        let key = key(b"ssh:", b"handle", "internal").unwrap();
        let flip = |bytes: &[u8]| bytes.iter().map(|b| !b).collect::<Vec<u8>>();
        let before = key.request(b"data", None).unwrap();
        assert_eq!(key.seal(&mut |_| Err(DeviceError::Busy)), Err(DeviceError::Busy));
        for _ in 0..2 {
            key.seal(&mut |bytes| Ok(flip(bytes).into())).unwrap();
        }
        assert_eq!(key.request(b"data", None).map(drop), Err(DeviceError::Sealed));
        assert_eq!(key.unseal(&mut |_| Err(DeviceError::Busy)), Err(DeviceError::Busy));
        assert_eq!(key.request(b"data", None).map(drop), Err(DeviceError::Sealed));
        key.unseal(&mut |bytes| Ok(flip(bytes).into())).unwrap();
        assert_eq!(key.request(b"data", None).unwrap(), before);
    }

    #[test]
    fn a_request_has_the_helpers_form() {
        let key = key(b"ssh:", b"handle", "/usr/lib/p.so").unwrap();
        let pin = SecretString::from("1234".to_owned());
        let request = key.request(b"data", Some(&pin)).unwrap();
        let mut r = Reader::new(&request);
        let mut body = Reader::new(r.string().unwrap());
        r.finish().unwrap();
        assert_eq!((body.u8(), body.u32(), body.u8(), body.u32()), (Ok(5), Ok(1), Ok(1), Ok(2)));
        let mut private = Reader::new(body.string().unwrap());
        assert_eq!(private.string().unwrap(), b"sk-ssh-ed25519@openssh.com");
        assert_eq!(private.string().unwrap(), [7; 32]);
        assert_eq!(private.string().unwrap(), b"ssh:");
        assert_eq!(private.u8(), Ok(0x25));
        assert_eq!(private.string().unwrap(), b"handle");
        assert_eq!(private.string().unwrap(), b"");
        private.finish().unwrap();
        assert_eq!(body.string().unwrap(), b"/usr/lib/p.so");
        assert_eq!(body.string().unwrap(), b"data");
        assert_eq!(body.string().unwrap(), b"");
        assert_eq!(body.u32(), Ok(0));
        assert_eq!(body.string().unwrap(), b"1234");
        body.finish().unwrap();
        assert!(matches!(key.request(&vec![0; MAX_REQUEST], None), Err(DeviceError::Failed(_))));
    }

    proptest! {
        #[test]
        fn arbitrary_replies_never_panic(bytes: Vec<u8>) {
            let _ = parse_reply(&bytes);
        }

        #[test]
        fn every_request_fits_its_buffer(handle: Vec<u8>, data: Vec<u8>) {
            let key = key(b"ssh:", &handle, "internal").unwrap();
            let request = key.request(&data, None).unwrap();
            let capacity = request.capacity();
            prop_assert_eq!(request.len(), capacity);
        }
    }
}
