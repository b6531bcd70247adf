//! PKCS#11 tokens: HSMs, smart cards and tokens in software, through their makers' modules (PKCS#11 3.1). Knows modules,
//! tokens and their keys; its foreign code runs only in child processes.

mod config;
mod der;
mod driver;
mod error;
mod life;
mod mechanism;
mod module;
mod object;
mod operate;
mod public;
mod session;
mod template;
mod token;
mod uri;

use crate::devices::{
    DeviceError,
    host::{Host, HostSettings, child::Question},
};

pub use config::{Config, MAX_SESSIONS, default_sessions};
pub use driver::Pkcs11;
pub use module::{MAX_INIT_ARGS, Module};
pub(crate) use token::Tokens;
pub use token::{BadSlot, MAX_TOKENS, Token};
pub use uri::{TokenUri, UriError};

/// The tokens of a module. It is loaded in a process of its own, which has `settings.env` and ends within
/// `settings.open_timeout`.
///
/// A slot whose token cannot be told is one bad entry among good ones. [`Failed`](DeviceError::Failed) with the reason
/// when the module cannot be loaded or dies, [`Timeout`](DeviceError::Timeout) when it hangs. No PIN is sent.
pub async fn tokens(module: &Module, settings: HostSettings) -> Result<Vec<Result<Token, BadSlot>>, DeviceError> {
    let mut question = Vec::new();
    module.put(&mut question);
    let answer = Host::new(Tokens::KIND, question, settings).ask().await?;
    token::decode(&answer).map_err(|e| DeviceError::Failed(format!("the module's process sent nonsense: {e}")))
}
