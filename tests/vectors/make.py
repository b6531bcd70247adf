#!/usr/bin/env python3
"""Writes messages.txt: frames made from docs/protocol.md alone, without the daemon's code.

Each line is the name of a vector and a frame in hexadecimal. tests/protocol_vectors.rs says what each name means. Run it
when the protocol changes, and commit what it wrote.
"""

import struct
from pathlib import Path

KEY = b"\0\0\0\x0bssh-ed25519" + struct.pack(">I", 32) + bytes(range(32))
PRIVATE = (
    b"\0\0\0\x0bssh-ed25519" + struct.pack(">I", 32) + bytes(range(32)) + struct.pack(">I", 64) + b"\7" * 32
    + bytes(range(32))
)
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
    "audit": request("audit", boolean(True)),
    "check": request("check", string("sign"), sign("ed25519", b"data")),
    "generate": request(
        "generate", u32(0), string("hsm"), string("label"), string("rsa-3072"), string(""), string(""), string("")
    ),
    "generate-card": request(
        "generate", u32(60_000), string("card"), string(""), string("ed25519"), string("auth"), string("fixed"),
        string("12345678"),
    ),
    "import": request(
        "import", u32(0), string(KEY), string("card"), string("name"), string("sign"), string("on"), string("12345678")
    ),
    "rename": request("rename", string(KEY), string("authority")),
    "allow": request("allow", string(KEY), string("sign,derive")),
    "allow-nothing": request("allow", string(KEY), string("")),
    "delete": request("delete", string(KEY), string("memory"), string("authority")),
    "generate-store": request(
        "generate", u32(0), string("store"), string("label"), string("mldsa44-ed25519"), string(""), string(""),
        string(""), boolean(True), string("sign"),
    ),
    "import-store": request(
        "import", u32(1), string(KEY), string("store"), string(""), string(""), string(""), string(""),
        boolean(False), string("sign,decrypt,derive"),
    ),
    "allow-stored": request("allow", string(KEY), string("sign,decrypt,derive"), string("pass phrase")),
    "delete-stored": request("delete", string(KEY), string("store"), string("authority"), string("pass phrase")),
    "unlock-store": request("unlock", string("store"), string(""), string("pass phrase")),
    "lock-store": request("lock", string("store"), string("")),
    "forget-store": request("forget", string("store"), string("")),
    "store": request("store"),
    "init": request("init", string("pass phrase"), boolean(True)),
    "add-slot-passphrase": request(
        "add-slot", string("pass phrase"), string("passphrase"), string("label"), string("another")
    ),
    "add-slot-recovery": request("add-slot", string("pass phrase"), string("recovery"), string("label"), string("")),
    "add-slot-key-file": request(
        "add-slot", string("pass phrase"), string("key-file"), string("label"), string("/etc/strongroom.key")
    ),
    "add-slot-credential": request(
        "add-slot", string("pass phrase"), string("credential"), string("label"), string("strongroom-store")
    ),
    "remove-slot": request("remove-slot", string("pass phrase"), u32(7)),
    "import-key": request(
        "import-key", string(PRIVATE), string("me@home"), string("work"), boolean(True), boolean(True), string("sign")
    ),
    "set-key-enable": request("set-key", string(KEY), string("pass phrase"), string("enable")),
    "set-key-disable": request("set-key", string(KEY), string(""), string("disable")),
    "set-key-confirm": request("set-key", string(KEY), string(""), string("confirm"), boolean(True)),
    "set-key-expires": request("set-key", string(KEY), string(""), string("expires"), u64(1_800_000_000)),
    "set-key-never": request("set-key", string(KEY), string("pass phrase"), string("expires"), u64(0)),
    "set-key-destinations": request(
        "set-key", string(KEY), string(""), string("destinations"),
        # restrict-destination-v00@openssh.com of OpenSSH's PROTOCOL.agent.
        string(
            string(
                string(string("") + string("") + string(""))
                + string(string("me") + string("example.org") + string("") + string(KEY) + boolean(False))
                + string("")
            )
        ),
    ),
    "set-key-not-exportable": request("set-key", string(KEY), string(""), string("not-exportable")),
    "set-key-detach": request("set-key", string(KEY), string(""), string("detach"), string(b"certificate")),
    "attach": request("attach", string(b"certificate")),
    "export": request("export", string(KEY), string("pass phrase"), string("pkcs8"), string("another")),
    "rotate": request("rotate", string(KEY), u64(1_800_000_000)),
    "rotate-never": request("rotate", string(KEY), u64(0)),
    "change-passphrase": request("change-passphrase", string("pass phrase"), string("another")),
    "backup": request("backup", string("pass phrase"), u32(1) + string("age1qqqq")),
    "fetch": request("fetch", u64(131_072)),
    "upload": request("upload", u64(131_072), string(b"piece")),
    "restore": request("restore", string("pass phrase"), string("AGE-SECRET-KEY-1QQQQ")),
    "transfer-offer": request("transfer-offer", string("pass phrase"), string("target")),
    "transfer-wrap": request(
        "transfer-wrap", string("pass phrase"), string(b"offer"), string("SHA256:qqqq"), u32(1) + string(KEY)
    ),
    "transfer-look": request("transfer-look"),
    "transfer-accept": request("transfer-accept", string("pass phrase"), string("SHA256:qqqq")),
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
    "card-status": request("card-status", string("card")),
    "change-card-set-pin": request(
        "change-card", string("card"), string("set-pin"), string("user"), string("123456"), string("654321")
    ),
    "change-card-reset-pin": request(
        "change-card", string("card"), string("reset-pin"), string("reset-code"), string("87654321"), string("654321")
    ),
    "change-card-set-touch": request(
        "change-card", string("card"), string("set-touch"), string("auth"), string("on"), string("12345678")
    ),
    "change-card-set-text": request(
        "change-card", string("card"), string("set-text"), string("name"), string("Example<<Ann"), string("12345678")
    ),
    "change-card-factory-reset": request("change-card", string("card"), string("factory-reset"), string("12345678")),
    "bad_request-card-pin": request(
        "change-card", string("card"), string("set-pin"), string("user"), string("1" * 128), string("654321")
    ),
    "unsupported-card": request("change-card", string("card"), string("explode")),
    "unsupported-card-pin": request(
        "change-card", string("card"), string("reset-pin"), string("user"), string("123456"), string("654321")
    ),
    "bad_request-init": request("init", string(""), boolean(True)),
    "bad_request-store": request("lock", string("store"), string("mine")),
    "bad_request-key-file": request(
        "add-slot", string("pass phrase"), string("key-file"), string(""), string("key")
    ),
    "unsupported-kind-of-slot": request("add-slot", string("pass phrase"), string("tpm"), string(""), string("")),
    "bad_request-import-key": request(
        "import-key", string(KEY), string(""), string(""), boolean(False), boolean(False), string("")
    ),
    "bad_request-destinations": request("set-key", string(KEY), string(""), string("destinations"), string(b"x")),
    "unsupported-form": request("export", string(KEY), string("pass phrase"), string("jwk"), string("another")),
    "unsupported-set-key": request("set-key", string(KEY), string(""), string("exportable")),
    "malformed-set-key": request("set-key", string(KEY), string(""), string("confirm")),
    "malformed-slot": request("remove-slot", string("pass phrase")),
    "malformed-store": request("store", u32(0)),
    "malformed-backup": request("backup", string("pass phrase"), u32(2) + string("age1qqqq")),
    "bad_request-piece": request("upload", u64(0), string(bytes(128 * 1024 + 1))),
    "bad_request-recipients": request("backup", string("pass phrase"), u32(17)),
    "malformed-card": request("change-card", string("card"), string("set-touch"), string("auth"), string("on")),
    "bad_request-name": request("rename", string(KEY), string("two\nlines")),
    "bad_request-long-name": request(
        "generate", u32(0), string("hsm"), string("x" * 257), string("ed25519"), string(""), string(""), string("")
    ),
    "malformed-secret": request(
        "generate", u32(0), string("hsm"), string(""), string("ed25519"), string(""), string("")
    ),
    "unsupported-algorithm": request(
        "generate", u32(0), string("hsm"), string(""), string("rsa-1024"), string(""), string(""), string("")
    ),
    "unsupported-slot": request(
        "generate", u32(0), string("hsm"), string(""), string("ed25519"), string("9a"), string(""), string("")
    ),
    "unsupported-touch": request(
        "generate", u32(0), string("hsm"), string(""), string("ed25519"), string(""), string("maybe"), string("")
    ),
    "unsupported-allow": request("allow", string(KEY), string("sign,fly")),
    "unsupported-check": request("check", string("collect"), sign("ed25519", b"data")),
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
            + string("credential") + string("confirm,touch") + string("OpenPGP 5C1D")
            + u64(1_700_000_000) + u64(1_800_000_000) + string("exportable")
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
            + u32(1) + string('the key "a" is left out: its type is unknown')
            + string("touch") + string("Touch hsm for git")
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
    "reply-audit": reply(
        "audit",
        0,
        string("/var/lib/strongroom/audit") + u64(1234) + string(b"\xab" * 32) + u64(3) + u64(56_789)
        + u64(2) + u64(800) + string(b"\xcd" * 32),
    ),
    "reply-made": reply("generate", 0, string(KEY), string(b"spki"), string(bytes(20))),
    "reply-card-status": reply(
        "card-status",
        0,
        string("0006:12345678") + bytes([3, 4]) + string("Yubico") + string("Example<<Ann") + string("en")
        + string("https://example.org/ann.asc") + string("ann") + bytes([3, 0, 2]) + boolean(False) + u32(7)
        + bytes([1]) + string("admin")
        + bytes([1]) + string("auth") + string("ed25519") + string(KEY) + string("A" * 40) + u32(1_700_000_000)
        + string("fixed"),
    ),
    "reply-check": reply("check", 0, string("confirm"), string("hsm"), string("Allow use of key?")),
    "reply-store": reply(
        "store",
        0,
        string("locked"),
        entries(u32(1) + string("recovery") + string("paper") + u64(1_700_000_000) + string("age1qqqq")),
        string("it was mended"),
    ),
    "reply-slot": reply("add-slot", 0, u32(1), string("AGE-SECRET-KEY-1QQQQ")),
    "reply-packed": reply("transfer-wrap", 0, u64(512), u32(2), u32(1), u32(0), string("SHA256:qqqq")),
    "reply-taken-in": reply("restore", 0, u32(2), u32(1), u32(0)),
    "reply-offer": reply("transfer-offer", 0, string(b"offer"), string("SHA256:qqqq")),
    # A newer daemon's: an unknown code, and fields that nobody knows yet.
    "reply-newer-code": reply("sign", 1, failure("on_fire", "it burns") + b"more"),
    "reply-newer-fields": reply(
        "collect", 0, entries(u64(9) + b"\0" + string(b"signature") + b"more"), boolean(True), b"more"
    ),
}

lines = [f"{name} {data.hex()}\n" for name, data in VECTORS.items()]
Path(__file__).with_name("messages.txt").write_text("".join(lines))
