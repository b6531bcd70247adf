//! GnuPG with a home, and so an agent, of its own.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use tempfile::TempDir;

use super::{Outcome, command, run};

/// A directory with keys. Its path is short, since sockets are in it. The agent ends with it.
pub struct Home(TempDir);

impl Home {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("gpg").tempdir_in("/tmp").unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(program, self.path());
        command.env("GNUPGHOME", self.path());
        command
    }

    /// Runs gpg with these words; a passphrase is given in a file.
    pub fn run(&self, passphrase: &str, words: &[&str]) -> Outcome {
        let file = self.path().join("passphrase");
        fs::write(&file, passphrase).unwrap();
        let options = ["--batch", "--yes", "--quiet", "--pinentry-mode", "loopback", "--passphrase-file"];
        run(self.command("gpg").args(options).arg(file).args(words))
    }

    /// A primary key and its subkeys, each `ALGORITHM/USAGE`; the fingerprint.
    pub fn generate(&self, user_id: &str, keys: &str, passphrase: &str) -> String {
        let mut fingerprint = String::new();
        for key in keys.split_whitespace() {
            let (algorithm, usage) = key.split_once('/').unwrap_or((key, "cert"));
            if fingerprint.is_empty() {
                self.run(passphrase, &["--quick-generate-key", user_id, algorithm, usage, "0"]).ok();
                fingerprint = self.colons(user_id, "fpr").remove(0)[9].clone();
            } else {
                self.run(passphrase, &["--quick-add-key", &fingerprint, algorithm, usage, "0"]).ok();
            }
        }
        fingerprint
    }

    /// The secret keys as gpg writes them.
    pub fn export(&self, name: &str, passphrase: &str) -> Vec<u8> {
        let out = self.path().join("exported");
        self.run(passphrase, &["--output", out.to_str().unwrap(), "--export-secret-keys", name]).ok();
        fs::read(out).unwrap()
    }

    /// What the agent signs a SHA-256 digest with: an S-expression.
    pub fn sign(&self, grip: &str, digest: &[u8]) -> Vec<u8> {
        let digest: String = digest.iter().map(|byte| format!("{byte:02X}")).collect();
        let words = [format!("SIGKEY {grip}"), format!("SETHASH --hash=sha256 {digest}"), "PKSIGN".to_owned()];
        let said = self.command("gpg-connect-agent").args(["--hex"]).args(words).arg("/bye").output().unwrap();
        // `D[0000]  28 37 3A …   (7:…`
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(text.contains("D[0000]"), "{text}");
        let lines = text.lines().filter(|line| line.starts_with("D["));
        let bytes = lines.flat_map(|line| line[7..].get(..50).unwrap_or(&line[7..]).split_whitespace().take(16));
        let escaped: Vec<_> = bytes.map_while(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        unescape(&escaped)
    }

    /// The fields of all records of this type that gpg lists of a key.
    pub fn colons(&self, name: &str, record: &str) -> Vec<Vec<String>> {
        let listed = self.run("", &["--with-colons", "--with-key-data", "--fixed-list-mode", "--list-keys", name]).ok();
        let records = listed.lines().map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>());
        records.filter(|fields| fields[0] == record).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        run(self.command("gpgconf").args(["--kill", "all"]));
    }
}

/// Line ends and `%` stand in data lines as `%0A`, `%0D` and `%25`.
fn unescape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = bytes;
    while let [first, tail @ ..] = rest {
        let escaped = tail.get(..2).filter(|_| *first == b'%').and_then(|two| std::str::from_utf8(two).ok());
        out.push(escaped.map_or(*first, |two| u8::from_str_radix(two, 16).unwrap()));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    out
}
