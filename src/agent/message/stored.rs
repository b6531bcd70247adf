//! The messages about keys in the encrypted store. Knows their fields and bounds; no store.

use secrecy::{ExposeSecret, SecretString};

use super::{
    Name, RequestError,
    request::{put_operations, read_blob, read_name, read_operations, read_secret, read_text},
};
use crate::{
    agent::{
        constraint::{put_destinations, read_destinations},
        wire::read_soft,
    },
    rfc4251::{Put, Reader},
    vault::{
        store::MAX_COMMENT,
        stored::{ExportForm, KeyChange, NewStored},
    },
};

/// A request about a stored key. It does not print: it may hold a private key, or a passphrase.
#[derive(Clone)]
pub enum StoredRequest<'a> {
    /// `import-key`
    Import {
        /// The private key, as SSH_AGENTC_ADD_IDENTITY has it up to the comment.
        key: &'a [u8],
        /// What ssh shows of it: at most [`MAX_COMMENT`] bytes, without NUL.
        comment: &'a [u8],
        /// What it is called in the vault; may be empty.
        label: &'a str,
        /// Whether a person confirms each use.
        confirm: bool,
        /// What it may do.
        terms: NewStored,
    },
    /// `set-key`
    Set {
        /// The key.
        key: &'a [u8],
        /// A passphrase of the store, which loosening takes.
        proof: Option<SecretString>,
        /// What is to change.
        change: KeyChange,
    },
    /// `attach` of this certificate.
    Attach(&'a [u8]),
    /// `export`
    Export {
        /// The key.
        key: &'a [u8],
        /// A passphrase of the store.
        proof: Option<SecretString>,
        /// The file's form.
        form: ExportForm,
        /// What seals the file.
        passphrase: SecretString,
    },
    /// `rotate`
    Rotate {
        /// The key.
        key: &'a [u8],
        /// From when on the old key is not used, in seconds since 1970.
        retires: Option<u64>,
    },
}

impl<'a> StoredRequest<'a> {
    /// Reads the fields of the message with this name; `None` for one that is about something else.
    pub(super) fn read(name: Name, r: &mut Reader<'a>) -> Result<Option<Self>, RequestError> {
        Ok(Some(match name {
            Name::ImportKey => {
                let (key, comment, label) = (r.string()?, r.string()?, read_name(r)?);
                if read_soft(key).is_err() {
                    return Err(RequestError::Invalid("that is no private key that can be stored"));
                }
                if comment.len() > MAX_COMMENT || comment.contains(&0) {
                    return Err(RequestError::Invalid(
                        "a stored key's comment has at most 1024 bytes, none of them zero",
                    ));
                }
                let confirm = r.bool()?;
                let terms = NewStored { exportable: r.bool()?, grants: read_operations(r)? };
                Self::Import { key, comment, label, confirm, terms }
            }
            Name::SetKey => Self::Set { key: read_blob(r)?, proof: optional_secret(r)?, change: read_change(r)? },
            Name::Attach => Self::Attach(read_blob(r)?),
            Name::Export => {
                let (key, proof) = (read_blob(r)?, optional_secret(r)?);
                let form =
                    ExportForm::from_name(read_text(r)?).ok_or(RequestError::Unknown("form of a private key"))?;
                Self::Export { key, proof, form, passphrase: read_secret(r)? }
            }
            Name::Rotate => Self::Rotate { key: read_blob(r)?, retires: optional_time(r)? },
            _ => return Ok(None),
        }))
    }

    /// The message that it is.
    pub fn name(&self) -> Name {
        match self {
            Self::Import { .. } => Name::ImportKey,
            Self::Set { .. } => Name::SetKey,
            Self::Attach(_) => Name::Attach,
            Self::Export { .. } => Name::Export,
            Self::Rotate { .. } => Name::Rotate,
        }
    }

    /// The key that it is about, where it names one.
    pub fn key(&self) -> Option<&'a [u8]> {
        match self {
            Self::Import { .. } => None,
            Self::Set { key, .. } | Self::Export { key, .. } | Self::Rotate { key, .. } => Some(key),
            Self::Attach(certificate) => Some(certificate),
        }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Import { key, comment, label, confirm, terms } => {
                [key, comment, label.as_bytes()].into_iter().for_each(|field| out.put_string(field));
                out.extend([*confirm, terms.exportable].map(u8::from));
                put_operations(out, terms.grants);
            }
            Self::Set { key, proof, change } => {
                out.put_string(key);
                put_optional(out, proof.as_ref());
                put_change(out, change);
            }
            Self::Attach(certificate) => out.put_string(certificate),
            Self::Export { key, proof, form, passphrase } => {
                out.put_string(key);
                put_optional(out, proof.as_ref());
                out.put_string(form.as_str().as_bytes());
                out.put_string(passphrase.expose_secret().as_bytes());
            }
            Self::Rotate { key, retires } => {
                out.put_string(key);
                out.put_u64(retires.unwrap_or(0));
            }
        }
    }
}

/// A passphrase, or nothing of it.
fn optional_secret(r: &mut Reader<'_>) -> Result<Option<SecretString>, RequestError> {
    let mut ahead = *r;
    if ahead.string()?.is_empty() {
        *r = ahead;
        return Ok(None);
    }
    read_secret(r).map(Some)
}

fn put_optional(out: &mut Vec<u8>, secret: Option<&SecretString>) {
    out.put_string(secret.map_or("", |secret| secret.expose_secret()).as_bytes());
}

fn optional_time(r: &mut Reader<'_>) -> Result<Option<u64>, RequestError> {
    Ok(Some(r.u64()?).filter(|&at| at != 0))
}

fn read_change(r: &mut Reader<'_>) -> Result<KeyChange, RequestError> {
    Ok(match r.string()? {
        b"enable" => KeyChange::Enable,
        b"disable" => KeyChange::Disable,
        b"confirm" => KeyChange::Confirm(r.bool()?),
        b"expires" => KeyChange::Expires(optional_time(r)?),
        b"destinations" => {
            let destinations = read_destinations(r.string()?);
            KeyChange::Destinations(destinations.map_err(|_| RequestError::Invalid("those are no destinations"))?)
        }
        b"not-exportable" => KeyChange::NotExportable,
        b"detach" => KeyChange::Detach(read_blob(r)?.into()),
        _ => return Err(RequestError::Unknown("change of a key")),
    })
}

fn put_change(out: &mut Vec<u8>, change: &KeyChange) {
    let name: &[u8] = match change {
        KeyChange::Enable => b"enable",
        KeyChange::Disable => b"disable",
        KeyChange::Confirm(_) => b"confirm",
        KeyChange::Expires(_) => b"expires",
        KeyChange::Destinations(_) => b"destinations",
        KeyChange::NotExportable => b"not-exportable",
        KeyChange::Detach(_) => b"detach",
    };
    out.put_string(name);
    match change {
        KeyChange::Enable | KeyChange::Disable | KeyChange::NotExportable => {}
        KeyChange::Confirm(confirm) => out.push((*confirm).into()),
        KeyChange::Expires(at) => out.put_u64(at.unwrap_or(0)),
        KeyChange::Destinations(destinations) => {
            let mut value = Vec::new();
            put_destinations(&mut value, destinations);
            out.put_string(&value);
        }
        KeyChange::Detach(certificate) => out.put_string(certificate),
    }
}
