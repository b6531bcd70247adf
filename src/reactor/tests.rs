#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    time::Instant,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, Runtime},
    sync::{oneshot, watch},
    task::yield_now,
};

use super::*;

/// Longer than anything here takes, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(30);

struct Room {
    reactor: Reactor,
    // Behind the reactor, whose end needs it.
    _runtime: Runtime,
}

fn room(threads: usize) -> Room {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    Room { reactor: Reactor::start(threads, runtime.handle()).unwrap(), _runtime: runtime }
}

impl Room {
    /// The other end of a connection that `work` serves.
    fn serve<F>(&self, work: impl FnOnce(Socket, Ending) -> F) -> UnixStream
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        self.reactor.registry().serve(theirs.into(), work).unwrap();
        ours
    }

    fn echo(&self) -> UnixStream {
        self.serve(|socket, _| echo(socket))
    }

    /// A connection that holds its thread until the sender is used, then tells so and echoes. It does when this returns.
    fn hold(&self) -> (UnixStream, mpsc::Sender<()>) {
        let (begun, begins) = mpsc::channel();
        let (goes_on, go_on) = mpsc::channel();
        let mut stream = self.serve(|mut socket, _| async move {
            socket.read_u8().await.unwrap();
            begun.send(()).unwrap();
            go_on.recv().unwrap();
            socket.write_u8(1).await.unwrap();
            echo(socket).await;
        });
        stream.write_all(b"a").unwrap();
        begins.recv().unwrap();
        (stream, goes_on)
    }

    /// No task is wanted or being polled.
    fn is_soon_waiting(&self) {
        soon(|| self.reactor.registry.0.all().iter().all(|task| task.state.load(Ordering::Relaxed) == 0));
    }

    /// A connection is removed right after it has hung up.
    fn is_soon_empty(&self) {
        soon(|| self.reactor.registry.0.tasks().is_empty());
    }
}

async fn echo(mut socket: Socket) {
    let mut bytes = [0; 1024];
    while let Ok(n @ 1..) = socket.read(&mut bytes).await {
        if socket.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}

fn says(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    hears(stream, bytes);
}

fn hears(stream: &mut UnixStream, bytes: &[u8]) {
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, bytes);
}

fn soon(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(begin.elapsed() < PATIENCE);
        thread::yield_now();
    }
}

/// Reads until the other end is gone.
fn is_hung_up_on(stream: &mut UnixStream) {
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn every_connection_is_served_again_and_again() {
    let room = room(2);
    let mut streams: Vec<_> = (0..50).map(|_| room.echo()).collect();
    for round in 0..20u8 {
        for stream in &mut streams {
            stream.write_all(&[round; 700]).unwrap();
        }
        streams.iter_mut().for_each(|stream| hears(stream, &[round; 700]));
    }
}

#[test]
fn what_is_woken_while_no_thread_sleeps_is_polled_before_one_does() {
    let room = room(1);
    let (tell, told) = oneshot::channel();
    let mut waits = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        socket.write_u8(told.await.unwrap()).await.unwrap();
    });
    waits.write_all(b"a").unwrap();
    let (_held, goes_on) = room.hold();
    tell.send(7).unwrap();
    goes_on.send(()).unwrap();
    hears(&mut waits, &[7]);
}

#[test]
fn what_comes_while_a_connection_is_polled_is_not_missed() {
    let room = room(3);
    let (mut stream, goes_on) = room.hold();
    // It comes meanwhile, and is told of to another thread.
    stream.write_all(b"b").unwrap();
    // The others are awake, and have seen all that there is to see.
    let mut other = room.echo();
    says(&mut other, b"there?");
    goes_on.send(()).unwrap();
    hears(&mut stream, &[1]);
    hears(&mut stream, b"b");
    says(&mut stream, b"c");
}

#[test]
fn a_connection_that_keeps_its_thread_keeps_no_other_waiting() {
    let room = room(2);
    let (mut slow, goes_on) = room.hold();
    let mut streams: Vec<_> = (0..10).map(|_| room.echo()).collect();
    for stream in &mut streams {
        says(stream, b"not waiting");
    }
    goes_on.send(()).unwrap();
    hears(&mut slow, &[1]);
}

#[test]
fn a_peer_that_reads_late_gets_everything() {
    let room = room(2);
    let long: Vec<u8> = (0..3 << 20).map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let sent = long.clone();
    let (wrote, has_written) = oneshot::channel();
    let mut stream = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        socket.write_all(&sent).await.unwrap();
        wrote.send(()).unwrap();
        echo(socket).await;
    });
    stream.write_all(b"a").unwrap();
    // It cannot be done before something is read.
    let mut begin = [0; 10];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(begin, long[..10]);
    hears(&mut stream, &long[10..]);
    has_written.blocking_recv().unwrap();
    says(&mut stream, b"and goes on");
}

#[test]
fn what_is_waited_for_besides_the_socket_wakes_a_connection() {
    let room = room(1);
    let (tell, told) = oneshot::channel();
    let mut stream = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        socket.write_u8(1).await.unwrap();
        let byte = told.await.unwrap();
        tokio::time::sleep(Duration::from_millis(1)).await;
        socket.write_u8(byte).await.unwrap();
        echo(socket).await;
    });
    stream.write_all(b"a").unwrap();
    hears(&mut stream, &[1]);
    tell.send(7).unwrap();
    hears(&mut stream, &[7]);
    says(&mut stream, b"and goes on");
}

#[test]
fn all_that_are_woken_at_once_go_on() {
    let room = room(2);
    let (tell, told) = watch::channel(0);
    let mut streams: Vec<_> = (0..50)
        .map(|_| {
            let mut told = told.clone();
            room.serve(|mut socket, _| async move {
                // Begins to wait when it is first polled.
                socket.read_u8().await.unwrap();
                socket.write_u8(0).await.unwrap();
                while told.changed().await.is_ok() {
                    let byte = *told.borrow_and_update();
                    socket.write_u8(byte).await.unwrap();
                }
            })
        })
        .collect();
    for stream in &mut streams {
        stream.write_all(b"a").unwrap();
        hears(stream, &[0]);
    }
    for byte in 1..100 {
        tell.send(byte).unwrap();
        streams.iter_mut().for_each(|stream| hears(stream, &[byte]));
    }
    drop(tell);
    streams.iter_mut().for_each(is_hung_up_on);
}

#[test]
fn who_wants_another_turn_comes_behind_the_others() {
    let room = room(1);
    let mut greedy = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        loop {
            yield_now().await;
        }
    });
    greedy.write_all(b"a").unwrap();
    let mut stream = room.echo();
    for _ in 0..100 {
        says(&mut stream, b"a turn");
    }
}

#[test]
fn those_that_want_turn_after_turn_are_shared_by_the_threads() {
    let room = room(2);
    let (mut holding, goes_on) = room.hold();
    // All of them begin on the other thread.
    let threads = Arc::new(Mutex::new(HashSet::new()));
    let mut greedy: Vec<_> = (0..4)
        .map(|_| {
            let threads = Arc::clone(&threads);
            room.serve(|mut socket, _| async move {
                socket.read_u8().await.unwrap();
                socket.write_u8(0).await.unwrap();
                loop {
                    threads.lock().unwrap().insert(thread::current().id());
                    yield_now().await;
                }
            })
        })
        .collect();
    for stream in &mut greedy {
        stream.write_all(b"a").unwrap();
        hears(stream, &[0]);
    }
    assert!(threads.lock().unwrap().len() < 2);
    goes_on.send(()).unwrap();
    hears(&mut holding, &[1]);
    soon(|| threads.lock().unwrap().len() == 2);
}

#[test]
fn a_panic_ends_its_own_connection() {
    struct Bad;
    impl Drop for Bad {
        fn drop(&mut self) {
            panic!("as the test wants it, too");
        }
    }
    let room = room(1);
    let mut worse = room.serve(|socket, _| {
        let (mut socket, bad) = (socket, Bad);
        let mut read = Box::pin(async move {
            socket.read_u8().await.unwrap();
            panic!("as the test wants it");
        });
        std::future::poll_fn(move |cx| {
            let _ = &bad;
            read.as_mut().poll(cx)
        })
    });
    worse.write_all(b"a").unwrap();
    is_hung_up_on(&mut worse);
    let mut bad = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        panic!("as the test wants it");
    });
    let mut good = room.echo();
    bad.write_all(b"a").unwrap();
    is_hung_up_on(&mut bad);
    says(&mut good, b"well");
}

#[test]
fn nothing_is_left_of_a_connection_that_ended() {
    let room = room(2);
    let (ended, ends) = mpsc::channel();
    for _ in 0..20 {
        let ended = ended.clone();
        drop(room.serve(|socket, _| async move {
            echo(socket).await;
            ended.send(()).unwrap();
        }));
    }
    (0..20).for_each(|_| ends.recv_timeout(PATIENCE).unwrap());
    room.is_soon_empty();
}

#[test]
fn a_peer_that_writes_and_hangs_up_at_once_has_its_answer_and_is_gone() {
    let room = room(2);
    for writes_on in [false, true] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        // Both are told of as one.
        ours.write_all(b"a").unwrap();
        ours.shutdown(if writes_on { Shutdown::Write } else { Shutdown::Both }).unwrap();
        room.reactor.registry().serve(theirs.into(), |socket, _| echo(socket)).unwrap();
        if writes_on {
            hears(&mut ours, b"a");
            is_hung_up_on(&mut ours);
        }
        room.is_soon_empty();
    }
}

#[test]
fn at_the_end_everybody_is_told_and_who_does_not_listen_is_dropped() {
    let room = room(2);
    let mut polite = room.serve(|mut socket, ending| async move {
        ending.await;
        socket.write_all(b"bye").await.unwrap();
    });
    let mut deaf = room.serve(|mut socket, _| async move {
        socket.read_u8().await.unwrap();
        let _ = socket.write_all(&vec![0; 4 << 20]).await;
    });
    deaf.write_all(b"a").unwrap();
    let mut idle = room.echo();
    room.reactor.end();
    hears(&mut polite, b"bye");
    is_hung_up_on(&mut polite);
    let mut late = room.serve(|_, ending| ending);
    is_hung_up_on(&mut late);
    says(&mut idle, b"still there");
    room.reactor.cut_off();
    is_hung_up_on(&mut idle);
    let mut rest = Vec::new();
    deaf.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 4 << 20);
}

#[test]
fn what_is_no_clients_goes_on_until_the_reactor_is_dropped() {
    let room = room(2);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    room.reactor.registry().attend(theirs.into(), echo).unwrap();
    let (ask, asked) = mpsc::channel::<oneshot::Sender<u8>>();
    let (wake, mut woken) = watch::channel(());
    room.reactor.registry().spawn(async move {
        while woken.changed().await.is_ok() {
            asked.recv().unwrap().send(7).unwrap();
        }
    });
    let mut client = room.echo();
    room.reactor.end();
    room.reactor.cut_off();
    is_hung_up_on(&mut client);
    says(&mut ours, b"still there");
    let (answer, answered) = oneshot::channel();
    ask.send(answer).unwrap();
    wake.send(()).unwrap();
    assert_eq!(answered.blocking_recv(), Ok(7));
    let registry = room.reactor.registry().clone();
    drop(room.reactor);
    is_hung_up_on(&mut ours);
    assert!(wake.is_closed());
    // What comes later is dropped at once.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    registry.attend(theirs.into(), echo).unwrap();
    is_hung_up_on(&mut ours);
}

#[test]
fn who_has_woken_another_reads_on_when_that_has_had_its_turn() {
    let room = room(1);
    let (wake, mut woken) = watch::channel(());
    let (tell, told) = mpsc::channel();
    let heard = tell.clone();
    room.reactor.registry().spawn(async move {
        while woken.changed().await.is_ok() {
            heard.send('w').unwrap();
        }
    });
    let mut stream = room.serve(|mut socket, _| async move {
        // One read each: nothing is left of them in between.
        while socket.read_u8().await.is_ok() {
            tell.send('r').unwrap();
            wake.send(()).unwrap();
        }
    });
    // It waits from its first turn on.
    room.is_soon_waiting();
    stream.write_all(b"abc").unwrap();
    let order: String = (0..6).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(order, "rwrwrw");
}

#[test]
fn what_a_task_wakes_first_its_own_thread_polls_next_and_others_the_rest() {
    let room = room(3);
    let (pass, passed) = watch::channel(());
    let (tell, told) = mpsc::channel();
    for _ in 0..2 {
        let (mut passed, tell) = (passed.clone(), tell.clone());
        room.reactor.registry().spawn(async move {
            while passed.changed().await.is_ok() {
                tell.send(thread::current().id()).unwrap();
            }
        });
    }
    let (both, of_both) = mpsc::channel();
    let mut stream = room.serve(|mut socket, _| async move {
        while socket.read_u8().await.is_ok() {
            pass.send(()).unwrap();
            // One is polled meanwhile, the other when this has been.
            let other = told.recv_timeout(PATIENCE).unwrap();
            let own = thread::current().id();
            assert!(told.try_recv().is_err());
            assert_ne!(own, other);
            yield_now().await;
            both.send((own, told.recv_timeout(PATIENCE).unwrap())).unwrap();
        }
    });
    for _ in 0..50 {
        // Who is being polled is not woken.
        room.is_soon_waiting();
        stream.write_all(b"a").unwrap();
        let (own, next) = of_both.recv_timeout(PATIENCE).unwrap();
        assert_eq!(own, next);
    }
}

#[test]
fn tasks_that_wake_each_other_for_ever_leave_others_their_turns() {
    let room = room(1);
    let (ping, mut pinged) = watch::channel(());
    let (pong, mut ponged) = watch::channel(());
    room.reactor.registry().spawn(async move {
        while pinged.changed().await.is_ok() {
            pong.send(()).unwrap();
        }
    });
    room.reactor.registry().spawn(async move {
        ping.send(()).unwrap();
        while ponged.changed().await.is_ok() {
            ping.send(()).unwrap();
        }
    });
    let mut stream = room.echo();
    for _ in 0..100 {
        says(&mut stream, b"a turn");
    }
}

#[test]
fn a_listener_gives_every_connection_and_ends() {
    let room = room(2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let registry = room.reactor.registry().clone();
    let serve = |listener: Listener, ending: Ending| async move {
        let accept = async {
            while let Ok(connection) = listener.accept().await {
                registry.serve(connection, |socket, _| echo(socket)).unwrap();
            }
        };
        tokio::select! { () = ending => {}, () = accept => {} }
    };
    room.reactor.registry().listen(listener.into(), serve).unwrap();
    let mut streams: Vec<_> = (0..100).map(|_| UnixStream::connect(&path).unwrap()).collect();
    streams.iter_mut().for_each(|stream| says(stream, b"here"));
    room.reactor.end();
    soon(|| UnixStream::connect(&path).is_err());
}
