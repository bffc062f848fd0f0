"""Which edits a new one takes the place of, and which it collides with.

Of the same prompt only one edit is active: the newer one supersedes. Two prompts that the model hardly tells apart, by
how far the keys of their edits overlap, cannot have two answers: the caller decides which is to stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from service.engine.errors import EditConflict
from service.engine.history import Edit, History
from service.engine.requests import EditRequest, OnConflict

CONFLICT = 0.95
"""From this overlap on, other corrections cannot both hold."""
NOTABLE = 0.5
"""From this overlap on, an edit is told to the caller."""
MOST = 10
"""So many are told, at most."""


@dataclass(frozen=True)
class Place:
    """An edit's place among the others.

    supersedes: ids of all standing edits that it replaces. overlapping: active edits whose keys are near to its own,
    each with the overlap, 0 to 1, nearest first.
    """

    supersedes: tuple[str, ...]
    overlapping: tuple[tuple[Edit, float], ...]

    def checks(self) -> list[JsonValue]:
        """The nearest edits as they are stored in the ledger and shown to the caller."""
        return [
            {"id": edit.id, "overlap": round(overlap, 4), "superseded": edit.id in self.supersedes}
            for edit, overlap in self.overlapping[:MOST]
        ]


def find_place(
    request: EditRequest, overlaps: Sequence[tuple[str, float]], history: History, on_conflict: OnConflict
) -> Place:
    """Where an edit goes. overlaps: of its rows, from the state, largest first.

    Raises EditConflict when another prompt has too much of its keys and another answer, unless that is superseded.
    """
    replaced = history.standing_on(request.prompt)
    overlapping = [
        (edit, overlap)
        for factors_digest, overlap in overlaps
        if overlap >= NOTABLE
        for edit in history.active_with(factors_digest)
    ]
    conflicts = [
        (edit, overlap)
        for edit, overlap in overlapping
        if overlap >= CONFLICT
        and edit not in replaced
        and edit.applied.correction.strip() != request.correction.strip()
    ]
    if conflicts and on_conflict == "refuse":
        raise conflict(request.correction, conflicts)
    return Place(history.with_superseded([*replaced, *(edit for edit, _ in conflicts)]), tuple(overlapping))


def conflict(correction: str, others: Sequence[tuple[Edit, float]]) -> EditConflict:
    """Why an edit cannot stand beside these."""
    (nearest, overlap), *_ = others
    return EditConflict(
        f"refused: to the model this prompt is hardly another than {nearest.applied.prompt!r} (overlap {overlap:.2f}), "
        f"whose answer is {nearest.applied.correction.strip()!r}, beside which {correction.strip()!r} cannot hold; "
        "nothing was changed. Put the prompt so that what is asked stands before the subject, or let this edit take "
        "the other's place with on_conflict=supersede",
        conflicts=[
            {
                "id": edit.id,
                "prompt": edit.applied.prompt,
                "correction": edit.applied.correction,
                "overlap": round(overlap, 4),
            }
            for edit, overlap in others[:MOST]
        ],
    )
