"""The ledger in Redis: one append-only stream per namespace, compared and appended in one script.

    mend:{<namespace>}:entries    stream: `<sequence>-0` -> entry, and the link of the hash chain up to it
    mend:{<namespace>}:factors    hash: sequence -> factor bytes; those that nothing can need again may be dropped
    mend:{<namespace>}:snapshot   the first entries, once the stream was compacted (`service.ledger.snapshot`)

Flow: Entry + factors -> append -> read -> the same Entry, verified against the chain; factors -> the same bytes.
What is appended is durable when `append` comes back. The stream's last generated id is the head, so there is no other
key that could disagree with it. Works with Redis 6.2 and later, and with Valkey. Threads may share one RedisLedger,
but only one may append and read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import redis

from service.failpoints import reach
from service.ledger.chain import GENESIS, link
from service.ledger.checks import EMPTY, mismatch, sequence_of, verified, verified_factors
from service.ledger.connection import Client, Connection
from service.ledger.durability import Demand, Durability
from service.ledger.errors import (
    EntryInvalid,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerNotDurable,
    OutcomeUnknown,
)
from service.ledger.needed import Needed
from service.ledger.records import Applied, Entry, encode
from service.ledger.replicas import Replicas
from service.ledger.scripts import APPEND, COMPACT, PUT_BACK, READ_LAST, TOUCH
from service.ledger.snapshot import Compacted, Snapshot

MAX_SCANS, KEYS_PER_SCAN = 100, 1000
PAGE = 512
"""Entries of about 2 kB each, read at a time."""
COMPACTION_TRIES = 4
FACTORS_PAGE = 64
"""Of up to 0.5 MB each."""
WAIT_SHARE = 0.8
"""Of the time that an answer may take: how long Redis is given to fsync, or to wait for news."""


class RedisLedger:
    """One namespace of a Redis. durability: what is demanded of that Redis."""

    def __init__(self, connection: Connection, namespace: str, durability: Demand = "warn") -> None:
        self._connection, self._demand = connection, durability
        self.namespace = namespace
        self._keys = [_key_of(namespace, part) for part in ("entries", "factors", "snapshot")]
        self._key = self._keys[0]
        self.replicas = Replicas(connection, _key_of(namespace, "replicas"))
        self._durability: Durability | None = None
        self._known = self._read = (0, GENESIS)
        """Sequence and link of the last entry that is known to be durable, and of the one that was read last."""

    @classmethod
    def connect(cls, url: str, namespace: str, durability: Demand = "warn") -> Self:
        """A ledger at a `redis://`, `rediss://` or `unix://` URL. See `Connection.open`."""
        return cls(Connection.open(url), namespace, durability)

    # Durability

    def inspect(self) -> Durability:
        """What Redis says of itself now. Raises LedgerNotDurable when more is demanded; LedgerUnavailable."""
        self._durability = durability = self._connection.ask(Durability.of)
        if durability.refuses:
            # Behind one address there may be another server by now, which is one that writes.
            self._connection.begin_anew()
        if self._demand == "strict" and durability.weaknesses:
            raise LedgerNotDurable(
                f"{durability.server} at {self._connection.address()} may lose edits, which strict durability "
                f"(MEND_DURABILITY) does not accept: {'; '.join(durability.weaknesses)}",
                weaknesses=list(durability.weaknesses),
            )
        return durability

    def confirm(self) -> None:
        """Come back when everything that the ledger holds is durable, whoever wrote it.

        Raises LedgerUnavailable. Of a Redis without WAITAOF nothing is asked: with `appendfsync always` it never shows
        what is not durable.
        """
        if self._inspected().waits:
            _, doubt = self._write(TOUCH, [self._key])
            self._raise(doubt)
        self._known = self._read

    def _inspected(self) -> Durability:
        """What is demanded, as far as is known; asked anew where it was not what is."""
        known = self._durability
        if known is None or (self._demand == "strict" and known.weaknesses):
            return self.inspect()
        return known

    def _write(self, script: str, keys: Sequence[str], arguments: Sequence[str | bytes] = ()) -> tuple[Any, str | None]:
        """What a script answers, and why what it wrote may not be durable. Raises as `Connection.write` does."""
        durability = self._inspected()
        reach("append")
        size_bytes = sum(map(len, arguments))
        patience_s = WAIT_SHARE * self._connection.patience_s(size_bytes)

        def ask(pipeline: redis.client.Pipeline) -> None:
            pipeline.eval(script, len(keys), *keys, *arguments)
            durability.ask(pipeline, self._key, patience_s)

        answer, *asked = self._connection.write(ask, size_bytes)
        return answer, durability.doubt(asked)

    def _raise(self, doubt: str | None) -> None:
        """OutcomeUnknown where there is a doubt."""
        if doubt is not None:
            self._durability = None  # what was known of it is no longer so
            raise OutcomeUnknown(
                f"Redis at {self._connection.address()} has it, but it is not durable yet: {doubt}",
                reason="not_durable",
            )

    # Writing

    def append(self, entry: Entry, factors: bytes = b"", needs: Iterable[Applied] = ()) -> None:
        """Store one entry durably after entry `sequence - 1`, with its factor bytes.

        needs: entries whose factors must be there still; FactorsMissing is raised where they are not.

        Appending the same entry again succeeds and changes nothing.
        Raises LedgerConflict when the ledger ends elsewhere; EntryInvalid when factors and their digest disagree;
        LedgerNotDurable; LedgerUnavailable when nothing was stored.
        Raises OutcomeUnknown when it is not known whether the entry was stored: append it again to learn it.
        """
        self.append_all([(entry, factors)], needs)

    def append_all(self, stored: Sequence[tuple[Entry, bytes | None]], needs: Iterable[Applied] = ()) -> None:
        """Store entries that follow on each other, each with its factor bytes, as `append` does: all of them or none.

        Raises what `append` raises. factors: None of an edit whose factors were dropped.
        """
        first, _ = stored[0]
        for sequence, (entry, factors) in enumerate(stored, first.sequence):
            problem = mismatch(entry, factors)
            if entry.sequence != sequence:
                problem = f"does not follow on entry {sequence - 1}"
            if problem:
                raise EntryInvalid(f"entry {entry.sequence} {problem}", sequence=entry.sequence)
        needed = [entry.sequence for entry in needs if entry.factors_digest != EMPTY]
        self.append_raw(first.sequence, [(encode(entry), factors) for entry, factors in stored], needed)

    def append_raw(self, first: int, stored: Sequence[tuple[bytes, bytes | None]], needed: Iterable[int] = ()) -> None:
        """The same with entries as they were stored before, byte for byte; the caller has checked them.

        first: the sequence of the first one. Raises what `append` raises, but EntryInvalid.
        """
        chain = self._link_at(first - 1) or ""  # then the ledger ends elsewhere, as the script will tell
        arguments: list[str | bytes] = [f"{first - 1}-0", chain, " ".join(map(str, needed))]
        for sequence, (raw, factors) in enumerate(stored, first):
            chain = link(chain, raw)
            arguments += [f"{sequence}-0", raw, chain, factors or b""]
        actual, doubt = self._write(APPEND, self._keys[:2], arguments)
        if isinstance(actual, int):
            raise FactorsMissing(actual)
        if actual is not None:
            expected, found = first - 1, sequence_of(actual[0])
            if expected == found:
                raise LedgerCorrupt(found, "is another one than this service has read")
            if found < sequence or self._link_at(sequence) != chain:  # else it was stored before, and compacted since
                raise LedgerConflict(expected=expected, actual=found)
        self._raise(doubt)
        self._known = self._read = (sequence, chain)

    def put_back(self, stored: Sequence[tuple[Applied, bytes]]) -> None:
        """Have factors again that were dropped, since what is to be appended needs them.

        Raises EntryInvalid when they are others; LedgerUnavailable, OutcomeUnknown.
        """
        for entry, factors in stored:
            if problem := mismatch(entry, factors):
                raise EntryInvalid(f"entry {entry.sequence} {problem}", sequence=entry.sequence)
        for start in range(0, len(stored), FACTORS_PAGE):
            page = stored[start : start + FACTORS_PAGE]
            _, doubt = self._write(
                PUT_BACK, [self._keys[1]], [part for entry, factors in page for part in (str(entry.sequence), factors)]
            )
            self._raise(doubt)

    def compact(self) -> Compacted | None:
        """Fold all entries into a checked snapshot and drop the factors that nothing can need again.

        None when there is nothing to do, or somebody else did it. Any reader, on any replica, goes on as before; any
        thread may do this. Raises LedgerUnavailable, LedgerCorrupt, LedgerNotDurable.
        """
        if self.stored_since_snapshot() < 2:  # the last entry stays in the stream
            return None
        needed, stored = Needed(), []
        for tries_left in reversed(range(COMPACTION_TRIES)):
            for entry, raw, chain in self.read_raw(len(stored)):
                needed.take(entry)
                stored.append((raw, chain))
            # Where others append all the time, it is made shorter without dropping any.
            dropped = map(str, sorted(needed.no_more())) if tries_left else ()
            snapshot = Snapshot.of(stored)
            packed = snapshot.pack()
            if Snapshot.unpack(packed) != snapshot:  # nothing is trimmed that could not be read again
                raise LedgerCorrupt(1, "or one behind it cannot be kept in a snapshot")
            last = f"{snapshot.sequence}-0"
            reach("compact")
            count, doubt = self._write(COMPACT, self._keys, [last, snapshot.chain, packed, *dropped])
            if count is None:
                return None
            if count >= 0:
                break
        reach("compacted")
        self._raise(doubt)
        return Compacted(snapshot.sequence, count, len(packed))

    # Reading

    def head(self) -> int:
        """Sequence of the last entry, 0 when there is none. Raises LedgerUnavailable, LedgerCorrupt."""
        return self.last()[0]

    def last(self) -> tuple[int, str]:
        """Sequence and link of the last entry. Raises LedgerUnavailable, LedgerCorrupt."""
        generated, last, present, compacted = self._connection.ask(
            lambda client: client.eval(READ_LAST, 2, self._key, self._keys[2])
        )
        sequence = sequence_of(generated)
        if present != generated:
            raise LedgerCorrupt(sequence, f"is missing: the last one that is there is {present.decode()}")
        if sequence == 0:
            if compacted:
                kept = self._snapshot().sequence
                raise LedgerCorrupt(kept + 1, f"may be lost: there is a snapshot up to entry {kept}, but no stream")
            return 0, GENESIS
        chain, (known, own) = last.decode(errors="replace"), self._known
        if sequence == known and chain != own:
            raise LedgerCorrupt(sequence, "is another one than this service has read")
        return sequence, chain

    def read(self, after: int = 0) -> Iterator[Entry]:
        """Every entry beyond sequence `after`, in order and verified, until there are no more.

        Entries that are appended meanwhile are read too. The checks run as the iterator is consumed.
        Raises LedgerCorrupt at a gap, an entry that cannot be read or breaks the chain, or a ledger that ends before
        `after` and so has lost entries. Raises LedgerUnavailable.
        """
        for entry, _, chain in self.read_raw(after):
            self._read = (entry.sequence, chain)
            yield entry

    def read_raw(self, after: int = 0) -> Iterator[tuple[Entry, bytes, str]]:
        """The same, each with its bytes as they are stored and its link."""
        chain = None
        while (last := self.last())[0] != after:
            head, _ = last
            if head < after:
                raise LedgerCorrupt(head + 1, f"is missing: the ledger ends at {head}, but it reached {after} before")
            chain = chain or self._link_at(after)
            if chain is None:
                raise LedgerCorrupt(after, "is missing")
            page = self.page(after)
            if not page:
                raise LedgerCorrupt(after + 1, f"is missing, but the ledger goes on to {head}")
            for stored_id, fields in page:
                after += 1
                entry, raw, chain = verified(after, stored_id, fields, chain)
                yield entry, raw, chain
        if chain not in (None, last[1]):
            raise LedgerCorrupt(after, "is another one than this service has read")

    def page(self, after: int, *, snapshot: bool = True) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The next entries behind `after`, unverified; none that are in the snapshot alone unless it is to be read.

        Raises LedgerUnavailable, and LedgerCorrupt when the snapshot cannot be read.
        """
        page = self._connection.ask(lambda client: client.xrange(self._key, min=f"({after}-0", count=PAGE))
        if snapshot and (not page or page[0][0] != f"{after + 1}-0".encode()):
            page = self._snapshot().after(after) or page
        return page

    def _snapshot(self) -> Snapshot:
        packed = self._connection.ask(lambda client: client.get(self._keys[2]))
        return Snapshot.unpack(packed) if packed is not None else Snapshot(())

    def _link_at(self, sequence: int) -> str | None:
        """The link of one entry, which is taken for what it is; None when it is not there."""
        if sequence == 0:
            return GENESIS
        known, chain = self._known
        if sequence == known:
            return chain
        for stored_id, fields in self.page(sequence - 1)[:1]:
            if stored_id == f"{sequence}-0".encode():
                return fields.get(b"chain", b"").decode(errors="replace")
        return None

    def factors(self, entries: Iterable[Applied]) -> Iterator[bytes]:
        """The factor bytes of applied entries, in their order, each verified against its digest.

        Raises FactorsMissing, also where they were dropped because their edit is rolled back; LedgerCorrupt;
        LedgerUnavailable. The checks run as the iterator is consumed.
        """
        waiting = list(entries)
        stored = self.raw_factors([entry.sequence for entry in waiting])
        for entry, factors in zip(waiting, stored, strict=True):
            yield verified_factors(entry, factors)

    def raw_factors(self, sequences: Sequence[int]) -> Iterator[bytes | None]:
        """What is stored as the factors of these entries, unverified. Raises LedgerUnavailable."""
        for start in range(0, len(sequences), FACTORS_PAGE):
            names = [str(sequence) for sequence in sequences[start : start + FACTORS_PAGE]]
            yield from self._connection.ask(lambda client, names=names: client.hmget(self._keys[1], names))

    def wait(self, after: int, within_s: float) -> None:
        """Come back when there is an entry beyond `after`, or after so many seconds at most.

        Raises LedgerUnavailable.
        """
        block_s = min(within_s, WAIT_SHARE * self._connection.patience_s())
        self._connection.ask(
            lambda client: client.xread({self._key: f"{after}-0"}, count=1, block=max(1, int(1000 * block_s)))
        )

    def stored_since_snapshot(self) -> int:
        """How many entries are in the stream itself. Raises LedgerUnavailable."""
        return self._connection.ask(lambda client: client.xlen(self._key))

    def size_bytes(self) -> int:
        """What the ledger takes of the memory of Redis. Raises LedgerUnavailable."""
        return sum(self._connection.ask(lambda client, key=key: client.memory_usage(key, 0)) or 0 for key in self._keys)

    def namespaces(self, prefix: str) -> list[str]:
        """Of ledgers in the same Redis that begin so. Of a very full Redis it looks at the first keys alone.

        prefix: letters, digits and colons. Raises LedgerUnavailable.
        """
        before, after = _key_of("|").split("|")
        found: set[str] = set()
        cursor = 0
        for _ in range(MAX_SCANS):
            cursor, keys = self._connection.ask(
                lambda client, at=cursor: client.scan(at, match=_key_of(f"{prefix}*"), count=KEYS_PER_SCAN)
            )
            found |= {key.decode().removeprefix(before).removesuffix(after) for key in keys}
            if not cursor:
                break
        return sorted(found)

    def ping(self) -> None:
        """Raises LedgerUnavailable when Redis does not answer."""
        self._connection.ask(Client.ping)

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        self._connection.close()


def _key_of(namespace: str, part: str = "entries") -> str:
    return f"mend:{{{namespace}}}:{part}"  # the braces are a hash tag: a cluster keeps a namespace's keys on one node
