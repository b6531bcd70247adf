//! Which token is meant: PKCS#11 URIs (RFC 7512), as far as they name tokens. Knows no module.

use std::{fmt, str::FromStr};

use thiserror::Error;

use super::token::Token;

/// The longest URI, in bytes.
const MAX_URI: usize = 1024;
const SCHEME: &str = "pkcs11:";

/// What a token must be like: what is not said matches any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenUri {
    /// Attributes with a text, in the order in which they were written.
    texts: Vec<(Attribute, String)>,
    slot_id: Option<u64>,
}

/// An attribute that is compared as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attribute {
    Token,
    Manufacturer,
    Model,
    Serial,
    SlotDescription,
    SlotManufacturer,
    LibraryManufacturer,
    LibraryDescription,
}

impl Attribute {
    const ALL: [Self; 8] = [
        Self::Token,
        Self::Manufacturer,
        Self::Model,
        Self::Serial,
        Self::SlotDescription,
        Self::SlotManufacturer,
        Self::LibraryManufacturer,
        Self::LibraryDescription,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Manufacturer => "manufacturer",
            Self::Model => "model",
            Self::Serial => "serial",
            Self::SlotDescription => "slot-description",
            Self::SlotManufacturer => "slot-manufacturer",
            Self::LibraryManufacturer => "library-manufacturer",
            Self::LibraryDescription => "library-description",
        }
    }

    fn of(self, token: &Token) -> &str {
        match self {
            Self::Token => &token.label,
            Self::Manufacturer => &token.manufacturer,
            Self::Model => &token.model,
            Self::Serial => &token.serial,
            Self::SlotDescription => &token.slot_description,
            Self::SlotManufacturer => &token.slot_manufacturer,
            Self::LibraryManufacturer => &token.library_manufacturer,
            Self::LibraryDescription => &token.library_description,
        }
    }
}

/// Why a text does not name a token.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum UriError {
    /// Another scheme, or none.
    #[error("a token is named by a PKCS#11 URI, which begins with `pkcs11:`, as in `pkcs11:token=NAME;serial=NUMBER`")]
    Scheme,
    /// Longer than any that means a token.
    #[error("the URI is longer than {MAX_URI} bytes")]
    TooLong,
    /// No `=` in an attribute.
    #[error("`{0}` has no value: attributes are written NAME=VALUE, with `;` between them")]
    NoValue(String),
    /// An attribute comes twice.
    #[error("`{0}` is there twice")]
    Twice(String),
    /// An attribute that names a key.
    #[error("`{0}` names a key: leave it out, since a device has all the keys of its token")]
    NamesKey(String),
    /// An attribute with a setting of its own.
    #[error("`{0}` has no place here: {1}")]
    Elsewhere(String, &'static str),
    /// An attribute that nothing here compares.
    #[error(
        "the attribute `{0}` is not known here; token, manufacturer, model, serial, slot-id, slot-description, \
         slot-manufacturer, library-manufacturer and library-description are"
    )]
    Unknown(String),
    /// A character that must be percent-encoded, or an encoding that is none.
    #[error("the value of `{0}` is not percent-encoded: write `%` and two hexadecimal digits for {1:?}")]
    Encoding(String, char),
    /// A percent-encoded text that is none.
    #[error("the value of `{0}` is no UTF-8 text")]
    NotText(String),
    /// A slot's number is decimal.
    #[error("`slot-id` is a decimal number")]
    SlotId,
}

impl FromStr for TokenUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if text.len() > MAX_URI {
            return Err(UriError::TooLong);
        }
        // Schemes are compared without regard to case (RFC 3986, 3.1).
        let (scheme, rest) = text.split_at_checked(SCHEME.len()).ok_or(UriError::Scheme)?;
        if !scheme.eq_ignore_ascii_case(SCHEME) {
            return Err(UriError::Scheme);
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut uri = Self::default();
        for attribute in path.split(';').filter(|part| !part.is_empty()) {
            uri.add(attribute)?;
        }
        match query.split('&').find(|part| !part.is_empty()) {
            Some(part) => Err(query_attribute(part)),
            None => Ok(uri),
        }
    }
}

fn query_attribute(part: &str) -> UriError {
    let name = part.split('=').next().unwrap_or_default();
    let elsewhere = |setting| UriError::Elsewhere(name.to_owned(), setting);
    match name {
        "pin-source" | "pin-value" => elsewhere("where the PIN comes from is said by `pin`"),
        "module-path" | "module-name" => elsewhere("the module is said by `module`"),
        _ => UriError::Unknown(name.to_owned()),
    }
}

impl TokenUri {
    /// The URI by which this token is found again: by its label and serial, and by its slot only if it has neither.
    pub fn of(token: &Token) -> Self {
        let named = |attribute: Attribute| (attribute, attribute.of(token).to_owned());
        let texts: Vec<_> =
            [Attribute::Token, Attribute::Serial].map(named).into_iter().filter(|(_, text)| !text.is_empty()).collect();
        let slot_id = texts.is_empty().then_some(token.slot_id);
        Self { texts, slot_id }
    }

    /// Whether the token is like that.
    pub fn matches(&self, token: &Token) -> bool {
        self.slot_id.is_none_or(|slot_id| slot_id == token.slot_id)
            && self.texts.iter().all(|(attribute, text)| attribute.of(token).trim() == text.trim())
    }

    fn add(&mut self, attribute: &str) -> Result<(), UriError> {
        let (name, value) = attribute.split_once('=').ok_or_else(|| UriError::NoValue(attribute.to_owned()))?;
        let value = decoded(name, value)?;
        let twice = || UriError::Twice(name.to_owned());
        if name == "slot-id" {
            let slot_id = value.parse().map_err(|_| UriError::SlotId)?;
            return if self.slot_id.replace(slot_id).is_some() { Err(twice()) } else { Ok(()) };
        }
        match Attribute::ALL.into_iter().find(|known| known.name() == name) {
            Some(known) if self.texts.iter().any(|(other, _)| *other == known) => Err(twice()),
            Some(known) => {
                self.texts.push((known, value));
                Ok(())
            }
            None if matches!(name, "object" | "type" | "id") => Err(UriError::NamesKey(name.to_owned())),
            None => Err(UriError::Unknown(name.to_owned())),
        }
    }
}

impl fmt::Display for TokenUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        let mut separator = "";
        for (attribute, text) in &self.texts {
            write!(f, "{separator}{}=", attribute.name())?;
            for byte in text.bytes() {
                match char::from(byte) {
                    c if unreserved(c) => write!(f, "{c}")?,
                    _ => write!(f, "%{byte:02X}")?,
                }
            }
            separator = ";";
        }
        match self.slot_id {
            Some(slot_id) => write!(f, "{separator}slot-id={slot_id}"),
            None => Ok(()),
        }
    }
}

fn unreserved(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._~".contains(c)
}

/// `pk11-pchar` of RFC 7512, 2.3, besides the percent sign.
fn plain(c: char) -> bool {
    unreserved(c) || ":[]@!$'()*+,=&".contains(c)
}

fn decoded(name: &str, value: &str) -> Result<String, UriError> {
    let wrong = |c: char| UriError::Encoding(name.to_owned(), c);
    let mut bytes = Vec::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '%' => {
                let mut digit = || chars.next().and_then(|c| c.to_digit(16)).and_then(|digit| u8::try_from(digit).ok());
                let (Some(high), Some(low)) = (digit(), digit()) else { return Err(wrong('%')) };
                bytes.push(high << 4 | low);
            }
            c if plain(c) => bytes.push(c as u8),
            c => return Err(wrong(c)),
        }
    }
    String::from_utf8(bytes).map_err(|_| UriError::NotText(name.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            slot_id: 17,
            label: "My vault".into(),
            manufacturer: "SoftHSM project".into(),
            model: "SoftHSM v2".into(),
            serial: "01a2".into(),
            ..Token::default()
        }
    }

    fn matches(uri: &str) -> bool {
        uri.parse::<TokenUri>().unwrap().matches(&token())
    }

    #[track_caller]
    fn refused(uri: &str, words: &str) {
        let error = uri.parse::<TokenUri>().unwrap_err().to_string();
        assert!(error.contains(words), "{uri}: {error}");
    }

    #[test]
    fn a_token_matches_what_is_said_of_it_and_nothing_else() {
        assert!(matches("pkcs11:"));
        assert!(matches("PKCS11:token=My%20vault"));
        assert!(matches("pkcs11:model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial=01a2;token=My%20vault"));
        assert!(matches("pkcs11:serial=01a2%20%20"));
        assert!(matches("pkcs11:slot-id=17"));
        assert!(!matches("pkcs11:slot-id=18"));
        assert!(!matches("pkcs11:token=my%20vault"));
        assert!(!matches("pkcs11:token=My%20vault;serial=01a3"));
        assert!(!matches("pkcs11:library-description=x"));
    }

    #[test]
    fn what_names_no_token_is_refused_with_what_is_wrong() {
        refused("token=x", "begins with `pkcs11:`");
        refused("pkcs11", "begins with `pkcs11:`");
        refused("pkcs11:token", "`token` has no value");
        refused("pkcs11:token=a;token=b", "`token` is there twice");
        refused("pkcs11:slot-id=1;slot-id=1", "`slot-id` is there twice");
        refused("pkcs11:object=key", "names a key");
        refused("pkcs11:token=x?pin-value=1234", "said by `pin`");
        refused("pkcs11:token=x?module-path=/x.so", "said by `module`");
        refused("pkcs11:tokne=x", "`tokne` is not known");
        refused("pkcs11:token=x?tokne=x", "`tokne` is not known");
        refused("pkcs11:token=My vault", "' '");
        refused("pkcs11:token=50%", "'%'");
        refused("pkcs11:token=%f", "'%'");
        refused("pkcs11:token=%ff", "no UTF-8");
        refused("pkcs11:slot-id=0x11", "decimal");
        refused(&format!("pkcs11:token={}", "a".repeat(MAX_URI)), "longer than");
    }

    #[test]
    fn no_pin_is_repeated_in_an_error() {
        let error = "pkcs11:token=x?pin-value=1234".parse::<TokenUri>().unwrap_err();
        assert!(!error.to_string().contains("1234"));
    }

    proptest! {
        #[test]
        fn a_token_is_found_again_by_its_uri(label in "\\PC{0,32}", serial in "[ -~]{0,16}", slot_id: u64) {
            let token = Token { slot_id, label: label.trim().into(), serial: serial.trim().into(), ..Token::default() };
            let uri = TokenUri::of(&token);
            let read: TokenUri = uri.to_string().parse().unwrap();
            prop_assert_eq!(&read, &uri);
            prop_assert!(read.matches(&token));
        }

        #[test]
        fn arbitrary_text_is_read_or_refused(text in "(pkcs11:)?\\PC{0,80}") {
            if let Ok(uri) = text.parse::<TokenUri>() {
                prop_assert_eq!(uri.to_string().parse::<TokenUri>().unwrap(), uri);
            }
        }
    }
}
