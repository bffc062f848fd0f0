"""From what a model says to values of figures, prompt by prompt.

Of prompts that must give the correction (efficacy, paraphrase) or what follows from it (portability):
- token, sequence: the fraction of the answer's tokens that are right when it is read in, and whether all are
- greedy: the decoded text begins with the answer
- ES, PS: the correction is more probable than the true answer (mean log-probability per token; CounterFact)
Of prompts that must not change (neighbour, unrelated):
- next token, 8 tokens: greedy decoding says what the base says; a text is said exactly when each of its tokens is
  the most likely after those before it, so that it need not be decoded again
- KL: KL(base ‖ edited) of the next token, in nats
- NS: of a neighbour, the true answer is more probable than the correction
- drawdown, as MEND's: accuracy before − after, an answer being right when all of its tokens are; of known answers only
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.nn import functional as F

from editors.evaluation.cases import ANSWER_TOKENS, Case
from editors.evaluation.reader import Reading

Values = dict[str, list[float]]
"""Of one example: per figure, one value for each prompt that it is measured on."""
PREFERS_NEW = {"efficacy": "ES", "paraphrase": "PS"}
SCORES = ("ES", "PS", "NS")
"""What S is the harmonic mean of, as in CounterFact."""
SAID = ("token", "sequence", "greedy")
KEPT = ("next token", f"{ANSWER_TOKENS} tokens", "KL")
FIGURES = (
    *(f"{kind}, {what}" for kind in ("efficacy", "paraphrase", "portability") for what in SAID),
    *(f"{kind}, {what}" for kind in ("neighbour", "unrelated") for what in KEPT),
    "drawdown",
    *SCORES,
)
"""In the order in which they are reported."""


def mark_target(case: Case, found: Mapping[str, Reading], says: bool | None) -> dict[str, float]:
    """Values of a prompt that must give an answer.

    found: by the name of its sequence. says: whether greedy decoding gives it, None where nothing was decoded.
    """
    right = found["new"].right
    marks = {
        f"{case.kind}, token": _share(right),
        f"{case.kind}, sequence": float(all(right)),
    }
    if says is not None:
        marks[f"{case.kind}, greedy"] = float(says)
    if "true" in found:
        marks[PREFERS_NEW[case.kind]] = float(found["new"].log_probability > found["true"].log_probability)
    return marks


def mark_base(found: Mapping[str, Reading]) -> dict[str, float]:
    """Values of a prompt that must not change, on the base: agreement with itself says nothing."""
    if "new" not in found:
        return {}
    return {"NS": float(found["true"].log_probability > found["new"].log_probability)}


def mark_locality(case: Case, base: Mapping[str, Reading], found: Mapping[str, Reading]) -> dict[str, float]:
    """The same under an edit."""
    same = [one == other for one, other in zip(found["said"].best, base["said"].best, strict=True)]
    kl = F.kl_div(found["said"].first, base["said"].first, log_target=True, reduction="sum")
    marks = {
        f"{case.kind}, next token": float(same[0]),
        f"{case.kind}, {ANSWER_TOKENS} tokens": float(all(same)),
        f"{case.kind}, KL": kl.clamp(min=0).item(),
        **mark_base(found),
    }
    if "true" in found:
        marks["drawdown"] = float(all(base["true"].right)) - float(all(found["true"].right))
    return marks


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)
