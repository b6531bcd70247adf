//! A card's keys as devices have them: from its data objects to blobs, schemes and words. Knows no connection.

use openpgp_card::ocard::{
    KeyType as CardSlot,
    algorithm::{AlgorithmAttributes, Curve as CardCurve},
    crypto::{EccType, PublicKeyMaterial},
    data::{ApplicationIdentifier, ApplicationRelatedData, KeyGenerationTime, KeySet},
};

use crate::{
    devices::{DecryptScheme, DeriveScheme, FoundKey, Hash, MAX_LABEL, Scheme, Slot},
    prompt::harmless,
    public_key::{Curve, PublicKey},
};

/// The card's slots, in the order in which a key that is in several of them is signed with.
pub(super) const SLOTS: [CardSlot; 3] = [CardSlot::Authentication, CardSlot::Signing, CardSlot::Decryption];

/// What a slot is called.
pub(super) fn slot_name(slot: CardSlot) -> &'static str {
    match slot {
        CardSlot::Authentication => "auth",
        CardSlot::Signing => "sign",
        CardSlot::Decryption => "decrypt",
        CardSlot::Attestation => "attest",
    }
}

/// The slots that a device's slot names: the same key may be in several.
pub(super) fn slots_of(slot: &Slot) -> impl Iterator<Item = CardSlot> {
    let names: Vec<&[u8]> = slot.0.split(|byte| *byte == b'+').collect();
    SLOTS.into_iter().filter(move |slot| names.contains(&slot_name(*slot).as_bytes()))
}

/// One key on a card: what it is, and in which slot.
#[derive(Clone, Debug)]
pub(super) struct CardKey {
    pub(super) slot: CardSlot,
    pub(super) kind: Kind,
    pub(super) blob: Vec<u8>,
    pub(super) touch: bool,
    /// In hexadecimal, where the card has one.
    pub(super) fingerprint: Option<String>,
    /// When it was made, in seconds since 1970; 0 where that is not known.
    pub(super) made: u32,
}

/// What a key computes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Rsa,
    Ecdsa(Curve),
    Ecdh(Curve),
    Ed25519,
    X25519,
}

/// Reads a public key as the card gave it. The error says for people why the key is left out.
pub(super) fn public_key(
    material: &PublicKeyMaterial,
    attributes: &AlgorithmAttributes,
) -> Result<(Kind, Vec<u8>), String> {
    match (material, attributes) {
        (PublicKeyMaterial::R(rsa), _) => {
            let (e, n) = (magnitude(rsa.v()), magnitude(rsa.n()));
            let bits = n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize);
            if !(2048..=4096).contains(&bits) {
                return Err(format!("it is an RSA key of {bits} bits, and those of 2048 to 4096 are supported"));
            }
            Ok((Kind::Rsa, PublicKey::Rsa { e, n }.to_blob()))
        }
        (PublicKeyMaterial::E(point), AlgorithmAttributes::Ecc(attributes)) => {
            let point = point.data();
            let nist = |curve: Curve| {
                if point.len() != 1 + 2 * curve.scalar_len() || point[0] != 4 {
                    return Err("its public key is no uncompressed point of its curve".to_owned());
                }
                let kind = if attributes.ecc_type() == EccType::ECDH { Kind::Ecdh(curve) } else { Kind::Ecdsa(curve) };
                Ok((kind, PublicKey::Ecdsa(curve, point).to_blob()))
            };
            match attributes.curve() {
                CardCurve::NistP256r1 => nist(Curve::P256),
                CardCurve::NistP384r1 => nist(Curve::P384),
                CardCurve::NistP521r1 => nist(Curve::P521),
                CardCurve::Ed25519 => Ok((Kind::Ed25519, PublicKey::Ed25519(native(point)?).to_blob())),
                CardCurve::Curve25519 => Ok((Kind::X25519, PublicKey::X25519(native(point)?).to_blob())),
                other => Err(format!("its curve, {other:?}, is none that SSH has keys for")),
            }
        }
        (_, other) => Err(format!("its algorithm is not known here: {other}")),
    }
}

fn magnitude(number: &[u8]) -> &[u8] {
    &number[number.iter().take_while(|byte| **byte == 0).count()..]
}

/// The 32 bytes of a point, which some cards prefix as OpenPGP does.
fn native(point: &[u8]) -> Result<&[u8], String> {
    match point {
        [0x40, rest @ ..] if rest.len() == 32 => Ok(rest),
        point if point.len() == 32 => Ok(point),
        _ => Err("its public key is not 32 bytes long".to_owned()),
    }
}

/// What a scan finds of these keys: one entry for each public key, whatever slots it is in.
pub(super) fn found(keys: &[CardKey], label: &str, decrypts_pkcs1: bool) -> Vec<FoundKey> {
    let mut found: Vec<(FoundKey, Vec<CardSlot>)> = Vec::new();
    for slot in SLOTS {
        for key in keys.iter().filter(|key| key.slot == slot) {
            let entry = match found.iter_mut().find(|(other, _)| *other.blob == *key.blob) {
                Some(entry) => entry,
                None => found.push_mut((empty(key, label), Vec::new())),
            };
            entry.1.push(slot);
            add(&mut entry.0, key, decrypts_pkcs1);
        }
    }
    for (key, slots) in &mut found {
        let names: Vec<_> = slots.iter().map(|slot| slot_name(*slot)).collect();
        key.slot = Slot(names.join("+").into_bytes().into());
        key.note = format!("slot {}{}", names.join(" and "), key.note);
    }
    found.into_iter().map(|(key, _)| key).collect()
}

fn empty(key: &CardKey, label: &str) -> FoundKey {
    let fingerprint = key.fingerprint.as_ref().map(|fingerprint| format!(", OpenPGP fingerprint {fingerprint}"));
    let made = (key.made != 0).then(|| format!(", made {}", date(key.made)));
    FoundKey {
        slot: Slot([].into()),
        blob: key.blob.clone().into(),
        certificates: Vec::new(),
        label: label.to_owned(),
        schemes: Vec::new(),
        decrypts: Vec::new(),
        derives: Vec::new(),
        touch: false,
        ssh: false,
        note: fingerprint.unwrap_or_default() + &made.unwrap_or_default(),
    }
}

fn add(found: &mut FoundKey, key: &CardKey, decrypts_pkcs1: bool) {
    found.touch |= key.touch;
    match (key.slot, key.kind) {
        (CardSlot::Decryption, Kind::Rsa) => {
            found.decrypts.extend(decrypts_pkcs1.then_some(DecryptScheme::RsaPkcs1v15));
        }
        (CardSlot::Decryption, Kind::Ecdh(_)) => found.derives.push(DeriveScheme::Ecdh),
        (CardSlot::Decryption, Kind::X25519) => found.derives.push(DeriveScheme::X25519),
        (CardSlot::Decryption, _) => {}
        (slot, kind) => {
            found.ssh |= slot == CardSlot::Authentication;
            for scheme in signs(kind) {
                if !found.schemes.contains(&scheme) {
                    found.schemes.push(scheme);
                }
            }
        }
    }
}

/// The schemes in which such a key signs.
pub(super) fn signs(kind: Kind) -> Vec<Scheme> {
    match kind {
        Kind::Rsa => [Hash::Sha1, Hash::Sha256, Hash::Sha384, Hash::Sha512].map(Scheme::RsaPkcs1v15).into(),
        Kind::Ecdsa(_) => [Hash::Sha256, Hash::Sha384, Hash::Sha512].map(Scheme::Ecdsa).into(),
        Kind::Ed25519 => vec![Scheme::Ed25519],
        Kind::Ecdh(_) | Kind::X25519 => Vec::new(),
    }
}

/// What a card is called: its serial, its maker, and its holder where it has one.
pub(super) fn label(aid: &ApplicationIdentifier, holder: &[u8]) -> String {
    let mut label = format!("cardno:{:04X} {:08X}", aid.manufacturer(), aid.serial());
    let maker = maker(aid);
    if !maker.is_empty() {
        label.push(' ');
        label.push_str(maker);
    }
    let holder = holder_name(holder);
    if !holder.is_empty() {
        label.push_str(", ");
        label.push_str(&holder);
    }
    label.truncate(label.floor_char_boundary(MAX_LABEL));
    label
}

/// The manufacturer's name; empty where the number is nobody's or not known.
pub(super) fn maker(aid: &ApplicationIdentifier) -> &'static str {
    match (aid.manufacturer(), aid.manufacturer_name()) {
        (0xff00..=0xfffe, _) | (_, "Unknown") => "",
        (_, name) => name,
    }
}

/// `Example<<Ann` is Ann Example (ISO/IEC 7501-1), in Latin-1.
fn holder_name(name: &[u8]) -> String {
    let name: String = name.iter().map(|byte| char::from(*byte)).collect();
    let (last, first) = name.split_once("<<").unwrap_or((&name, ""));
    let words = first.split('<').chain(last.split('<')).map(str::trim).filter(|word| !word.is_empty());
    harmless(&words.collect::<Vec<_>>().join(" "))
}

/// A number that changes when the keys of a card may have.
pub(super) fn generation(data: &ApplicationRelatedData) -> u64 {
    let attributes = SLOTS.map(|slot| data.algorithm_attributes(slot).ok());
    let touch = [data.uif_pso_aut(), data.uif_pso_cds(), data.uif_pso_dec()].map(|flag| flag.ok().flatten());
    let state = format!(
        "{attributes:?} {touch:?} {:?} {:?}",
        data.fingerprints().ok(),
        data.key_generation_times()
            .ok()
            .map(|times| SLOTS.map(|slot| of_slot(&times, slot).map(KeyGenerationTime::get)))
    );
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, state.as_bytes());
    digest.as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// What belongs to one slot.
pub(super) fn of_slot<T>(set: &KeySet<T>, slot: CardSlot) -> Option<&T> {
    match slot {
        CardSlot::Signing => set.signature(),
        CardSlot::Decryption => set.decryption(),
        CardSlot::Authentication => set.authentication(),
        CardSlot::Attestation => None,
    }
}

/// The day, in UTC, as `2026-11-25`.
fn date(seconds: u32) -> String {
    // The civil calendar, by years that begin in March.
    let days = i64::from(seconds) / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, year) = (if month < 10 { month + 3 } else { month - 9 }, year + era * 400);
    format!("{:04}-{month:02}-{day:02}", if month <= 2 { year + 1 } else { year })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use openpgp_card::ocard::{
        algorithm::EccAttributes,
        crypto::{EccPub, RSAPub},
    };

    use super::*;

    fn key(slot: CardSlot, kind: Kind, blob: &[u8]) -> CardKey {
        CardKey { slot, kind, blob: blob.to_vec(), touch: false, fingerprint: None, made: 0 }
    }

    fn ecc(kind: EccType, curve: CardCurve, point: &[u8]) -> Result<(Kind, Vec<u8>), String> {
        let attributes = AlgorithmAttributes::Ecc(EccAttributes::new(kind, curve, None));
        public_key(&PublicKeyMaterial::E(EccPub::new(point.to_vec(), attributes.clone())), &attributes)
    }

    #[test]
    fn a_key_in_two_slots_is_one_key_that_ssh_is_offered() {
        let mut signing = key(CardSlot::Signing, Kind::Ed25519, b"same");
        signing.touch = true;
        let keys = [signing, key(CardSlot::Authentication, Kind::Ed25519, b"same")];
        let [one] = &found(&keys, "label", false)[..] else { unreachable!() };
        assert_eq!((&*one.slot.0, one.ssh, one.touch), (&b"auth+sign"[..], true, true));
        assert_eq!(one.schemes, [Scheme::Ed25519]);
        assert_eq!(slots_of(&one.slot).collect::<Vec<_>>(), SLOTS[..2]);
        let [sign, ..] = &found(&keys[..1], "label", false)[..] else { unreachable!() };
        assert!(!sign.ssh && sign.note == "slot sign");
    }

    #[test]
    fn pkcs1_decryption_is_off_unless_it_is_wanted() {
        let keys = [key(CardSlot::Decryption, Kind::Rsa, b"key")];
        assert!(found(&keys, "", false)[0].decrypts.is_empty());
        assert_eq!(found(&keys, "", true)[0].decrypts, [DecryptScheme::RsaPkcs1v15]);
        let agrees = found(&[key(CardSlot::Decryption, Kind::X25519, b"key")], "", false);
        assert_eq!(agrees[0].derives, [DeriveScheme::X25519]);
    }

    #[test]
    fn what_ssh_has_no_name_for_is_left_out_with_the_reason() {
        let why = ecc(EccType::ECDSA, CardCurve::BrainpoolP256r1, &[4; 65]).unwrap_err();
        assert!(why.contains("BrainpoolP256r1"), "{why}");
        assert!(ecc(EccType::ECDSA, CardCurve::NistP256r1, &[4; 64]).is_err());
        assert_eq!(ecc(EccType::ECDH, CardCurve::NistP256r1, &[4; 65]).unwrap().0, Kind::Ecdh(Curve::P256));
        let prefixed = [&[0x40][..], &[7; 32]].concat();
        assert_eq!(
            ecc(EccType::EdDSA, CardCurve::Ed25519, &prefixed),
            ecc(EccType::EdDSA, CardCurve::Ed25519, &[7; 32])
        );
        let rsa = |n: Vec<u8>| {
            let unused = AlgorithmAttributes::Unknown(Vec::new());
            public_key(&PublicKeyMaterial::R(RSAPub::new(n, vec![1, 0, 1])), &unused)
        };
        assert!(rsa(vec![0xff; 128]).is_err() && rsa(vec![0xff; 513]).is_err());
        assert_eq!(rsa([&[0][..], &[0xff; 256]].concat()).unwrap(), rsa(vec![0xff; 256]).unwrap());
    }

    #[test]
    fn names_and_days_are_those_of_people() {
        assert_eq!(holder_name(b"Example<<Ann<Mary"), "Ann Mary Example");
        assert_eq!(holder_name(b"Andr\xe9"), "Andr\u{e9}");
        assert_eq!(holder_name(b"a\x1b[2J"), "a\u{fffd}[2J");
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_795_564_800), "2026-11-25");
        assert_eq!(date(u32::MAX), "2106-02-07");
    }
}
