"""Changes that go on while their client asks from time to time what came of them (`wait`).

Flow: first request -> a thread of its own -> what came of it, or `Pending` -> the same request -> what came of it.
Only what is under way is in here: what was made is in the ledger, where the same request finds it, on any replica.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from service.api.views import Pending
from service.engine import EditRefused, Engine, IdempotencyKeyReused
from service.engine.turns import Places

KEPT, KEPT_S = 256, 600.0
"""How many outcomes, for how long after they are known, so that who asks seldom still learns why it was refused."""
ASK_AGAIN_S = 1
Made = TypeVar("Made")


@dataclass
class _Running:
    request_digest: str
    made: Future = field(default_factory=Future)
    ended_at: float | None = None


class Waiting:
    """By Idempotency-Key."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._mutex = threading.Lock()
        self._asking, self._working = Places("requests for what came of a change"), Places("changes")

    def made(
        self,
        engine: Engine,
        key: str | None,
        request_digest: str,
        wait_s: float | None,
        change: Callable[[], Made],
    ) -> Made | JSONResponse:
        """What came of a change, or after `wait_s` that it is pending. Without wait_s: it is made here and now.

        Raises RequestValidationError without a key to ask again by; IdempotencyKeyReused; Busy; what `change` raises.
        """
        if wait_s is None:
            return change()
        if key is None:
            said = "needs the header Idempotency-Key, by which to ask again"
            raise RequestValidationError([{"type": "missing", "loc": ("query", "wait"), "msg": said}])
        if engine.history.by_idempotency_key(key) is not None:  # whatever was said of it here before
            return change()
        with self._asking.one():
            running = self._begun(key, request_digest, change)
            wait([running.made], wait_s)
        if not running.made.done():
            detail = "it is being worked on; send the same request with the same Idempotency-Key for what came of it"
            return JSONResponse(Pending(detail=detail).model_dump(), 202, {"Retry-After": str(ASK_AGAIN_S)})
        self._end(key, running)
        return running.made.result()

    def _begun(self, key: str, request_digest: str, change: Callable[[], Any]) -> _Running:
        with self._mutex:
            self._forget()
            running = self._running.get(key)
            if running is not None and running.request_digest != request_digest:
                raise IdempotencyKeyReused("this Idempotency-Key is in use for another request; take a new key")
            if running is not None:
                return running
            running = self._running[key] = _Running(request_digest)
        place, context = self._working.one(), contextvars.copy_context()
        try:
            place.__enter__()
            work = threading.Thread(target=context.run, args=(self._work, key, running, change, place), daemon=True)
            work.start()
        except BaseException:
            self._end(key, running)
            raise
        return running

    def _work(
        self, key: str, running: _Running, change: Callable[[], Any], place: AbstractContextManager[None]
    ) -> None:
        try:
            running.made.set_result(change())
        except Exception as error:  # told to whoever asks
            error.__cause__ = error.__context__ = None
            running.made.set_exception(error.with_traceback(None))  # whose frames hold all of the request
            if not isinstance(error, EditRefused):  # worth another try
                self._end(key, running)
        finally:
            running.ended_at = time.monotonic()
            place.__exit__(None, None, None)

    def _end(self, key: str, running: _Running) -> None:
        with self._mutex:
            if self._running.get(key) is running:
                del self._running[key]

    def _forget(self) -> None:
        over = time.monotonic() - KEPT_S
        ended = [key for key, running in self._running.items() if running.ended_at is not None]
        for number, key in enumerate(reversed(ended)):
            if number >= KEPT or self._running[key].ended_at < over:
                del self._running[key]


def current_waiting(request: Request) -> Waiting:
    return request.app.state.waiting


Waited = Annotated[Waiting, Depends(current_waiting)]
