//! Builds the vault, listens, and serves until a signal: what `strongroom agent` and the drop-in have in common.
#![allow(missing_docs)]

use std::io;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};

pub struct AgentOptions {
    pub default_lifetime: Option<Duration>,
    pub fingerprint_hash: crate::public_key::FingerprintHash,
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

/// Serves until told to end.
pub fn serve_ssh_agent(
    listener: UnixListener,
    _options: AgentOptions,
    foreground: Foreground,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<Ended> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async move {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let parent_gone = async {
            match foreground.parent {
                Some(pid) => crate::sys::process::parent_gone(pid).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(parent_gone);
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        ready()?;
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(Ended::Terminated),
                _ = hang_up.recv() => return Ok(Ended::HungUp),
                _ = interrupt.recv() => if foreground.interactive { return Ok(Ended::Interrupted) },
                gone = &mut parent_gone => return gone.map(|()| Ended::ParentGone),
                accepted = listener.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(answer(stream));
                    }
                }
            }
        }
    })
}

async fn answer(mut stream: tokio::net::UnixStream) -> io::Result<()> {
    loop {
        let mut body = vec![0; stream.read_u32().await?.min(1 << 18) as usize];
        stream.read_exact(&mut body).await?;
        let reply: &[u8] = if body.first() == Some(&11) { &[0, 0, 0, 5, 12, 0, 0, 0, 0] } else { &[0, 0, 0, 1, 5] };
        stream.write_all(reply).await?;
    }
}
