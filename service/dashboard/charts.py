"""Lines over the revisions of a ledger, as the geometry of an SVG. A template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 180, 46, 28, 12, 10
MOST_DOTS = 60
"""Beyond which the points of a line are no longer marked one by one."""


@dataclass(frozen=True)
class Tick:
    """at: a coordinate. label: what is written beside it."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """path: of the line. limit: the height of what must not be exceeded."""

    path: str
    dots: tuple[tuple[float, float, str], ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    limit: float | None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def stepped(series: Sequence[dict[str, Any]], name: str, *, percent: bool, limit: float | None = None) -> Chart | None:
    """One quantity of a series, which holds until the next entry; None if it was never known.

    limit: what must not be exceeded.
    """
    known = [float(point[name]) for point in series if point[name] is not None]
    if not known:
        return None
    highest = max(known)
    highest = _round_up(max(highest, limit or 0), whole=not percent)

    def x(place: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (place / max(1, len(series) - 1)), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / highest, 1)

    def told(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:g}"

    line, dots = "", []
    for place, point in enumerate(series):
        value = point[name]
        if value is None:
            continue
        at = (x(place), y(value))
        line = f"{line}H{at[0]}V{at[1]}" if line else f"M{at[0]} {at[1]}"
        dots.append((*at, f"revision {point['revision']}: {told(value)}"))
    places = sorted({0, (len(series) - 1) // 2, len(series) - 1})
    return Chart(
        f"{line}H{x(len(series) - 1)}",
        tuple(dots) if len(dots) <= MOST_DOTS else (),
        tuple(Tick(x(place), f"{series[place]['revision']}") for place in places),
        tuple(Tick(y(value), told(value)) for value in (0, highest / 2, highest)),
        None if limit is None else y(limit),
    )


def _round_up(value: float, *, whole: bool) -> float:
    """The next number whose half is round too, so that the ticks are."""
    if value <= 0:
        return 2.0 if whole else 0.01
    size = 10.0 ** math.floor(math.log10(value))
    found = next(step * size for step in (1, 2, 4, 6, 8, 10) if step * size >= value * (1 - 1e-9))
    return max(2.0, found) if whole else found
