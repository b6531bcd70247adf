//! `strongroom device scan`: the tokens in PKCS#11 modules.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use serde_json::json;

use super::{
    super::{
        CliError,
        output::{print, print_json},
    },
    File, Patience, modules,
};
use crate::{config::DriverConfig, devices::pkcs11::Module};

/// Show the tokens in PKCS#11 modules, and what is wrong with the others
///
/// Without MODULE, the modules of the configuration are asked, those that p11-kit knows, and those that are where vendors
/// put them. Each is loaded in a process of its own. No PIN is sent.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Scan {
    /// Ask these libraries
    #[arg(value_name = "MODULE", value_hint = ValueHint::FilePath)]
    modules: Vec<PathBuf>,
    #[command(flatten)]
    patience: Patience,
    #[command(flatten)]
    file: File,
}

const EXAMPLES: &str = "Examples:
  strongroom device scan
  strongroom device scan /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so
  strongroom device scan --json | jq -r '.modules[].tokens[].uri'";

impl Scan {
    pub(super) fn run(&self) -> Result<(), CliError> {
        let devices = self.file.open()?.config().devices.clone();
        let mut asked: Vec<Module> = Vec::new();
        if self.modules.is_empty() {
            for device in &devices {
                match &device.driver {
                    DriverConfig::Pkcs11(config) if !asked.contains(&config.module) => {
                        asked.push(config.module.clone());
                    }
                    _ => {}
                }
            }
            let configured: Vec<_> =
                asked.iter().filter_map(|module| std::fs::canonicalize(&module.path).ok()).collect();
            let new = |path: &PathBuf| std::fs::canonicalize(path).is_ok_and(|real| !configured.contains(&real));
            asked.extend(modules::installed().into_iter().filter(new).map(Module::new));
        } else {
            for path in &self.modules {
                asked.push(Module::new(super::add::module(path)?));
            }
        }
        let answers = modules::ask(asked, self.patience.deadline)?;
        if self.file.json {
            return print_json(&json!({ "modules": modules::values(&answers, &devices) }));
        }
        if answers.is_empty() {
            return print(
                "There is no PKCS#11 module where modules usually are. Name one: strongroom device scan MODULE\n",
            );
        }
        print(&modules::text(&answers, &devices))
    }

    pub(super) fn json(&self) -> bool {
        self.file.json
    }
}
