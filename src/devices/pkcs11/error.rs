//! What PKCS#11's return values mean for whoever asked. Knows their names.

use cryptoki::{
    context::Function,
    error::{Error, RvError},
};

use crate::devices::DeviceError;

/// What a module's error means to a caller.
pub(super) fn device_error(error: &Error) -> DeviceError {
    match error {
        Error::Pkcs11(value, function) => of_value(*value, *function),
        other => DeviceError::Failed(words(other)),
    }
}

fn of_value(value: RvError, function: Function) -> DeviceError {
    match value {
        RvError::TokenNotPresent | RvError::TokenNotRecognized | RvError::DeviceRemoved | RvError::SlotIdInvalid => {
            DeviceError::Absent
        }
        RvError::UserNotLoggedIn => DeviceError::PinRequired,
        // Whether a try was spent on a PIN of a length that cannot be, no token says: count it as one.
        RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange => DeviceError::PinWrong { left: None },
        RvError::PinLocked => DeviceError::PinBlocked,
        RvError::KeyHandleInvalid | RvError::ObjectHandleInvalid => DeviceError::NoSuchKey,
        RvError::PinExpired => DeviceError::Failed("the PIN has expired; change it with the token's own tools".into()),
        RvError::UserPinNotInitialized => {
            DeviceError::Failed("the token has no user PIN yet; set one with its own tools".into())
        }
        RvError::SessionCount => DeviceError::Failed(
            "all sessions of the token are taken; end other programs that use it, or set fewer `sessions`".into(),
        ),
        RvError::KeyFunctionNotPermitted
        | RvError::KeySizeRange
        | RvError::KeyTypeInconsistent
        | RvError::MechanismInvalid
        | RvError::MechanismParamInvalid
        | RvError::FunctionNotSupported => DeviceError::Unsupported(answered(value, function).into()),
        _ => DeviceError::Failed(answered(value, function)),
    }
}

/// For a person: what failed, by the names that PKCS#11 has for it.
pub(super) fn words(error: &Error) -> String {
    match error {
        Error::Pkcs11(value, function) => answered(*value, *function),
        Error::LibraryLoading(error) => error.to_string(),
        Error::MissingSymbol(name) => format!("it has no {name}, so it is no PKCS#11 module"),
        other => other.to_string(),
    }
}

fn answered(value: RvError, function: Function) -> String {
    format!("C_{function:?} answered {}", name(value))
}

/// `CKR_…`, from the name that it has in Rust.
fn name(value: RvError) -> String {
    match value {
        RvError::VendorDefined(number) | RvError::UnknownErrorCode(number) => format!("{number:#010x}"),
        value => {
            let mut name = "CKR".to_owned();
            for c in format!("{value:?}").chars() {
                if c.is_ascii_uppercase() {
                    name.push('_');
                }
                name.push(c.to_ascii_uppercase());
            }
            name
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_names_of_the_standard() {
        let error = |value| words(&Error::Pkcs11(value, Function::SignInit));
        assert_eq!(error(RvError::KeyHandleInvalid), "C_SignInit answered CKR_KEY_HANDLE_INVALID");
        assert_eq!(error(RvError::SlotIdInvalid), "C_SignInit answered CKR_SLOT_ID_INVALID");
        assert_eq!(error(RvError::VendorDefined(0x8000_0001)), "C_SignInit answered 0x80000001");
    }
}
