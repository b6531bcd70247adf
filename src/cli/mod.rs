//! The command line of `strongroom`: what can be asked for, and how an error is told to a person. Knows no key and no
//! socket. Nothing else in the house writes to standard output, but for the drop-in's own lines in `ssh_agent`.

mod agent;
mod completions;
mod device_host;
mod drop_in;
mod man;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use thiserror::Error;

use crate::{config::ConfigError, daemon::DaemonError, devices::host::child::ChildError};

/// A signing vault that speaks the ssh-agent protocol
///
/// `strongroom agent` serves ssh, git and other programs in the foreground, as systemd wants it. `strongroom ssh-agent`,
/// or a link to this program by the name `ssh-agent`, takes the options of OpenSSH's ssh-agent and prints what it prints.
#[derive(Parser)]
#[command(name = "strongroom", version, disable_help_subcommand = true, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "Files: $XDG_CONFIG_HOME/strongroom/config.toml holds the settings; none is needed to start. \
    The sockets are $XDG_RUNTIME_DIR/strongroom/agent, for SSH_AUTH_SOCK, and $XDG_RUNTIME_DIR/strongroom/service.";

#[derive(Subcommand)]
enum Command {
    Agent(agent::Agent),
    Man(man::Man),
    Completions(completions::Completions),
    DeviceHost(device_host::DeviceHost),
}

/// What a subcommand could not do. The message says what happened; the remedy is the line below it.
#[derive(Debug, Error)]
enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    DeviceHost(#[from] ChildError),
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("standard output: {0}")]
    Output(io::Error),
}

impl CliError {
    /// What the person can do about it; `None` where the message says so itself.
    fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Config(error) => Some(error.remedy()),
            Self::Daemon(_) => None,
            Self::DeviceHost(_) => Some("Only the daemon starts this; look into its log."),
            Self::File { .. } => Some("Name a directory that you may write to."),
            Self::Output(_) => Some("Send the output to a file or a program that takes it."),
        }
    }
}

/// Runs `strongroom` with `args`, the program's own name first. Exits 0, 1 when something failed, 2 when the command
/// line was not understood.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = command().try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches));
    match parsed {
        Ok(cli) => report(run(cli)),
        Err(error) => {
            // Nothing is left to tell about an error that cannot be shown.
            let _ = error.print();
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}

/// The whole definition, from which parsing, `--help`, man pages and completions are made.
fn command() -> clap::Command {
    Cli::command().subcommand(drop_in::command())
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Agent(agent) => agent.run(),
        Command::Man(man) => man.run(),
        Command::Completions(completions) => completions.run(),
        Command::DeviceHost(host) => host.run(),
    }
}

fn report(result: Result<(), CliError>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut text = format!("strongroom: {error}\n");
    if let Some(remedy) = error.remedy() {
        text.push_str(&format!("  {remedy}\n"));
    }
    let _ = io::stderr().write_all(text.as_bytes());
    ExitCode::FAILURE
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn help_shows_what_people_use_and_hides_what_packagers_use() {
        let help = command().render_long_help().to_string();
        assert!(help.contains("  agent "), "{help}");
        assert!(help.contains("  ssh-agent "), "{help}");
        assert!(!help.contains("completions"), "{help}");
        assert!(!help.contains("  man "), "{help}");
        assert!(!help.contains("device-host"), "{help}");
    }

    #[test]
    fn agent_takes_a_file_and_several_sockets() {
        let args = ["strongroom", "agent", "--config", "c.toml", "--socket", "/a", "--socket", "/b", "--state", "s"];
        let cli = Cli::from_arg_matches(&command().try_get_matches_from(args).unwrap()).unwrap();
        let Command::Agent(agent) = cli.command else { panic!("another subcommand") };
        assert_eq!(agent.config.unwrap().to_str(), Some("c.toml"));
        assert_eq!(agent.sockets, ["/a", "/b"].map(PathBuf::from));
        assert_eq!(agent.state.unwrap().to_str(), Some("s"));
    }

    #[test]
    fn every_error_of_ours_has_a_remedy() {
        let file = CliError::File { path: "/x".into(), source: io::ErrorKind::PermissionDenied.into() };
        let output = CliError::Output(io::ErrorKind::BrokenPipe.into());
        assert!([file, output].iter().all(|e| e.remedy().is_some_and(|r| r.ends_with('.'))));
    }
}
