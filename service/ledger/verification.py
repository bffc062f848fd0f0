"""Whether what is stored is what was written: every entry against the hash chain, its factors against its digest.

Flow: Redis -> walk -> Stored -> Verification -> problems; a file gives Stored likewise (`service.ledger.file`).
Where readers of a RedisLedger stop at the first problem, this goes on behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from service.ledger.chain import GENESIS, link
from service.ledger.checks import EMPTY, mismatch
from service.ledger.errors import LedgerCorrupt
from service.ledger.needed import Needed
from service.ledger.records import Applied, Entry, InBatch, decode
from service.ledger.redis_ledger import RedisLedger


@dataclass(frozen=True)
class Stored:
    """An entry as it is kept, unchecked; None for what is not there.

    sequence: where it stands. raw: its bytes. chain: its link. wrong: why it could not be read as that much.
    """

    sequence: int
    raw: bytes | None = None
    chain: str | None = None
    factors: bytes | None = None
    wrong: str | None = None


@dataclass(frozen=True)
class Problem:
    """what: as in `entry 5 …`."""

    sequence: int
    what: str

    def __str__(self) -> str:
        return f"entry {self.sequence} {self.what}"


class Verification:
    """Once through a ledger, from its first entry.

    entries, factors: how many were found to be good. last, chain: of what should be the last entry.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.entries = self.factors = self.last = 0
        self.chain: str | None = GENESIS
        self._needed = Needed()
        self._without: dict[str, int] = {}
        """The sequence of each edit whose factors are not there."""
        self._place = 0
        self._links: tuple[str, ...] = (GENESIS,)
        """What the link before may be: as it is stored, and where that is another one, as it is worked out."""
        self._batch: InBatch | None = None
        self._batch_known = True

    @property
    def in_batch(self) -> bool:
        """Whether the entries so far end in the middle of a batch."""
        return self._batch is not None

    @property
    def lacking(self) -> dict[str, int]:
        """The sequence of each edit whose factors are needed, and not there."""
        return {edit_id: sequence for edit_id, sequence in self._without.items() if edit_id in self._needed}

    def check(self, stored: Stored) -> None:
        """Take in what is stored next."""
        wrong = [Problem(stored.sequence, what) for what in self._wrong_with(stored)]
        self.problems += wrong
        self.entries += not wrong

    def finish(self, last: int, chain: str | None) -> None:
        """There is no more. last, chain: what should be the last sequence and its link; None when that is lost."""
        self.last, self.chain = last, chain
        self.problems += self._wrong_at_the_end()
        self.problems.sort(key=lambda problem: problem.sequence)

    def _wrong_with(self, stored: Stored) -> Iterator[str]:
        raw, chain = stored.raw, stored.chain
        fits = raw is not None and chain in [link(before, raw) for before in self._links]
        if stored.sequence <= self._place and not fits:
            yield stored.wrong or f"stands behind entry {self._place}, a second time or out of order"
            self._links = (*self._links[:1], chain or "")  # it may have been altered to say so
            return
        if stored.sequence > self._place + 1 and (len(self._links) == 1 or not fits):
            self.problems.append(self._missing(stored.sequence - 1))
        if stored.wrong is not None:
            yield stored.wrong
        elif not fits:
            yield (
                "was altered, or its link, or what is before it: it breaks the hash chain"
                if self._links
                else "cannot be checked, since the entry before it is not there"
            )
        worked_out = [link(self._links[0], raw)] if self._links and raw is not None and not fits else []
        self._place, self._links = stored.sequence, (*([chain] if chain is not None else []), *worked_out)
        yield from self._wrong_inside(stored)

    def _wrong_inside(self, stored: Stored) -> Iterator[str]:
        try:
            entry = None if stored.raw is None else decode(stored.raw)
        except ValueError as error:
            yield f"cannot be read: {error}"
            entry = None
        if entry is None:
            self._batch, self._batch_known = None, False
            return
        if entry.sequence != stored.sequence:
            yield f"says that it is entry {entry.sequence}"
        yield from self._wrong_with_batch(entry)
        yield from self._wrong_with_factors(entry, stored.factors)

    def _wrong_with_batch(self, entry: Entry) -> Iterator[str]:
        before, batch = self._batch, entry.batch if isinstance(entry, Applied) else None
        self._batch = batch if batch and not batch.ends else None
        if not self._batch_known:
            self._batch_known = True
        elif before and (batch is None or (batch.id, batch.position) != (before.id, before.position + 1)):
            yield f"comes where number {before.position + 1} of {before.size} of the batch {before.id} should"
        elif batch and not before and batch.position != 1:
            yield f"is number {batch.position} of {batch.size} of the batch {batch.id}, which does not begin before it"

    def _wrong_with_factors(self, entry: Entry, factors: bytes | None) -> Iterator[str]:
        self._needed.take(entry)
        if isinstance(entry, Applied) and factors is None and entry.factors_digest != EMPTY:
            self._without[entry.edit_id] = entry.sequence
        problem = mismatch(entry, factors)
        if problem:
            yield problem
        elif factors is not None:
            self.factors += 1

    def _missing(self, last: int) -> Problem:
        """Everything behind the last place and up to here."""
        first = self._place + 1
        self._place, self._links, self._batch, self._batch_known = last, (), None, False
        return Problem(first, "is missing" if first == last else f"and those up to {last} are missing")

    def _wrong_at_the_end(self) -> Iterator[Problem]:
        if self._batch is not None:
            at, size = self._batch.position, self._batch.size
            yield Problem(self._place, f"is number {at} of {size} of the batch {self._batch.id}, whose end is missing")
        if self._place < self.last:
            yield self._missing(self.last)
        elif self._links and self._place > self.last:  # without links it is named already
            yield Problem(self.last + 1, f"stands behind entry {self.last}, which should be the last one")
        elif self.chain is None:
            yield Problem(self.last, "is missing in the stream, which ends in it")
        elif self._links and self.chain not in self._links:
            yield Problem(self.last, f"is not the one that should be the last: the link of that is {self.chain}")
        for sequence in self.lacking.values():
            yield Problem(sequence, "has lost its factors")


def verify_ledger(ledger: RedisLedger) -> Verification:
    """All that a Redis holds. Raises LedgerUnavailable, LedgerCorrupt."""
    checking, end = Verification(), (0, GENESIS)
    # To the very end: factors that are not there may have been dropped after a roll-back of this moment.
    while (now := _end_of(ledger))[0] > end[0]:
        for stored in walk(ledger, end[0], now[0]):
            checking.check(stored)
        end = now
    checking.finish(*end)
    return checking


def _end_of(ledger: RedisLedger) -> tuple[int, str | None]:
    try:
        return ledger.last()
    except LedgerCorrupt as error:  # the last entry was removed
        return int(error.facts["sequence"]), None


def walk(ledger: RedisLedger, after: int, last: int) -> Iterator[Stored]:
    """What a Redis holds behind an entry and up to another one, whatever may be wrong with it.

    Raises LedgerUnavailable, LedgerCorrupt.
    """
    with_snapshot = True
    while after < last:
        try:
            page = ledger.page(after, snapshot=with_snapshot)
        except LedgerCorrupt as error:
            if not with_snapshot:
                raise
            yield Stored(after + 1, wrong=str(error.facts["problem"]))
            with_snapshot = False
            continue
        if not page:
            return
        sequences = [int(stored_id.partition(b"-")[0]) for stored_id, _ in page]
        for sequence, kept, factors in zip(sequences, page, ledger.raw_factors(sequences), strict=True):
            if sequence > last:
                return
            yield _taken_apart(sequence, *kept, factors)
        after = max(after + 1, sequences[-1])


def _taken_apart(sequence: int, stored_id: bytes, fields: dict[bytes, bytes], factors: bytes | None) -> Stored:
    wrong = None
    if not stored_id.endswith(b"-0"):
        wrong = f"was not written by this service: its id is {stored_id.decode()}"
    elif fields.keys() != {b"entry", b"chain"}:
        wrong = f"has the fields {b', '.join(sorted(fields)).decode(errors='replace')}, not chain and entry"
    chain = fields.get(b"chain")
    return Stored(sequence, fields.get(b"entry"), chain and chain.decode(errors="replace"), factors, wrong)
