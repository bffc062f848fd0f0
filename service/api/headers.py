"""What routes have in common: the engine, how headers are read, and those that tell the revision and the time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Request, Response

from service.engine import Engine, Published


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


Loaded = Annotated[Engine, Depends(current_engine)]
Writable = Annotated[Engine, Depends(current_writer)]


def time_it(response: Response, publish_ms: Mapping[str, float]) -> None:
    """How long the steps behind the entry in the ledger took, which it cannot hold."""
    if publish_ms:
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={ms}" for name, ms in publish_ms.items())


def tag(response: Response, published: Published | int) -> None:
    revision = published if isinstance(published, int) else published.revision
    response.headers["ETag"] = f'"{revision}"'
