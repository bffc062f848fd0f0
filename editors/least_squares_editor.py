"""What editors have in common whose edits are joined by least squares: how keys are measured, and how much each counts.

key     κ = L⁻¹u / ‖L⁻¹u‖   u: what a weight reads where the edit is made; L Lᵀ: the covariance of what it reads in
                             general, so that keys of other texts are as good as orthogonal
state   ΔWᵀ = L⁻ᵀ (KᵀK + λI)⁻¹ KᵀV over all active edits (see `least_squares`)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editors.factors import Factors
from editors.least_squares import LeastSquaresState, RidgeLaw
from editors.state import Rows
from editors.targets import Target

RIDGE = 0.3
"""Added to a covariance's diagonal, of its mean. Directions that hardly vary would otherwise count for too much."""


class LeastSquaresEditor(nn.Module):
    """targets: the edited weights. first_ridge: λ of one row, per target until it is trained."""

    aggregate = "least_squares"

    def __init__(self, targets: Sequence[Target], first_ridge: float) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.log_ridge = nn.Parameter(torch.full((len(self.targets),), first_ridge).log())
        # Not trained: while edits do not yet hold, it only learns to give the many up. Chosen on validation afterwards.
        self.register_buffer("growth", torch.zeros(()))
        for index, target in enumerate(self.targets):
            self.register_buffer(f"whitening_{index}", torch.eye(target.d_in))

    def whitening(self, index: int) -> Tensor:
        """L of one target, (d_in, d_in) lower triangular."""
        return getattr(self, f"whitening_{index}")

    def set_covariance(self, index: int, covariance: Tensor) -> None:
        """Measure keys of one target by what it reads in general. covariance: E[u uᵀ], (d_in, d_in) float64."""
        # In half precision, as it will be stored: any such matrix is a metric, this one the editor's own.
        self.whitening(index).copy_(torch.linalg.cholesky(ridged(covariance)).half())

    def keys(self, index: int, u: Tensor) -> Tensor:
        """Inputs of one target (rows, d_in) -> whitened keys of length 1."""
        return F.normalize(torch.linalg.solve_triangular(self.whitening(index), u.T, upper=False).T, dim=-1)

    def new_state(self, device: torch.device) -> LeastSquaresState:
        """The state that this editor's edits are joined in; with no edit yet."""
        named = {target.name: self.whitening(index).double() for index, target in enumerate(self.targets)}
        # Rounded to float32, in which no two mathematics libraries differ: the digest depends on every bit.
        firsts = torch.tensor([math.exp(log_first) for log_first in self.log_ridge.tolist()]).tolist()
        ridges = {
            target.name: RidgeLaw(first, self.growth.item()) for target, first in zip(self.targets, firsts, strict=True)
        }
        return LeastSquaresState(self.targets, named, ridges, device)

    def joined(self, edits: Sequence[Factors]) -> Rows:
        """What edits do together, as rows whose product is ΔW = deltaᵀ u; float64, on the CPU."""
        state = self.new_state(torch.device("cpu"))
        state.add(*edits)
        return state.rows()


def ridged(covariance: Tensor) -> Tensor:
    """A covariance that can be inverted."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return covariance + RIDGE * covariance.diagonal().mean() * eye
