"""The ledger in Redis: one append-only stream per namespace, compared and appended in one script.

Flow: Entry + factors -> append -> stream entry `<sequence>-0` -> read -> the same Entry + factors, verified.
The stream's last generated id is the head, so there is no second key that could disagree with it.
Works with Redis 6.2 and later, and with Valkey. Threads may share one RedisLedger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.ledger.errors import EntryInvalid, LedgerConflict, LedgerCorrupt, LedgerError, LedgerUnavailable
from service.ledger.records import Applied, Entry, decode, digest_of, encode

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0
BYTES_PER_S = 10_000_000
"""What is sent and stored at least so fast; a batch is given the time that it may take."""
MAX_SCANS, KEYS_PER_SCAN = 100, 1000
PAGE = 16  # entries of about 0.5 MB each: 8 MB in memory at a time

_HEAD = """
local function head(key)
  if redis.call('EXISTS', key) == 0 then return '0-0' end
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end
"""

_READ_HEAD = _HEAD + "return head(KEYS[1])"

# ARGV: id before the first, then id, entry and factors of each. Answers nothing when all are stored, else the head.
# Entries that are already there count as stored, of which the last, byte for byte, is proof: a writer that lost the
# reply may ask again, even after others have appended to it.
_APPEND = (
    _HEAD
    + """
local actual = head(KEYS[1])
if actual == ARGV[1] then
  for i = 2, #ARGV, 3 do
    redis.call('XADD', KEYS[1], ARGV[i], 'entry', ARGV[i + 1], 'factors', ARGV[i + 2])
  end
  return false
end
local id, entry = ARGV[#ARGV - 2], ARGV[#ARGV - 1]
local stored = redis.call('XRANGE', KEYS[1], id, id)[1]
if stored and stored[2][1] == 'entry' and stored[2][2] == entry then return false end
return actual
"""
)

# First match wins, so subclasses stand before their bases. The slug goes into `facts["reason"]`.
_REASONS: list[tuple[type[Exception], str, str]] = [
    (redis.AuthenticationError, "credentials", "refused the credentials"),
    (redis.exceptions.AuthorizationError, "credentials", "refused the credentials"),
    (redis.exceptions.NoPermissionError, "credentials", "does not permit this user to use the ledger"),
    (redis.BusyLoadingError, "loading", "is still loading its data"),
    (redis.ReadOnlyError, "read_only", "is a read-only replica"),
    (redis.OutOfMemoryError, "out_of_memory", "has reached its maxmemory and refuses to write"),
    (redis.TimeoutError, "timeout", "did not answer in time"),
    (redis.ConnectionError, "unreachable", "cannot be reached"),
    (OSError, "unreachable", "cannot be reached"),
]


class RedisLedger:
    """One namespace of a Redis. `client` must not decode responses; the ledger closes it."""

    def __init__(self, client: redis.Redis, namespace: str) -> None:
        self._client = client
        self._key = _key_of(namespace)
        self._append = client.register_script(_APPEND)
        self._head = client.register_script(_READ_HEAD)

    @classmethod
    def connect(cls, url: str, namespace: str) -> Self:
        """A ledger at a `redis://`, `rediss://` or `unix://` URL; connects at the first call, 2 s at most.

        An answer may take 5 s. Options in the URL's query win over these.
        Raises LedgerUnavailable for a URL that cannot be understood; the URL is not repeated, it may hold a password.
        """
        # redis-py's own default is 10 retries with backoff, timeouts included: close to a minute before a caller
        # hears of a dead server. One immediate retry, of broken connections alone, covers a server that restarted
        # under a pooled connection; waiting longer is the caller's decision. Retrying an append is safe by its script.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        try:
            client = redis.Redis.from_url(
                url,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=READ_TIMEOUT_S,
                retry=retry,
                protocol=2,
                decode_responses=False,
            )
            # Options of the URL are otherwise looked at when the first connection is made. Opens no socket.
            client.connection_pool.connection_class(**client.get_connection_kwargs())
        except (ValueError, TypeError):
            raise LedgerUnavailable(
                "the Redis URL cannot be understood; it looks like redis://[user:password@]host:port/0 "
                "(special characters of the password percent-encoded) or unix:///path/of/socket",
                reason="bad_url",
            ) from None
        return cls(client, namespace)

    def append(self, entry: Entry, factors: bytes = b"") -> None:
        """Store one entry durably after entry `sequence - 1`, with its factor bytes.

        Appending the same entry again succeeds and changes nothing.
        Raises LedgerConflict when the ledger ends elsewhere; EntryInvalid when factors and their digest disagree.
        Raises LedgerUnavailable when it is not known whether the entry was stored: append it again to learn it.
        """
        self.append_all([(entry, factors)])

    def append_all(self, stored: Sequence[tuple[Entry, bytes]]) -> None:
        """Store entries that follow on each other, each with its factor bytes, as `append` does: all of them or none.

        Raises what `append` raises.
        """
        first, _ = stored[0]
        arguments: list[str | bytes] = [f"{first.sequence - 1}-0"]
        for sequence, (entry, factors) in enumerate(stored, first.sequence):
            problem = _mismatch(entry, factors)
            if entry.sequence != sequence:
                problem = f"does not follow on entry {sequence - 1}"
            if problem:
                raise EntryInvalid(f"entry {entry.sequence} {problem}", sequence=entry.sequence)
            arguments += [f"{entry.sequence}-0", encode(entry), factors]
        with self._talking(), self._patient(sum(map(len, arguments))) as client:
            actual = self._append([self._key], arguments, client=client)
        if actual is not None:
            raise LedgerConflict(expected=first.sequence - 1, actual=_sequence_of(actual))

    @contextmanager
    def _patient(self, size_bytes: int) -> Iterator[redis.Redis]:
        """A client that waits for as long as so many bytes may take."""
        options = self._client.get_connection_kwargs()
        if size_bytes < BYTES_PER_S or options.get("socket_timeout") is None:
            yield self._client
            return
        patience_s = options["socket_timeout"] + size_bytes / BYTES_PER_S
        kind = self._client.connection_pool.connection_class
        pool = redis.ConnectionPool(connection_class=kind, **{**options, "socket_timeout": patience_s})
        try:
            yield redis.Redis(connection_pool=pool)
        finally:
            pool.disconnect()

    def head(self) -> int:
        """Sequence of the last entry, 0 when there is none. Raises LedgerUnavailable, LedgerCorrupt."""
        with self._talking():
            return _sequence_of(self._head([self._key]))

    def read(self, after: int = 0) -> Iterator[tuple[Entry, bytes]]:
        """Every entry beyond sequence `after` with its factors, in order and verified, until there are no more.

        Entries that are appended meanwhile are read too. The checks run as the iterator is consumed.
        Raises LedgerCorrupt at a gap, an entry that cannot be read, factors that do not match their digest, or a
        ledger that ends before `after` and so has lost entries. Raises LedgerUnavailable.
        """
        while (head := self.head()) != after:
            if head < after:
                raise LedgerCorrupt(head + 1, f"is missing: the ledger ends at {head}, but it reached {after} before")
            with self._talking():
                page = self._client.xrange(self._key, min=f"({after}-0", count=PAGE)
            if not page:
                raise LedgerCorrupt(after + 1, f"is missing, but the ledger goes on to {head}")
            for stored_id, fields in page:
                after += 1
                yield _verified(after, stored_id, fields)

    def factors(self, sequence: int) -> bytes:
        """The factor bytes of one applied entry, verified; empty for a roll-back.

        Raises LedgerCorrupt when there is no such entry or it is not what was written. Raises LedgerUnavailable.
        """
        stored_id = f"{sequence}-0"
        with self._talking():
            found = self._client.xrange(self._key, min=stored_id, max=stored_id)
        if not found:
            raise LedgerCorrupt(sequence, "is missing")
        return _verified(sequence, *found[0])[1]

    def namespaces(self, prefix: str) -> list[str]:
        """Of ledgers in the same Redis that begin so. Of a very full Redis it looks at the first keys alone.

        prefix: letters, digits and colons. Raises LedgerUnavailable.
        """
        before, after = _key_of("|").split("|")
        found: set[str] = set()
        cursor = 0
        with self._talking():
            for _ in range(MAX_SCANS):
                cursor, keys = self._client.scan(cursor, match=_key_of(f"{prefix}*"), count=KEYS_PER_SCAN)
                found |= {key.decode().removeprefix(before).removesuffix(after) for key in keys}
                if not cursor:
                    break
        return sorted(found)

    def ping(self) -> None:
        """Raises LedgerUnavailable when Redis does not answer."""
        with self._talking():
            self._client.ping()

    def close(self) -> None:
        """Close the connections. A later call opens new ones."""
        self._client.close()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """The one place where errors of redis-py become errors of the ledger."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> LedgerError:
        text = str(error)
        if text.startswith("WRONGTYPE"):
            return LedgerCorrupt(1, f"is missing: the key {self._key} holds something that is not a stream")
        reason, says = "refused", "refused the command"
        if text.startswith("MISCONF"):
            reason, says = "cannot_persist", "cannot persist what it is told and refuses to write"
        for kind, slug, sentence in _REASONS:
            if isinstance(error, kind):
                reason, says = slug, sentence
                break
        address = self._address()
        return LedgerUnavailable(f"Redis at {address} {says}: {text}", address=address, reason=reason)

    def _address(self) -> str:
        """Where Redis is. Built from its parts, because the URL may hold a password."""
        where = self._client.get_connection_kwargs()
        return where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"


def _key_of(namespace: str) -> str:
    return f"mend:{{{namespace}}}:entries"  # the braces are a hash tag: a cluster keeps a namespace's keys on one node


def _sequence_of(stored_id: bytes) -> int:
    sequence, _, within = stored_id.decode().partition("-")
    if within != "0":
        raise LedgerCorrupt(int(sequence), f"was not written by this service: its id is {stored_id.decode()}")
    return int(sequence)


def _verified(sequence: int, stored_id: bytes, fields: dict[bytes, bytes]) -> tuple[Entry, bytes]:
    """The entry and factors of one stream entry, or LedgerCorrupt when they are not those of `sequence`."""
    if stored_id != f"{sequence}-0".encode():
        raise LedgerCorrupt(sequence, f"is missing: the next one is {stored_id.decode()}")
    try:
        entry = decode(fields[b"entry"])
        factors = fields[b"factors"]
    except KeyError as error:
        raise LedgerCorrupt(sequence, f"has no field {error.args[0].decode()}") from error
    except ValueError as error:
        raise LedgerCorrupt(sequence, f"cannot be read: {error}") from error
    if entry.sequence != sequence:
        raise LedgerCorrupt(sequence, f"says that it is entry {entry.sequence}")
    problem = _mismatch(entry, factors)
    if problem:
        raise LedgerCorrupt(sequence, problem)
    return entry, factors


def _mismatch(entry: Entry, factors: bytes) -> str | None:
    """What is wrong between an entry and the factors beside it."""
    if isinstance(entry, Applied):
        actual = digest_of(factors)
        if actual != entry.factors_digest:
            return f"has factors with digest {actual}, not {entry.factors_digest}"
    elif factors:
        return "is a roll-back, but has factors"
    return None
