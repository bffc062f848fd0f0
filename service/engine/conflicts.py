"""Which edits a new one takes the place of, and which it collides with.

Of the same prompt only one edit is active: the newer one supersedes. Two prompts that the model hardly tells apart, by
how far the keys of their edits overlap, seldom can have two answers: the caller says which is to stand, or to
try both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from service.engine.errors import EditConflict
from service.engine.history import Edit, History
from service.engine.requests import EditRequest, OnConflict

CONFLICT = 0.95
"""From this overlap on, other corrections seldom both hold."""
NOTABLE = 0.5
"""From this overlap on, an edit is told to the caller."""
MOST = 10
"""So many are told, at most."""


@dataclass(frozen=True)
class Near:
    """An edit whose keys are near to another's. overlap: 0 to 1.

    edit: the active one. index: instead, of one in the same batch, whose place nothing can take.
    """

    id: str
    prompt: str
    correction: str
    overlap: float
    edit: Edit | None = None
    index: int | None = None

    @classmethod
    def of(cls, edit: Edit, overlap: float) -> Near:
        return cls(edit.id, edit.applied.prompt, edit.applied.correction, overlap, edit)


@dataclass(frozen=True)
class Place:
    """An edit's place among the others.

    supersedes: ids of all standing edits that it replaces. near: those whose keys are near to its own, nearest first.
    """

    supersedes: tuple[str, ...]
    near: tuple[Near, ...]

    def checks(self) -> list[JsonValue]:
        """The nearest edits as they are stored in the ledger and shown to the caller."""
        return [
            {"id": each.id, "overlap": round(each.overlap, 4), "superseded": each.id in self.supersedes}
            for each in self.near[:MOST]
        ]


def find_near(overlaps: Sequence[tuple[str, float]], history: History) -> list[Near]:
    """The active edits that are worth telling, nearest first. overlaps: from the state, largest first."""
    return [
        Near.of(edit, overlap)
        for factors_digest, overlap in overlaps
        if overlap >= NOTABLE
        for edit in history.active_with(factors_digest)
    ]


def find_place(request: EditRequest, near: Sequence[Near], history: History, on_conflict: OnConflict) -> Place:
    """Where an edit goes.

    Raises EditConflict when another prompt has too much of its keys and another answer, unless that is superseded or
    the caller wants to keep both.
    """
    replaced = history.standing_on(request.prompt)
    own = {edit.id for edit in replaced}
    conflicts = [
        each
        for each in near
        if each.overlap >= CONFLICT and each.id not in own and each.correction.strip() != request.correction.strip()
    ]
    superseded = [each.edit for each in conflicts if each.edit is not None]
    if on_conflict == "keep":
        return Place(history.with_superseded(replaced), tuple(near))
    if conflicts and (on_conflict == "refuse" or len(superseded) < len(conflicts)):
        raise _conflict(request.correction, conflicts)
    return Place(history.with_superseded([*replaced, *superseded]), tuple(near))


def _conflict(correction: str, others: Sequence[Near]) -> EditConflict:
    nearest, *_ = others
    return EditConflict(
        f"refused: to the model this prompt is hardly another than {nearest.prompt!r} (overlap {nearest.overlap:.2f}), "
        f"whose answer is {nearest.correction.strip()!r}, beside which {correction.strip()!r} may not hold; nothing "
        "was changed. Put the prompt so that what is asked stands before the subject, let this edit take the other's "
        "place with on_conflict=supersede, or try whether both hold with on_conflict=keep",
        conflicts=[
            {
                **({"id": each.id} if each.index is None else {"index": each.index}),
                "prompt": each.prompt,
                "correction": each.correction,
                "overlap": round(each.overlap, 4),
            }
            for each in others[:MOST]
        ],
    )
