//! Showing something again and again: on a terminal in place, without flicker; elsewhere line by line. Ends on Ctrl-C and
//! on SIGTERM, and leaves the terminal as it was.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use rustix::termios::tcgetwinsize;
use tokio::{
    select,
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use super::{
    CliError,
    output::{print, stdout},
};

/// Another screen than the one with the shell's lines, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// Shows what `look` says on the whole screen, every `pause`.
pub(super) async fn screen(
    pause: Duration,
    look: impl AsyncFnMut() -> Result<String, CliError>,
) -> Result<(), CliError> {
    if !io::stdout().is_terminal() {
        return Err(CliError::Usage("--watch is for a terminal; use --json to watch from a program".to_owned()));
    }
    let mut signals = Signals::new().map_err(CliError::Runtime)?;
    print(ENTER)?;
    let ended = repeat(pause, &mut signals, look, |text| stdout(frame(text, size()).as_bytes())).await;
    print(LEAVE)?;
    ended
}

/// Prints what `look` says, every `pause`.
pub(super) async fn lines(
    pause: Duration,
    look: impl AsyncFnMut() -> Result<String, CliError>,
) -> Result<(), CliError> {
    repeat(pause, &mut Signals::new().map_err(CliError::Runtime)?, look, print).await
}

async fn repeat(
    pause: Duration,
    signals: &mut Signals,
    mut look: impl AsyncFnMut() -> Result<String, CliError>,
    show: impl Fn(&str) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let mut ticks = interval(pause);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        select! {
            () = end(&mut signals.ends) => return Ok(()),
            _ = signals.resized.recv() => {}
            _ = ticks.tick() => {}
        }
        let text = select! {
            () = end(&mut signals.ends) => return Ok(()),
            text = look() => text?,
        };
        show(&text)?;
    }
}

struct Signals {
    ends: [Signal; 3],
    resized: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        let ends = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        let [interrupt, terminate, hangup] = ends;
        Ok(Self { ends: [interrupt?, terminate?, hangup?], resized: signal(SignalKind::window_change())? })
    }
}

/// Waits for a signal that asks for the end.
async fn end([interrupt, terminate, hangup]: &mut [Signal; 3]) {
    select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}

/// Columns and rows.
fn size() -> (usize, usize) {
    tcgetwinsize(io::stdout())
        .ok()
        .map(|size| (usize::from(size.ws_col), usize::from(size.ws_row)))
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
        .unwrap_or((80, 24))
}

/// What puts a text on the screen in one write, over the one before: each line is cut to the screen and ends with what
/// erases the rest of it, so that nothing is blank in between.
fn frame(text: &str, (columns, rows): (usize, usize)) -> String {
    let lines: Vec<String> = text.lines().take(rows).map(|line| line.chars().take(columns).collect()).collect();
    format!("\x1b[H{}\x1b[K\x1b[J", lines.join("\x1b[K\r\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_fits_the_screen_and_clears_what_was_there() {
        assert_eq!(frame("one\nlonger\nthird\n", (4, 2)), "\x1b[Hone\x1b[K\r\nlong\x1b[K\x1b[J");
        assert_eq!(frame("", (80, 24)), "\x1b[H\x1b[K\x1b[J");
    }
}
