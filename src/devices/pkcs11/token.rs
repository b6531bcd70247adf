//! The tokens in a module's slots, as they describe themselves. Knows the module and no key.

use cryptoki::slot::{Slot, SlotInfo, TokenInfo};

use super::{error::words, module::Loaded, module::Module};
use crate::{
    devices::{DeviceError, host::child::Question},
    prompt::harmless,
    rfc4251::{Put, Reader, WireError},
};

/// The most tokens in a listing: as many as fit into an answer. A device may have any other.
pub const MAX_TOKENS: usize = 96;
/// The longest text about a token, in bytes.
const MAX_TEXT: usize = 64;
/// The longest reason why there is no token to be had, in bytes.
const MAX_REASON: usize = 256;

/// A token, as it describes itself: texts are trimmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// The slot that it is in. Another one perhaps after a restart.
    pub slot_id: u64,
    /// The name that its owner gave it.
    pub label: String,
    /// Who made it.
    pub manufacturer: String,
    /// What it is.
    pub model: String,
    /// Tells it from others of its model. Two tokens of one card can share it.
    pub serial: String,
    /// What the slot says of itself: a reader's name, for instance.
    pub slot_description: String,
    /// Who made the slot.
    pub slot_manufacturer: String,
    /// Who made the module.
    pub library_manufacturer: String,
    /// What the module says of itself.
    pub library_description: String,
    /// The most sessions that one program may have on it, where it says so.
    pub max_sessions: Option<u64>,
    /// Whether `C_InitToken` has been called on it. Without, it holds nothing.
    pub initialized: bool,
    /// Whether keys can be used only after a login.
    pub login_required: bool,
    /// Whether it has a user PIN at all.
    pub pin_initialized: bool,
    /// Whether the PIN is typed on the token itself.
    pub protected_path: bool,
    /// Whether a wrong PIN has been tried since the last login.
    pub pin_count_low: bool,
    /// Whether the next wrong PIN locks it.
    pub pin_final_try: bool,
    /// Whether no login is possible any more.
    pub pin_locked: bool,
    /// Whether the PIN is to be changed before anything else works.
    pub pin_to_be_changed: bool,
}

/// A slot whose token cannot be told, and why: it does not keep the others from being listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSlot {
    /// Its number in the module.
    pub slot_id: u64,
    /// For a person.
    pub reason: String,
}

impl Token {
    fn new(slot: Slot, slot_info: Option<&SlotInfo>, token: &TokenInfo, module: &Loaded) -> Self {
        let of_slot = |text: fn(&SlotInfo) -> &str| slot_info.map(text).map(trimmed).unwrap_or_default();
        let library = module.info.as_ref();
        Self {
            slot_id: slot.id(),
            label: trimmed(token.label()),
            manufacturer: trimmed(token.manufacturer_id()),
            model: trimmed(token.model()),
            serial: trimmed(token.serial_number()),
            slot_description: of_slot(SlotInfo::slot_description),
            slot_manufacturer: of_slot(SlotInfo::manufacturer_id),
            library_manufacturer: library.map(|info| trimmed(info.manufacturer_id())).unwrap_or_default(),
            library_description: library.map(|info| trimmed(info.library_description())).unwrap_or_default(),
            max_sessions: Option::from(token.max_session_count()),
            initialized: token.token_initialized(),
            login_required: token.login_required(),
            pin_initialized: token.user_pin_initialized(),
            protected_path: token.protected_authentication_path(),
            pin_count_low: token.user_pin_count_low(),
            pin_final_try: token.user_pin_final_try(),
            pin_locked: token.user_pin_locked(),
            pin_to_be_changed: token.user_pin_to_be_changed(),
        }
    }

    /// PIN tries that are left, as far as PKCS#11 can say: none, the last, or that nothing is known. That a wrong PIN has
    /// been tried says nothing of how many are left.
    pub fn tries_left(&self) -> Option<u8> {
        match self {
            Self { pin_locked: true, .. } => Some(0),
            Self { pin_final_try: true, .. } => Some(1),
            _ => None,
        }
    }

    fn texts(&mut self) -> [&mut String; 8] {
        [
            &mut self.label,
            &mut self.manufacturer,
            &mut self.model,
            &mut self.serial,
            &mut self.slot_description,
            &mut self.slot_manufacturer,
            &mut self.library_manufacturer,
            &mut self.library_description,
        ]
    }

    fn flags(&mut self) -> [&mut bool; 8] {
        [
            &mut self.initialized,
            &mut self.login_required,
            &mut self.pin_initialized,
            &mut self.protected_path,
            &mut self.pin_count_low,
            &mut self.pin_final_try,
            &mut self.pin_locked,
            &mut self.pin_to_be_changed,
        ]
    }
}

/// The fields are padded with spaces (PKCS#11 3.1, 3.1); some modules pad with zeros.
fn trimmed(text: &str) -> String {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace()).to_owned()
}

/// Every token of a module, or why a slot's token cannot be told. Slots without a token are left out.
pub(super) fn list(module: &Loaded) -> Result<Vec<Result<Token, BadSlot>>, DeviceError> {
    let slots = module.slots()?;
    Ok(slots.into_iter().filter_map(|slot| look(module, slot).transpose()).collect())
}

/// The token in a slot, if there is one.
pub(super) fn look(module: &Loaded, slot: Slot) -> Result<Option<Token>, BadSlot> {
    let bad = |reason: String| BadSlot { slot_id: slot.id(), reason };
    let slot_info = module.context.get_slot_info(slot).map_err(|e| bad(words(&e)))?;
    if !slot_info.token_present() {
        return Ok(None);
    }
    let token = module.context.get_token_info(slot).map_err(|e| bad(words(&e)))?;
    Ok(Some(Token::new(slot, Some(&slot_info), &token, module)))
}

/// Asks a module for its tokens, in a process of its own.
pub(crate) struct Tokens;

impl Question for Tokens {
    const KIND: &'static str = "pkcs11-tokens";

    fn answer(question: &[u8]) -> Result<Vec<u8>, DeviceError> {
        let mut r = Reader::new(question);
        let module = Module::read(&mut r).map_err(|e| DeviceError::Failed(format!("the module is none: {e}")))?;
        Ok(encode(list(&module.load()?)?))
    }
}

fn encode(mut tokens: Vec<Result<Token, BadSlot>>) -> Vec<u8> {
    let cut = |text: &str, max: usize| text[..text.floor_char_boundary(max)].to_owned();
    if tokens.len() > MAX_TOKENS {
        let more = tokens.len() - MAX_TOKENS;
        let slot_id = match &tokens[MAX_TOKENS - 1] {
            Ok(token) => token.slot_id,
            Err(bad) => bad.slot_id,
        };
        let reason =
            format!("it and {more} more are too many to list; a device of the configuration may have any of them");
        tokens.truncate(MAX_TOKENS - 1);
        tokens.push(Err(BadSlot { slot_id, reason }));
    }
    let mut out = Vec::new();
    for token in tokens {
        out.push(token.is_ok().into());
        match token {
            Ok(mut token) => {
                out.put_u64(token.slot_id);
                token.texts().iter().for_each(|text| out.put_string(cut(text, MAX_TEXT).as_bytes()));
                out.put_u64(token.max_sessions.unwrap_or(u64::MAX));
                out.extend(token.flags().map(|flag| u8::from(*flag)));
            }
            Err(bad) => {
                out.put_u64(bad.slot_id);
                out.put_string(cut(&bad.reason, MAX_REASON).as_bytes());
            }
        }
    }
    out
}

/// What [`encode`] made, in a process that may lie: bounded, and harmless to show.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<Result<Token, BadSlot>>, WireError> {
    let text = |r: &mut Reader<'_>| Ok(harmless(std::str::from_utf8(r.string()?).map_err(|_| WireError::NotText)?));
    let (mut r, mut tokens) = (Reader::new(bytes), Vec::new());
    while !r.is_empty() && tokens.len() < MAX_TOKENS {
        let (good, slot_id) = (r.bool()?, r.u64()?);
        if !good {
            tokens.push(Err(BadSlot { slot_id, reason: text(&mut r)? }));
            continue;
        }
        let mut token = Token { slot_id, ..Token::default() };
        for place in token.texts() {
            *place = text(&mut r)?;
        }
        token.max_sessions = Some(r.u64()?).filter(|count| *count != u64::MAX);
        for place in token.flags() {
            *place = r.bool()?;
        }
        tokens.push(Ok(token));
    }
    r.finish()?;
    Ok(tokens)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::devices::operation::MAX_RESULT;

    #[test]
    fn a_listing_comes_back_as_it_was() {
        let token = Token {
            slot_id: 7,
            label: "vault".into(),
            serial: "0001".into(),
            max_sessions: Some(3),
            login_required: true,
            pin_final_try: true,
            ..Token::default()
        };
        let tokens = vec![Ok(token), Err(BadSlot { slot_id: 8, reason: "broken".into() }), Ok(Token::default())];
        assert_eq!(decode(&encode(tokens.clone())).unwrap(), tokens);
    }

    #[test]
    fn the_longest_listing_fits_into_an_answer() {
        let long = "é".repeat(500);
        let mut token = Token::default();
        token.texts().into_iter().for_each(|text| text.clone_from(&long));
        let tokens = encode(vec![Ok(token); MAX_TOKENS]);
        assert!(tokens.len() <= MAX_RESULT, "{}", tokens.len());
        let bad = encode(vec![Err(BadSlot { slot_id: 1, reason: long }); MAX_TOKENS]);
        assert!(bad.len() <= MAX_RESULT, "{}", bad.len());
        assert_eq!(decode(&tokens).unwrap().len(), MAX_TOKENS);
    }

    #[test]
    fn what_is_too_much_for_a_listing_is_said() {
        let token = |slot_id| Ok(Token { slot_id, ..Token::default() });
        let listed = decode(&encode((1..=100).map(token).collect())).unwrap();
        assert_eq!((listed.len(), &listed[94]), (96, &token(95)));
        let Err(BadSlot { slot_id: 96, reason }) = &listed[95] else { panic!("{:?}", listed[95]) };
        assert!(reason.starts_with("it and 4 more are too many"), "{reason}");
    }

    #[test]
    fn a_listing_that_is_none_is_refused() {
        let bytes = encode(vec![Ok(Token::default())]);
        assert!(decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(decode(&[0xff; 40]).is_err());
    }

    #[test]
    fn fields_are_trimmed_of_what_modules_pad_with() {
        assert_eq!(trimmed("serial \0\0"), "serial");
        assert_eq!(trimmed("  a b  "), "a b");
    }
}
