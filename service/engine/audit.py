"""Does every active edit still hold, with what margin, and which edit took those that do not?

An audit reads a copy of the live weights, made while it reads them as a generation does: so it is of one revision, and
neither generation nor editing waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from service.engine.held import Held, HeldEdits
from service.engine.history import Edit, History
from service.engine.requests import Published
from service.engine.weights import View, Weights

PART = 128
"""Edits between two looks at whether the audit is to end."""

logger = logging.getLogger("mend")


@dataclass(frozen=True)
class Audit:
    """How the active edits fared at one revision. edits: in the order of application.

    lost_to: by the id of an edit that no longer holds, that of the later edit (or batch) with which it was lost: the
    newest standing one whose own judgement, before it went live, found that the edit held without it and no longer
    with it. None is known for what was lost by a roll-back.
    """

    published: Published
    taken_at: datetime
    took_ms: float
    edits: tuple[Held, ...]
    lost_to: dict[str, str]

    @property
    def held(self) -> int:
        return sum(each.holds for each in self.edits)

    @property
    def lost(self) -> int:
        return len(self.edits) - self.held


class Auditor:
    """Takes audits, one at a time. last: the one taken last, if any was."""

    def __init__(self, weights: Weights, history: History, held: HeldEdits) -> None:
        self._weights, self._history, self._held = weights, history, held
        self._view: View | None = None
        self._taking = threading.Lock()
        self.last: Audit | None = None

    def take(self, stopping: threading.Event | None = None) -> Audit | None:
        """An audit of what is live now; None when it was stopped before its end."""
        with self._taking:
            start = time.perf_counter()
            self._view = self._view or self._weights.another_view()
            published = self._weights.copy_live(self._view)
            active = self._history.active_at(published.revision)
            found: list[Held] = []
            for first in range(0, len(active), PART):
                if stopping is not None and stopping.is_set():
                    return None
                found += self._held.check(active[first : first + PART], self._view)
            took_ms = round(1000 * (time.perf_counter() - start), 3)
            lost = [each.edit for each in found if not each.holds]
            audit = Audit(published, datetime.now(UTC), took_ms, tuple(found), attribute(lost, self._history))
            self.last = audit
        if audit.lost:
            logger.warning(
                "revision %d: %d of %d active edits no longer hold", published.revision, audit.lost, len(found)
            )
        return audit


def attribute(lost: Sequence[Edit], history: History) -> dict[str, str]:
    """Which later edit, or batch, each lost edit was lost to, as the ledger tells it. See `Audit.lost_to`.

    Where that edit is superseded, it is the one in its place. Free of cost: nothing is run again.
    """
    wanted = {edit.id for edit in lost}
    found: dict[str, str] = {}
    named_before: set[str] = set()
    standing = [edit for edit in history.newest_first() if edit.standing][::-1]
    for edit in standing:
        named = wanted.intersection(edit.applied.checks.get("lost", ()))
        by = edit.superseded_by or (edit.applied.batch.id if edit.applied.batch else edit.id)
        # Older services named what had been lost before, again and again.
        found |= dict.fromkeys(named - named_before, by)
        named_before = named
    return found
