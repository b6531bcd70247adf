//! `[[listen.client]]` in the configuration file: what one uid gets at a door. Opens no socket.

use serde::Deserialize;
use toml::Spanned;

use super::{
    Fault, System, User, checked, checked_list,
    device::{OperationForm, grants},
    sha256_fingerprint,
};
use crate::vault::key::Grants;

/// What one of a door's uids gets there, in place of what the door gives the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoorClient {
    /// Who: one of the door's uids.
    pub uid: u32,
    /// The fingerprints (`SHA256:…`) of the keys that it is shown; `None` means those of the door.
    pub keys: Option<Vec<String>>,
    /// What it may do with them, within what they grant. Plain ssh signatures are signatures.
    pub operations: Grants,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClientForm {
    uid: Spanned<User>,
    keys: Option<Vec<Spanned<String>>>,
    operations: Option<Vec<OperationForm>>,
}

/// Checks the clients of a door with these uids.
pub(super) fn clients(
    forms: Vec<Spanned<ClientForm>>,
    uids: &[u32],
    system: &System,
) -> Result<Vec<DoorClient>, Fault> {
    let mut clients: Vec<DoorClient> = Vec::with_capacity(forms.len());
    for form in forms {
        let ClientForm { uid: user, keys, operations } = form.into_inner();
        let uid = checked(&user, |user| system.uid(user))?;
        let refuse = |why: String| Err(Fault::new(user.span(), why));
        if !uids.contains(&uid) {
            return refuse(format!("uid {uid} is not among the door's `uids`, which admit it"));
        }
        // With that, no list is longer than the door's list of uids.
        if clients.iter().any(|other| other.uid == uid) {
            return refuse(format!("uid {uid} is another client's already"));
        }
        let keys = keys.map(|keys| checked_list(&keys, |key| sha256_fingerprint(key))).transpose()?;
        let operations = operations.as_ref().map_or(Grants::ALL, |operations| grants(operations));
        clients.push(DoorClient { uid, keys, operations });
    }
    Ok(clients)
}
