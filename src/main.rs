//! Which program this is: `ssh-agent` by name or by first argument, `strongroom` otherwise.

use std::{path::Path, process::ExitCode};

use strongroom::{cli, ssh_agent};

fn main() -> ExitCode {
    let mut args = std::env::args_os().peekable();
    let name = args.next().unwrap_or_default();
    let drop_in = Path::new(&name).file_name().is_some_and(|name| name == "ssh-agent");
    if drop_in || args.next_if(|first| first == "ssh-agent").is_some() {
        return ssh_agent::main(args);
    }
    cli::main(std::env::args_os())
}
