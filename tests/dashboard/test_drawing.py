"""What pages show that is worked out for them: differences of two answers, and lines of a chart."""

from __future__ import annotations

import math

import pytest

from service.dashboard.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, stepped
from service.dashboard.differences import compared


def changed(pieces) -> str:
    return "".join(f"[{piece.text}]" if piece.changed else piece.text for piece in pieces)


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("a b c", "a b c", ("abc", "abc")),
        ("a b c", "a x c", ("a[b]c", "a[x]c")),
        ("a b", "x y", ("[a][b]", "[x][y]")),
        ("", "x", ("", "[x]")),
        ("x", "", ("[x]", "")),
        ("q a r", "s a t u", ("[q][a][r]", "[s][a][t][u]")),  # one token in common, by chance
        ("q a b r", "s t a b", ("[q]ab[r]", "[s][t]ab")),
        ("a a a", "a a", ("aa[a]", "aa")),
    ],
)
def test_tokens_that_the_other_has_not_are_marked(before, after, shown):
    pieces = compared(before.split(), after.split())
    assert tuple(changed(each) for each in pieces) == shown


def test_tokens_have_their_probabilities():
    (piece,), _ = compared([{"token": "x", "base": math.log(0.25), "live": 0.0}], [])
    assert (piece.text, piece.changed) == ("x", True)
    assert piece.base == pytest.approx(0.25)
    assert piece.live == 1


def points(values):
    return [{"revision": number, "value": value} for number, value in enumerate(values, 1)]


class TestChart:
    def test_of_nothing_is_none(self):
        assert stepped([], "value", percent=True) is None
        assert stepped(points([None, None]), "value", percent=True) is None

    @pytest.mark.parametrize("values", [[0], [1], [0, 0, 0], [1, 2, 3], [0.1, 0.3], [5, None, 7], [1e6, 3], [99] * 80])
    @pytest.mark.parametrize("percent", [True, False])
    def test_lies_within_its_frame(self, values, percent):
        chart = stepped(points(values), "value", percent=percent, limit=0.3)
        for x, y, _ in chart.dots:
            assert LEFT <= x <= WIDTH - RIGHT
            assert TOP <= y <= HEIGHT - BOTTOM
        assert all(TOP <= tick.at <= HEIGHT - BOTTOM for tick in chart.up)
        assert len({tick.label for tick in chart.up}) == 3
        assert chart.path.startswith("M")

    def test_keeps_a_value_until_the_next(self):
        chart = stepped(points([0, 2, None, 1]), "value", percent=False)
        (x0, low, _), (x1, high, _), (x2, middle, said) = chart.dots
        assert (x0, low) == (LEFT, HEIGHT - BOTTOM)
        assert high == TOP
        assert middle == (low + high) / 2
        assert chart.path == f"M{x0} {low}H{x1}V{high}H{x2}V{middle}H{x2}"
        assert said == "revision 4: 1"

    def test_shows_a_limit_that_is_in_sight(self):
        assert stepped(points([0.1]), "value", percent=True, limit=0.3).limit is not None
        assert stepped(points([1]), "value", percent=False).limit is None
