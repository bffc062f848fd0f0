"""What is answered about taking edits back: what changed, or would, and how to undo it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel

from service.api.views import Answer, EditView
from service.engine import Edit, Reversal
from service.ledger import Restored, Tagged


class ChangeView(BaseModel):
    """An active edit that leaves the live weights, or returns to them. now, then: of a preview, what is said to its
    prompt before and after; null where there are so many edits that not all were asked."""

    id: str
    prompt: str
    correction: str
    change: Literal["leaves", "returns"]
    now: Answer | None = None
    then: Answer | None = None


def changes_of(done: Reversal) -> list[ChangeView]:
    def shown(edit: Edit, change: Literal["leaves", "returns"]) -> ChangeView:
        now, then = done.answers.get(edit.id, (None, None))
        return ChangeView(
            id=edit.id,
            prompt=edit.applied.prompt,
            correction=edit.applied.correction,
            change=change,
            now=None if now is None else Answer(text=now),
            then=None if then is None else Answer(text=then),
        )

    return [
        *(shown(edit, "leaves") for edit in done.change.leaving),
        *(shown(edit, "returns") for edit in done.change.returning),
    ]


class RollbackView(BaseModel):
    """The state after a rollback, the edit that was taken back, and those that came back in its place.

    Of a dry run, revision is the live one, and the digest that of the state that there would be.
    """

    id: str
    status: Literal["rolled_back", "dry_run"]
    revision: int
    digest: str
    active_edits: int
    revived: list[str]
    changes: list[ChangeView]
    edit: EditView

    @classmethod
    def of(cls, done: Reversal, edit: Edit) -> Self:
        revived = [each.id for each in done.change.returning]
        return cls(
            id=edit.id,
            status="rolled_back" if done.committed else "dry_run",
            revision=done.revision,
            digest=done.digest,
            active_edits=done.active_edits,
            revived=revived,
            changes=changes_of(done),
            edit=EditView.of_edit(
                Edit(edit.applied, rolled_back=done.entry, revived=tuple(revived)) if done.committed else edit
            ),
        )


class TargetView(BaseModel):
    revision: int
    tag: str | None


class RestoreView(BaseModel):
    """The state after going to a revision. rolled_back, restored: ids of all edits that this took back or returned,
    also of those that others supersede. expired: of those that stay away, since their time has come.

    undo: the revision to go to for what was live before. Of a dry run, revision is the live one, and the digest that of
    the state that there would be.
    """

    status: Literal["restored", "unchanged", "dry_run"]
    revision: int
    digest: str
    active_edits: int
    target: TargetView
    rolled_back: list[str]
    restored: list[str]
    expired: list[str]
    changes: list[ChangeView]
    undo: TargetView | None

    @classmethod
    def of(cls, done: Reversal) -> Self:
        changed = bool(done.change.taken or done.change.returned)
        return cls(
            status="unchanged" if not changed else "restored" if done.committed else "dry_run",
            revision=done.revision,
            digest=done.digest,
            active_edits=done.active_edits,
            target=TargetView(revision=done.target.revision, tag=done.target.tag),
            rolled_back=list(done.change.taken),
            restored=list(done.change.returned),
            expired=list(done.change.expired),
            changes=changes_of(done),
            undo=TargetView(revision=done.revision - 1, tag=None) if changed and done.committed else None,
        )


class KillSwitchView(BaseModel):
    """engaged: the base is served, and nothing is changed. at, actor, reason: of who engaged it, or released it last.

    revision, digest, active_edits: of the live state.
    """

    engaged: bool
    at: datetime | None
    actor: str | None
    reason: str | None
    revision: int
    digest: str
    active_edits: int

    @classmethod
    def of(cls, entry: Restored | None, revision: int, digest: str, active_edits: int) -> Self:
        return cls(
            engaged=entry is not None and entry.kill_switch == "engaged",
            at=entry and entry.created_at,
            actor=entry and entry.actor,
            reason=entry and entry.reason,
            revision=revision,
            digest=digest,
            active_edits=active_edits,
        )


class TagView(BaseModel):
    """A name for a revision. recorded_at_revision: that the tag itself led to; its state is the same as before."""

    name: str
    revision: int | None
    recorded_at_revision: int
    created_at: datetime
    actor: str | None
    reason: str | None

    @classmethod
    def of(cls, tagged: Tagged) -> Self:
        return cls(
            name=tagged.name,
            revision=tagged.revision,
            recorded_at_revision=tagged.sequence,
            created_at=tagged.created_at,
            actor=tagged.actor,
            reason=tagged.reason,
        )


class TagList(BaseModel):
    """Newest first."""

    items: list[TagView]
