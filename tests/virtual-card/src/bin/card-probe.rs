//! Looks at a card, and prepares it, in APDUs of its own: what tests hold Strongroom against.
//!
//! ```text
//! card-probe wait READER present|empty      ends when the reader is so
//! card-probe send READER APDU…              in one transaction; prints the answers, all in hexadecimal
//! card-probe generate READER SLOT ALGORITHM with the PIN of new cards; SLOT is sign, decrypt or authenticate
//! ```

use std::{env, error::Error, ffi::CString};

use pcsc::{Card, Context, Disposition, Protocols, ReaderState, Scope, ShareMode, State, Transaction};
use sha1::{Digest, Sha1};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// 2023-11-14 22:13:20 UTC, when all keys of tests were made.
const CREATED: [u8; 4] = 1_700_000_000_u32.to_be_bytes();

fn main() -> Outcome<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let context = Context::establish(Scope::User)?;
    match words[..] {
        ["wait", reader, "present"] => wait(&context, reader, true),
        ["wait", reader, "empty"] => wait(&context, reader, false),
        ["send", reader, ref apdus @ ..] => with_card(&context, reader, |card| {
            for apdu in apdus {
                println!("{}", to_hex(&transmit(card, &from_hex(apdu)?)?));
            }
            Ok(())
        }),
        ["generate", reader, slot, algorithm] => {
            with_card(&context, reader, |card| generate(card, Slot::named(slot)?, Algorithm::named(algorithm)?))
        }
        _ => Err("card-probe wait|send|generate READER …".into()),
    }
}

fn wait(context: &Context, reader: &str, present: bool) -> Outcome<()> {
    let mut states = [ReaderState::new(CString::new(reader)?, State::UNAWARE)];
    loop {
        context.get_status_change(None, &mut states)?;
        let state = states[0].event_state();
        // A card that is not readable yet is mute or unpowered for a moment.
        if state.contains(State::PRESENT) == present && !state.contains(State::MUTE) {
            return Ok(());
        }
        states[0].sync_current_state();
    }
}

/// The card is left as it was: a reset would forget the PINs of others.
fn with_card(context: &Context, reader: &str, work: impl FnOnce(&Transaction) -> Outcome<()>) -> Outcome<()> {
    let mut card: Card = context.connect(&CString::new(reader)?, ShareMode::Shared, Protocols::ANY)?;
    let transaction = card.transaction()?;
    let result = work(&transaction);
    transaction.end(Disposition::LeaveCard).map_err(|(_, error)| error)?;
    card.disconnect(Disposition::LeaveCard).map_err(|(_, error)| error)?;
    result
}

fn transmit(card: &Transaction, apdu: &[u8]) -> Outcome<Vec<u8>> {
    let mut buffer = [0; 4096];
    Ok(card.transmit(apdu, &mut buffer)?.to_vec())
}

/// Sends a short command with data and returns the answer's data, or the status that is none of success.
fn command(card: &Transaction, header: [u8; 4], data: &[u8]) -> Outcome<Vec<u8>> {
    let mut apdu = header.to_vec();
    apdu.push(u8::try_from(data.len())?);
    apdu.extend_from_slice(data);
    apdu.push(0);
    let mut answer = Vec::new();
    loop {
        let part = transmit(card, &apdu)?;
        let (data, status) = part.split_last_chunk::<2>().ok_or("no status")?;
        answer.extend_from_slice(data);
        match status {
            [0x90, 0] => return Ok(answer),
            [0x61, length] => apdu = vec![0, 0xC0, 0, 0, *length],
            _ => return Err(format!("{header:02x?}: status {status:02x?}").into()),
        }
    }
}

fn put_data(card: &Transaction, tag: u8, data: &[u8]) -> Outcome<()> {
    command(card, [0, 0xDA, 0, tag], data).map(drop)
}

/// A place for a key, with its tags (OpenPGP card 3.4, 4.4.3.12 and 7.2.14).
struct Slot {
    attributes: u8,
    fingerprint: u8,
    created: u8,
    template: u8,
}

impl Slot {
    fn named(name: &str) -> Outcome<Self> {
        let (attributes, fingerprint, created, template) = match name {
            "sign" => (0xC1, 0xC7, 0xCE, 0xB6),
            "decrypt" => (0xC2, 0xC8, 0xCF, 0xB8),
            "authenticate" => (0xC3, 0xC9, 0xD0, 0xA4),
            _ => return Err(format!("there is no slot {name}").into()),
        };
        Ok(Self { attributes, fingerprint, created, template })
    }
}

/// What makes a key: its algorithm in the numbers of OpenPGP (RFC 9580, 9.1), and its curve.
enum Algorithm {
    Rsa { bits: u16 },
    Curve { id: u8, oid: &'static [u8], kdf: Option<[u8; 2]> },
}

impl Algorithm {
    fn named(name: &str) -> Outcome<Self> {
        const P256: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 3, 1, 7];
        const P384: &[u8] = &[0x2B, 0x81, 4, 0, 0x22];
        const P521: &[u8] = &[0x2B, 0x81, 4, 0, 0x23];
        const ED25519: &[u8] = &[0x2B, 6, 1, 4, 1, 0xDA, 0x47, 0x0F, 1];
        const CV25519: &[u8] = &[0x2B, 6, 1, 4, 1, 0x97, 0x55, 1, 5, 1];
        let ecdsa = |oid| Self::Curve { id: 19, oid, kdf: None };
        let ecdh = |oid, hash, cipher| Self::Curve { id: 18, oid, kdf: Some([hash, cipher]) };
        Ok(match name {
            "rsa2048" => Self::Rsa { bits: 2048 },
            "rsa3072" => Self::Rsa { bits: 3072 },
            "rsa4096" => Self::Rsa { bits: 4096 },
            "ed25519" => Self::Curve { id: 22, oid: ED25519, kdf: None },
            "cv25519" => ecdh(CV25519, 8, 7),
            "ecdsa-p256" => ecdsa(P256),
            "ecdsa-p384" => ecdsa(P384),
            "ecdsa-p521" => ecdsa(P521),
            "ecdh-p256" => ecdh(P256, 8, 7),
            "ecdh-p384" => ecdh(P384, 9, 8),
            "ecdh-p521" => ecdh(P521, 10, 9),
            _ => return Err(format!("there is no algorithm {name}").into()),
        })
    }

    fn attributes(&self) -> Vec<u8> {
        match self {
            Self::Rsa { bits } => [&[1][..], &bits.to_be_bytes(), &[0, 32, 0]].concat(),
            Self::Curve { id, oid, .. } => [&[*id][..], oid].concat(),
        }
    }

    /// The body of a version 4 public key packet (RFC 9580, 5.5.2.2).
    fn packet(&self, public: &[u8]) -> Outcome<Vec<u8>> {
        let mut body = [&[4][..], &CREATED].concat();
        match self {
            Self::Rsa { .. } => {
                body.push(1);
                put_mpi(&mut body, find(public, 0x81)?);
                put_mpi(&mut body, find(public, 0x82)?);
            }
            Self::Curve { id, oid, kdf } => {
                body.extend_from_slice(&[*id, u8::try_from(oid.len())?]);
                body.extend_from_slice(oid);
                let point = find(public, 0x86)?;
                let native: &[u8] = if point.len() == 32 { &[0x40] } else { &[] };
                put_mpi(&mut body, &[native, point].concat());
                if let Some([hash, cipher]) = kdf {
                    body.extend_from_slice(&[3, 1, *hash, *cipher]);
                }
            }
        }
        Ok(body)
    }
}

fn generate(card: &Transaction, slot: Slot, algorithm: Algorithm) -> Outcome<()> {
    command(card, [0, 0x20, 0, 0x83], b"12345678")?;
    put_data(card, slot.attributes, &algorithm.attributes())?;
    let public = command(card, [0, 0x47, 0x80, 0], &[slot.template, 0])?;
    let packet = algorithm.packet(find(&public, 0x7F49)?)?;
    let mut hash = Sha1::new_with_prefix([0x99]);
    hash.update(u16::try_from(packet.len())?.to_be_bytes());
    hash.update(&packet);
    let fingerprint = hash.finalize();
    put_data(card, slot.fingerprint, &fingerprint)?;
    put_data(card, slot.created, &CREATED)?;
    println!("{}", to_hex(&fingerprint));
    Ok(())
}

fn put_mpi(out: &mut Vec<u8>, number: &[u8]) {
    let start = number.iter().position(|byte| *byte != 0).unwrap_or(number.len());
    let number = &number[start..];
    let bits = number.first().map_or(0, |first| number.len() * 8 - first.leading_zeros() as usize);
    out.extend_from_slice(&u16::try_from(bits).expect("a key's length").to_be_bytes());
    out.extend_from_slice(number);
}

/// The value of the first data object with this tag, in BER-TLV.
fn find(mut objects: &[u8], wanted: u16) -> Outcome<&[u8]> {
    while !objects.is_empty() {
        let mut tag = u16::from(take(&mut objects, 1)?[0]);
        if tag & 0x1F == 0x1F {
            tag = tag << 8 | u16::from(take(&mut objects, 1)?[0]);
        }
        let length = match take(&mut objects, 1)?[0] {
            0x81 => usize::from(take(&mut objects, 1)?[0]),
            0x82 => take(&mut objects, 2)?.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
            length => usize::from(length),
        };
        let value = take(&mut objects, length)?;
        if tag == wanted {
            return Ok(value);
        }
    }
    Err(format!("there is no data object {wanted:x}").into())
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Outcome<&'a [u8]> {
    bytes.split_off(..length).ok_or_else(|| "cut short".into())
}

fn from_hex(text: &str) -> Outcome<Vec<u8>> {
    let digits = text.as_bytes().chunks(2).map(|pair| Ok(u8::from_str_radix(str::from_utf8(pair)?, 16)?));
    digits.collect()
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
