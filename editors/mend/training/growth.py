"""How much λ grows with the number of edits, chosen when the networks are trained.

While edits do not hold yet, a λ that may grow learns to give the many up. Once they do, the same number trades how many
of them hold against how little else moves; a single edit does not depend on it.
"""

from __future__ import annotations

import statistics

from editors.mend.keyed import KeyedEditor
from editors.mend.training.objective import Validation
from editors.mend.training.sets import SetObjective

GROWTHS = (0.0, 0.1, 0.2, 0.3, 0.4)
MORE = 4
"""Times as many edits as in another validation: the differences are small."""

BySize = dict[int, Validation]


def choose_growth(editor: KeyedEditor, judgement: SetObjective) -> dict[float, BySize]:
    """Set the growth with the best mean score over the sizes of sets, on held-out edits.

    Returns what each that was tried gave, the chosen one first.
    """
    tried: dict[float, BySize] = {}
    for growth in GROWTHS:
        editor.growth.fill_(growth)
        tried[growth] = judgement.by_size(MORE * judgement.config.validation_edits)
    scores = {growth: statistics.mean(each.score for each in sizes.values()) for growth, sizes in tried.items()}
    ordered = sorted(tried, key=lambda growth: -scores[growth])
    editor.growth.fill_(ordered[0])
    return {growth: tried[growth] for growth in ordered}
