"""API keys: a file of hashes, and who it is that shows a key.

Flow: `mend keys create` -> a token, told once, and its hash in the file -> the service reads the file whenever it
changed -> Authorization header -> the key that it is, or none.
The file is a JSON list: name, scope, sha256, created_at, expires_at. It never holds a key.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

logger = logging.getLogger("mend.keys")

PREFIX = "mend_"
"""By which a key that went astray is known for what it is."""
TOKEN_BYTES = 32
NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
"""Without spaces or parentheses, so that a name in the ledger ends where another's word begins."""

Scope = Literal["read", "edit", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "edit", "admin")
"""Each may do what those before it may."""


class KeysUnusable(Exception):
    """The file of keys cannot be read or written; in one line, why and what to do."""


class Key(BaseModel):
    """One that may ask. sha256: of the whole token, in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    scope: Scope
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


Keys = tuple[Key, ...]
_keys: TypeAdapter[Keys] = TypeAdapter(Keys)


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def hashed(token: str) -> str:
    """SHA-256, unsalted and fast. That is right here: slow hashes and salts protect what people choose, which can be
    guessed. Nobody guesses 256 random bits, however fast each guess is, and every request has to pay for the hash.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def find(keys: Keys, token: str) -> Key | None:
    """The key of a token. Every key is compared, in constant time, so that no answer's delay tells of any of them."""
    given, found = hashed(token), None
    for key in keys:
        if hmac.compare_digest(given, key.sha256):
            found = key
    return found


def read_keys(path: Path) -> Keys:
    """Raises KeysUnusable."""
    return _read(path)[0]


def read_secret(path: Path) -> bytes:
    """By which sessions are signed. Raises KeysUnusable."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise KeysUnusable(f"MEND_SESSION_SECRET is {path}, which cannot be read: {error.strerror}") from error
    if len(secret) < TOKEN_BYTES:
        raise KeysUnusable(
            f"MEND_SESSION_SECRET is {path}, which holds fewer than {TOKEN_BYTES} bytes; "
            f"`openssl rand -hex {TOKEN_BYTES} > {path}` makes a good one"
        )
    return secret


@contextmanager
def changed(path: Path) -> Iterator[list[Key]]:
    """The keys of a file, to be changed; they are written in the end, whole or not at all.

    One process at a time. A file that is not there yet holds none. Raises KeysUnusable.
    """
    path = path.resolve()
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysUnusable(f"{path.parent} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = list(read_keys(path)) if path.exists() else []
        yield keys
        _write(path, keys)
        os.fsync(folder)
    finally:
        os.close(folder)


class Keyring:
    """The keys that are good now, by a file that may be replaced while the service runs.

    A file that can no longer be read changes nothing: `trouble` says what is wrong, and the keys stay as they were.
    """

    def __init__(self, path: Path) -> None:
        """Raises KeysUnusable."""
        self._path = path
        self._keys, self._seen = _read(path)
        self.trouble: str | None = None

    def find(self, token: str) -> Key | None:
        """The key of a token, expired or not."""
        self.refresh()
        return find(self._keys, token)

    def named(self, name: str) -> Key | None:
        """The key with a name, expired or not."""
        self.refresh()
        return next((key for key in self._keys if key.name == name), None)

    def holds(self, key: Key) -> bool:
        """Whether a key that was found is still good."""
        self.refresh()
        return key in self._keys and not key.expired

    def refresh(self) -> None:
        """Read the file again if it is not the one that was read last."""
        try:
            seen = _mark(os.stat(self._path))
        except OSError as error:
            self._seen = None
            self._say(f"{self._path} cannot be read: {error.strerror}")
            return
        if seen == self._seen:
            return
        try:
            self._keys, self._seen = _read(self._path)
        except KeysUnusable as error:
            self._seen = seen  # not again before it is another
            self._say(str(error))
            return
        self._say(None)
        logger.info("%d keys are good now, by %s", len(self._keys), self._path)

    def warnings(self) -> list[str]:
        """For /readyz, which anybody may ask: no names of files."""
        self.refresh()
        said = []
        if self.trouble:
            said.append("the file of MEND_API_KEYS can no longer be read, the log says why; the keys that were read "
                        "last stay good")  # fmt: skip
        if not self._keys:
            said.append("there is no API key, so nobody may do anything; `mend keys create` makes one")
        return said

    def _say(self, trouble: str | None) -> None:
        if trouble and trouble != self.trouble:
            logger.error("%s; the keys that were read last stay good", trouble)
        self.trouble = trouble


Mark = tuple[int, ...]


def _mark(found: os.stat_result) -> Mark:
    """By which one state of a file is told from another; of a new mode too, since it may be readable now."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> tuple[Keys, Mark]:
    try:
        with path.open("rb") as file:
            mark, raw = _mark(os.fstat(file.fileno())), file.read()
    except OSError as error:
        raise KeysUnusable(
            f"the keys in {path} cannot be read: {error.strerror}; `mend keys create NAME --scope SCOPE --file {path}` "
            "makes such a file"
        ) from error
    try:
        keys = _keys.validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KeysUnusable(f"{path} is no file of keys: {where + ': ' if where else ''}{first['msg']}") from error
    for what, values in (("name", [key.name for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise KeysUnusable(f"{path} is no file of keys: the {what} {twice} is there twice")
    return keys, mark


def _write(path: Path, keys: list[Key]) -> None:
    """Replace a file. A new one is its owner's alone; one that was there keeps owner and mode."""
    try:
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                if path.exists():
                    before = path.stat()
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(file.fileno(), before.st_uid, before.st_gid)
                json.dump([key.model_dump(mode="json", exclude_none=True) for key in keys], file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise KeysUnusable(f"{path} cannot be written: {error.strerror}") from error
