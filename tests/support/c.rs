//! The programs over the C client of contrib/c, built by the system's compiler.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
/// What finds mistakes in them.
const SANITIZED: &[&str] = &["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
/// What is measured.
const OPTIMISED: &[&str] = &["-O2"];

/// One of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `tests/c/driver.c`
    Driver,
    /// `tests/c/loop.c`
    Loop,
    /// `contrib/c/authority.c`
    Authority,
}

impl Program {
    fn source(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Driver => ("tests/c/driver.c", &[]),
            Self::Loop => ("tests/c/loop.c", &[]),
            Self::Authority => ("contrib/c/authority.c", &["-levent_core", "-lcrypto"]),
        }
    }

    /// Builds it in `dir` under the sanitizers; its path.
    pub fn sanitized(self, dir: &Path) -> PathBuf {
        self.build(dir, SANITIZED)
    }

    /// Builds it in `dir` as it is meant to be used; its path.
    pub fn optimised(self, dir: &Path) -> PathBuf {
        self.build(dir, OPTIMISED)
    }

    fn build(self, dir: &Path, options: &[&str]) -> PathBuf {
        let (source, libraries) = self.source();
        let (root, program) = (Path::new(ROOT), dir.join(format!("{self:?}").to_lowercase()));
        let output = Command::new("cc")
            .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"])
            .args(options)
            .arg("-I")
            .arg(root.join("contrib/c"))
            .arg("-o")
            .args([&program, &root.join(source), &root.join("contrib/c/strongroom.c")])
            .args(libraries)
            .output()
            .expect("a C compiler: install gcc, libc6-dev, libevent-dev and libssl-dev");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        program
    }
}
