"""How much λ grows with the number of edits, chosen when the networks are trained.

While edits do not hold yet, a λ that may grow learns to give the many up. Once they do, the same number trades how many
of them hold against how little else moves; a single edit does not depend on it.
"""

from __future__ import annotations

from editors.mend.keyed import KeyedEditor
from editors.mend.training.objective import Validation
from editors.mend.training.sets import SetObjective

GROWTHS = (0.0, 0.1, 0.2, 0.3)


def choose_growth(editor: KeyedEditor, judgement: SetObjective) -> tuple[Validation, dict[float, Validation]]:
    """Set the growth with the best score on held-out edits. Returns its figures, and those of all that were tried."""
    tried: dict[float, Validation] = {}
    for growth in GROWTHS:
        editor.growth.fill_(growth)
        tried[growth] = judgement.validate()
    best = max(tried, key=lambda growth: tried[growth].score)
    editor.growth.fill_(best)
    return tried[best], tried
