//! The scripted device, in this process and in one of its own.

use std::{fs, sync::Arc};

use strongroom::{
    devices::{
        Algorithm, Device, Driver, NewKey, Settings,
        host::{Host, HostSettings},
        in_process::InProcess as Engine,
        scripted::{Control, Script, Scripted},
    },
    public_key::Curve,
};
use tempfile::TempDir;

use crate::{
    subject::{Fault, Faulty, HasPin, MakesKeys, Removable, Subject},
    support::reactor::engine,
};

/// Every fault waits for its control.
const SCRIPT: &str = "
lanes = 4
[pin]
value = '123456'
[[key]]
slot = 'ed25519'
type = 'ed25519'
[[key]]
slot = 'p256'
type = 'p256'
[[key]]
slot = 'rsa'
type = 'rsa'
[[rule]]
on = 'sign'
when = 'hang'
do = 'hang'
[[rule]]
on = 'sign'
when = 'wrong'
do = 'wrong'
[[rule]]
on = 'sign'
when = 'swapped'
do = 'swapped'
[[rule]]
on = 'sign'
when = 'garbage'
do = 'garbage'
[[rule]]
on = 'sign'
when = 'crash'
do = { crash = 'abort' }
";
/// All that RSA, P-256 and Ed25519 keys do.
const SCHEMES: usize = 13;
const LOCKED: &str = "locked = true";

fn control_of(fault: Fault) -> &'static str {
    match fault {
        Fault::Hang => "hang",
        Fault::Wrong => "wrong",
        Fault::Swapped => "swapped",
        Fault::Garbage => "garbage",
        Fault::Crash => "crash",
    }
}

/// In this process.
pub(crate) struct InProcess {
    control: Arc<Control>,
    device: Device,
}

impl InProcess {
    async fn with(first: &str, settings: Settings) -> Self {
        let control = Control::new(Script::parse(&format!("{first}\n{SCRIPT}")).unwrap());
        let config = Arc::clone(&control);
        let engine = Engine::<Scripted>::new(move || Arc::clone(&config));
        let subject = Self { control, device: Device::start("scripted", Scripted::KIND, settings, engine) };
        subject.ready().await;
        subject
    }
}

impl Subject for InProcess {
    const SCHEMES: usize = SCHEMES;

    async fn start(settings: Settings) -> Self {
        Self::with("", settings).await
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl HasPin for InProcess {
    const PIN: &'static str = "123456";
    const WRONG: &'static str = "654321";
    const TRIES: u8 = 3;

    async fn start_locked(settings: Settings) -> Self {
        Self::with(LOCKED, settings).await
    }
}

impl Removable for InProcess {
    fn remove(&self) {
        self.control.set("absent", 1).unwrap();
    }

    fn put_back(&self) {
        self.control.clear("absent").unwrap();
    }
}

impl Faulty for InProcess {
    fn fail(&self, fault: Fault, fails: bool) {
        if fails {
            self.control.set(control_of(fault), 1).unwrap();
        } else {
            self.control.clear(control_of(fault)).unwrap();
        }
    }
}

impl MakesKeys for InProcess {
    fn new_keys() -> Vec<NewKey> {
        let algorithms = [Algorithm::Ed25519, Algorithm::Ecdsa(Curve::P256)];
        algorithms.map(|algorithm| NewKey::new(format!("new {algorithm}"), algorithm)).into()
    }
}

/// In a process of its own.
pub(crate) struct InChild {
    /// Its controls.
    directory: TempDir,
    device: Device,
}

impl InChild {
    async fn with(first: &str, settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = format!("control = {:?}\n{first}\n{SCRIPT}", directory.path());
        let mut host = HostSettings::new("scripted");
        host.program = env!("CARGO_BIN_EXE_strongroom").into();
        let engine = engine(Host::new(Scripted::KIND, script.into_bytes(), host));
        let subject = Self { directory, device: Device::start("scripted", Scripted::KIND, settings, engine) };
        subject.ready().await;
        subject
    }

    fn set(&self, control: &str, set: bool) {
        let file = self.directory.path().join(control);
        if set { fs::write(file, "").unwrap() } else { fs::remove_file(file).unwrap() }
    }
}

impl Subject for InChild {
    const SCHEMES: usize = SCHEMES;

    async fn start(settings: Settings) -> Self {
        Self::with("", settings).await
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

impl HasPin for InChild {
    const PIN: &'static str = InProcess::PIN;
    const WRONG: &'static str = InProcess::WRONG;
    const TRIES: u8 = InProcess::TRIES;

    async fn start_locked(settings: Settings) -> Self {
        Self::with(LOCKED, settings).await
    }
}

impl MakesKeys for InChild {
    fn new_keys() -> Vec<NewKey> {
        InProcess::new_keys()
    }
}

impl Removable for InChild {
    fn remove(&self) {
        self.set("absent", true);
    }

    fn put_back(&self) {
        self.set("absent", false);
    }
}

impl Faulty for InChild {
    fn fail(&self, fault: Fault, fails: bool) {
        self.set(control_of(fault), fails);
    }
}
