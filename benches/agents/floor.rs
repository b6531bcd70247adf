//! The floor: an agent that does nothing but sign, with one Ed25519 key, over sockets and epoll alone. Two threads; new
//! connections are dealt out in turn. What it does not reach, sockets and scheduling do not let anybody reach.

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use rustix::{
    buffer::spare_capacity,
    event::epoll,
    net::{RecvFlags, recv},
};

use crate::support::client::{IDENTITIES_ANSWER, REQUEST_IDENTITIES, frame, message, put, take};

const READ: usize = 16 * 1024;

/// Serves at `socket` until standard input ends.
pub fn serve(socket: &Path, workers: usize) {
    let key = Arc::new(Ed25519KeyPair::generate().expect("a key"));
    let listener = UnixListener::bind(socket).expect("a socket");
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let mut threads = Vec::new();
    for _ in 0..workers {
        let set = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set"));
        let fresh = Arc::new(Mutex::new(HashMap::new()));
        let (key, own_set, own_fresh) = (Arc::clone(&key), Arc::clone(&set), Arc::clone(&fresh));
        thread::spawn(move || work(&own_set, &own_fresh, &key));
        threads.push((set, fresh));
    }
    for n in 0u64.. {
        let (stream, _) = listener.accept().expect("a connection");
        let (set, fresh) = &threads[n as usize % workers];
        // Before the set knows it: a worker may see it at once.
        let mut fresh = fresh.lock().expect("no worker died");
        epoll::add(set, &stream, epoll::EventData::new_u64(n), epoll::EventFlags::IN).expect("a place in it");
        fresh.insert(n, stream);
    }
}

fn work(set: &impl std::os::fd::AsFd, fresh: &Mutex<HashMap<u64, UnixStream>>, key: &Ed25519KeyPair) {
    let mut connections: HashMap<u64, (UnixStream, Vec<u8>)> = HashMap::new();
    let (mut events, mut buffer, mut out) = (Vec::with_capacity(64), vec![0; READ], Vec::new());
    let mut blob = message(0, &[b"ssh-ed25519", key.public_key().as_ref()]);
    blob.remove(0);
    loop {
        events.clear();
        epoll::wait(set, spare_capacity(&mut events), None).expect("events");
        for event in &events {
            let n = event.data.u64();
            let (stream, input) = connections.entry(n).or_insert_with(|| {
                (fresh.lock().expect("the acceptor lives").remove(&n).expect("its stream"), Vec::new())
            });
            let read = recv(&*stream, &mut *buffer, RecvFlags::DONTWAIT).map_or(0, |(_, n)| n);
            if read == 0 {
                connections.remove(&n);
                continue;
            }
            input.extend_from_slice(&buffer[..read]);
            let mut rest = &input[..];
            while let Some((length, body)) = rest.split_first_chunk::<4>()
                && let Some((request, behind)) = body.split_at_checked(u32::from_be_bytes(*length) as usize)
            {
                answer(request, key, &blob, &mut out);
                rest = behind;
            }
            let taken = input.len() - rest.len();
            input.drain(..taken);
            if stream.write_all(&out).is_err() {
                connections.remove(&n);
            }
            out.clear();
        }
    }
}

fn answer(request: &[u8], key: &Ed25519KeyPair, blob: &[u8], out: &mut Vec<u8>) {
    if request[0] == REQUEST_IDENTITIES {
        let mut list = vec![IDENTITIES_ANSWER, 0, 0, 0, 1];
        put(&mut list, blob);
        put(&mut list, b"floor");
        return out.extend(frame(&list));
    }
    let mut fields = &request[1..];
    take(&mut fields);
    let signature = key.sign(take(&mut fields));
    // Lengths: of the frame, the signature's blob, its algorithm, its bytes.
    out.extend([0, 0, 0, 88, 14, 0, 0, 0, 83, 0, 0, 0, 11]);
    out.extend(b"ssh-ed25519");
    out.extend([0, 0, 0, 64]);
    out.extend(signature.as_ref());
}
