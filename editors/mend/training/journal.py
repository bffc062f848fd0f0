"""What a run says of itself: curves that survive a resume, a plot beside the checkpoint, TensorBoard's log."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editors.errors import TrainingOptionsInvalid
from editors.mend.training.objective import LOSSES

PLOT = "training.png"
POINTS = 1000
"""At most so many points are kept of a curve; beyond, every two become one."""
SMOOTHED = 25
"""Stretches of a curve that its plot averages over."""

COLOURS = {
    "edit": "C0", "neighbour": "C1", "unrelated": "C2", "loss": "C3",
    "efficacy": "C0", "paraphrase": "C4", "score": "C3",
}  # fmt: skip
"""What belongs together in the two halves of a plot has one colour."""

Figures = Mapping[str, float]


@dataclass
class Curve:
    """A run's figures over its steps, averaged over stretches that grow with its length."""

    stretch: int = 1
    points: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: int, figures: Figures) -> None:
        self.pending.append({"step": step, **figures})
        if len(self.pending) == self.stretch:
            self.points.append(_mean(self.pending))
            self.pending = []
        if len(self.points) == POINTS:
            self.points = [_mean(self.points[place : place + 2]) for place in range(0, POINTS, 2)]
            self.stretch *= 2


def _mean(rows: Sequence[Figures]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


class Journal:
    """Writes `training.png` into `folder`, and every step's figures to TensorBoard if asked.

    tensorboard: its folder. step: the step that a run is resumed from; what was logged beyond it is superseded.
    """

    def __init__(self, folder: Path, tensorboard: Path | None, step: int) -> None:
        self._folder = folder
        self._writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def step(self, step: int, figures: Figures) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                group = "held out" if name.startswith("held out") else "loss" if name in LOSSES else "step"
                self._writer.add_scalar(f"{group}/{name.removeprefix('held out ')}".replace(" ", "_"), value, step)

    def plot(self, curve: Curve, history: Sequence[Figures]) -> None:
        """Losses, smoothed, above the validations' figures. Replaced whole."""
        if self._writer is not None:
            self._writer.flush()
        draft = self._folder / f".{PLOT}.draft"
        _draw(draft, curve, history)
        os.replace(draft, self._folder / PLOT)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def require_tensorboard() -> None:
    """Raises TrainingOptionsInvalid, with what to install, where TensorBoard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainingOptionsInvalid(
            "--tensorboard needs the package tensorboard, which is not installed; run `pip install tensorboard`",
            option="tensorboard",
        )


def _draw(path: Path, curve: Curve, history: Sequence[Figures]) -> None:
    from matplotlib.figure import Figure  # its own canvas, Agg: no window and no state shared with others

    figure = Figure(figsize=(8, 7), layout="constrained")
    losses, figures = figure.subplots(2, sharex=True)
    for name in LOSSES:
        steps, values = _smooth(curve.points, name)
        if any(values):
            losses.plot(steps, values, **_line(name))
    losses.set_ylabel("loss (nats), smoothed")
    losses.set_yscale("log")
    for name in ("efficacy", "paraphrase", "neighbour", "unrelated", "score"):
        found = [(row["step"], row[f"held out {name}"]) for row in history]
        if not all(math.isnan(value) for _, value in found):
            figures.plot(*zip(*found, strict=True), marker=".", **_line(name))
    figures.set_ylabel("held out, fraction")
    figures.set_xlabel("step")
    figures.set_ylim(-0.02, 1.02)
    for axes in (losses, figures):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, format="png", dpi=100)


def _line(name: str) -> dict[str, Any]:
    return {"label": name, "color": COLOURS[name], "linewidth": 2 if name in ("loss", "score") else 1}


def _smooth(points: Sequence[Figures], name: str) -> tuple[list[float], list[float]]:
    """Averages over as many points as make one of `SMOOTHED` stretches, ending at each point."""
    window = math.ceil(len(points) / SMOOTHED)
    values = [point[name] for point in points]
    means = [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]
    return [point["step"] for point in points], means
