"""What the ledger says, kept in memory for questions: every edit, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from service.engine.errors import AlreadyRolledBack, EditNotFound
from service.ledger import Applied, Entry, RolledBack


@dataclass(frozen=True)
class Edit:
    """An edit as it stands: how it was applied, and by which entry it was rolled back, if it was."""

    applied: Applied
    rolled_back: RolledBack | None = None

    @property
    def id(self) -> str:
        return self.applied.edit_id

    @property
    def active(self) -> bool:
        return self.rolled_back is None


class History:
    """All edits by id, in the order in which they were applied."""

    def __init__(self) -> None:
        self._edits: dict[str, Edit] = {}
        self._by_key: dict[str, str] = {}

    def record(self, entry: Entry) -> None:
        """Take in the next entry of the ledger."""
        if isinstance(entry, Applied):
            self._edits[entry.edit_id] = Edit(entry)
            if entry.idempotency_key is not None:
                self._by_key[entry.idempotency_key] = entry.edit_id
        else:
            self._edits[entry.edit_id] = Edit(self.active(entry.edit_id).applied, entry)

    def find(self, edit_id: str) -> Edit:
        """Raises EditNotFound."""
        try:
            return self._edits[edit_id]
        except KeyError:
            raise EditNotFound(edit_id) from None

    def active(self, edit_id: str) -> Edit:
        """An edit that can be rolled back. Raises EditNotFound, AlreadyRolledBack."""
        edit = self.find(edit_id)
        if edit.rolled_back is not None:
            raise AlreadyRolledBack(
                f"edit {edit_id!r} was rolled back already, at revision {edit.rolled_back.sequence}; nothing changed",
                id=edit_id,
                revision=edit.rolled_back.sequence,
            )
        return edit

    def by_idempotency_key(self, key: str) -> Edit | None:
        edit_id = self._by_key.get(key)
        return None if edit_id is None else self._edits[edit_id]

    def newest_first(self) -> Iterator[Edit]:
        return iter(list(self._edits.values())[::-1])

    def all_active(self) -> list[Edit]:
        return [edit for edit in self._edits.values() if edit.active]

    def active_at(self, revision: int) -> list[Edit]:
        """The edits that were active at a revision. Entries that lead beyond it may be known already."""
        return [
            edit
            for edit in list(self._edits.values())  # the writer may be recording meanwhile
            if edit.applied.sequence <= revision and (edit.rolled_back is None or edit.rolled_back.sequence > revision)
        ]
