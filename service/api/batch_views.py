"""What is answered of a batch: each edit, and all of them together."""

from __future__ import annotations

from collections import Counter
from typing import Self

from pydantic import BaseModel, ConfigDict

from service.api.views import Answer, Checks
from service.engine import BatchOutcome, ItemStatus
from service.ledger import ChatMessage


class BatchItem(BaseModel):
    """What became of one edit of a batch. index: its place in the request, from 0.

    withheld: nothing is known to be wrong with it, but its batch was refused. code, detail and further members: why it
    was refused itself.
    """

    model_config = ConfigDict(extra="allow")

    index: int
    status: ItemStatus
    prompt: str
    correction: str
    messages: list[ChatMessage] | None = None
    id: str | None = None
    revision: int | None = None
    scale: float | None = None
    before: Answer | None = None
    after: Answer | None = None
    checks: Checks | None = None
    supersedes: list[str] = []
    code: str | None = None
    detail: str | None = None


class BatchChecks(BaseModel):
    """What all edits do together. lost: earlier edits that held before, and no longer with these."""

    drawdown: float
    drawdown_budget: float
    lost: list[str]


class BatchSummary(BaseModel):
    """A batch. id: null when it made no edit. revision and digest: of the state that it led to."""

    id: str | None
    revision: int
    digest: str
    applied: int
    unchanged: int
    refused: int
    checks: BatchChecks | None
    timings_ms: dict[str, float]

    @classmethod
    def of(cls, outcome: BatchOutcome) -> Self:
        statuses = Counter(item["status"] for item in outcome.edits)
        return cls(
            id=outcome.id,
            revision=outcome.revision,
            digest=outcome.digest,
            applied=statuses["applied"],
            unchanged=statuses["unchanged"],
            refused=statuses["refused"],
            checks=BatchChecks.model_validate(outcome.checks) if outcome.checks else None,
            timings_ms=dict(outcome.timings_ms),
        )


class BatchView(BatchSummary):
    """A batch, with what became of each edit, in the order of the request."""

    edits: list[BatchItem]

    @classmethod
    def of(cls, outcome: BatchOutcome) -> Self:
        edits = [BatchItem.model_validate(item) for item in outcome.edits]
        return cls(**BatchSummary.of(outcome).model_dump(), edits=edits)
