"""Taking edits back, one or all that a revision did not have, and returning what it had; names for revisions.

    what would change -> factors -> stage -> (preview: ask both views) -> commit -> publish

Nothing is judged: the state was live before, and was judged then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from service.engine.errors import RevisionNotRestorable
from service.engine.history import Change, Edit, History
from service.engine.requests import Note
from service.engine.workshop import Workshop
from service.ledger import FactorsMissing, Restored, RolledBack, Tagged

ASKED = 64
"""Edits whose answers a preview shows; of more, only what they are."""


@dataclass(frozen=True)
class Target:
    """A revision, and the tag by which it was named."""

    revision: int
    tag: str | None = None


@dataclass(frozen=True)
class Reversal:
    """What taking edits back has done, or (preview) would do. entry: None where there is nothing to do.

    target: of one that restores a revision.
    answers: of a preview, what is said now and what would be said then, by the id of an edit.
    """

    entry: RolledBack | Restored | None
    change: Change
    revision: int
    digest: str
    active_edits: int
    committed: bool = True
    target: Target | None = None
    answers: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: RolledBack | Restored, history: History) -> Reversal:
        """As the ledger tells it: the same whenever it is told."""
        before = {edit.id: edit for edit in history.active_at(entry.sequence - 1)}
        after = {edit.id: edit for edit in history.active_at(entry.sequence)}
        one = isinstance(entry, RolledBack)
        change = Change(
            taken=(entry.edit_id,) if one else entry.taken,
            returned=() if one else entry.returned,
            leaving=tuple(edit for edit_id, edit in before.items() if edit_id not in after),
            returning=tuple(edit for edit_id, edit in after.items() if edit_id not in before),
            expired=() if one else entry.expired,
        )
        target = None if one else Target(entry.revision, entry.tag)
        return cls(entry, change, entry.sequence, entry.state_digest, len(after), target=target)


def roll_back(
    workshop: Workshop, edit_id: str, note: Note, *, dry_run: bool = False, expired: bool = False
) -> Reversal:
    """Take one edit back. Raises EditNotFound, AlreadyRolledBack, LedgerError."""

    def entry(**found: Any) -> RolledBack:
        return RolledBack(edit_id=edit_id, expired=expired, **found)

    return _move(workshop, workshop.history.rolling_back(edit_id), entry, note, dry_run=dry_run)


def restore(
    workshop: Workshop,
    target: Target,
    note: Note,
    *,
    dry_run: bool = False,
    kill_switch: Literal["engaged", "released"] | None = None,
) -> Reversal:
    """Make what stood at a revision stand again. Raises RevisionNotFound, RevisionNotRestorable, LedgerError."""
    change = workshop.history.restoring(target.revision, datetime.now(UTC))
    if not (change.taken or change.returned or kill_switch):
        now = workshop.weights.published
        return Reversal(None, change, now.revision, now.digest, now.active_edits, committed=False, target=target)

    def entry(**found: Any) -> Restored:
        return Restored(
            revision=target.revision,
            tag=target.tag,
            taken=change.taken,
            returned=change.returned,
            expired=change.expired,
            kill_switch=kill_switch,
            **found,
        )

    return replace(_move(workshop, change, entry, note, dry_run=dry_run), target=target)


def _move(
    workshop: Workshop, change: Change, as_entry: Callable[..., RolledBack | Restored], note: Note, *, dry_run: bool
) -> Reversal:
    journal, weights = workshop.journal, workshop.weights
    require_factors(workshop, map(workshop.history.find, change.returned))
    returning, leaving = journal.factors(change.returning), journal.factors(change.leaving)
    with weights.staged(add=returning, remove=leaving):
        digest = weights.state.digest()
        entry = as_entry(
            sequence=weights.published.revision + 1, created_at=datetime.now(UTC), state_digest=digest, **vars(note)
        )
        done = Reversal(entry, change, entry.sequence, digest, weights.state.edits)
        if dry_run:
            now = weights.published.revision
            return replace(done, revision=now, committed=False, answers=_answers(workshop, change))
        journal.commit((entry, b""))
    return done


def require_factors(workshop: Workshop, edits: Any) -> None:
    """Raises RevisionNotRestorable where some of these edits have lost their factors, LedgerUnavailable."""
    try:
        workshop.journal.factors(edits)
    except FactorsMissing as error:
        raise RevisionNotRestorable(
            f"the factors of the edit of revision {error.facts['sequence']} were dropped after it was rolled back; "
            "what a tag names is kept. Make that edit again instead",
            sequence=error.facts["sequence"],
        ) from error


def _answers(workshop: Workshop, change: Change) -> dict[str, tuple[str, str]]:
    edits = [*change.leaving, *change.returning][:ASKED]
    prompts = [edit.applied.prompt for edit in edits]
    lengths = [workshop.answers.length(_tokens(workshop, edit)) for edit in edits]
    now, then = (workshop.answers.say(view, prompts, lengths) for view in
                 (workshop.weights.live, workshop.weights.candidate))  # fmt: skip
    return {edit.id: said for edit, said in zip(edits, zip(now, then, strict=True), strict=True)}


def _tokens(workshop: Workshop, edit: Edit) -> Any:
    return workshop.base.encode(edit.applied.prompt, edit.applied.correction)


def engage(workshop: Workshop, note: Note) -> Restored:
    """Take all edits back, until `release`. The entry that did so, now or before. Raises LedgerError."""
    return workshop.history.killed or restore(workshop, Target(0), note, kill_switch="engaged").entry


def release(workshop: Workshop, note: Note) -> Restored | None:
    """Return what stood before `engage`; None where nothing was killed. Raises LedgerError."""
    killed = workshop.history.killed
    return killed and restore(workshop, Target(killed.sequence - 1), note, kill_switch="released").entry


def put_tag(workshop: Workshop, name: str, revision: int | None, note: Note) -> Tagged:
    """Give a revision, by default the live one, a name. Returns the entry that did so, now or before.

    Raises RevisionNotFound, RevisionNotRestorable, LedgerError.
    """
    history, live = workshop.history, workshop.weights.published.revision
    wanted = live if revision is None else revision
    history.require_revision(wanted)
    named = history.find_tag(name)
    if named is not None and (named.revision == wanted or (revision is None and named.sequence == live)):
        return named
    require_factors(workshop, [edit for edit in history.standing_at(wanted) if not edit.standing])
    return _tag(workshop, name, wanted, note)


def remove_tag(workshop: Workshop, name: str, note: Note) -> Tagged:
    """Raises TagNotFound, LedgerError."""
    workshop.history.tag(name)
    return _tag(workshop, name, None, note)


def _tag(workshop: Workshop, name: str, revision: int | None, note: Note) -> Tagged:
    weights = workshop.weights
    with weights.staged():
        entry = Tagged(
            sequence=weights.published.revision + 1,
            created_at=datetime.now(UTC),
            state_digest=weights.state.digest(),
            name=name,
            revision=revision,
            **vars(note),
        )
        workshop.journal.commit((entry, b""))
    return entry
