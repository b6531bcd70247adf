//! A PIN as a card wants it: as it is, or hashed as the card's KDF data object says (OpenPGP card 3.4, 4.3.2). Knows no
//! card.

use openpgp_card::ocard::data::{KdfDo, PWStatusBytes};
use secrecy::{ExposeSecret, SecretBox, SecretString};
use sha2::{Digest, Sha256, Sha512};

use crate::devices::{CardPin, DeviceError};

/// The most bytes that are hashed for a PIN: more would hold up the card's other users.
const MAX_COUNT: u32 = 0x03e0_0000;

/// Iterated and salted S2K (RFC 9580, 3.7.1.3).
const ITERATED: u8 = 3;

/// Whether a PIN can be one of this card, by its length.
pub(super) fn fits(pin: &SecretString, which: CardPin, status: &PWStatusBytes) -> bool {
    let max = match which {
        CardPin::User => status.pw1_max_len(),
        CardPin::ResetCode => status.rc_max_len(),
        CardPin::Admin => status.pw3_max_len(),
    };
    (which.shortest()..=usize::from(max)).contains(&pin.expose_secret().len())
}

/// What goes to the card for a PIN.
pub(super) fn hashed(pin: &SecretString, kdf: Option<&KdfDo>, which: CardPin) -> Result<SecretBox<[u8]>, DeviceError> {
    let pin = pin.expose_secret().as_bytes();
    let unknown = || DeviceError::Failed("the card wants its PIN hashed in a way that is not known here".to_owned());
    let kdf = match kdf {
        None => return Ok(pin.to_vec().into()),
        Some(kdf) if kdf.kdf_algo() == 0 => return Ok(pin.to_vec().into()),
        Some(kdf) if kdf.kdf_algo() == ITERATED => kdf,
        Some(_) => return Err(unknown()),
    };
    let own_salt = match which {
        CardPin::User => None,
        CardPin::ResetCode => kdf.salt_rc(),
        CardPin::Admin => kdf.salt_pw3(),
    };
    let salt = own_salt.or(kdf.salt_pw1());
    let (Some(salt), Some(count @ 0..=MAX_COUNT)) = (salt, kdf.iter_count()) else { return Err(unknown()) };
    match kdf.hash_algo() {
        Some(8) => Ok(s2k::<Sha256>(pin, salt, count as usize).into()),
        Some(10) => Ok(s2k::<Sha512>(pin, salt, count as usize).into()),
        _ => Err(unknown()),
    }
}

/// The hash of `count` bytes of salt and PIN again and again, and of both at least once.
fn s2k<D: Digest>(pin: &[u8], salt: &[u8], count: usize) -> Vec<u8> {
    let mut hash = D::new();
    let mut left = count.max(salt.len() + pin.len());
    for piece in [salt, pin].into_iter().cycle() {
        let piece = &piece[..piece.len().min(left)];
        hash.update(piece);
        left -= piece.len();
        if left == 0 {
            break;
        }
    }
    hash.finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_s_example() {
        // OpenPGP card 3.4.1, page 20.
        let hash = s2k::<Sha256>(b"123456", b"01234567", 100_000);
        let expected = [
            0x77, 0x37, 0x84, 0xa6, 0x02, 0xb6, 0xc8, 0x1e, 0x3f, 0x09, 0x2f, 0x4d, 0x7d, 0x00, 0xe1, 0x7c, 0xc8, 0x22,
            0xd8, 0x8f, 0x73, 0x60, 0xfc, 0xf2, 0xd2, 0xef, 0x2d, 0x9d, 0x90, 0x1f, 0x44, 0xb6,
        ];
        assert_eq!(hash, expected);
        assert_eq!(s2k::<Sha512>(b"123456", b"01234567", 0), Sha512::digest(b"01234567123456").to_vec());
    }
}
