//! From `[[device]]` in the configuration to devices in the vault. The one place that knows all drivers.

use std::sync::Arc;

use crate::{
    config::DeviceConfig,
    devices::Device,
    vault::{Vault, key::Constraints, registry::Terms, store::KnownDevice},
};

/// Starts the devices and puts them into the vault, each with the keys that it had when it was last seen. Needs a
/// runtime around it.
pub(super) fn add_all(vault: &Arc<Vault>, devices: &[DeviceConfig], known: &[KnownDevice]) {
    for config in devices {
        let device = start(config);
        let constraints = Constraints { confirm: config.confirm, ..Constraints::default() };
        let terms = Terms { constraints, grants: config.grants };
        let before = known.iter().find(|known| known.name == config.name && known.kind == device.kind());
        vault.set_pin_source(&device, config.pin.clone());
        vault.add_device(device, terms, before.map_or(&[], |known| &known.keys));
    }
}

fn start(config: &DeviceConfig) -> Device {
    match config.driver {
        #[cfg(feature = "scripted")]
        crate::config::DriverConfig::Scripted { ref script } => {
            hosted(config, "scripted", std::fs::read(script).unwrap_or_default())
        }
    }
}

/// A device whose driver runs in a process of its own and reads `own` by its `Hosted::config`.
#[cfg(feature = "scripted")]
fn hosted(config: &DeviceConfig, kind: &'static str, own: Vec<u8>) -> Device {
    use crate::devices::host::{Host, HostSettings};

    let mut settings = HostSettings::new(&config.name);
    settings.env = config.env.iter().map(|(name, value)| (name.into(), value.into())).collect();
    settings.open_timeout = config.settings.open_timeout;
    Device::start(&config.name, kind, config.settings.clone(), Host::new(kind, own, settings))
}
