//! As much of D-Bus as it takes to hear signals and to ask short questions: the wire, and the handshake in front of it (D-Bus
//! Specification 0.43). Knows bytes and one socket; not what is said.
//!
//! The crate `zbus` brings sixty others. What is needed here is a dozen calls a day with strings for arguments.

use std::{io, path::PathBuf, time::Duration};

use rustix::process::geteuid;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

/// The longest message that is taken, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// The longest that D-Bus allows: 128 MiB.
const LONGEST: u32 = 1 << 27;
/// The part of a message that says how long it is.
const HEADER: usize = 16;
/// The longest line of the handshake, in bytes.
const MAX_LINE: usize = 1024;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the system's bus is when nothing else is said.
const SYSTEM: &str = "unix:path=/run/dbus/system_bus_socket";

/// What a message is (section "Message Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something is asked.
    Call = 1,
    /// Its answer.
    Return = 2,
    /// It failed.
    Error = 3,
    /// Something happened.
    Signal = 4,
}

/// A message: who it is from and what it says. Everything in it is a stranger's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// `None` for a kind that is not known here.
    pub kind: Option<Kind>,
    /// The object.
    pub path: String,
    /// What the member belongs to.
    pub interface: String,
    /// The method or signal.
    pub member: String,
    /// Whom it is for; empty for everybody.
    pub destination: String,
    /// Its unique name, which the bus writes.
    pub sender: String,
    /// The sender's number for it.
    pub serial: u32,
    /// Which call it answers.
    pub reply_to: u32,
    /// The arguments' types.
    pub signature: String,
    /// The arguments.
    pub body: Vec<u8>,
}

impl Message {
    /// A call of a method with strings for arguments.
    pub fn call(destination: &str, path: &str, interface: &str, member: &str, args: &[&str]) -> Self {
        let mut body = Vec::new();
        args.iter().for_each(|arg| put_string(&mut body, arg));
        Self {
            kind: Some(Kind::Call),
            destination: destination.to_owned(),
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            signature: "s".repeat(args.len()),
            body,
            ..Self::default()
        }
    }

    /// Whether it is this signal.
    pub fn is_signal(&self, interface: &str, member: &str) -> bool {
        self.kind == Some(Kind::Signal) && self.interface == interface && self.member == member
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![b'l', self.kind.map_or(0, |kind| kind as u8), 0, 1];
        out.extend(u32::try_from(self.body.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(self.serial.to_le_bytes());
        let mut fields = Vec::new();
        for (code, kind, text) in
            [(1, b'o', &self.path), (2, b's', &self.interface), (3, b's', &self.member), (6, b's', &self.destination)]
        {
            if !text.is_empty() {
                align(&mut fields, 8);
                fields.extend([code, 1, kind, 0]);
                put_string(&mut fields, text);
            }
        }
        if self.reply_to != 0 {
            align(&mut fields, 8);
            fields.extend([5, 1, b'u', 0]);
            fields.extend(self.reply_to.to_le_bytes());
        }
        if !self.signature.is_empty() {
            align(&mut fields, 8);
            fields.extend([8, 1, b'g', 0, u8::try_from(self.signature.len()).unwrap_or(u8::MAX)]);
            fields.extend(self.signature.as_bytes());
            fields.push(0);
        }
        out.extend(u32::try_from(fields.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(fields);
        align(&mut out, 8);
        out.extend(&self.body);
        out
    }

    /// Reads a whole message; `None` for what is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Fields::new(bytes)?;
        let kind = match bytes[1] {
            1 => Some(Kind::Call),
            2 => Some(Kind::Return),
            3 => Some(Kind::Error),
            4 => Some(Kind::Signal),
            _ => None,
        };
        r.at = 4;
        let (body_len, serial, fields_len) = (r.u32()? as usize, r.u32()?, r.u32()? as usize);
        let end = r.at.checked_add(fields_len)?;
        let mut message = Self { kind, serial, ..Self::default() };
        while r.at < end {
            r.align(8)?;
            let code = r.u8()?;
            match &*r.signature()? {
                "s" | "o" => {
                    let text = r.string()?;
                    match code {
                        1 => message.path = text,
                        2 => message.interface = text,
                        3 => message.member = text,
                        6 => message.destination = text,
                        7 => message.sender = text,
                        _ => {}
                    }
                }
                "u" => {
                    let number = r.u32()?;
                    if code == 5 {
                        message.reply_to = number;
                    }
                }
                "g" => message.signature = r.signature()?,
                _ => return None,
            }
        }
        r.align(8)?;
        message.body = bytes.get(r.at..r.at.checked_add(body_len)?)?.to_vec();
        Some(message)
    }

    /// The first argument, where it is a boolean.
    pub fn boolean(&self) -> Option<bool> {
        let bytes = self.body.first_chunk::<4>().filter(|_| self.signature == "b")?;
        Some(*bytes != [0; 4])
    }

    /// The first number of the structure in the variant that is the first argument: the user of a session is one of `(uo)`.
    pub fn first_of_pair(&self) -> Option<u32> {
        // The variant's signature with its length and end, then the structure on a boundary of eight.
        if self.signature != "v" || !self.body.starts_with(b"\x04(uo)\0") {
            return None;
        }
        let number = self.body.get(8..12)?.first_chunk().copied()?;
        Some(u32::from_le_bytes(number))
    }
}

fn align(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    align(out, 4);
    out.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(text.as_bytes());
    out.push(0);
}

/// Reads the values of a message, whose places count from its beginning.
struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    /// `None` for another byte order than ours: everybody on this machine has the same.
    fn new(bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() >= 16 && bytes[0] == b'l').then_some(Self { bytes, at: 0 })
    }

    fn align(&mut self, to: usize) -> Option<()> {
        self.at = self.at.next_multiple_of(to);
        (self.at <= self.bytes.len()).then_some(())
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn u32(&mut self) -> Option<u32> {
        self.align(4)?;
        self.take(4)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn text(&mut self, len: usize) -> Option<String> {
        let text = std::str::from_utf8(self.take(len)?).ok()?.to_owned();
        (self.u8()? == 0).then_some(text)
    }

    fn string(&mut self) -> Option<String> {
        let len = self.u32()? as usize;
        self.text(len)
    }

    fn signature(&mut self) -> Option<String> {
        let len = self.u8()?.into();
        self.text(len)
    }
}

/// A connection to a bus, greeted.
pub struct Bus {
    stream: UnixStream,
    serial: u32,
}

impl Bus {
    /// The system's bus, or the one that `DBUS_SYSTEM_BUS_ADDRESS` names.
    pub async fn system() -> io::Result<Self> {
        let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_else(|_| SYSTEM.to_owned());
        Self::connect(&address).await
    }

    /// The bus at this address: `unix:path=…`.
    pub async fn connect(address: &str) -> io::Result<Self> {
        let path = address.split(';').find_map(|address| {
            let pairs = address.strip_prefix("unix:")?.split(',');
            pairs.filter_map(|pair| pair.strip_prefix("path=")).next().map(PathBuf::from)
        });
        let path = path.ok_or_else(|| io::Error::other("the bus has no address of the form unix:path=…"))?;
        let mut stream = UnixStream::connect(path).await?;
        // EXTERNAL: the bus asks the kernel who we are. The uid goes in decimal digits, written in hexadecimal.
        let uid: String = geteuid().as_raw().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes()).await?;
        let greeted =
            timeout(PATIENCE, line(&mut stream)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        if !greeted?.starts_with("OK ") {
            return Err(io::Error::other("the bus does not let us in"));
        }
        stream.write_all(b"BEGIN\r\n").await?;
        let mut bus = Self { stream, serial: 0 };
        bus.ask(&Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "Hello", &[])).await?;
        Ok(bus)
    }

    /// Asks for signals that this rule describes.
    pub async fn watch(&mut self, rule: &str) -> io::Result<()> {
        self.ask(&Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "AddMatch", &[rule])).await.map(drop)
    }

    /// Sends a message under the next number, which it returns.
    pub async fn send(&mut self, message: &Message) -> io::Result<u32> {
        self.serial += 1;
        let message = Message { serial: self.serial, ..message.clone() };
        self.stream.write_all(&message.encode()).await?;
        Ok(self.serial)
    }

    /// Sends a call and waits for its answer. What comes meanwhile is dropped: for what is asked before signals matter.
    pub async fn ask(&mut self, call: &Message) -> io::Result<Message> {
        let answer = async {
            let serial = self.send(call).await?;
            loop {
                let message = self.next().await?;
                match message.kind {
                    Some(Kind::Return) if message.reply_to == serial => return Ok(message),
                    Some(Kind::Error) if message.reply_to == serial => return Err(io::Error::other("the bus refuses")),
                    _ => {}
                }
            }
        };
        timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The next message that can be read here. Others are skipped: anybody may send us some. Dropped halfway, the connection
    /// is of no use any more.
    pub async fn next(&mut self) -> io::Result<Message> {
        loop {
            let mut bytes = vec![0; HEADER];
            self.stream.read_exact(&mut bytes).await?;
            let rest = rest_of(&bytes).ok_or(io::ErrorKind::InvalidData)?;
            if rest > MAX_MESSAGE {
                let mut skipped = (&mut self.stream).take(rest as u64);
                if tokio::io::copy(&mut skipped, &mut tokio::io::sink()).await? < rest as u64 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            bytes.resize(HEADER + rest, 0);
            self.stream.read_exact(&mut bytes[HEADER..]).await?;
            if let Some(message) = Message::decode(&bytes) {
                return Ok(message);
            }
        }
    }
}

/// How much comes behind this beginning of a message, in bytes. `None` for what no bus passes on.
fn rest_of(header: &[u8]) -> Option<usize> {
    let number = |at: usize| {
        let bytes = header.get(at..)?.first_chunk().copied()?;
        let number = match header.first()? {
            b'l' => u32::from_le_bytes(bytes),
            b'B' => u32::from_be_bytes(bytes),
            _ => return None,
        };
        (number <= LONGEST).then_some(number as usize)
    };
    Some(number(12)?.next_multiple_of(8) + number(4)?)
}

/// The bus itself, and its interface.
pub const DBUS: &str = "org.freedesktop.DBus";

/// A line of the handshake.
async fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_has_the_bytes_of_the_specification() {
        let hello = Message { serial: 1, ..Message::call(DBUS, "/org/freedesktop/DBus", DBUS, "Hello", &[]) };
        let bytes = hello.encode();
        // As every client's first message is: 109 bytes of fields.
        assert_eq!(&bytes[..16], b"l\x01\0\x01\0\0\0\0\x01\0\0\0\x6d\0\0\0");
        assert_eq!(&bytes[16..24], b"\x01\x01o\0\x15\0\0\0");
        assert_eq!(bytes.len(), 128);
        assert_eq!(Message::decode(&bytes).unwrap(), hello);
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_skipped() {
        let (stream, mut theirs) = UnixStream::pair().unwrap();
        let mut bus = Bus { stream, serial: 0 };
        let mut long = Message::call(DBUS, "/a", DBUS, "Long", &[]);
        long.body = vec![0; MAX_MESSAGE + 1];
        let mut foreign = Message::call(DBUS, "/a", DBUS, "Foreign", &[]).encode();
        foreign[0] = b'B';
        foreign[4..16].chunks_mut(4).for_each(<[u8]>::reverse);
        let mut mangled = Message::call(DBUS, "/a", DBUS, "Mangled", &[]).encode();
        mangled[17] = 9;
        let wanted = Message::call(DBUS, "/a", DBUS, "Wanted", &[]);
        let bytes = [long.encode(), foreign, mangled, wanted.encode()].concat();
        let (sent, heard) = tokio::join!(theirs.write_all(&bytes), bus.next());
        sent.unwrap();
        assert_eq!(heard.unwrap(), wanted);
        theirs.write_all(b"l\x01\0\x01\xff\xff\xff\xff\0\0\0\0\0\0\0\0").await.unwrap();
        assert_eq!(bus.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn arguments_are_read_where_they_are_what_is_expected() {
        let of = |signature: &str, body: &[u8]| Message {
            signature: signature.to_owned(),
            body: body.to_vec(),
            ..Message::default()
        };
        assert_eq!(of("b", &[1, 0, 0, 0]).boolean(), Some(true));
        assert_eq!(of("b", &[0; 4]).boolean(), Some(false));
        assert_eq!(of("s", &[1, 0, 0, 0]).boolean(), None);
        assert_eq!(of("v", b"\x04(uo)\0\0\0\xe8\x03\0\0").first_of_pair(), Some(1000));
        assert_eq!(of("v", b"\x01u\0\0\xe8\x03\0\0").first_of_pair(), None);
        assert_eq!(of("v", b"\x04(uo)\0").first_of_pair(), None);
    }

    proptest! {
        #[test]
        fn messages_round_trip(path in "/[a-z/]{0,20}", member in "[A-Za-z]{1,20}", args in prop::collection::vec("[^\0]{0,20}", 0..4)) {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let message = Message { serial: 7, reply_to: 3, ..Message::call(DBUS, &path, "a.b", &member, &args) };
            prop_assert_eq!(Message::decode(&message.encode()), Some(message));
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes: Vec<u8>, at: prop::sample::Index, byte: u8) {
            let _ = Message::decode(&bytes);
            bytes.splice(0..0, *b"l\x04\0\x01");
            let _ = Message::decode(&bytes);
            let mut real = Message::call(DBUS, "/a", DBUS, "Hello", &["b"]).encode();
            let at = at.index(real.len());
            real[at] = byte;
            let _ = Message::decode(&real);
        }
    }
}
