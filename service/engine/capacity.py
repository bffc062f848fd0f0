"""How full the state is: edits by least squares share a number of directions, and fail together when they run out."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.errors import StateFull

WARN_FROM = 0.5
"""From here on edits visibly disturb each other and everything else; the README has a table over their number."""
LIMIT = 0.99
"""Fullness of the fullest weight, 0 to 1, beyond which no edit is made."""


@dataclass(frozen=True)
class Capacity:
    """fullness: 0 to 1; None of a state that has no such figure. warning: what to do about it, once it is high."""

    fullness: float | None
    limit: float = LIMIT

    @property
    def warning(self) -> str | None:
        if self.fullness is None or self.fullness <= WARN_FROM:
            return None
        return (
            f"the active edits fill {self.fullness:.0%} of what the fullest weight can hold, and none is made beyond "
            f"{self.limit:.0%}; roll back what is no longer needed"
        )


def require_room(fullness: float | None) -> None:
    """Raises StateFull when what is staged fills the state beyond its limit."""
    if fullness is not None and fullness > LIMIT:
        raise StateFull(
            f"refused: with this the edits would fill {fullness:.1%} of what the fullest weight can hold, more than "
            f"{LIMIT:.0%}; nothing was changed. Roll back what is no longer needed",
            fullness=round(fullness, 4),
            limit=LIMIT,
        )
