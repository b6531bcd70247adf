//! One line of the audit log: what it says, how it is written, and how the ends that chain it to others are read back.
//! Knows no file.
//!
//! A line is one JSON object of numbers and strings, the same fields in the same order (docs/audit.md). Its first field
//! is its number, its last the hash of the line before. What a stranger wrote is harmless and cut short, so that no
//! line is longer than [`MAX_LINE`].

use std::{
    borrow::Cow,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};

use crate::{
    prompt::visible,
    vault::{key::Caller, reason::Code},
};

/// The longest line with its end, in bytes.
pub const MAX_LINE: usize = 1024;
/// The most bytes of a program's path in a line.
const MAX_PROGRAM: usize = 192;
/// The most bytes in a line of any other text that a stranger wrote.
const MAX_TEXT: usize = 128;

/// The hash of a line, without its end.
pub type Hash = [u8; 32];

/// Where a line stands: its number, counted from 1, and its hash. The default is the place before the first line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The line's number: so many were written before it and with it.
    pub seq: u64,
    /// Its hash.
    pub hash: Hash,
}

/// What a line says, but for its number and the hash of the line before.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) at: SystemTime,
    pub(super) peer: Option<Arc<Peer>>,
    pub(super) key: Option<KeyName>,
    pub(super) operation: &'static str,
    pub(super) scheme: Option<&'static str>,
    pub(super) purpose: Option<Purpose>,
    /// Borrowed: a word of ours. Owned: a name that somebody chose.
    pub(super) device: Option<Cow<'static, str>>,
    /// `ok`, or the code of the reason.
    pub(super) outcome: &'static str,
    /// From the request to its outcome.
    pub(super) latency: Option<Duration>,
    /// How many lines this one stands for.
    pub(super) count: Option<u64>,
}

/// A key's fingerprint by SHA-256, as a line has it. It stands in the record itself: a shared one would be written to by
/// every thread that uses the key.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyName([u8; KeyName::LEN]);

impl KeyName {
    /// `SHA256:` and 43 characters of Base64.
    const LEN: usize = 50;

    /// Of a fingerprint.
    pub(super) fn of(fingerprint: &str) -> Self {
        let mut name = [b'?'; Self::LEN];
        let len = fingerprint.len().min(Self::LEN);
        name[..len].copy_from_slice(&fingerprint.as_bytes()[..len]);
        Self(name)
    }

    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl Record {
    /// Something that has no outcome yet, which says that it was given up.
    pub(super) fn begun(operation: &'static str, peer: Option<Arc<Peer>>) -> Self {
        Self {
            at: UNIX_EPOCH,
            peer,
            key: None,
            operation,
            scheme: None,
            purpose: None,
            device: None,
            outcome: Code::Cancelled.as_str(),
            latency: None,
            count: None,
        }
    }
}

/// Who asked, as every line of a connection tells it: its fields are written once.
#[derive(Debug, Default)]
pub struct Peer(OnceLock<Box<[u8]>>);

impl Peer {
    /// The caller's, with its program if that was read before.
    pub(super) fn of(caller: &Caller) -> Arc<Self> {
        caller.peer.0.get_or_init(|| {
            let mut fields = Vec::new();
            put_peer(&mut fields, caller);
            fields.into()
        });
        Arc::clone(&caller.peer)
    }
}

/// What a signature is good for, with the texts cut to what a line takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Login { user: Box<[u8]>, host: Option<String> },
    SshSig { namespace: Box<[u8]> },
    Certificate { key_id: Box<[u8]> },
    Opaque,
}

/// Text as far as a line takes it: what is behind would be cut off anyway.
pub(super) fn cut(text: &[u8]) -> Box<[u8]> {
    text[..text.len().min(MAX_TEXT)].into()
}

/// Writes lines one after another; knows the time of the last, most of whose digits the next one shares.
#[derive(Default)]
pub(super) struct Formatter {
    second: Option<u64>,
    date: String,
}

impl Formatter {
    /// Appends the line that follows `after`, with its end, and gives its position.
    pub(super) fn put(&mut self, out: &mut Vec<u8>, record: &Record, after: Position) -> Position {
        let start = out.len();
        let seq = after.seq.saturating_add(1);
        out.extend_from_slice(b"{\"seq\":");
        put_number(out, seq);
        out.extend_from_slice(b",\"time\":\"");
        self.put_time(out, record.at);
        out.push(b'"');
        if let Some(peer) = &record.peer {
            out.extend_from_slice(peer.0.get().map_or(&[], |fields| fields));
        }
        let plain = [
            ("key", record.key.as_ref().map(KeyName::as_str)),
            ("operation", Some(record.operation)),
            ("scheme", record.scheme),
        ];
        for (name, value) in plain {
            put_plain(out, name, value);
        }
        if let Some(purpose) = &record.purpose {
            put_purpose(out, purpose);
        }
        match &record.device {
            // One of ours, as of all keys in memory.
            Some(Cow::Borrowed(device)) => put_plain(out, "device", Some(device)),
            Some(Cow::Owned(device)) => put_text(out, "device", device.as_bytes(), MAX_TEXT),
            None => {}
        }
        put_plain(out, "outcome", Some(record.outcome));
        let latency = record.latency.map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
        for (name, value) in [("latency_us", latency), ("count", record.count)] {
            if let Some(value) = value {
                put_name(out, name);
                put_number(out, value);
            }
        }
        put_name(out, "previous");
        out.push(b'"');
        put_hex(out, &after.hash);
        out.extend_from_slice(b"\"}");
        let hash = hash(&out[start..]);
        out.push(b'\n');
        Position { seq, hash }
    }

    /// A time of RFC 3339 in UTC, with milliseconds.
    fn put_time(&mut self, out: &mut Vec<u8>, at: SystemTime) {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        if self.second != Some(since.as_secs()) {
            self.second = Some(since.as_secs());
            self.date = date(since.as_secs());
        }
        out.extend_from_slice(self.date.as_bytes());
        let ms = since.subsec_millis();
        out.extend([b'.', digit(ms / 100), digit(ms / 10), digit(ms), b'Z']);
    }
}

/// Date and time of day, UTC, of so many seconds since 1970: `2026-11-25T03:04:05`.
pub fn date(unix: u64) -> String {
    let (day, second) = (unix / 86_400, unix % 86_400);
    // Days since 0000-03-01, in eras of 400 years, so that the leap day is a year's last.
    let day = day + 719_468;
    let (era, of_era) = (day / 146_097, day % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// The last decimal digit.
fn digit(n: u32) -> u8 {
    b'0' + (n % 10) as u8
}

fn put_peer(out: &mut Vec<u8>, caller: &Caller) {
    put_name(out, "uid");
    put_number(out, caller.uid.into());
    if let Some(pid) = caller.pid {
        put_name(out, "pid");
        put_number(out, pid.unsigned_abs().into());
    }
    if let Some(program) = caller.program.known() {
        put_text(out, "program", program.as_os_str().as_encoded_bytes(), MAX_PROGRAM);
    }
    put_plain(out, "door", Some(caller.door).filter(|door| !door.is_empty()));
    put_name(out, "connection");
    put_number(out, caller.connection);
}

fn put_purpose(out: &mut Vec<u8>, purpose: &Purpose) {
    let name = match purpose {
        Purpose::Login { .. } => "login",
        Purpose::SshSig { .. } => "sshsig",
        Purpose::Certificate { .. } => "certificate",
        Purpose::Opaque => "opaque",
    };
    put_plain(out, "purpose", Some(name));
    match purpose {
        Purpose::Login { user, host } => {
            put_text(out, "user", user, MAX_TEXT);
            put_plain(out, "host", host.as_deref());
        }
        Purpose::SshSig { namespace } => put_text(out, "namespace", namespace, MAX_TEXT),
        Purpose::Certificate { key_id } => put_text(out, "key_id", key_id, MAX_TEXT),
        Purpose::Opaque => {}
    }
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

/// A word of ours: nothing in it needs escaping.
fn put_plain(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    let Some(value) = value else { return };
    put_name(out, name);
    out.push(b'"');
    out.extend_from_slice(value.as_bytes());
    out.push(b'"');
}

/// What somebody else wrote: at most `max` bytes of it, harmless, the end marked where it was cut.
fn put_text(out: &mut Vec<u8>, name: &str, text: &[u8], max: usize) {
    const CUT: &str = "…";
    put_name(out, name);
    out.push(b'"');
    let (start, max) = (out.len(), max - CUT.len());
    for c in String::from_utf8_lossy(text).chars().map(visible) {
        let mut utf8 = [0; 4];
        let encoded = c.encode_utf8(&mut utf8).as_bytes();
        let escaped = matches!(c, '"' | '\\');
        if out.len() - start + usize::from(escaped) + encoded.len() > max {
            out.extend_from_slice(CUT.as_bytes());
            break;
        }
        if escaped {
            out.push(b'\\');
        }
        out.extend_from_slice(encoded);
    }
    out.push(b'"');
}

fn put_number(out: &mut Vec<u8>, mut n: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn put_hex(out: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    out.extend(bytes.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]));
}

/// A hash from the digits that [`put_hex`] writes.
fn unhex(digits: &[u8]) -> Option<Hash> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    (digits.len() == 64).then_some(hash)
}

/// The hash of a line without its end.
pub(super) fn hash(line: &[u8]) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, line).as_ref());
    hash
}

/// What chains a line to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Where the line stands.
    pub(super) position: Position,
    /// The hash that it has of the line before.
    pub(super) previous: Hash,
}

impl Link {
    /// Reads the two ends of a line without its end. `None` for what is no line of this log.
    pub(super) fn read(line: &[u8]) -> Option<Self> {
        let rest = line.strip_prefix(b"{\"seq\":")?;
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let seq: u64 = std::str::from_utf8(&rest[..digits]).ok()?.parse().ok().filter(|seq| *seq > 0)?;
        let rest = rest[digits..].strip_suffix(b"\"}")?;
        let (before, previous) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
        before.strip_suffix(b",\"previous\":\"")?;
        let previous = unhex(previous)?;
        Some(Self { position: Position { seq, hash: hash(line) }, previous })
    }

    /// Whether it stands right behind `position`.
    pub(super) fn follows(&self, position: Position) -> bool {
        position.seq.checked_add(1) == Some(self.position.seq) && self.previous == position.hash
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A record that says little.
    pub(in crate::vault::audit) fn record(operation: &'static str) -> Record {
        Record {
            at: UNIX_EPOCH,
            peer: None,
            key: None,
            operation,
            scheme: None,
            purpose: None,
            device: None,
            outcome: "ok",
            latency: None,
            count: None,
        }
    }

    fn line(record: &Record, after: Position) -> (String, Position) {
        let mut out = Vec::new();
        let position = Formatter::default().put(&mut out, record, after);
        assert!(out.len() <= MAX_LINE, "{} bytes", out.len());
        (String::from_utf8(out).unwrap(), position)
    }

    fn full(program: &str, text: &[u8]) -> Record {
        let caller = Caller {
            uid: u32::MAX,
            pid: Some(i32::MAX),
            program: Arc::new(std::path::PathBuf::from(program).into()),
            door: "service",
            connection: u64::MAX,
            ..Caller::default()
        };
        Record {
            at: UNIX_EPOCH + Duration::from_millis(1_764_043_445_067),
            peer: Some(Peer::of(&caller)),
            key: Some(KeyName::of("SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU")),
            scheme: Some("rsa-pkcs1v15-sha256"),
            purpose: Some(Purpose::Login {
                user: cut(text),
                host: Some("SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU".into()),
            }),
            device: Some(String::from_utf8_lossy(text).into_owned().into()),
            outcome: "not_permitted",
            latency: Some(Duration::MAX),
            count: Some(u64::MAX),
            ..record("sign")
        }
    }

    #[test]
    fn a_line_says_who_did_what_with_which_key_and_what_came_of_it() {
        let position = Position { seq: 41, hash: [0xa5; 32] };
        let (text, next) = line(&full("/usr/bin/ssh", b"root"), position);
        let previous = "a5".repeat(32);
        let key = "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU";
        assert_eq!(
            text,
            format!(
                "{{\"seq\":42,\"time\":\"2025-11-25T04:04:05.067Z\",\"uid\":4294967295,\"pid\":2147483647,\
                 \"program\":\"/usr/bin/ssh\",\"door\":\"service\",\"connection\":18446744073709551615,\
                 \"key\":\"{key}\",\"operation\":\"sign\",\"scheme\":\"rsa-pkcs1v15-sha256\",\
                 \"purpose\":\"login\",\"user\":\"root\",\"host\":\"{key}\",\"device\":\"root\",\
                 \"outcome\":\"not_permitted\",\"latency_us\":18446744073709551615,\
                 \"count\":18446744073709551615,\"previous\":\"{previous}\"}}\n"
            )
        );
        let link = Link::read(text.trim_end().as_bytes()).unwrap();
        assert!(link.follows(position) && link.position == next && !link.follows(next));
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let (text, _) = line(&record("start"), Position::default());
        let previous = "0".repeat(64);
        assert_eq!(
            text,
            format!(
                "{{\"seq\":1,\"time\":\"1970-01-01T00:00:00.000Z\",\"operation\":\"start\",\"outcome\":\"ok\",\
                 \"previous\":\"{previous}\"}}\n"
            )
        );
    }

    #[test]
    fn a_text_can_neither_end_its_field_nor_its_line() {
        let (text, _) = line(&full("/tmp/\n\u{202e}x", b"\",\"outcome\":\"ok\\\n\xff"), Position::default());
        assert!(text.contains("\"program\":\"/tmp/\u{fffd}\u{fffd}x\""), "{text}");
        assert!(text.contains(r#""user":"\",\"outcome\":\"ok\\��""#), "{text}");
        assert_eq!(text.matches('\n').count(), 1);
        let (text, _) = line(&full(&"p".repeat(5000), &[b'"'; 500]), Position::default());
        assert!(text.contains("pp…\"") && text.contains("\\\"…\""), "{text}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, expected) in [
            (951_782_399, "2000-02-28T23:59:59"),
            (951_782_400, "2000-02-29T00:00:00"),
            (951_868_800, "2000-03-01T00:00:00"),
            (1_709_164_800, "2024-02-29T00:00:00"),
            (4_107_542_400, "2100-03-01T00:00:00"),
            (1_767_225_599, "2025-12-31T23:59:59"),
        ] {
            assert_eq!(date(unix), expected);
        }
    }

    proptest! {
        #[test]
        fn no_line_is_too_long_and_every_line_is_read_back(program: String, text: Vec<u8>, seq in 0..u64::MAX) {
            let after = Position { seq, hash: [7; 32] };
            let (text, position) = line(&full(&program, &text), after);
            let link = Link::read(text.trim_end_matches('\n').as_bytes()).unwrap();
            prop_assert!(link.follows(after) && link.position == position);
            prop_assert_eq!(text.matches('\n').count(), 1);
        }

        #[test]
        fn arbitrary_bytes_are_no_line_and_do_no_harm(bytes: Vec<u8>) {
            prop_assert_eq!(Link::read(&bytes), None);
        }
    }
}
