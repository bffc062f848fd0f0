"""How the state came to be what it is: a point for every entry of the ledger that changed it.

Kept as the history records, so that asking for the newest of them costs nothing, however long the ledger is.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import JsonValue

from service.ledger import Applied, Restored, RolledBack

MAX_POINTS = 2000


@dataclass(frozen=True)
class Point:
    """The state behind an entry; a batch has one point, at its end.

    drawdown, capacity: as they were judged before the entry; None of a roll-back, and of entries from before there was
    such a figure.
    """

    revision: int
    at: datetime
    kind: Literal["applied", "rolled_back", "restored"]
    active_edits: int
    drawdown: float | None
    capacity: float | None


class Series:
    """The newest points, at most MAX_POINTS."""

    def __init__(self, points: deque[Point] | None = None, active: int = 0) -> None:
        self._points = deque(points or (), MAX_POINTS)
        self._active = active

    def fork(self) -> Series:
        return Series(self._points, self._active)

    def record(self, entry: Applied | RolledBack | Restored, coming: int, leaving: int) -> None:
        """Take in an entry. coming, leaving: how many edits it made active, and made so no longer."""
        self._active += coming - leaving
        inside_a_batch = isinstance(entry, Applied) and entry.batch is not None and not entry.batch.ends
        if inside_a_batch or not (coming or leaving):
            return
        checks = entry.checks if isinstance(entry, Applied) else {}
        self._points.append(
            Point(
                entry.sequence,
                entry.created_at,
                entry.kind,
                self._active,
                _figure(checks.get("drawdown")),
                _figure(checks.get("capacity")),
            )
        )

    def until(self, revision: int, most: int) -> list[Point]:
        """So many points up to a revision, the newest, in their order. Later ones may be known already."""
        return [point for point in list(self._points) if point.revision <= revision][-most:]


def _figure(value: JsonValue) -> float | None:
    return float(value) if isinstance(value, int | float) else None
