//! Strongroom: a signing vault that speaks the ssh-agent protocol (RFC 9987).
//!
//! Imports point one way: `main` → `cli`, `ssh_agent`, `daemon` → `agent` → `vault` → `devices`. docs/architecture.md
//! follows a request through these modules.

pub mod agent;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod devices;
pub mod log;
pub mod prompt;
pub mod public_key;
pub mod rfc4251;
pub mod ssh_agent;
pub mod sys;
pub mod vault;
