#!/usr/bin/env python3
"""Writes the seeds that the fuzz targets start from, into fuzz/seeds. Needs ssh-keygen, ssh-agent,
openssl, puttygen and age.

The keys are new each time; run it only when the seeds are to change, and commit what it wrote.
"""

import base64
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from pathlib import Path

SEEDS = Path(__file__).resolve().parent / "seeds"
VECTORS = SEEDS.parent.parent / "tests/vectors/messages.txt"

# The key that the target `session` puts into the vault: RFC 8032, section 7.1, test 1.
VAULT_KEY = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")

# Whom the target `store` decrypts for.
AGE_RECIPIENT = "age19ctdlvqlvj96l3232g395x0fuj739nzajhmw3cuhn08wvxka9qqqhfp0l8"


def u32(n):
    return struct.pack(">I", n)


def u64(n):
    return struct.pack(">Q", n)


def string(b):
    b = b.encode() if isinstance(b, str) else b
    return u32(len(b)) + b


def frame(body):
    return string(body)


def sha256(b):
    return hashlib.sha256(b).digest()


def envelope(sequence, name, value=None):
    """A record of the state on disk; without a value, one that was removed."""
    whole = b"\x93SR1" + bytes([value is not None]) + u64(sequence) + string(name) + string(value or b"")
    return whole + sha256(whole)[:16]


def copy_frame(kind, sequence, previous, body):
    """A frame of the second copy, and its hash."""
    whole = b"\x93SC1" + bytes([kind]) + u64(sequence) + previous + string(body)
    return whole + sha256(whole), sha256(whole)


def take(b):
    (n,) = struct.unpack_from(">I", b)
    return b[4 : 4 + n], b[4 + n :]


def write(target, name, data):
    (SEEDS / target).mkdir(parents=True, exist_ok=True)
    (SEEDS / target / name).write_bytes(data)


def run(*args, **options):
    return subprocess.run(args, check=True, capture_output=True, **options).stdout


class Key:
    """A key made by ssh-keygen, as the agent protocol has it."""

    def __init__(self, directory, name, *options):
        self.path = directory / name
        run("ssh-keygen", "-q", "-N", "", "-C", name, "-f", self.path, *options)
        self.blob = base64.b64decode(Path(f"{self.path}.pub").read_text().split()[1])
        lines = self.path.read_text().splitlines()[1:-1]
        rest = base64.b64decode("".join(lines))[len(b"openssh-key-v1\0") :]
        for _ in range(3):
            _, rest = take(rest)
        _, rest = take(rest[4:])
        private, _ = take(rest)
        # Two equal check integers, then the fields as they stand in a request, then padding.
        self.fields = private[8:]
        while self.fields and not self.fields.endswith(string(name)):
            self.fields = self.fields[:-1]
        self.type, self.private = take(self.fields)

    def add(self, constraints=b""):
        return bytes([25 if constraints else 17]) + self.fields + constraints

    def certificate(self, authority, *options):
        run("ssh-keygen", "-q", "-s", authority.path, "-I", "id", *options, f"{self.path}.pub")
        return base64.b64decode(Path(f"{self.path}-cert.pub").read_text().split()[1])

    def add_certificate(self, certificate):
        """Behind a certificate stand only the private values and the comment."""
        name, _ = take(certificate)
        rest = self.private
        skip = {b"ssh-ed25519": 0, b"ssh-rsa": 2}.get(self.type, 2)
        for _ in range(skip):
            _, rest = take(rest)
        return b"\x11" + string(name) + string(certificate) + rest


class Agent:
    """The system's ssh-agent, to sign with."""

    def __init__(self, directory):
        path = directory / "agent"
        self.process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.PIPE)
        self.process.stdout.readline()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))

    def ask(self, body):
        self.socket.sendall(frame(body))
        (n,) = struct.unpack(">I", self.socket.recv(4, socket.MSG_WAITALL))
        return self.socket.recv(n, socket.MSG_WAITALL)

    def sign(self, key, data, flags=0):
        reply = self.ask(sign(key.blob, data, flags))
        assert reply[0] == 14, reply
        return take(reply[1:])[0]


def sign(blob, data, flags=0):
    return b"\x0d" + string(blob) + string(data) + u32(flags)


def extension(name, body=b""):
    return b"\x1b" + string(name) + body


def constraint(name, body):
    return b"\xff" + string(name) + body


def hop(user="", host="", *keys):
    return string(user) + string(host) + string("") + b"".join(string(k) + b"\0" for k in keys)


def destinations(*pairs):
    return b"".join(string(string(a) + string(b) + string("")) for a, b in pairs)


def session(name, *bodies, piece=0, hangs_up=False, end=b""):
    write("session", name, bytes([piece, hangs_up]) + b"".join(map(frame, bodies)) + end)


def main():
    shutil.rmtree(SEEDS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        agent = Agent(directory)
        try:
            make(directory, agent)
        finally:
            agent.process.terminate()


def make(directory, agent):
    keys = {
        "ed25519": Key(directory, "ed25519", "-t", "ed25519"),
        "p256": Key(directory, "p256", "-t", "ecdsa", "-b", "256"),
        "p384": Key(directory, "p384", "-t", "ecdsa", "-b", "384"),
        "p521": Key(directory, "p521", "-t", "ecdsa", "-b", "521"),
        "rsa": Key(directory, "rsa", "-t", "rsa", "-b", "1024"),
    }
    for key in keys.values():
        assert agent.ask(key.add()) == b"\x06"
    ed25519, p256, p521, rsa = (keys[name] for name in ("ed25519", "p256", "p521", "rsa"))
    user = ed25519.certificate(p256, "-n", "a,b", "-O", "clear", "-O", "force-command=true")
    host = p256.certificate(rsa, "-h", "-n", "host", "-V", "always:forever")
    of_rsa = rsa.certificate(ed25519, "-n", "a")
    sk = {
        "sk-ed25519": (string(ed25519.blob[-32:]), "sk-ssh-ed25519@openssh.com"),
        "sk-p256": (string("nistp256") + string(take(take(p256.private)[1])[0]), "sk-ecdsa-sha2-nistp256@openssh.com"),
    }
    mldsa = "ssh-mldsa44-ed25519@openssh.com"
    mldsa_public = bytes(range(256)) * 5 + bytes(64)

    # Keys, certificates and signatures.
    data = b"data"
    for name, key in keys.items():
        flags = (0, 2, 4) if name == "rsa" else (0,)
        for flag in flags:
            signature = agent.sign(key, data, flag)
            write("key", f"{name}-{flag}" if flag else name, string(key.blob) + string(data) + string(signature))
    for name, blob in (("user", user), ("host", host), ("of-rsa", of_rsa)):
        write("key", f"certificate-{name}", blob)
    for name, (public, key_type) in sk.items():
        signature = string(key_type) + string(bytes(64) if "ed" in name else string(b"\1") * 2) + b"\x05" + u32(9)
        write("key", name, string(string(key_type) + public + string("ssh:")) + string(data) + string(signature))
    composite = string(mldsa) + string(mldsa_public)
    write("key", "mldsa", string(composite) + string(data) + string(string(mldsa) + string(bytes(2420 + 64))))

    # Constraints.
    here, there = hop(), hop("user", "host.example", ed25519.blob, p256.blob)
    further = hop("", "*.example", rsa.blob)
    path = destinations((here, there), (hop("", "host.example", ed25519.blob), further))
    restrict = constraint("restrict-destination-v00@openssh.com", string(path))
    provider = constraint("sk-provider@openssh.com", string("internal"))
    certificates = constraint("associated-certs-v00@openssh.com", b"\1" + string(string(user) + string(host)))
    lifetime, confirm = b"\x01" + u32(3600), b"\x02"
    write("constraint", "lifetime-confirm", lifetime + confirm)
    write("constraint", "destinations", path)
    write("constraint", "restrict", confirm + restrict + lifetime)
    write("constraint", "provider", provider)
    write("constraint", "certificates", certificates)

    # Requests.
    add_sk = {
        name: b"\x19" + string(key_type) + public + string("ssh:") + b"\x01" + string("handle") + string("")
        + string("comment") + provider
        for name, (public, key_type) in sk.items()
    }
    bind = extension(
        "session-bind@openssh.com",
        string(ed25519.blob) + string(b"session") + string(agent.sign(ed25519, b"session")) + b"\1",
    )
    requests = {f"add-{name}": key.add() for name, key in keys.items()} | {f"add-{n}": b for n, b in add_sk.items()}
    requests |= {
        "add-constrained": ed25519.add(lifetime + confirm + restrict),
        "add-certificate": ed25519.add_certificate(user),
        "add-rsa-certificate": rsa.add_certificate(of_rsa),
        "add-ecdsa-certificate": p256.add_certificate(host),
        "add-mldsa": b"\x11" + string(mldsa) + string(mldsa_public) + string(bytes(64)) + string("comment"),
        "add-smartcard": b"\x1a" + string("/usr/lib/p11.so") + string("1234") + lifetime + certificates,
        "remove-smartcard": b"\x15" + string("/usr/lib/p11.so") + string(""),
        "sign": sign(ed25519.blob, data, 2),
        "remove": b"\x12" + string(ed25519.blob),
        "lock": b"\x16" + string("pw"),
        "bind": bind,
    }
    for name, body in requests.items():
        write("request", name, body)

    # Our messages and their replies, without the frame's length.
    for line in VECTORS.read_text().splitlines():
        name, frame_hex = line.split()
        write("message", name, bytes.fromhex(frame_hex)[4:])

    # Sessions.
    vault_key = string("ssh-ed25519") + string(VAULT_KEY)
    everything, use, query = b"\x0b", sign(vault_key, data), extension("query")
    lock, unlock = requests["lock"], b"\x17" + string("pw")
    session("list-sign", everything, use, use, everything)
    session("pieces", everything, use, query, piece=3)
    session("bind", query, bind, everything, use)
    session("remove", b"\x12" + string(vault_key), use, b"\x13", everything)
    session("lock", lock, everything, use, unlock, use)
    session("lock-wrong", lock, b"\x17" + string("no"), everything)
    session("lock-hang-up", lock, everything, hangs_up=True)
    for name, key in keys.items():
        session(f"use-{name}", key.add(lifetime), sign(key.blob, data, 2), use, sign(key.blob, data, 4), everything)
    session("certificate", ed25519.add_certificate(user), sign(user, data), everything)
    session("confirm", ed25519.add(confirm), sign(ed25519.blob, data), use)
    session("restrict", ed25519.add(restrict), bind, everything, sign(ed25519.blob, data), sign(ed25519.blob, data))
    session("hang-up", p521.add(), sign(p521.blob, data), use, hangs_up=True)
    session("sk", add_sk["sk-ed25519"], sign(string(sk["sk-ed25519"][1]) + sk["sk-ed25519"][0] + string("ssh:"), data))
    session("broken", use, end=u32(0))
    session("too-long", use, end=u32(1 << 30))

    # Frames between the daemon and a device's process: id, tag, body.
    def u64(n):
        return struct.pack(">Q", n)

    head, status = u64(7), string("serial") + b"\0\1\3" + u64(1)
    slot, pss, oaep = string("slot"), b"\2\1", b"\0\1"
    found = slot + string(ed25519.blob) + u64(1) + string(user) + string("label")
    found += u64(2) + pss + b"\4" + u64(1) + oaep + u64(1) + b"\1" + b"\1"
    new = string("label") + string("ed25519") + string("auth") + string("fixed")
    private = string("ssh-ed25519") + string(bytes(32)) + string(bytes(64))
    calls = {
        "open": u64(0) + b"\0" + string("config"),
        "scan": head + b"\1",
        "unlock": head + b"\3" + string("123456"),
        "random": head + b"\5" + u64(32),
        "sign": head + b"\6" + slot + pss + b"\0" + string("message"),
        "decrypt": head + b"\7" + slot + oaep + string("label") + string("ciphertext"),
        "derive": head + b"\10" + slot + b"\0" + string("peer"),
        "generate": head + b"\11" + new + b"\1" + string("87654321"),
        "import": head + b"\12" + new + b"\0" + string("") + string(private),
        "rename": head + b"\13" + slot + string("label"),
        "delete": head + b"\14" + slot,
    }
    answers = {
        "wrong-pin": head + b"\0\2\1\3",
        "failed": head + b"\0\14" + string("why"),
        "opened": u64(0) + b"\1" + u64(4),
        "found": head + b"\2" + u64(1) + found + b"\1" + status,
        "status": head + b"\3" + status,
        "done": head + b"\4",
        "bytes": head + b"\5" + string("result"),
        "made": head + b"\6" + found,
    }
    for side, frames in ((b"\0", calls), (b"\1", answers)):
        for name, body in frames.items():
            write("host", name, side + body)

    # What the process that watches the readers tells.
    cards = [("Reader A 00 00", "0006:12345678"), ("Reader B 00 00", "FFFE:00000001")]
    write("readers", "cards", b"\1" + u32(len(cards)) + b"".join(string(reader) + string(ident) for reader, ident in cards))
    write("readers", "none", b"\1" + u32(0))
    write("readers", "trouble", b"\0" + string("pcscd does not answer"))

    # Streams.
    stream = b"".join(map(frame, (everything, use, unlock)))
    write("frame", "whole", b"\0" + stream)
    write("frame", "cut", b"\3\1\5\2" + stream)
    write("frame", "broken", b"\1\7" + stream + u32(0))
    write("frame", "too-long", b"\1\7" + stream + u32(256 * 1024 + 1))

    # Keys on their way: one description and private half, an offer, a wrap.
    point, seed = bytes(range(32)), bytes(32)
    blob = string("ssh-ed25519") + string(point)
    described = string(blob) + string("name") + string("comment") + u64(1) + bytes([1, 1, 0, 0, 0, 0]) + u32(0) + b"\0" + u32(0) + b"\0\0"
    write("carried", "keys", b"strongroom keys 1\n" + u64(7) + u32(1) + string(described) + string(seed))
    write("carried", "offer", b"strongroom offer 1\n" + bytes(16) + u64(7) + string("target") + point)
    write("carried", "wrap", b"strongroom wrap 1\n" + bytes(16) + u64(7) + point + string(bytes(64)))

    # The state on disk, by docs/store.md: a slot, a key, its metadata, a second copy with one change.
    blob = string("ssh-ed25519") + string(bytes(32))
    there = string("me") + string("host") + u32(1) + string(blob) + b"\0"
    metadata = string(blob) + string("work") + string("me@here") + u64(7) + b"\1\1\0\1\0\0"
    metadata += u32(1) + string("") + string("") + u32(0) + there + b"\1" + u64(9) + u32(0) + b"\0\0"
    slot = u32(2) + string("boot") + u64(7) + b"\3" + bytes(16) + string("/etc/key") + string(bytes(72)) + bytes(32)
    write("store", "slot", u32(2) + b"\1" + slot)
    write("store", "metadata", metadata)
    write("store", "key", sha256(blob) + b"\1" + string(metadata) + bytes(24) + string(bytes(48)))
    hsm = envelope(1, b"\2hsm", b"\1")
    copy, last = copy_frame(1, 1, bytes(32), bytes(16) + u32(1) + u32(1))
    for kind, sequence, body in ((2, 1, hsm), (3, 2, envelope(2, b"\2hsm") + envelope(2, b"\2usb", b"\1"))):
        part, last = copy_frame(kind, sequence, last, body)
        copy += part
    write("store", "copy", copy)
    encrypted = subprocess.run(["age", "-r", AGE_RECIPIENT], input=b"plain", capture_output=True, check=True)
    write("store", "age", encrypted.stdout)

    with tempfile.TemporaryDirectory() as directory:
        key_files(directory)


def key_files(directory):
    """Private keys in the formats of other programs."""
    openssl = lambda *arguments: run("openssl", *arguments, cwd=directory)
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "ec.pem")
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-out", "rsa.pem")
    openssl("genpkey", "-algorithm", "X25519", "-outform", "DER", "-out", "x25519.der")
    openssl("pkey", "-in", "ec.pem", "-traditional", "-out", "sec1.pem")
    openssl("pkey", "-in", "rsa.pem", "-traditional", "-outform", "DER", "-out", "pkcs1.der")
    for how, name in (("PBE-SHA1-3DES", "pkcs12.der"), ("", "encrypted.der")):
        old = ["-v1", how] if how else []
        openssl("pkcs8", "-topk8", "-in", "ec.pem", "-passout", "pass:x", *old, "-outform", "DER", "-out", name)
    openssl("pkey", "-in", "rsa.pem", "-traditional", "-aes128", "-passout", "pass:x", "-out", "dek.pem")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "openssh", cwd=directory)
    run("puttygen", "openssh", "-O", "private", "-o", "putty.ppk", cwd=directory)
    pems = ["ec.pem", "sec1.pem", "dek.pem", "openssh", "putty.ppk"]
    for name in [*pems, "x25519.der", "pkcs1.der", "pkcs12.der", "encrypted.der"]:
        write("key_file", name, Path(directory, name).read_bytes())
    home = ["env", f"GNUPGHOME={directory}", "gpg", "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
    run(*home, "--quick-generate-key", "seed", "ed25519", "cert", "0", cwd=directory)
    fingerprint = run(*home, "--with-colons", "--list-keys", "seed", cwd=directory).decode().split("fpr:")[1].strip(":").split(":")[0]
    run(*home, "--quick-add-key", fingerprint, "cv25519", "encrypt", "0", cwd=directory)
    run(*home, "--output", "openpgp", "--export-secret-keys", "seed", cwd=directory)
    run(*home, "--output", "openpgp.asc", "--armor", "--export-secret-keys", "seed", cwd=directory)
    run("env", f"GNUPGHOME={directory}", "gpgconf", "--kill", "all", cwd=directory)
    for name in ("openpgp", "openpgp.asc"):
        write("key_file", name, Path(directory, name).read_bytes())
    write("key_file", "tor", b"== ed25519v1-secret: type0 ==\0\0\0" + bytes(range(64)))


main()
