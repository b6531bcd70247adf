//! The client library against the built daemon: thousands of uses at once, dropped futures, deadlines, a daemon that is
//! killed, stopped and restarted; and against Debian's ssh-agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::{
    fs,
    future::Future,
    io::Read,
    os::unix::net::UnixListener,
    process::{Child, Command, Stdio},
    task::{Context, Waker},
    time::{Duration, Instant},
};

use rustix::process::Signal;
use secrecy::ExposeSecret;
use strongroom::{
    agent::message::{Code, Name, PinState, Request, Target},
    client::{self, Client, ClientError, Device, GRACE, Key},
    devices::{DecryptScheme, DeriveScheme, Hash, Input, Scheme, Signature, verify::verify},
    public_key::{Curve, KeyType, PublicKey},
};
use support::{
    PATH, PATIENCE,
    client::{frame, put},
    command,
    daemon::{Daemon, Home},
    eventually, keygen, run,
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

/// A P-256 key and an RSA key on a device that does what the rules say.
fn token(rules: &str) -> String {
    format!(
        "lanes = 4\ncontrol = CONTROL\n[[key]]\nslot = \"p\"\ntype = \"p256\"\nlabel = \"p256\"\n\
         [[key]]\nslot = \"r\"\ntype = \"rsa\"\nlabel = \"rsa\"\n{rules}"
    )
}

const HANG: &str = "[[rule]]\non = \"sign\"\ndo = \"hang\"";
/// A queue and times in which nothing is refused or late.
const ROOMY: &str = "queue = 65536\ntimeout = \"1h\"";
const SHA256: Scheme = Scheme::Ecdsa(Hash::Sha256);

fn home(rules: &str, lines: &str) -> Home {
    let mut home = Home::new();
    home.device("a", &token(rules), lines);
    home
}

async fn connect(home: &Home) -> Client {
    Client::connect(home.path("service")).await.unwrap()
}

/// The listed key with this comment.
async fn key(client: &Client, comment: &str) -> Key {
    let find = async {
        loop {
            if let Some(key) = client.keys().await.unwrap().into_iter().find(|key| key.comment == comment) {
                return key;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, find).await.expect("the key is listed")
}

/// Waits until the only device is as it should be.
async fn device_is(client: &Client, what: &str, is: impl Fn(&Device) -> bool) {
    let look = async {
        while !is(&client.devices().await.unwrap()[0]) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, look).await.unwrap_or_else(|_| panic!("the device never is: {what}"));
}

fn digest(n: usize) -> [u8; 32] {
    let mut digest = [0x5a; 32];
    digest[..8].copy_from_slice(&n.to_be_bytes());
    digest
}

fn verifies(blob: &[u8], scheme: Scheme, input: &Input<'_>, signature: Vec<u8>) -> bool {
    let key_type = PublicKey::parse(blob).unwrap().key_type();
    Signature::from_bytes(scheme, key_type, signature).is_some_and(|signature| verify(blob, scheme, input, &signature))
}

/// Starts `count` signatures over digests, each a task of its own.
fn sign_all(client: &Client, blob: &[u8], count: usize) -> JoinSet<(usize, Result<Vec<u8>, ClientError>)> {
    let mut tasks = JoinSet::new();
    for n in 0..count {
        let (client, blob) = (client.clone(), blob.to_vec());
        tasks.spawn(async move {
            let digest = digest(n);
            (n, client.sign(&blob, SHA256, Input::Digest((&digest).into()), None).await)
        });
    }
    tasks
}

fn reason(error: &ClientError) -> Code {
    match error {
        ClientError::Refused(failure) => failure.code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_signatures_at_once_than_a_connection_may_have_all_come_and_verify() {
    const COUNT: usize = 17_000;
    // While the lanes sleep, 16,384 tickets are open, and the rest waits for theirs.
    let home = home("[[rule]]\non = \"sign\"\ncount = 4\ndo = { sleep_ms = 4000 }", ROOMY);
    let _daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    let mut tasks = sign_all(&client, &blob, COUNT);
    let mut seen = vec![false; COUNT];
    while let Some(done) = tasks.join_next().await {
        let (n, signature) = done.unwrap();
        let signature = signature.unwrap();
        // Each in debug takes a while; one in ten tells.
        assert!(n % 10 != 0 || verifies(&blob, SHA256, &Input::Digest((&digest(n)).into()), signature), "{n}");
        assert!(!std::mem::replace(&mut seen[n], true));
    }
    assert!(seen.iter().all(|seen| *seen));
}

#[tokio::test]
async fn a_dropped_future_is_cancelled_at_the_daemon() {
    let home = home(HANG, ROOMY);
    let _daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    let tasks = sign_all(&client, &blob, 100);
    device_is(&client, "full", |device| device.running == 4 && device.waiting == 96).await;
    drop(tasks);
    device_is(&client, "empty", |device| device.waiting == 0).await;

    // A future that is dropped before its submit was sent asks for nothing.
    let mut future = Box::pin(client.sign(&blob, SHA256, Input::Message(b"m".into()), None));
    assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    drop(future);
    client.why(false, 0).await.unwrap();
    assert_eq!(client.devices().await.unwrap()[0].waiting, 0);
}

#[tokio::test]
async fn a_device_that_hangs_is_a_timeout_at_the_deadline() {
    let home = home(HANG, ROOMY);
    let _daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    let began = Instant::now();
    let deadline = Some(Duration::from_millis(300));
    let error = client.sign(&blob, SHA256, Input::Message(b"m".into()), deadline).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Timeout), "{error}");
    assert!(began.elapsed() >= Duration::from_millis(300));
    // The connection serves on.
    assert_eq!(client.random(16, None).await.unwrap().expose_secret().len(), 16);
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_is_given_up_a_little_after_the_deadline() {
    let home = home("", ROOMY);
    let daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    daemon.signal(Signal::STOP);
    let began = Instant::now();
    let deadline = Duration::from_millis(200);
    let error = client.sign(&blob, SHA256, Input::Message(b"m".into()), Some(deadline)).await.unwrap_err();
    assert!(matches!(error, ClientError::NoAnswer), "{error:?}");
    assert!(began.elapsed() >= deadline + GRACE);
    daemon.signal(Signal::CONT);
    let signature = client.sign(&blob, SHA256, Input::Message(b"m".into()), None).await.unwrap();
    assert!(verifies(&blob, SHA256, &Input::Message(b"m".into()), signature));
}

#[tokio::test]
async fn a_killed_daemon_fails_what_was_under_way_and_the_next_request_finds_the_new_one() {
    let home = home("[[rule]]\non = \"sign\"\ncount = 4\ndo = \"hang\"", ROOMY);
    let daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    let mut tasks = sign_all(&client, &blob, 50);
    device_is(&client, "busy", |device| device.running == 4).await;
    daemon.end(Signal::KILL);
    while let Some(done) = tasks.join_next().await {
        let error = done.unwrap().1.unwrap_err();
        assert!(matches!(error, ClientError::Lost), "{error:?}");
        assert_eq!(error.code(), None);
    }

    // Nobody is there, and after a while the client says so; then the daemon comes while it waits.
    let began = Instant::now();
    let error = client.keys().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    fs::remove_dir_all(home.control("a")).unwrap();
    fs::create_dir(home.control("a")).unwrap();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.random(8, None).await.map(|bytes| bytes.expose_secret().len()) }
    });
    let _daemon = home.start();
    assert_eq!(waiting.await.unwrap().unwrap(), 8);
    assert_eq!(key(&client, "rsa").await.signs[0], "ssh");
}

#[tokio::test]
async fn nobody_at_the_socket_is_told_at_once() {
    let home = Home::new();
    let error = Client::connect(home.path("service")).await.err().unwrap();
    let ClientError::Unreachable { path, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*path, home.path("service"));
    assert!(error.to_string().starts_with(path.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn secrets_come_and_do_not_print() {
    let home = home("", "");
    let _daemon = home.start();
    let client = connect(&home).await;
    let rsa = key(&client, "rsa").await;
    fs::write(home.path("m"), "the message").unwrap();
    write_pem(&home, &rsa.blob);
    let encrypt = "pkeyutl -encrypt -pubin -inkey pem -pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_label:6c61 \
                   -in m -out c";
    run(command("openssl", &home.path("")).args(encrypt.split_whitespace())).ok();
    let ciphertext = fs::read(home.path("c")).unwrap();
    let oaep = DecryptScheme::RsaOaep(Hash::Sha1);
    let plain = client.decrypt(&rsa.blob, oaep, b"la", &ciphertext, None).await.unwrap();
    assert_eq!(plain.expose_secret(), b"the message");
    assert!(!format!("{plain:?}").contains("109"), "{plain:?}");

    let p256 = key(&client, "p256").await.blob;
    let Ok(PublicKey::Ecdsa(Curve::P256, point)) = PublicKey::parse(&p256) else { panic!("another key") };
    let shared = client.derive(&p256, DeriveScheme::Ecdh, point, None).await.unwrap();
    assert_eq!(shared.expose_secret().len(), 32);
    let error = client.derive(&p256, DeriveScheme::X25519, &[1; 32], None).await.unwrap_err();
    assert_eq!(reason(&error), Code::Unsupported);
}

fn write_pem(home: &Home, blob: &[u8]) {
    use base64ct::{Base64, Encoding};
    let key_type = PublicKey::parse(blob).unwrap().key_type();
    fs::write(home.path("pub"), format!("{} {}", key_type.name(), Base64::encode_string(blob))).unwrap();
    fs::write(
        home.path("pem"),
        run(command("ssh-keygen", &home.path("")).args(["-e", "-m", "PKCS8", "-f", "pub"])).ok(),
    )
    .unwrap();
}

#[tokio::test]
async fn a_pin_opens_its_device_and_a_wrong_one_tells_the_tries_left() {
    let mut home = Home::new();
    let script = "locked = true\ncontrol = CONTROL\n[pin]\nvalue = \"123456\"\ntries = 5\n\
                  [[key]]\nslot = \"k\"\ntype = \"p256\"\nlabel = \"p256\"";
    home.device("a", script, "");
    let _daemon = home.start();
    let client = connect(&home).await;
    let blob = key(&client, "p256").await.blob;
    let message = || Input::Message(b"m".into());
    let error = client.sign(&blob, SHA256, message(), None).await.unwrap_err();
    assert!(matches!(reason(&error), Code::PinRequired | Code::NoPrompt), "{error:?}");
    let error = client.unlock(Target::Device("a"), "654321".into()).await.unwrap_err();
    assert_eq!((reason(&error), error.tries_left()), (Code::PinWrong, Some(4)));
    client.unlock(Target::Key(&blob), "123456".into()).await.unwrap();
    assert_eq!(client.devices().await.unwrap()[0].pin, PinState::Open);
    assert!(verifies(&blob, SHA256, &message(), client.sign(&blob, SHA256, message(), None).await.unwrap()));
    client.lock(Target::Device("a")).await.unwrap();
    assert_eq!(client.devices().await.unwrap()[0].pin, PinState::Needed);
    client.forget(Target::Everything).await.unwrap();
    let refusals = client.why(true, 10).await.unwrap();
    assert!(refusals.iter().any(|refusal| refusal.code == Code::PinWrong), "{refusals:?}");
}

#[tokio::test]
async fn a_list_of_many_pages_comes_whole() {
    const COUNT: usize = 3000;
    let home = Home::new();
    let daemon = home.start();
    let mut ssh = daemon.connect();
    let mut blobs: Vec<_> = (0..COUNT)
        .map(|n| {
            let key = support::client::Key::random();
            ssh.add(&key, &format!("{n} {}", "long ".repeat(30)), &[]);
            key.blob()
        })
        .collect();
    let mut listed: Vec<_> = connect(&home).await.keys().await.unwrap().into_iter().map(|key| key.blob).collect();
    blobs.sort();
    listed.sort();
    assert!(blobs == listed, "{} of {COUNT}", listed.len());
}

#[tokio::test]
async fn tickets_and_long_requests_are_not_for_request() {
    let home = Home::new();
    let _daemon = home.start();
    let client = connect(&home).await;
    let error = client.request(&Request::Cancel(1)).await.err().unwrap();
    assert!(matches!(error, ClientError::Unsupported("cancel")), "{error:?}");
    let error = client.sign(b"key", Scheme::Ed25519, Input::Message((&[0; 262_144][..]).into()), None).await;
    assert!(matches!(error, Err(ClientError::TooLong(_))), "{error:?}");
    let error = client.sign(b"key", Scheme::Ed25519, Input::Message(b"m".into()), None).await.unwrap_err();
    assert_eq!(reason(&error), Code::NoSuchKey);
}

/// A server that reads the first frame, answers with `reply` and reads on.
fn impostor(home: &Home, reply: Vec<u8>) {
    let listener = UnixListener::bind(home.path("service")).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        std::io::Write::write_all(&mut stream, &reply).unwrap();
        while stream.read(&mut [0; 1024]).is_ok_and(|n| n > 0) {
            std::io::Write::write_all(&mut stream, &reply).unwrap();
        }
    });
}

#[tokio::test]
async fn a_server_that_talks_nonsense_is_found_out() {
    let mut query = vec![29];
    put(&mut query, b"query");
    Name::ALL.iter().for_each(|name| put(&mut query, name.as_str().as_bytes()));
    for reply in [frame(&query), vec![0; 4], vec![255; 8]] {
        let home = Home::new();
        impostor(&home, reply);
        let answer = async {
            let client = Client::connect(home.path("service")).await?;
            client.sign(b"key", Scheme::Ed25519, Input::Message(b"m".into()), None).await
        };
        let error = timeout(PATIENCE, answer).await.unwrap().unwrap_err();
        assert!(matches!(error, ClientError::Protocol(_)), "{error:?}");
    }
}

/// Debian's ssh-agent.
struct SshAgent(Child);

impl SshAgent {
    fn start(home: &Home) -> Self {
        let child = Command::new("/usr/bin/ssh-agent")
            .arg("-D")
            .arg("-a")
            .arg(home.path("plain"))
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("ssh-agent listens", || std::os::unix::net::UnixStream::connect(home.path("plain")).is_ok());
        Self(child)
    }
}

impl Drop for SshAgent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn any_ssh_agent_does_what_it_can() {
    let home = Home::new();
    let _agent = SshAgent::start(&home);
    let dir = home.path("");
    let types = [&["-t", "ed25519"][..], &["-t", "ecdsa", "-b", "521"], &["-t", "rsa", "-b", "2048"]];
    for options in types {
        let key = keygen(&dir, options[1], options);
        run(command("ssh-add", &dir).env("SSH_AUTH_SOCK", home.path("plain")).arg("-q").arg(key)).ok();
    }
    let client = Client::connect(home.path("plain")).await.unwrap();
    assert!(!client.speaks(Name::Keys));
    let keys = client.keys().await.unwrap();
    let comments: Vec<_> = keys.iter().map(|key| key.comment.as_str()).collect();
    assert_eq!(comments, ["ed25519", "ecdsa", "rsa"]);
    let message = Input::Message(b"a message".into());
    let deadline = Some(PATIENCE);
    for (key, schemes) in keys.iter().zip([
        &[Scheme::Ed25519][..],
        &[Scheme::Ecdsa(Hash::Sha512)],
        &[Scheme::RsaPkcs1v15(Hash::Sha256), Scheme::RsaPkcs1v15(Hash::Sha512)],
    ]) {
        assert_eq!(key.signs.len(), 1 + schemes.len(), "{:?}", key.signs);
        for scheme in schemes {
            let signature = client.sign(&key.blob, *scheme, message.clone(), deadline).await.unwrap();
            assert!(verifies(&key.blob, *scheme, &message, signature), "{scheme:?}");
        }
        let signature = client.sign_ssh(&key.blob, b"a message", 4, None).await.unwrap();
        PublicKey::parse(&key.blob).unwrap().verify(b"a message", &signature).unwrap();
    }
    let rsa = &keys[2].blob;
    let unsupported = [
        client.sign(rsa, Scheme::RsaPss(Hash::Sha256), message.clone(), None).await.map(drop),
        client.sign(rsa, Scheme::RsaPkcs1v15(Hash::Sha256), Input::Digest([1; 32][..].into()), None).await.map(drop),
        client.sign(rsa, Scheme::Ed25519, message.clone(), None).await.map(drop),
        client.decrypt(rsa, DecryptScheme::RsaPkcs1v15, b"", &[1; 256], None).await.map(drop),
        client.devices().await.map(drop),
        client.unlock(Target::Device("a"), "1234".into()).await,
    ];
    for result in unsupported {
        let error = result.unwrap_err();
        assert!(matches!(error, ClientError::Unsupported(_)), "{error:?}");
        assert_eq!(error.code(), Some(Code::Unsupported));
    }
    let stranger = support::client::Key::random().blob();
    assert_eq!(PublicKey::parse(&stranger).unwrap().key_type(), KeyType::Ed25519);
    let error = client.sign(&stranger, Scheme::Ed25519, message, None).await.unwrap_err();
    assert_eq!(reason(&error), Code::Failed);
}

#[tokio::test]
async fn a_certificate_in_an_ssh_agent_stands_with_its_key() {
    let home = Home::new();
    let _agent = SshAgent::start(&home);
    let dir = home.path("");
    let (authority, key) = (keygen(&dir, "ca", &["-t", "ed25519"]), keygen(&dir, "user", &["-t", "ed25519"]));
    run(command("ssh-keygen", &dir).args(["-q", "-s"]).arg(authority).args(["-I", "id", "user.pub"])).ok();
    run(command("ssh-add", &dir).env("SSH_AUTH_SOCK", home.path("plain")).arg("-q").arg(key)).ok();
    let keys = Client::connect(home.path("plain")).await.unwrap().keys().await.unwrap();
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0].certificates.len(), 1);
    assert_eq!(keys[0].signs, ["ssh", "ed25519"]);
}

#[tokio::test]
async fn the_ssh_door_with_some_messages_serves_those() {
    let mut home = home("", "");
    let named = ["sign@strongroom.alt", "keys@strongroom.alt"];
    home.configure(&format!("[[listen]]\ndoor = \"ssh\"\npath = {:?}\nmessages = {named:?}", home.path("named")));
    let daemon: Daemon<'_> = home.start();
    let client = Client::connect(home.path("named")).await.unwrap();
    let blob = key(&client, "p256").await.blob;
    let input = || Input::Digest([7; 32][..].into());
    assert!(verifies(&blob, SHA256, &input(), client.sign(&blob, SHA256, input(), Some(PATIENCE)).await.unwrap()));
    let error = client.devices().await.unwrap_err();
    assert!(matches!(error, ClientError::Unsupported("devices")), "{error:?}");
    drop(daemon);
    assert!(client::default_path().ends_with("strongroom/service"));
}
