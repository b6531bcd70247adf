//! The command line of `strongroom`: what can be asked for, and how an error is told to a person. Knows no key and no
//! socket. Nothing else in the house writes to standard output, but for the drop-in's own lines in `ssh_agent`.

mod add;
mod agent;
mod audit;
mod backup;
mod card;
mod completions;
mod connection;
mod decrypt;
mod derive;
mod device;
mod device_host;
mod drop_in;
mod error;
mod forget;
mod init;
mod input;
mod key;
mod key_name;
mod keys;
mod lock;
mod man;
mod output;
mod parcel;
mod private_key_file;
mod proof;
mod public_key_file;
mod random;
mod sign;
mod signature;
mod slot;
mod sshsig;
mod status;
mod stored_key;
mod target;
mod terminal;
mod transfer;
mod unlock;
mod verify;
mod watch;
mod why;

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use self::error::CliError;

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
    Status(status::Status),
    Keys(keys::Keys),
    Init(init::Init),
    Slot(slot::Slot),
    Passphrase(slot::Passphrase),
    Backup(backup::Backup),
    Restore(backup::Restore),
    Transfer(transfer::Transfer),
    Add(add::Add),
    Key(key::Key),
    Sign(sign::Sign),
    Verify(verify::Verify),
    Decrypt(decrypt::Decrypt),
    Derive(derive::Derive),
    Random(random::Random),
    Unlock(unlock::Unlock),
    Lock(lock::Lock),
    Forget(forget::Forget),
    Why(why::Why),
    Device(device::Device),
    Audit(audit::Audit),
    Card(card::Card),
    Man(man::Man),
    Completions(completions::Completions),
    DeviceHost(device_host::DeviceHost),
}

/// Runs `strongroom` with `args`, the program's own name first. Exits 0 when it is done, else as the page of the manual
/// says.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = command().try_get_matches_from(args).and_then(|matches| Cli::from_arg_matches(&matches));
    match parsed {
        Ok(cli) => {
            let json = cli.command.json();
            report(run(cli), json)
        }
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

impl Command {
    /// Whether errors are to be told to a program, too.
    fn json(&self) -> bool {
        let connection = match self {
            Self::Status(status) => &status.connection,
            Self::Keys(keys) => &keys.connection,
            Self::Sign(sign) => &sign.connection,
            Self::Verify(verify) => &verify.connection,
            Self::Decrypt(decrypt) => &decrypt.connection,
            Self::Derive(derive) => &derive.connection,
            Self::Random(random) => &random.connection,
            Self::Unlock(unlock) => &unlock.connection,
            Self::Lock(lock) => &lock.connection,
            Self::Forget(forget) => &forget.connection,
            Self::Why(why) => &why.connection,
            Self::Add(add) => &add.connection,
            Self::Device(device) => return device.json(),
            Self::Key(key) => return key.json(),
            Self::Audit(audit) => audit.connection(),
            Self::Card(card) => card.connection(),
            Self::Init(init) => &init.connection,
            Self::Slot(slot) => slot.connection(),
            Self::Passphrase(passphrase) => &passphrase.connection,
            Self::Backup(backup) => &backup.connection,
            Self::Restore(restore) => &restore.connection,
            Self::Transfer(transfer) => transfer.connection(),
            Self::Agent(_) | Self::Man(_) | Self::Completions(_) | Self::DeviceHost(_) => return false,
        };
        connection.json
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Agent(agent) => agent.run(),
        Command::Status(status) => status.run(),
        Command::Keys(keys) => keys.run(),
        Command::Add(add) => add.run(),
        Command::Key(key) => key.run(),
        Command::Sign(sign) => sign.run(),
        Command::Verify(verify) => verify.run(),
        Command::Decrypt(decrypt) => decrypt.run(),
        Command::Derive(derive) => derive.run(),
        Command::Random(random) => random.run(),
        Command::Unlock(unlock) => unlock.run(),
        Command::Lock(lock) => lock.run(),
        Command::Forget(forget) => forget.run(),
        Command::Why(why) => why.run(),
        Command::Device(device) => device.run(),
        Command::Audit(audit) => audit.run(),
        Command::Card(card) => card.run(),
        Command::Init(init) => init.run(),
        Command::Slot(slot) => slot.run(),
        Command::Backup(backup) => backup.run(),
        Command::Restore(restore) => restore.run(),
        Command::Transfer(transfer) => transfer.run(),
        Command::Passphrase(passphrase) => passphrase.run(),
        Command::Man(man) => man.run(),
        Command::Completions(completions) => completions.run(),
        Command::DeviceHost(host) => host.run(),
    }
}

fn report(result: Result<(), CliError>, json: bool) -> ExitCode {
    let error = match result {
        Ok(()) => return ExitCode::SUCCESS,
        // Whoever reads has had enough.
        Err(error) if error.is_broken_pipe() => return ExitCode::SUCCESS,
        Err(error) => error,
    };
    if json {
        // The exit code tells, even if nobody reads this.
        let _ = output::print_json(&error.json());
    }
    let _ = io::stderr().write_all(error.text().as_bytes());
    error.exit().into()
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
        assert_eq!(agent.sockets, ["/a", "/b"].map(std::path::PathBuf::from));
        assert_eq!(agent.state.unwrap().to_str(), Some("s"));
    }
}
