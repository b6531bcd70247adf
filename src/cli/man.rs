//! `strongroom man`: the man pages, made from the definition that parses the command line.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, ValueHint};

use super::{CliError, command};

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

/// Every page with its file's name: one for the program and one for each subcommand that is not hidden.
fn pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut program = command();
    program.build();
    let mut pages = vec![("strongroom-ssh-agent.1".to_owned(), DROP_IN.as_bytes().to_vec())];
    let of_clap = program.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "ssh-agent");
    for command in of_clap.chain([&program]) {
        pages.push(page(command)?);
    }
    Ok(pages)
}

fn page(command: &Command) -> io::Result<(String, Vec<u8>)> {
    // mangen would head the words behind the help with EXTRA.
    let man = clap_mangen::Man::new(command.clone().after_help(None));
    let name = man.get_filename();
    let title = name.trim_end_matches(".1").to_uppercase();
    let man = man.title(title).date(DATE).source(concat!("Strongroom ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.manual("User Commands").render(&mut page)?;
    page.extend_from_slice(FILES.as_bytes());
    Ok((name, page))
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
        assert_eq!(names, ["strongroom-agent.1", "strongroom-ssh-agent.1", "strongroom.1"]);
        let program = fs::read_to_string(target.join("strongroom.1")).unwrap();
        assert!(program.contains("ssh\\-agent"), "{program}");
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
