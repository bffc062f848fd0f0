"""What routes have in common: the engine, how a header is read, and headers that tell the revision."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Response

from service.engine import BatchOutcome, Engine, Outcome, Published


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


def describe(response: Response, outcome: Outcome | BatchOutcome) -> None:
    """What came of an edit or a batch, as far as its status and headers tell it.

    Server-Timing: how long the steps behind the entry in the ledger took, which it cannot hold.
    """
    if not outcome.committed:
        response.status_code = 200
    if outcome.publish_ms:
        response.headers["Server-Timing"] = ", ".join(f"{name};dur={ms}" for name, ms in outcome.publish_ms.items())
    tag(response, outcome.revision)


def tag(response: Response, published: Published | int) -> None:
    revision = published if isinstance(published, int) else published.revision
    response.headers["ETag"] = f'"{revision}"'
