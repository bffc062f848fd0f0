"""The ledger in Redis: one append-only stream per namespace, compared and appended in one script.

    mend:{<namespace>}:entries    stream: `<sequence>-0` -> entry, and the link of the hash chain up to it
    mend:{<namespace>}:factors    hash: sequence -> factor bytes; those of edits that were rolled back may be dropped
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

from service.ledger.chain import GENESIS, link
from service.ledger.connection import Client, Connection
from service.ledger.durability import Demand, Durability, always_fsynced
from service.ledger.errors import (
    EntryInvalid,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerNotDurable,
    OutcomeUnknown,
)
from service.ledger.records import Applied, Entry, RolledBack, decode, digest_of, encode
from service.ledger.snapshot import Compacted, Snapshot

MAX_SCANS, KEYS_PER_SCAN = 100, 1000
PAGE = 512
"""Entries of about 2 kB each, read at a time."""
FACTORS_PAGE = 64
"""Of up to 0.5 MB each."""
WAIT_SHARE = 0.8
"""Of the time that an answer may take: how long Redis is given to fsync."""

# `last`: the last generated id, which outlives its entry, and the link of the last entry that is there.
_LAST = """
local function last(key)
  if redis.call('EXISTS', key) == 0 then return {'0-0', '', '0-0'} end
  local id
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then id = info[i + 1] end
  end
  local entry = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  if not entry then return {id, '', '0-0'} end
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'chain' then return {id, entry[2][i + 1], entry[1]} end
  end
  return {id, '', entry[1]}
end
"""

_READ_LAST = _LAST + "return last(KEYS[1])"

# KEYS: entries, factors. ARGV: the id and the link before the first, then id, entry, link and factors of each.
# Answers nothing when all are stored, else what is last. Entries that are already there count as stored, of which the
# last link, which stands for all before it, is proof: a writer that lost the reply may ask again, even after others
# have appended to it. Setting the last id to what it is changes nothing, but it is a write of this connection, without
# which WAITAOF would not wait for what an earlier connection wrote.
_APPEND = (
    _LAST
    + """
local actual = last(KEYS[1])
if actual[1] == ARGV[1] and (actual[1] == '0-0' or actual[2] == ARGV[2]) then
  for i = 3, #ARGV, 4 do
    redis.call('XADD', KEYS[1], ARGV[i], 'entry', ARGV[i + 1], 'chain', ARGV[i + 2])
    if ARGV[i + 3] ~= '' then
      redis.call('HSET', KEYS[2], string.match(ARGV[i], '^%d+'), ARGV[i + 3])
    end
  end
  return false
end
local id, chain = ARGV[#ARGV - 3], ARGV[#ARGV - 1]
local stored = redis.call('XRANGE', KEYS[1], id, id)[1]
if stored then
  for i = 1, #stored[2], 2 do
    if stored[2][i] == 'chain' and stored[2][i + 1] == chain then
      redis.call('XSETID', KEYS[1], actual[1])
      return false
    end
  end
end
return actual
"""
)

# A write that changes nothing, for WAITAOF to wait for. It is allowed where Redis is out of memory: a service that
# starts then can still read what there is.
_TOUCH = """#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then return redis.call('XSETID', KEYS[1], info[i + 1]) end
end
"""

# KEYS: entries, factors, snapshot. ARGV: id and link of the last entry of the snapshot, the snapshot, then the factors
# to drop. That entry stays in the stream, so that the stream still ends in a link. Answers nothing if the stream no
# longer has that entry: then somebody else has compacted it further.
_COMPACT = """
local stored = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not stored then return false end
for i = 1, #stored[2], 2 do
  if stored[2][i] == 'chain' and stored[2][i + 1] ~= ARGV[2] then return false end
end
redis.call('SET', KEYS[3], ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])
for i = 4, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
return 1
"""


class RedisLedger:
    """One namespace of a Redis. durability: what is demanded of that Redis."""

    def __init__(self, connection: Connection, namespace: str, durability: Demand = "warn") -> None:
        self._connection, self._demand = connection, durability
        self.namespace = namespace
        self._keys = [_key_of(namespace, part) for part in ("entries", "factors", "snapshot")]
        self._key = self._keys[0]
        self._durability: Durability | None = None
        self._known = (0, GENESIS)
        """Sequence and link of the entry that was read or appended last."""

    @classmethod
    def connect(cls, url: str, namespace: str, durability: Demand = "warn") -> Self:
        """A ledger at a `redis://`, `rediss://` or `unix://` URL. See `Connection.open`."""
        return cls(Connection.open(url), namespace, durability)

    # Durability

    def inspect(self) -> Durability:
        """What Redis says of itself now. Raises LedgerNotDurable when more is demanded; LedgerUnavailable."""
        self._durability = self._connection.ask(Durability.of)
        if self._demand == "strict" and self._durability.weaknesses:
            raise LedgerNotDurable(
                f"{self._durability.server} at {self._connection.address()} may lose edits, which strict durability "
                f"(MEND_DURABILITY) does not accept: {'; '.join(self._durability.weaknesses)}",
                weaknesses=list(self._durability.weaknesses),
            )
        return self._durability

    def confirm(self) -> None:
        """Come back when everything that the ledger holds is durable, whoever wrote it.

        Raises LedgerUnavailable. Of a Redis without WAITAOF nothing is asked: with `appendfsync always` it never shows
        what is not durable.
        """
        if self._inspected().waits:
            answers = self._connection.write(lambda pipe: (pipe.eval(_TOUCH, 1, self._key), self._await(pipe)))
            self._check(answers[1])

    def _inspected(self) -> Durability:
        return self._durability or self.inspect()

    def _await(self, pipeline: redis.client.Pipeline, size_bytes: int = 0) -> None:
        """What is asked behind every append, over the same connection."""
        durability = self._inspected()
        if durability.waits:
            patience_s = self._connection.patience_s(size_bytes)
            pipeline.execute_command("WAITAOF", 1, 0, int(1000 * WAIT_SHARE * patience_s))
        elif not durability.weaknesses:
            pipeline.config_get("*append*")

    def _check(self, *answer: Any) -> None:
        """Raises OutcomeUnknown unless what was asked behind an append says that it is durable."""
        for found in answer:
            if isinstance(found, Exception):
                problem = f"it does not say whether it is: {found}"
            elif isinstance(found, dict):
                problem = None if always_fsynced(_text(found)) else "its configuration was changed; see /readyz"
            else:
                problem = None if found[0] >= 1 else "its disk did not confirm it in time"
            if problem:
                self._durability = None
                raise OutcomeUnknown(
                    f"Redis at {self._connection.address()} has the entry, but it is not durable yet: {problem}",
                    reason="not_durable",
                )

    # Writing

    def append(self, entry: Entry, factors: bytes = b"") -> None:
        """Store one entry durably after entry `sequence - 1`, with its factor bytes.

        Appending the same entry again succeeds and changes nothing.
        Raises LedgerConflict when the ledger ends elsewhere; EntryInvalid when factors and their digest disagree;
        LedgerNotDurable; LedgerUnavailable when nothing was stored.
        Raises OutcomeUnknown when it is not known whether the entry was stored: append it again to learn it.
        """
        self.append_all([(entry, factors)])

    def append_all(self, stored: Sequence[tuple[Entry, bytes | None]]) -> None:
        """Store entries that follow on each other, each with its factor bytes, as `append` does: all of them or none.

        Raises what `append` raises. factors: None of an edit whose factors were dropped.
        """
        first, _ = stored[0]
        chain = self._link_at(first.sequence - 1) or ""  # then the ledger ends elsewhere, as the script will tell
        arguments: list[str | bytes] = [f"{first.sequence - 1}-0", chain]
        for sequence, (entry, factors) in enumerate(stored, first.sequence):
            problem = _mismatch(entry, factors)
            if entry.sequence != sequence:
                problem = f"does not follow on entry {sequence - 1}"
            if problem:
                raise EntryInvalid(f"entry {entry.sequence} {problem}", sequence=entry.sequence)
            raw = encode(entry)
            chain = link(chain, raw)
            arguments += [f"{entry.sequence}-0", raw, chain, factors or b""]
        self._store(arguments)
        self._known = (stored[-1][0].sequence, chain)

    def _store(self, arguments: list[str | bytes]) -> None:
        self._inspected()
        if self._demand == "strict" and self._durability.weaknesses:
            self.inspect()
        size_bytes = sum(map(len, arguments))
        actual, *asked = self._connection.write(
            lambda pipe: (pipe.eval(_APPEND, 2, *self._keys[:2], *arguments), self._await(pipe, size_bytes)), size_bytes
        )
        if actual is not None:
            expected, found = _sequence_of(arguments[0].encode()), _sequence_of(actual[0])
            if expected == found:
                raise LedgerCorrupt(found, "is another one than this service has read")
            raise LedgerConflict(expected=expected, actual=found)
        self._check(*asked)

    def compact(self) -> Compacted | None:
        """Fold all entries into a checked snapshot and drop the factors that nothing can need again.

        None when there is nothing to do, or somebody else did it. Any reader, on any replica, goes on as before.
        Raises LedgerUnavailable, LedgerCorrupt.
        """
        entries = list(self.read_raw())
        if not entries:
            return None
        rolled_back = {entry.edit_id for entry, _, _ in entries if isinstance(entry, RolledBack)}
        dropped = [
            str(entry.sequence)
            for entry, _, _ in entries
            if isinstance(entry, Applied) and entry.edit_id in rolled_back
        ]
        snapshot = Snapshot.of([(raw, chain) for _, raw, chain in entries])
        packed = snapshot.pack()
        last = f"{snapshot.sequence}-0"
        answers = self._connection.write(
            lambda pipe: (
                pipe.eval(_COMPACT, 3, *self._keys, last, snapshot.chain, packed, *dropped),
                self._await(pipe, len(packed)),
            ),
            len(packed),
        )
        if not answers[0]:
            return None
        self._check(*answers[1:])
        return Compacted(snapshot.sequence, len(dropped), len(packed))

    # Reading

    def head(self) -> int:
        """Sequence of the last entry, 0 when there is none. Raises LedgerUnavailable, LedgerCorrupt."""
        return self._last()[0]

    def _last(self) -> tuple[int, str]:
        generated, chain, present = self._connection.ask(lambda client: client.eval(_READ_LAST, 1, self._key))
        sequence = _sequence_of(generated)
        if present != generated:
            raise LedgerCorrupt(sequence, f"is missing: the last one that is there is {present.decode()}")
        known, own = self._known
        if sequence == known != 0 and chain.decode() != own:
            raise LedgerCorrupt(sequence, "is another one than this service has read")
        return sequence, chain.decode()

    def read(self, after: int = 0) -> Iterator[Entry]:
        """Every entry beyond sequence `after`, in order and verified, until there are no more.

        Entries that are appended meanwhile are read too. The checks run as the iterator is consumed.
        Raises LedgerCorrupt at a gap, an entry that cannot be read or breaks the chain, or a ledger that ends before
        `after` and so has lost entries. Raises LedgerUnavailable.
        """
        for entry, _, _ in self.read_raw(after):
            yield entry

    def read_raw(self, after: int = 0) -> Iterator[tuple[Entry, bytes, str]]:
        """The same, each with its bytes as they are stored and its link."""
        chain = None
        while (head := self.head()) != after:
            if head < after:
                raise LedgerCorrupt(head + 1, f"is missing: the ledger ends at {head}, but it reached {after} before")
            chain = chain or self._link_at(after)
            if chain is None:
                raise LedgerCorrupt(after, "is missing")
            page = self._page(after)
            if not page:
                raise LedgerCorrupt(after + 1, f"is missing, but the ledger goes on to {head}")
            for stored_id, fields in page:
                after += 1
                entry, raw, chain = _verified(after, stored_id, fields, chain)
                self._known = (after, chain)
                yield entry, raw, chain

    def _page(self, after: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The next entries behind `after`, unverified."""
        page = self._connection.ask(lambda client: client.xrange(self._key, min=f"({after}-0", count=PAGE))
        if not page or page[0][0] != f"{after + 1}-0".encode():
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
        for stored_id, fields in self._page(sequence - 1)[:1]:
            if stored_id == f"{sequence}-0".encode():
                return fields.get(b"chain", b"").decode(errors="replace")
        return None

    def factors(self, entries: Iterable[Applied]) -> Iterator[bytes]:
        """The factor bytes of applied entries, in their order, each verified against its digest.

        Raises FactorsMissing, also where they were dropped because their edit is rolled back; LedgerCorrupt;
        LedgerUnavailable. The checks run as the iterator is consumed.
        """
        waiting = list(entries)
        for start in range(0, len(waiting), FACTORS_PAGE):
            page = waiting[start : start + FACTORS_PAGE]
            names = [str(entry.sequence) for entry in page]
            found = self._connection.ask(lambda client, names=names: client.hmget(self._keys[1], names))
            for entry, factors in zip(page, found, strict=True):
                yield _own(entry, factors)

    def wait(self, after: int, within_s: float) -> None:
        """Come back when there is an entry beyond `after`, or after so many seconds. Raises LedgerUnavailable."""
        self._connection.ask(
            lambda client: client.xread({self._key: f"{after}-0"}, count=1, block=max(1, int(1000 * within_s)))
        )

    def stored_since_snapshot(self) -> int:
        """How many entries are in the stream itself. Raises LedgerUnavailable."""
        return self._connection.ask(lambda client: client.xlen(self._key))

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


def _sequence_of(stored_id: bytes) -> int:
    sequence, _, within = stored_id.decode().partition("-")
    if within != "0":
        raise LedgerCorrupt(int(sequence), f"was not written by this service: its id is {stored_id.decode()}")
    return int(sequence)


def _verified(sequence: int, stored_id: bytes, fields: dict[bytes, bytes], before: str) -> tuple[Entry, bytes, str]:
    """One stored entry, its bytes and its link, or LedgerCorrupt when they are not those of `sequence`."""
    if stored_id != f"{sequence}-0".encode():
        raise LedgerCorrupt(sequence, f"is missing: the next one is {stored_id.decode()}")
    try:
        raw, chain = fields[b"entry"], fields[b"chain"].decode(errors="replace")
        entry = decode(raw)
    except KeyError as error:
        raise LedgerCorrupt(sequence, f"has no field {error.args[0].decode()}") from error
    except ValueError as error:
        raise LedgerCorrupt(sequence, f"cannot be read: {error}") from error
    if entry.sequence != sequence:
        raise LedgerCorrupt(sequence, f"says that it is entry {entry.sequence}")
    if chain != link(before, raw):
        raise LedgerCorrupt(sequence, "was altered, or what is before it: it breaks the hash chain")
    return entry, raw, chain


def _own(entry: Applied, factors: bytes | None) -> bytes:
    """The factors that an entry speaks of. None there are where they are empty."""
    if factors is None:
        if entry.factors_digest != digest_of(b""):
            raise FactorsMissing(entry.sequence)
        factors = b""
    problem = _mismatch(entry, factors)
    if problem:
        raise LedgerCorrupt(entry.sequence, problem)
    return factors


def _mismatch(entry: Entry, factors: bytes | None) -> str | None:
    """What is wrong between an entry and the factors beside it."""
    if isinstance(entry, Applied):
        actual = entry.factors_digest if factors is None else digest_of(factors)
        if actual != entry.factors_digest:
            return f"has factors with digest {actual}, not {entry.factors_digest}"
    elif factors:
        return "is a roll-back, but has factors"
    return None


def _text(config: dict[Any, Any]) -> dict[str, str]:
    """redis-py gives text or bytes, depending on its version."""
    return {
        (name.decode() if isinstance(name, bytes) else name): (value.decode() if isinstance(value, bytes) else value)
        for name, value in config.items()
    }
