"""What a request for a change says of itself in its headers: who asks, at which revision alone, and by which key.

Flow: X-Actor, If-Match, Idempotency-Key -> Asked -> the note and the expected revision that the engine is given.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header
from pydantic import BeforeValidator

from service.api.callers import Asking
from service.api.headers import as_sent
from service.engine import Engine, Note, RevisionMismatch


@dataclass(frozen=True)
class Asked:
    """actor: who is told to the ledger to have done it. if_match, idempotency_key: as they were sent."""

    actor: str | None
    if_match: str | None
    idempotency_key: str | None

    def note(self, reason: str | None, *what: Any) -> Note:
        """Who asks and why. what: is asked for, by which a repeated request is known."""
        digest = hashlib.sha256(json.dumps([*what, reason]).encode()).hexdigest()
        return Note(self.actor, reason, self.idempotency_key, f"{what[0]}:{digest}" if self.idempotency_key else None)

    def expected_revision(self, engine: Engine) -> int | None:
        """The revision that If-Match names; `*` matches any."""
        if self.if_match is None or self.if_match.strip() == "*":
            return None
        tag = self.if_match.strip().removeprefix("W/").strip('"')
        if not tag.isascii() or not tag.isdigit() or len(tag) > 15:
            raise RevisionMismatch(-1, engine.published.revision)
        return int(tag)


async def asked_for(
    caller: Asking,
    if_match: Annotated[str | None, Header(alias="If-Match", description="Only at this revision (its ETag).")] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=200,
            description="Repeating the request makes one edit.",
        ),
    ] = None,
    actor: Annotated[
        str | None,
        BeforeValidator(as_sent),
        Header(
            alias="X-Actor",
            max_length=200,
            description="Who asks, or for whom the owner of the key asks; kept in the ledger.",
        ),
    ] = None,
) -> Asked:
    """Of a key's owner the ledger is told that it was he, and for whom he says he asked."""
    return Asked(caller.acts_for(actor), if_match, idempotency_key)


Changing = Annotated[Asked, Depends(asked_for)]
