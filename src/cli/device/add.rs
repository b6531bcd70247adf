//! `strongroom device add`: finds a token and writes its `[[device]]` into the configuration file. Never asks for a PIN.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Write},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueHint};
use serde_json::json;

use super::{
    super::{
        CliError,
        output::{print, print_json},
    },
    File, Patience, how_to_reload,
    modules::{self, device_of},
};
use crate::{
    config::{DeviceConfig, edit::Pkcs11Entry},
    devices::{
        host::vendor_variables,
        pkcs11::{Module, Token, TokenUri},
    },
    prompt::harmless,
    vault::pins::PinSource,
};

/// Add a device to the configuration file
#[derive(Args)]
pub(super) struct Add {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Subcommand)]
enum Kind {
    Pkcs11(Pkcs11),
}

/// Add a token of a PKCS#11 module
///
/// The module is asked for its tokens, in a process of its own; no PIN is sent. Where it has several, --token says which,
/// or you are asked. The entry is shown. What the file says already stays as it is, comments too.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Pkcs11 {
    /// The library
    #[arg(value_hint = ValueHint::FilePath)]
    module: PathBuf,
    /// Which of its tokens, as in RFC 7512
    #[arg(long, value_name = "URI")]
    token: Option<TokenUri>,
    /// What the device is called [default: after the token's label]
    #[arg(long)]
    name: Option<String>,
    /// Where its PIN comes from: prompt, file:PATH or credential:NAME (of systemd)
    #[arg(long, value_name = "SOURCE", default_value = "prompt", value_parser = pin_source)]
    pin: PinSource,
    #[command(flatten)]
    patience: Patience,
    #[command(flatten)]
    file: File,
}

const EXAMPLES: &str = "Examples:
  strongroom device add pkcs11 /usr/lib/softhsm/libsofthsm2.so
  strongroom device add pkcs11 /usr/lib/x86_64-linux-gnu/libykcs11.so --name yubikey
  strongroom device add pkcs11 /usr/lib/softhsm/libsofthsm2.so --token 'pkcs11:token=vault' --pin credential:hsm-pin";

impl Add {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.kind {
            Kind::Pkcs11(pkcs11) => pkcs11.run(),
        }
    }

    pub(super) fn json(&self) -> bool {
        match &self.kind {
            Kind::Pkcs11(pkcs11) => pkcs11.file.json,
        }
    }
}

impl Pkcs11 {
    fn run(&self) -> Result<(), CliError> {
        let mut file = self.file.open()?;
        let devices = &file.config().devices;
        let module = module(&self.module)?;
        let token = self.find(&module, devices)?;
        let entry = Pkcs11Entry {
            name: self.name.clone().unwrap_or_else(|| new_name(&token.label, devices)),
            module,
            token: self.token.clone().unwrap_or_else(|| TokenUri::of(&token)).to_string(),
            pin: self.pin.clone(),
            // By these the token was found here, and the daemon may have others.
            env: vendor_variables()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
        };
        let lines = file.add_pkcs11(&entry);
        file.save()?;
        if self.file.json {
            let path = file.path().to_string_lossy();
            return print_json(&json!({ "device": entry.name, "file": path, "entry": lines }));
        }
        print(&format!("Added to {}:\n\n{lines}\n{}", file.path().display(), how_to_reload(file.path())))
    }

    /// The one token that is meant.
    fn find(&self, module: &Path, devices: &[DeviceConfig]) -> Result<Token, CliError> {
        let answers = modules::ask(vec![Module::new(module)], self.patience.deadline)?;
        let slots = match answers.into_iter().next().map(|answer| answer.tokens) {
            Some(Ok(slots)) => slots,
            Some(Err(error)) => return Err(CliError::Module { module: module.to_owned(), error }),
            None => Vec::new(),
        };
        let mut why = Vec::new();
        let mut tokens = Vec::new();
        for slot in slots {
            match slot {
                Ok(token) if self.token.as_ref().is_some_and(|uri| !uri.matches(&token)) => {
                    why.push(format!("{} is not meant", TokenUri::of(&token)));
                }
                Ok(token) if !token.initialized => {
                    why.push(format!("the token in slot {} is not initialised", token.slot_id));
                }
                Ok(token) => match device_of(module, &token, devices) {
                    Some(device) => why.push(format!("{} is the device `{}`", TokenUri::of(&token), device.name)),
                    None => tokens.push(token),
                },
                Err(bad) => why.push(format!("slot {} cannot be used: {}", bad.slot_id, bad.reason)),
            }
        }
        match tokens.len() {
            0 => Err(CliError::NoToken { module: module.to_owned(), why }),
            1 => Ok(tokens.remove(0)),
            _ => choose(module, tokens),
        }
    }
}

/// A library that is there, by an absolute path.
pub(super) fn module(path: &Path) -> Result<PathBuf, CliError> {
    let failed = |source| CliError::File { path: path.to_owned(), source };
    let absolute = std::path::absolute(path).map_err(failed)?;
    fs::metadata(&absolute).map_err(failed)?;
    Ok(absolute)
}

/// Asks at the terminal, if there is one.
fn choose(module: &Path, mut tokens: Vec<Token>) -> Result<Token, CliError> {
    let uris: Vec<_> = tokens.iter().map(|token| TokenUri::of(token).to_string()).collect();
    let several = || CliError::SeveralTokens { module: module.to_owned(), uris: uris.clone() };
    let (stdin, mut stderr) = (io::stdin(), io::stderr());
    if !stdin.is_terminal() || !stderr.is_terminal() {
        return Err(several());
    }
    let mut question = String::new();
    for (n, token) in tokens.iter().enumerate() {
        question.push_str(&format!("{}  {}  {}\n", n + 1, harmless(&token.label), uris[n]));
    }
    let _ = write!(stderr, "{question}Which token? [1-{}] ", tokens.len());
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|_| several())?;
    let chosen = answer.trim().parse::<usize>().ok().filter(|n| (1..=tokens.len()).contains(n));
    chosen.map(|n| tokens.remove(n - 1)).ok_or_else(several)
}

/// A name made of the token's label, unlike those that there are.
fn new_name(label: &str, devices: &[DeviceConfig]) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "_.".contains(c) { c } else { '-' };
    let name: String = label.chars().map(plain).take(64).collect();
    let name = match name.trim_matches('-') {
        "" => "token",
        name => name,
    };
    let is_free = |name: &String| devices.iter().all(|device| device.name != *name);
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    std::iter::once(name.to_owned()).chain(numbered).find(is_free).unwrap_or_default()
}

fn pin_source(text: &str) -> Result<PinSource, String> {
    match text.split_once(':') {
        None if text == "prompt" => Ok(PinSource::Prompt),
        Some(("file", path)) if !path.is_empty() => {
            std::path::absolute(path).map(PinSource::File).map_err(|error| format!("{path}: {error}"))
        }
        Some(("credential", name)) if !name.is_empty() => Ok(PinSource::Credential(name.to_owned())),
        _ => Err("a PIN comes from prompt, file:PATH or credential:NAME; it is never given itself".to_owned()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_labels() {
        assert_eq!(new_name("My vault", &[]), "My-vault");
        assert_eq!(new_name("--", &[]), "token");
        assert_eq!(new_name("käse", &[]), "k-se");
    }

    #[test]
    fn a_pin_is_named_by_its_source_only() {
        assert_eq!(pin_source("prompt").unwrap(), PinSource::Prompt);
        assert_eq!(pin_source("file:/run/pin").unwrap(), PinSource::File("/run/pin".into()));
        assert_eq!(pin_source("credential:hsm").unwrap(), PinSource::Credential("hsm".to_owned()));
        for no in ["1234", "file:", "credential:", "prompt:x", ""] {
            let error = pin_source(no).unwrap_err();
            assert!(error.contains("comes from") && !error.contains("1234"), "{error}");
        }
    }
}
