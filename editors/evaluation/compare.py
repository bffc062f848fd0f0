"""Two measurements side by side, prompt by prompt: only so can a small difference be told from chance.

Compares entries of reports as `mend evaluate --report` writes them: same data, same seed, same examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors.errors import ReportError
from editors.evaluation.marks import FIGURES, SCORES
from editors.evaluation.metrics import Figure, difference, grouped, harmonic_difference, perplexity_difference

Entry = Mapping[str, Any]
"""One result of a report."""
SAME = ("data", "data_digest", "seed", "examples", "setting")
"""What must be equal in two entries that are compared."""


@dataclass(frozen=True)
class Comparison:
    """One figure of two measurements: its mean in each. difference: of two − one, pair by pair, with its interval."""

    name: str
    one: float
    two: float
    difference: Figure


def read_report(path: Path) -> list[Entry]:
    """The entries of a report. Raises ReportError when the file holds none."""
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise ReportError(f"cannot read the report {path}: {error.strerror}", file=str(path)) from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error})", file=str(path)) from error
    if not isinstance(entries, list) or not entries:
        raise ReportError(f"{path} holds no list of results; write one with mend evaluate --report", file=str(path))
    for entry in entries:
        missing = {"method", "figures", "values", "text_losses", "texts_digest", *SAME} - set(
            entry if isinstance(entry, dict) else ()
        )
        if missing:
            raise ReportError(f"a result in {path} lacks {', '.join(sorted(missing))}; measure it again with "
                              "mend evaluate --report", file=str(path))  # fmt: skip
    return entries


def pair(ones: Sequence[Entry], others: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Entries that belong together: of one file of data and one setting, and of one method if both reports have it.

    Raises ReportError when there are none, naming what is different.
    """
    pairs = []
    for one in ones:
        alike = [other for other in others if all(one[key] == other[key] for key in SAME)]
        named = [other for other in alike if other["method"] == one["method"]]
        pairs += [(one, other) for other in (named or (alike if len(ones) == len(others) == 1 else []))]
    if pairs:
        return pairs
    one, other = ones[0], others[0]
    keys = [key for key in (*SAME, "method") if one[key] != other[key]]
    told = "; ".join(f"{key}: {one[key]} and {other[key]}" for key in keys)
    raise ReportError(f"these reports cannot be compared prompt by prompt ({told})", differ=keys)


def compare(one: Entry, two: Entry) -> list[Comparison]:
    """Every figure that both have. Raises ReportError when their prompts differ."""
    asked = [[values["prompt"] for values in entry["values"]] for entry in (one, two)]
    if asked[0] != asked[1]:
        raise ReportError(
            "these reports are of other prompts, although their data and seed are the same; measure again"
        )
    found, seed = [], one["seed"]
    for name in FIGURES:
        columns = [[values.get(name, []) for values in entry["values"]] for entry in (one, two)]
        if [len(values) for values in columns[0]] != [len(values) for values in columns[1]]:
            continue  # measured in one of them only: another base model, another kind of tokens
        if any(columns[0]):
            means = [grouped(column, seed).mean for column in columns]
            found.append(Comparison(name, *means, difference(columns[1], columns[0], seed)))
    ends = [[entry["figures"].get(name, {}).get("mean") for entry in (one, two)] for name in ("S", "perplexity")]
    if None not in ends[0]:
        found.append(Comparison("S", *ends[0], harmonic_difference(two["values"], one["values"], SCORES, seed)))
    if None not in ends[1] and one["texts_digest"] == two["texts_digest"]:
        apart = perplexity_difference(two["text_losses"], one["text_losses"], seed)
        found.append(Comparison("perplexity", *ends[1], apart))
    return found


def table(one: str, two: str, comparisons: Sequence[Comparison]) -> str:
    """Markdown. one, two: what to call them."""
    lines = [f"| figure | {one} | {two} | difference (95 %) | clear of zero |", "|---|---|---|---|---|"]
    for item in comparisons:
        clear = "yes" if item.difference.clear_of_zero else "no"
        lines.append(f"| {item.name} | {item.one:.3f} | {item.two:.3f} | {item.difference} | {clear} |")
    return "\n".join(lines)
