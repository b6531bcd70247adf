//! SoftHSM: PKCS#11 tokens in a directory of the test's own, made with its own tools and OpenSC's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{command, eventually, library, run};

/// The module.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// The PIN of every token here.
pub const PIN: &str = "648219";
/// The PIN of every token's security officer.
pub const SO_PIN: &str = "30571846";

/// A directory with tokens. Programs find it by `SOFTHSM2_CONF`, which is [`SoftHsm::conf`].
pub struct SoftHsm {
    dir: TempDir,
}

impl SoftHsm {
    /// Without tokens.
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("strongroom-softhsm-").expect("a directory");
        let tokens = dir.path().join("tokens");
        fs::create_dir(&tokens).expect("a directory for the tokens");
        let conf = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
            tokens.display()
        );
        fs::write(dir.path().join("softhsm2.conf"), conf).expect("a configuration");
        Self { dir }
    }

    /// With one token of this label.
    pub fn with_token(label: &str) -> Self {
        let hsm = Self::new();
        hsm.init_token(label);
        hsm
    }

    /// What `SOFTHSM2_CONF` must be.
    pub fn conf(&self) -> PathBuf {
        self.path("softhsm2.conf")
    }

    /// Where the tokens are, a directory for each.
    pub fn tokens(&self) -> PathBuf {
        self.path("tokens")
    }

    /// A file beside the tokens.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a token.
    pub fn init_token(&self, label: &str) {
        run(self.util().args(["--init-token", "--free", "--label", label, "--so-pin", SO_PIN, "--pin", PIN])).ok();
    }

    /// Makes the token anew: its keys are gone, and so is its serial.
    pub fn reinit_token(&self, label: &str) {
        run(self.util().args(["--init-token", "--token", label, "--label", label, "--so-pin", SO_PIN, "--pin", PIN]))
            .ok();
    }

    /// Generates a key pair on the token with pkcs11-tool: `rsa:2048`, `EC:prime256v1`, `EC:edwards25519`, … The id is in
    /// hexadecimal.
    pub fn generate(&self, token: &str, key_type: &str, id: &str, label: &str, more: &[&str]) {
        let make = || {
            let mut tool = self.pkcs11_tool(token);
            run(tool.args(["--keypairgen", "--key-type", key_type, "--id", id, "--label", label]).args(more))
        };
        let mut made = make();
        // While another program has the token open, SoftHSM may fail amid a change. Half of a pair is taken back.
        for _ in 0..5 {
            if !made.stderr.contains("CKR_FUNCTION_FAILED") {
                break;
            }
            for kind in ["privkey", "pubkey"] {
                run(self.pkcs11_tool(token).args(["--delete-object", "--type", kind, "--id", id]));
            }
            made = make();
        }
        made.ok();
    }

    /// Deletes a key pair from the token with pkcs11-tool, however often SoftHSM fails at it.
    pub fn delete(&self, token: &str, id: &str) {
        for kind in ["privkey", "pubkey"] {
            eventually("the object is deleted", || {
                let tool = run(self.pkcs11_tool(token).args(["--delete-object", "--type", kind, "--id", id]));
                tool.code == Some(0) || tool.stderr.contains("not found")
            });
        }
    }

    /// Imports a private key in PKCS#8, with its public key. The id is in hexadecimal.
    pub fn import(&self, token: &str, pkcs8: &Path, id: &str, label: &str) {
        run(self
            .util()
            .arg("--import")
            .arg(pkcs8)
            .args(["--token", token, "--label", label, "--id", id, "--pin", PIN]))
        .ok();
    }

    /// A key pair in PKCS#8 from `openssl genpkey` with these arguments, in a file beside the tokens.
    pub fn openssl_key(&self, name: &str, args: &[&str]) -> PathBuf {
        let path = self.path(name);
        run(command("openssl", self.dir.path()).arg("genpkey").args(args).arg("-out").arg(&path)).ok();
        path
    }

    /// pkcs11-tool, logged in to the token.
    pub fn pkcs11_tool(&self, token: &str) -> Command {
        let mut tool = command("pkcs11-tool", self.dir.path());
        tool.env("SOFTHSM2_CONF", self.conf()).args([
            "--module",
            MODULE,
            "--token-label",
            token,
            "--login",
            "--pin",
            PIN,
        ]);
        tool
    }

    /// The lines of a configuration that make a token the device of this name, with its PIN in a file; `more` are settings
    /// of its own.
    pub fn device(&self, name: &str, token: &str, more: &str) -> String {
        self.device_of(Path::new(MODULE), name, token, more)
    }

    /// The same, through another module.
    pub fn device_of(&self, module: &Path, name: &str, token: &str, more: &str) -> String {
        let pin = self.path(&format!("{name}.pin"));
        if !pin.exists() {
            fs::write(&pin, PIN).expect("a file with the PIN");
        }
        // What comes and goes here is to be noticed at once, unless a test says otherwise.
        let probe = if more.contains("probe") { "" } else { "probe = \"50ms\"\n" };
        format!(
            "[[device]]\nname = {name:?}\ndriver = \"pkcs11\"\nmodule = {module:?}\ntoken = \"pkcs11:token={token}\"\n\
             pin = {{ file = {pin:?} }}\n{probe}env = {{ SOFTHSM2_CONF = {:?} }}\n{more}\n",
            self.conf()
        )
    }

    /// The same, through OpenSC's spy, which writes each call into the file [`SoftHsm::calls`] reads.
    pub fn spied_device(&self, name: &str, token: &str, more: &str) -> String {
        let env = format!("PKCS11SPY = {MODULE:?}, PKCS11SPY_OUTPUT = {:?}, SOFTHSM2_CONF", self.path("calls"));
        self.device_of(&library("pkcs11-spy.so"), name, token, more).replace("SOFTHSM2_CONF", &env)
    }

    /// How often a function of the module was called through the spy.
    pub fn calls(&self, function: &str) -> usize {
        let calls = fs::read(self.path("calls")).unwrap_or_default();
        String::from_utf8_lossy(&calls).lines().filter(|line| line.ends_with(&format!(": {function}"))).count()
    }

    /// softhsm2-util.
    pub fn util(&self) -> Command {
        let mut util = command("softhsm2-util", self.dir.path());
        util.env("SOFTHSM2_CONF", self.conf());
        util
    }
}
