//! The scripted device, in this process and in one of its own.

use std::sync::Arc;

use strongroom::devices::{
    Device, Driver, Settings,
    in_process::InProcess as Engine,
    scripted::{Control, Script, Scripted},
};

use crate::subject::{Fault, Faulty, HasPin, Removable, Subject};

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
    async fn with(script: &str, settings: Settings) -> Self {
        let control = Control::new(Script::parse(script).unwrap());
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
        Self::with(SCRIPT, settings).await
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
        Self::with(&format!("locked = true\n{SCRIPT}"), settings).await
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
