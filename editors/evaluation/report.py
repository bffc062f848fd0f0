"""What was measured, as a value: figures with intervals, and the values behind them, prompt by prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from editors.evaluation.marks import FIGURES, SCORES, Values
from editors.evaluation.metrics import Figure, figure, harmonic, perplexity

TENTHS = ("efficacy, greedy", "paraphrase, greedy")
"""Figures that are also told of the first and of the last tenth of edits that were made one after another."""


@dataclass
class Report:
    """Edits of one method under one setting (`single`, `batched 10`, `accumulated 100`).

    before, after: values of every example, in order. losses_before, losses_after: nats per token of running texts.
    records: of every example, its prompt and how its edit was made. seconds: that making an edit took, each.
    """

    method: str
    setting: str
    seed: int
    before: list[Values] = field(default_factory=list, repr=False)
    after: list[Values] = field(default_factory=list, repr=False)
    losses_before: list[float] = field(default_factory=list, repr=False)
    losses_after: list[float] = field(default_factory=list, repr=False)
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def examples(self) -> int:
        return len(self.after)

    @property
    def scales(self) -> list[float]:
        """Of the edits that were applied, where the method has a scale."""
        return [record["scale"] for record in self.records if record.get("scale") is not None]

    @property
    def figures(self) -> dict[str, Figure]:
        """By name, under the edits."""
        found = _figures(self.after, self.losses_after, self.seed)
        tenth = len(self.after) // 10 if self.setting.startswith("accumulated") else 0
        for part, values in (("first", self.after[:tenth]), ("last", self.after[-tenth:])) if tenth else ():
            shares = _figures(values, [], self.seed)
            found |= {f"{name}, {part} tenth": shares[name] for name in TENTHS if name in shares}
        return found

    @property
    def figures_before(self) -> dict[str, Figure]:
        """The same on the base model, as far as they say something there."""
        return _figures(self.before, self.losses_before, self.seed)

    def table(self) -> str:
        """Markdown: one row per figure, with 95 % bootstrap intervals."""
        lines = ["| figure | base | edited (95 %) | prompts |", "|---|---|---|---|"]
        before = self.figures_before
        for name, value in self.figures.items():
            beside = f"{before[name].mean:.3f}" if name in before else ""
            lines.append(f"| {name} | {beside} | {value} | {value.count} |")
        return "\n".join(lines)

    def to_json(self, *, values: bool = True) -> dict[str, Any]:
        """values: also those of every prompt, which comparisons need."""
        found = {
            "method": self.method,
            "setting": self.setting,
            "seed": self.seed,
            "examples": self.examples,
            "figures": {name: asdict(value) for name, value in self.figures.items()},
            "before": {name: asdict(value) for name, value in self.figures_before.items()},
        }
        if self.scales:
            found["median_scale"] = sorted(self.scales)[len(self.scales) // 2]
        if self.seconds:
            found["mean_edit_ms"] = round(1000 * statistics.mean(self.seconds), 1)
        for what in ("already", "refused"):
            if count := sum(what in record for record in self.records):
                found[what] = count
        if values:
            found["values"] = [
                {"prompt": record["prompt"], **one} for record, one in zip(self.records, self.after, strict=True)
            ]
            found["text_losses"] = self.losses_after
        return found


def _figures(examples: Sequence[Values], losses: Sequence[float], seed: int) -> dict[str, Figure]:
    found = {}
    for name in FIGURES:
        values = [value for example in examples for value in example.get(name, ())]
        if values:
            found[name] = figure(values, seed)
    if all(name in found for name in SCORES):
        found["S"] = harmonic(examples, SCORES, seed)
    if losses:
        found["perplexity"] = perplexity(losses, seed)
    return found
