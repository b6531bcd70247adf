//! Cards in a room of their own, with pcscd: what the drivers that want one are given. Knows no driver.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use tempfile::TempDir;

use crate::support::{
    pcsc::{Reader, Room},
    script,
};

/// A room that does what it is told. Its cards are tied to it: both live on a thread, which ends with this.
pub(crate) struct KeptRoom {
    orders: Mutex<Sender<Order>>,
    dir: TempDir,
}

/// A card that is in its reader until it is pulled.
pub(crate) struct CardInRoom {
    room: Arc<KeptRoom>,
    reader: Reader,
}

/// What is to be done at a reader, and whom to tell when it is.
struct Order {
    reader: Reader,
    act: Act,
    done: Sender<()>,
}

enum Act {
    /// A new card with a copy of these keys.
    Insert(&'static str),
    Pull,
    PutBack,
    /// Commands to the card, in hexadecimal.
    Send(&'static [&'static str]),
}

/// VERIFY with the admin's PIN; PUT DATA: the user's holds for many signatures.
const FOR_MANY_SIGNATURES: &[&str] = &["00200083083132333435363738", "00DA00C40101"];

impl KeptRoom {
    pub(crate) fn new() -> Self {
        let ((orders, inbox), (door, its_door)) = (channel(), channel());
        thread::spawn(move || {
            let room = Room::new();
            door.send(room.door(&std::env::temp_dir())).unwrap();
            keep(&room, &inbox);
        });
        let dir = TempDir::with_prefix("strongroom-conformance-").unwrap();
        let quoted: Vec<_> = its_door.recv().unwrap().iter().map(|word| format!("'{word}'")).collect();
        let line = format!("exec {} '{}' \"$@\"", quoted.join(" "), env!("CARGO_BIN_EXE_strongroom"));
        script(&program(dir.path()), &line);
        Self { orders: Mutex::new(orders), dir }
    }

    fn order(&self, reader: Reader, act: Act) {
        let (done, is_done) = channel();
        self.orders.lock().unwrap().send(Order { reader, act, done }).unwrap();
        is_done.recv().unwrap();
    }
}

/// Does in a room what is ordered.
fn keep(room: &Room, inbox: &Receiver<Order>) {
    let (mut plastic, mut cards) = (HashMap::new(), HashMap::new());
    for Order { reader, act, done } in inbox {
        match act {
            Act::Insert(keys) => {
                let card = room.card(&serial(reader).to_lowercase(), keys);
                cards.insert(reader.name(), room.insert(reader, &card));
                plastic.insert(reader.name(), card);
            }
            Act::Pull => cards.remove(reader.name()).unwrap().pull(),
            Act::Send(commands) => drop(room.probe(&[&["send", reader.name()], commands].concat())),
            Act::PutBack => drop(cards.insert(reader.name(), room.insert(reader, &plastic[reader.name()]))),
        }
        done.send(()).unwrap();
    }
}

impl CardInRoom {
    /// One with a copy of the keys in tests/fixtures/cards/`keys`, alone in a room.
    pub(crate) fn new(keys: &'static str) -> Self {
        Self::beside_others(Arc::new(KeptRoom::new()), Reader::A, keys)
    }

    /// The same in a room that may have others, in this reader.
    pub(crate) fn beside_others(room: Arc<KeptRoom>, reader: Reader, keys: &'static str) -> Self {
        room.order(reader, Act::Insert(keys));
        Self { room, reader }
    }

    /// Its serial number.
    pub(crate) fn serial(&self) -> &'static str {
        serial(self.reader)
    }

    /// The reader that it is in.
    pub(crate) fn reader(&self) -> Reader {
        self.reader
    }

    /// Strongroom behind the door of the room.
    pub(crate) fn program(&self) -> PathBuf {
        program(self.room.dir.path())
    }

    /// Has it take its PIN once for many signatures, which new cards do not.
    pub(crate) fn take_pin_for_many_signatures(&self) {
        self.room.order(self.reader, Act::Send(FOR_MANY_SIGNATURES));
    }

    /// Takes the card out of its reader.
    pub(crate) fn pull(&self) {
        self.room.order(self.reader, Act::Pull);
    }

    /// Puts it into the reader again.
    pub(crate) fn put_back(&self) {
        self.room.order(self.reader, Act::PutBack);
    }
}

fn serial(reader: Reader) -> &'static str {
    match reader {
        Reader::A => "00000A01",
        Reader::B => "00000A02",
    }
}

fn program(dir: &Path) -> PathBuf {
    dir.join("strongroom")
}
