//! Administration of a card: what it says of itself, its PINs, texts and touch policies, and its reset. Knows the admin PIN
//! for as long as one change takes; keys are made in `life`.
//!
//! The admin PIN stays verified on a card until that is reset, for whatever program comes next: so it is reset after each
//! change. A PIN is sent once, and never as the last try unless its holder was told that it is the last.

use openpgp_card::{
    Error as CardError,
    ocard::{
        KeyType as OpenPgpSlot, Transaction,
        algorithm::{AlgorithmAttributes, Curve as CardCurve},
        data::{ApplicationRelatedData, KdfDo, KeyGenerationTime, Lang, PWStatusBytes, TouchPolicy as CardTouch},
    },
};
use secrecy::{ExposeSecret, SecretBox, SecretString};

use super::{
    card::{Token, Trouble, selected},
    keys, pin,
};
use crate::devices::{
    CardChange, CardPin, CardSlot, CardStatus, CardText, DeviceError, Touch,
    card::{SlotStatus, TouchPolicy},
};

/// The longest name, in characters (4.4.1).
const MAX_NAME: usize = 39;
/// Where the card does not say, it takes texts of so many bytes.
const MAX_TEXT: usize = 254;

const LAST_TRY: &str =
    "one try of this PIN is left, and it was not sent: look at `strongroom card status`, then try again";

const NO_BUTTON: DeviceError = DeviceError::unsupported("the card has no button to touch");

/// The card's word for a slot.
pub(super) fn on_card(slot: CardSlot) -> OpenPgpSlot {
    match slot {
        CardSlot::Sign => OpenPgpSlot::Signing,
        CardSlot::Decrypt => OpenPgpSlot::Decryption,
        CardSlot::Auth => OpenPgpSlot::Authentication,
    }
}

/// Tries that are left of a PIN.
fn left_of(status: &PWStatusBytes, which: CardPin) -> u8 {
    match which {
        CardPin::User => status.err_count_pw1(),
        CardPin::ResetCode => status.err_count_rc(),
        CardPin::Admin => status.err_count_pw3(),
    }
}

/// A PIN of new cards (4.3).
fn is_default(which: CardPin, pin: &SecretString) -> bool {
    let default = match which {
        CardPin::User => "123456",
        CardPin::Admin => "12345678",
        CardPin::ResetCode => return false,
    };
    pin.expose_secret() == default
}

impl Token {
    /// What the card says of itself.
    pub(super) fn card_status(&mut self) -> Result<CardStatus, DeviceError> {
        self.scan()?;
        let status = self.with(|tx, _, _| {
            let data = selected(tx)?;
            let aid = data.application_id()?;
            let pins = data.pw_status_bytes()?;
            let holder = tx.cardholder_related_data();
            let holder = holder.as_ref().ok();
            let text = |bytes: Result<Vec<u8>, CardError>| utf8(&bytes.unwrap_or_default());
            Ok(CardStatus {
                ident: aid.ident(),
                version: aid.version().to_be_bytes(),
                manufacturer: keys::maker(&aid).to_owned(),
                name: holder.and_then(|holder| holder.name()).map(latin1).unwrap_or_default(),
                language: holder.and_then(|holder| holder.lang()).map(languages).unwrap_or_default(),
                url: text(tx.url()),
                login: text(tx.login_data()),
                tries: CardPin::ALL
                    .iter()
                    .map(|which| left_of(&pins, *which))
                    .collect::<Vec<_>>()
                    .try_into()
                    .unwrap_or_default(),
                pin_per_signature: pins.pw1_cds_valid_once(),
                signatures: tx.security_support_template().map(|template| template.signature_count()).unwrap_or(0),
                default_pins: Vec::new(),
                slots: CardSlot::ALL.iter().map(|slot| slot_status(&data, *slot)).collect(),
            })
        });
        let mut status = status?;
        for slot in &mut status.slots {
            let key = self.keys.iter().find(|key| key.slot == on_card(slot.slot));
            slot.key = key.map(|key| key.blob.clone()).unwrap_or_default();
        }
        status.default_pins = self.note_told(status.tries);
        Ok(status)
    }

    /// Makes one change.
    pub(super) fn change(&mut self, change: &CardChange) -> Result<(), DeviceError> {
        match change {
            CardChange::SetPin { pin: CardPin::ResetCode, secret, new } => {
                let kdf = self.kdf()?;
                self.with_admin(secret, |tx| {
                    let new = acceptable(tx, CardPin::ResetCode, new, kdf.as_ref())?;
                    Ok(tx.set_resetting_code(new)?)
                })
            }
            CardChange::SetPin { pin, secret, new } => self.set_pin(*pin, secret, new),
            CardChange::ResetPin { by: CardPin::ResetCode, secret, new } => self.reset_pin_by_code(secret, new),
            CardChange::ResetPin { secret, new, .. } => {
                let kdf = self.kdf()?;
                let done = self.with_admin(secret, |tx| {
                    let new = acceptable(tx, CardPin::User, new, kdf.as_ref())?;
                    Ok(tx.reset_retry_counter_pw1(new, None)?)
                });
                self.forget();
                done
            }
            CardChange::SetTouch { slot, touch, secret } => self.with_admin(secret, |tx| set_touch(tx, *slot, *touch)),
            CardChange::SetSignaturePin { each, secret } => self.with_admin(secret, |tx| {
                let mut status = tx.application_related_data()?.pw_status_bytes()?;
                status.set_pw1_cds_valid_once(*each);
                Ok(tx.set_pw_status_bytes(&status, false)?)
            }),
            CardChange::SetText { text, value, secret } => self.set_text(*text, value, secret),
            CardChange::FactoryReset { serial } => self.factory_reset(serial),
        }
    }

    /// Verifies the admin PIN and does what wants it, in one transaction. Afterwards nothing is verified on the card.
    pub(super) fn with_admin<T>(
        &mut self,
        secret: &SecretString,
        act: impl FnOnce(&mut Transaction<'_>) -> Result<T, Trouble>,
    ) -> Result<T, DeviceError> {
        let kdf = self.kdf()?;
        let mut sent = false;
        let done = self.guarded(CardPin::Admin, secret, |tx| {
            sent = true;
            tx.verify_pw3(pin::hashed(secret, kdf.as_ref(), CardPin::Admin)?)?;
            Ok(())
        });
        let done = match done {
            Ok(()) => self.with(|tx, _, _| act(tx)).map_err(DeviceError::from),
            Err(error) => Err(error),
        };
        if sent {
            self.forget_verified();
        }
        done
    }

    /// Has `send` send a PIN, once: unless it is blocked, is no such PIN by its length, or is at its last try and nobody was
    /// told. What the card says to it is told by its counter: the words for a refused PIN differ much.
    fn guarded(
        &mut self,
        which: CardPin,
        secret: &SecretString,
        send: impl FnOnce(&mut Transaction<'_>) -> Result<(), Trouble>,
    ) -> Result<(), DeviceError> {
        let told = self.told(which);
        let mut left_now = None;
        let result = self.with(|tx, _, _| {
            let pins = selected(tx)?.pw_status_bytes()?;
            let left = left_of(&pins, which);
            match left {
                0 if which == CardPin::ResetCode => {
                    let why = "the card has no resetting code, or it is blocked; the admin PIN does the same";
                    return Err(DeviceError::Failed(why.to_owned()).into());
                }
                0 => return Err(DeviceError::PinBlocked.into()),
                1 if told != Some(1) => return Err(DeviceError::Failed(LAST_TRY.to_owned()).into()),
                _ => {}
            }
            if !pin::fits(secret, which, &pins) {
                return Err(DeviceError::PinWrong { left: Some(left) }.into());
            }
            let result = send(tx);
            if let Err(Trouble::Card(CardError::CardStatus(_))) = &result {
                let now = left_of(&tx.application_related_data()?.pw_status_bytes()?, which);
                left_now = Some(now);
                if now < left {
                    let wrong = DeviceError::PinWrong { left: Some(now) };
                    return Err(if now == 0 { DeviceError::PinBlocked } else { wrong }.into());
                }
            }
            result
        });
        if let Some(left) = left_now {
            self.tell(which, left);
        }
        if result.is_ok() {
            self.note_default(which, is_default(which, secret));
        }
        Ok(result?)
    }

    /// CHANGE REFERENCE DATA (7.2.3). The PIN that was kept is forgotten.
    fn set_pin(&mut self, which: CardPin, old: &SecretString, new: &SecretString) -> Result<(), DeviceError> {
        let kdf = self.kdf()?;
        let (new_is_default, kdf) = (is_default(which, new), kdf.as_ref());
        let done = self.guarded(which, old, |tx| {
            let new = acceptable(tx, which, new, kdf)?;
            let old = pin::hashed(old, kdf, which)?;
            Ok(if which == CardPin::Admin { tx.change_pw3(old, new) } else { tx.change_pw1(old, new) }?)
        });
        if done.is_ok() {
            self.note_default(which, new_is_default);
        }
        if which == CardPin::User {
            self.forget();
        }
        self.forget_verified();
        done
    }

    /// RESET RETRY COUNTER (7.2.4) with the resetting code.
    fn reset_pin_by_code(&mut self, code: &SecretString, new: &SecretString) -> Result<(), DeviceError> {
        let kdf = self.kdf()?;
        let kdf = kdf.as_ref();
        let done = self.guarded(CardPin::ResetCode, code, |tx| {
            let new = acceptable(tx, CardPin::User, new, kdf)?;
            Ok(tx.reset_retry_counter_pw1(new, Some(pin::hashed(code, kdf, CardPin::ResetCode)?))?)
        });
        self.forget();
        self.forget_verified();
        done
    }

    fn set_text(&mut self, text: CardText, value: &str, secret: &SecretString) -> Result<(), DeviceError> {
        match text {
            CardText::Name => {
                let name = to_latin1(value).filter(|name| name.len() <= MAX_NAME);
                let name = name.ok_or(DeviceError::unsupported("a card takes a name of 39 characters of Latin-1"))?;
                self.with_admin(secret, |tx| Ok(tx.set_name(&name)?))
            }
            CardText::Language => {
                let codes = to_languages(value).ok_or(DeviceError::unsupported(
                    "a card takes one to four languages of two letters each, as `en` or `deen`",
                ))?;
                self.with_admin(secret, |tx| Ok(tx.set_lang(&codes)?))
            }
            CardText::Url | CardText::Login => self.with_admin(secret, |tx| {
                let max = tx.extended_capabilities()?.max_len_special_do().map_or(MAX_TEXT, usize::from);
                if value.len() > max {
                    return Err(DeviceError::TooLong { max }.into());
                }
                Ok(if text == CardText::Url { tx.set_url(value.as_bytes()) } else { tx.set_login(value.as_bytes()) }?)
            }),
        }
    }

    /// Blocks the PINs, TERMINATE DF, ACTIVATE FILE (7.2.16 and 7.2.17).
    fn factory_reset(&mut self, serial: &str) -> Result<(), DeviceError> {
        let own = self.identity.ident.split_once(':').map(|(_, own)| own);
        if !own.is_some_and(|own| own.eq_ignore_ascii_case(serial)) {
            return Err(DeviceError::unsupported("the card has another serial number"));
        }
        let done = self.with(|tx, _, _| {
            selected(tx)?;
            Ok(tx.factory_reset()?)
        });
        self.forget();
        self.note_default(CardPin::Admin, done.is_ok());
        self.forget_verified();
        done.map_err(|trouble| match DeviceError::from(trouble) {
            DeviceError::Failed(why) => DeviceError::Failed(format!(
                "{why}; the card may not know how to be reset, and its PINs may be blocked now"
            )),
            error => error,
        })
    }

    /// Has the card forget what is verified. It is opened again when it is next used.
    fn forget_verified(&mut self) {
        self.let_go();
        self.maybe_verified = true;
        // A card that does not answer is tried again when it is locked, or let go in the end.
        let _ = self.unverify();
    }

    /// The tries of a PIN that people can have been told of.
    fn told(&self, which: CardPin) -> Option<u8> {
        self.publish(|known| *known.told_of(which))
    }

    /// That people learn how many tries of a PIN are left.
    fn tell(&self, which: CardPin, left: u8) {
        self.publish(|known| *known.told_of(which) = Some(left));
    }

    /// The same of all PINs. Returns those that are known to be the PINs of new cards.
    fn note_told(&self, tries: [u8; 3]) -> Vec<CardPin> {
        for (which, left) in CardPin::ALL.iter().zip(tries) {
            self.tell(*which, left);
        }
        let user = self.pin.as_ref().is_some_and(|pin| is_default(CardPin::User, pin));
        let admin = self.publish(|known| known.default_admin_pin);
        [(user, CardPin::User), (admin, CardPin::Admin)]
            .into_iter()
            .filter_map(|(is, which)| is.then_some(which))
            .collect()
    }

    /// Whether the PIN that the card has accepted is that of new cards.
    fn note_default(&self, which: CardPin, is_default: bool) {
        if which == CardPin::Admin {
            self.publish(|known| known.default_admin_pin = is_default);
        }
    }
}

/// Sets the touch policy of a slot, and sees to it that the card has taken it.
pub(super) fn set_touch(tx: &mut Transaction<'_>, slot: CardSlot, touch: Touch) -> Result<(), Trouble> {
    let flag = |data: &ApplicationRelatedData| match slot {
        CardSlot::Sign => data.uif_pso_cds(),
        CardSlot::Decrypt => data.uif_pso_dec(),
        CardSlot::Auth => data.uif_pso_aut(),
    };
    let policy = match touch {
        Touch::Off => CardTouch::Off,
        Touch::On => CardTouch::On,
        Touch::Fixed => CardTouch::Fixed,
    };
    let mut wanted = match (flag(&tx.application_related_data()?)?, touch) {
        (Some(flag), _) => flag,
        (None, Touch::Off) => return Ok(()),
        (None, _) => return Err(NO_BUTTON.into()),
    };
    wanted.set_touch_policy(policy);
    match slot {
        CardSlot::Sign => tx.set_uif_pso_cds(&wanted)?,
        CardSlot::Decrypt => tx.set_uif_pso_dec(&wanted)?,
        CardSlot::Auth => tx.set_uif_pso_aut(&wanted)?,
    }
    let now = flag(&tx.application_related_data()?)?.map(|flag| flag.touch_policy());
    if now == Some(policy) {
        Ok(())
    } else {
        Err(DeviceError::Failed("the card keeps the touch policy that it had".to_owned()).into())
    }
}

/// A new PIN as the card wants it, if it can be one.
fn acceptable(
    tx: &mut Transaction<'_>,
    which: CardPin,
    new: &SecretString,
    kdf: Option<&KdfDo>,
) -> Result<SecretBox<[u8]>, Trouble> {
    let pins = tx.application_related_data()?.pw_status_bytes()?;
    if !pin::fits(new, which, &pins) {
        return Err(DeviceError::unsupported(match which {
            CardPin::User => "a user PIN has 6 to 127 characters, on some cards fewer",
            CardPin::ResetCode => "a resetting code has 8 to 127 characters, on some cards fewer",
            CardPin::Admin => "an admin PIN has 8 to 127 characters, on some cards fewer",
        })
        .into());
    }
    Ok(pin::hashed(new, kdf, which)?)
}

fn slot_status(data: &ApplicationRelatedData, slot: CardSlot) -> SlotStatus {
    let slot_on_card = on_card(slot);
    let flag = match slot {
        CardSlot::Sign => data.uif_pso_cds(),
        CardSlot::Decrypt => data.uif_pso_dec(),
        CardSlot::Auth => data.uif_pso_aut(),
    };
    let fingerprints = data.fingerprints().ok();
    let fingerprint = fingerprints.as_ref().and_then(|set| keys::of_slot(set, slot_on_card));
    let times = data.key_generation_times().ok();
    let created = times.as_ref().and_then(|set| keys::of_slot(set, slot_on_card)).map_or(0, KeyGenerationTime::get);
    SlotStatus {
        slot,
        algorithm: data.algorithm_attributes(slot_on_card).map(|attributes| algorithm(&attributes)).unwrap_or_default(),
        key: Vec::new(),
        fingerprint: fingerprint.map(|fingerprint| fingerprint.to_hex().to_uppercase()).unwrap_or_default(),
        created,
        touch: flag.ok().flatten().and_then(|flag| match flag.touch_policy() {
            CardTouch::Off => Some(TouchPolicy::Off),
            CardTouch::On => Some(TouchPolicy::On),
            CardTouch::Fixed => Some(TouchPolicy::Fixed),
            CardTouch::Cached => Some(TouchPolicy::Cached),
            CardTouch::CachedFixed => Some(TouchPolicy::CachedFixed),
            CardTouch::Unknown(_) => None,
        }),
    }
}

/// An algorithm in our words, or in the library's.
fn algorithm(attributes: &AlgorithmAttributes) -> String {
    match attributes {
        AlgorithmAttributes::Rsa(rsa) => format!("rsa-{}", rsa.len_n()),
        AlgorithmAttributes::Ecc(ecc) => match ecc.curve() {
            CardCurve::NistP256r1 => "nistp256".to_owned(),
            CardCurve::NistP384r1 => "nistp384".to_owned(),
            CardCurve::NistP521r1 => "nistp521".to_owned(),
            CardCurve::Ed25519 => "ed25519".to_owned(),
            CardCurve::Curve25519 => "x25519".to_owned(),
            other => format!("{other:?}"),
        },
        AlgorithmAttributes::Unknown(_) => "unknown".to_owned(),
    }
}

fn utf8(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text[..text.floor_char_boundary(crate::devices::card::MAX_CARD_TEXT)].to_owned()
}

fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| char::from(*byte)).collect()
}

fn to_latin1(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|c| u8::try_from(c).ok()).collect()
}

fn languages(codes: &[Lang]) -> String {
    codes.iter().filter(|code| matches!(code, Lang::Value(_))).map(ToString::to_string).collect()
}

fn to_languages(text: &str) -> Option<Vec<Lang>> {
    let letters = text.len() <= 8 && text.bytes().all(|byte| byte.is_ascii_lowercase());
    let (codes, rest) = text.as_bytes().as_chunks::<2>();
    (letters && rest.is_empty()).then(|| codes.iter().map(Lang::from).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_the_card_s_characters() {
        assert_eq!(to_latin1("Andr\u{e9}").unwrap(), b"Andr\xe9");
        assert_eq!(to_latin1("\u{142}"), None);
        assert_eq!(latin1(b"Andr\xe9"), "Andr\u{e9}");
        assert_eq!(languages(&to_languages("deen").unwrap()), "deen");
        assert!(to_languages("").unwrap().is_empty());
        for wrong in ["d", "DE", "deenfresit", "d\u{e9}"] {
            assert!(to_languages(wrong).is_none(), "{wrong}");
        }
    }
}
