"""Around every request: its id, its span, its figures and one line in the log, when the last byte has been sent.

The outermost of the app's own layers, in plain ASGI: what is streamed stays so. Nothing of a query string or a body is
told, since that is where prompts are; of a path only the template of its route.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

import anyio
from opentelemetry import propagate, trace
from opentelemetry.trace import INVALID_SPAN, SpanKind, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from service.api.problems import UNEXPECTED, problem, told_codes
from service.api.templates import NO_ROUTE, Templates
from service.telemetry import Telemetry

logger = logging.getLogger("mend.api")
access = logging.getLogger("mend.access")

SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""A client's id for its request, if it may stand in a log."""
PROBES = {"/livez", "/readyz", "/metrics"}
"""Asked every few seconds: logged for those who look for mistakes only, and not traced."""
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
OTHER = "other"
"""What is told of methods that nobody knows, of which there could be any number."""
CLIENT_LEFT = 499
"""Told of an answer that nobody waited for; no client ever sees it."""


class AccessMiddleware:
    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self.app, self._telemetry = app, telemetry
        self._templates: Templates | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._templates = self._templates or Templates(scope["app"].routes)  # all of them are there by now
        exchange = Exchange(scope, receive, send, self._telemetry, self._templates)
        # Not undone: whatever the server itself has to log of this request should carry it too.
        clear_contextvars()
        bind_contextvars(request_id=exchange.request_id)
        with trace.use_span(exchange.span, record_exception=False, set_status_on_exception=False):
            try:
                await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:
                if exchange.status and not exchange.left:
                    raise  # too late for another answer: the server logs it, and cuts the connection
                if exchange.left and isinstance(error, ClientDisconnect | OSError):
                    return
                logger.error("unexpected error", exc_info=error)
                await problem(scope["path"], "internal_error", UNEXPECTED)(scope, receive, exchange.send)
            finally:
                exchange.end()


class Exchange:
    """A request and its answer. status: of what has been sent; 0 before that. left: whether the client is gone."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, telemetry: Telemetry, templates: Templates) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._telemetry, self._templates = telemetry, templates
        self._begun, self._ended = time.perf_counter(), False
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.request_id = given if SANE.fullmatch(given) else uuid.uuid4().hex
        self.status, self.left = 0, False
        self._method = scope["method"] if scope["method"] in METHODS else OTHER
        self._unread = "content-length" in headers or "transfer-encoding" in headers
        self._early: list[Message] = []
        """Received while nobody of the app had asked for it."""
        self._codes = told_codes()
        self._state = scope.setdefault("state", {})
        self.span = INVALID_SPAN
        if scope["path"] not in PROBES:
            attributes = {"http.request.method": self._method, "mend.request_id": self.request_id}
            parent = propagate.extract(headers)
            self.span = telemetry.tracer.start_span(self._method, parent, SpanKind.SERVER, attributes)

    async def receive(self) -> Message:
        return self._early.pop(0) if self._early else await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.left |= not self._ended
            self.end()
        elif not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._look()
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self.request_id
        try:
            await self._send(message)
        except OSError:
            self.left = True
            raise
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()

    async def _look(self) -> None:
        """Whether the client is still there, which the server only tells those who ask for more of the request."""
        while not (self._unread or self.left):
            with anyio.move_on_after(0) as nothing_new:
                self._early.append(await self._next())
            if nothing_new.cancelled_caught:
                return

    def end(self) -> None:
        """Tell of it, once: the last byte has been sent, or nobody is there for more, or no more will come."""
        if self._ended:
            return
        self._ended = True
        took_s = time.perf_counter() - self._begun
        status = CLIENT_LEFT if self.left else self.status or 500
        route = self._templates.find(self._scope["method"], self._scope["path"])
        self._telemetry.answered(self._method, route, status, took_s)
        facts: dict[str, Any] = {"method": self._method, "route": route, "status": status}
        facts["duration_ms"] = round(1000 * took_s, 1)
        for code in self._codes:
            self._telemetry.problem(code)
            facts["code"] = code
        principal = self._state.get("principal")
        if principal is not None:
            facts["who"] = str(getattr(principal, "name", principal))
        access.log(logging.DEBUG if route in PROBES else logging.INFO, "request", extra=facts)
        self._end_span(route, status)

    def _end_span(self, route: str, status: int) -> None:
        if not self.span.is_recording():
            return
        if route != NO_ROUTE:
            self.span.update_name(f"{self._method} {route}")
            self.span.set_attribute("http.route", route)
        if status == CLIENT_LEFT:
            self.span.set_attribute("error.type", "client_left")
        else:
            self.span.set_attribute("http.response.status_code", status)
        if self._codes:
            self.span.set_attribute("error.type", self._codes[-1])
        if status >= 500:
            self.span.set_status(StatusCode.ERROR)
        self.span.end()
