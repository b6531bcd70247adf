//! `[[device]]` in the configuration file. Knows which settings go with which driver; opens no device.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Spanned;

use super::{Fault, MAX_LIST, System, checked, parse_time};
use crate::{
    devices::{
        self, Driver, MAX_LABEL,
        pkcs11::{self, TokenUri},
    },
    vault::{MEMORY, STORE, key::Grants, pins::PinSource},
};

/// One device that the vault holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Unique among the devices: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Which driver opens it, and with what.
    pub driver: DriverConfig,
    /// Its bounds.
    pub settings: devices::Settings,
    /// Where its PIN comes from.
    pub pin: PinSource,
    /// How long an accepted PIN is kept; `None`: until the token goes or somebody locks it or the vault.
    pub pin_lifetime: Option<Duration>,
    /// Whether each use of its keys is confirmed by a person.
    pub confirm: bool,
    /// What its keys do beyond plain signatures.
    pub grants: Grants,
    /// What its process has in its environment besides.
    pub env: BTreeMap<String, String>,
}

/// A driver and its own settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriverConfig {
    /// An OpenPGP card.
    #[cfg(feature = "openpgp")]
    OpenPgp {
        /// Its manufacturer and serial: `0006:12345678`.
        card: String,
        /// Whether its RSA key decrypts PKCS#1 v1.5.
        pkcs1_decrypt: bool,
    },
    /// A PKCS#11 token.
    Pkcs11(pkcs11::Config),
    /// A device that does what a script says, for tests.
    #[cfg(feature = "scripted")]
    Scripted {
        /// The script's file.
        script: std::path::PathBuf,
    },
}

impl DriverConfig {
    /// The driver's [`KIND`](crate::devices::Driver::KIND).
    pub fn kind(&self) -> &'static str {
        match self {
            #[cfg(feature = "openpgp")]
            Self::OpenPgp { .. } => "openpgp",
            Self::Pkcs11(_) => pkcs11::Pkcs11::KIND,
            #[cfg(feature = "scripted")]
            Self::Scripted { .. } => "scripted",
        }
    }

    /// The module that `ssh-add -s` would name for it, and the token.
    pub fn token(&self) -> Option<(PathBuf, TokenUri)> {
        match self {
            #[cfg(feature = "openpgp")]
            Self::OpenPgp { .. } => None,
            Self::Pkcs11(config) => Some((config.module.path.clone(), config.token.clone())),
            #[cfg(feature = "scripted")]
            Self::Scripted { .. } => None,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeviceForm {
    name: Spanned<String>,
    driver: Spanned<String>,
    #[serde(default, deserialize_with = "timeout")]
    timeout: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    touch_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    generate_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    open_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    grace: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    probe: Option<Duration>,
    #[serde(default, deserialize_with = "queue")]
    queue: Option<usize>,
    #[serde(default)]
    wait: bool,
    pin: Option<Spanned<PinForm>>,
    #[serde(default, deserialize_with = "pin_lifetime")]
    pin_lifetime: Option<Duration>,
    #[serde(default)]
    confirm: bool,
    operations: Option<Vec<OperationForm>>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    card: Option<Spanned<String>>,
    module: Option<Spanned<String>>,
    init_args: Option<Spanned<String>>,
    token: Option<Spanned<String>>,
    sessions: Option<Spanned<usize>>,
    pkcs1_decrypt: Option<Spanned<bool>>,
    script: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PinForm {
    prompt: Option<bool>,
    file: Option<String>,
    credential: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum OperationForm {
    Sign,
    Decrypt,
    Derive,
}

pub(super) fn devices(forms: Vec<Spanned<DeviceForm>>, system: &System) -> Result<Vec<DeviceConfig>, Fault> {
    let mut devices: Vec<DeviceConfig> = Vec::with_capacity(forms.len());
    for form in forms {
        let span = form.span();
        let device = device(form.into_inner(), system)?;
        if devices.len() == MAX_LIST {
            return Err(Fault::new(span, format!("more than {MAX_LIST} devices")));
        }
        if devices.iter().any(|other| other.name == device.name) {
            return Err(Fault::new(span, format!("`{}` is another device's name already", device.name)));
        }
        devices.push(device);
    }
    Ok(devices)
}

fn device(form: DeviceForm, system: &System) -> Result<DeviceConfig, Fault> {
    let name = checked(&form.name, |name| device_name(name))?;
    let defaults = devices::Settings::default();
    let settings = devices::Settings {
        queue: form.queue.unwrap_or(defaults.queue),
        timeout: form.timeout.unwrap_or(defaults.timeout),
        touch_timeout: form.touch_timeout.unwrap_or(defaults.touch_timeout),
        generate_timeout: form.generate_timeout.unwrap_or(defaults.generate_timeout),
        open_timeout: form.open_timeout.unwrap_or(defaults.open_timeout),
        grace: form.grace.unwrap_or(defaults.grace),
        probe: form.probe.unwrap_or(defaults.probe),
        wait: form.wait,
    };
    let pin = form.pin.as_ref().map(|pin| checked(pin, |pin| pin_source(pin, system))).transpose()?;
    let grants = form.operations.as_ref().map_or(Grants::ALL, |operations| grants(operations));
    let driver = driver(&form, system)?;
    Ok(DeviceConfig {
        name,
        driver,
        settings,
        pin: pin.unwrap_or_default(),
        pin_lifetime: form.pin_lifetime,
        confirm: form.confirm,
        grants,
        env: form.env,
    })
}

/// The driver's own settings; those of other drivers are errors.
fn driver(form: &DeviceForm, system: &System) -> Result<DriverConfig, Fault> {
    match form.driver.as_ref().as_str() {
        "pkcs11" => {
            refuse(form, &["module", "init_args", "token", "sessions", "pkcs1_decrypt"])?;
            pkcs11(form, system).map(DriverConfig::Pkcs11)
        }
        #[cfg(feature = "openpgp")]
        "openpgp" => {
            let Some(card) = &form.card else {
                let why = "the driver `openpgp` needs a `card`, as in \"0006:12345678\"";
                return Err(Fault::new(form.driver.span(), why));
            };
            refuse(form, &["card", "pkcs1_decrypt"])?;
            Ok(DriverConfig::OpenPgp { card: checked(card, |card| ident(card))?, pkcs1_decrypt: pkcs1_decrypt(form) })
        }
        #[cfg(feature = "scripted")]
        "scripted" => {
            let script = needed(form, "script", form.script.as_ref())?;
            refuse(form, &["script"])?;
            Ok(DriverConfig::Scripted { script: checked(script, |path| system.expand(path))? })
        }
        other => Err(Fault::new(form.driver.span(), format!("this version has no driver `{other}`"))),
    }
}

fn pkcs1_decrypt(form: &DeviceForm) -> bool {
    form.pkcs1_decrypt.as_ref().is_some_and(|wanted| *wanted.as_ref())
}

fn needed<'a, T>(form: &DeviceForm, name: &str, setting: Option<&'a Spanned<T>>) -> Result<&'a Spanned<T>, Fault> {
    setting.ok_or_else(|| {
        Fault::new(form.driver.span(), format!("the driver `{}` needs a `{name}`", form.driver.as_ref()))
    })
}

fn pkcs11(form: &DeviceForm, system: &System) -> Result<pkcs11::Config, Fault> {
    let path = checked(needed(form, "module", form.module.as_ref())?, |path| system.expand(path))?;
    let init_args = form.init_args.as_ref().map(|args| checked(args, |args| module_arguments(args))).transpose()?;
    let token = checked(needed(form, "token", form.token.as_ref())?, |uri| {
        uri.parse::<pkcs11::TokenUri>().map_err(|e| e.to_string())
    })?;
    let sessions = form.sessions.as_ref().map(|sessions| checked(sessions, |n| session_count(*n))).transpose()?;
    Ok(pkcs11::Config {
        module: pkcs11::Module { path, init_args },
        token,
        sessions: sessions.unwrap_or_else(pkcs11::default_sessions),
        pkcs1_decrypt: pkcs1_decrypt(form),
    })
}

fn module_arguments(args: &str) -> Result<String, String> {
    match args.len() {
        0..=pkcs11::MAX_INIT_ARGS if !args.contains('\0') => Ok(args.to_owned()),
        _ => Err(format!("a module's arguments have at most {} bytes, none of them zero", pkcs11::MAX_INIT_ARGS)),
    }
}

fn session_count(count: usize) -> Result<usize, String> {
    match count {
        1..=pkcs11::MAX_SESSIONS => Ok(count),
        _ => Err(format!("a token has 1 to {} sessions", pkcs11::MAX_SESSIONS)),
    }
}

/// Refuses settings that belong to other drivers than the one whose settings these are.
fn refuse(form: &DeviceForm, own: &[&str]) -> Result<(), Fault> {
    let all = [
        ("card", form.card.as_ref().map(Spanned::span)),
        ("module", form.module.as_ref().map(Spanned::span)),
        ("init_args", form.init_args.as_ref().map(Spanned::span)),
        ("token", form.token.as_ref().map(Spanned::span)),
        ("sessions", form.sessions.as_ref().map(Spanned::span)),
        ("pkcs1_decrypt", form.pkcs1_decrypt.as_ref().map(Spanned::span)),
        ("script", form.script.as_ref().map(Spanned::span)),
    ];
    match all.into_iter().find_map(|(name, span)| span.filter(|_| !own.contains(&name)).map(|span| (name, span))) {
        Some((name, span)) => {
            Err(Fault::new(span, format!("the driver `{}` has no setting `{name}`", form.driver.as_ref())))
        }
        None => Ok(()),
    }
}

/// A card's manufacturer and serial.
#[cfg(feature = "openpgp")]
fn ident(text: &str) -> Result<String, String> {
    let ident = text.to_ascii_uppercase();
    if devices::openpgp::is_ident(&ident) {
        return Ok(ident);
    }
    Err(format!("`{}` is no card: manufacturer and serial name one, as in \"0006:12345678\"", text.escape_debug()))
}

/// Places of keys that are no devices.
const RESERVED: [&str; 3] = [MEMORY, STORE, "fido"];

fn device_name(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if RESERVED.contains(&name) {
        return Err(format!("`{name}` is no name of a device: it is where keys are that are on none"));
    }
    if !name.is_empty() && name.len() <= MAX_LABEL && name.chars().all(plain) && !name.starts_with('-') {
        return Ok(name.to_owned());
    }
    Err(format!("`{}` is no name of a device: letters, digits, `-`, `_` and `.` make one", name.escape_debug()))
}

fn pin_source(form: &PinForm, system: &System) -> Result<PinSource, String> {
    match form {
        PinForm { prompt: Some(true), file: None, credential: None } => Ok(PinSource::Prompt),
        PinForm { prompt: None, file: Some(path), credential: None } => Ok(PinSource::File(system.expand(path)?)),
        PinForm { prompt: None, file: None, credential: Some(name) } => match name.contains(['/', '\0']) {
            false if !name.is_empty() => Ok(PinSource::Credential(name.clone())),
            _ => Err(format!("`{}` is no name of a credential", name.escape_debug())),
        },
        _ => Err("a pin is one of { prompt = true }, { file = \"/path\" } and { credential = \"name\" }".to_owned()),
    }
}

pub(super) fn grants(operations: &[OperationForm]) -> Grants {
    let mut grants = Grants::NONE;
    for operation in operations {
        match operation {
            OperationForm::Sign => grants.sign = true,
            OperationForm::Decrypt => grants.decrypt = true,
            OperationForm::Derive => grants.derive = true,
        }
    }
    grants
}

/// A time as in the rest of the file, or in milliseconds: `250ms`.
fn timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let millis = text.strip_suffix("ms").and_then(|number| number.parse().ok()).map(Duration::from_millis);
    let time = millis.or_else(|| parse_time(&text));
    match time {
        Some(time) if (Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&time) => Ok(Some(time)),
        Some(_) => Err(D::Error::custom("a device's times go from \"10ms\" to \"1h\"")),
        None => Err(D::Error::custom(format!("`{text}` is not a time, as in \"250ms\", \"5s\" or \"1m\""))),
    }
}

/// A time as in the rest of the file, up to a month.
fn pin_lifetime<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    match parse_time(&text) {
        Some(time) if (1..=31 * 24 * 3600).contains(&time.as_secs()) => Ok(Some(time)),
        _ => Err(D::Error::custom(format!("`{text}` is no time to keep a PIN: \"1s\" to \"31d\""))),
    }
}

fn queue<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let length = usize::deserialize(from)?;
    if (1..=65_536).contains(&length) {
        return Ok(Some(length));
    }
    Err(D::Error::custom("a queue holds 1 to 65536 calls"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    const TOKEN: &str = "[[device]]\nname = \"hsm\"\ndriver = \"pkcs11\"\n";

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, &System::default()).map_err(|fault| fault.at(Path::new("c.toml"), text).to_string())
    }

    #[test]
    fn a_token_takes_every_setting() {
        let config = parse(&format!(
            "{TOKEN}module = \"/usr/lib/x.so\"\ninit_args = \"configdir='sql:/x'\"\ntoken = \"pkcs11:token=My%20vault\"\n\
             sessions = 8\npkcs1_decrypt = true\ntimeout = \"3s\"\nenv = {{ SOFTHSM2_CONF = \"/x\" }}\n"
        ));
        let config = config.unwrap();
        let [device] = &config.devices[..] else { panic!("{:?}", config.devices) };
        let expected = pkcs11::Config {
            module: pkcs11::Module { path: "/usr/lib/x.so".into(), init_args: Some("configdir='sql:/x'".into()) },
            token: "pkcs11:token=My%20vault".parse().unwrap(),
            sessions: 8,
            pkcs1_decrypt: true,
        };
        assert_eq!(device.driver, DriverConfig::Pkcs11(expected));
        assert_eq!(device.settings.timeout, Duration::from_secs(3));
    }

    #[test]
    fn a_token_without_settings_has_few_sessions_and_is_no_oracle() {
        let config = parse(&format!("{TOKEN}module = \"/usr/lib/x.so\"\ntoken = \"pkcs11:token=a\"\n")).unwrap();
        let DriverConfig::Pkcs11(own) = &config.devices[0].driver else { panic!("another driver") };
        assert!((2..=4).contains(&own.sessions) && !own.pkcs1_decrypt);
    }

    #[test]
    fn a_bad_setting_is_refused_where_it_stands() {
        let cases = [
            ("", "c.toml:3: the driver `pkcs11` needs a `module`"),
            ("module = \"/x.so\"", "c.toml:3: the driver `pkcs11` needs a `token`"),
            ("module = \"x.so\"\ntoken = \"pkcs11:\"", "c.toml:4: `x.so` must begin with `/`"),
            ("module = \"/x.so\"\ntoken = \"hsm\"", "c.toml:5: a token is named by a PKCS#11 URI"),
            ("module = \"/x.so\"\ntoken = \"pkcs11:id=1\"", "c.toml:5: `id` names a key"),
            ("module = \"/x.so\"\ntoken = \"pkcs11:\"\nsessions = 0", "c.toml:6: a token has 1 to 64 sessions"),
            ("module = \"/x.so\"\ntoken = \"pkcs11:\"\nsessions = 65", "c.toml:6: a token has 1 to 64 sessions"),
            ("module = \"/x.so\"\ntoken = \"pkcs11:\"\ninit_args = \"a\\u0000\"", "c.toml:6: a module's arguments"),
            (
                "module = \"/x.so\"\ntoken = \"pkcs11:\"\nscript = \"/s\"",
                "c.toml:6: the driver `pkcs11` has no setting `script`",
            ),
        ];
        for (text, expected) in cases {
            let error = parse(&format!("{TOKEN}{text}\n")).unwrap_err();
            assert!(error.starts_with(expected), "{text:?} gave {error:?}");
        }
        let error = parse("[[device]]\nname = \"x\"\ndriver = \"abacus\"\n").unwrap_err();
        assert!(error.starts_with("c.toml:3: this version has no driver `abacus`"), "{error}");
    }
}
