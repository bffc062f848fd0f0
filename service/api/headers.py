"""What routes have in common: the engine, and headers that say who asks, on which condition, and at which revision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Header, Request, Response
from pydantic import BeforeValidator

from service.api.callers import Asking
from service.engine import Engine, Published, RevisionMismatch


def current_engine(request: Request) -> Engine:
    """The engine, once it is ready. Raises NotReady before that."""
    return request.app.state.service.ready_engine()


def current_writer(request: Request) -> Engine:
    """The same for changes, which need the ledger as well. Raises LedgerUnavailable while it is known to be gone."""
    engine = current_engine(request)
    request.app.state.service.require_ledger()
    return engine


def as_sent(value: str | None) -> str | None:
    """Headers are read as Latin-1, but most clients send UTF-8."""
    try:
        return value and value.encode("latin-1").decode()
    except UnicodeError:
        return value


async def acting(
    caller: Asking,
    actor: Annotated[
        str | None,
        BeforeValidator(as_sent),
        Header(
            alias="X-Actor",
            max_length=200,
            description="Who asks, or for whom the owner of the key asks; kept in the ledger.",
        ),
    ] = None,
) -> str | None:
    """Who is told to the ledger to have done it."""
    return caller.acts_for(actor)


Loaded = Annotated[Engine, Depends(current_engine)]
Writable = Annotated[Engine, Depends(current_writer)]
Actor = Annotated[str | None, Depends(acting)]
IfMatch = Annotated[str | None, Header(alias="If-Match", description="Only at this revision (its ETag).")]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=200, description="Repeating the request makes one edit."),
]


def expected_revision(if_match: str | None, engine: Engine) -> int | None:
    """The revision that an If-Match header names; `*` matches any."""
    if if_match is None or if_match.strip() == "*":
        return None
    tag = if_match.strip().removeprefix("W/").strip('"')
    if not tag.isascii() or not tag.isdigit() or len(tag) > 15:
        raise RevisionMismatch(-1, engine.published.revision)
    return int(tag)


def time_it(response: Response, publish_ms: Mapping[str, float]) -> None:
    """How long the steps behind the entry in the ledger took, which it cannot hold."""
    if publish_ms:
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={ms}" for name, ms in publish_ms.items())


def tag(response: Response, published: Published | int) -> None:
    revision = published if isinstance(published, int) else published.revision
    response.headers["ETag"] = f'"{revision}"'
