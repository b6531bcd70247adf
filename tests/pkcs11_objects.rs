//! What there must be on a token for a key to be one: half a pair, a certificate beside it, few mechanisms.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod support;

use strongroom::agent::message::{Code, DeviceEntry, KeyEntry, Page, Request};
use support::{
    client::{Client, SIGN_REQUEST, SIGN_RESPONSE, message},
    command,
    daemon::{Daemon, Home},
    eventually, run,
    service::{Bytes, first_page, ssh, unlock, use_key},
    softhsm::{PIN, SoftHsm},
};

/// A daemon with the token `vault` as its device `hsm`, which is logged in to.
fn start<'a>(hsm: &SoftHsm, home: &'a mut Home) -> Daemon<'a> {
    home.configure(&hsm.device("hsm", "vault", ""));
    let daemon = home.start();
    let mut client = daemon.connect_service();
    eventually("the device is unlocked", || client.ask(&unlock("hsm", PIN)).read::<()>().is_ok());
    daemon
}

/// The key with this comment: its blob and the schemes that it signs by.
fn key(daemon: &Daemon<'_>, comment: &str) -> (Vec<u8>, Vec<String>) {
    let mut found = None;
    eventually(&format!("{comment:?} is listed"), || {
        let reply = daemon.connect_service().ask(&Request::Keys(first_page(0)));
        let page: Page<KeyEntry<'_>> = reply.ok();
        let key = page.entries.iter().find(|key| key.comment == comment.as_bytes());
        found = key.map(|key| (key.blob.to_vec(), key.signs.iter().map(|&name| name.to_owned()).collect()));
        found.is_some()
    });
    found.unwrap()
}

fn signs(client: &mut Client, key: &[u8]) -> bool {
    client.ask(&use_key(ssh(key, b"data"), 0)).read::<Bytes>().is_ok()
}

fn tool(hsm: &SoftHsm, words: &str) {
    run(hsm.pkcs11_tool("vault").args(words.split(' '))).ok();
}

fn openssl(hsm: &SoftHsm, words: &str) {
    run(command("openssl", &hsm.path("")).args(words.split(' '))).ok();
}

#[test]
fn a_private_key_alone_is_found_where_it_tells_its_public_half() {
    let hsm = SoftHsm::with_token("vault");
    for (key_type, id) in [("rsa:2048", "01"), ("EC:prime256v1", "02")] {
        hsm.generate("vault", key_type, id, key_type, &[]);
        tool(&hsm, &format!("--delete-object --type pubkey --id {id}"));
    }
    let mut home = Home::new();
    let daemon = start(&hsm, &mut home);
    let (rsa, _) = key(&daemon, "rsa:2048");
    assert!(signs(&mut daemon.connect_service(), &rsa));
    // An EC key on SoftHSM does not tell it, and nothing else there does.
    eventually("the reason is told", || {
        let reply = daemon.connect_service().ask(&Request::Devices(first_page(0)));
        let page: Page<DeviceEntry<'_>> = reply.ok();
        let why = "the key \"EC:prime256v1\" is left out: nothing on the token tells its public key";
        page.entries[0].notes.contains(&why)
    });
    assert_eq!(daemon.connect().list().len(), 1);
}

#[test]
fn a_certificate_tells_a_key_and_names_it() {
    let hsm = SoftHsm::with_token("vault");
    openssl(&hsm, "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -outform DER -out key.der");
    openssl(&hsm, "req -x509 -new -key key.der -keyform DER -subj /CN=authority -outform DER -out cert.der");
    tool(&hsm, &format!("--write-object {} --type privkey --id 07", hsm.path("key.der").display()));
    tool(&hsm, &format!("--write-object {} --type cert --id 07", hsm.path("cert.der").display()));
    let mut home = Home::new();
    let daemon = start(&hsm, &mut home);
    // The certificate has no label either: it is called by its subject's common name.
    let (blob, _) = key(&daemon, "authority");
    assert!(signs(&mut daemon.connect_service(), &blob));
}

#[test]
fn what_the_key_is_not_allowed_to_do_is_not_offered() {
    let hsm = SoftHsm::with_token("vault");
    hsm.generate("vault", "rsa:2048", "01", "hashes itself", &["--allowed-mechanisms", "SHA256-RSA-PKCS"]);
    hsm.generate("vault", "rsa:2048", "02", "any", &[]);
    let mut home = Home::new();
    let daemon = start(&hsm, &mut home);
    let mut client = daemon.connect_service();
    let (blob, schemes) = key(&daemon, "hashes itself");
    assert_eq!(schemes.iter().filter(|name| *name != "ssh").count(), 1, "{schemes:?}");
    let (_, all) = key(&daemon, "any");
    assert!(all.len() > 6, "{all:?}");
    // The token's own hash is used; of what ssh asks without a flag, ssh-rsa, there is nothing.
    let mut body = message(SIGN_REQUEST, &[&blob, b"data"]);
    body.extend([0, 0, 0, 2]);
    assert_eq!(client.request(&body)[0], SIGN_RESPONSE);
    assert_eq!(client.ask(&use_key(ssh(&blob, b"data"), 0)).failure().code, Code::Unsupported);
}
