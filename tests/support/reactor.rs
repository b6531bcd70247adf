//! A reactor for devices that have no daemon around them: one for the whole test program.

use std::sync::{LazyLock, Mutex};

use strongroom::{
    devices::host::{Host, HostEngine},
    reactor::Reactor,
};
use tokio::runtime::Runtime;

/// What runs this process's driver.
pub fn engine(host: Host) -> HostEngine {
    static REACTOR: LazyLock<Mutex<(Reactor, Runtime)>> = LazyLock::new(|| {
        let runtime = Runtime::new().unwrap();
        Mutex::new((Reactor::start(2, runtime.handle()).unwrap(), runtime))
    });
    HostEngine { host, reactor: REACTOR.lock().unwrap().0.registry().clone() }
}
