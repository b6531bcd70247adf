//! PKCS#11 tokens of several modules, each in a directory of its own and behind a process of its own.

use std::{ffi::OsString, fs, path::PathBuf, time::Duration};

use strongroom::{
    devices::{
        Algorithm, Device, Driver, NewKey, Settings,
        host::{Host, HostSettings},
        pkcs11::{Config, Module, Pkcs11},
    },
    public_key::Curve,
};
use tempfile::TempDir;

use crate::{
    subject::{HasPin, MakesKeys, Subject},
    support::{
        command, library,
        reactor::engine,
        run,
        softhsm::{self, SoftHsm},
        tpm::{self, Tpm},
    },
};

const STRONGROOM: &str = env!("CARGO_BIN_EXE_strongroom");

pub(crate) fn device<V: Into<OsString>>(
    config: &Config,
    program: impl Into<PathBuf>,
    variables: impl IntoIterator<Item = (&'static str, V)>,
    settings: Settings,
) -> Device {
    let env = variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    let host = HostSettings { env, program: program.into(), ..HostSettings::new("token") };
    Device::start("token", Pkcs11::KIND, settings, engine(Host::new(Pkcs11::KIND, config.encode(), host)))
}

pub(crate) fn config(module: Module, token: &str) -> Config {
    Config { module, token: token.parse().unwrap(), sessions: 4, pkcs1_decrypt: false }
}

/// Waits until the token is logged in to and all its keys have been found.
pub(crate) async fn unlock(subject: &impl Subject, pin: &str) {
    subject.ready().await;
    subject.device().unlock(pin.into()).await.unwrap();
    subject.becomes("all keys found", |state| state.scan.as_ref().is_some_and(|scan| scan.complete)).await;
}

fn hsm_device(hsm: &SoftHsm, settings: Settings) -> Device {
    let config = config(Module::new(softhsm::MODULE), "pkcs11:token=token");
    device(&config, STRONGROOM, [("SOFTHSM2_CONF", hsm.conf())], settings)
}

/// SoftHSM.
pub(crate) struct Soft {
    _hsm: SoftHsm,
    device: Device,
}

impl Subject for Soft {
    /// Eight of RSA, three of ECDSA, Ed25519.
    const SCHEMES: usize = 12;

    async fn start(settings: Settings) -> Self {
        let hsm = SoftHsm::with_token("token");
        for (id, name, args) in [
            ("01", "p256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"][..]),
            ("02", "p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"]),
            ("03", "p521", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"]),
            ("04", "rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]),
        ] {
            hsm.import("token", &hsm.openssl_key(name, args), id, name);
        }
        hsm.generate("token", "EC:edwards25519", "05", "ed25519", &[]);
        let subject = Self { device: hsm_device(&hsm, settings), _hsm: hsm };
        unlock(&subject, softhsm::PIN).await;
        subject
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl HasPin for Soft {
    const PIN: &'static str = softhsm::PIN;
    const WRONG: &'static str = "222222";
    /// It never blocks.
    const TRIES: u8 = u8::MAX;

    /// Without keys.
    async fn start_locked(settings: Settings) -> Self {
        let hsm = SoftHsm::with_token("token");
        let subject = Self { device: hsm_device(&hsm, settings), _hsm: hsm };
        subject.ready().await;
        subject
    }
}

impl MakesKeys for Soft {
    fn new_keys() -> Vec<NewKey> {
        let curves = [Curve::P256, Curve::P384, Curve::P521].map(Algorithm::Ecdsa);
        let others = [Algorithm::Ed25519, Algorithm::X25519, Algorithm::Rsa(2048)];
        let algorithms = curves.into_iter().chain(others);
        algorithms.map(|algorithm| NewKey::new(format!("new {algorithm}"), algorithm)).collect()
    }
}

/// NSS's softokn, with keys and certificates from its own tools.
pub(crate) struct Nss {
    _dir: TempDir,
    device: Device,
}

impl Subject for Nss {
    /// Eight of RSA and three of ECDSA.
    const SCHEMES: usize = 11;

    async fn start(settings: Settings) -> Self {
        let dir = TempDir::with_prefix("strongroom-nss-").unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let database = format!("sql:{}", dir.path().display());
        fs::write(path("pin"), softhsm::PIN).unwrap();
        fs::write(path("noise"), [7; 64]).unwrap();
        let certutil = |args: &[&str]| {
            run(command("certutil", dir.path()).args(args).args(["-d", &database, "-f", &path("pin")])).ok();
        };
        certutil(&["-N"]);
        for (name, key) in [
            ("rsa", &["-k", "rsa", "-g", "2048"][..]),
            ("one", &["-k", "ec", "-q", "nistp256"]),
            ("two", &["-k", "ec", "-q", "nistp256"]),
            ("p384", &["-k", "ec", "-q", "nistp384"]),
        ] {
            let subject = format!("CN={name}");
            certutil(
                &[&["-S", "-x", "-n", name, "-s", &subject, "-t", "u,u,u", "-z", &path("noise")][..], key].concat(),
            );
        }
        let module = Module { path: library("libsoftokn3.so"), init_args: Some(format!("configdir='{database}'")) };
        let device = device(
            &config(module, "pkcs11:token=NSS%20Certificate%20DB"),
            STRONGROOM,
            [("HOME", dir.path())],
            patient(settings),
        );
        let subject = Self { _dir: dir, device };
        unlock(&subject, softhsm::PIN).await;
        subject
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

/// tpm2-pkcs11 on a TPM in software.
pub(crate) struct OnTpm {
    device: Device,
    _tpm: Tpm,
}

impl Subject for OnTpm {
    /// Five of RSA, since the module lists no PSS, and three of ECDSA.
    const SCHEMES: usize = 8;

    async fn start(settings: Settings) -> Self {
        let tpm = Tpm::start();
        for (id, key_type) in [("01", "EC:prime256v1"), ("02", "EC:prime256v1"), ("03", "rsa:2048")] {
            tpm.generate(key_type, id, id);
        }
        let config = config(Module::new(Tpm::module()), "pkcs11:token=tpm");
        let subject = Self { device: device(&config, STRONGROOM, tpm.variables(), patient(settings)), _tpm: tpm };
        unlock(&subject, tpm::PIN).await;
        subject
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

/// Hundreds of signatures in a queue take these tokens longer than a request usually waits.
pub(crate) fn patient(settings: Settings) -> Settings {
    Settings { timeout: Duration::from_secs(60), ..settings }
}
