//! A PKCS#11 module over SoftHSM that misbehaves as a test says: tests/pkcs11/bad.c, built with gcc.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{run, softhsm};

/// The module, which is well until it is told otherwise.
pub struct BadModule {
    dir: TempDir,
}

impl BadModule {
    /// Builds it into a directory of its own.
    pub fn build() -> Self {
        let module = Self { dir: TempDir::with_prefix("strongroom-bad-").expect("a directory") };
        let define = |name: &str, path: &Path| format!("-D{name}={:?}", path.display().to_string());
        run(Command::new("gcc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(module.path())
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pkcs11/bad.c"))
            .arg(define("REAL", Path::new(softhsm::MODULE)))
            .arg(define("MOODS", &module.dir.path().join("moods")))
            .arg(define("CALLS", &module.dir.path().join("calls")))
            .arg("-ldl"))
        .ok();
        fs::write(module.dir.path().join("calls"), "").expect("a list of calls");
        module
    }

    /// The library.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("bad.so")
    }

    /// What goes wrong from now on, in place of what did: lines as bad.c has them.
    pub fn mood(&self, lines: &str) {
        // Whole at once: the module may read it at any time.
        let (new, moods) = (self.dir.path().join("new"), self.dir.path().join("moods"));
        fs::write(&new, lines).expect("moods");
        fs::rename(new, moods).expect("moods");
    }

    /// Nothing goes wrong any more.
    pub fn recover(&self) {
        self.mood("");
    }

    /// The results of all calls of this function so far, in hexadecimal, by all processes.
    pub fn results(&self, function: &str) -> Vec<String> {
        let calls = fs::read_to_string(self.dir.path().join("calls")).expect("a list of calls");
        let of = |line: &str| line.split_once(' ').filter(|(name, _)| *name == function).map(|(_, rv)| rv.to_owned());
        calls.lines().filter_map(of).collect()
    }
}
