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
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from service.api.views import Pending
from service.engine import IdempotencyKeyReused
from service.engine.turns import Places

KEPT_S = 600.0
"""After its end, so that a client who asks seldom still learns why it was refused."""
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
        self._places = Places("requests for what came of a change")

    def made(
        self, key: str | None, request_digest: str, wait_s: float | None, change: Callable[[], Made]
    ) -> Made | JSONResponse:
        """What came of a change, or after `wait_s` that it is pending. Without wait_s: it is made here and now.

        Raises RequestValidationError without a key to ask again by; IdempotencyKeyReused; Busy; what `change` raises.
        """
        if wait_s is None:
            return change()
        if key is None:
            said = "needs the header Idempotency-Key, by which to ask again"
            raise RequestValidationError([{"type": "missing", "loc": ("query", "wait"), "msg": said}])
        with self._places.one():
            running = self._begun(key, request_digest, change)
            wait([running.made], wait_s)
        if not running.made.done():
            detail = "it is being worked on; send the same request with the same Idempotency-Key for what came of it"
            return JSONResponse(Pending(detail=detail).model_dump(), 202, {"Retry-After": str(ASK_AGAIN_S)})
        with self._mutex:
            if self._running.get(key) is running:
                del self._running[key]
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
        work = contextvars.copy_context()
        threading.Thread(target=work.run, args=(_run, running, change), name="change", daemon=True).start()
        return running

    def _forget(self) -> None:
        now = time.monotonic()
        for key, running in list(self._running.items()):
            if running.ended_at is not None and now - running.ended_at > KEPT_S:
                del self._running[key]


def _run(running: _Running, change: Callable[[], Any]) -> None:
    try:
        running.made.set_result(change())
    except Exception as error:  # told to whoever asks
        running.made.set_exception(error)
    finally:
        running.ended_at = time.monotonic()


def current_waiting(request: Request) -> Waiting:
    return request.app.state.waiting


Waited = Annotated[Waiting, Depends(current_waiting)]
