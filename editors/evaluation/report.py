"""What was measured, as a value: figures with intervals, and the values behind them, prompt by prompt."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from editors.evaluation.marks import FIGURES, SCORES, Values
from editors.evaluation.metrics import Figure, grouped, harmonic, perplexity, shown

OVER_COUNTS = {
    "efficacy, read": "efficacy, sequence",
    "decoded": "efficacy, greedy",
    "paraphrase, read": "paraphrase, sequence",
    "decoded ": "paraphrase, greedy",
    "neighbours": "neighbour, next token",
    "unrelated": "unrelated, next token",
    "perplexity": "perplexity",
}
"""Columns of the table over the number of edits."""
TENTHS = ("efficacy, greedy", "paraphrase, greedy")
"""Figures that are also told of the first and of the last tenth of edits that were made one after another."""


@dataclass
class Report:
    """Edits of one method under one setting (`single`, `batched 10`, `accumulated 100`).

    before, after: values of every example, in order. losses_before, losses_after: nats per token of running texts.
    texts_digest: of those texts' tokens. records: of every example, its prompt and how its edit was made.
    seconds: that making an edit took, each.
    """

    method: str
    setting: str
    seed: int
    before: list[Values] = field(default_factory=list, repr=False)
    after: list[Values] = field(default_factory=list, repr=False)
    losses_before: list[float] = field(default_factory=list, repr=False)
    losses_after: list[float] = field(default_factory=list, repr=False)
    texts_digest: str = ""
    records: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: list[float] = field(default_factory=list, repr=False)

    @property
    def examples(self) -> int:
        return len(self.after)

    @property
    def active(self) -> int:
        """Edits that are active at once."""
        return int(self.setting.partition(" ")[2] or 1)

    @property
    def scales(self) -> list[float]:
        """Of the edits that were applied, where the method has a scale."""
        return [record["scale"] for record in self.records if record.get("scale") is not None]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """By name, under the edits."""
        found = _figures(self.after, self.losses_after, self.seed)
        tenth = len(self.after) // 10 if self.setting.startswith("accumulated") else 0
        for part, values in (("first", self.after[:tenth]), ("last", self.after[-tenth:])) if tenth else ():
            shares = _figures(values, [], self.seed)
            found |= {f"{name}, {part} tenth": shares[name] for name in TENTHS if name in shares}
        return found

    @cached_property
    def figures_before(self) -> dict[str, Figure]:
        """The same on the base model, as far as they say something there."""
        return _figures(self.before, self.losses_before, self.seed)

    @property
    def left_out(self) -> dict[str, int]:
        """How many corrections were said `already`, and how many were `refused`: no scale would have taught them."""
        counts = {what: sum(what in record for record in self.records) for what in ("already", "refused")}
        return {what: count for what, count in counts.items() if count}

    @property
    def heading(self) -> str:
        """Such as `100 edits, accumulated 100, by ft`, `200 of 1000 edits, batched 1000` or `600 single edits`."""
        edits = "single edits" if self.setting == "single" else f"edits, {self.setting}"
        if self.active > self.examples:
            edits = f"of {self.active} {edits}"
        by = "" if self.method == "mend" else f", by {self.method}"
        aside = "".join(f", {count} {what}" for what, count in self.left_out.items())
        return f"{self.examples} {edits}{by}{aside}"

    def table(self) -> str:
        """Markdown: one row per figure, with 95 % bootstrap intervals."""
        lines = ["| figure | base | edited (95 %) | prompts |", "|---|---|---|---|"]
        before = self.figures_before
        for name, value in self.figures.items():
            beside = shown(before[name].mean) if name in before else ""
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
        found |= self.left_out
        if values:
            found["values"] = [
                {"prompt": record["prompt"], **one} for record, one in zip(self.records, self.after, strict=True)
            ]
            found |= {"text_losses": self.losses_after, "texts_digest": self.texts_digest}
        return found


def over_counts(reports: Sequence[Report]) -> str:
    """Markdown: one row per number of edits that are active at once and method, with 95 % intervals; first the base."""
    rows = [
        (report.active, report)
        for report in reports
        if report.setting == "single" or report.setting.startswith("batched")
    ]
    lines = ["| N | method | " + " | ".join(OVER_COUNTS) + " |", "|---" * (2 + len(OVER_COUNTS)) + "|"]

    def add(count: int, method: str, figures: Mapping[str, Figure]) -> None:
        cells = [str(figures[name]) if name in figures else "" for name in OVER_COUNTS.values()]
        lines.append(f"| {count} | {method} | " + " | ".join(cells) + " |")

    rows.sort(key=lambda row: row[0])
    for _, report in rows[:1]:
        add(0, "base", report.figures_before)
    for count, report in rows:
        add(count, report.method, report.figures)
    return "\n".join(lines)


def _figures(examples: Sequence[Values], losses: Sequence[float], seed: int) -> dict[str, Figure]:
    found = {}
    for name in FIGURES:
        groups = [example.get(name, ()) for example in examples]
        if any(groups):
            found[name] = grouped(groups, seed)
    if all(name in found for name in SCORES):
        found["S"] = harmonic(examples, SCORES, seed)
    if losses:
        found["perplexity"] = perplexity(losses, seed)
    return found
