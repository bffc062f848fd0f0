"""Who may touch the live weights when: many readers, or the one publisher.

A waiting publisher goes first, so that a stream of generations cannot hold an edit off for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._publishing = False
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The weights stay as they are inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._publishing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Nobody else reads or publishes inside."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._publishing and not self._readers)
            self._waiting -= 1
            self._publishing = True
        try:
            yield
        finally:
            with self._changed:
                self._publishing = False
                self._changed.notify_all()
