//! Objects on a token and their attributes: private keys, and what stands beside them to say which public key each has.
//! Knows sessions; knows no mechanism.

use aws_lc_rs::digest::{SHA256, digest};
use cryptoki::{
    error::{Error, RvError},
    object::{Attribute, AttributeType, CertificateType, KeyType, ObjectClass, ObjectHandle},
    session::Session,
};

use super::{
    error::words,
    public::{self, Reason},
    session::Fault,
};
use crate::devices::{DeviceError, MAX_KEYS, MAX_LABEL, MAX_SLOT, Slot};

/// Bytes of the public key's hash in a [`Slot`].
const HASH: usize = 16;
/// The longest CKA_ID by which a key is found again, in bytes.
const MAX_ID: usize = MAX_SLOT - HASH;

const KEY_ATTRIBUTES: [AttributeType; 8] = [
    AttributeType::KeyType,
    AttributeType::Id,
    AttributeType::Label,
    AttributeType::PublicKeyInfo,
    AttributeType::Modulus,
    AttributeType::PublicExponent,
    AttributeType::EcParams,
    AttributeType::EcPoint,
];
/// What a private key may be used for.
const PRIVATE_ATTRIBUTES: [AttributeType; 4] =
    [AttributeType::Sign, AttributeType::Decrypt, AttributeType::Derive, AttributeType::AlwaysAuthenticate];
/// The same of a public key, whose private half is not to be seen.
const PUBLIC_ATTRIBUTES: [AttributeType; 3] = [AttributeType::Verify, AttributeType::Encrypt, AttributeType::Derive];
const CERTIFICATE_ATTRIBUTES: [AttributeType; 3] = [AttributeType::Id, AttributeType::Label, AttributeType::Value];

/// A private key on the token, or a public one whose private half shows after a login only.
pub(super) struct KeyObject {
    pub(super) handle: ObjectHandle,
    pub(super) id: Vec<u8>,
    pub(super) label: String,
    /// The public key's blob.
    pub(super) blob: Vec<u8>,
    pub(super) usage: Usage,
}

/// What a key is for, by its attributes. What the token does not say is taken for allowed: it will refuse.
#[derive(Clone, Debug)]
pub(super) struct Usage {
    pub(super) sign: bool,
    pub(super) decrypt: bool,
    pub(super) derive: bool,
    /// Each use wants a login of its own.
    pub(super) always_authenticate: bool,
    /// CKA_ALLOWED_MECHANISMS, as numbers: empty for all.
    pub(super) allowed: Vec<cryptoki::mechanism::MechanismType>,
}

impl KeyObject {
    /// Its name for the vault: it outlives handles, sessions and labels, and is nobody else's when the token is made anew.
    pub(super) fn slot(&self) -> Slot {
        Slot([hash(&self.blob).as_slice(), &self.id].concat().into())
    }
}

fn hash(blob: &[u8]) -> [u8; HASH] {
    let mut short = [0; HASH];
    short.copy_from_slice(&digest(&SHA256, blob).as_ref()[..HASH]);
    short
}

/// What is on a token.
pub(super) struct Found {
    pub(super) keys: Vec<KeyObject>,
    /// What is left out, and why.
    pub(super) notes: Vec<String>,
    /// How many objects could not be read.
    pub(super) unread: usize,
    /// Whether no private key is among them, which may have been here before.
    pub(super) is_complete: bool,
}

impl Found {
    fn leave_out(&mut self, left: Left) {
        self.unread += usize::from(left.is_unread);
        self.notes.push(left.why);
    }

    fn leave_private_out(&mut self, left: Left) {
        self.is_complete &= !left.is_unread;
        self.leave_out(left);
    }
}

/// An object that is left out.
pub(super) struct Left {
    pub(super) why: String,
    /// Whether it may be a key that can be used, if it could be read.
    is_unread: bool,
}

impl Left {
    fn unreadable(what: &str, why: &str) -> Self {
        Self { why: format!("{what} cannot be read and is left out: {why}"), is_unread: true }
    }

    /// An error is one of the session or the token, which has nothing else to say either.
    fn unread(what: &str, error: Error) -> Result<Self, Error> {
        if is_about_all(&error) {
            return Err(error);
        }
        Ok(Self::unreadable(what, &words(&error)))
    }
}

/// The keys on the token. Objects that cannot be read, and private keys that cannot be used, leave a note and spoil no other. With
/// `hidden`, public keys stand for private ones that are not to be seen before a login.
pub(super) fn keys(session: &Session, hidden: bool) -> Result<Found, Error> {
    let companions = Companions::read(session, None)?;
    let handles = find(session, &[Attribute::Class(ObjectClass::PRIVATE_KEY)])?;
    let mut found = Found { keys: Vec::new(), notes: Vec::new(), unread: 0, is_complete: true };
    if handles.len() > MAX_KEYS {
        found.notes.push(format!("the token has more than {MAX_KEYS} private keys; the others are left out"));
    }
    for handle in handles.into_iter().take(MAX_KEYS) {
        match private_key(session, handle, &companions) {
            Ok(Ok(key)) => found.keys.push(key),
            Ok(Err(left)) => found.leave_private_out(left),
            Err(error) => found.leave_private_out(Left::unread("a private key", error)?),
        }
    }
    let Companions { publics, unread, .. } = companions;
    unread.into_iter().for_each(|left| found.leave_out(left));
    if hidden {
        public_keys(session, publics, &mut found)?;
    }
    Ok(found)
}

/// Adds the public keys whose private halves are not among those that were found.
fn public_keys(session: &Session, publics: Vec<PublicObject>, found: &mut Found) -> Result<(), Error> {
    for public in publics {
        let Ok(blob) = public.blob else { continue };
        let keys = &mut found.keys;
        if public.id.len() > MAX_ID || keys.len() >= MAX_KEYS || keys.iter().any(|key| key.blob == blob) {
            continue;
        }
        let attributes = match Attributes::read(session, public.handle, &PUBLIC_ATTRIBUTES) {
            Ok(attributes) => attributes,
            Err(error) => {
                found.leave_out(Left::unread("a public key", error)?);
                continue;
            }
        };
        let allowed = |attribute| attributes.flag(attribute).unwrap_or(true);
        let usage = Usage {
            sign: allowed(AttributeType::Verify),
            decrypt: allowed(AttributeType::Encrypt),
            derive: allowed(AttributeType::Derive),
            always_authenticate: false,
            allowed: Vec::new(),
        };
        keys.push(KeyObject { handle: public.handle, id: public.id, label: public.label, blob, usage });
    }
    Ok(())
}

/// The private key that this slot names.
pub(super) fn find_key(session: &Session, slot: &Slot) -> Result<Option<KeyObject>, Fault> {
    let Some((wanted, id)) = slot.0.split_first_chunk::<HASH>() else { return Ok(None) };
    let mut template = vec![Attribute::Class(ObjectClass::PRIVATE_KEY)];
    if !id.is_empty() {
        template.push(Attribute::Id(id.to_vec()));
    }
    let handles = find(session, &template)?;
    if handles.is_empty() {
        return Ok(None);
    }
    let companions = Companions::read(session, Some(id))?;
    let mut unread = None;
    for handle in handles {
        match private_key(session, handle, &companions) {
            Ok(Ok(key)) if key.id == id && hash(&key.blob) == *wanted => return Ok(Some(key)),
            Ok(Err(Left { why, is_unread: true })) => unread = Some(Fault::Ours(DeviceError::Failed(why))),
            Ok(_) => {}
            Err(error) if is_about_all(&error) => return Err(error.into()),
            Err(error) => unread = Some(error.into()),
        }
    }
    // It may be the one.
    unread.map_or(Ok(None), Err)
}

/// The private key that has just been made with this CKA_ID, or why it cannot be used.
pub(super) fn made(session: &Session, handle: ObjectHandle, id: &[u8]) -> Result<Result<KeyObject, Left>, Error> {
    private_key(session, handle, &Companions::read(session, Some(id))?)
}

/// The public keys and certificates of this very key.
pub(super) fn beside(session: &Session, key: &KeyObject) -> Result<Vec<ObjectHandle>, Error> {
    let Companions { publics, certificates, .. } = Companions::read(session, Some(&key.id))?;
    let publics = publics.into_iter().filter(|public| public.id == key.id && public.blob.as_ref() == Ok(&key.blob));
    let certificates = certificates.into_iter().filter(|its| its.id == key.id && its.blob.as_ref() == Some(&key.blob));
    Ok(publics.map(|public| public.handle).chain(certificates.map(|certificate| certificate.handle)).collect())
}

/// A private key, or why it cannot be used.
fn private_key(
    session: &Session,
    handle: ObjectHandle,
    companions: &Companions,
) -> Result<Result<KeyObject, Left>, Error> {
    let attributes = Attributes::read(session, handle, &KEY_ATTRIBUTES)?;
    let (id, label) = (attributes.bytes(AttributeType::Id).to_vec(), attributes.label());
    let left_out =
        |why: &str, is_unread| Ok(Err(Left { why: format!("{} is left out: {why}", named(&id, &label)), is_unread }));
    if id.len() > MAX_ID {
        return left_out(&format!("its CKA_ID is longer than {MAX_ID} bytes"), false);
    }
    let usage = usage(session, handle)?;
    let companion = companions.of(&id, &label, attributes.key_type());
    let blob = match (attributes.public_key(), companion.blob) {
        (Ok(blob), _) => blob,
        (Err(_), Some(blob)) => blob.clone(),
        (Err(why), None) => {
            let is_unread = attributes.are_blank() || !companions.unread.is_empty();
            return match attributes.unread {
                Some(error) => Err(error),
                None => left_out(why, is_unread),
            };
        }
    };
    let label = [label, companion_label(&companion)].into_iter().find(|label| !label.is_empty());
    let label = label.unwrap_or_else(|| hex(&id));
    Ok(Ok(KeyObject { handle, id, label, blob, usage }))
}

fn usage(session: &Session, handle: ObjectHandle) -> Result<Usage, Error> {
    let attributes = Attributes::read(session, handle, &PRIVATE_ATTRIBUTES)?;
    // Alone: one unknown mechanism among them spoils what is read together with it.
    let allowed = Attributes::read(session, handle, &[AttributeType::AllowedMechanisms])?;
    let allowed = allowed.found.into_iter().find_map(|attribute| match attribute {
        Attribute::AllowedMechanisms(allowed) => Some(allowed),
        _ => None,
    });
    let flag = |attribute| attributes.flag(attribute).unwrap_or(true);
    Ok(Usage {
        sign: flag(AttributeType::Sign),
        decrypt: flag(AttributeType::Decrypt),
        derive: flag(AttributeType::Derive),
        always_authenticate: attributes.flag(AttributeType::AlwaysAuthenticate).unwrap_or(false),
        allowed: allowed.unwrap_or_default(),
    })
}

fn named(id: &[u8], label: &str) -> String {
    match (label.is_empty(), id.is_empty()) {
        (false, _) => format!("the key {label:?}"),
        (true, false) => format!("the key with CKA_ID {}", hex(id)),
        (true, true) => "a key without CKA_ID and label".to_owned(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(MAX_LABEL / 2).map(|byte| format!("{byte:02x}")).collect()
}

/// Public keys and certificates: what says of a private key which public key it has, when it does not itself.
struct Companions {
    publics: Vec<PublicObject>,
    certificates: Vec<CertificateObject>,
    unread: Vec<Left>,
}

struct PublicObject {
    handle: ObjectHandle,
    id: Vec<u8>,
    label: String,
    key_type: Option<KeyType>,
    blob: Result<Vec<u8>, Reason>,
}

struct CertificateObject {
    handle: ObjectHandle,
    id: Vec<u8>,
    label: String,
    blob: Option<Vec<u8>>,
}

/// What the companions say of one private key.
struct Companion<'a> {
    blob: Option<&'a Vec<u8>>,
    public_label: Option<&'a str>,
    certificate_label: Option<&'a str>,
}

fn companion_label(companion: &Companion<'_>) -> String {
    let labels = [companion.public_label, companion.certificate_label];
    labels.into_iter().flatten().find(|label| !label.is_empty()).unwrap_or_default().to_owned()
}

impl Companions {
    /// All on the token, or those with this CKA_ID.
    fn read(session: &Session, id: Option<&[u8]>) -> Result<Self, Error> {
        let with_id = |attribute| {
            let mut template = vec![attribute];
            template.extend(id.filter(|id| !id.is_empty()).map(|id| Attribute::Id(id.to_vec())));
            template
        };
        let (mut publics, mut unread) = (Vec::new(), Vec::new());
        let read =
            |handle, attributes, what, unread: &mut Vec<Left>| match Attributes::read(session, handle, attributes) {
                Ok(attributes) => Ok(Some(attributes)),
                Err(error) => Left::unread(what, error).map(|left| {
                    unread.push(left);
                    None
                }),
            };
        for handle in find(session, &with_id(Attribute::Class(ObjectClass::PUBLIC_KEY)))? {
            let Some(attributes) = read(handle, &KEY_ATTRIBUTES, "a public key", &mut unread)? else { continue };
            let blob = attributes.public_key();
            if blob.is_err() {
                unread.extend(attributes.left("a public key"));
            }
            publics.push(PublicObject {
                handle,
                id: attributes.bytes(AttributeType::Id).to_vec(),
                label: attributes.label(),
                key_type: attributes.key_type(),
                blob,
            });
        }
        let mut certificates = Vec::new();
        let mut template = with_id(Attribute::Class(ObjectClass::CERTIFICATE));
        template.push(Attribute::CertificateType(CertificateType::X_509));
        for handle in find(session, &template)? {
            let Some(attributes) = read(handle, &CERTIFICATE_ATTRIBUTES, "a certificate", &mut unread)? else {
                continue;
            };
            let certificate = public::certificate(attributes.bytes(AttributeType::Value));
            let name = certificate.as_ref().and_then(|certificate| certificate.common_name).unwrap_or_default();
            let label = attributes.label();
            if certificate.is_none() {
                unread.extend(attributes.left("a certificate"));
            }
            certificates.push(CertificateObject {
                handle,
                id: attributes.bytes(AttributeType::Id).to_vec(),
                label: if label.is_empty() { cut(name) } else { label },
                blob: certificate.and_then(|certificate| public::spki(certificate.spki).ok()),
            });
        }
        Ok(Self { publics, certificates, unread })
    }

    /// Those that belong to the private key of this CKA_ID; to the one of this label where it has no CKA_ID.
    fn of(&self, id: &[u8], label: &str, key_type: Option<KeyType>) -> Companion<'_> {
        let belongs = |its_id: &[u8], its_label: &str| its_id == id && (!id.is_empty() || its_label == label);
        let public = self
            .publics
            .iter()
            .find(|public| belongs(&public.id, &public.label) && public.key_type == key_type && public.blob.is_ok());
        let certificate = self.certificates.iter().find(|certificate| belongs(&certificate.id, &certificate.label));
        Companion {
            blob: public
                .and_then(|public| public.blob.as_ref().ok())
                .or_else(|| certificate.and_then(|certificate| certificate.blob.as_ref())),
            public_label: public.map(|public| public.label.as_str()),
            certificate_label: certificate.map(|certificate| certificate.label.as_str()),
        }
    }
}

/// Handles of the objects like that: one more than [`MAX_KEYS`] at most.
pub(super) fn find(session: &Session, template: &[Attribute]) -> Result<Vec<ObjectHandle>, Error> {
    session.iter_objects(template)?.take(MAX_KEYS + 1).collect()
}

/// What an object says of itself.
struct Attributes {
    found: Vec<Attribute>,
    /// Why one could not be read that the object may have.
    unread: Option<Error>,
}

impl Attributes {
    /// Those that the object has. One that cannot be read does not spoil the others.
    fn read(session: &Session, object: ObjectHandle, types: &[AttributeType]) -> Result<Self, Error> {
        match session.get_attributes(object, types) {
            Ok(found) => return Ok(Self { found, unread: None }),
            Err(error) if !is_about_attribute(&error) => return Err(error),
            Err(_) => {}
        }
        let (mut found, mut unread) = (Vec::new(), None);
        for attribute_type in types {
            match session.get_attributes(object, &[*attribute_type]) {
                Ok(attribute) => found.extend(attribute),
                Err(error) if !is_about_attribute(&error) => return Err(error),
                Err(error) if is_about_value(&error) => {}
                Err(error) => unread = Some(error),
            }
        }
        Ok(Self { found, unread })
    }

    /// Whether the object says nothing of itself, as one that SoftHSM has read while another program wrote it.
    fn are_blank(&self) -> bool {
        let is_empty = |attribute| self.bytes(attribute).is_empty();
        self.key_type().is_none() && is_empty(AttributeType::Id) && is_empty(AttributeType::Label)
    }

    /// That the object cannot be made sense of because something in it was not read.
    fn left(&self, what: &str) -> Option<Left> {
        match &self.unread {
            Some(error) => Some(Left::unreadable(what, &words(error))),
            None if self.are_blank() => Some(Left::unreadable(what, "it has no attributes")),
            None => None,
        }
    }

    fn bytes(&self, wanted: AttributeType) -> &[u8] {
        let found = self.found.iter().find(|attribute| attribute.attribute_type() == wanted);
        match found {
            Some(
                Attribute::Id(bytes)
                | Attribute::Label(bytes)
                | Attribute::PublicKeyInfo(bytes)
                | Attribute::Modulus(bytes)
                | Attribute::PublicExponent(bytes)
                | Attribute::EcParams(bytes)
                | Attribute::EcPoint(bytes)
                | Attribute::Value(bytes),
            ) => bytes,
            _ => &[],
        }
    }

    fn flag(&self, wanted: AttributeType) -> Option<bool> {
        self.found.iter().find(|attribute| attribute.attribute_type() == wanted).and_then(|attribute| match attribute {
            Attribute::Sign(flag)
            | Attribute::Verify(flag)
            | Attribute::Decrypt(flag)
            | Attribute::Encrypt(flag)
            | Attribute::Derive(flag)
            | Attribute::AlwaysAuthenticate(flag) => Some(*flag),
            _ => None,
        })
    }

    fn key_type(&self) -> Option<KeyType> {
        self.found.iter().find_map(|attribute| match attribute {
            Attribute::KeyType(key_type) => Some(*key_type),
            _ => None,
        })
    }

    fn label(&self) -> String {
        cut(&String::from_utf8_lossy(self.bytes(AttributeType::Label)))
    }

    /// The public key's blob, as far as this object tells it.
    fn public_key(&self) -> Result<Vec<u8>, Reason> {
        let info = self.bytes(AttributeType::PublicKeyInfo);
        if !info.is_empty()
            && let Ok(blob) = public::spki(info)
        {
            return Ok(blob);
        }
        let nothing = Err("nothing on the token tells its public key");
        match self.key_type() {
            Some(KeyType::RSA) => {
                let (n, e) = (self.bytes(AttributeType::Modulus), self.bytes(AttributeType::PublicExponent));
                if n.is_empty() || e.is_empty() { nothing } else { public::rsa(n, e) }
            }
            Some(KeyType::EC | KeyType::EC_EDWARDS | KeyType::EC_MONTGOMERY) => {
                let (params, point) = (self.bytes(AttributeType::EcParams), self.bytes(AttributeType::EcPoint));
                if point.is_empty() { nothing } else { public::ec(params, point) }
            }
            _ => Err("its type is not one of RSA, EC, Ed25519 and X25519"),
        }
    }
}

fn cut(text: &str) -> String {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())[..]
        .chars()
        .scan(0, |len, c| {
            *len += c.len_utf8();
            (*len <= MAX_LABEL).then_some(c)
        })
        .collect()
}

/// Whether an error says something about one attribute only, and not about the object, the session or the token.
fn is_about_attribute(error: &Error) -> bool {
    let is_doubtful = matches!(
        error,
        Error::Pkcs11(
            RvError::ArgumentsBad
                | RvError::BufferTooSmall
                | RvError::FunctionFailed
                | RvError::FunctionNotSupported
                | RvError::GeneralError,
            _
        )
    );
    is_doubtful || is_about_value(error)
}

/// Whether it says for good that the object has no such attribute, or does not show it.
fn is_about_value(error: &Error) -> bool {
    match error {
        Error::Pkcs11(value, _) => matches!(
            value,
            RvError::AttributeSensitive | RvError::AttributeTypeInvalid | RvError::AttributeValueInvalid
        ),
        // A value that cannot be what its attribute has.
        _ => true,
    }
}

/// Whether an error is one of the session or the token, so that nothing else can be read there now.
fn is_about_all(error: &Error) -> bool {
    matches!(
        error,
        Error::Pkcs11(
            RvError::SessionHandleInvalid
                | RvError::SessionClosed
                | RvError::OperationActive
                | RvError::DeviceRemoved
                | RvError::TokenNotPresent
                | RvError::TokenNotRecognized
                | RvError::SlotIdInvalid
                | RvError::CryptokiNotInitialized,
            _
        )
    )
}
