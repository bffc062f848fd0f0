"""What the ledger says, kept in memory for questions: every edit, and what became of it.

An edit *stands* until it is rolled back. It is *active*, part of the live weights, while it stands and no edit that
stands supersedes it: so rolling back the newer of two brings the older one back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from service.engine.errors import AlreadyRolledBack, EditNotFound
from service.ledger import Applied, Entry, RolledBack

Status = Literal["applied", "superseded", "rolled_back"]


@dataclass(frozen=True)
class Edit:
    """An edit as it stands: how it was applied, and what became of it.

    rolled_back: the entry that took it back. superseded_by: id of the active edit in its place, while it stands.
    revived: ids of the edits that came back when it was rolled back.
    """

    applied: Applied
    rolled_back: RolledBack | None = None
    superseded_by: str | None = None
    revived: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.applied.edit_id

    @property
    def standing(self) -> bool:
        return self.rolled_back is None

    @property
    def active(self) -> bool:
        return self.standing and self.superseded_by is None

    @property
    def status(self) -> Status:
        if not self.standing:
            return "rolled_back"
        return "superseded" if self.superseded_by else "applied"


@dataclass(frozen=True)
class Change:
    """What an entry does to the set of active edits, beside the edit that it applies."""

    leaving: tuple[Edit, ...] = ()
    returning: tuple[Edit, ...] = ()


class History:
    """All edits by id, in the order in which they were applied.

    same_prompt: what two prompts have in common if they are the same to the model.
    """

    def __init__(self, same_prompt: Callable[[str], Hashable] = str) -> None:
        self._same_prompt = same_prompt
        self._edits: dict[str, Edit] = {}
        self._by_key: dict[str, Entry] = {}
        self._by_prompt: dict[Hashable, list[str]] = {}
        self._by_factors: dict[str, list[str]] = {}
        self._superseders: dict[str, list[str]] = {}
        """Of an edit: all that ever took its place, in the order of application."""

    def record(self, entry: Entry) -> None:
        """Take in the next entry of the ledger. Raises EditNotFound, AlreadyRolledBack."""
        returning = self.change(entry).returning
        if isinstance(entry, Applied):
            self._edits[entry.edit_id] = Edit(entry)
            self._by_prompt.setdefault(self._same_prompt(entry.prompt), []).append(entry.edit_id)
            self._by_factors.setdefault(entry.factors_digest, []).append(entry.edit_id)
            for older in entry.supersedes:
                self._superseders.setdefault(older, []).append(entry.edit_id)
                self._edits[older] = replace(self._edits[older], superseded_by=entry.edit_id)
        else:
            edit = self._edits[entry.edit_id]
            revived = tuple(each.id for each in returning)
            self._edits[edit.id] = replace(edit, rolled_back=entry, superseded_by=None, revived=revived)
            for older in filter(lambda each: each.standing, map(self.find, edit.applied.supersedes)):
                self._edits[older.id] = replace(older, superseded_by=self._superseder(older.id))
        if entry.idempotency_key is not None:
            self._by_key[entry.idempotency_key] = entry

    def fork(self) -> History:
        """Another history of the same edits, into which more can be recorded without anybody seeing it."""
        other = History(self._same_prompt)
        other._edits, other._by_key = dict(self._edits), dict(self._by_key)
        for name in ("_by_prompt", "_by_factors", "_superseders"):
            setattr(other, name, {key: list(ids) for key, ids in getattr(self, name).items()})
        return other

    def adopt(self, other: History) -> None:
        """Become what a fork of this has become."""
        self._edits, self._by_key = other._edits, other._by_key
        self._by_prompt, self._by_factors, self._superseders = other._by_prompt, other._by_factors, other._superseders

    def change(self, entry: Entry) -> Change:
        """What an entry that is not recorded yet will do. Raises EditNotFound, AlreadyRolledBack."""
        if isinstance(entry, Applied):
            return self.superseding(entry.supersedes)
        return self.rolling_back(entry.edit_id)

    def superseding(self, edit_ids: Iterable[str]) -> Change:
        """What becomes of the active edits when these are superseded. Raises EditNotFound, AlreadyRolledBack."""
        return Change(leaving=tuple(edit for edit in map(self.standing, edit_ids) if edit.active))

    def rolling_back(self, edit_id: str) -> Change:
        """What becomes of them when this one is rolled back. Raises EditNotFound, AlreadyRolledBack."""
        edit = self.standing(edit_id)
        held_back = (self._edits[older] for older in edit.applied.supersedes)
        return Change(
            leaving=(edit,) if edit.active else (),
            returning=tuple(
                older for older in held_back if older.standing and self._superseder(older.id, but=edit_id) is None
            ),
        )

    def _superseder(self, edit_id: str, but: str | None = None) -> str | None:
        """The newest standing edit that supersedes this one; it is active, since what replaces it replaces both."""
        superseders = (self._edits[newer] for newer in reversed(self._superseders.get(edit_id, [])))
        return next((edit.id for edit in superseders if edit.standing and edit.id != but), None)

    def find(self, edit_id: str) -> Edit:
        """Raises EditNotFound."""
        try:
            return self._edits[edit_id]
        except KeyError:
            raise EditNotFound(edit_id) from None

    def standing(self, edit_id: str) -> Edit:
        """An edit that can be rolled back. Raises EditNotFound, AlreadyRolledBack."""
        edit = self.find(edit_id)
        if edit.rolled_back is not None:
            raise AlreadyRolledBack(
                f"edit {edit_id!r} was rolled back already, at revision {edit.rolled_back.sequence}; nothing changed",
                id=edit_id,
                revision=edit.rolled_back.sequence,
            )
        return edit

    def standing_on(self, prompt: str) -> list[Edit]:
        """Standing edits of the same prompt."""
        same = self._by_prompt.get(self._same_prompt(prompt), [])
        return [edit for edit in map(self.find, same) if edit.standing]

    def active_with(self, factors_digest: str) -> list[Edit]:
        """Active edits whose factors have this digest."""
        same = self._by_factors.get(factors_digest, [])
        return [edit for edit in map(self.find, same) if edit.active]

    def with_superseded(self, edits: Iterable[Edit]) -> tuple[str, ...]:
        """Ids of standing edits and of all standing ones that these supersede, in the order of application.

        An edit that takes their place names them all, so that rolling it back brings back only what it replaced.
        """
        ids = {edit_id for edit in edits for edit_id in (edit.id, *edit.applied.supersedes)}
        standing = [edit for edit in map(self.find, ids) if edit.standing]
        return tuple(edit.id for edit in sorted(standing, key=lambda edit: edit.applied.sequence))

    def by_idempotency_key(self, key: str) -> Entry | None:
        """What was last made by a request with this key; of a batch its last edit."""
        return self._by_key.get(key)

    def batch(self, batch_id: str) -> list[Edit]:
        """The edits of one batch, in order."""
        return [edit for edit in self._edits.values() if edit.applied.batch and edit.applied.batch.id == batch_id]

    def newest_first(self) -> Iterator[Edit]:
        return iter(list(self._edits.values())[::-1])

    def all_active(self) -> list[Edit]:
        return [edit for edit in self._edits.values() if edit.active]

    def active_at(self, revision: int) -> list[Edit]:
        """The edits that were active at a revision. Entries that lead beyond it may be known already."""
        standing = [
            edit
            for edit in list(self._edits.values())  # the writer may be recording meanwhile
            if edit.applied.sequence <= revision and (edit.rolled_back is None or edit.rolled_back.sequence > revision)
        ]
        superseded = {edit_id for edit in standing for edit_id in edit.applied.supersedes}
        return [edit for edit in standing if edit.id not in superseded]
