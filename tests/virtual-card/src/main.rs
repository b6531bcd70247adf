//! An OpenPGP card in software: opcard on Trussed's virtual platform, behind vpcd.
//!
//! ```text
//! virtual-card --port PORT --state DIR [--serial HEX] [--manufacturer HEX] [--touch …] [--delay …] [--exit-on …] [--hang-on …]
//! ```
//!
//! The process is the card: it is in the reader while the process lives. It says what happens on standard output, one event
//! in a line: `ready` (in the reader), `alone` (pcscd is gone), `power on`, `power off`, `reset`, `touch` (one is wanted),
//! `hang INS`, `exit INS`, `obeyed …`, `apdu INS STATUS …`.
//! It obeys lines on standard input, which are the last four options without their dashes ([`control::Control::obey`]), and
//! ends with standard input.

mod control;
mod dispatch;
mod transport;

use std::{
    error::Error,
    fs, io,
    net::{Ipv4Addr, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    process, thread,
    time::Duration,
};

use rand_core::SeedableRng as _;
use trussed::{
    platform::Platform as _,
    virt::{self, StorageConfig, StoreConfig},
};
use vpicc::VSmartCard as _;

use crate::{control::Control, dispatch::Dispatch, transport::Transport};

struct Arguments {
    port: u16,
    state: PathBuf,
    serial: u32,
    manufacturer: u16,
}

fn main() -> Result<(), Box<dyn Error>> {
    env_logger::init();
    let control = Control::default();
    let arguments = arguments(&control)?;
    obey_standard_input(control.clone());
    fs::create_dir_all(&arguments.state)?;
    let store = StoreConfig {
        internal: StorageConfig::filesystem(arguments.state.join("internal.lfs")),
        external: StorageConfig::filesystem(arguments.state.join("external.lfs")),
        volatile: StorageConfig::ram(),
    };
    virt::with_platform(store, |mut platform| {
        // Trussed's own is seeded with a constant: every card would make the same keys.
        *platform.rng() = rand_chacha::ChaCha8Rng::from_entropy();
        platform.user_interface().set_inner(Box::new(control.clone()));
        let dispatch = Dispatch::new(b"a card for tests");
        platform.run_client_with_backends("opcard", dispatch, dispatch::BACKENDS, |client| {
            let mut options = opcard::Options::default();
            options.serial = arguments.serial.to_be_bytes();
            options.manufacturer = arguments.manufacturer.to_be_bytes();
            serve(Transport::new(opcard::Card::new(client, options), control), arguments.port)
        })
    })?;
    Ok(())
}

fn arguments(control: &Control) -> Result<Arguments, Box<dyn Error>> {
    let (mut port, mut state, mut serial, mut manufacturer) = (None, None, 1, 0);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--port" => port = Some(value.parse()?),
            "--state" => state = Some(value.into()),
            "--serial" => serial = u32::from_str_radix(&value, 16)?,
            "--manufacturer" => manufacturer = u16::from_str_radix(&value, 16)?,
            _ => control.obey(word.strip_prefix("--").ok_or("options begin with --")?, &value)?,
        }
    }
    Ok(Arguments {
        port: port.ok_or("--port is needed")?,
        state: state.ok_or("--state is needed")?,
        serial,
        manufacturer,
    })
}

/// Obeys until standard input ends, which ends the card: a test that is gone leaves none behind.
fn obey_standard_input(control: Control) {
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            let (command, value) = line.split_once(' ').unwrap_or((&line, ""));
            if let Err(error) = control.obey(command, value) {
                eprintln!("{line}: {error}");
                process::exit(1);
            }
            println!("obeyed {line}");
        }
        process::exit(0);
    });
}

/// Puts the card into the reader and answers, for ever: when pcscd is gone the card is still where it was, and the next pcscd
/// finds it.
fn serve<T: opcard::Client>(mut card: Transport<T>, port: u16) -> io::Result<()> {
    loop {
        // Nobody announces that vpcd listens.
        let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        stream.set_nodelay(true)?;
        let fd = stream.as_raw_fd();
        let mut reader = vpicc::Connection::from(stream);
        println!("ready");
        let error = loop {
            acknowledge_at_once(fd)?;
            if let Err(error) = reader.poll(&mut card) {
                break error;
            }
        };
        println!("alone: {error}");
        card.power_off();
    }
}

/// vpcd writes length and payload apart: without this each command waits 40 ms for a delayed acknowledgement. The kernel
/// forgets it with every use.
fn acknowledge_at_once(fd: i32) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).expect("a small number");
    // SAFETY: the pointer is to an integer of the length that is passed, and the socket is open.
    let result = unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_QUICKACK, (&raw const on).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
