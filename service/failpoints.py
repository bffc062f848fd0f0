"""Where a process can be made to fail on purpose, to prove that nothing is lost or half-done.

    MEND_FAILPOINT=judge=kill          dies by SIGKILL when the step `judge` has ended
    MEND_FAILPOINT=append=kill@3       the third time
    MEND_FAILPOINT=publish=sleep:2     stays there for two seconds, every time
    MEND_FAILPOINT=append=error        raises Failed

Every step of the walk of an edit that is timed is such a point, under the name that `timings_ms` and Server-Timing
give it (`service.engine.clock`); the others are named where they are. Without the variable a point costs nothing.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections import Counter

VARIABLE = "MEND_FAILPOINT"
_given = ""
_reached: Counter[str] = Counter()


class Failed(Exception):
    """What a point raises that is told to."""


def reach(point: str) -> None:
    """This process is at a point. Comes back unless it was told to fail here. Raises Failed."""
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
    else:
        time.sleep(float(what.removeprefix("sleep:")))


def arm(given: str) -> None:
    """Tell where to fail, as the variable does; nowhere if it is empty. Raises ValueError."""
    global _given
    if given and not re.fullmatch(r"\w+=(kill|error|sleep:[\d.]+)(@\d+)?", given):
        raise ValueError(f"{VARIABLE} is {given!r}; it should be like judge=kill, publish=sleep:2 or append=error@3")
    _given = given
    _reached.clear()
    if given:
        logging.getLogger("mend").warning("told to fail: %s=%s", VARIABLE, given)


arm(os.environ.get(VARIABLE, ""))
