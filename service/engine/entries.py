"""From what was asked and measured to what the ledger keeps."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from editors.factors import digest
from service.engine.requests import EditRequest
from service.ledger import Applied, ChatMessage


def new_id(kind: str = "edit") -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def applied_entry(request: EditRequest, raw: bytes, **measured: Any) -> Applied:
    """The entry of an edit that goes live. raw: its factors. measured: the other fields of `Applied`."""
    return Applied(
        created_at=datetime.now(UTC),
        actor=request.actor,
        reason=request.reason,
        prompt=request.prompt,
        correction=request.correction,
        subject=request.subject,
        paraphrases=request.paraphrases,
        keep=request.keep,
        metadata=request.metadata,
        expires_at=request.expires_at,
        messages=tuple(ChatMessage(role=each.role, content=each.content) for each in request.messages),
        check_forms=request.check_forms,
        factors_digest=digest(raw),
        idempotency_key=request.idempotency_key,
        request_digest=request.request_digest,
        **measured,
    )
