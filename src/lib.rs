//! Strongroom: a signing vault that speaks the ssh-agent protocol (RFC 9987).
//!
//! Imports point one way: `main` → `cli`, `ssh_agent`, `daemon` → `agent` → `vault` → `devices`. docs/architecture.md
//! follows a request through these modules. [`client`] is for programs that ask, and stands beside `cli`.

pub mod age;
pub mod agent;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod dbus;
pub mod der;
pub mod devices;
pub mod jwk;
pub mod key_file;
pub mod log;
pub mod prompt;
pub mod public_key;
pub mod reactor;
pub mod rfc4251;
pub mod spki;
pub mod ssh_agent;
pub mod sys;
pub mod vault;
