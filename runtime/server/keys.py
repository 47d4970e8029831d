"""Who may ask: API keys, kept as hashes, and the sessions of the page, which has a cookie in their stead."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from pathlib import Path

from ...errors import InputError
from ...untrusted import read_plain

PREFIX = "cm-"
LINE = re.compile(r"([A-Za-z0-9._-]{1,64}) sha256:([0-9a-f]{64})")
LARGEST = 2**20  # bytes of a file of keys
SESSION = 30 * 24 * 3600.0  # seconds
MOST_SESSIONS = 10_000


class Keys:
    """A file's keys: on each line a name and the key's hash, `NAME sha256:HEX`; # begins a remark."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that cannot be read or says something else."""
        try:
            text = read_plain(path, LARGEST).decode()
        except OSError as error:
            raise InputError(f"cannot read the keys {str(path)!r}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"the file of keys {str(path)!r} {error}") from None
        self._hashes: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            line = line.partition("#")[0].strip()
            if not line:
                continue
            found = LINE.fullmatch(line)
            if found is None:
                raise InputError(
                    f"{str(path)!r}, line {number}: write NAME sha256:HEX, or let `conceptmaster serve "
                    "--new-key NAME --api-key-file FILE` do it"
                )
            if found[1] in self._hashes:
                raise InputError(f"{str(path)!r}, line {number}: the name {found[1]!r} is there twice")
            self._hashes[found[1]] = found[2]
        if not self._hashes:
            raise InputError(f"{str(path)!r} has no key")
        self._sessions: dict[str, tuple[str, float]] = {}

    def owner(self, key: str) -> str | None:
        """The name of a key; None where it is none. Takes as long for any."""
        digest, found = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def sign_in(self, owner: str) -> str:
        """A new session's secret."""
        now = time.time()
        self._sessions = {k: v for k, v in self._sessions.items() if v[1] > now}
        while len(self._sessions) >= MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        secret = secrets.token_urlsafe(32)
        self._sessions[_hash(secret)] = (owner, now + SESSION)
        return secret

    def session(self, secret: str) -> str | None:
        """Whose session it is; None where it is none, or over."""
        owner, until = self._sessions.get(_hash(secret), ("", 0.0))
        return owner if until > time.time() else None

    def sign_out(self, secret: str) -> None:
        """Ends a session."""
        self._sessions.pop(_hash(secret), None)


def new_key(name: str, path: Path) -> str:
    """Makes a key, appends its hash to the file, and returns it: it is nowhere else.

    Raises InputError for a name that is none, or is taken; OSError.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise InputError(f"a key's name is made of letters, digits and . _ -, not {name!r:.80}")
    if path.exists() and path.stat().st_size and name in Keys(path)._hashes:
        raise InputError(f"{str(path)!r} has a key called {name!r} already")
    key = PREFIX + secrets.token_urlsafe(32)
    path.touch(mode=0o600)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        ends = file.read()[-1:] in ("", "\n")
        file.write(f"{'' if ends else chr(10)}{name} sha256:{_hash(key)}\n")
    return key


def _hash(secret: str) -> str:
    """A key is 256 random bits: it needs no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
