"""Choose a baseline's learning rate and number of steps on validation examples, as fairly as an editor is trained.

One trajectory per example and learning rate serves every number of steps. Scored teacher-forced, by the harmonic mean
of efficacy, paraphrase, neighbour and unrelated, so that no figure can be bought with another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from editors.base_model import BaseModel
from editors.data import Example
from editors.errors import DataFileError
from editors.evaluation.cases import draw_unrelated, encoded
from editors.evaluation.exam import Exam
from editors.evaluation.marks import Values
from editors.evaluation.metrics import harmonic_mean
from editors.evaluation.reader import Reader
from editors.finetune.method import FineTuning, Recipe
from editors.mend.training.samples import own_samples
from editors.targets import Target
from editors.text import Tokens
from editors.views import view

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
STEPS = (2, 5, 10, 25)
KL_WEIGHT = 1.0
KL_SAMPLES = 64
SCORED = ("efficacy, sequence", "paraphrase, sequence", "neighbour, next token", "unrelated, next token")


@dataclass(frozen=True)
class Trial:
    """One point of the grid, with its figures on the validation examples and their harmonic mean."""

    recipe: Recipe
    figures: dict[str, float]
    score: float


def choose(
    base: BaseModel,
    targets: Sequence[Target],
    examples: Sequence[Example],
    *,
    kl: float = 0.0,
    seed: int = 0,
    learning_rates: Sequence[float] = LEARNING_RATES,
    steps: Sequence[int] = STEPS,
) -> tuple[FineTuning, list[Trial]]:
    """The best baseline on the grid, and the whole grid. kl: weight of FT+KL's second term, 0 for FT.

    Raises DataFileError when none of the examples has tokens.
    """
    usable = [example for example in examples if encoded(base, example.prompt, example.correction)]
    if not usable:
        raise DataFileError("there is no example to choose a baseline's learning rate on: measure fewer with --limit, "
                            "or give --validation FILE")  # fmt: skip
    samples = own_samples(base, KL_SAMPLES, seed) if kl else []
    pristine = Reader(base, view(base.model), targets)
    unrelated = draw_unrelated(usable, seed)
    exam = Exam(pristine, usable, unrelated, decode=False)
    trials: list[Trial] = []
    label = f"choosing {'ft+kl' if kl else 'ft'}"
    with tqdm(total=len(learning_rates) * len(usable), desc=label, unit="run", disable=None) as bar:
        for rate in learning_rates:
            recipe = Recipe(rate, max(steps), kl)
            tuning = FineTuning(base, targets, recipe, samples, seed=seed)
            reader = Reader(base, tuning.model, targets)
            marks: dict[int, list[Values]] = defaultdict(list)
            for index, example in enumerate(usable):
                tuning.reset()
                tokens = base.encode(example.prompt, example.correction)
                found = _trajectory(tuning, tokens, steps, partial(_values, exam, reader, index))
                for count, values in zip(steps, found, strict=True):
                    marks[count].append(values)
                bar.update()
            trials += [_trial(replace(recipe, steps=count), marks[count]) for count in steps]
    best = max(trials, key=lambda trial: (trial.score, trial.recipe.steps))  # equal scores: more steps fail less often
    return FineTuning(base, targets, best.recipe, samples, seed=seed), trials


def _trajectory(
    tuning: FineTuning, tokens: Tokens, steps: Sequence[int], measure: Callable[[], Values]
) -> list[Values]:
    """Values after each number of steps; a run that stopped early stays where it was."""
    found: dict[int, Values] = {}

    def look(step: int) -> None:
        if step in steps:
            found[step] = measure()

    taken = tuning.tune([tokens], look)
    last = found.get(taken) or measure()
    return [found[count] if count < taken else last for count in steps]


def _values(exam: Exam, reader: Reader, index: int) -> Values:
    return exam.mark(reader, only=index)[index]


def _trial(recipe: Recipe, examples: Sequence[Values]) -> Trial:
    figures = {}
    for name in SCORED:
        values = [value for example in examples for value in example.get(name, ())]
        if values:
            figures[name] = sum(values) / len(values)
    return Trial(recipe, figures, harmonic_mean(list(figures.values())))
