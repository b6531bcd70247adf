//! `strongroom man`: the man pages, made from the definition that parses the command line.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, ValueHint};

use super::{CliError, command, error::Exit};

/// The drop-in's page is written by hand: its command line is not clap's.
const DROP_IN: &str = include_str!("../../contrib/man/strongroom-ssh-agent.1");

/// The day of this version's release; not the build's, which can then be repeated bit by bit.
const DATE: &str = "2026-11-22";

/// Write the man pages into a directory
#[derive(Args)]
#[command(hide = true)]
pub(super) struct Man {
    /// The directory, which is created if need be
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<(), CliError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            |source| CliError::File { path, source }
        };
        fs::create_dir_all(&self.dir).map_err(failed(&self.dir))?;
        for (name, page) in pages().map_err(failed(&self.dir))? {
            let path = self.dir.join(name);
            fs::write(&path, page).map_err(failed(&path))?;
        }
        Ok(())
    }
}

/// Every page with its file's name: one for the program and one for each subcommand that is not hidden, and for theirs.
fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut program = command();
    program.build();
    let mut pages = vec![("strongroom-ssh-agent.1".to_owned(), DROP_IN.as_bytes().to_vec())];
    let mut commands = vec![&program];
    while let Some(command) = commands.pop() {
        pages.push(page(command)?);
        let has_page = |c: &&Command| !c.is_hide_set() && !["ssh-agent", "help"].contains(&c.get_name());
        commands.extend(command.get_subcommands().filter(has_page));
    }
    Ok(pages)
}

fn page(command: &Command) -> io::Result<(String, Vec<u8>)> {
    // mangen would head the words behind the help with EXTRA.
    let man = clap_mangen::Man::new(command.clone().after_help(None).after_long_help(None));
    let name = man.get_filename();
    let title = name.trim_end_matches(".1").to_uppercase();
    let man = man.title(title).date(DATE).source(concat!("Strongroom ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.manual("User Commands").render(&mut page)?;
    let asks_the_daemon = command.get_arguments().any(|arg| arg.get_id() == "json");
    page.extend_from_slice(behind_the_help(command).as_bytes());
    if asks_the_daemon || command.has_subcommands() {
        page.extend_from_slice(exit_status().as_bytes());
    }
    page.extend_from_slice(FILES.as_bytes());
    Ok((name, page))
}

/// The words behind the help, with the examples in a section of their own.
fn behind_the_help(command: &Command) -> String {
    let words = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string).unwrap_or_default();
    let Some((before, examples)) = words.split_once("Examples:\n") else { return String::new() };
    let mut text = String::new();
    if !before.trim().is_empty() {
        text.push_str(&format!(".SH KEYS\n{}\n", roff(before.trim())));
    }
    text.push_str(".SH EXAMPLES\n.nf\n");
    for line in examples.lines() {
        text.push_str(&format!("{}\n", roff(line.trim())));
    }
    text + ".fi\n"
}

fn exit_status() -> String {
    let mut text = ".SH EXIT STATUS\n.TP\n.B 0\nIt is done.\n".to_owned();
    for (exit, meaning) in Exit::ALL {
        text.push_str(&format!(".TP\n.B {}\n{}\n", exit as u8, roff(meaning)));
    }
    text
}

/// A line of text as roff has it.
fn roff(line: &str) -> String {
    let escaped = line.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq");
    if escaped.starts_with('.') { format!("\\&{escaped}") } else { escaped }
}

const FILES: &str = r".SH FILES
.TP
.I $XDG_CONFIG_HOME/strongroom/config.toml
The settings. None is needed to start.
.TP
.I $XDG_RUNTIME_DIR/strongroom/agent
The ssh door: what SSH_AUTH_SOCK names.
.TP
.I $XDG_RUNTIME_DIR/strongroom/service
The service door, for daemons. Never export it as SSH_AUTH_SOCK.
.TP
.I $XDG_STATE_HOME/strongroom/state.redb
What must survive a restart: the devices, their public keys, and marks of the PINs that were refused. No private key.
.TP
.I $XDG_STATE_HOME/strongroom/audit
The audit log.
.PP
Without XDG_RUNTIME_DIR the sockets are in
.IR /run/strongroom .
";

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_each_visible_command() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/man1");
        Man { dir: target.clone() }.run().unwrap();
        let mut names: Vec<_> = fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        let expected = "strongroom-add.1 strongroom-agent.1 strongroom-audit-show.1 strongroom-audit-tail.1 strongroom-audit-verify.1 \
                        strongroom-audit.1 strongroom-backup.1 strongroom-card-factory-reset.1 strongroom-card-generate.1 \
                        strongroom-card-import.1 strongroom-card-reset-pin.1 strongroom-card-set-language.1 \
                        strongroom-card-set-login.1 strongroom-card-set-name.1 strongroom-card-set-pin.1 \
                        strongroom-card-set-signature-pin.1 strongroom-card-set-touch.1 strongroom-card-set-url.1 strongroom-card-status.1 \
                        strongroom-card.1 strongroom-decrypt.1 strongroom-derive.1 strongroom-device-add-pkcs11.1 \
                        strongroom-device-add.1 strongroom-device-list.1 strongroom-device-remove.1 \
                        strongroom-device-scan.1 strongroom-device.1 strongroom-forget.1 strongroom-init.1 \
                        strongroom-key-allow.1 strongroom-key-attach.1 strongroom-key-delete.1 strongroom-key-detach.1 \
                        strongroom-key-disable.1 strongroom-key-enable.1 strongroom-key-export.1 \
                        strongroom-key-generate.1 strongroom-key-import.1 strongroom-key-keep.1 strongroom-key-rename.1 \
                        strongroom-key-rotate.1 strongroom-key-set.1 strongroom-key-show.1 strongroom-key.1 \
                        strongroom-keys.1 strongroom-lock.1 strongroom-passphrase.1 strongroom-random.1 \
                        strongroom-restore.1 strongroom-sign.1 \
                        strongroom-slot-add.1 \
                        strongroom-slot-list.1 strongroom-slot-remove.1 strongroom-slot.1 strongroom-ssh-agent.1 \
                        strongroom-status.1 strongroom-transfer-accept.1 strongroom-transfer-offer.1 \
                        strongroom-transfer-wrap.1 strongroom-transfer.1 strongroom-unlock.1 strongroom-verify.1 strongroom-why.1 strongroom.1";
        assert_eq!(names, expected.split_whitespace().collect::<Vec<_>>());
        let program = fs::read_to_string(target.join("strongroom.1")).unwrap();
        assert!(program.contains("ssh\\-agent"), "{program}");
        let sign = fs::read_to_string(target.join("strongroom-sign.1")).unwrap();
        for part in [".SH EXAMPLES", "strongroom sign", ".SH KEYS", ".SH EXIT STATUS", ".B 11"] {
            assert!(sign.contains(part), "{part} is missing:\n{sign}");
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Man { dir: file.clone() }.run().unwrap_err();
        assert!(error.to_string().starts_with(file.to_str().unwrap()), "{error}");
    }
}
