//! The log: where its lines go, how they look, and that writing them makes nothing wait.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::unix::net::UnixDatagram;
use std::{env, str::FromStr};

use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata, Subscriber};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::fmt::{MakeWriter, layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry, registry::LookupSpan, reload, util::SubscriberInitExt};

/// Lines that wait for a slow reader of standard error; further ones are lost.
const WAITING_LINES: usize = 1024;
/// Overrides the configured level.
const LEVEL_VARIABLE: &str = "STRONGROOM_LOG";
/// Where syslog listens.
const SYSLOG: &str = "/dev/log";
/// LOG_AUTH of syslog(3), in its place within a priority.
const FACILITY_AUTH: u8 = 4 << 3;

/// Where the lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard error, with the time unless the journal adds it.
    Stderr,
    /// The system's log, as ssh-agent. Where there is none, nothing is written.
    Syslog,
}

/// The log of this process. Dropping it writes what still waits, for at most about a second.
pub struct Log {
    set_level: Box<dyn Fn(LevelFilter)>,
    _writer: Option<WorkerGuard>,
}

impl Log {
    /// Begins the log of this process; only the first call in a process does. Starts a thread.
    pub fn start(target: Target, level: LevelFilter) -> Self {
        let (layer, writer) = match target {
            Target::Stderr => stderr_layer(),
            Target::Syslog => (syslog_layer(), None),
        };
        let (filter, handle) = reload::Layer::new(level);
        // A log is there already only in a process that began one before, and goes on in its form.
        let _ = tracing_subscriber::registry().with(layer).with(filter).try_init();
        // Fails only when the subscriber is gone, and with it all lines.
        let set_level = Box::new(move |level| drop(handle.reload(level)));
        Self { set_level, _writer: writer }
    }

    /// Writes from now on what is at least as important as `level`.
    pub fn set_level(&self, level: LevelFilter) {
        (self.set_level)(level);
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Log")
    }
}

/// The level to log at: `STRONGROOM_LOG` where it is one, or else the configured one.
pub fn level(configured: &str) -> LevelFilter {
    let parse = |text: &str| LevelFilter::from_str(text).ok();
    let wanted = env::var(LEVEL_VARIABLE).ok().and_then(|text| parse(&text));
    wanted.or_else(|| parse(configured)).unwrap_or(LevelFilter::INFO)
}

type BoxedLayer = Box<dyn Layer<Registry> + Send + Sync>;

fn stderr_layer() -> (BoxedLayer, Option<WorkerGuard>) {
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(io::stderr());
    let layer = layer().with_writer(writer).with_ansi(io::stderr().is_terminal()).with_target(false);
    let layer = if env::var_os("JOURNAL_STREAM").is_some() { layer.without_time().boxed() } else { layer.boxed() };
    (layer, Some(guard))
}

fn syslog_layer() -> BoxedLayer {
    match UnixDatagram::unbound().and_then(|socket| socket.set_nonblocking(true).map(|()| socket)) {
        Ok(socket) => plain(Syslog { socket, pid: std::process::id() }),
        Err(_) => plain(io::sink),
    }
}

/// Text alone: syslog adds time and level.
fn plain<S, W>(writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    layer().with_writer(writer).with_ansi(false).with_target(false).with_level(false).without_time().boxed()
}

/// Sends each line to syslog. It is addressed anew each time, so that a syslog that starts again is found again.
struct Syslog {
    socket: UnixDatagram,
    pid: u32,
}

struct SyslogLine<'a> {
    syslog: &'a Syslog,
    severity: u8,
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = SyslogLine<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        SyslogLine { syslog: self, severity: severity(Level::INFO) }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        SyslogLine { syslog: self, severity: severity(*meta.level()) }
    }
}

impl Write for SyslogLine<'_> {
    /// One call is one line: that is how the formatter writes. What syslog does not take at once is lost.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let message = message(self.severity, self.syslog.pid, text.trim_end());
        let _ = self.syslog.socket.send_to(message.as_bytes(), SYSLOG);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A message as syslog(3) sends it, less the time, which the receiver adds.
fn message(severity: u8, pid: u32, text: &str) -> String {
    format!("<{}>ssh-agent[{pid}]: {text}", FACILITY_AUTH | severity)
}

/// The level in the words of syslog(3): LOG_ERR to LOG_DEBUG.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_syslog_message_has_priority_name_and_process() {
        assert_eq!(message(severity(Level::WARN), 42, "locked"), "<36>ssh-agent[42]: locked");
        assert_eq!(message(severity(Level::TRACE), 1, ""), "<39>ssh-agent[1]: ");
    }

    #[test]
    fn every_configured_level_is_one() {
        for name in ["error", "warn", "info", "debug", "trace"] {
            assert_eq!(LevelFilter::from_str(name).unwrap().to_string(), name);
        }
    }
}
