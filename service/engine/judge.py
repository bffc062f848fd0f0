"""Whether a staged edit is good enough to go live: measured on the candidate, before anything is published."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from editors.decoding import Generation
from service.engine.errors import DidNotTake, DrawdownExceeded

Answer = Callable[[str], Generation]
"""Greedy answer of one view to one prompt."""


@dataclass(frozen=True)
class Verdict:
    """took: greedy decoding from the prompt begins with the correction.

    paraphrases, keep: the caller's own prompts, each with what was said. drawdown: on the guard prompts, 0 to 1.
    lost: other active edits that would no longer hold.
    """

    after: str
    took: bool
    paraphrases: list[dict[str, JsonValue]]
    keep: list[dict[str, JsonValue]]
    drawdown: float
    drawdown_budget: float
    lost: list[str]

    def checks(self) -> dict[str, JsonValue]:
        """The measurements as they are stored in the ledger and shown to the caller."""
        return {
            "took": self.took,
            "paraphrases": list(self.paraphrases),
            "keep": list(self.keep),
            "drawdown": self.drawdown,
            "drawdown_budget": self.drawdown_budget,
            "lost": list(self.lost),
        }

    @property
    def accepted(self) -> bool:
        return self.took and self.drawdown <= self.drawdown_budget


def judge_paraphrases(
    paraphrases: Sequence[str], candidate: Answer, says: Callable[[str], bool]
) -> list[dict[str, JsonValue]]:
    """Does the candidate give the correction to other wordings as well?"""
    judged: list[dict[str, JsonValue]] = []
    for prompt in paraphrases:
        text = candidate(prompt).text
        judged.append({"prompt": prompt, "took": says(text), "text": text})
    return judged


def judge_keep(keep: Sequence[str], base: Answer, candidate: Answer) -> list[dict[str, JsonValue]]:
    """Does the candidate still say what the base says, where the caller wants it to?"""
    judged: list[dict[str, JsonValue]] = []
    for prompt in keep:
        before, after = base(prompt).text, candidate(prompt).text
        judged.append({"prompt": prompt, "kept": before == after, "before": before, "after": after})
    return judged


def refusal(correction: str, before: str, best_margin: float, verdict: Verdict | None) -> DidNotTake | DrawdownExceeded:
    """Why an edit does not go live, with the measurements of its last trial; none when no scale was worth one.

    best_margin: how far the correction gets ahead at the best scale, in nats.
    """
    facts: dict[str, Any] = {
        "before": {"text": before},
        "best_margin_nats": round(best_margin, 4) if math.isfinite(best_margin) else None,
    }
    if verdict is not None:
        facts |= {"after": {"text": verdict.after}, "checks": verdict.checks()}
    if verdict is not None and verdict.took:
        return DrawdownExceeded(
            f"refused: unrelated behaviour would move by {verdict.drawdown:.3f}, over the budget of "
            f"{verdict.drawdown_budget:.3f}; nothing was changed. Roll other edits back, "
            "or raise MEND_GUARD_BUDGET",
            **facts,
        )
    return DidNotTake(
        f"refused: at no scale does the model answer {correction.strip()!r} to this prompt; nothing was "
        "changed. Put the prompt so that the correction follows it naturally, or shorten the correction",
        **facts,
    )
