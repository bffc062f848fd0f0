"""How long each step of an edit took."""

from __future__ import annotations

import time

from service.failpoints import reach


class Clock:
    """Milliseconds per step, added up by name. The end of each step is a failpoint."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0.0) + 1000 * (now - self._start), 3)
        self._start = now
        reach(name)
