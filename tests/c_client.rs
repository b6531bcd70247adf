//! The C client of contrib/c under AddressSanitizer and UndefinedBehaviorSanitizer, against a daemon that this file plays:
//! one that keeps the rules of docs/protocol.md, and many that break them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test may stop here")]

mod support;

use std::{
    collections::VecDeque,
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
    thread,
};

use strongroom::{
    agent::message::{
        Answer, Cancelled, Code, Collected, Failure, Finished, How, KeyUse, Name, Request, Submit, fitting, put_reply,
    },
    devices::{Operation, Scheme},
    rfc4251::Reader,
};
use support::c::Program;
use tempfile::TempDir;
use zeroize::Zeroizing;

/// The programs, built once for all tests.
fn built() -> &'static Path {
    static BUILT: OnceLock<TempDir> = OnceLock::new();
    let dir = BUILT.get_or_init(|| {
        let dir = TempDir::with_prefix("strongroom-c-").unwrap();
        Program::Driver.sanitized(dir.path());
        Program::Authority.sanitized(dir.path());
        dir
    });
    dir.path()
}

/// Runs `program` against a daemon that answers its only connection as `daemon` does.
fn run<T: Send>(program: &str, arguments: &[&str], daemon: impl FnOnce(Peer) -> T + Send) -> (Output, T) {
    let dir = TempDir::with_prefix("strongroom-c-").unwrap();
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut command = Command::new(built().join(program));
    command.arg(&socket).args(arguments).env("ASAN_OPTIONS", "detect_leaks=1");
    thread::scope(|scope| {
        let daemon = scope.spawn(move || daemon(Peer { stream: listener.accept().unwrap().0 }));
        let output = command.output().unwrap();
        (output, daemon.join().unwrap())
    })
}

/// The lines that the driver printed. It and the sanitizers had nothing to complain about.
fn drive<T: Send>(
    mode: &str,
    count: usize,
    deadline_ms: u32,
    daemon: impl FnOnce(Peer) -> T + Send,
) -> (Vec<String>, T) {
    let (output, seen) = run("driver", &[mode, &count.to_string(), &deadline_ms.to_string()], daemon);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.is_empty(), "{}: {stderr}", output.status);
    (String::from_utf8(output.stdout).unwrap().lines().map(ToOwned::to_owned).collect(), seen)
}

/// The client, as the daemon sees it.
struct Peer {
    stream: UnixStream,
}

/// A ticket's id and what was asked.
type Ticket = (u64, Vec<u8>);

impl Peer {
    /// The next frame's body; `None` when the client is gone.
    fn frame(&mut self) -> Option<Vec<u8>> {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).ok()?;
        let mut body = vec![0; u32::from_be_bytes(head) as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some(body)
    }

    /// The next frame if it is a submit, accepted; else what came in its place is left unanswered.
    fn accept(&mut self) -> Ticket {
        let body = self.frame().unwrap();
        let Request::Submit(submit) = request(&body) else { panic!("no submit") };
        self.reply(Name::Submit, Ok(&()));
        (submit.id, asked(&submit))
    }

    /// Waits for a collect.
    fn expect_collect(&mut self) {
        assert!(matches!(request(&self.frame().unwrap()), Request::Collect(_)));
    }

    /// Writes; a client that is gone does not mind.
    fn send(&mut self, bytes: &[u8]) {
        match self.stream.write_all(bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
            result => result.unwrap(),
        }
    }

    fn reply<'a, T: Answer<'a>>(&mut self, name: Name, reply: Result<&T, &Failure>) {
        self.send(&framed(name, reply));
    }

    fn collected(&mut self, finished: Vec<Finished>, more: bool) {
        self.reply(Name::Collect, Ok(&Collected { finished, more }));
    }

    /// Takes what comes, and answers nothing, until the client is gone: it is not to see this end first.
    fn linger(mut self) {
        while self.frame().is_some() {}
    }

    /// Reads until the client is gone; the ids that it cancelled.
    fn cancelled(mut self) -> Vec<u64> {
        let mut cancelled = Vec::new();
        while let Some(body) = self.frame() {
            if let Request::Cancel(id) = request(&body) {
                cancelled.push(id);
            }
        }
        cancelled
    }

    /// Keeps every rule: whatever is asked is done when the next frame comes, and collected last first.
    fn serve(mut self) {
        let (mut finished, mut waiting) = (VecDeque::new(), false);
        while let Some(body) = self.frame() {
            if waiting {
                self.collected(Vec::new(), false);
                waiting = false;
            }
            match request(&body) {
                Request::Submit(submit) => {
                    self.reply(Name::Submit, Ok(&()));
                    finished.push_front(done(&(submit.id, asked(&submit))));
                }
                Request::Collect(_) if finished.is_empty() => waiting = true,
                Request::Collect(collect) => {
                    let (taken, more) = fitting(finished.iter().cloned(), collect.max);
                    finished.drain(..taken.len());
                    self.collected(taken, more);
                }
                Request::Cancel(id) => {
                    finished.retain(|ticket| ticket.id != id);
                    self.reply(Name::Cancel, Ok(&Cancelled::Finished));
                }
                _ => panic!("the client has no other messages"),
            }
        }
    }
}

fn framed<'a, T: Answer<'a>>(name: Name, reply: Result<&T, &Failure>) -> Vec<u8> {
    let mut out = Vec::new();
    put_reply(&mut out, name, reply);
    out
}

fn request(body: &[u8]) -> Request<'_> {
    let mut r = Reader::new(body);
    assert_eq!(r.u8(), Ok(27));
    let name = Name::from_bytes(r.string().unwrap()).unwrap();
    Request::read(name, r.rest()).unwrap()
}

/// What was asked, in words.
fn asked(submit: &Submit<'_>) -> Vec<u8> {
    assert_eq!(submit.task.key, b"key");
    match &submit.task.how {
        How::Ssh { flags: 4, data } => [b"sign ", *data].concat(),
        How::Operation(Operation::Decrypt { label, ciphertext, .. }) => {
            [b"decrypt ", &**label, b" ", ciphertext].concat()
        }
        How::Operation(Operation::Derive { peer, .. }) => [b"derive ", &**peer].concat(),
        _ => panic!("the driver asks for nothing else"),
    }
}

fn done(ticket: &Ticket) -> Finished {
    Finished { id: ticket.0, reply: Ok(Zeroizing::new(ticket.1.clone())) }
}

fn failed(id: u64, failure: Failure) -> Finished {
    Finished { id, reply: Err(failure) }
}

/// Every request ended well, each once; the order does not matter.
#[track_caller]
fn assert_all_signed(mut lines: Vec<String>, count: usize) {
    assert_eq!(lines.pop().as_deref(), Some("end"));
    let mut expected: Vec<String> = (0..count).map(|n| format!("{n} ok sign data {n}")).collect();
    lines.sort();
    expected.sort();
    assert_eq!(lines, expected);
}

#[test]
fn each_request_gets_its_own_result() {
    let (lines, ()) = drive("all", 2000, 30_000, Peer::serve);
    assert_all_signed(lines, 2000);
    let (lines, ()) = drive("chain", 200, 30_000, Peer::serve);
    assert_all_signed(lines, 200);
}

#[test]
fn the_three_operations_carry_their_fields() {
    let (mut lines, ()) = drive("mixed", 3, 0, Peer::serve);
    lines.sort();
    assert_eq!(lines, ["0 ok sign data 0", "1 ok decrypt label data 1", "2 ok derive data 2", "end"]);
}

#[test]
fn a_collect_waits_for_what_comes_late() {
    let (lines, ()) = drive("all", 1, 0, |mut peer| {
        let ticket = peer.accept();
        peer.expect_collect();
        peer.collected(Vec::new(), false);
        peer.expect_collect();
        peer.collected(vec![done(&ticket)], false);
        assert!(peer.frame().is_none(), "nothing is outstanding, so nothing is collected");
    });
    assert_all_signed(lines, 1);
}

#[test]
fn bytes_may_come_one_by_one() {
    let (lines, ()) = drive("all", 3, 0, |mut peer| {
        let tickets: Vec<Ticket> = (0..3).map(|_| peer.accept()).collect();
        peer.expect_collect();
        let finished = tickets.iter().map(done).collect();
        for byte in framed(Name::Collect, Ok(&Collected { finished, more: false })) {
            peer.send(&[byte]);
        }
        assert!(peer.frame().is_none());
    });
    assert_all_signed(lines, 3);
}

#[test]
fn large_results_arrive_whole() {
    let (lines, ()) = drive("all", 1, 0, |mut peer| {
        let (id, _) = peer.accept();
        peer.expect_collect();
        peer.collected(vec![done(&(id, vec![b'x'; 200_000]))], false);
        peer.linger();
    });
    assert_eq!(lines[0], format!("0 ok {}", "x".repeat(200_000)));
}

#[test]
fn an_id_that_is_not_outstanding_means_nothing() {
    let (lines, ()) = drive("all", 2, 0, |mut peer| {
        let (one, two) = (peer.accept(), peer.accept());
        peer.expect_collect();
        let strange =
            [0, 1 << 32, u64::MAX, 0xffff_ffff, one.0 + (1 << 32), 3, 16_385].map(|id| done(&(id, b"x".into())));
        let twice = [done(&one), done(&one)];
        peer.collected(strange.into_iter().chain(twice).collect(), true);
        peer.expect_collect();
        peer.collected(vec![done(&one), done(&two)], false);
        peer.linger();
    });
    assert_all_signed(lines, 2);
}

#[test]
fn refusals_say_why() {
    let (mut lines, ()) = drive("all", 6, 0, |mut peer| {
        for _ in 0..2 {
            peer.frame().unwrap();
        }
        let busy = Failure::new(Code::Busy, "too much is waiting");
        peer.reply::<()>(Name::Submit, Err(&busy));
        peer.send(&[0, 0, 0, 1, 5]);
        peer.frame().unwrap();
        peer.send(&[0, 0, 0, 1, 28]);
        let tickets: Vec<Ticket> = (3..6).map(|_| peer.accept()).collect();
        peer.expect_collect();
        let wrong = Failure { tries_left: Some(2), ..Failure::new(Code::PinWrong, "the PIN is wrong") };
        let long = Failure::new(Code::Failed, "m".repeat(1024));
        peer.collected(vec![failed(tickets[0].0, wrong), failed(tickets[1].0, long)], true);
        peer.expect_collect();
        // A code that this client does not know.
        let mut newer = framed(
            Name::Collect,
            Ok(&Collected {
                finished: vec![failed(tickets[2].0, Failure::new(Code::Absent, "it burns"))],
                more: false,
            }),
        );
        let at = newer.windows(6).position(|window| window == b"absent").unwrap();
        newer[at..at + 6].copy_from_slice(b"onfire");
        peer.send(&newer);
        peer.linger();
    });
    lines.sort();
    let long = format!("4 failed {} (retry 0, tries -1)", "m".repeat(1024));
    assert_eq!(
        lines,
        [
            "0 busy too much is waiting (retry 200, tries -1)",
            "1 unsupported the agent does not speak Strongroom's messages here (retry 0, tries -1)",
            "2 bad_request the agent could not read the request (retry 0, tries -1)",
            "3 pin_wrong the PIN is wrong (retry 0, tries 2)",
            &long,
            "5 failed it burns (retry 0, tries -1)",
            "end",
        ]
    );
}

#[test]
fn a_collect_that_fails_is_tried_again() {
    let (lines, ()) = drive("all", 1, 0, |mut peer| {
        let ticket = peer.accept();
        peer.expect_collect();
        let busy = Failure { retry_after_ms: 10, ..Failure::new(Code::Busy, "later") };
        peer.reply::<Collected>(Name::Collect, Err(&busy));
        peer.expect_collect();
        peer.collected(vec![done(&ticket)], false);
        peer.linger();
    });
    assert_all_signed(lines, 1);
}

#[test]
fn a_daemon_that_does_not_answer_is_given_up() {
    for accepts in [true, false] {
        let (lines, cancelled) = drive("all", 5, 50, |mut peer| {
            if accepts {
                (0..5).for_each(|_| drop(peer.accept()));
            }
            peer.cancelled()
        });
        assert_eq!(lines.len(), 6);
        for (n, line) in lines[..5].iter().enumerate() {
            assert_eq!(*line, format!("{n} timeout the daemon did not answer in time (retry 0, tries -1)"));
        }
        assert_eq!(cancelled.len(), 5, "and told so");
    }
}

#[test]
fn what_is_cancelled_is_not_heard_of() {
    let (lines, (tickets, cancelled)) = drive("cancel", 4, 0, |mut peer| {
        let (mut tickets, mut cancelled) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            tickets.push(peer.accept());
            tickets.push(peer.accept());
            let Request::Cancel(id) = request(&peer.frame().unwrap()) else { panic!("no cancel") };
            cancelled.push(id);
            peer.reply(Name::Cancel, Ok(&Cancelled::Abandoned));
        }
        peer.expect_collect();
        // All the same, all of them come.
        peer.collected(tickets.iter().map(done).collect(), false);
        peer.linger();
        (tickets, cancelled)
    });
    assert_eq!(cancelled, [tickets[1].0, tickets[3].0]);
    assert_eq!(lines, ["0 ok sign data 0", "2 ok sign data 2", "end"]);
}

#[test]
fn a_callback_may_close_the_connection() {
    let (lines, ()) = drive("close", 3, 0, Peer::serve);
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(lines[1], "closed");
}

#[test]
fn what_breaks_the_protocol_ends_the_connection() {
    let collected = framed(Name::Collect, Ok(&Collected { finished: vec![done(&(99, b"x".into()))], more: false }));
    let body = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat();
    let head = |status: &[u8]| body(&[&collected[4..4 + 1 + 4 + Name::Collect.as_str().len()], status].concat());
    let mut cut: Vec<Vec<u8>> = (6..collected.len()).map(|end| body(&collected[4..end])).collect();
    // The last byte of all is `more`, which the client need not read.
    cut.pop();
    let wrong = [
        vec![0, 0, 0, 0],
        vec![0, 4, 0, 1, 29],
        vec![255; 64],
        body(&[6]),
        body(&[14, 0, 0, 0, 0]),
        body(&[29]),
        body(&[29, 255, 255, 255, 255, 1]),
        framed(Name::Cancel, Ok(&Cancelled::Unknown)),
        head(&[]),
        head(&[0]),
        head(&[0, 255, 255, 255, 255]),
        head(&[0, 0, 0, 0, 1, 255, 255, 255, 255]),
        head(&[1]),
        head(&[2, 0, 0, 0, 0]),
        [collected.clone(), framed(Name::Collect, Ok(&Collected { finished: vec![], more: false }))].concat(),
    ];
    wrong.iter().chain(&cut).for_each(|bytes| breaks(bytes));
}

/// Checks that the connection ends when these bytes come in place of the reply to the collect.
fn breaks(bytes: &[u8]) {
    let (lines, ()) = drive("all", 2, 0, |mut peer| {
        peer.accept();
        peer.accept();
        peer.expect_collect();
        peer.send(bytes);
        peer.linger();
    });
    let why = "disconnected the daemon broke the protocol (retry 0, tries -1)";
    assert_eq!(
        lines,
        [
            &format!("0 {why}"),
            &format!("1 {why}"),
            "lost: EPROTO",
            "2 refused Transport endpoint is not connected",
            "end"
        ],
        "{bytes:?}"
    );
}

#[test]
fn a_daemon_that_hangs_up_ends_everything() {
    let (lines, ()) = drive("all", 1, 0, |mut peer| {
        peer.accept();
        peer.expect_collect();
        let reply = framed(Name::Collect, Ok(&Collected { finished: Vec::new(), more: false }));
        peer.send(&reply[..reply.len() / 2]);
    });
    assert_eq!(
        lines[..2],
        ["0 disconnected the connection to the daemon is lost (retry 0, tries -1)", "lost: ECONNRESET"]
    );
}

#[test]
fn nobody_is_there() {
    let dir = TempDir::with_prefix("strongroom-c-").unwrap();
    let output = Command::new(built().join("driver")).arg(dir.path().join("none")).args(["all", "1", "0"]).output();
    assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap(), "open: No such file or directory\n");
}

#[test]
fn buffers_are_bounded() {
    let (lines, ()) = drive("limits", 0, 0, Peer::linger);
    assert_eq!(
        lines,
        ["too long: 1 1 1 1 1", "invalid: 1 1 1 1", "5 large ones until ENOBUFS", "many small ones until ENOBUFS"]
    );
}

/// A public key file with a blob that the fake daemon does not look at.
fn key_file(dir: &Path) -> PathBuf {
    let path = dir.join("key.pub");
    fs::write(&path, "ssh-rsa a2V5 somebody\n").unwrap();
    path
}

/// The example's output, its exit code and whether its loop was on time: never later than a loaded machine under a
/// sanitizer may be, which is far less than a vote is waited for.
fn authority<T: Send>(
    dir: &Path,
    schedule: [&str; 3],
    daemon: impl FnOnce(Peer) -> T + Send,
) -> (String, i32, bool, T) {
    let key = key_file(dir);
    let arguments = [key.to_str().unwrap(), dir.to_str().unwrap()];
    let (output, seen) = run("authority", &[&arguments[..], &schedule].concat(), daemon);
    let stdout = String::from_utf8(output.stdout).unwrap();
    let late = stdout.trim_end().strip_suffix(" ms").and_then(|line| line.rsplit(' ').next()?.parse().ok());
    let late: f64 = late.unwrap_or_else(|| panic!("{stdout}{}", String::from_utf8_lossy(&output.stderr)));
    let deadline: f64 = schedule[2].parse().unwrap();
    (stdout, output.status.code().unwrap(), late < deadline / 4.0, seen)
}

#[test]
fn the_authority_has_its_votes_signed() {
    let dir = TempDir::with_prefix("strongroom-c-").unwrap();
    let (stdout, code, on_time, digests) = authority(dir.path(), ["3", "30", "20000"], |mut peer| {
        let mut digests = Vec::new();
        let mut open: Vec<Ticket> = Vec::new();
        while let Some(body) = peer.frame() {
            match request(&body) {
                Request::Submit(Submit { id, task: KeyUse { how: How::Operation(operation), key }, .. }) => {
                    let Operation::Sign { scheme: Scheme::RsaPkcs1v15Raw, input } = operation else {
                        panic!("no raw RSA")
                    };
                    assert_eq!((key, input.bytes().len()), (&b"key"[..], 32));
                    digests.push(input.bytes().to_vec());
                    open.push((id, [b"signature of ", input.bytes()].concat()));
                    peer.reply(Name::Submit, Ok(&()));
                }
                Request::Collect(_) => {
                    peer.collected(open.iter().map(done).collect(), false);
                    open.clear();
                }
                _ => panic!("nothing else is asked"),
            }
        }
        digests
    });
    assert_eq!((code, digests.len()), (0, 3), "{stdout}");
    assert!(stdout.contains("3 of 3 votes signed") && on_time, "{stdout}");
    for (n, digest) in digests.iter().enumerate() {
        let vote = fs::read(dir.path().join(format!("vote-{}", n + 1))).unwrap();
        assert_eq!(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &vote).as_ref(), digest);
        let signature = fs::read(dir.path().join(format!("vote-{}.sig", n + 1))).unwrap();
        assert_eq!(signature, [b"signature of ", &digest[..]].concat());
    }
}

#[test]
fn the_authority_gives_up_at_its_deadline_and_ticks_on() {
    let dir = TempDir::with_prefix("strongroom-c-").unwrap();
    let (stdout, code, on_time, cancelled) = authority(dir.path(), ["2", "20", "4000"], Peer::cancelled);
    assert_eq!((code, cancelled.len()), (1, 2), "{stdout}");
    assert!(stdout.contains("vote 1: timeout") && stdout.contains("vote 2: timeout"), "{stdout}");
    assert!(stdout.contains("0 of 2 votes signed") && on_time, "{stdout}");
}
