"""What the ledger says, kept in memory for questions: every edit, what became of it, tags, and the kill switch.

An edit *stands* until it is taken back, and again when it is returned. It is *active*, part of the live weights, while
it stands and no edit that stands supersedes it: so rolling back the newer of two brings the older one back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from service.engine.errors import AlreadyRolledBack, AlreadyStanding, EditNotFound, RevisionNotFound, TagNotFound
from service.engine.series import Series
from service.ledger import Applied, Entry, Restored, RolledBack, Tagged

Status = Literal["applied", "superseded", "rolled_back"]


@dataclass(frozen=True)
class Edit:
    """An edit as it stands: how it was applied, and what became of it.

    rolled_back: the entry that took it back, until it is returned. superseded_by: id of the active edit in its place,
    while it stands. revived: ids of the edits that came back when it was rolled back.
    turns: sequences at which it was taken back and returned, in turn.
    """

    applied: Applied
    rolled_back: RolledBack | Restored | None = None
    superseded_by: str | None = None
    revived: tuple[str, ...] = ()
    turns: tuple[int, ...] = ()

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

    def stood_at(self, revision: int) -> bool:
        turned = sum(sequence <= revision for sequence in self.turns)
        return self.applied.sequence <= revision and turned % 2 == 0

    def expired_by(self, moment: datetime) -> bool:
        return self.applied.expires_at is not None and self.applied.expires_at <= moment


@dataclass(frozen=True)
class Change:
    """What taking edits back and returning others does, beside applying one.

    taken, returned: ids, in the order of application. leaving, returning: what becomes of the active edits.
    expired: ids of those that would have been returned, had their time not come.
    """

    taken: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()
    leaving: tuple[Edit, ...] = ()
    returning: tuple[Edit, ...] = ()
    expired: tuple[str, ...] = ()


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
        self._expiring: dict[str, datetime] = {}
        self._ends: dict[int, int] = {}
        """Of every entry inside a batch: the sequence of its last one."""
        self._tags: dict[str, Tagged] = {}
        self.switched: Restored | None = None
        """The entry that engaged the kill switch, or released it, last."""
        self.last: Entry | None = None
        self.series = Series()

    # Recording

    def record(self, entry: Entry) -> None:
        """Take in the next entry of the ledger. Raises EditNotFound, AlreadyRolledBack, AlreadyStanding."""
        if isinstance(entry, Applied):
            self._apply(entry)
        elif isinstance(entry, Tagged):
            if entry.revision is None:
                self._tags.pop(entry.name, None)
            else:
                self._tags[entry.name] = entry
        else:
            change = self.change(entry)
            for edit_id in (*change.taken, *change.returned):
                edit = self._edits[edit_id]
                self._edits[edit_id] = replace(
                    edit,
                    rolled_back=entry if edit.standing else None,
                    revived=tuple(each.id for each in change.returning) if isinstance(entry, RolledBack) else (),
                    turns=(*edit.turns, entry.sequence),
                )
            for edit in map(self.find, self._touched(change)):
                superseder = self._superseder(edit.id, self._standing) if edit.standing else None
                self._edits[edit.id] = replace(edit, superseded_by=superseder)
            self.series.record(entry, len(change.returning), len(change.leaving))
            if isinstance(entry, Restored) and entry.kill_switch not in (None, self._position):
                self.switched = entry
        if entry.idempotency_key is not None:
            self._by_key[entry.idempotency_key] = entry
        self.last = entry

    def _apply(self, entry: Applied) -> None:
        change = self.change(entry)  # also whether it may
        self._edits[entry.edit_id] = Edit(entry)
        self._by_prompt.setdefault(self._same_prompt(entry.prompt), []).append(entry.edit_id)
        self._by_factors.setdefault(entry.factors_digest, []).append(entry.edit_id)
        for older in entry.supersedes:
            self._superseders.setdefault(older, []).append(entry.edit_id)
            self._edits[older] = replace(self._edits[older], superseded_by=entry.edit_id)
        if entry.expires_at is not None:
            self._expiring[entry.edit_id] = entry.expires_at
        if entry.batch is not None:
            self._ends[entry.sequence] = entry.sequence + entry.batch.size - entry.batch.position
        self.series.record(entry, 1, len(change.leaving))

    def fork(self) -> History:
        """Another history of the same edits, into which more can be recorded without anybody seeing it."""
        other = History(self._same_prompt)
        other.adopt(self)
        for name in ("_by_prompt", "_by_factors", "_superseders"):
            setattr(other, name, {key: list(ids) for key, ids in getattr(self, name).items()})
        for name in ("_edits", "_by_key", "_expiring", "_ends", "_tags"):
            setattr(other, name, dict(getattr(self, name)))
        other.series = self.series.fork()
        return other

    def adopt(self, other: History) -> None:
        """Become what a fork of this has become."""
        self.__dict__.update(other.__dict__)

    # What changes would do

    def change(self, entry: Applied | RolledBack | Restored) -> Change:
        """What an entry that is not recorded yet will do. Raises EditNotFound, AlreadyRolledBack, AlreadyStanding."""
        if isinstance(entry, Applied):
            return self.superseding(entry.supersedes)
        if isinstance(entry, RolledBack):
            return self.rolling_back(entry.edit_id)
        return self._moving(entry.taken, entry.returned)

    def superseding(self, edit_ids: Iterable[str]) -> Change:
        """What becomes of the active edits when these are superseded. Raises EditNotFound, AlreadyRolledBack."""
        return Change(leaving=tuple(edit for edit in map(self.standing, edit_ids) if edit.active))

    def rolling_back(self, edit_id: str) -> Change:
        """What becomes of them when this one is rolled back. Raises EditNotFound, AlreadyRolledBack."""
        return self._moving((edit_id,), ())

    def restoring(self, revision: int, moment: datetime) -> Change:
        """What becomes of them when what stood at a revision is to stand again, but for what has expired by now.

        Raises RevisionNotFound.
        """
        self.require_revision(revision)
        edits = list(self._edits.values())
        back = [edit for edit in edits if not edit.standing and edit.stood_at(revision)]
        expired = tuple(edit.id for edit in back if edit.expired_by(moment))
        change = self._moving(
            [edit.id for edit in edits if edit.standing and not edit.stood_at(revision)],
            [edit.id for edit in back if not edit.expired_by(moment)],
        )
        return replace(change, expired=expired)

    def _moving(self, taken: Iterable[str], returned: Iterable[str]) -> Change:
        change = Change(tuple(taken), tuple(returned))
        gone, back = {self.standing(edit_id).id for edit_id in change.taken}, set(change.returned)
        for edit in map(self.find, change.returned):
            if edit.standing:
                raise AlreadyStanding(f"edit {edit.id!r} stands; it cannot be returned", id=edit.id)

        def will_stand(edit_id: str) -> bool:
            return edit_id in back or (edit_id not in gone and self._standing(edit_id))

        leaving, returning = [], []
        for edit in map(self.find, self._touched(change)):
            will_be_active = will_stand(edit.id) and self._superseder(edit.id, will_stand) is None
            if edit.active and not will_be_active:
                leaving.append(edit)
            elif will_be_active and not edit.active:
                returning.append(edit)
        return replace(change, leaving=tuple(leaving), returning=tuple(returning))

    def _touched(self, change: Change) -> list[str]:
        """Ids of the edits that may begin or cease to be active, in the order of application."""
        moved = {*change.taken, *change.returned}
        touched = moved | {older for edit_id in moved for older in self._edits[edit_id].applied.supersedes}
        return sorted(touched, key=lambda edit_id: self._edits[edit_id].applied.sequence)

    def _standing(self, edit_id: str) -> bool:
        return self._edits[edit_id].standing

    def _superseder(self, edit_id: str, stands: Callable[[str], bool]) -> str | None:
        """The newest standing edit that supersedes this one; it is active, since what replaces it replaces both."""
        return next(filter(stands, reversed(self._superseders.get(edit_id, []))), None)

    # Revisions, tags, and the kill switch

    @property
    def killed(self) -> Restored | None:
        """The entry that engaged the kill switch, until it is released."""
        return self.switched if self._position == "engaged" else None

    @property
    def _position(self) -> str:
        return self.switched.kill_switch if self.switched else "released"

    def require_revision(self, revision: int) -> None:
        """Raises RevisionNotFound unless this was live at some time."""
        last = self.last.sequence if self.last else 0
        if revision > last:
            raise RevisionNotFound(
                f"there is no revision {revision}; the last one is {last}", wanted=revision, revision=last
            )
        end = self._ends.get(revision, revision)
        if end != revision:
            raise RevisionNotFound(
                f"revision {revision} is inside a batch and was never live; the batch led to revision {end}",
                wanted=revision,
                revision=last,
            )

    def tags(self) -> list[Tagged]:
        """Newest first."""
        return sorted(self._tags.copy().values(), key=lambda tagged: -tagged.sequence)

    def tag(self, name: str) -> Tagged:
        """Raises TagNotFound."""
        tagged = self.find_tag(name)
        if tagged is None:
            raise TagNotFound(f"there is no tag {name!r}; GET /tags lists them", tag=name)
        return tagged

    def find_tag(self, name: str) -> Tagged | None:
        return self._tags.get(name)

    def standing_at(self, revision: int) -> list[Edit]:
        return [edit for edit in list(self._edits.values()) if edit.stood_at(revision)]

    def active_at(self, revision: int) -> list[Edit]:
        """The edits that were active at a revision. Entries that lead beyond it may be known already."""
        standing = self.standing_at(revision)  # a copy: the writer may be recording meanwhile
        superseded = {edit_id for edit in standing for edit_id in edit.applied.supersedes}
        return [edit for edit in standing if edit.id not in superseded]

    # Expiry

    def next_expiry(self) -> datetime | None:
        """When the next edit that stands expires, or has expired."""
        return min((at for edit_id, at in list(self._expiring.items()) if self._standing(edit_id)), default=None)

    def expired(self, moment: datetime) -> list[Edit]:
        """Edits that stand although their time has come."""
        edits = map(self.find, list(self._expiring))
        return [edit for edit in edits if edit.standing and edit.expired_by(moment)]

    # Finding

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
