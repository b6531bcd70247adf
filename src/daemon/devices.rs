//! From `[[device]]` in the configuration to devices in the vault. The one place that knows all drivers.

use std::sync::Arc;

use tokio::task::JoinSet;
use tracing::error;

use super::cards::Cards;
use crate::{
    config::{DeviceConfig, DriverConfig},
    devices::{
        Device, FoundKey,
        host::{Host, HostEngine, HostSettings},
    },
    reactor::Registry,
    vault::{Vault, key::Constraints, registry::Terms, store::KnownDevice},
};

/// Starts the devices and puts them into the vault, each with the keys that it had when it was last seen. Needs a
/// runtime around it.
pub(super) fn add_all(
    vault: &Arc<Vault>,
    reactor: &Registry,
    cards: &Cards,
    devices: &[DeviceConfig],
    known: &[KnownDevice],
) {
    for config in devices {
        let before = known.iter().find(|known| known.name == config.name && known.kind == config.driver.kind());
        add(vault, reactor, cards, config, before.map_or(&[], |known| &known.keys));
    }
}

/// Brings the vault from one configuration to the next: what is in neither or in both alike stays as it is. Completes when
/// nothing of the drivers that went is left.
pub(super) async fn change(
    vault: &Arc<Vault>,
    reactor: &Registry,
    cards: &Cards,
    from: &[DeviceConfig],
    to: &[DeviceConfig],
) {
    let mut known = Vec::new();
    let mut going = JoinSet::new();
    for old in from.iter().filter(|old| !to.contains(old)) {
        let Some(device) = vault.device(&old.name) else { continue };
        let new = to.iter().find(|new| new.name == old.name);
        // On the same token under other terms, its keys stay listed.
        if new.is_some_and(|new| new.driver == old.driver)
            && let Some(scan) = &device.state().scan
        {
            known.push((&old.name, Arc::clone(scan)));
        }
        let (vault, forget) = (Arc::clone(vault), new.is_none());
        going.spawn(async move { vault.remove_device(&device, forget).await });
    }
    going.join_all().await;
    for new in to.iter().filter(|new| !from.contains(new)) {
        let before = known.iter().find(|(name, _)| **name == new.name);
        add(vault, reactor, cards, new, before.map_or(&[], |(_, scan)| &scan.keys));
    }
    vault.order_devices(&to.iter().map(|config| &*config.name).collect::<Vec<_>>());
}

fn add(vault: &Arc<Vault>, reactor: &Registry, cards: &Cards, config: &DeviceConfig, known: &[FoundKey]) {
    let device = start(reactor, cards, config);
    let constraints = Constraints { confirm: config.confirm, ..Constraints::default() };
    let terms = Terms { constraints, grants: config.grants, token: config.driver.token() };
    vault.set_pin_source(&device, config.pin.clone(), config.pin_lifetime);
    if let Err(why) = vault.add_device(device, terms, known) {
        error!(device = config.name, "it cannot be used: {why}");
    }
}

fn start(reactor: &Registry, cards: &Cards, config: &DeviceConfig) -> Device {
    let _ = cards;
    match &config.driver {
        #[cfg(feature = "openpgp")]
        DriverConfig::OpenPgp { card, pkcs1_decrypt } => {
            cards.start(card, *pkcs1_decrypt, config.settings.clone(), host_settings(config))
        }
        DriverConfig::Pkcs11(own) => hosted(reactor, config, own.encode()),
        #[cfg(feature = "scripted")]
        DriverConfig::Scripted { script } => hosted(reactor, config, std::fs::read(script).unwrap_or_default()),
    }
}

/// A device whose driver runs in a process of its own and reads `own` by its `Hosted::config`.
fn hosted(reactor: &Registry, config: &DeviceConfig, own: Vec<u8>) -> Device {
    let kind = config.driver.kind();
    let host = Host::new(kind, own, host_settings(config));
    let engine = HostEngine { host, reactor: reactor.clone() };
    Device::start(&config.name, kind, config.settings.clone(), engine)
}

fn host_settings(config: &DeviceConfig) -> HostSettings {
    let mut settings = HostSettings::new(&config.name);
    settings.env = config.env.iter().map(|(name, value)| (name.into(), value.into())).collect();
    settings.open_timeout = config.settings.open_timeout;
    settings
}
