"""A small state that has keys: edits are summed, and an edit's key is the mean of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from editors.factors import Factors, digest
from editors.state import Rows, SumState


class KeyedSum(SumState):
    """full_at: so many edits fill it, if any number does."""

    full_at: int | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._held: dict[str, dict[str, Tensor]] = {}

    def add(self, *factors: Factors) -> None:
        super().add(*factors)
        for each in factors:
            layers = {name: layer.decode()[0] for name, layer in each.layers.items()}
            self._held[digest(each.to_bytes())] = layers

    def remove(self, *factors: Factors) -> None:
        super().remove(*factors)
        for each in factors:
            del self._held[digest(each.to_bytes())]

    def overlaps(self, rows: Rows) -> list[tuple[str, float]]:
        found = [
            (held, max(_cosine(u, keys[name]) for name, (u, _) in rows.items())) for held, keys in self._held.items()
        ]
        return sorted(found, key=lambda each: -each[1])

    def fullness(self) -> float | None:
        return None if self.full_at is None else min(1.0, self.edits / self.full_at)


def _cosine(one: Tensor, other: Tensor) -> float:
    """Between the means of the inputs of two edits."""
    return float(torch.dot(normalize(one.mean(0), dim=0), normalize(other.mean(0), dim=0)).abs())
