#!/usr/bin/env python3
"""Writes messages.txt: frames made from docs/protocol.md alone, without the daemon's code.

Each line is the name of a vector and a frame in hexadecimal. tests/protocol_vectors.rs says what each name means. Run it
when the protocol changes, and commit what it wrote.
"""

import struct
from pathlib import Path

KEY = b"\0\0\0\x0bssh-ed25519" + struct.pack(">I", 32) + bytes(range(32))
DIGEST = bytes(range(100, 132))
HOUR = 3_600_000
UNKNOWN = 0xFFFFFFFF


def u32(n):
    return struct.pack(">I", n)


def u64(n):
    return struct.pack(">Q", n)


def boolean(b):
    return bytes([b])


def string(b):
    b = b.encode() if isinstance(b, str) else b
    return u32(len(b)) + b


def frame(body):
    return string(body)


def extension(name, *fields):
    return frame(bytes([27]) + string(name) + b"".join(fields))


def request(name, *fields):
    return extension(name + "@strongroom.alt", *fields)


def reply(name, status, *fields):
    return frame(bytes([29]) + string(name + "@strongroom.alt") + bytes([status]) + b"".join(fields))


def failure(code, message, retry_after_ms=0, tries_left=UNKNOWN):
    return string(code) + string(message) + u32(retry_after_ms) + u32(tries_left)


def sign(scheme, data, flags=0, prehashed=False, key=KEY):
    return string(key) + string(scheme) + u32(flags) + boolean(prehashed) + string(data)


def decrypt(scheme, ciphertext, label=b"", key=KEY):
    return string(key) + string(scheme) + string(label) + string(ciphertext)


def derive(scheme, peer, key=KEY):
    return string(key) + string(scheme) + string(peer)


def entries(*all_of_them):
    return u32(len(all_of_them)) + b"".join(map(string, all_of_them))


VECTORS = {
    # Requests.
    "sign-ssh": request("sign", u32(0), sign("ssh", b"data", flags=4)),
    "sign-raw": request("sign", u32(5000), sign("rsa-pkcs1v15-raw", DIGEST)),
    "sign-prehashed": request("sign", u32(HOUR), sign("ecdsa-sha256", DIGEST, prehashed=True)),
    "sign-blinded": request("sign", u32(1), sign("ed25519-blinded-tor", bytes(32) + b"data")),
    "decrypt-oaep": request("decrypt", u32(0), decrypt("rsa-oaep-sha256", b"ciphertext", b"label")),
    "decrypt-pkcs1": request("decrypt", u32(0), decrypt("rsa-pkcs1v15", b"ciphertext")),
    "derive-x25519": request("derive", u32(250), derive("x25519", bytes(32))),
    "submit-sign": request("submit", u64(1 << 63), u32(10), string("sign"), sign("rsa-pss-sha512", b"data")),
    "submit-derive": request("submit", u64(0), u32(0), string("derive"), derive("ecdh", b"\4point")),
    "collect": request("collect", u32(HOUR), u32(0)),
    "cancel": request("cancel", u64(0x0102030405060708)),
    "keys-first": request("keys", string(b""), u32(0)),
    "devices-next": request("devices", string(bytes(64)), u32(10)),
    "unlock-device": request("unlock", string("device"), string("hsm"), string("123456")),
    "unlock-key": request("unlock", string("key"), string(KEY), string("pass phrase")),
    "lock": request("lock", string("device"), string("hsm")),
    "forget-everything": request("forget", string("everything"), string(b"")),
    "why": request("why", boolean(True), u32(5)),
    "random": request("random", u32(1024), string("hsm")),
    "random-own": request("random", u32(1), string("")),
    # Requests of other agents.
    "metacode-ids": extension("decrypt-derive-ids@metacode.biz"),
    "metacode-decrypt": extension("decrypt-derive@metacode.biz", string(KEY), string(b"data"), u32(0)),
    "joyent-ecdh": extension("ecdh@joyent.com", string(string(KEY) + string(KEY) + u32(0))),
    "arekinath-sign": extension("sign-prehash@arekinath.github.io", string(KEY), string(DIGEST), u32(0)),
    # Requests that cannot be read: answered with 28.
    "malformed-empty": request("cancel"),
    "malformed-short": request("cancel", u32(1)),
    "malformed-trailing": request("collect", u32(0), u32(0), b"\0"),
    "malformed-length": request("keys", u32(1 << 31), b"cursor"),
    "malformed-joyent": extension("ecdh@joyent.com", string(KEY), string(KEY), u32(0)),
    # Requests that make no sense.
    "bad_request-deadline": request("sign", u32(HOUR + 1), sign("ssh", b"data")),
    "bad_request-wait": request("collect", u32(HOUR + 1), u32(0)),
    "bad_request-digest": request("sign", u32(0), sign("rsa-pss-sha384", DIGEST, prehashed=True)),
    "bad_request-prehashed": request("sign", u32(0), sign("ed25519", DIGEST, prehashed=True)),
    "bad_request-flags": request("sign", u32(0), sign("ed25519", b"data", flags=2)),
    "bad_request-label": request("decrypt", u32(0), decrypt("rsa-pkcs1v15", b"ciphertext", b"label")),
    "bad_request-random": request("random", u32(1025), string("")),
    "bad_request-nothing": request("random", u32(0), string("")),
    "bad_request-cursor": request("keys", string(bytes(65)), u32(0)),
    "bad_request-pin": request("unlock", string("device"), string("hsm"), string("")),
    "bad_request-lock": request("lock", string("everything"), string("")),
    "bad_request-key": request("sign", u32(0), sign("ssh", b"data", key=b"")),
    "unsupported-scheme": request("sign", u32(0), sign("rot13", b"data")),
    "unsupported-operation": request("submit", u64(1), u32(0), string("generate"), sign("ssh", b"data")),
    # Replies.
    "reply-result": reply("sign", 0, string(b"signature")),
    "reply-empty": reply("submit", 0),
    "reply-busy": reply("sign", 1, failure("busy", "too much is waiting", 200)),
    "reply-pin": reply("unlock", 1, failure("pin_wrong", "the PIN is wrong", 0, 2)),
    "reply-collect": reply(
        "collect",
        0,
        entries(
            u64(7) + b"\0" + string(b"signature"),
            u64(8) + b"\1" + failure("timeout", "late"),
        ),
        boolean(False),
    ),
    "reply-cancel": reply("cancel", 0, string("abandoned")),
    "reply-keys": reply(
        "keys",
        0,
        entries(
            string(KEY) + u32(1) + string(b"certificate") + string("work") + string("me@home")
            + u32(2) + string("hsm") + string("ready") + string("soft") + string("absent")
            + string("sign,derive") + string("ssh,ed25519") + string("") + string("")
            + string("credential") + string("confirm,touch")
        ),
        string(b"next"),
    ),
    "reply-devices": reply(
        "devices",
        0,
        entries(
            string("hsm") + string("pkcs11") + string("0123") + string("failed") + string("it keeps dying")
            + u32(4) + u32(3) + u32(2) + string("needed") + u32(UNKNOWN)
            + u64(1000) + u64(10) + u64(5) + u64(1)
        ),
        string(b""),
    ),
    "reply-why": reply(
        "why",
        0,
        entries(
            u64(1_700_000_000_123) + string("sign") + string("SHA256:abc") + string("git (process 7)")
            + string("denied") + string("the person who was asked said no")
        ),
    ),
    # A newer daemon's: an unknown code, and fields that nobody knows yet.
    "reply-newer-code": reply("sign", 1, failure("on_fire", "it burns") + b"more"),
    "reply-newer-fields": reply(
        "collect", 0, entries(u64(9) + b"\0" + string(b"signature") + b"more"), boolean(True), b"more"
    ),
}

lines = [f"{name} {data.hex()}\n" for name, data in VECTORS.items()]
Path(__file__).with_name("messages.txt").write_text("".join(lines))
