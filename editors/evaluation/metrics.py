"""Figures with their uncertainty: means with percentile bootstrap intervals at 95 %."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A mean with its bootstrap confidence interval. count: how many prompts it is the mean of."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f}–{self.high:.3f})"

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0


NOTHING = Figure(float("nan"), float("nan"), float("nan"), 0)


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Mean and its interval; NaN where there is nothing to average."""
    if not values:
        return NOTHING
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(1)
    return Figure(float(sample.mean()), *_interval(means), len(sample))


def difference(ones: Sequence[float], others: Sequence[float], seed: int = 0) -> Figure:
    """Mean of the differences one − other of values that belong together in pairs, which are resampled as pairs."""
    return figure([one - other for one, other in zip(ones, others, strict=True)], seed)


def perplexity(losses: Sequence[float], seed: int = 0) -> Figure:
    """exp of the mean of losses in nats per token, of texts of one length each."""
    loss = figure(losses, seed)
    return Figure(*np.exp([loss.mean, loss.low, loss.high]).tolist(), loss.count)


def harmonic_mean(values: Sequence[float]) -> float:
    """No value can be bought with another: 0 as soon as one is 0, and NaN of nothing."""
    if not values:
        return float("nan")
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def harmonic(examples: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str], seed: int = 0) -> Figure:
    """Harmonic mean of several figures, with examples resampled whole.

    examples: per example its values by the name of their figure. NaN where one of the names has no value at all.
    """
    sums = np.array([[sum(example.get(name, ())) for name in names] for example in examples])  # (examples, names)
    counts = np.array([[len(example.get(name, ())) for name in names] for example in examples])
    if not len(examples) or not counts.sum(0).all():
        return NOTHING
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(examples), size=(RESAMPLES, len(examples)))
    resampled = sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1)  # (resamples, names)
    means = [harmonic_mean(row) for row in resampled.tolist()]
    return Figure(harmonic_mean((sums.sum(0) / counts.sum(0)).tolist()), *_interval(means), len(examples))


def _interval(means: Sequence[float] | np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
