"""How often somebody may ask, counted in this process alone.

A moving window: of any stretch as long as the limit's, no more than its number of requests are let in.
"""

from __future__ import annotations

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

FAILED, MOST_FAILED = "attempts without a good key", "600/minute"  # far beyond mistakes; it bounds what is logged


class Rates:
    """reads, changes: such as `600/minute`; without one that kind is not counted. Attempts without a good key are."""

    def __init__(self, reads: str | None, changes: str | None) -> None:
        limits = {"reads": reads, "changes": changes, FAILED: MOST_FAILED}
        self._limits: dict[str, RateLimitItem] = {kind: parse(limit) for kind, limit in limits.items() if limit}
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def wait_s(self, kind: str, who: str) -> int:
        """Count a request. 0, or for how many seconds too many have been let in already; then it does not count."""
        limit = self._limits.get(kind)
        if limit is None or self._window.hit(limit, kind, who):
            return 0
        return max(1, math.ceil(self._window.get_window_stats(limit, kind, who).reset_time - time.time()))

    def of(self, kind: str) -> str:
        """The limit as people write it."""
        limit = self._limits[kind]
        return f"{limit.amount} {kind} per {limit.GRANULARITY.name}"
