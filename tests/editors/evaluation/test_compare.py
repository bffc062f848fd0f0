"""Measurements are compared prompt by prompt, and only where that means something."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from editors.errors import ReportError
from editors.evaluation.compare import compare, pair, read_report, table
from editors.evaluation.metrics import difference, figure, harmonic, harmonic_mean, perplexity


def entry(values, **facts):
    return {
        "data": "a.json", "data_digest": "0", "seed": 0, "setting": "single", "method": "mend",
        "examples": len(values), "values": values, "figures": {}, "text_losses": [], "texts_digest": "", **facts,
    }  # fmt: skip


def entries(shift=0.3, count=200, noise=0.01):
    """Two measurements with one hard part in common, far larger than their difference."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, count)
    ones, twos = (
        [{"prompt": str(n), "unrelated, KL": [value]} for n, value in enumerate(column.tolist())]
        for column in (hard, hard + shift + rng.normal(0, noise, count))
    )
    return entry(ones), entry(twos)


class TestDifference:
    def test_interval_of_pairs_is_narrower_than_that_of_two_groups(self):
        one, two = entries(shift=0.05)
        (found,) = compare(one, two)
        assert found.name == "unrelated, KL"
        assert found.difference.mean == pytest.approx(0.05, abs=0.005)
        assert found.difference.high - found.difference.low < 0.01
        assert found.difference.clear_of_zero
        assert found.two - found.one == pytest.approx(found.difference.mean)
        apart = [figure([value["unrelated, KL"][0] for value in each["values"]]) for each in (one, two)]
        assert apart[0].high > apart[1].low

    def test_of_what_differs_by_chance_is_not_clear_of_zero(self):
        (found,) = compare(*entries(shift=0.0, noise=1.0))
        assert not found.difference.clear_of_zero

    def test_turns_with_the_order(self):
        one, two = entries()
        (forth,), (back,) = compare(one, two), compare(two, one)
        assert forth.difference.mean == -back.difference.mean
        assert forth.difference.clear_of_zero
        assert back.difference.clear_of_zero

    def test_needs_pairs(self):
        with pytest.raises(ValueError, match="zip"):
            difference([[1.0]], [[1.0], [2.0]])


class TestCompare:
    def test_takes_figures_with_the_same_prompts_alone(self):
        one = entry([{"prompt": "a", "ES": [1.0], "PS": [1.0, 0.0]}, {"prompt": "b", "PS": [1.0]}])
        two = entry([{"prompt": "a", "ES": [0.0], "PS": [1.0]}, {"prompt": "b", "PS": [1.0, 1.0]}])
        assert [found.name for found in compare(one, two)] == ["ES"]

    def test_refuses_other_prompts(self):
        with pytest.raises(ReportError, match="of other prompts"):
            compare(entry([{"prompt": "a"}]), entry([{"prompt": "b"}]))

    def test_prints_as_a_table(self):
        lines = table("a", "b", compare(*entries())).splitlines()
        assert lines[0] == "| figure | a | b | difference (95 %) | clear of zero |"
        assert lines[2].startswith("| unrelated, KL |")
        assert lines[2].endswith("| yes |")

    def test_tells_the_difference_of_s_and_of_perplexity_too(self):
        rng = np.random.default_rng(1)
        hard = rng.integers(2, size=80).astype(float)
        ones, twos = (
            [{"prompt": str(n), "ES": [1.0], "PS": [value], "NS": [share]} for n, value in enumerate(hard.tolist())]
            for share in (0.0 + 0.5, 0.6)
        )
        losses = rng.normal(3, 0.5, 30)
        one, two = (
            entry(values, text_losses=text.tolist(), figures={"S": {"mean": s}, "perplexity": {"mean": p}})
            for values, text, s, p in ((ones, losses, 0.1, 20.0), (twos, losses + 0.01, 0.2, 21.0))
        )
        found = {item.name: item for item in compare(one, two)}
        expected = harmonic(twos, ("ES", "PS", "NS")).mean - harmonic(ones, ("ES", "PS", "NS")).mean
        assert found["S"].difference.mean == pytest.approx(expected)
        assert found["S"].difference.clear_of_zero
        assert (found["S"].one, found["S"].two) == (0.1, 0.2)
        assert found["perplexity"].difference.mean == pytest.approx(np.exp(losses.mean()) * (np.exp(0.01) - 1))
        assert 0 < found["perplexity"].difference.low < found["perplexity"].difference.high < 0.5


class TestPair:
    def test_matches_data_setting_and_method(self):
        ones = [entry([], setting=setting, method=method) for setting in ("single", "batched 2") for method in "xy"]
        twos = list(reversed(copy.deepcopy(ones)))
        assert pair(ones, twos) == [(one, one) for one in ones]

    def test_takes_two_methods_where_each_report_has_one(self):
        one, two = entry([], method="ft"), entry([])
        assert pair([one], [two]) == [(one, two)]

    @pytest.mark.parametrize(
        ("field", "value"),
        [("data_digest", "1"), ("seed", 1), ("examples", 3), ("setting", "batched 2"), ("data", "b")],
    )
    def test_refuses_what_differs_and_names_it(self, field, value):
        with pytest.raises(ReportError, match=f"{field}: .* and {value}") as wrong:
            pair([entry([])], [entry([], **{field: value})])
        assert wrong.value.facts["differ"] == [field]

    def test_refuses_two_reports_of_several_methods_with_none_in_common(self):
        with pytest.raises(ReportError, match="method: a and c"):
            pair([entry([], method="a"), entry([], method="b")], [entry([], method="c"), entry([], method="d")])


class TestReadReport:
    def test_reads_what_evaluate_writes(self, tmp_path):
        written = [entry([{"prompt": "a"}])]
        (tmp_path / "report.json").write_text(json.dumps(written))
        assert read_report(tmp_path / "report.json") == written

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{broken", "is not JSON"),
            ("{}", "holds no list of results"),
            ("[]", "holds no list of results"),
            (
                "[3]",
                "lacks data, data_digest, examples, figures, method, seed, setting, text_losses, texts_digest, values",
            ),
            (json.dumps([{k: v for k, v in entry([]).items() if k != "values"}]), "lacks values; measure it again"),
        ],
    )
    def test_says_what_is_wrong(self, tmp_path, text, said):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ReportError, match=said):
            read_report(tmp_path / "report.json")

    def test_says_that_there_is_no_file(self, tmp_path):
        with pytest.raises(ReportError, match=r"nothing\.json: No such file"):
            read_report(tmp_path / "nothing.json")


class TestHarmonic:
    def test_mean_is_that_of_the_figures(self):
        values = [{"ES": [1.0, 0.0], "PS": [1.0]}, {"ES": [1.0], "PS": [0.0, 1.0]}]
        found = harmonic(values, ("ES", "PS"))
        assert found.mean == pytest.approx(harmonic_mean([2 / 3, 2 / 3]))
        assert found.low <= found.mean <= found.high
        assert found.count == 2

    def test_interval_is_as_wide_as_examples_vary_not_prompts(self):
        """Ten equal prompts of one example say no more than one."""
        rng = np.random.default_rng(0)
        shares = rng.integers(2, size=100).astype(float).tolist()
        one, ten = ([{"ES": [share] * n} for share in shares] for n in (1, 10))
        assert harmonic(one, ["ES"]) == harmonic(ten, ["ES"])
        expected = figure(shares)
        assert harmonic(one, ["ES"]).low == pytest.approx(expected.low, abs=0.02)

    def test_mean_of_nothing_is_not_a_number(self):
        assert harmonic([], ["ES"]).count == harmonic([{"PS": [1.0]}], ["ES", "PS"]).count == 0

    @pytest.mark.parametrize(("values", "mean"), [([0.5, 1.0], 2 / 3), ([0.0, 1.0], 0.0), ([0.25], 0.25)])
    def test_mean_cannot_be_bought(self, values, mean):
        assert harmonic_mean(values) == pytest.approx(mean)


def test_perplexity_is_the_exponential_with_its_interval():
    losses = [1.0, 2.0, 3.0, 1.5]
    found, loss = perplexity(losses), figure(losses)
    assert (found.mean, found.low, found.high) == pytest.approx(tuple(np.exp([loss.mean, loss.low, loss.high])))
