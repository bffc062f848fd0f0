"""Which factors can be needed again: those of edits that stand, or that may be made to stand again.

An edit that was rolled back by itself is done with, unless it stood at a revision that has a tag. One that was taken
back together with others, to restore a revision or by the kill switch, may be returned. One that has expired never is.
"""

from __future__ import annotations

from collections.abc import Iterator

from service.ledger.records import Applied, Entry, Restored, RolledBack, Tagged


class Needed:
    """Follows the entries of a ledger, in their order."""

    def __init__(self) -> None:
        self._sequences: dict[str, int] = {}
        self._turns: dict[str, list[int]] = {}
        """Of each edit: at which entries it was taken back and returned, in turn."""
        self._done_with: set[str] = set()
        self._expired: set[str] = set()
        self._tags: dict[str, int] = {}

    def take(self, entry: Entry) -> None:
        if isinstance(entry, Applied):
            self._sequences[entry.edit_id] = entry.sequence
        elif isinstance(entry, RolledBack):
            self._turn(entry.sequence, entry.edit_id)
            self._done_with.add(entry.edit_id)
            if entry.expired:
                self._expired.add(entry.edit_id)
        elif isinstance(entry, Restored):
            self._turn(entry.sequence, *entry.taken, *entry.returned)
            self._done_with.difference_update(entry.returned)
            self._done_with.update(entry.expired)
            self._expired.update(entry.expired)
        elif isinstance(entry, Tagged):
            self._tags.pop(entry.name, None)
            if entry.revision is not None:
                self._tags[entry.name] = entry.revision

    def __contains__(self, edit_id: str) -> bool:
        if edit_id in self._expired:
            return False
        return edit_id not in self._done_with or any(self._stood(edit_id, at) for at in self._tags.values())

    def no_more(self) -> Iterator[int]:
        """The sequences of the edits whose factors nothing can need again."""
        return (self._sequences[edit_id] for edit_id in self._done_with if edit_id not in self)

    def _turn(self, sequence: int, *edit_ids: str) -> None:
        for edit_id in edit_ids:
            self._turns.setdefault(edit_id, []).append(sequence)

    def _stood(self, edit_id: str, revision: int) -> bool:
        applied = self._sequences.get(edit_id, revision + 1)  # a ledger that is being verified may lack its entry
        turns = sum(sequence <= revision for sequence in self._turns.get(edit_id, ()))
        return applied <= revision and turns % 2 == 0
