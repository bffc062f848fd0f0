"""`/model/health`: how the live model fares, as one document: what moved, how full it is, and how it came to that.

What has to be asked of the model is asked once for every state of it, so that polling is cheap.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from service.api.callers import needs
from service.api.headers import Loaded, tag
from service.api.problems import responses
from service.api.requests import StrictRequest
from service.api.views import AuditSummary, CapacityView, RevisionView
from service.engine import MAX_POINTS, GuardPrompt, Point

router = APIRouter()


class HealthQuery(StrictRequest):
    """How far to look back."""

    points: int = Field(200, ge=1, le=MAX_POINTS, description="Most points of the series, the newest.")


class GuardPromptView(BaseModel):
    """tokens: of the base's greedy continuation. moved: how many of them the live model, reading that continuation, no
    longer prefers. base, live: what each says itself, greedily, over as many tokens."""

    prompt: str
    tokens: int
    moved: int
    base: str
    live: str

    @classmethod
    def of(cls, prompt: GuardPrompt) -> Self:
        return cls(**vars(prompt))


class PointView(BaseModel):
    """The state behind an entry of the ledger. drawdown, capacity: as they were judged before it; null of a rollback,
    and of entries from before there was such a figure."""

    revision: int
    at: datetime
    kind: Literal["applied", "rolled_back", "restored"]
    active_edits: int
    drawdown: float | None
    capacity: float | None

    @classmethod
    def of(cls, point: Point) -> Self:
        return cls(**vars(point))


class ModelHealthView(BaseModel):
    """head, lag: as of `/revision`. drawdown: of the live model on the guard prompts, measured for this document.

    guard: those prompts, the one that moved most first. audit_current: the last audit is of this revision.
    series: a point for every entry that changed the state, the oldest first; a batch has one.
    """

    revision: int
    digest: str
    active_edits: int
    head: int | None
    lag: int | None
    kill_switch_engaged: bool
    capacity: CapacityView
    drawdown: float
    drawdown_budget: float
    guard: list[GuardPromptView]
    audit: AuditSummary | None
    audit_current: bool
    series: list[PointView]


@router.get("/model/health", dependencies=[needs("read")], responses=responses(400, 422, 503))
def get_model_health(
    query: Annotated[HealthQuery, Query()], engine: Loaded, request: Request, response: Response
) -> ModelHealthView:
    """How the live model fares: guard prompts that moved, capacity, the last audit, lag, and how it came to that.

    The guard is asked when somebody asks for the first time after the state has changed; until then that is kept.
    """
    published, drift = engine.drift.read()
    audit = engine.last_audit
    tag(response, published)
    return ModelHealthView(
        **RevisionView.of(published, request.app.state.service.head()).model_dump(exclude={"weights_digest"}),
        active_edits=published.active_edits,
        kill_switch_engaged=engine.history.killed is not None,
        capacity=CapacityView.of(published.fullness),
        drawdown=drift.drawdown,
        drawdown_budget=engine.limits.guard_budget,
        guard=[GuardPromptView.of(each) for each in drift.prompts],
        audit=audit and AuditSummary.of(audit),
        audit_current=audit is not None and audit.published.revision == published.revision,
        series=[PointView.of(each) for each in engine.history.series.until(published.revision, query.points)],
    )
