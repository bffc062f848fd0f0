"""Whether a staged edit is good enough to go live: measured on the candidate, before anything is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from editors.decoding import Generation
from editors.text import begins_with

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


def judge_paraphrases(paraphrases: Sequence[str], correction: str, candidate: Answer) -> list[dict[str, JsonValue]]:
    """Does the candidate give the correction to other wordings as well?"""
    judged: list[dict[str, JsonValue]] = []
    for prompt in paraphrases:
        text = candidate(prompt).text
        judged.append({"prompt": prompt, "took": begins_with(text, correction), "text": text})
    return judged


def judge_keep(keep: Sequence[str], base: Answer, candidate: Answer) -> list[dict[str, JsonValue]]:
    """Does the candidate still say what the base says, where the caller wants it to?"""
    judged: list[dict[str, JsonValue]] = []
    for prompt in keep:
        before, after = base(prompt).text, candidate(prompt).text
        judged.append({"prompt": prompt, "kept": before == after, "before": before, "after": after})
    return judged
