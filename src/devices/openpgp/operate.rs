//! What a card computes: signatures, decryption, key agreement. Knows what each wants as its input; PINs are elsewhere.

use std::cell::Cell;

use openpgp_card::{
    Error as CardError,
    ocard::{
        KeyType as CardSlot, StatusBytes, Transaction,
        crypto::{Cryptogram, HashAlgo, SigningAlgo},
    },
};
use zeroize::Zeroizing;

use super::{
    card::{Mode, SHORT_COMMAND, Token, WRONG_SCHEME},
    keys::{self, Kind},
};
use crate::{
    devices::{DeviceError, Hash, Input, Scheme, Slot},
    public_key::Curve,
};

const WRONG_DIGEST: DeviceError = DeviceError::unsupported("the digest is not as long as the scheme's hash makes them");
const WRONG_PEER: DeviceError = DeviceError::unsupported("the peer's public key is none of the key's curve");

/// The lengths of messages that a card hashes itself, in bytes. Some cards take less than they say.
#[derive(Clone, Copy)]
pub(super) struct Lengths {
    /// The longest that it took.
    taken: usize,
    /// The shortest that it refused.
    refused: usize,
}

impl Default for Lengths {
    fn default() -> Self {
        Self { taken: SHORT_COMMAND, refused: usize::MAX }
    }
}

impl Lengths {
    /// Whether the card, which says that it takes `longest`, may take so much.
    fn check(self, len: usize, longest: usize) -> Result<(), DeviceError> {
        if len <= longest && len < self.refused { Ok(()) } else { Err(self.too_long(longest)) }
    }

    /// Takes note of a message that was refused, and says what to tell of it.
    fn refuse(&mut self, len: usize, longest: usize) -> DeviceError {
        self.refused = self.refused.min(len);
        self.too_long(longest)
    }

    /// Takes note of a message that was taken.
    fn take(&mut self, len: usize) {
        self.taken = self.taken.max(len);
    }

    /// Where what the card says was found not to hold, what it took before does.
    fn too_long(self, longest: usize) -> DeviceError {
        DeviceError::TooLong { max: if self.refused <= longest { self.taken } else { longest } }
    }
}

/// What goes to the card.
enum ToSign {
    /// A digest, which goes inside a DigestInfo.
    Rsa(Hash, Vec<u8>),
    /// As it is.
    Plain(Vec<u8>),
}

impl ToSign {
    fn send(&self, tx: &mut Transaction<'_>, slot: CardSlot) -> Result<Vec<u8>, CardError> {
        let (algorithm, data) = match self {
            Self::Rsa(hash, digest) => (SigningAlgo::RSA(card_hash(*hash)), digest),
            Self::Plain(data) => (SigningAlgo::ECC, data),
        };
        if slot == CardSlot::Signing {
            tx.signature_for_hash(algorithm, data)
        } else {
            tx.authenticate_for_hash(algorithm, data)
        }
    }
}

impl Token {
    /// Signs, with PSO:COMPUTE DIGITAL SIGNATURE or INTERNAL AUTHENTICATE (OpenPGP card, 7.2.10 and 7.2.13).
    pub(super) fn sign(&mut self, slot: &Slot, scheme: Scheme, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let key = self.key(slot, |slot| slot != CardSlot::Decryption)?;
        if !keys::signs(key.kind).contains(&scheme) {
            return Err(WRONG_SCHEME);
        }
        let to_sign = match (key.kind, scheme) {
            (Kind::Rsa, Scheme::RsaPkcs1v15(hash)) => {
                ToSign::Rsa(hash, input.digest(hash).ok_or(WRONG_DIGEST)?.as_ref().to_vec())
            }
            (Kind::Ecdsa(curve), Scheme::Ecdsa(hash)) => {
                ToSign::Plain(input.ecdsa_digest(hash, curve).ok_or(WRONG_DIGEST)?.as_ref().to_vec())
            }
            (Kind::Ed25519, Scheme::Ed25519) => ToSign::Plain(self.whole_message(input)?),
            _ => return Err(WRONG_SCHEME),
        };
        let mode = if key.slot == CardSlot::Signing { Mode::Sign } else { Mode::Other };
        // What the card did not take is told apart from what it would not do.
        let too_long = Cell::new(false);
        let signed = self.with_pin(mode, key.touch, |tx| {
            let signed = to_sign.send(tx, key.slot);
            too_long.set(signed.as_ref().is_err_and(is_too_long));
            signed
        });
        let longest = self.longest();
        match (&signed, &to_sign) {
            (Err(DeviceError::Failed(_)), ToSign::Plain(data)) if too_long.get() && data.len() > SHORT_COMMAND => {
                return Err(self.lengths.refuse(data.len(), longest));
            }
            (Ok(_), ToSign::Plain(data)) => self.lengths.take(data.len()),
            _ => {}
        }
        signed
    }

    /// A message that the card itself hashes.
    fn whole_message(&self, input: &Input<'_>) -> Result<Vec<u8>, DeviceError> {
        let message = input.message().ok_or(WRONG_DIGEST)?;
        self.lengths.check(message.len(), self.longest())?;
        Ok(message.to_vec())
    }

    /// Decrypts PKCS#1 v1.5, with PSO:DECIPHER (7.2.11). The card takes the padding off, and says whether it was one.
    pub(super) fn decrypt(&mut self, slot: &Slot, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let key = self.key(slot, |slot| slot == CardSlot::Decryption)?;
        if key.kind != Kind::Rsa || !self.decrypts_pkcs1() {
            return Err(WRONG_SCHEME);
        }
        self.with_pin(Mode::Other, key.touch, |tx| tx.decipher(Cryptogram::RSA(ciphertext)).map(Zeroizing::new))
    }

    /// Agrees on a secret, with PSO:DECIPHER.
    pub(super) fn derive(&mut self, slot: &Slot, peer: &[u8]) -> Result<Zeroizing<Vec<u8>>, DeviceError> {
        let key = self.key(slot, |slot| slot == CardSlot::Decryption)?;
        let (fits, len) = match key.kind {
            Kind::X25519 => (peer.len() == 32, 32),
            Kind::Ecdh(curve) => (is_point(peer, curve), curve.scalar_len()),
            _ => return Err(WRONG_SCHEME),
        };
        if !fits {
            return Err(WRONG_PEER);
        }
        let agree = |tx: &mut Transaction<'_>| tx.decipher(Cryptogram::ECDH(peer)).map(Zeroizing::new);
        let secret = self.with_pin(Mode::Other, key.touch, agree)?;
        let secret = shared_secret(key.kind, &secret, len)
            .ok_or_else(|| DeviceError::Failed("the card's answer is no shared secret".to_owned()))?;
        // A point of small order (RFC 7748, 6.1).
        if secret.iter().all(|byte| *byte == 0) { Err(WRONG_PEER) } else { Ok(secret) }
    }
}

/// Whether the card refuses for a length, as far as its words go: they differ much.
fn is_too_long(error: &CardError) -> bool {
    matches!(
        error,
        CardError::CommandTooLong(_)
            | CardError::CardStatus(
                StatusBytes::WrongLength
                    | StatusBytes::MemoryFailure
                    | StatusBytes::CommandChainingNotSupported
                    | StatusBytes::IncorrectParametersCommandDataField
                    | StatusBytes::NoPreciseDiagnosis
                    // Not enough memory.
                    | StatusBytes::UnknownStatus(0x6a, 0x84)
            )
    )
}

fn card_hash(hash: Hash) -> HashAlgo {
    match hash {
        Hash::Sha1 => HashAlgo::SHA1,
        Hash::Sha256 => HashAlgo::SHA256,
        Hash::Sha384 => HashAlgo::SHA384,
        Hash::Sha512 => HashAlgo::SHA512,
    }
}

/// Whether this is an uncompressed point of the curve, by its form.
fn is_point(peer: &[u8], curve: Curve) -> bool {
    peer.len() == 1 + 2 * curve.scalar_len() && peer.first() == Some(&4)
}

/// The secret of an agreement: some cards give the whole point, prefix it, or leave zeros out.
fn shared_secret(kind: Kind, secret: &[u8], len: usize) -> Option<Zeroizing<Vec<u8>>> {
    let secret = match (kind, secret) {
        (Kind::X25519, [0x40, rest @ ..]) if rest.len() == len => rest,
        (Kind::Ecdh(_), [4, rest @ ..]) if rest.len() == 2 * len => &rest[..len],
        (Kind::X25519, secret) if secret.len() == len => secret,
        (Kind::Ecdh(_), secret) if (1..=len).contains(&secret.len()) => secret,
        _ => return None,
    };
    let mut padded = Zeroizing::new(vec![0; len]);
    padded[len - secret.len()..].copy_from_slice(secret);
    Some(padded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_secret_has_one_form() {
        let form = |kind, secret: &[u8], len| shared_secret(kind, secret, len).map(|secret| secret.to_vec());
        let p256 = Kind::Ecdh(Curve::P256);
        let point = [&[4][..], &[7; 32], &[8; 32]].concat();
        assert_eq!(form(p256, &point, 32), Some(vec![7; 32]));
        assert_eq!(form(p256, &[7; 31], 32), Some([&[0][..], &[7; 31]].concat()));
        assert_eq!(form(p256, &[7; 33], 32), None);
        assert_eq!(form(p256, &[], 32), None);
        assert_eq!(form(Kind::X25519, &[&[0x40][..], &[9; 32]].concat(), 32), Some(vec![9; 32]));
        assert_eq!(form(Kind::X25519, &[9; 31], 32), None);
    }
}
