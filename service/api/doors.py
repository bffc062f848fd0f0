"""Everything that stands between a request and its route, put together by the settings.

From outside: shield (headers) > access log (unexpected errors) > CORS > gate (host, site, key, scope, rate, audit) >
limits > route.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.api.access_log import AccessMiddleware
from service.api.callers import Routes
from service.api.gate import GateMiddleware
from service.api.hosts import LOCALHOST, is_loopback
from service.api.keys import Keyring, read_secret
from service.api.limits import LimitsMiddleware
from service.api.rates import Rates
from service.api.sessions import Sessions
from service.api.shield import ShieldMiddleware
from service.telemetry import Telemetry

if TYPE_CHECKING:
    from service.settings import Settings

logger = logging.getLogger("mend.api")

SENT = ("Authorization", "Content-Type", "Idempotency-Key", "If-Match", "X-Actor", "X-Request-ID")
TOLD = ("ETag", "Location", "Retry-After", "Server-Timing", "X-Request-ID")
"""Headers that pages of other origins may send, and read."""
ANY_HOST = "*"
PAGES = "/ui/"


def guard(
    app: FastAPI, settings: Settings, routers: Sequence[APIRouter], pages: APIRouter, telemetry: Telemetry
) -> None:
    """Give the app its routes, and what guards them. Raises KeysUnusable, UndeclaredRoute.

    pages: of the dashboard. They ask the other routes as anybody does, and are not asked for a key themselves.
    """
    ring = Keyring(settings.api_keys) if settings.api_keys else None
    secret = settings.session_secret and read_secret(settings.session_secret)
    sessions = app.state.sessions = Sessions(ring, secret) if ring else None
    app.state.warnings = ring.warnings if ring else lambda: _warnings(settings)
    for warning in app.state.warnings():
        logger.warning("%s", warning)
    # What is added last stands outside.
    app.add_middleware(LimitsMiddleware, batch_edits=settings.max_batch, arrives_within_s=settings.request_timeout_s)
    app.add_middleware(
        GateMiddleware,
        routes=Routes(routers),
        ring=ring,
        sessions=sessions,
        rates=Rates(settings.rate_reads, settings.rate_changes),
        hosts=_hosts(settings),
        origins=frozenset(settings.cors_origins),
        pages=PAGES,
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=SENT, expose_headers=TOLD,
        )  # fmt: skip
    app.add_middleware(AccessMiddleware, telemetry=telemetry)
    app.add_middleware(ShieldMiddleware)
    for router in (*routers, pages):
        app.include_router(router)
    if ring is None:
        app.openapi = _without_a_key(app.openapi)


def _without_a_key(describe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same document, in which no route insists on a key, since none is asked for."""

    def described() -> dict[str, Any]:
        document = describe()
        for operations in document["paths"].values():
            for operation in operations.values():
                if "security" in operation and {} not in operation["security"]:
                    operation["security"].insert(0, {})
        return document

    return described


def _hosts(settings: Settings) -> frozenset[str] | None:
    """By which names the service may be addressed; None for any. Pages of a name that somebody had point at where it
    listens ask as if they were its own, which only matters where no key is asked for."""
    if settings.allowed_hosts:
        return None if ANY_HOST in settings.allowed_hosts else frozenset(settings.allowed_hosts)
    return frozenset({LOCALHOST}) if settings.api_keys is None else None


def _warnings(settings: Settings) -> list[str]:
    if is_loopback(settings.host):
        return []
    return ["there are no API keys, and it listens beyond loopback: whoever reaches the port may do everything"]
