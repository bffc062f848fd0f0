"""Whose turn it is: one change at a time, a few that wait, and of one Idempotency-Key only one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.engine.errors import Busy, IdempotencyKeyReused, KillSwitchEngaged, RequestInFlight
from service.engine.requests import EditRequest, Note

MAX_WAITING = 12
"""Changes that wait for the one under way, and readers that wait for a revision, at most of each: every one holds a
thread, of which generation needs some too."""
MAX_READING = 6
"""Requests for something that is worked out of the model beside all that goes on, likewise."""


class Places:
    """So many may be in here at once. what: as it is told to those who find no place."""

    def __init__(self, what: str, most: int = MAX_WAITING) -> None:
        self._free, self._what, self._most = threading.BoundedSemaphore(most), what, most

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place. Raises Busy when there is none."""
        if not self._free.acquire(blocking=False):
            raise Busy(f"too many {self._what} are waiting; try again shortly", limit=self._most)
        try:
            yield
        finally:
            self._free.release()


def _never() -> bool:
    return False


class Turns:
    """A thread that has its turn may take another one inside."""

    def __init__(self) -> None:
        self._places, self._writing = Places("changes"), threading.RLock()
        self._urgent, self._interrupted = 0, _never  # the latter: whether another service has engaged the kill switch
        self._keys: dict[str, str | None] = {}
        self._mutex = threading.Lock()

    @contextmanager
    def wait(self, asked: EditRequest | Note | None = None) -> Iterator[None]:
        """Inside, nobody else changes anything.

        Raises Busy; RequestInFlight, or IdempotencyKeyReused, while a request with the same key has or awaits its turn.
        """
        with self._alone(asked), self._places.one(), self._writing:
            self.give_way()
            yield

    @contextmanager
    def taken(self, asked: EditRequest | Note | None = None) -> Iterator[None]:
        """The same for the service itself, which always finds a place."""
        with self._alone(asked), self._writing:
            yield

    @contextmanager
    def taken_first(self, asked: EditRequest | Note | None = None) -> Iterator[None]:
        """The same before all who wait, and instead of who has the turn: the kill switch waits for nobody."""
        with self._mutex:
            self._urgent += 1
        try:
            with self.taken(asked):
                yield
        finally:
            with self._mutex:
                self._urgent -= 1

    def interrupt(self, still: Callable[[], bool]) -> None:
        """Have whoever has the turn give way for as long as that is so, until somebody takes it `at_once`."""
        self._interrupted = still

    def give_way(self) -> None:
        """Called between the steps of a change. Raises KillSwitchEngaged where the kill switch is being engaged."""
        if self._urgent or self._interrupted():
            raise KillSwitchEngaged("the kill switch was engaged meanwhile; nothing of this change was made")

    @contextmanager
    def at_once(self) -> Iterator[bool]:
        """The same without waiting; whether it is one's turn."""
        free = self._writing.acquire(blocking=False)
        try:
            if free:
                self._interrupted = _never
            yield free
        finally:
            if free:
                self._writing.release()

    @contextmanager
    def _alone(self, asked: EditRequest | Note | None) -> Iterator[None]:
        key = asked and asked.idempotency_key
        if key is None:
            yield
            return
        with self._mutex:
            if key in self._keys and self._keys[key] != asked.request_digest:
                raise IdempotencyKeyReused("this Idempotency-Key is in use for another request; take a new key")
            if key in self._keys:
                raise RequestInFlight(
                    "a request with this Idempotency-Key is being worked on; ask again shortly for what came of it"
                )
            self._keys[key] = asked.request_digest
        try:
            yield
        finally:
            with self._mutex:
                del self._keys[key]
