//! `[[device]]` in the configuration file. Knows which settings go with which driver; opens no device.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Deserializer, de::Error as _};
use toml::Spanned;

use super::{Fault, MAX_LIST, System, checked, parse_time};
use crate::{
    devices::{self, MAX_LABEL},
    vault::{key::Grants, pins::PinSource},
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
    /// A device that does what a script says, for tests.
    #[cfg(feature = "scripted")]
    Scripted {
        /// The script's file.
        script: std::path::PathBuf,
    },
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
    open_timeout: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    grace: Option<Duration>,
    #[serde(default, deserialize_with = "timeout")]
    probe: Option<Duration>,
    #[serde(default, deserialize_with = "queue")]
    queue: Option<usize>,
    pin: Option<Spanned<PinForm>>,
    #[serde(default)]
    confirm: bool,
    operations: Option<Vec<OperationForm>>,
    #[serde(default)]
    env: BTreeMap<String, String>,
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
enum OperationForm {
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
        open_timeout: form.open_timeout.unwrap_or(defaults.open_timeout),
        grace: form.grace.unwrap_or(defaults.grace),
        probe: form.probe.unwrap_or(defaults.probe),
    };
    let pin = form.pin.as_ref().map(|pin| checked(pin, |pin| pin_source(pin, system))).transpose()?;
    let grants = form.operations.as_ref().map_or(Grants::ALL, |operations| grants(operations));
    let driver = driver(&form, system)?;
    Ok(DeviceConfig {
        name,
        driver,
        settings,
        pin: pin.unwrap_or_default(),
        confirm: form.confirm,
        grants,
        env: form.env,
    })
}

/// The driver's own settings; those of other drivers are errors.
fn driver(form: &DeviceForm, system: &System) -> Result<DriverConfig, Fault> {
    let _ = system;
    #[cfg(feature = "scripted")]
    if form.driver.as_ref() == "scripted" {
        let Some(script) = &form.script else {
            return Err(Fault::new(form.driver.span(), "the driver `scripted` needs a `script`"));
        };
        let script = checked(script, |path| system.expand(path))?;
        return Ok(DriverConfig::Scripted { script });
    }
    let _ = &form.script;
    Err(Fault::new(form.driver.span(), format!("this version has no driver `{}`", form.driver.as_ref())))
}

fn device_name(name: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
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

fn grants(operations: &[OperationForm]) -> Grants {
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

fn queue<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let length = usize::deserialize(from)?;
    if (1..=65_536).contains(&length) {
        return Ok(Some(length));
    }
    Err(D::Error::custom("a queue holds 1 to 65536 calls"))
}
