//! The life of a key on a token: made, brought, called something else, deleted, each with the objects that stand beside it.
//! Knows sessions that write; `template` knows what is written.

use std::sync::{PoisonError, RwLockWriteGuard};

use aws_lc_rs::rand;
use cryptoki::{
    error::{Error, RvError},
    object::{Attribute, ObjectHandle},
    session::Session,
};

use super::{
    driver::Pkcs11,
    error::{device_error, words},
    object::{self, KeyObject},
    session::Fault,
    template::{self, Pair},
};
use crate::devices::{DeviceError, FoundKey, NewKey, PrivateHalf, Slot};

/// Bytes of a new key's CKA_ID: drawn at random when it is made, as some tokens let nobody set it later.
const ID_LEN: usize = 16;

impl Pkcs11 {
    pub(super) fn make(&self, new: &NewKey) -> Result<FoundKey, DeviceError> {
        check(new)?;
        let id = random_id()?;
        let (mechanism, attempts) = template::to_generate(new, &id, &self.mechanisms)?;
        // Only for a moment: others go on using their keys for as long as the token makes a large one.
        drop(self.alone());
        self.in_writing_session(|session| {
            let make = |Pair { public, private }: &Pair| session.generate_key_pair(&mechanism, public, private);
            let (public, private) = first_that_knows_the_curve(&attempts, make)?;
            self.made(session, &id, &[private, public])
        })
    }

    pub(super) fn bring(&self, new: &NewKey, half: &PrivateHalf) -> Result<FoundKey, DeviceError> {
        check(new)?;
        let id = random_id()?;
        let attempts = template::to_bring(new, &id, &half.parts()?, &self.mechanisms)?;
        let _alone = self.alone();
        self.in_writing_session(|session| {
            let bring = |Pair { public, private }: &Pair| {
                let private = session.create_object(private)?;
                session.create_object(public).map(|public| (public, private)).inspect_err(|_| {
                    // Half a key is of no use.
                    let _ = session.destroy_object(private);
                })
            };
            let (public, private) = first_that_knows_the_curve(&attempts, bring)?;
            self.made(session, &id, &[private, public])
        })
    }

    /// The new key as a scan finds it. One that cannot be used is not kept: whoever asked for it would never learn its name.
    fn made(&self, session: &Session, id: &[u8], objects: &[ObjectHandle; 2]) -> Result<FoundKey, Fault> {
        let key = object::made(session, objects[0], id).map_err(Fault::from).and_then(|key| {
            let unusable =
                |why: &str| DeviceError::Failed(format!("the token made a key that cannot be used: {why}")).into();
            key.map_err(|left| unusable(&left.why))
                .and_then(|key| self.found(&key).ok_or_else(|| unusable("its kind is not known")))
        });
        if key.is_err() {
            objects.iter().for_each(|object| drop(session.destroy_object(*object)));
        }
        key
    }

    pub(super) fn call(&self, slot: &Slot, label: &str) -> Result<(), DeviceError> {
        let _alone = self.alone();
        self.in_writing_session(|session| {
            let (key, beside) = self.with_what_belongs_to_it(session, slot)?;
            let label = [Attribute::Label(label.as_bytes().to_vec())];
            session.update_attributes(key.handle, &label).map_err(|error| not_let(&error, "rename its keys"))?;
            for object in beside {
                // The private key's label is the one that counts.
                let _ = session.update_attributes(object, &label);
            }
            Ok(())
        })
    }

    pub(super) fn destroy(&self, slot: &Slot) -> Result<(), DeviceError> {
        let _alone = self.alone();
        let destroyed = self.in_writing_session(|session| {
            let (key, beside) = self.with_what_belongs_to_it(session, slot)?;
            // It first: while it is there, its public key says which one it is.
            session.destroy_object(key.handle).map_err(|error| not_let(&error, "delete its keys"))?;
            for object in beside {
                session.destroy_object(object).map_err(|error| {
                    let why = words(&error);
                    DeviceError::Failed(format!(
                        "the token says that the private key is deleted, and its public key or certificate is not: {why}"
                    ))
                })?;
            }
            Ok(())
        });
        self.pool.forget_handles();
        destroyed
    }

    /// The private key of a slot, and the public keys and certificates of the same key.
    fn with_what_belongs_to_it(&self, session: &Session, slot: &Slot) -> Result<(KeyObject, Vec<ObjectHandle>), Fault> {
        let Some(key) = object::find_key(session, slot)? else { return Err(self.no_key(session)?.into()) };
        let beside = object::beside(session, &key)?;
        Ok((key, beside))
    }

    /// Waits until nobody looks at objects, and has nobody begin.
    fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.objects.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something in a session that may write. The login is the token's, and so this session's, too.
    fn in_writing_session<T>(&self, act: impl FnOnce(&Session) -> Result<T, Fault>) -> Result<T, DeviceError> {
        let session = self.loaded.context.open_rw_session(self.token_slot).map_err(|error| match error {
            Error::Pkcs11(RvError::TokenWriteProtected, _) => DeviceError::unsupported("the token is write-protected"),
            error => device_error(&error),
        })?;
        act(&session).map_err(|fault| match fault {
            Fault::Module(error) => device_error(&error),
            Fault::Ours(error) => error,
        })
    }
}

/// What nothing here can be asked for.
fn check(new: &NewKey) -> Result<(), DeviceError> {
    if new.slot.is_some() {
        return Err(DeviceError::unsupported("a PKCS#11 token has no slots for keys by name"));
    }
    if new.touch.is_some() {
        return Err(DeviceError::unsupported("whether a PKCS#11 token wants a touch is set with its own tools"));
    }
    if new.secret.is_some() {
        return Err(DeviceError::unsupported("a PKCS#11 token makes keys after its user's PIN, and takes no other"));
    }
    Ok(())
}

fn random_id() -> Result<[u8; ID_LEN], DeviceError> {
    let mut id = [0; ID_LEN];
    rand::fill(&mut id).map_err(|_| DeviceError::Failed("the system gives no random numbers".to_owned()))?;
    Ok(id)
}

/// Modules differ in the names that they know of a curve.
fn first_that_knows_the_curve<T>(
    attempts: &[Pair],
    mut attempt: impl FnMut(&Pair) -> Result<T, Error>,
) -> Result<T, Fault> {
    let mut refused = None;
    for pair in attempts {
        match attempt(pair) {
            Err(error) if may_be_about_the_curve(&error) => refused = refused.or(Some(error)),
            result => return Ok(result?),
        }
    }
    Err(refused.map_or_else(|| DeviceError::unsupported("the token makes no such keys").into(), Fault::from))
}

fn may_be_about_the_curve(error: &Error) -> bool {
    matches!(
        error,
        Error::Pkcs11(
            RvError::AttributeValueInvalid
                | RvError::CurveNotSupported
                | RvError::DomainParamsInvalid
                | RvError::FunctionFailed
                | RvError::GeneralError
                | RvError::TemplateInconsistent,
            _
        )
    )
}

/// What an error means where the token may not let anybody do this.
fn not_let(error: &Error, what: &str) -> DeviceError {
    match error {
        Error::Pkcs11(
            RvError::ActionProhibited
            | RvError::AttributeReadOnly
            | RvError::AttributeTypeInvalid
            | RvError::FunctionNotSupported
            | RvError::TokenWriteProtected,
            _,
        ) => DeviceError::Unsupported(format!("the token lets nobody {what}: {}", words(error)).into()),
        error => device_error(error),
    }
}
