//! `strongroom audit`: reads the audit log's own files. The daemon is asked for one thing only, how far it has written;
//! where none runs, its state file tells.

mod line;
mod show;
mod tail;
mod verify;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueHint};

use super::{
    CliError,
    connection::{Connection, in_runtime},
    key_name,
    public_key_file::PublicKeyFile,
};
use crate::{
    client::{Client, ClientError},
    config::{Config, Origin},
    public_key::{FingerprintHash, fingerprint},
    vault::{
        audit::{Head, numbers},
        store::Store,
    },
};

/// Read the audit log: what was done with which key, for whom
///
/// docs/audit.md says what a line holds and what its hashes prove.
#[derive(Args)]
#[command(disable_help_subcommand = true)]
pub(super) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Show(show::Show),
    Tail(tail::Tail),
    Verify(verify::Verify),
}

impl Audit {
    pub(super) fn run(&self) -> Result<(), CliError> {
        match &self.command {
            Command::Show(show) => show.run(),
            Command::Tail(tail) => tail.run(),
            Command::Verify(verify) => verify.run(),
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        match &self.command {
            Command::Show(show) => &show.log.connection,
            Command::Tail(tail) => &tail.log.connection,
            Command::Verify(verify) => &verify.log.connection,
        }
    }
}

/// Which log is read.
#[derive(Args)]
struct Log {
    /// Read the files in DIR, as those of a copy; nobody is asked how far they were written
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    files: Option<PathBuf>,
    /// Where no daemon runs: find the log by the settings in FILE
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// Where no daemon runs: find the log by the state in DIR
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    state: Option<PathBuf>,
    #[command(flatten)]
    connection: Connection,
}

/// The log that was found.
struct Found {
    directory: PathBuf,
    /// How far it was written, where that is known.
    head: Option<Head>,
    /// The daemon, where one runs.
    client: Option<Client>,
}

impl Log {
    /// Finds the log and does what is to be done with it.
    fn run<T>(&self, work: impl AsyncFnOnce(Found) -> Result<T, CliError>) -> Result<T, CliError> {
        in_runtime(async || work(self.find().await?).await)
    }

    async fn find(&self) -> Result<Found, CliError> {
        if let Some(files) = &self.files {
            let directory = files.clone();
            return Ok(Found { directory, head: None, client: None });
        }
        match Client::connect(self.connection.path()).await {
            Ok(client) => {
                let head = client.audit().await?;
                Ok(Found { directory: head.directory.clone(), head: Some(head), client: Some(client) })
            }
            Err(ClientError::Unreachable { .. }) => self.find_without_daemon(),
            Err(error) => Err(error.into()),
        }
    }

    fn find_without_daemon(&self) -> Result<Found, CliError> {
        let config =
            Config::load(Origin { file: self.config.clone(), state: self.state.clone(), ..Origin::default() })?;
        let head = match &config.state {
            Some(state) => Store::audit_head_in(state)?,
            None => None,
        };
        let directory = head.as_ref().map(|head| head.directory.clone());
        let configured = || config.audit.path.clone().or_else(|| Some(config.state.as_ref()?.join("audit")));
        match directory.or_else(configured) {
            Some(directory) => Ok(Found { directory, head, client: None }),
            None => {
                Err(CliError::Usage("where the audit log is, is not known; name its directory with --files".to_owned()))
            }
        }
    }
}

impl Found {
    /// The numbers of the files; there are some.
    fn numbers(&self) -> Result<Vec<u64>, CliError> {
        let found = numbers(&self.directory).map_err(|source| self.failed(&self.directory, source))?;
        if found.is_empty() {
            return Err(self.failed(&self.directory, std::io::Error::other("there is no audit log")));
        }
        Ok(found)
    }

    fn failed(&self, path: &Path, source: std::io::Error) -> CliError {
        CliError::File { path: path.to_owned(), source }
    }

    /// The fingerprint of the key that this name means.
    async fn fingerprint(&self, name: &str) -> Result<String, CliError> {
        if name.starts_with("SHA256:") {
            return Ok(name.to_owned());
        }
        if let Some(client) = &self.client {
            match key_name::resolve(client, name).await {
                Err(CliError::NoSuchKey(_)) if key_name::is_file(name) => {}
                key => return Ok(key_name::sha256(&key?)),
            }
        }
        if key_name::is_file(name) {
            let key = PublicKeyFile::read(Path::new(name))?;
            return Ok(fingerprint(&key.blob, FingerprintHash::Sha256));
        }
        Err(CliError::Usage("without a daemon a key is named by its SHA256: fingerprint or a file".to_owned()))
    }
}
