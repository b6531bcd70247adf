//! A TPM in software (swtpm) with tpm2-pkcs11 on it, and the resource manager that hands out its few places for keys: all
//! over sockets in a directory of the test's own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{Outcome, PATH, command, eventually, run};

/// The PIN of the token, and its security officer's.
pub const PIN: &str = "648219";
const SO_PIN: &str = "30571846";

/// A TPM that lives as long as this value, with one token of the label `tpm`.
pub struct Tpm {
    dir: TempDir,
    daemons: Vec<Child>,
}

impl Tpm {
    /// Starts one and makes the token.
    pub fn start() -> Self {
        let dir = TempDir::with_prefix("strongroom-tpm-").expect("a directory");
        let mut tpm = Self { dir, daemons: Vec::new() };
        for name in ["state", "store"] {
            fs::create_dir(tpm.path(name)).expect("a directory");
        }
        let (state, socket) = (tpm.path("state"), tpm.path("tpm"));
        let server = format!("type=unixio,path={}", socket.display());
        let state = format!("dir={}", state.display());
        let flags = "not-need-init,startup-clear";
        tpm.daemon("swtpm", &["socket", "--tpm2", "--tpmstate", &state, "--server", &server, "--flags", flags]);
        eventually("swtpm listens", || socket.exists());
        let bus = tpm.path("bus");
        tpm.daemon("dbus-daemon", &["--session", "--nofork", "--address", &tpm.bus()]);
        eventually("a bus listens", || bus.exists());
        let tcti = format!("--tcti=cmd:socat - UNIX-CONNECT:{}", socket.display());
        tpm.daemon("tpm2-abrmd", &["--session", "--allow-root", &tcti]);
        let init = ["--init-token", "--slot-index", "0", "--label", "tpm", "--so-pin", SO_PIN];
        eventually("the TPM has a token", || tpm.pkcs11_tool(&init).code == Some(0));
        let login = ["--token-label", "tpm", "--login", "--login-type", "so", "--so-pin", SO_PIN];
        tpm.pkcs11_tool(&[&login[..], &["--init-pin", "--new-pin", PIN]].concat()).ok();
        tpm
    }

    /// Generates a key pair: `rsa:2048`, `EC:prime256v1`. The id is in hexadecimal.
    pub fn generate(&self, key_type: &str, id: &str, label: &str) {
        let login = ["--token-label", "tpm", "--login", "--pin", PIN];
        let key = ["--keypairgen", "--key-type", key_type, "--id", id, "--label", label];
        self.pkcs11_tool(&[&login[..], &key].concat()).ok();
    }

    /// The module.
    pub fn module() -> PathBuf {
        super::library("libtpm2_pkcs11.so.1")
    }

    /// The variables by which the module finds the TPM.
    pub fn variables(&self) -> [(&'static str, String); 3] {
        [
            ("TPM2_PKCS11_STORE", self.path("store").display().to_string()),
            ("TPM2_PKCS11_TCTI", "tabrmd:bus_type=session".to_owned()),
            ("DBUS_SESSION_BUS_ADDRESS", self.bus()),
        ]
    }

    fn pkcs11_tool(&self, args: &[&str]) -> Outcome {
        let mut tool = command("pkcs11-tool", self.dir.path());
        run(tool.envs(self.variables()).arg("--module").arg(Self::module()).args(args))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bus(&self) -> String {
        format!("unix:path={}", self.path("bus").display())
    }

    fn daemon(&mut self, program: &str, args: &[&str]) {
        let daemon = daemon(program, self.dir.path()).args(args).env("DBUS_SESSION_BUS_ADDRESS", self.bus()).spawn();
        self.daemons.push(daemon.unwrap_or_else(|e| panic!("{program}: {e}")));
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn daemon(program: &str, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env_clear().env("PATH", PATH);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}
