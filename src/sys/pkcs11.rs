//! What PKCS#11 modules need and `cryptoki` has no safe call for.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::path::Path;
use std::ptr::{NonNull, null_mut};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error, Rv};
use cryptoki::session::Session;
use cryptoki_sys::{CK_BYTE_PTR, CK_FUNCTION_LIST, CK_RV, CK_SESSION_HANDLE, CK_ULONG, CK_ULONG_PTR};
use zeroize::Zeroizing;

/// Calls `C_Initialize` (PKCS#11 3.1, 5.4.1): the module may lock with what the system has, and reads `arguments` where
/// it takes any. They are no part of the standard, which wants a null pointer there; NSS takes a text.
pub fn initialize(context: &Pkcs11, arguments: Option<&CStr>) -> Result<(), Error> {
    let flags = CInitializeFlags::OS_LOCKING_OK;
    let Some(arguments) = arguments else { return context.initialize(CInitializeArgs::new(flags)) };
    let pointer: *const c_void = arguments.as_ptr().cast();
    let arguments = NonNull::new(pointer.cast_mut()).map_or(CInitializeArgs::new(flags), |reserved| {
        // SAFETY: the module gets a pointer to a text that ends with a zero byte and lives until `C_Initialize` has
        // returned. Whether that is what it reads is for whoever configured the arguments to know, as with everything
        // else that a module does in this process.
        unsafe { CInitializeArgs::new_with_reserved(flags, reserved) }
    });
    context.initialize(arguments)
}

/// The second halves of operations in one part, which a login of their own comes before (PKCS#11 3.1, 4.9,
/// CKA_ALWAYS_AUTHENTICATE): `cryptoki` makes both halves in one call, and leaves no place between them.
pub struct SinglePart {
    list: CK_FUNCTION_LIST,
    /// Keeps the functions where they are.
    _library: cryptoki_sys::Pkcs11,
}

/// `C_Sign` and `C_Decrypt` have this form.
type Finish = unsafe extern "C" fn(CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) -> CK_RV;

impl SinglePart {
    /// The functions of a module that this process has loaded and initialised.
    pub fn of(module: &Path) -> Result<Self, Error> {
        // SAFETY: the library is loaded already, so that no code of it runs now; the process trusts it with everything.
        let library = unsafe { cryptoki_sys::Pkcs11::new(module) }.map_err(Error::LibraryLoading)?;
        let mut list = null_mut();
        let get = *library.C_GetFunctionList.as_ref().map_err(|_| Error::MissingSymbol("C_GetFunctionList"))?;
        // SAFETY: the function writes a pointer to where it is told.
        Rv::from(unsafe { get(&raw mut list) }).into_result(Function::GetFunctionList)?;
        let list = NonNull::new(list).ok_or(Error::NullFunctionPointer)?;
        // SAFETY: a module's list lives as long as the module, and does not change. It may stand at any address.
        let list = unsafe { list.as_ptr().read_unaligned() };
        Ok(Self { list, _library: library })
    }

    /// `C_Sign`: the signature over `data`, at most `max` bytes, of the operation that `session` has begun.
    pub fn sign(&self, session: &Session, data: &[u8], max: usize) -> Result<Vec<u8>, Error> {
        let mut out = vec![0; max];
        let len = finish(self.list.C_Sign, Function::Sign, session, data, &mut out)?;
        out.truncate(len);
        Ok(out)
    }

    /// `C_Decrypt`: the plaintext, at most `max` bytes, of the operation that `session` has begun.
    pub fn decrypt(&self, session: &Session, data: &[u8], max: usize) -> Result<Zeroizing<Vec<u8>>, Error> {
        let mut out = Zeroizing::new(vec![0; max]);
        let len = finish(self.list.C_Decrypt, Function::Decrypt, session, data, &mut out)?;
        out.truncate(len);
        Ok(out)
    }
}

fn finish(
    call: Option<Finish>,
    function: Function,
    session: &Session,
    data: &[u8],
    out: &mut [u8],
) -> Result<usize, Error> {
    let call = call.ok_or(Error::NullFunctionPointer)?;
    let mut len = CK_ULONG::try_from(out.len())?;
    let data_len = CK_ULONG::try_from(data.len())?;
    // SAFETY: the module reads `data_len` bytes of the one buffer, does not write there, and writes at most `len` bytes into
    // the other.
    let value = unsafe { call(session.handle(), data.as_ptr().cast_mut(), data_len, out.as_mut_ptr(), &raw mut len) };
    Rv::from(value).into_result(function)?;
    usize::try_from(len).map_err(Error::TryFromInt)
}
