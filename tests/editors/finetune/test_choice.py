"""The baselines' step size is chosen on validation examples, and the whole grid is told."""

from __future__ import annotations

import pytest

from editors.data import Example
from editors.errors import DataFileError
from editors.evaluation.metrics import harmonic_mean
from editors.evaluation.protocols import Bench
from editors.finetune.choice import SCORED, choose
from editors.finetune.method import FineTuning, Recipe
from editors.targets import resolve_targets
from tests.editors.evaluation.bases import KINDS, base_of, examples_of

RATES, STEPS = (1e-5, 3e-3), (1, 4, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_trajectory_gives_what_every_number_of_steps_would(kind):
    base = base_of(kind)
    targets, examples = resolve_targets(base.model), examples_of(base)[:2]
    method, trials = choose(base, targets, examples, learning_rates=RATES, steps=STEPS)
    assert [(trial.recipe.learning_rate, trial.recipe.steps) for trial in trials] == [
        (rate, count) for rate in RATES for count in STEPS
    ]
    for trial in trials:
        report = Bench(base).single(FineTuning(base, targets, trial.recipe), examples)
        assert trial.figures == pytest.approx({name: report.figures[name].mean for name in SCORED})
        assert trial.score == pytest.approx(harmonic_mean(list(trial.figures.values())))
    assert method.recipe == max(trials, key=lambda trial: (trial.score, trial.recipe.steps)).recipe
    assert method.name == "ft"


def test_with_divergence_is_the_other_baseline():
    base = base_of("decoder")
    method, trials = choose(
        base, resolve_targets(base.model), examples_of(base)[:2], kl=2.0, learning_rates=[1e-3], steps=[2]
    )
    assert (method.name, method.recipe, len(trials)) == ("ft+kl", Recipe(1e-3, 2, 2.0), 1)


def test_is_a_function_of_the_seed():
    base = base_of("decoder")
    grids = [
        choose(base, resolve_targets(base.model), examples_of(base)[:2], kl=1.0, seed=3, steps=[5])[1] for _ in range(2)
    ]
    assert grids[0] == grids[1]


@pytest.mark.parametrize("examples", [[], [Example("", "x"), Example("x", " ")]])
def test_needs_examples(examples):
    base = base_of("decoder")
    with pytest.raises(DataFileError, match=r"no example to choose .* on: measure fewer with --limit"):
        choose(base, resolve_targets(base.model), examples)
