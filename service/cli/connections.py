"""Connections of `mend serve`: a client that takes its time, or too many of them, hold nobody else up.

Flow: uvicorn's own protocol, with a clock for the time in which a request must arrive and an answer be taken, a bound
on how many connections there are, and problems where it would answer in plain text.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.callers import OPEN
from service.api.limits import arrived_late
from service.api.problems import problem
from service.api.shield import HEADERS, ShieldMiddleware

SPARE = 64
"""Connections beyond the bound that are still told so; further ones are cut."""
NO_PATH = ""
"""Of a request whose path is not known."""
CLOSE = {"Connection": "close"}
INCOMPLETE = (h11.IDLE, h11.SEND_BODY)
"""States of a client whose request is not here whole."""


def protocol(arrives_within_s: float, max_connections: int) -> type[H11Protocol]:
    """The class that uvicorn makes its connections of."""

    class Connection(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None
        _sending: asyncio.TimerHandle | None = None
        _heard = _late = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections + SPARE:
                transport.abort()
                return
            if len(self.connections) > max_connections:
                self.app = ShieldMiddleware(_busy_but_for_probes(self.app))
            self._wait()

        def data_received(self, data: bytes) -> None:
            self._heard = True
            super().data_received(data)
            if self.conn.their_state not in INCOMPLETE:
                self._waiting = _cancelled(self._waiting)
            elif self._waiting is None:
                self._wait()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self._late:
                self.transport.close()
            self._heard = False

        def pause_writing(self) -> None:
            super().pause_writing()
            self._sending = self.loop.call_later(arrives_within_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._sending = _cancelled(self._sending)

        def connection_lost(self, exc: Exception | None) -> None:
            self._waiting, self._sending = _cancelled(self._waiting), _cancelled(self._sending)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            error = sys.exc_info()[1]
            if getattr(error, "error_status_hint", 400) == 431:
                detail = "request line and headers may have 16 KiB at most; send long prompts by POST /generate"
                self._say(problem(NO_PATH, "headers_too_large", detail, headers=CLOSE))
            else:
                self._say(problem(NO_PATH, "malformed_request", "this is not HTTP/1.1", headers=CLOSE))

        def _wait(self) -> None:
            self._waiting = self.loop.call_later(arrives_within_s, self._end)

        def _end(self) -> None:
            """The time is over: of a request in its headers, of one in its body, or of one that never began."""
            self._waiting = None
            if self.cycle is not None and not self.cycle.response_complete:
                self._late = True  # its body is late, which whoever reads it says
            elif self.conn.their_state is h11.IDLE and self._heard:
                self._say(problem(NO_PATH, "request_timeout", arrived_late(arrives_within_s), headers=CLOSE))
            else:
                self.transport.close()

        def _say(self, answer: JSONResponse) -> None:
            """Answer a request that never came to be one, unless its answer has begun."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            headers = [*answer.raw_headers, *((name.lower().encode(), HEADERS[name].encode()) for name in HEADERS)]
            for event in (
                h11.Response(status_code=answer.status_code, headers=headers),
                h11.Data(data=answer.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            self.transport.close()

    return Connection


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _busy_but_for_probes(app: ASGIApp) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in OPEN:
            await app(scope, receive, send)
        else:
            busy = problem(scope["path"], "busy", "too many connections are open; try again shortly", headers=CLOSE)
            await busy(scope, receive, send)

    return answer
