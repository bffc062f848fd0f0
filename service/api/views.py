"""What is answered over HTTP. Field names are a contract: add to them, do not rename."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue

from service.api.requests import EditBody
from service.engine import Audit, Capacity, CheckForm, Outcome, Published
from service.engine.history import Edit
from service.ledger import ChatMessage, Restored, RolledBack


class Answer(BaseModel):
    text: str


class ParaphraseCheck(BaseModel):
    prompt: str
    took: bool
    text: str


class KeepCheck(BaseModel):
    prompt: str
    kept: bool
    before: str
    after: str


class FormCheck(BaseModel):
    """The edit's own question, as bare text or as a chat of one turn. prompt: as the model reads it."""

    form: CheckForm
    prompt: str
    took: bool
    text: str


class ConflictCheck(BaseModel):
    """An active edit whose key is near to this one's. overlap: 0 to 1. superseded: this one took its place."""

    id: str
    overlap: float
    superseded: bool


class Checks(BaseModel):
    """took: greedy decoding begins with the correction. drawdown: on the guard prompts, against the base, 0 to 1.
    capacity: how full the fullest weight is then, 0 to 1; null where edits are summed, and of older ones.
    lost: other active edits that held before this one, and no longer with it. conflicts: nearest first."""

    took: bool
    paraphrases: list[ParaphraseCheck]
    keep: list[KeepCheck]
    forms: list[FormCheck] = []
    drawdown: float
    drawdown_budget: float
    capacity: float | None = None
    lost: list[str]
    conflicts: list[ConflictCheck] = []


class RolledBackBy(BaseModel):
    """revived: edits that came back, since this one no longer supersedes them. expired: its time had come.

    to_revision: it was taken back together with others, to restore this one.
    """

    revision: int
    at: datetime
    reason: str | None
    actor: str | None
    revived: list[str] = []
    expired: bool = False
    to_revision: int | None = None

    @classmethod
    def of(cls, entry: RolledBack | Restored, revived: Sequence[str]) -> Self:
        return cls(
            revision=entry.sequence,
            at=entry.created_at,
            reason=entry.reason,
            actor=entry.actor,
            revived=list(revived),
            expired=isinstance(entry, RolledBack) and entry.expired,
            to_revision=entry.revision if isinstance(entry, Restored) else None,
        )


class EditView(BaseModel):
    """An edit. revision and digest: of the state that it led to; inside a batch there is none, so no digest.

    prompt: as the model reads it, which of chat messages is the template's.
    scale: strength found by the line search. supersedes: edits in whose place it is. superseded_by: the active edit in
    its place, while it stands.
    """

    id: str | None
    revision: int
    status: Literal["applied", "superseded", "rolled_back", "unchanged", "dry_run"]
    prompt: str
    correction: str
    messages: list[ChatMessage] | None = None
    subject: str | None = None
    reason: str | None = None
    actor: str | None = None
    metadata: dict[str, JsonValue] = {}
    created_at: datetime | None = None
    expires_at: datetime | None = None
    scale: float | None
    digest: str | None
    timings_ms: dict[str, float]
    before: Answer
    after: Answer
    checks: Checks | None
    supersedes: list[str] = []
    superseded_by: str | None = None
    batch: InBatchView | None = None
    rolled_back: RolledBackBy | None = None
    detail: str | None = None

    @classmethod
    def of_edit(cls, edit: Edit) -> Self:
        applied, by, place = edit.applied, edit.rolled_back, edit.applied.batch
        return cls(
            id=applied.edit_id,
            revision=applied.sequence,
            status=edit.status,
            prompt=applied.prompt,
            correction=applied.correction,
            messages=list(applied.messages) or None,
            subject=applied.subject,
            reason=applied.reason,
            actor=applied.actor,
            metadata=applied.metadata,
            created_at=applied.created_at,
            expires_at=applied.expires_at,
            scale=applied.scale,
            digest=applied.state_digest,
            timings_ms=applied.timings_ms,
            before=Answer(text=applied.before),
            after=Answer(text=applied.after),
            checks=Checks.model_validate(applied.checks),
            supersedes=list(applied.supersedes),
            superseded_by=edit.superseded_by,
            batch=place and InBatchView(id=place.id, position=place.position, size=place.size),
            rolled_back=by and RolledBackBy.of(by, edit.revived),
        )

    @classmethod
    def of_outcome(cls, outcome: Outcome, body: EditBody) -> Self:
        if outcome.applied is None:
            return cls(
                id=None,
                revision=outcome.revision,
                status="unchanged",
                prompt=outcome.prompt,
                messages=body.messages and [ChatMessage(**message.model_dump()) for message in body.messages],
                correction=body.correction,
                scale=None,
                digest=outcome.digest,
                timings_ms={},
                before=Answer(text=outcome.before),
                after=Answer(text=outcome.before),
                checks=None,
                detail="the model already answers with this correction; nothing was changed",
            )
        shown = cls.of_edit(Edit(outcome.applied))
        if outcome.committed:
            return shown
        return shown.model_copy(update={"id": None, "status": "dry_run", "revision": outcome.revision})


class InBatchView(BaseModel):
    """Which edit of a batch this is, counted from 1; of the batch as a whole, drawdown and lost are in its last."""

    id: str
    position: int
    size: int


class AuditedEdit(BaseModel):
    """holds: greedy decoding begins with the correction; where every token of it is ahead by a clear margin, it does.

    margin_nats: how far the least preferred token of the correction is ahead of any other. text: what the model says,
    where it was decoded. lost_to: the later edit, or batch, before which it held and with which it no longer did.
    """

    id: str
    prompt: str
    correction: str
    holds: bool
    margin_nats: float | None
    text: str | None
    lost_to: str | None


class AuditSummary(BaseModel):
    """The last look at whether the active edits hold. revision: of the state that was looked at."""

    revision: int
    digest: str
    taken_at: datetime
    took_ms: float
    held: int
    lost: int

    @classmethod
    def of(cls, audit: Audit) -> Self:
        return cls(
            revision=audit.published.revision,
            digest=audit.published.digest,
            taken_at=audit.taken_at,
            took_ms=audit.took_ms,
            held=audit.held,
            lost=audit.lost,
        )


class AuditView(AuditSummary):
    """The same with every edit, in the order of application. current: that state is still the live one."""

    current: bool
    edits: list[AuditedEdit]

    @classmethod
    def of(cls, audit: Audit, live: Published) -> Self:
        edits = [
            AuditedEdit(
                id=each.edit.id,
                prompt=each.edit.applied.prompt,
                correction=each.edit.applied.correction,
                holds=each.holds,
                margin_nats=round(each.margin_nats, 4) if math.isfinite(each.margin_nats) else None,
                text=each.text,
                lost_to=audit.lost_to.get(each.edit.id),
            )
            for each in audit.edits
        ]
        return cls(
            **AuditSummary.of(audit).model_dump(), current=audit.published.revision == live.revision, edits=edits
        )


class Pending(BaseModel):
    """A change that goes on; the same request again tells what came of it."""

    status: Literal["pending"] = "pending"
    detail: str


class EditPage(BaseModel):
    """next_cursor: for the following page; null at the end."""

    items: list[EditView]
    next_cursor: str | None


class BaseModelView(BaseModel):
    ref: str
    kind: Literal["decoder", "encoder-decoder", "classifier"]
    digest: str
    parameters: int


class EditorView(BaseModel):
    """notice: what its users should know, such as that it was never trained."""

    name: str
    digest: str
    aggregate: str
    trained: bool
    notice: str | None


class CapacityView(BaseModel):
    """fullness: of the fullest weight, 0 to 1; null where edits are summed. limit: beyond it none is made."""

    fullness: float | None
    limit: float
    warning: str | None

    @classmethod
    def of(cls, fullness: float | None) -> Self:
        capacity = Capacity(fullness)
        return cls(fullness=capacity.fullness, limit=capacity.limit, warning=capacity.warning)


class ModelView(BaseModel):
    """What is loaded, and the exact state of its weights."""

    base_model: BaseModelView
    editor: EditorView
    revision: int
    active_edits: int
    digest: str
    capacity: CapacityView
    audit: AuditSummary | None
    kill_switch_engaged: bool
    device: str
    dtype: str


class RevisionView(BaseModel):
    """What is live here. head: the ledger's last revision; null while the ledger cannot be asked. lag: how many of its
    entries are not live here yet. weights_digest: of the edited weights in memory, where it was asked to verify them.
    """

    revision: int
    digest: str
    head: int | None
    lag: int | None
    weights_digest: str | None = None

    @classmethod
    def of(cls, published: Published, head: int | None, weights_digest: str | None = None) -> Self:
        return cls(
            revision=published.revision,
            digest=published.digest,
            head=head,
            lag=None if head is None else max(0, head - published.revision),
            weights_digest=weights_digest,
        )


class Health(BaseModel):
    """status: `ready`, or what is missing. checks: each part, `ok` or its trouble. warnings: what does not stop it."""

    status: Literal["ok", "ready", "not_ready"]
    checks: dict[str, str] = {}
    warnings: list[str] = []

    @classmethod
    def of(cls, checks: dict[str, str], warnings: Sequence[str] = ()) -> Self:
        ready = all(state == "ok" for state in checks.values())
        return cls(status="ready" if ready else "not_ready", checks=checks, warnings=list(warnings))


class OpenAIError(BaseModel):
    """An error as OpenAI writes it. code: stable, and the same as of a problem. param: the field that is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIProblem(BaseModel):
    error: OpenAIError


class Problem(BaseModel):
    """RFC 9457. code: stable, for programs; further members are facts about this problem.

    request_id: as in X-Request-Id, and in the service's log.
    """

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
