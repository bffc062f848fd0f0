"""Plots of reports. matplotlib is imported when one is drawn: a server that never draws does without it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editors.evaluation.metrics import Figure
from editors.evaluation.report import Report

SHOWN = ("efficacy, greedy", "paraphrase, greedy", "neighbour, next token", "unrelated, next token")


def draw_plots(reports: Sequence[Report], folder: Path, name: str) -> list[Path]:
    """PNG files: figures of single edits by method, and figures over the number of edits. name: begins their names.

    Returns what was written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    single = [report for report in reports if report.setting == "single"]
    if single:
        figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
        _draw_bars(axes, single)
        written.append(_save(pyplot, figure, folder / f"{name}-single.png"))
    for way in ("batched", "accumulated"):
        counted = [report for report in reports if report.setting.startswith(way)]
        if counted:
            names = _named(counted)
            size = (3 * len(names), 3.6)
            figure, panels = pyplot.subplots(
                1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained"
            )
            for axes, shown in zip(panels[0], names, strict=True):
                _draw_counts(axes, counted + single, shown, way)
            written.append(_save(pyplot, figure, folder / f"{name}-{way}.png"))
    return written


def _named(reports: Sequence[Report]) -> list[str]:
    """The figures that any of them has."""
    return [name for name in SHOWN if any(name in report.figures for report in reports)]


def _draw_bars(axes: Any, reports: Sequence[Report]) -> None:
    """One group of bars for each figure, one bar for each method."""
    width, names = 0.8 / len(reports), _named(reports)
    for place, report in enumerate(reports):
        shown = [(at, report.figures[name]) for at, name in enumerate(names) if name in report.figures]
        positions = [at + (place - (len(reports) - 1) / 2) * width for at, _ in shown]
        values = [value for _, value in shown]
        axes.bar(
            positions, [value.mean for value in values], width, yerr=_errors(values), capsize=3, label=report.method
        )
    axes.set_xticks(range(len(names)), names)


def _draw_counts(axes: Any, reports: Sequence[Report], name: str, way: str) -> None:
    """One figure over the number of edits, one line for each method; a single edit is one of them."""
    points: dict[str, list[tuple[int, Figure]]] = defaultdict(list)
    for report in reports:
        if name in report.figures:
            points[report.method].append((report.active, report.figures[name]))
    for method, line in points.items():
        line.sort(key=lambda point: point[0])
        values = [value for _, value in line]
        counts = [count for count, _ in line]
        axes.errorbar(
            counts, [value.mean for value in values], _errors(values), marker="o", markersize=4, capsize=3, label=method
        )
    axes.set_xscale("log")
    ticks = sorted({count for line in points.values() for count, _ in line})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel(f"edits, {way}")


def _errors(values: Sequence[Figure]) -> list[list[float]]:
    """Distances of the interval's ends from the mean, as matplotlib wants them."""
    return [
        [max(0.0, value.mean - value.low) for value in values],
        [max(0.0, value.high - value.mean) for value in values],
    ]


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    first = figure.axes[0]
    first.set_ylim(0, 1.05)
    first.set_ylabel("fraction, with 95 % intervals")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
