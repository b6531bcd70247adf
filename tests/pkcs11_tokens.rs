//! The tokens of PKCS#11 modules, listed by the real program with real modules: none spoils the listing of the others, and
//! no module makes anybody wait.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod support;

use std::{fs, path::Path, time::Duration};

use strongroom::devices::{
    DeviceError,
    host::HostSettings,
    pkcs11::{Module, Token, TokenUri, tokens},
};
use support::{
    PATIENCE, command, library, run,
    softhsm::{MODULE, SO_PIN, SoftHsm},
};
use tempfile::TempDir;

fn settings(variables: &[(&str, &Path)]) -> HostSettings {
    let env = variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    HostSettings {
        env,
        open_timeout: PATIENCE,
        program: env!("CARGO_BIN_EXE_strongroom").into(),
        ..HostSettings::new("listing")
    }
}

async fn listed(hsm: &SoftHsm) -> Vec<Token> {
    let found = tokens(&Module::new(MODULE), settings(&[("SOFTHSM2_CONF", &hsm.conf())])).await.unwrap();
    found.into_iter().map(|token| token.unwrap()).collect()
}

#[tokio::test]
async fn every_token_is_listed_as_it_describes_itself() {
    let hsm = SoftHsm::with_token("first token");
    hsm.init_token("second");
    let found = listed(&hsm).await;
    // SoftHSM always has one more, for the next token to be.
    assert_eq!(found.iter().filter(|token| token.initialized).count(), 2, "{found:?}");
    assert_eq!(found.len(), 3, "{found:?}");
    let first = found.iter().find(|token| token.label == "first token").unwrap();
    assert_eq!((first.model.as_str(), first.manufacturer.as_str()), ("SoftHSM v2", "SoftHSM project"));
    assert!(first.login_required && first.pin_initialized && !first.pin_locked && !first.pin_count_low);
    assert_eq!(first.tries_left(), None);
    let uri: TokenUri = format!("pkcs11:token=first%20token;serial={}", first.serial).parse().unwrap();
    assert_eq!(found.iter().filter(|token| uri.matches(token)).collect::<Vec<_>>(), [first]);
    assert_eq!(TokenUri::of(first), uri);
}

#[tokio::test]
async fn a_wrong_pin_shows_in_the_listing_and_a_listing_spends_none() {
    let hsm = SoftHsm::with_token("vault");
    let mut wrong = command("pkcs11-tool", &hsm.tokens());
    wrong.env("SOFTHSM2_CONF", hsm.conf()).args(["--module", MODULE, "--token-label", "vault"]);
    run(wrong.args(["--login", "--pin", SO_PIN, "--list-objects"])).fails_with(1);
    for _ in 0..2 {
        let found = listed(&hsm).await;
        let token = found.iter().find(|token| token.label == "vault").unwrap();
        assert!(token.pin_count_low && !token.pin_final_try && !token.pin_locked);
    }
}

#[tokio::test]
async fn nss_is_told_where_its_keys_are() {
    let dir = TempDir::with_prefix("strongroom-nss-").unwrap();
    let database = format!("sql:{}", dir.path().display());
    run(command("certutil", dir.path()).args(["-N", "--empty-password", "-d", &database])).ok();
    let path = library("libsoftokn3.so");
    let module = Module { path, init_args: Some(format!("configdir='{database}'")) };
    let found = tokens(&module, settings(&[])).await.unwrap();
    let labels: Vec<_> = found.iter().flatten().map(|token| token.label.as_str()).collect();
    assert!(labels.contains(&"NSS Certificate DB"), "{found:?}");
}

#[tokio::test]
async fn a_module_that_cannot_be_loaded_is_an_error_with_the_reason() {
    let failed = async |module: &str| match tokens(&Module::new(module), settings(&[])).await {
        Err(DeviceError::Failed(why)) => why,
        other => panic!("{other:?}"),
    };
    let missing = failed("/nonexistent/module.so").await;
    assert!(missing.contains("/nonexistent/module.so") && missing.contains("No such file"), "{missing}");
    let text = failed("/etc/passwd").await;
    assert!(text.contains("/etc/passwd"), "{text}");
    let other = failed(library("libcrypto.so.3").to_str().unwrap()).await;
    assert!(other.contains("it is no PKCS#11 module"), "{other}");
    // Its configuration names a directory that is not there.
    let dir = TempDir::with_prefix("strongroom-softhsm-").unwrap();
    let conf = dir.path().join("softhsm2.conf");
    fs::write(&conf, "directories.tokendir = /nonexistent\n").unwrap();
    let refused = tokens(&Module::new(MODULE), settings(&[("SOFTHSM2_CONF", &conf)])).await;
    assert!(
        matches!(&refused, Err(DeviceError::Failed(why)) if why.contains("C_Initialize answered CKR_")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_module_that_hangs_or_ends_the_process_costs_no_more_than_its_time() {
    let hang = module("hang", "for (;;) pause();");
    let short = HostSettings { open_timeout: Duration::from_millis(500), ..settings(&[]) };
    assert_eq!(tokens(&Module::new(hang.path().join("module.so")), short).await, Err(DeviceError::Timeout));

    let crash = module("crash", "abort();");
    let crashed = tokens(&Module::new(crash.path().join("module.so")), settings(&[])).await;
    assert!(matches!(&crashed, Err(DeviceError::Failed(why)) if why.contains("SIGABRT")), "{crashed:?}");

    let exit = module("exit", "exit(3);");
    let exited = tokens(&Module::new(exit.path().join("module.so")), settings(&[])).await;
    assert!(matches!(&exited, Err(DeviceError::Failed(why)) if why.contains("exited with code 3")), "{exited:?}");
}

/// A library that does this as soon as it is asked for its functions.
fn module(name: &str, body: &str) -> TempDir {
    let dir = TempDir::with_prefix(format!("strongroom-{name}-")).unwrap();
    let source = format!(
        "#include <stdlib.h>\n#include <unistd.h>\nunsigned long C_GetFunctionList(void **list) {{ {body} return 5; }}\n"
    );
    fs::write(dir.path().join("module.c"), source).unwrap();
    run(command("gcc", dir.path()).args(["-shared", "-fPIC", "-o", "module.so", "module.c"])).ok();
    dir
}
