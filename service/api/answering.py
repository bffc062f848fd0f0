"""Between the routes and the thread that decodes: what is told of a request, as the event loop waits for it.

Nothing here holds a thread while it waits. A client that leaves cancels its request, whether it is answered at once or
piece by piece, and also while it still waits for a place.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from service.api.headers import tag
from service.api.streams import PING_EVERY_S, STREAM_HEADERS
from service.confidential import note_texts
from service.engine import Ended, Event, Listener, Published, Scored, Ticket

Begin = Callable[[Listener], Ticket]
"""Has prompts continued. It may wait, and so runs in a thread."""


@dataclass
class Answer:
    """One whole answer. tokens: where their probabilities were asked for."""

    ended: Ended
    text: str
    tokens: list[Scored]


class Frames(Protocol):
    """How a stream tells what happens."""

    def of(self, event: Event) -> Iterable[bytes]:
        """What is sent of it. An exception, or the end of the last answer, is the last event."""


class _Telling:
    """What is told of one request."""

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._left = False
        self._texts: defaultdict[int, str] = defaultdict(str)
        self.ticket: Ticket | None = None

    def tell(self, event: Event) -> None:
        """From the thread that decodes. Raises ClientDisconnect when there is nobody to be told."""
        if self._left:
            raise ClientDisconnect
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Ended):
            note_texts("answer", text=self._texts[event.index])
        elif not isinstance(event, Exception):
            self._texts[event.index] += event.piece.text
        return event

    async def watch(self, request: Request) -> None:
        """Tell when the client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(ClientDisconnect())

    def leave(self) -> None:
        """Nobody listens any more."""
        self._left = True
        if self.ticket is not None:
            self.ticket.cancel()


@asynccontextmanager
async def _begun(request: Request, begin: Begin) -> AsyncIterator[_Telling]:
    """Inside, that the client has left is told as an exception. What is raised inside cancels the request."""
    telling = _Telling()
    watch = asyncio.create_task(telling.watch(request))
    try:
        telling.ticket = await run_in_threadpool(begin, telling.tell)
        yield telling
    except BaseException:
        telling.leave()
        raise
    finally:
        watch.cancel()


async def whole(request: Request, begin: Begin) -> tuple[list[Answer], Published]:
    """Every answer at its end, and the state that they are from. Raises ClientDisconnect when nobody is there."""
    texts: defaultdict[int, str] = defaultdict(str)
    tokens: defaultdict[int, list[Scored]] = defaultdict(list)
    ended: dict[int, Ended] = {}
    async with _begun(request, begin) as telling:
        while len(ended) < telling.ticket.asks:
            event = await telling.next()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Ended):
                ended[event.index] = event
            else:
                texts[event.index] += event.piece.text
                tokens[event.index] += event.piece.tokens
    return [Answer(ended[each], texts[each], tokens[each]) for each in sorted(ended)], telling.ticket.published


async def streamed(request: Request, begin: Begin, frames: Callable[[Published], Frames]) -> EventSourceResponse:
    """Server-sent events, from the first that there is something to tell of. Raises what comes before it."""
    async with _begun(request, begin) as telling:
        first = await telling.next()
        if isinstance(first, Exception):
            raise first
    stream = _Stream(telling, first, frames(telling.ticket.published))
    tag(stream, telling.ticket.published)
    return stream


class _Stream(EventSourceResponse):
    """Cancels its request when the client leaves."""

    def __init__(self, telling: _Telling, first: Event, frames: Frames) -> None:
        self._telling = telling
        super().__init__(_sent(telling, first, frames), headers=STREAM_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._telling.leave()


async def _sent(telling: _Telling, event: Event, frames: Frames) -> AsyncIterator[bytes]:
    left = telling.ticket.asks
    while not isinstance(event, ClientDisconnect):  # which is nobody's mistake, and told to nobody
        for frame in frames.of(event):
            yield frame
        left -= isinstance(event, Ended)
        if not left or isinstance(event, Exception):
            return
        while True:
            try:
                event = await asyncio.wait_for(telling.next(), PING_EVERY_S)
                break
            except TimeoutError:
                yield KEEPALIVE_COMMENT
