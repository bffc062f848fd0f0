"""Plots of reports. matplotlib is an optional dependency (`mend-service[plots]`), imported when a plot is drawn."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editors.errors import ReportError
from editors.evaluation.metrics import Figure
from editors.evaluation.report import Report

BARS = ("efficacy, greedy", "paraphrase, greedy", "neighbour, next token", "unrelated, next token")


def draw_plots(reports: Sequence[Report], folder: Path, name: str) -> list[Path]:
    """PNG files: figures of single edits by method, and figures over the number of edits. name: begins their names.

    Returns what was written. Raises ReportError when matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ReportError("plots need matplotlib: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    single = [report for report in reports if report.setting == "single"]
    if single:
        figure, axes = pyplot.subplots(figsize=(8, 4))
        _draw_bars(axes, single)
        written.append(_save(pyplot, figure, axes, folder / f"{name}-single.png"))
    for way in ("batched", "accumulated"):
        counted = [report for report in reports if report.setting.startswith(way)]
        if counted:
            figure, axes = pyplot.subplots(figsize=(8, 4))
            _draw_counts(axes, counted, way)
            written.append(_save(pyplot, figure, axes, folder / f"{name}-{way}.png"))
    return written


def _draw_bars(axes: Any, reports: Sequence[Report]) -> None:
    """One group of bars for each figure, one bar for each method."""
    width = 0.8 / len(reports)
    names = [name for name in BARS if any(name in report.figures for report in reports)]
    for place, report in enumerate(reports):
        figures = report.figures
        shown = [(at, figures[name]) for at, name in enumerate(names) if name in figures]
        positions = [at + (place - (len(reports) - 1) / 2) * width for at, _ in shown]
        means = [value.mean for _, value in shown]
        axes.bar(positions, means, width, yerr=_errors([value for _, value in shown]), capsize=3, label=report.method)
    axes.set_xticks(range(len(names)), names)


def _draw_counts(axes: Any, reports: Sequence[Report], way: str) -> None:
    """One line for each figure and method, over the number of edits."""
    lines: dict[tuple[str, str], list[tuple[int, Figure]]] = defaultdict(list)
    for report in reports:
        count = int(re.sub(r"\D", "", report.setting))
        for name, value in report.figures.items():
            if name in BARS:
                lines[report.method, name].append((count, value))
    for (method, name), points in lines.items():
        points.sort(key=lambda point: point[0])
        values = [value for _, value in points]
        means = [value.mean for value in values]
        axes.errorbar([n for n, _ in points], means, _errors(values), marker="o", capsize=3, label=f"{method}: {name}")
    axes.set_xscale("log")
    axes.set_xlabel(f"edits, {way}")


def _errors(values: Sequence[Figure]) -> list[list[float]]:
    """Distances of the interval's ends from the mean, as matplotlib wants them."""
    return [
        [max(0.0, value.mean - value.low) for value in values],
        [max(0.0, value.high - value.mean) for value in values],
    ]


def _save(pyplot: Any, figure: Any, axes: Any, path: Path) -> Path:
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("fraction, with 95 % intervals")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
