"""`/events`: what happens here, as server-sent events, for dashboards and for `curl -N`.

Flow: engine -> telemetry -> Events.tell, in the thread that works -> a bounded queue for each listener -> its stream.
Nobody waits for a listener: of steps that it does not take in time the oldest are dropped, and of states and health it
is told the newest, since they are read when it takes them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse

from service.api.callers import Asking, Caller, needs
from service.api.problems import responses
from service.api.requests import NoQuery
from service.api.streams import PING_EVERY_S, STREAM, STREAM_HEADERS, frame
from service.api.views import Health
from service.engine import Busy, Published
from service.telemetry import StepNews

if TYPE_CHECKING:
    from service.app import Service

MAX_LISTENERS = 64
MAX_STEPS = 256
"""That wait for one listener; an edit has about twenty, each told of twice."""
LOOK_EVERY_S = 0.25
"""Between two looks at what nobody tells: health, and whether the key is still good."""

router = APIRouter()


class Listener:
    """One stream. Made and read in its event loop."""

    def __init__(self) -> None:
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        self._steps: deque[StepNews] = deque(maxlen=MAX_STEPS)

    def hear(self, news: StepNews | None = None) -> None:
        """From any thread, and from a handler of signals: takes no lock."""
        if news is not None:
            self._steps.append(news)
        if not self._woken.is_set():
            with suppress(RuntimeError):  # its loop is closed, and it with it
                self._loop.call_soon_threadsafe(self._woken.set)

    def steps(self) -> Iterator[StepNews]:
        """Those that it has not been told of."""
        while self._steps:
            yield self._steps.popleft()

    async def wait(self) -> None:
        """Until there is something new, or it is time to look."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), LOOK_EVERY_S)
        self._woken.clear()


class Events:
    """Who listens. ended: since the service stops."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._mutex = threading.Lock()
        self.ended = False

    def tell(self, news: StepNews | None) -> None:
        """A step, or None when another state is live. From any thread."""
        for listener in self._listeners:
            listener.hear(news)

    def end(self) -> None:
        """Let every stream end at once, also those to come. From any thread."""
        self.ended = True
        self.tell(None)

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """Inside, somebody listens. Raises Busy."""
        listener = Listener()
        with self._mutex:
            if len(self._listeners) >= MAX_LISTENERS:
                raise Busy(
                    f"{MAX_LISTENERS} listen to events already; close one, or ask /revision and /readyz now and then",
                    limit=MAX_LISTENERS,
                )
            self._listeners = (*self._listeners, listener)
        try:
            yield listener
        finally:
            with self._mutex:
                self._listeners = tuple(each for each in self._listeners if each is not listener)


async def current_listener(request: Request) -> AsyncIterator[Listener]:
    """Who listens, for as long as the stream goes on. Raises Busy."""
    with request.app.state.events.listening() as listener:
        yield listener


@router.get(
    "/events",
    dependencies=[needs("read")],
    response_class=StreamingResponse,
    responses={**STREAM, **responses(400, 422, 503)},
)
async def get_events(
    listener: Annotated[Listener, Depends(current_listener)],
    request: Request,
    caller: Asking,
    _: Annotated[NoQuery, Query()],
) -> EventSourceResponse:
    """What happens here, as server-sent events, until the client leaves or the service stops.

    `revision` (`revision, digest, active_edits`): what is live, at once and whenever that changes, the newest alone
    where several came. `health` (`status, checks`): as `/readyz` tells, at once and whenever it changes. `step`
    (`request_id, kind, step, state, ms`): a step of a change that this process makes has `begun` or `ended`.
    """
    return EventSourceResponse(
        _sent(listener, request.app.state.events, request.app.state.service, caller), headers=STREAM_HEADERS
    )


async def _sent(listener: Listener, events: Events, service: Service, caller: Caller) -> AsyncIterator[bytes]:
    told = _Told(service)
    quiet_since = time.monotonic()
    while not events.ended and caller.holds():
        news = b"".join(told.news(listener))
        if not news and time.monotonic() - quiet_since >= PING_EVERY_S:
            news = KEEPALIVE_COMMENT
        if news:
            yield news
            quiet_since = time.monotonic()
        await listener.wait()


class _Told:
    """What one listener was told last."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._published: Published | None = None
        self._health: Health | None = None

    def news(self, listener: Listener) -> Iterator[bytes]:
        """What there is to tell beyond that."""
        for step in listener.steps():
            yield frame("step", asdict(step))
        engine = self._service.engine
        if engine is not None and engine.published != self._published:
            self._published = now = engine.published
            data = {"revision": now.revision, "digest": now.digest, "active_edits": now.active_edits}
            yield frame("revision", data, id=str(now.revision))
        health = Health.of(self._service.checks())
        if health != self._health:
            self._health = health
            yield frame("health", health.model_dump(include={"status", "checks"}))
