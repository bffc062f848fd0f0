"""Where a process can be made to fail on purpose, to prove that nothing is lost or half-done.

    MEND_FAILPOINT=judge=kill          dies by SIGKILL when the step `judge` has ended
    MEND_FAILPOINT=append=kill@3       the third time
    MEND_FAILPOINT=copy=sleep:2        stays there for two seconds, every time
    MEND_FAILPOINT=append=error        raises Failed

Every step of the walk of an edit that is timed is such a point, under the name that `timings_ms` and Server-Timing
give it (`service.engine.clock`); the others are named where they are. Without the variable a point costs nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

VARIABLE = "MEND_FAILPOINT"
_given = os.environ.get(VARIABLE, "")
_reached: Counter[str] = Counter()


class Failed(Exception):
    """What a point raises that is told to."""


def reach(point: str) -> None:
    """This process is at a point. Comes back unless it was told to fail here. Raises Failed, or ValueError."""
    if not _given:
        return
    wanted, _, action = _given.partition("=")
    if wanted != point:
        return
    _reached[point] += 1
    what, _, nth = action.partition("@")
    if nth and _reached[point] != int(nth):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "error":
        raise Failed(f"told to fail at {point} by {VARIABLE}")
    elif what.startswith("sleep:"):
        time.sleep(float(what.removeprefix("sleep:")))
    else:
        raise ValueError(f"{VARIABLE} is {_given!r}; it should be like judge=kill, copy=sleep:2 or append=error@3")


def arm(given: str) -> None:
    """Set what the variable says; for tests within one process."""
    global _given
    _given = given
    _reached.clear()
