"""Figures come with an interval that holds their mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editors.evaluation.metrics import figure, grouped


class TestGrouped:
    def test_of_one_value_each_is_the_plain_figure(self):
        values = np.random.default_rng(0).random(50).tolist()
        one, other = grouped([[value] for value in values], 3), figure(values, 3)
        assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))
        assert one.count == other.count

    def test_holds_the_truth_as_often_as_it_says_where_a_groups_values_hang_together(self):
        """Resampling the values one by one holds it far less often."""
        rng = np.random.default_rng(1)
        held = 0
        for trial in range(100):
            groups = [(rng.random(10) < share).astype(float).tolist() for share in rng.random(60)]
            found = grouped(groups, trial)
            held += found.low <= 0.5 <= found.high
        assert held >= 88

    def test_leaves_groups_without_values_out(self):
        assert grouped([[1.0, 0.0], [], [1.0]]).count == 3
        assert grouped([[], []]).count == 0


class TestFigure:
    @settings(max_examples=40, deadline=None)
    @given(values=st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40))
    def test_interval_contains_the_mean(self, values):
        found = figure(values)
        assert min(values) <= found.low <= found.mean + 1e-12
        assert found.mean - 1e-12 <= found.high <= max(values)
        assert found.mean == pytest.approx(sum(values) / len(values))
        assert found.count == len(values)

    def test_interval_is_that_of_a_binomial_share(self):
        found = figure([1.0] * 300 + [0.0] * 100)
        deviation = math.sqrt(0.75 * 0.25 / 400)
        assert found.low == pytest.approx(0.75 - 1.96 * deviation, abs=0.006)
        assert found.high == pytest.approx(0.75 + 1.96 * deviation, abs=0.006)

    def test_of_what_never_varies_has_no_width(self):
        found = figure([1.0] * 5)
        assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)

    def test_of_nothing_is_not_a_number(self):
        found = figure([])
        assert found.count == 0
        assert all(math.isnan(value) for value in (found.mean, found.low, found.high))

    def test_is_a_function_of_the_seed(self):
        values = np.random.default_rng(0).random(50).tolist()
        np.random.seed(3)
        assert figure(values, seed=1) == figure(values, seed=1) != figure(values, seed=2)

    def test_prints_its_interval(self):
        assert str(figure([1.0, 1.0])) == "1.000 (1.000–1.000)"
        assert str(figure([12345678.0])) == "1.23e+07 (1.23e+07–1.23e+07)"
