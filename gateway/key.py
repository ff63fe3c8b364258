"""A key's text: minted, parsed, digested; and the pepper file that makes the store's digests useless alone.

A key is `hr_<env>_<id>_<secret>_<crc>`. The id finds the row, the secret proves possession, and the CRC-32 of
all before it lets a mistyped key be refused, and a leaked one be found by scanners, without any lookup.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import msgspec


class Minted(msgspec.Struct, frozen=True):
    """A fresh key, whole: to be shown once and kept nowhere."""

    id: str
    text: str
    digest: bytes

    def __repr__(self) -> str:
        return f"Minted(id={self.id!r})"


def mint(*, pepper: Pepper, env: str, id: str | None = None) -> Minted:
    """A new key, or with `id` a new secret for an old one. Raises Unfit if `env` does not fit in a key."""
    if not re.fullmatch(r"[a-z0-9]{1,16}", env):
        raise Unfit(f"{env[:40]!r} is no environment for a key; use 1 to 16 lower-case letters and digits")
    id = id or random_id()
    secret = _random(SECRET_CHARS)
    body = f"hr_{env}_{id}_{secret}"
    return Minted(id, f"{body}_{_checksum(body.encode())}", pepper.digest(secret))


def parse(key: str) -> tuple[str, str, str] | None:
    """(env, id, secret) of a well-formed key whose checksum is right, else None."""
    if len(key) > KEY_CHARS_MAX or not key.isascii():
        return None
    parts = key.split("_")
    if len(parts) != 5 or parts[0] != "hr" or _checksum(key[: -len(parts[4]) - 1].encode()) != parts[4]:
        return None
    return parts[1], parts[2], parts[3]


class Pepper:
    """HMAC-SHA-256 under one key, whose two padded blocks are hashed ahead (RFC 2104 §4), which takes a call's
    digest from 4 µs to 1."""

    def __init__(self, key: bytes) -> None:
        block = (key if len(key) <= 64 else hashlib.sha256(key).digest()).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def digest(self, secret: str) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(secret.encode())
        outer.update(inner.digest())
        return outer.digest()


class Unfit(ValueError):
    """A value that no tenant or key can have; the message says which and what would do."""


ALPHABET = string.digits + string.ascii_letters
#: 62^10 ids are 59 bits, enough to be told apart; 62^32 secrets are 190 bits, too many to be tried.
ID_CHARS = 10
SECRET_CHARS = 32
KEY_CHARS_MAX = 128
#: Below this a kept secret is a file cut short, or one that could be guessed.
KEPT_CHARS_MIN = 16

#: Two base-62 digits at a time: three look-ups write a CRC instead of six divisions.
PAIRS: Sequence[str] = [high + low for high in ALPHABET for low in ALPHABET]


def _checksum(body: bytes) -> str:
    """CRC-32 of what precedes, in six base-62 digits: any single changed character shows."""
    rest, low = divmod(crc32(body), len(PAIRS))
    high, middle = divmod(rest, len(PAIRS))
    return PAIRS[high] + PAIRS[middle] + PAIRS[low]


def random_id() -> str:
    return _random(ID_CHARS)


def _random(chars: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(chars))


def pepper_of(state: Path) -> Pepper:
    """The pepper in `state`, made at the first call. Losing the file makes every key unknown."""
    return Pepper(kept(state / "pepper", lambda: secrets.token_hex(32)).encode())


def kept(path: Path, make: Callable[[], str]) -> str:
    """The secret in `path`; if there is no file yet, the one that `make` returns, readable by its owner only. Of
    several processes that find none at once, one writes and all return what it wrote. Raises OSError, and Unfit if
    the file holds nothing that keeps a secret."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        write_private(draft, make())
        try:
            # A link, not a rename: it fails if another process was first, and never shows half a file.
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    secret = path.read_bytes().strip()
    if len(secret) < KEPT_CHARS_MIN or not secret.isascii():
        raise Unfit(
            f"{path} holds no secret of at least {KEPT_CHARS_MIN} ASCII characters; restore it, or remove it to have "
            "a new one made"
        )
    return secret.decode()


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, durably. Raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
