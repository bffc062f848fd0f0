"""What is chosen when the networks are trained: how edits share their weight, and how strongly they are made.

Training moves λ too, but there a larger one mostly makes every edit weaker, and the networks learn to make up for it.
So its effect on what edits do to each other is looked for afterwards, with the strength of a single edit kept.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

import torch

from editors.mend.keyed import KeyedEditor
from editors.mend.training.objective import Validation
from editors.mend.training.sets import SetObjective

RIDGES = (0.1, 0.3, 1.0)
STRENGTHS = (1.0, 1.4, 2.0)
GROWTHS = (0.0, 0.1, 0.2)
MORE = 4
"""Times as many edits as in another validation: the differences are small."""

BySize = dict[int, Validation]


@dataclass(frozen=True)
class Choice:
    """ridge: λ of one edit. strength: of a single edit, 1 as trained. growth: of λ, a power of the number of edits."""

    ridge: float
    strength: float = 1.0
    growth: float = 0.0


def settle(editor: KeyedEditor, judgement: SetObjective) -> dict[Choice, BySize]:
    """Choose by the mean score over the sizes of sets, on held-out edits: ridge, then strength, then growth.

    Returns what each choice that was tried gave, the one that was taken first.
    """
    trained = [ridge.exp().item() for ridge in editor.log_ridge]
    units = [network.unit.clone() for network in editor.networks]
    tried: dict[Choice, BySize] = {}

    @torch.no_grad()
    def take(choice: Choice) -> None:
        editor.growth.fill_(choice.growth)
        for index, (ridge, unit) in enumerate(zip(trained, units, strict=True)):
            editor.log_ridge[index] = math.log(choice.ridge)
            editor.networks[index].unit.copy_(unit * choice.strength * (1 + choice.ridge) / (1 + ridge))

    def score(choice: Choice) -> float:
        if choice not in tried:
            take(choice)
            tried[choice] = judgement.by_size(MORE * judgement.config.validation_edits)
        return statistics.mean(figures.score for figures in tried[choice].values())

    best = max((Choice(ridge) for ridge in RIDGES), key=score)
    best = max((replace(best, strength=strength) for strength in STRENGTHS), key=score)
    best = max((replace(best, growth=growth) for growth in GROWTHS), key=score)
    take(best)
    return {choice: tried[choice] for choice in sorted(tried, key=score, reverse=True)}
