//! Security keys through OpenSSH's real `ssh-sk-helper`, with the software authenticator of its test suite, and through
//! helpers that are shell scripts: they hang, lie and fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use secrecy::SecretString;
use strongroom::{
    devices::{DeviceError, Signature, sk::SkKey},
    public_key::{KeyType, PublicKey},
};
use support::life::Life;
use tempfile::TempDir;
use tokio::time::Instant;
use zeroize::Zeroizing;

const HELPER: &str = "/usr/lib/openssh/ssh-sk-helper";
const PROVIDER: &str = "/usr/lib/openssh/regress/misc/sk-dummy/sk-dummy.so";
const DATA: &[u8] = b"what is signed";

fn present(path: &str, package: &str) -> String {
    assert!(Path::new(path).exists(), "{path} is missing: apt-get install {package}");
    path.to_owned()
}

/// Makes a key of `kind` in the software authenticator with ssh-keygen, and returns what its file says.
fn new_key(kind: &str) -> SkKey {
    let provider = present(PROVIDER, "openssh-tests");
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("key");
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", kind, "-w", &provider, "-N", "", "-f"])
        .arg(&file)
        .env("SSH_SK_HELPER", present(HELPER, "openssh-client"))
        .stdin(Stdio::null())
        .output()
        .expect("ssh-keygen starts: apt-get install openssh-client");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let private = ssh_key::PrivateKey::from_openssh(fs::read(&file).unwrap()).unwrap();
    let blob = private.public_key().to_bytes().unwrap();
    let (flags, handle) = match private.key_data() {
        ssh_key::private::KeypairData::SkEd25519(key) => (key.flags(), key.key_handle()),
        ssh_key::private::KeypairData::SkEcdsaSha2NistP256(key) => (key.flags(), key.key_handle()),
        _ => panic!("ssh-keygen made another kind of key"),
    };
    let public = PublicKey::parse(&blob).unwrap();
    let handle = Zeroizing::new(handle.to_vec());
    SkKey::new(&public, b"ssh:", flags, handle, b"", provider).unwrap().with_helper(HELPER)
}

/// A directory with one helper in it and what that leaves there.
struct Bench(TempDir);

impl Bench {
    /// A helper with this body, which first reads the request into `$here/request`.
    fn with_helper(body: &str) -> Self {
        let bench = Self(TempDir::new().unwrap());
        let here = bench.0.path().display();
        let reads = format!("here={here}\ndd bs=65536 count=1 of=\"$here/request\" 2>/dev/null\n{body}");
        support::script(&bench.helper(), &reads);
        bench
    }

    fn helper(&self) -> PathBuf {
        self.0.path().join("helper")
    }

    /// A FIFO that the helper holds open.
    fn life(&self) -> Life {
        Life::of(&self.0.path().join("life"))
    }
}

/// A helper that says it is up and hangs, as one process.
const HANG: &str = "exec 3>\"$here/life\"; echo up >&3; exec sleep 1000";

/// A key that only scripts are asked to sign with.
fn paper_key(bench: &Bench) -> SkKey {
    let public = PublicKey::SkEd25519(&[7; 32], b"ssh:");
    SkKey::new(&public, b"ssh:", 0x01, Zeroizing::new(b"handle".to_vec()), b"", "internal".into())
        .unwrap()
        .with_helper(bench.helper())
}

fn in_time() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn pin() -> SecretString {
    SecretString::from("1234".to_owned())
}

#[tokio::test]
async fn the_real_helper_signs_with_both_kinds_of_key() {
    for (kind, key_type) in [("ed25519-sk", KeyType::SkEd25519), ("ecdsa-sk", KeyType::SkEcdsa)] {
        let key = new_key(kind);
        assert_eq!((key.key_type(), key.application()), (key_type, &b"ssh:"[..]));
        assert!(key.wants_touch() && !key.needs_pin());
        for data in [DATA, b"", &[7; 100_000]] {
            for pin in [None, Some(&pin())] {
                let Signature::Sk(signature) = key.sign(data, pin, in_time()).await.unwrap() else {
                    panic!("not an authenticator's signature")
                };
                let public = PublicKey::parse(key.public_blob()).unwrap();
                assert_eq!(public.verify(data, &signature), Ok(key_type.name().as_bytes()));
                assert!(public.verify(b"something else", &signature).is_err());
            }
        }
    }
}

#[tokio::test]
async fn a_key_signs_again_after_it_was_sealed() {
    let key = new_key("ed25519-sk");
    let flip = |bytes: &[u8]| bytes.iter().map(|b| !b).collect::<Vec<u8>>();
    key.seal(&mut |bytes| Ok(flip(bytes).into())).unwrap();
    assert_eq!(key.sign(DATA, None, in_time()).await, Err(DeviceError::Sealed));
    key.unseal(&mut |bytes| Ok(flip(bytes).into())).unwrap();
    assert!(key.sign(DATA, None, in_time()).await.is_ok());
}

#[tokio::test]
async fn one_key_signs_one_after_the_other() {
    let key = new_key("ed25519-sk");
    let (a, b, c) =
        tokio::join!(key.sign(DATA, None, in_time()), key.sign(DATA, None, in_time()), key.sign(DATA, None, in_time()));
    assert!(a.is_ok() && b.is_ok() && c.is_ok());
}

#[tokio::test]
async fn a_foreign_key_handle_is_refused_by_the_real_helper() {
    let public = PublicKey::SkEd25519(&[7; 32], b"ssh:");
    let provider = present(PROVIDER, "openssh-tests");
    let key = SkKey::new(&public, b"ssh:", 1, Zeroizing::new(b"foreign".to_vec()), b"", provider).unwrap();
    let error = key.with_helper(present(HELPER, "openssh-client")).sign(DATA, None, in_time()).await.unwrap_err();
    assert!(matches!(&error, DeviceError::Failed(words) if words.contains("try again")), "{error}");
}

#[tokio::test]
async fn a_signature_by_another_key_is_not_passed_on() {
    let key = new_key("ed25519-sk");
    let bench = Bench::with_helper(&format!("sed 's/\\(what is \\)signed/\\1forged/' <\"$here/request\" | {HELPER}"));
    let error = key.with_helper(bench.helper()).sign(DATA, None, in_time()).await.unwrap_err();
    assert!(matches!(&error, DeviceError::Failed(words) if words.contains("verify")), "{error}");
}

#[tokio::test]
async fn the_pin_reaches_the_helper_and_its_refusal_is_told_apart() {
    let key = new_key("ed25519-sk");
    let refuse = r"printf '\0\0\0\011\005\0\0\0\0\0\0\0\053'";
    let asks =
        Bench::with_helper(&format!("grep -qa 1234 \"$here/request\" && exec {HELPER} <\"$here/request\"\n{refuse}"));
    let key = key.with_helper(asks.helper());
    assert_eq!(key.sign(DATA, None, in_time()).await, Err(DeviceError::PinRequired));
    assert!(key.sign(DATA, Some(&pin()), in_time()).await.is_ok());
    let refuses = Bench::with_helper(refuse);
    let key = key.with_helper(refuses.helper());
    assert_eq!(key.sign(DATA, Some(&pin()), in_time()).await, Err(DeviceError::PinWrong { left: None }));
}

#[tokio::test]
async fn the_helpers_errors_have_their_names() {
    for (code, expected) in
        [(r"\074", DeviceError::Absent), (r"\073", DeviceError::unsupported("the authenticator does not support it"))]
    {
        let bench = Bench::with_helper(&format!(r"printf '\0\0\0\011\005\0\0\0\0\0\0\0{code}'"));
        assert_eq!(paper_key(&bench).sign(DATA, None, in_time()).await, Err(expected));
    }
}

#[tokio::test]
async fn nonsense_from_the_helper_is_an_error() {
    for (body, words) in [
        ("exit 1", "without an answer"),
        (r"printf '\0\0\0\011\005'", "without an answer"),
        (r"printf '\377\377\377\377'; exec cat /dev/zero", "too long"),
        (r"printf '\0\0\0\0'", "no sense"),
        (r"printf '\0\0\0\011\004\0\0\0\0\0\0\0\053'", "no sense"),
        (r"printf '\0\0\0\011\005\0\0\0\007\0\0\0\053'", "no sense"),
        (r"printf '\0\0\0\012\005\0\0\0\0\0\0\0\053x'", "no sense"),
        (r"printf '\0\0\0\011\005\0\0\0\001\0\0\0\0'", "verify"),
        (r"printf '\0\0\0\011\005\0\0\0\001\377\377\377\377'", "no sense"),
    ] {
        let bench = Bench::with_helper(body);
        let error = paper_key(&bench).sign(DATA, None, in_time()).await.unwrap_err();
        assert!(matches!(&error, DeviceError::Failed(text) if text.contains(words)), "{body}: {error}");
    }
}

#[tokio::test]
async fn a_missing_helper_is_named_with_the_remedy() {
    let bench = Bench::with_helper("");
    let error = paper_key(&bench).with_helper("/nowhere/helper").sign(DATA, None, in_time()).await.unwrap_err();
    assert!(error.to_string().contains("/nowhere/helper") && error.to_string().contains("SSH_SK_HELPER"), "{error}");
}

#[tokio::test]
async fn a_helper_that_hangs_ends_at_the_deadline() {
    let bench = Bench::with_helper(HANG);
    let life = bench.life();
    let deadline = Instant::now() + Duration::from_millis(300);
    assert_eq!(paper_key(&bench).sign(DATA, None, deadline).await, Err(DeviceError::Timeout));
    life.gone().await;
}

#[tokio::test]
async fn who_stops_waiting_ends_the_helper() {
    let bench = Bench::with_helper(HANG);
    let mut life = bench.life();
    let key = paper_key(&bench);
    let signature = tokio::spawn(async move { key.sign(DATA, None, in_time()).await });
    life.started().await;
    signature.abort();
    life.gone().await;
}

#[tokio::test]
async fn a_key_whose_authenticator_hangs_delays_no_other_key() {
    let bench = Bench::with_helper(HANG);
    let mut life = bench.life();
    let (stuck, other) = (Arc::new(paper_key(&bench)), new_key("ed25519-sk"));
    let first = tokio::spawn({
        let stuck = Arc::clone(&stuck);
        async move { stuck.sign(DATA, None, Instant::now() + Duration::from_secs(600)).await }
    });
    // The first has the helper, and keeps it.
    life.started().await;
    // The second waits behind the first, and says so at its own deadline.
    let soon = Instant::now() + Duration::from_millis(300);
    let (second, signed) = tokio::join!(stuck.sign(DATA, None, soon), other.sign(DATA, None, in_time()));
    assert_eq!(second, Err(DeviceError::Timeout));
    assert!(signed.is_ok() && !first.is_finished());
    first.abort();
    life.gone().await;
}
