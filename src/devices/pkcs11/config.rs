//! What a PKCS#11 device is configured with, and how that comes to its process.

use std::{sync::LazyLock, thread};

use super::{Module, TokenUri};
use crate::{
    devices::{DeviceError, host::wire::MAX_LANES},
    rfc4251::{Put, Reader, WireError},
};

/// The most sessions that a device may have: as many as a process has lanes.
pub const MAX_SESSIONS: usize = MAX_LANES;
/// Sessions of a device whose configuration does not say: one more than there are cores, four at most. With more, the threads
/// of a module that computes here wait for each other's locks: four on two cores cost SoftHSM a seventh of its P-256
/// signatures, and three gave more RSA signatures than two.
pub fn default_sessions() -> usize {
    // Counted once: a device that is configured as before is not started anew.
    static SESSIONS: LazyLock<usize> =
        LazyLock::new(|| thread::available_parallelism().map_or(2, |cores| cores.get() + 1).min(4));
    *SESSIONS
}

/// One token of one module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The module.
    pub module: Module,
    /// Which of its tokens: it must match one, and one only.
    pub token: TokenUri,
    /// How many operations are made at once, 1 to [`MAX_SESSIONS`]: fewer when the token allows no more.
    pub sessions: usize,
    /// Whether RSAES-PKCS1-v1_5 is offered. Tokens tell good padding from bad, by their answer or by its time, and who may
    /// ask often enough decrypts and signs with the key by that (Bleichenbacher's attack).
    pub pkcs1_decrypt: bool,
}

impl Config {
    /// For the device's process.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.module.put(&mut out);
        out.put_string(self.token.to_string().as_bytes());
        out.put_u32(u32::try_from(self.sessions).unwrap_or(1));
        out.push(self.pkcs1_decrypt.into());
        out
    }

    /// What [`Config::encode`] wrote.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DeviceError> {
        let nonsense = |why: &dyn std::fmt::Display| DeviceError::Failed(format!("the configuration is none: {why}"));
        let (module, token, sessions, pkcs1_decrypt) = fields(bytes).map_err(|e| nonsense(&e))?;
        let token = std::str::from_utf8(token).map_err(|e| nonsense(&e))?;
        let token = token.parse().map_err(|e: super::UriError| nonsense(&e))?;
        let sessions = usize::try_from(sessions).unwrap_or(1).clamp(1, MAX_SESSIONS);
        Ok(Self { module, token, sessions, pkcs1_decrypt })
    }
}

fn fields(bytes: &[u8]) -> Result<(Module, &[u8], u32, bool), WireError> {
    let mut r = Reader::new(bytes);
    let fields = (Module::read(&mut r)?, r.string()?, r.u32()?, r.bool()?);
    r.finish()?;
    Ok(fields)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_comes_to_the_process_as_it_was() {
        for init_args in [None, Some(String::new()), Some("configdir='sql:/x'".to_owned())] {
            let config = Config {
                module: Module { path: "/usr/lib/x.so".into(), init_args },
                token: "pkcs11:token=a%20b;slot-id=3".parse().unwrap(),
                sessions: 7,
                pkcs1_decrypt: true,
            };
            assert_eq!(Config::decode(&config.encode()).unwrap(), config);
        }
        assert!(Config::decode(&[0, 0, 0, 1]).is_err());
    }
}
