//! Administration of OpenPGP cards, as drivers are asked for it: what a card says of itself, and what can be changed on it.
//! Knows the names of the specification (OpenPGP card 3.4.1) and one form in bytes, for processes and for messages; no
//! driver.

use secrecy::{ExposeSecret, SecretString};
use thiserror::Error;

use super::{CardSlot, MAX_BLOB, MAX_LABEL, Touch, life::choices};
use crate::rfc4251::{Put, Reader, WireError};

/// The longest PIN or resetting code, in bytes.
pub const MAX_CARD_PIN: usize = 127;
/// The longest name, URL or other text on a card, in bytes of UTF-8.
pub const MAX_CARD_TEXT: usize = 1024;

/// What [`CardChange::put`] and [`CardStatus::put`] write besides texts and blobs: more than their lengths take.
const OVERHEAD: usize = 256;

choices! {
    /// The passwords of a card (section 4.3).
    CardPin {
        /// PW1, for the use of keys.
        User = "user",
        /// The resetting code, which does nothing but give the user a new PIN.
        ResetCode = "reset-code",
        /// PW3, for everything else.
        Admin = "admin",
    }
}

impl CardPin {
    /// The fewest characters that it has (section 4.3).
    pub fn shortest(self) -> usize {
        match self {
            Self::User => 6,
            Self::ResetCode | Self::Admin => 8,
        }
    }
}

choices! {
    /// The texts on a card that people set (section 4.4.1).
    CardText {
        /// The holder's name, at most 39 characters of Latin-1: `Example<<Ann` is Ann Example.
        Name = "name",
        /// Where the public keys are to be found.
        Url = "url",
        /// Login data: by custom the name of an account.
        Login = "login",
        /// The holder's languages: up to four of two letters each, as in ISO 639-1.
        Language = "language",
    }
}

choices! {
    /// The touch policy of a slot, as a card has it (section 4.4.3.6, and YubiKeys'). [`Touch`] is what can be asked for.
    TouchPolicy {
        /// No touch.
        Off = "off",
        /// A touch for each use.
        On = "on",
        /// The same, until the key is replaced or the card reset.
        Fixed = "fixed",
        /// A touch, which then holds for fifteen seconds.
        Cached = "cached",
        /// The same, until the key is replaced or the card reset.
        CachedFixed = "cached-fixed",
    }
}

/// One administrative change of a card. It does not print: it holds PINs.
#[derive(Clone)]
pub enum CardChange {
    /// Gives the user, the admin or the resetting code another value.
    SetPin {
        /// Which.
        pin: CardPin,
        /// What allows it: the PIN as it was; for the resetting code the admin PIN.
        secret: SecretString,
        /// The new one.
        new: SecretString,
    },
    /// Gives the user a new PIN, and all tries, when the old one is blocked or forgotten.
    ResetPin {
        /// What `secret` is: the admin PIN or the resetting code.
        by: CardPin,
        /// What allows it.
        secret: SecretString,
        /// The user's new PIN.
        new: SecretString,
    },
    /// Sets the touch policy of a slot.
    SetTouch {
        /// The slot.
        slot: CardSlot,
        /// From now on.
        touch: Touch,
        /// The admin PIN.
        secret: SecretString,
    },
    /// Says for how long the user's PIN serves the signing key.
    SetSignaturePin {
        /// Whether each signature wants it anew; else one is enough until the card goes.
        each: bool,
        /// The admin PIN.
        secret: SecretString,
    },
    /// Writes a text; an empty one removes it.
    SetText {
        /// Which.
        text: CardText,
        /// At most [`MAX_CARD_TEXT`] bytes; some cards take less.
        value: String,
        /// The admin PIN.
        secret: SecretString,
    },
    /// Deletes all keys and data, and sets all PINs to those of a new card. Needs no PIN.
    FactoryReset {
        /// The card's serial number, eight hexadecimal digits: that the caller means this one.
        serial: String,
    },
}

/// What a card says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CardStatus {
    /// Manufacturer and serial number in hexadecimal: `0006:12345678`.
    pub ident: String,
    /// The specification's version, major and minor.
    pub version: [u8; 2],
    /// The manufacturer's name; empty where the number is not known.
    pub manufacturer: String,
    /// The holder's name as it is on the card.
    pub name: String,
    /// The holder's languages.
    pub language: String,
    /// Where the public keys are to be found.
    pub url: String,
    /// Login data.
    pub login: String,
    /// Tries that are left: for the user's PIN, the resetting code (0 where none is set) and the admin PIN.
    pub tries: [u8; 3],
    /// Whether each signature wants the user's PIN anew.
    pub pin_per_signature: bool,
    /// Signatures so far.
    pub signatures: u32,
    /// PINs that are known to be those of new cards, since they were accepted.
    pub default_pins: Vec<CardPin>,
    /// The slots.
    pub slots: Vec<SlotStatus>,
}

/// What a card says of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// The slot.
    pub slot: CardSlot,
    /// What keys here compute with: [`Algorithm`](super::Algorithm)'s names where they are known, else the card's.
    pub algorithm: String,
    /// The public key's blob; empty where there is no key, or none that SSH has a form for.
    pub key: Vec<u8>,
    /// The OpenPGP fingerprint, 40 hexadecimal digits; empty where there is no key.
    pub fingerprint: String,
    /// When the key was made, in seconds since 1970; 0 where that is not known.
    pub created: u32,
    /// Whether uses want a touch; `None` where the card has no button.
    pub touch: Option<TouchPolicy>,
}

/// Why bytes are no change or status of a card.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CardFormError {
    /// The data types do not fit.
    #[error(transparent)]
    Malformed(#[from] WireError),
    /// A text or PIN is beyond its bound.
    #[error("a text is too long")]
    TooLong,
    /// A change, PIN, text, slot or policy has a name that stands for nothing.
    #[error("a name is not known")]
    Unknown,
}

impl CardFormError {
    /// The same in the words of the data types.
    pub fn as_wire_error(self) -> WireError {
        match self {
            Self::Malformed(error) => error,
            Self::TooLong | Self::Unknown => WireError::OutOfBounds,
        }
    }
}

impl CardChange {
    /// Which PIN its secret is; `None` where it has none.
    pub fn authority(&self) -> Option<(CardPin, &SecretString)> {
        match self {
            Self::SetPin { pin: CardPin::User, secret, .. } => Some((CardPin::User, secret)),
            Self::ResetPin { by, secret, .. } => Some((*by, secret)),
            Self::SetPin { secret, .. }
            | Self::SetTouch { secret, .. }
            | Self::SetSignaturePin { secret, .. }
            | Self::SetText { secret, .. } => Some((CardPin::Admin, secret)),
            Self::FactoryReset { .. } => None,
        }
    }

    /// `set-pin`, `reset-pin`, `set-touch`, `set-signature-pin`, `set-text` or `factory-reset`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SetPin { .. } => "set-pin",
            Self::ResetPin { .. } => "reset-pin",
            Self::SetTouch { .. } => "set-touch",
            Self::SetSignaturePin { .. } => "set-signature-pin",
            Self::SetText { .. } => "set-text",
            Self::FactoryReset { .. } => "factory-reset",
        }
    }

    /// At least as many bytes as [`put`](Self::put) writes: a buffer that grows leaves copies of PINs behind.
    pub fn capacity(&self) -> usize {
        let secret = |secret: &SecretString| secret.expose_secret().len();
        OVERHEAD
            + self.authority().map_or(0, |(_, authority)| secret(authority))
            + match self {
                Self::SetPin { new, .. } | Self::ResetPin { new, .. } => secret(new),
                Self::SetText { value, .. } => value.len(),
                Self::FactoryReset { serial } => serial.len(),
                Self::SetTouch { .. } | Self::SetSignaturePin { .. } => 0,
            }
    }

    /// Whether [`read`](Self::read) would take it.
    pub fn is_in_bounds(&self) -> bool {
        let fits = |secret: &SecretString| secret.expose_secret().len() <= MAX_CARD_PIN;
        self.authority().is_none_or(|(_, authority)| fits(authority))
            && match self {
                Self::ResetPin { by: CardPin::User, .. } => false,
                Self::SetPin { new, .. } | Self::ResetPin { new, .. } => fits(new),
                Self::SetText { value, .. } => value.len() <= MAX_CARD_TEXT,
                Self::FactoryReset { serial } => serial.len() <= MAX_LABEL,
                Self::SetTouch { .. } | Self::SetSignaturePin { .. } => true,
            }
    }

    /// Writes its name and what belongs to it.
    pub fn put(&self, out: &mut Vec<u8>) {
        let text = |out: &mut Vec<u8>, text: &str| out.put_string(text.as_bytes());
        text(out, self.name());
        match self {
            Self::SetPin { pin, .. } => text(out, pin.as_str()),
            Self::ResetPin { by, .. } => text(out, by.as_str()),
            Self::SetTouch { slot, touch, .. } => {
                text(out, slot.as_str());
                text(out, touch.as_str());
            }
            Self::SetSignaturePin { each, .. } => out.push((*each).into()),
            Self::SetText { text: kind, value, .. } => {
                text(out, kind.as_str());
                text(out, value);
            }
            Self::FactoryReset { serial } => text(out, serial),
        }
        if let Some((_, secret)) = self.authority() {
            text(out, secret.expose_secret());
        }
        if let Self::SetPin { new, .. } | Self::ResetPin { new, .. } = self {
            text(out, new.expose_secret());
        }
    }

    /// Reads what [`put`](Self::put) wrote, and nothing behind it.
    pub fn read(r: &mut Reader<'_>) -> Result<Self, CardFormError> {
        Ok(match text(r, MAX_LABEL)? {
            "set-pin" => Self::SetPin { pin: named(r, CardPin::from_name)?, secret: secret(r)?, new: secret(r)? },
            "reset-pin" => {
                let by = named(r, CardPin::from_name)?;
                if by == CardPin::User {
                    return Err(CardFormError::Unknown);
                }
                Self::ResetPin { by, secret: secret(r)?, new: secret(r)? }
            }
            "set-touch" => {
                let (slot, touch) = (named(r, CardSlot::from_name)?, named(r, Touch::from_name)?);
                Self::SetTouch { slot, touch, secret: secret(r)? }
            }
            "set-signature-pin" => {
                let each = r.bool()?;
                Self::SetSignaturePin { each, secret: secret(r)? }
            }
            "set-text" => {
                let (kind, value) = (named(r, CardText::from_name)?, text(r, MAX_CARD_TEXT)?.to_owned());
                Self::SetText { text: kind, value, secret: secret(r)? }
            }
            "factory-reset" => Self::FactoryReset { serial: text(r, MAX_LABEL)?.to_owned() },
            _ => return Err(CardFormError::Unknown),
        })
    }
}

impl CardStatus {
    /// What it says of this slot.
    pub fn slot(&self, slot: CardSlot) -> Option<&SlotStatus> {
        self.slots.iter().find(|status| status.slot == slot)
    }

    /// The serial number, eight hexadecimal digits.
    pub fn serial(&self) -> &str {
        self.ident.split_once(':').map_or("", |(_, serial)| serial)
    }

    /// Writes its fields.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.ident.as_bytes());
        out.extend_from_slice(&self.version);
        for text in [&self.manufacturer, &self.name, &self.language, &self.url, &self.login] {
            out.put_string(text.as_bytes());
        }
        out.extend_from_slice(&self.tries);
        out.push(self.pin_per_signature.into());
        out.put_u32(self.signatures);
        put_list(out, &self.default_pins, |out, pin| out.put_string(pin.as_str().as_bytes()));
        put_list(out, &self.slots, |out, slot| {
            out.put_string(slot.slot.as_str().as_bytes());
            out.put_string(slot.algorithm.as_bytes());
            out.put_string(&slot.key);
            out.put_string(slot.fingerprint.as_bytes());
            out.put_u32(slot.created);
            out.put_string(slot.touch.map_or("", TouchPolicy::as_str).as_bytes());
        });
    }

    /// How many bytes [`put`](Self::put) writes.
    pub fn encoded_len(&self) -> usize {
        let mut out = Vec::new();
        self.put(&mut out);
        out.len()
    }

    /// Reads what [`put`](Self::put) wrote, and nothing behind it. No text is longer than [`MAX_CARD_TEXT`].
    pub fn read(r: &mut Reader<'_>) -> Result<Self, CardFormError> {
        let ident = text(r, MAX_LABEL)?.to_owned();
        let version = [r.u8()?, r.u8()?];
        let mut words = || text(r, MAX_CARD_TEXT).map(str::to_owned);
        let [manufacturer, name, language, url, login] = [words()?, words()?, words()?, words()?, words()?];
        Ok(Self {
            ident,
            version,
            manufacturer,
            name,
            language,
            url,
            login,
            tries: [r.u8()?, r.u8()?, r.u8()?],
            pin_per_signature: boolean(r)?,
            signatures: r.u32()?,
            default_pins: list(r, CardPin::ALL.len(), |r| named(r, CardPin::from_name))?,
            slots: list(r, CardSlot::ALL.len(), SlotStatus::read)?,
        })
    }
}

impl SlotStatus {
    fn read(r: &mut Reader<'_>) -> Result<Self, CardFormError> {
        Ok(Self {
            slot: named(r, CardSlot::from_name)?,
            algorithm: text(r, MAX_LABEL)?.to_owned(),
            key: bytes(r, MAX_BLOB)?.to_vec(),
            fingerprint: text(r, MAX_LABEL)?.to_owned(),
            created: r.u32()?,
            touch: match text(r, MAX_LABEL)? {
                "" => None,
                name => Some(TouchPolicy::from_name(name).ok_or(CardFormError::Unknown)?),
            },
        })
    }
}

fn put_list<T>(out: &mut Vec<u8>, items: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    out.push(u8::try_from(items.len()).unwrap_or(u8::MAX));
    items.iter().for_each(|item| put(out, item));
}

fn list<T>(
    r: &mut Reader<'_>,
    max: usize,
    read: impl Fn(&mut Reader<'_>) -> Result<T, CardFormError>,
) -> Result<Vec<T>, CardFormError> {
    let count = usize::from(r.u8()?);
    if count > max {
        return Err(CardFormError::TooLong);
    }
    (0..count).map(|_| read(r)).collect()
}

/// A value has one form only, unlike RFC 4251's boolean.
fn boolean(r: &mut Reader<'_>) -> Result<bool, CardFormError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(CardFormError::Unknown),
    }
}

fn bytes<'a>(r: &mut Reader<'a>, max: usize) -> Result<&'a [u8], CardFormError> {
    let bytes = r.string()?;
    if bytes.len() > max { Err(CardFormError::TooLong) } else { Ok(bytes) }
}

fn text<'a>(r: &mut Reader<'a>, max: usize) -> Result<&'a str, CardFormError> {
    std::str::from_utf8(bytes(r, max)?).map_err(|_| WireError::NotText.into())
}

fn secret(r: &mut Reader<'_>) -> Result<SecretString, CardFormError> {
    text(r, MAX_CARD_PIN).map(|text| SecretString::from(Box::<str>::from(text)))
}

fn named<T>(r: &mut Reader<'_>, from_name: impl FnOnce(&str) -> Option<T>) -> Result<T, CardFormError> {
    from_name(text(r, MAX_LABEL)?).ok_or(CardFormError::Unknown)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    /// Any change; it is wrapped since it does not print.
    pub(crate) fn a_change() -> impl Strategy<Value = CardChange> {
        let pin = || "\\PC{0,30}".prop_map(SecretString::from);
        let by = select(vec![CardPin::Admin, CardPin::ResetCode]);
        prop_oneof![
            (select(CardPin::ALL), pin(), pin()).prop_map(|(pin, secret, new)| CardChange::SetPin { pin, secret, new }),
            (by, pin(), pin()).prop_map(|(by, secret, new)| CardChange::ResetPin { by, secret, new }),
            (select(CardSlot::ALL), select(Touch::ALL), pin()).prop_map(|(slot, touch, secret)| CardChange::SetTouch {
                slot,
                touch,
                secret
            }),
            (select(CardText::ALL), "\\PC{0,60}", pin()).prop_map(|(text, value, secret)| CardChange::SetText {
                text,
                value,
                secret
            }),
            (any::<bool>(), pin()).prop_map(|(each, secret)| CardChange::SetSignaturePin { each, secret }),
            "\\PC{0,20}".prop_map(|serial| CardChange::FactoryReset { serial }),
        ]
    }

    pub(crate) fn a_status() -> impl Strategy<Value = CardStatus> {
        let slot = (
            select(CardSlot::ALL),
            "[a-z0-9-]{0,10}",
            vec(any::<u8>(), 0..50),
            "[0-9A-F]{0,40}",
            any::<u32>(),
            proptest::option::of(select(TouchPolicy::ALL)),
        );
        let slot = slot.prop_map(|(slot, algorithm, key, fingerprint, created, touch)| SlotStatus {
            slot,
            algorithm,
            key,
            fingerprint,
            created,
            touch,
        });
        let texts = proptest::array::uniform6("\\PC{0,20}");
        let pins = vec(select(CardPin::ALL), 0..3);
        (texts, any::<([u8; 2], [u8; 3], bool, u32)>(), pins, vec(slot, 0..4)).prop_map(
            |(texts, (version, tries, pin_per_signature, signatures), default_pins, slots)| {
                let [ident, manufacturer, name, language, url, login] = texts;
                let numbers = CardStatus { version, tries, pin_per_signature, signatures, ..CardStatus::default() };
                CardStatus { ident, manufacturer, name, language, url, login, default_pins, slots, ..numbers }
            },
        )
    }

    pub(crate) fn bytes_of(change: &CardChange) -> Vec<u8> {
        let mut out = Vec::new();
        change.put(&mut out);
        out
    }

    impl std::fmt::Debug for CardChange {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.name())
        }
    }

    #[test]
    fn the_user_s_pin_resets_no_pin() {
        let secret = SecretString::from("123456");
        let change = CardChange::ResetPin { by: CardPin::User, secret: secret.clone(), new: secret };
        assert!(!change.is_in_bounds());
        assert_eq!(CardChange::read(&mut Reader::new(&bytes_of(&change))).err(), Some(CardFormError::Unknown));
    }

    #[test]
    fn what_is_too_long_is_out_of_bounds_and_not_read() {
        let change = |len| CardChange::SetText { text: CardText::Url, value: "x".repeat(len), secret: "1".into() };
        assert!(change(MAX_CARD_TEXT).is_in_bounds() && !change(MAX_CARD_TEXT + 1).is_in_bounds());
        let long = bytes_of(&change(MAX_CARD_TEXT + 1));
        assert_eq!(CardChange::read(&mut Reader::new(&long)).err(), Some(CardFormError::TooLong));
        let new = |len| CardChange::SetPin { pin: CardPin::Admin, secret: "1".into(), new: "1".repeat(len).into() };
        assert!(new(MAX_CARD_PIN).is_in_bounds() && !new(MAX_CARD_PIN + 1).is_in_bounds());
    }

    proptest! {
        #[test]
        fn changes_round_trip(change in a_change()) {
            let bytes = bytes_of(&change);
            prop_assert!(change.is_in_bounds() && bytes.len() <= change.capacity());
            let mut r = Reader::new(&bytes);
            prop_assert_eq!(bytes_of(&CardChange::read(&mut r).unwrap()), &bytes[..]);
            prop_assert!(r.is_empty());
            for cut in 0..bytes.len() {
                prop_assert!(CardChange::read(&mut Reader::new(&bytes[..cut])).is_err());
            }
        }

        #[test]
        fn statuses_round_trip(status in a_status()) {
            let mut bytes = Vec::new();
            status.put(&mut bytes);
            prop_assert_eq!(bytes.len(), status.encoded_len());
            let mut r = Reader::new(&bytes);
            prop_assert_eq!(CardStatus::read(&mut r).unwrap(), status);
            prop_assert!(r.is_empty());
        }
    }
}
