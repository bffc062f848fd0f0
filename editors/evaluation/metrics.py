"""Figures with their uncertainty: means with percentile bootstrap intervals at 95 %."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        return f"{shown(self.mean)} ({shown(self.low)}–{shown(self.high)})"

    @property
    def clear_of_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def shown(value: float) -> str:
    """Three decimals; perplexities may need an exponent."""
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


NOTHING = Figure(float("nan"), float("nan"), float("nan"), 0)


def figure(values: Sequence[float], seed: int = 0) -> Figure:
    """Mean and its interval; NaN where there is nothing to average."""
    return _figure(values, seed, lambda means: means)


def grouped(groups: Sequence[Sequence[float]], seed: int = 0) -> Figure:
    """Mean of all values, whose groups are resampled whole: prompts of one edit share that edit."""
    kept = [group for group in groups if len(group)]
    sums, counts = np.array([sum(group) for group in kept], dtype=np.float64), np.array([len(group) for group in kept])
    if not kept:
        return NOTHING
    drawn = _draws(len(kept), seed)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return Figure(float(sums.sum() / counts.sum()), *_interval(means), int(counts.sum()))


def difference(ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]], seed: int = 0) -> Figure:
    """Mean of the differences one − other of values that belong together in pairs, grouped as in `grouped`."""
    pairs = zip(ones, others, strict=True)
    return grouped([[a - b for a, b in zip(one, other, strict=True)] for one, other in pairs], seed)


def perplexity(losses: Sequence[float], seed: int = 0) -> Figure:
    """exp of the mean of losses in nats per token, of texts of one length each."""
    return _figure(losses, seed, np.exp)


def perplexity_difference(ones: Sequence[float], others: Sequence[float], seed: int = 0) -> Figure:
    """Of the same texts, which are resampled for both alike."""
    pairs = np.array(list(zip(ones, others, strict=True)))
    return _figure(pairs, seed, lambda means: np.exp(means[..., 0]) - np.exp(means[..., 1]))


def _figure(values: Sequence[float] | np.ndarray, seed: int, of_mean: Callable[[np.ndarray], np.ndarray]) -> Figure:
    """Of what is worked out from a mean over values, (count,) or (count, columns)."""
    if not len(values):
        return NOTHING
    sample = np.asarray(values, dtype=np.float64)
    means = sample[_draws(len(sample), seed)].mean(1)
    return Figure(float(of_mean(sample.mean(0))), *_interval(of_mean(means)), len(sample))


def harmonic_mean(values: Sequence[float]) -> float:
    """No value can be bought with another: 0 as soon as one is 0, and NaN of nothing."""
    if not values:
        return float("nan")
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


Columns = Sequence[Mapping[str, Sequence[float]]]
"""Per example, its values by the name of their figure."""


def harmonic(examples: Columns, names: Sequence[str], seed: int = 0) -> Figure:
    """Harmonic mean of several figures, with examples resampled whole; NaN where a figure has no value at all."""
    found = _harmonic_means(examples, names, seed)
    return NOTHING if found is None else Figure(found[0], *_interval(found[1]), len(examples))


def harmonic_difference(ones: Columns, others: Columns, names: Sequence[str], seed: int = 0) -> Figure:
    """Of two measurements of the same examples, which are resampled for both alike."""
    one, other = (_harmonic_means(examples, names, seed) for examples in (ones, others))
    if one is None or other is None:
        return NOTHING
    return Figure(one[0] - other[0], *_interval(one[1] - other[1]), len(ones))


def _harmonic_means(examples: Columns, names: Sequence[str], seed: int) -> tuple[float, np.ndarray] | None:
    """Of all examples, and of each resample, (resamples,)."""
    sums = np.array([[sum(example.get(name, ())) for name in names] for example in examples])  # (examples, names)
    counts = np.array([[len(example.get(name, ())) for name in names] for example in examples])
    if not len(examples) or not counts.sum(0).all():
        return None
    drawn = _draws(len(examples), seed)
    resampled = sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1)  # (resamples, names)
    means = np.array([harmonic_mean(row) for row in resampled.tolist()])
    return harmonic_mean((sums.sum(0) / counts.sum(0)).tolist()), means


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _interval(means: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
