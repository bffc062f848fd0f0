"""What is chosen when the networks are trained: how edits share their weight, and how strongly they are made.

Training moves λ too, but there a larger one mostly makes every edit weaker, and the networks learn to make up for it.
So its effect on what edits do to each other is looked for afterwards, with the strength of a single edit kept.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import astuple, dataclass, replace

import torch

from editors.mend.keyed import KeyedEditor
from editors.mend.training.objective import Validation
from editors.mend.training.sets import SetObjective

RIDGES = (0.1, 0.3, 1.0)
STRENGTHS = (1.0, 1.4, 2.0)
FADINGS = (0.0, 0.1, 0.2)
AIMS = {
    1: Validation(0.97, 0.88, 0.65, 0.95),
    10: Validation(0.97, 0.80, 0.60, 0.95),
    100: Validation(0.95, 0.45, 0.60, 0.90),
    1000: Validation(0.80, 0.25, 0.60, 0.85),
}
"""By the number of edits: what is worth having; more of one figure does not make up for another."""
MORE = 4
"""Times as many edits as in another validation: the differences are small."""

BySize = dict[int, Validation]


@dataclass(frozen=True)
class Choice:
    """ridge: λ. strength: of a single edit, 1 as trained. fading: with their number."""

    ridge: float
    strength: float = 1.0
    fading: float = 0.0


def settle(editor: KeyedEditor, judgement: SetObjective) -> dict[Choice, BySize]:
    """Choose by how near figures of held-out edits come to AIMS: ridge, then strength and fading.

    Returns what each choice that was tried gave, the one that was taken first.
    """
    trained = [ridge.exp().item() for ridge in editor.log_ridge]
    units = [network.unit.clone() for network in editor.networks]
    tried: dict[Choice, BySize] = {}

    @torch.no_grad()
    def take(choice: Choice) -> None:
        editor.fading.fill_(choice.fading)
        for index, (ridge, unit) in enumerate(zip(trained, units, strict=True)):
            editor.log_ridge[index] = math.log(choice.ridge)
            editor.networks[index].unit.copy_(unit * choice.strength * (1 + choice.ridge) / (1 + ridge))

    def score(choice: Choice) -> float:
        if choice not in tried:
            take(choice)
            tried[choice] = judgement.by_size(MORE * judgement.config.validation_edits)
        return nearness(tried[choice])

    best = max((Choice(ridge) for ridge in RIDGES), key=score)
    pairs = itertools.product(STRENGTHS, FADINGS)
    best = max((replace(best, strength=strength, fading=fading) for strength, fading in pairs), key=score)
    take(best)
    return {choice: tried[choice] for choice in sorted(tried, key=score, reverse=True)}


def nearness(found: BySize) -> float:
    """The mean share of each aim that is reached, over all sizes and figures that were measured; at most 1."""
    shares = []
    for size, figures in found.items():
        aims = AIMS[max(aimed for aimed in AIMS if aimed <= size)]
        pairs = zip(astuple(figures), astuple(aims), strict=True)
        shares += [min(1.0, value / aim) for value, aim in pairs if not math.isnan(value)]
    return statistics.mean(shares)
