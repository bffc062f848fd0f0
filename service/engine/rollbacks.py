"""Taking edits back, one or all that a revision did not have, and returning what it had; names for revisions.

    what would change -> factors -> stage -> (preview: ask both views) -> commit -> publish

Nothing is judged: the state was live before, and was judged then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from service.engine.clock import Clock
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
    kept = note.idempotency_key and not dry_run  # so that a repeated request is known, whatever happens meanwhile
    if not (change.taken or change.returned or kill_switch or kept):
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
    with Clock(workshop.telemetry) as clock:
        return _moved(workshop, clock, change, as_entry, note, dry_run=dry_run)


def _moved(
    workshop: Workshop,
    clock: Clock,
    change: Change,
    as_entry: Callable[..., RolledBack | Restored],
    note: Note,
    *,
    dry_run: bool,
) -> Reversal:
    weights, returned = workshop.weights, list(map(workshop.history.find, change.returned))
    clock.begin("stage")
    with _restorable():
        workshop.journal.factors(returned)
    with _staged(workshop, change):
        digest = weights.state.digest()
        clock.end()
        entry = as_entry(
            sequence=weights.published.revision + 1, created_at=datetime.now(UTC), state_digest=digest, **vars(note)
        )
        done = Reversal(entry, change, entry.sequence, digest, weights.state.edits)
        if dry_run:
            clock.begin("preview")
            now = weights.published.revision
            return replace(done, revision=now, committed=False, answers=_answers(workshop, change))
        with _restorable():
            workshop.journal.commit((entry, b""), needs=returned)
    return done


def _staged(workshop: Workshop, change: Change) -> AbstractContextManager[None]:
    """By what is less to read: what changes, or what there is in the end. The base needs nothing of what was."""
    journal, leaving = workshop.journal, {edit.id for edit in change.leaving}
    remaining = [edit for edit in workshop.history.all_active() if edit.id not in leaving]
    if len(remaining) < len(leaving):
        return workshop.weights.staged_anew(journal.factors([*remaining, *change.returning]))
    return workshop.weights.staged(add=journal.factors(change.returning), remove=journal.factors(change.leaving))


@contextmanager
def _restorable() -> Iterator[None]:
    """Raises RevisionNotRestorable where factors of edits that were rolled back are gone."""
    try:
        yield
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
    if workshop.history.killed and not note.idempotency_key:
        return workshop.history.killed
    return restore(workshop, Target(0), note, kill_switch="engaged").entry


def release(workshop: Workshop, note: Note) -> Restored | None:
    """Return what stood before `engage`; None where nothing was killed. Raises LedgerError."""
    killed = workshop.history.killed
    if not (killed or note.idempotency_key):
        return None
    before = killed.sequence - 1 if killed else workshop.weights.published.revision
    return restore(workshop, Target(before), note, kill_switch="released").entry


def put_tag(workshop: Workshop, name: str, revision: int | None, note: Note) -> Tagged:
    """Give a revision, by default the live one, a name. Returns the entry that did so, now or before.

    Raises RevisionNotFound, RevisionNotRestorable, LedgerError.
    """
    history, live = workshop.history, workshop.weights.published.revision
    wanted = live if revision is None else revision
    history.require_revision(wanted)
    named = history.find_tag(name)
    so_already = named and (named.revision == wanted or (revision is None and named.sequence == live))
    if so_already and not note.idempotency_key:
        return named
    now = datetime.now(UTC)
    stood = [edit for edit in history.standing_at(wanted) if not (edit.standing or edit.expired_by(now))]
    with _restorable():
        return _tag(workshop, name, named.revision if so_already else wanted, note, needs=stood)


def remove_tag(workshop: Workshop, name: str, note: Note) -> Tagged:
    """Raises TagNotFound, LedgerError."""
    workshop.history.tag(name)
    return _tag(workshop, name, None, note)


def _tag(workshop: Workshop, name: str, revision: int | None, note: Note, needs: Sequence[Edit] = ()) -> Tagged:
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
        workshop.journal.commit((entry, b""), needs=needs)
    return entry
