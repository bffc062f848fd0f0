"""One Redis, spoken to with the ledger's patience and answering with the ledger's errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.failpoints import reach
from service.ledger.errors import LedgerCorrupt, LedgerError, LedgerUnavailable, OutcomeUnknown

CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0
BYTES_PER_S = 10_000_000
"""What is sent and stored at least so fast; a batch is given the time that it may take."""

Answer = TypeVar("Answer")
Client = redis.Redis

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
_REFUSALS = (redis.ResponseError, redis.BusyLoadingError, redis.AuthenticationError)
"""Answers of a Redis that did not do what it was told."""


class Connection:
    """`client` must not decode responses; it is closed with this. Threads may share one."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    def open(cls, url: str) -> Self:
        """To a `redis://`, `rediss://` or `unix://` URL; connects at the first question, 2 s at most.

        An answer may take 5 s. Options in the URL's query win over these.
        Raises LedgerUnavailable for a URL that cannot be understood; the URL is not repeated, it may hold a password.
        """
        try:
            client = redis.Redis.from_url(
                url,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=READ_TIMEOUT_S,
                # redis-py's own default is 10 retries with backoff, close to a minute before a caller hears of a dead
                # server, and it does not tell that something was sent twice. `ask` and `write` say what they do.
                retry=Retry(NoBackoff(), 0),
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
        options = client.get_connection_kwargs()
        if options["decode_responses"] or options["socket_timeout"] <= 0 or options["socket_connect_timeout"] <= 0:
            raise LedgerUnavailable(
                "the Redis URL has an option that the ledger cannot work with: leave out decode_responses, and give "
                "socket_timeout and socket_connect_timeout more than 0 seconds",
                reason="bad_url",
            )
        return cls(client)

    def ask(self, question: Callable[[Client], Answer]) -> Answer:
        """What Redis answers to something that may be asked twice. Raises LedgerUnavailable, LedgerCorrupt.

        Once more, at once, where a connection turns out to be broken: the server may have restarted under it.
        """
        with self._translating():
            try:
                return question(self._client)
            except redis.TimeoutError:
                raise
            except redis.ConnectionError:
                return question(self._client)

    def write(self, question: Callable[[redis.client.Pipeline], object], size_bytes: int = 0) -> list[Any]:
        """What Redis answers to commands that are sent at once over one connection, errors of single ones included.

        question: puts the commands into a pipeline; doing them twice must be as doing them once.
        size_bytes: of what is sent. Raises LedgerUnavailable when nothing was done, and OutcomeUnknown when it is not
        known whether it was.
        """
        self.ask(Client.ping)  # of a server that is not there we know that it was told nothing
        reach("send")
        sent: Exception | None = None
        with self._patient(size_bytes) as client:
            for _ in range(2):
                pipeline = client.pipeline(transaction=False)
                question(pipeline)
                try:
                    answers = pipeline.execute(raise_on_error=False)
                    first = answers[0]
                    if isinstance(first, _REFUSALS):
                        raise first
                    return answers
                except _REFUSALS as error:
                    raise (self._unknown(sent) if sent else self._translated(error)) from error
                except redis.TimeoutError as error:
                    raise self._unknown(error) from error
                except (redis.RedisError, OSError) as error:
                    sent = error
        raise self._unknown(sent) from sent

    def patience_s(self, size_bytes: int = 0) -> float:
        """How long an answer may take where so many bytes are sent."""
        own = self._client.get_connection_kwargs().get("socket_timeout") or READ_TIMEOUT_S
        return own if size_bytes < BYTES_PER_S else own + size_bytes / BYTES_PER_S

    def address(self) -> str:
        """Where Redis is. Built from its parts, because the URL may hold a password."""
        where = self._client.get_connection_kwargs()
        return where.get("path") or f"{where.get('host', 'localhost')}:{where.get('port', 6379)}"

    def begin_anew(self) -> None:
        """Ask over new connections from now on."""
        self._client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close the connections. A later question opens new ones."""
        self._client.close()

    @contextmanager
    def _patient(self, size_bytes: int) -> Iterator[Client]:
        """A client that waits for as long as so many bytes may take."""
        options = self._client.get_connection_kwargs()
        if size_bytes < BYTES_PER_S or options.get("socket_timeout") is None:
            yield self._client
            return
        kind = self._client.connection_pool.connection_class
        options = {**options, "socket_timeout": self.patience_s(size_bytes)}
        pool = redis.ConnectionPool(connection_class=kind, **options)
        try:
            yield redis.Redis(connection_pool=pool)
        finally:
            pool.disconnect()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Errors of redis-py become errors of the ledger."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> LedgerError:
        text = str(error)
        if text.startswith("WRONGTYPE"):
            return LedgerCorrupt(1, "is missing: a key of the ledger holds something else")
        reason, says = "refused", "refused the command"
        if text.startswith("MISCONF"):
            reason, says = "cannot_persist", "cannot persist what it is told and refuses to write"
        for kind, slug, sentence in _REASONS:
            if isinstance(error, kind):
                reason, says = slug, sentence
                break
        address = self.address()
        said = f"Redis at {address} {says}: {text}"
        return LedgerUnavailable(said, brief=f"Redis {says}", address=address, reason=reason)

    def _unknown(self, error: Exception) -> OutcomeUnknown:
        why = self._translated(error)
        return OutcomeUnknown(str(why), address=self.address(), reason=why.facts.get("reason", "refused"))
