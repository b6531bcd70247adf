//! PKCS#11 modules and the tokens in them, for people: where modules usually are, and what each says of its tokens.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{runtime, task::JoinSet};

use super::super::{CliError, output::table};
use crate::{
    config::{DeviceConfig, DriverConfig},
    devices::{
        DeviceError,
        host::HostSettings,
        pkcs11::{self, BadSlot, Module, Token, TokenUri},
    },
    prompt::harmless,
};

/// Where vendors put their modules.
const DIRECTORIES: [&str; 9] = [
    "/usr/lib",
    "/usr/lib/softhsm",
    "/usr/lib/pkcs11",
    "/usr/lib64",
    "/usr/lib64/pkcs11",
    "/usr/local/lib",
    "/usr/local/lib/softhsm",
    "/opt/cloudhsm/lib",
    "/opt/nfast/toolkits/pkcs11",
];
/// What they call them.
const NAMES: [&str; 8] = [
    "libsofthsm2.so",
    "opensc-pkcs11.so",
    "libykcs11.so",
    "yubihsm_pkcs11.so",
    "libtpm2_pkcs11.so.1",
    "libcloudhsm_pkcs11.so",
    "libcknfast.so",
    "libopencryptoki.so",
];
/// Where p11-kit is told of modules (pkcs11.conf(5)).
const REGISTERED: [&str; 2] = ["/usr/share/p11-kit/modules", "/etc/pkcs11/modules"];

/// What one module said.
pub(super) struct Answer {
    pub(super) module: PathBuf,
    pub(super) tokens: Result<Vec<Result<Token, BadSlot>>, DeviceError>,
}

/// The modules that are installed where modules usually are, or that p11-kit knows. Each once, by its real path.
pub(super) fn installed() -> Vec<PathBuf> {
    let mut directories: Vec<PathBuf> = DIRECTORIES.map(PathBuf::from).into();
    // Debian has its libraries in a directory for each architecture.
    for entry in fs::read_dir("/usr/lib").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains("-linux-") {
            directories.extend(["", "pkcs11", "softhsm"].map(|below| entry.path().join(below)));
        }
    }
    let mut names: Vec<String> = NAMES.map(str::to_owned).into();
    let home = env::home_dir().map(|home| home.join(".config/pkcs11/modules"));
    for directory in REGISTERED.iter().map(PathBuf::from).chain(home) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            names.extend(fs::read_to_string(entry.path()).ok().and_then(|text| registered(&text)));
        }
    }
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for name in &names {
        // An absolute name stands for itself in any directory.
        let paths = directories.iter().map(|directory| directory.join(name));
        for path in paths.filter(|path| path.is_file()) {
            if let Ok(real) = fs::canonicalize(&path)
                && seen.insert(real)
            {
                found.push(path);
            }
        }
    }
    found
}

/// The module that a file of p11-kit's names; `None` for one with certificates only.
fn registered(text: &str) -> Option<String> {
    let setting = |name: &str| {
        let mut settings = text.lines().filter_map(|line| line.split_once(':'));
        settings.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    if setting("trust-policy").as_deref() == Some("yes") { None } else { setting("module") }
}

/// Asks all modules at once, each in a process of its own, for as long as `deadline`.
pub(super) fn ask(modules: Vec<Module>, deadline: Duration) -> Result<Vec<Answer>, CliError> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::Runtime)?;
    runtime.block_on(async {
        let mut asking = JoinSet::new();
        for (n, module) in modules.into_iter().enumerate() {
            let name = module.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let settings = HostSettings { open_timeout: deadline, ..HostSettings::new(name) };
            asking.spawn(async move {
                let tokens = pkcs11::tokens(&module, settings).await;
                (n, Answer { module: module.path, tokens })
            });
        }
        let mut answers = asking.join_all().await;
        answers.sort_by_key(|(n, _)| *n);
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    })
}

/// The device of the configuration that is this token.
pub(super) fn device_of<'a>(module: &Path, token: &Token, devices: &'a [DeviceConfig]) -> Option<&'a DeviceConfig> {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let is_it = |driver: &DriverConfig| matches!(driver, DriverConfig::Pkcs11(config) if real(&config.module.path) == real(module) && config.token.matches(token));
    devices.iter().find(|device| is_it(&device.driver))
}

/// What is to be known of a token's PIN before it is used.
fn pin(token: &Token) -> &'static str {
    match token {
        Token { login_required: false, .. } => "none",
        Token { pin_locked: true, .. } => "blocked",
        Token { pin_final_try: true, .. } => "last try",
        Token { pin_count_low: true, .. } => "a wrong one was tried",
        Token { pin_initialized: false, .. } => "not set",
        Token { pin_to_be_changed: true, .. } => "to be changed",
        Token { protected_path: true, .. } => "on the token",
        Token { .. } => "needed",
    }
}

/// The answers as JSON: docs/cli.md has the fields.
pub(super) fn values(answers: &[Answer], devices: &[DeviceConfig]) -> Value {
    let token = |module: &Path, token: &Token| {
        json!({
            "slot": token.slot_id,
            "label": token.label,
            "serial": token.serial,
            "manufacturer": token.manufacturer,
            "model": token.model,
            "initialized": token.initialized,
            "pin": pin(token),
            "uri": TokenUri::of(token).to_string(),
            "device": device_of(module, token, devices).map(|device| &device.name),
        })
    };
    let answer = |answer: &Answer| {
        let slots = answer.tokens.as_deref().unwrap_or_default();
        let good = slots.iter().filter_map(|slot| slot.as_ref().ok()).map(|found| token(&answer.module, found));
        let bad = slots.iter().filter_map(|slot| slot.as_ref().err());
        json!({
            "module": answer.module.to_string_lossy(),
            "error": answer.tokens.as_ref().err().map(ToString::to_string),
            "tokens": good.collect::<Vec<_>>(),
            "bad_slots": bad.map(|bad| json!({ "slot": bad.slot_id, "reason": bad.reason })).collect::<Vec<_>>(),
        })
    };
    answers.iter().map(answer).collect()
}

/// The answers for people.
pub(super) fn text(answers: &[Answer], devices: &[DeviceConfig]) -> String {
    let mut text = String::new();
    for Answer { module, tokens } in answers {
        text.push_str(&format!("{}\n", harmless(&module.to_string_lossy())));
        let slots = match tokens {
            Ok(slots) => slots,
            Err(error) => {
                text.push_str(&format!("  cannot be used: {}\n", harmless(&error.to_string())));
                continue;
            }
        };
        let rows: Vec<_> =
            slots.iter().filter_map(|slot| slot.as_ref().ok()).map(|t| row(module, t, devices)).collect();
        if rows.is_empty() {
            text.push_str("  no token\n");
        } else {
            let rows = table(&["TOKEN", "SERIAL", "MODEL", "PIN", "DEVICE", "URI"], &rows);
            rows.lines().for_each(|line| text.push_str(&format!("  {line}\n")));
        }
        for bad in slots.iter().filter_map(|slot| slot.as_ref().err()) {
            text.push_str(&format!("  slot {} cannot be used: {}\n", bad.slot_id, bad.reason));
        }
    }
    text
}

fn row(module: &Path, token: &Token, devices: &[DeviceConfig]) -> Vec<String> {
    let device = device_of(module, token, devices).map(|device| device.name.clone()).unwrap_or_default();
    let (pin, uri) = match token.initialized {
        true => (pin(token).to_owned(), TokenUri::of(token).to_string()),
        false => ("not initialised".to_owned(), String::new()),
    };
    vec![token.label.clone(), token.serial.clone(), token.model.clone(), pin, device, uri]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_p11_kit_name_modules() {
        assert_eq!(registered("# OpenSC\nmodule: opensc-pkcs11.so\n"), Some("opensc-pkcs11.so".to_owned()));
        assert_eq!(registered("module: /opt/x.so\npriority: 1\n"), Some("/opt/x.so".to_owned()));
        assert_eq!(registered("module: p11-kit-trust.so\ntrust-policy: yes\n"), None);
        assert_eq!(registered("priority: 1\n"), None);
    }
}
