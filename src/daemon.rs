//! stub
#![allow(missing_docs)]
use crate::{
    agent::{door::Door, session},
    config::Config,
    prompt::{self, Prompter},
    public_key::FingerprintHash,
    vault::{Settings, Vault, policy::Rules},
};
use std::{io, os::unix::net::UnixListener, sync::Arc, time::Duration};
use tokio::signal::unix::{SignalKind, signal};

pub struct AgentOptions {
    pub default_lifetime: Option<Duration>,
    pub fingerprint_hash: FingerprintHash,
    pub allowed_providers: String,
    pub allow_remote_pkcs11: bool,
    pub restrict_websafe: bool,
    pub websafe_allow: Option<String>,
}
pub struct Foreground {
    pub interactive: bool,
    pub debug: bool,
    pub parent: Option<i32>,
}
pub enum Ended {
    Terminated,
    HungUp,
    Interrupted,
    ParentGone,
}
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("stub")]
    Stub,
}
pub fn run_agent(_c: Config) -> Result<(), DaemonError> {
    Err(DaemonError::Stub)
}
pub fn serve_ssh_agent(
    listener: UnixListener,
    o: AgentOptions,
    f: Foreground,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<Ended> {
    let rt = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if f.interactive {
        tracing_subscriber::fmt()
            .with_writer(io::stderr)
            .with_max_level(if f.debug { tracing::Level::DEBUG } else { tracing::Level::INFO })
            .init();
    }
    rt.block_on(async move {
        listener.set_nonblocking(true)?;
        let l = tokio::net::UnixListener::from_std(listener)?;
        let v = Vault::new(
            Settings {
                rules: Rules {
                    restrict_websafe: o.restrict_websafe,
                    websafe_allow: o.websafe_allow,
                    fingerprint_hash: o.fingerprint_hash,
                },
                default_lifetime: o.default_lifetime,
                allowed_providers: o.allowed_providers,
                allow_remote_providers: o.allow_remote_pkcs11,
            },
            Prompter::new(prompt::Settings::default()),
        );
        let (mut t, mut h, mut i, mut u) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::user_defined1())?,
        );
        let v2 = v.clone();
        tokio::spawn(async move { v2.expire().await });
        let v3 = v.clone();
        tokio::spawn(async move {
            let door = Arc::new(Door::ssh_agent());
            loop {
                if let Ok((s, _)) = l.accept().await {
                    if let Some(c) = s.peer_cred().ok().and_then(|c| door.admit(c)) {
                        tokio::spawn(session::serve(s, v3.clone(), door.clone(), c));
                    }
                }
            }
        });
        ready()?;
        let parent = async {
            match f.parent {
                Some(p) => {
                    let _ = crate::sys::process::parent_gone(p).await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::pin!(parent);
        loop {
            tokio::select! {
                _ = t.recv() => return Ok(Ended::Terminated), _ = h.recv() => return Ok(Ended::HungUp),
                _ = i.recv() => if f.interactive { return Ok(Ended::Interrupted) }, _ = u.recv() => v.wipe(),
                () = &mut parent => return Ok(Ended::ParentGone),
            }
        }
    })
}
