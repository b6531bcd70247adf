//! OpenPGP's ways of making a key of a passphrase (RFC 9580, section 3.7.1), which tor has taken over. Knows no file.

use aws_lc_rs::digest::{Algorithm, Context, SHA1_FOR_LEGACY_USE_ONLY, SHA224, SHA256, SHA384, SHA512};
use zeroize::Zeroizing;

use super::KeyFileError;
use crate::rfc4251::Reader;

/// What helps with protections that are not known here.
pub(super) const EXPORT_AGAIN: &str =
    "`gpg --import` and `gpg --export-secret-keys` write the key with a protection that is";
/// Bytes that are hashed at a time: a short passphrase would be hashed some million times.
const PIECE: usize = 16 * 1024;

/// A hash, and how much of salt and passphrase goes into it, over and over.
pub(super) struct S2k {
    hash: &'static Algorithm,
    salt: Option<[u8; 8]>,
    /// Bytes that are hashed; all of salt and passphrase at least. At most 62 MiB.
    count: usize,
}

impl S2k {
    /// The specifier as OpenPGP writes it.
    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, KeyFileError> {
        const UNKNOWN: KeyFileError =
            KeyFileError::unsupported("its way of making a key of the passphrase", EXPORT_AGAIN);
        let (kind, hash) = (r.u8()?, r.u8()?);
        let hash = match hash {
            // GnuPG's own, without a hash: the key is on a card, or was left out.
            _ if kind == 101 => {
                return Err(KeyFileError::unsupported(
                    "a key whose private half is not in the file",
                    "it is on a card, or was left out when the file was made",
                ));
            }
            2 => &SHA1_FOR_LEGACY_USE_ONLY,
            8 => &SHA256,
            9 => &SHA384,
            10 => &SHA512,
            11 => &SHA224,
            _ => return Err(UNKNOWN),
        };
        match kind {
            0 => Ok(Self { hash, salt: None, count: 0 }),
            1 => Ok(Self { hash, salt: Some(salt(r)?), count: 0 }),
            3 => Ok(Self { hash, salt: Some(salt(r)?), count: count(r.u8()?) }),
            _ => Err(UNKNOWN),
        }
    }

    /// The salt and the count, with SHA-1, as tor writes it.
    pub(super) fn read_tor(r: &mut Reader<'_>) -> Result<Self, KeyFileError> {
        Ok(Self { hash: &SHA1_FOR_LEGACY_USE_ONLY, salt: Some(salt(r)?), count: count(r.u8()?) })
    }

    /// A key of this length, in bytes.
    pub(super) fn derive(&self, passphrase: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let salt = self.salt.as_ref().map_or(&[][..], |salt| salt);
        let once = Zeroizing::new([salt, passphrase].concat());
        let pieces = Zeroizing::new(once.repeat((PIECE / once.len().max(1)).max(1)));
        let mut key = Zeroizing::new(Vec::with_capacity(len + 64));
        let mut zeros = Vec::new();
        while key.len() < len {
            let mut context = Context::new(self.hash);
            context.update(&zeros);
            let mut left = if once.is_empty() { 0 } else { self.count.max(once.len()) };
            while left > 0 {
                let piece = &pieces[..left.min(pieces.len())];
                context.update(piece);
                left -= piece.len();
            }
            key.extend_from_slice(context.finish().as_ref());
            // Where one hash is too short, the next begins with a zero more.
            zeros.push(0);
        }
        key.truncate(len);
        key
    }
}

fn salt(r: &mut Reader<'_>) -> Result<[u8; 8], KeyFileError> {
    let mut salt = [0; 8];
    salt.copy_from_slice(r.take(8)?);
    Ok(salt)
}

fn count(coded: u8) -> usize {
    let coded = usize::from(coded);
    (16 + (coded & 15)) << ((coded >> 4) + 6)
}
