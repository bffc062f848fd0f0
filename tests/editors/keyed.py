"""Keyed edits of the small models, and the obvious way to say what they do to a weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from editors.factors import Factors, quantise_keyed
from editors.least_squares import Law, LeastSquaresState
from editors.targets import Target, resolve_targets
from editors.views import view
from tests.editors.test_state import bits
from tests.small import small_gpt2, small_llama

MODELS = {"linear": small_llama().double(), "conv1d": small_gpt2().double()}
"""In float64, where not even the last bit of a solve can hide."""
TARGETS = {layout: resolve_targets(model) for layout, model in MODELS.items()}
"""Their weights have 32 or 48 inputs."""
ROWS = (0, 1, 1, 2, 3, 5, 8, 13, 1, 2, 20, 33)
"""Of the edits made from each seed: few are enough to fill a weight's inputs."""


def factor_of_covariance(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3 * width, width, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 2, width)
    return torch.linalg.cholesky(inputs.T @ inputs / len(inputs) + 0.05 * torch.eye(width, dtype=torch.float64))


def metric(targets: Sequence[Target]) -> tuple[dict[str, Tensor], dict[str, Law]]:
    whitening = {target.name: factor_of_covariance(target.d_in, seed) for seed, target in enumerate(targets)}
    return whitening, {target.name: Law(0.1 * 2.0**seed) for seed, target in enumerate(targets)}


METRICS = {layout: metric(targets) for layout, targets in TARGETS.items()}


def new_state(layout: str) -> LeastSquaresState:
    return LeastSquaresState(TARGETS[layout], *METRICS[layout])


def some_rows(targets: Sequence[Target], seed: int, rows: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys of unit norm and changes, float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    return {t.name: (normalize(random(t.d_in)), 0.3 * random(t.d_out)) for t in targets}


def some_edit(targets: Sequence[Target], seed: int) -> Factors:
    """Every fifth leaves the last weight alone."""
    return quantise_keyed(some_rows(targets[: -1 if seed % 5 == 0 else None], seed, ROWS[seed]))


def keys_and_changes(target: Target, edits: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray]:
    """What is stored, as real numbers."""
    layers = [edit.layers[target.name] for edit in edits if target.name in edit.layers]
    keys = [layer.u.double().numpy() / 2**15 for layer in layers]
    changes = [layer.delta.double().numpy() * 2.0 ** (layer.exponent + 15) for layer in layers]
    return np.concatenate([np.zeros((0, target.d_in)), *keys]), np.concatenate([np.zeros((0, target.d_out)), *changes])


def dense_change(target: Target, edits: Sequence[Factors], L: Tensor, law: Law) -> np.ndarray:
    """ΔW by the normal equations of the inputs themselves, without whitening anything."""
    keys, changes = keys_and_changes(target, edits)
    inputs = keys @ L.numpy().T
    covariance = (L @ L.T).numpy()
    together = np.linalg.solve(inputs.T @ inputs + law.ridge * covariance, inputs.T @ changes).T
    return max(1, len(keys)) ** -law.fading * together


def written(layout: str, state: LeastSquaresState) -> list[Tensor]:
    fresh = view(MODELS[layout], [target.name for target in TARGETS[layout]])
    state.write(MODELS[layout], fresh)
    return bits(fresh, TARGETS[layout])
