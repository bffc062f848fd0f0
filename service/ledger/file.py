"""A ledger as a file: everything, byte for byte, to keep elsewhere and to make the same ledger of again.

    {"format": "mend-ledger 1", "namespace": …, "model": …, "editor": …, "entries": …, "chain": …, "exported_at": …}
    {"entry": "<its JSON as it is stored>", "chain": "<its link>", "factors": "<base64>"}       for each entry

Flow: RedisLedger -> export_ledger -> JSON Lines, or these in gzip -> LedgerFile -> import_file -> RedisLedger.
model and editor are the digests, 12 digits each, of what the entries can be replayed with; chain is the last link.
factors are null where there are none, or none any more since the edit is rolled back.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from service.ledger.errors import LedgerCorrupt, LedgerFileError
from service.ledger.needed import Needed
from service.ledger.records import Applied, Digest
from service.ledger.redis_ledger import RedisLedger
from service.ledger.verification import Problem, Stored, Verification, walk

FAMILY = "mend-ledger "
FORMAT = f"{FAMILY}1"
NAMESPACE = r"^[^:]+:[0-9a-f]{12}:[0-9a-f]{12}$"
"""Of a ledger of the service: whose it is, then the digests of the model and of the editor."""
HEADER_BYTES = 10_000
LINE_BYTES = 1 << 30
"""At most; Redis stores no value of more than half of it."""
PIECE_BYTES = 8_000_000
"""What an import appends at once, about."""
MOST_BYTES = 256_000_000
"""At once, unless it is one batch; a ledger that ends there can be served only when the import has gone on."""
GZIP = b"\x1f\x8b"
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file raises, packed or not."""


class Header(BaseModel):
    """The first line."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: str = FORMAT
    namespace: str = Field(pattern=NAMESPACE)
    model: str = Field(pattern=r"^[0-9a-f]{12}$")
    editor: str = Field(pattern=r"^[0-9a-f]{12}$")
    entries: int = Field(ge=0)
    chain: Digest
    exported_at: AwareDatetime


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    entry: str
    chain: str
    factors: str | None


class _Numbered(BaseModel):
    sequence: int = Field(ge=1, strict=True)


# Writing


def export_ledger(ledger: RedisLedger, file: BinaryIO, *, packed: bool) -> Header:
    """Write what a ledger holds now, checked; what is appended meanwhile is left out. file: is written from its start.

    Raises LedgerCorrupt at the first problem, LedgerUnavailable, OSError.
    """
    while True:
        file.seek(0)
        file.truncate()
        if packed:
            with gzip.GzipFile(fileobj=file, mode="wb", filename="", compresslevel=6) as lines:
                header, checking = _write(ledger, cast(BinaryIO, lines))
        else:
            header, checking = _write(ledger, file)
        if not checking.problems:
            return header
        if len(checking.problems) > len(checking.lacking):
            raise _corrupt(checking)
        needed = Needed()
        for entry in ledger.read():
            needed.take(entry)
        if any(edit_id in needed for edit_id in checking.lacking):
            raise _corrupt(checking)
        # The ledger was compacted meanwhile, without the factors of what was rolled back meanwhile: once more, with it.


def _corrupt(checking: Verification) -> LedgerCorrupt:
    return LedgerCorrupt(checking.problems[0].sequence, checking.problems[0].what)


def _write(ledger: RedisLedger, lines: BinaryIO) -> tuple[Header, Verification]:
    last, chain = ledger.last()
    _, model, editor = ledger.namespace.split(":")
    header = Header(
        namespace=ledger.namespace, model=model, editor=editor, entries=last, chain=chain, exported_at=datetime.now(UTC)
    )
    lines.write(header.model_dump_json().encode() + b"\n")
    checking = Verification()
    for stored in walk(ledger, 0, last):
        checking.check(stored)
        if checking.problems:
            raise _corrupt(checking)
        factors = None if stored.factors is None else base64.b64encode(stored.factors).decode()
        line = {"entry": stored.raw.decode(), "chain": stored.chain, "factors": factors}
        lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    checking.finish(last, chain)
    return header, checking


# Reading


class LedgerFile:
    """What was exported to a file. Raises LedgerFileError when its first line is not that of an export."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as lines:
            try:
                line = lines.readline(HEADER_BYTES)
            except UNREADABLE as error:
                raise self._error(f"cannot be read: {error}") from error
        self.header = self._header(line)

    def read(self) -> Iterator[Stored]:
        """What the lines behind the first one hold, unchecked. Raises LedgerFileError."""
        sequence = 0
        with self._opened() as lines:
            lines.readline(HEADER_BYTES)
            while True:
                try:
                    line = lines.readline(LINE_BYTES)
                except UNREADABLE as error:
                    yield Stored(sequence + 1, wrong=f"and those behind it cannot be read: {error}")
                    return
                if not line:
                    return
                stored = _taken_apart(line, expected=sequence + 1)
                sequence = stored.sequence
                yield stored

    def verify(self) -> Verification:
        """All of it. Raises LedgerFileError."""
        checking = Verification()
        for stored in self.read():
            checking.check(stored)
        checking.finish(self.header.entries, self.header.chain)
        return checking

    def require_sound(self) -> None:
        """Raises LedgerFileError when anything in it is not what was exported."""
        self.require_none(self.verify().problems)

    def require_none(self, problems: Sequence[Problem]) -> None:
        """Raises LedgerFileError that tells of the first of these."""
        if problems:
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            raise self._error(f"is damaged: {problems[0]}{more}; `mend ledger verify` names all that is wrong")

    def _header(self, line: bytes) -> Header:
        try:
            given = json.loads(line)
        except (ValueError, RecursionError):
            given = None
        format_ = given.get("format") if isinstance(given, dict) else None
        if not isinstance(format_, str) or not format_.startswith(FAMILY):
            raise self._error("is not a ledger: its first line is none that `mend ledger export` writes")
        if format_ != FORMAT:
            raise self._error(
                f"has the format {format_!r}, and this version of mend-service reads {FORMAT!r}; "
                "use the version that wrote it, or a newer one"
            )
        try:
            header = Header.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise self._error(f"has a damaged first line: {field}: {first['msg']}") from error
        if not header.namespace.endswith(f":{header.model}:{header.editor}"):
            raise self._error("has a damaged first line: its namespace is not that of its model and editor")
        return header

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            if not self.path.is_file():  # a pipe could be read only once
                raise self._error("is no file")
            file = self.path.open("rb")
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from error
        with file:
            packed = file.peek(len(GZIP)).startswith(GZIP)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file

    def _error(self, what: str) -> LedgerFileError:
        return LedgerFileError(f"{self.path} {what}", file=str(self.path))


def _taken_apart(line: bytes, expected: int) -> Stored:
    """One line. An entry stands where it says; expected: where it does when it cannot be read."""
    try:
        fields = _Line.model_validate_json(line)
    except ValidationError:
        return Stored(expected, wrong='cannot be read: its line is no JSON of "entry", "chain" and "factors"')
    raw, factors, wrong = fields.entry.encode(), None, None
    try:
        factors = None if fields.factors is None else base64.b64decode(fields.factors, validate=True)
    except ValueError as error:
        wrong = f"has factors that are no base64: {error}"
    try:
        sequence = _Numbered.model_validate_json(raw).sequence
    except ValidationError:
        sequence = expected
    return Stored(sequence, raw, fields.chain, factors, wrong)


# From a file to Redis


def import_file(file: LedgerFile, ledger: RedisLedger) -> int:
    """Append what a ledger lacks of a file that is sound. Returns how many entries that were.

    A ledger that an import left half-way is gone on with; no batch is ever there in part.
    Raises LedgerFileError when the ledger is not a beginning of the file; then nothing is appended.
    Raises LedgerConflict when somebody else appends meanwhile, LedgerCorrupt, LedgerNotDurable, LedgerUnavailable.
    """
    there, dropped = _shared(file, ledger)
    if there < file.header.entries:
        ledger.put_back(dropped)  # by a compaction; what follows may return their edits
    for first, piece in _pieces(file, there):
        ledger.append_raw(first, piece)
    return file.header.entries - there


def _shared(file: LedgerFile, ledger: RedisLedger) -> tuple[int, list[tuple[Applied, bytes]]]:
    """How many entries a ledger has of a file, when it has no others, and what the file has of factors that it lacks.

    Raises LedgerFileError.
    """
    shared, entries, dropped = 0, file.header.entries, []
    for (entry, _, chain), stored in zip(ledger.read_raw(), file.read(), strict=False):
        if chain != stored.chain:
            raise LedgerFileError(
                f"entry {entry.sequence} of the ledger {ledger.namespace} is another one than that of {file.path}, "
                "so these are two ledgers; import into another namespace (--namespace) or another Redis",
                file=str(file.path),
                sequence=entry.sequence,
            )
        shared = entry.sequence
        if stored.factors and isinstance(entry, Applied) and next(ledger.raw_factors([shared])) is None:
            dropped.append((entry, stored.factors))
    if shared == entries and (head := ledger.head()) > entries:
        raise LedgerFileError(
            f"the ledger {ledger.namespace} has all {entries} entries of {file.path} and goes on to {head}: "
            f"entry {entries + 1} is none of the file; there is nothing to import",
            file=str(file.path),
            sequence=entries + 1,
        )
    return shared, dropped


def _pieces(file: LedgerFile, there: int) -> Iterator[tuple[int, list[tuple[bytes, bytes | None]]]]:
    """What follows on the entries that are there, in pieces, each with its first sequence.

    A piece ends where a service could go on from it: never inside a batch, and, unless it becomes too large, not
    before the roll-back of an edit whose factors were dropped.
    """
    checking, first, piece, size_bytes = Verification(), there + 1, [], 0
    for stored in file.read():
        checking.check(stored)
        file.require_none(checking.problems)  # there were none before; the file may have been changed since
        if stored.sequence <= there:
            continue
        piece.append((stored.raw, stored.factors))
        size_bytes += len(stored.raw) + len(stored.factors or b"")
        full = size_bytes >= MOST_BYTES or (size_bytes >= PIECE_BYTES and not checking.lacking)
        if full and not checking.in_batch:
            yield first, piece
            first, piece, size_bytes = stored.sequence + 1, [], 0
    if piece:
        yield first, piece
