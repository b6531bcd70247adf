//! A PKCS#11 module: which library it is, and how it is loaded. Foreign code runs from here on, so only a child process
//! loads one.

use std::{
    ffi::{CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use cryptoki::context::{Info, Pkcs11};

use super::error::{device_error, words};
use crate::{
    devices::DeviceError,
    rfc4251::{Put, Reader, WireError},
    sys::pkcs11::initialize,
};

/// The longest arguments of a module, in bytes.
pub const MAX_INIT_ARGS: usize = 4096;

/// Which library, and what it is told when it is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The shared library.
    pub path: PathBuf,
    /// What `C_Initialize` gets besides, for the few modules that take something: NSS's
    /// `configdir='sql:/path' flags=readOnly`. Without zero bytes, at most [`MAX_INIT_ARGS`] bytes.
    pub init_args: Option<String>,
}

impl Module {
    /// A module that takes no arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), init_args: None }
    }

    pub(super) fn put(&self, out: &mut Vec<u8>) {
        out.put_string(self.path.as_os_str().as_bytes());
        out.push(self.init_args.is_some().into());
        out.put_string(self.init_args.as_deref().unwrap_or_default().as_bytes());
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let path = Path::new(OsStr::from_bytes(r.string()?)).to_owned();
        let given = r.bool()?;
        let args = std::str::from_utf8(r.string()?).map_err(|_| WireError::NotText)?;
        Ok(Self { path, init_args: given.then(|| args.to_owned()) })
    }

    /// Loads the library and initialises it. It stays in the process until the end: unloading foreign code is a risk
    /// that nobody needs to take.
    pub(super) fn load(&self) -> Result<Loaded, DeviceError> {
        let failed = |why: String| {
            DeviceError::Failed(format!("the PKCS#11 module {} cannot be loaded: {why}", self.path.display()))
        };
        let arguments = self.init_args.as_deref().map(CString::new).transpose();
        let arguments = arguments.map_err(|_| failed("its arguments contain a zero byte".into()))?;
        let context = Pkcs11::new(&self.path).map_err(|e| failed(words(&e)))?;
        initialize(&context, arguments.as_deref()).map_err(|e| failed(words(&e)))?;
        // Not every module says what it is.
        let info = context.get_library_info().ok();
        Ok(Loaded { context, info })
    }
}

/// A module in this process.
pub(super) struct Loaded {
    pub(super) context: Pkcs11,
    pub(super) info: Option<Info>,
}

impl Loaded {
    /// Its slots, those without a token included.
    pub(super) fn slots(&self) -> Result<Vec<cryptoki::slot::Slot>, DeviceError> {
        self.context.get_all_slots().map_err(|e| device_error(&e))
    }
}
