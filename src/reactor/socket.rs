//! A socket in the reactor's set: reads, writes and accepts as far as it is ready, and knows from the set when it is again.

use std::{
    future::poll_fn,
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    io::Errno,
    net::{RecvFlags, SendFlags, Shutdown, SocketFlags, accept_with, recv, send, shutdown},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{HERE, Here, Shared};

/// What the set tells of a socket: that there is something to read, or that its peer writes no more; each once.
pub(super) const TOLD: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

/// What a socket is ready for, as far as the set has told. Whoever serves the socket is polled when that changes.
pub(super) struct Ready {
    id: u64,
    shared: Arc<Shared>,
    /// Whether there may be something to read, or to accept.
    readable: AtomicBool,
    /// Whether the peer writes no more, so that what is to be read ends.
    is_at_end: AtomicBool,
    /// Whether it had no room for what was written.
    is_full: AtomicBool,
}

impl Ready {
    /// Of a socket that is told of as `id`.
    pub(super) fn new(id: u64, shared: Arc<Shared>) -> Self {
        let [readable, is_at_end, is_full] = [const { AtomicBool::new(false) }; 3];
        Self { id, shared, readable, is_at_end, is_full }
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The set has told this of it.
    pub(super) fn note(&self, flags: EventFlags) {
        let broken = EventFlags::HUP | EventFlags::ERR;
        if flags.intersects(EventFlags::RDHUP | broken) {
            self.is_at_end.store(true, Ordering::Release);
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | broken) {
            self.readable.store(true, Ordering::Release);
        }
        if flags.intersects(EventFlags::OUT | broken) {
            self.is_full.store(false, Ordering::Release);
        }
    }
}

/// A listening socket.
pub struct Listener {
    socket: Arc<OwnedFd>,
    ready: Arc<Ready>,
}

impl Listener {
    pub(super) fn new(socket: Arc<OwnedFd>, ready: Arc<Ready>) -> Self {
        Self { socket, ready }
    }

    /// The next connection; or an error of accept(2), after which it can be tried again.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        poll_fn(|_| {
            // Before the call: what comes meanwhile makes it true again.
            if !self.ready.readable.swap(false, Ordering::AcqRel) {
                return Poll::Pending;
            }
            match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Err(Errno::AGAIN) => Poll::Pending,
                accepted => {
                    self.ready.readable.store(true, Ordering::Release);
                    Poll::Ready(accepted.map_err(io::Error::from))
                }
            }
        })
        .await
    }
}

/// A connection, which ends when it and its [writer](Socket::writer) are dropped. It needs no waker.
pub struct Socket {
    socket: Arc<OwnedFd>,
    ready: Arc<Ready>,
    /// Whether the set tells of room for writing.
    is_told_of_room: bool,
}

impl Socket {
    pub(super) fn new(socket: Arc<OwnedFd>, ready: Arc<Ready>) -> Self {
        Self { socket, ready, is_told_of_room: false }
    }

    /// For those who write without waiting.
    pub fn writer(&self) -> SocketWriter {
        SocketWriter(Arc::clone(&self.socket))
    }

    /// Has the set tell of room for writing too, at once if there is some; or no longer.
    fn have_told_of_room(&mut self, wanted: bool) -> io::Result<()> {
        let flags = if wanted { TOLD | EventFlags::OUT } else { TOLD };
        epoll::modify(&self.ready.shared.set, &self.socket, EventData::new_u64(self.ready.id), flags)?;
        self.is_told_of_room = wanted;
        Ok(())
    }
}

/// Writes to a [`Socket`] from elsewhere.
pub struct SocketWriter(Arc<OwnedFd>);

impl SocketWriter {
    /// Writes as much as there is room for.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(&self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    /// Ends the connection in both directions.
    pub fn hang_up(&self) {
        // It fails where the peer was first.
        let _ = shutdown(&self.0, Shutdown::Both);
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let ready = &self.ready;
        // Before the call: what comes meanwhile makes it true again.
        if !ready.readable.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        // Whoever has something to read goes on when what it has woken has had its turn.
        if HERE.with(Here::has_next) {
            ready.readable.store(true, Ordering::Release);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let room = buffer.initialize_unfilled();
        let size = room.len();
        match recv(&self.socket, room, RecvFlags::DONTWAIT) {
            Ok((n, _)) => {
                // Less than there was room for is all that there was, but for the end, which may have been told together
                // with what came before it.
                if n == size || ready.is_at_end.load(Ordering::Acquire) {
                    ready.readable.store(true, Ordering::Release);
                }
                buffer.advance(n);
                Poll::Ready(Ok(()))
            }
            Err(Errno::AGAIN) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ready.is_full.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let sent = send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        let is_full = sent == Err(Errno::AGAIN);
        if is_full {
            self.ready.is_full.store(true, Ordering::Release);
        }
        // Otherwise every reply that the peer takes would wake a thread.
        if is_full || self.is_told_of_room {
            self.have_told_of_room(is_full)?;
        }
        if is_full { Poll::Pending } else { Poll::Ready(sent.map_err(io::Error::from)) }
    }

    /// What was written has left.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Dropping it does that.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
