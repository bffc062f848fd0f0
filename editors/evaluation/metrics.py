"""Figures with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A mean of fractions with its bootstrap confidence interval. count: how many prompts it is the mean of."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}–{self.high:.3f})"


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Mean and percentile bootstrap interval at 95 %; NaN where there is nothing to average."""
    if not values:
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Figure(float(sample.mean()), float(low), float(high), len(sample))
