"""What editors have in common whose edits are joined by least squares: how keys are measured, and how much each counts.

key     κ = L⁻¹u / ‖L⁻¹u‖   u: what a weight reads where the edit is made; L Lᵀ: the covariance of what it reads in
                             general, so that keys of other texts are as good as orthogonal
state   ΔWᵀ = n^−f L⁻ᵀ (KᵀK + λI)⁻¹ KᵀV over all active edits (see `least_squares`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editors.factors import Factors
from editors.least_squares import Law, LeastSquaresState
from editors.state import Rows
from editors.targets import Target

RIDGE = 0.3
"""Added to a covariance's diagonal, of its mean. Directions that hardly vary would otherwise count for too much."""


class Joined:
    """What an editor does whose state is by least squares."""

    aggregate = "least_squares"
    new_state: Callable[[torch.device], LeastSquaresState]

    def joined(self, edits: Sequence[Factors]) -> Rows:
        """What edits do together, as rows whose product is ΔW = deltaᵀ u; float64, on the CPU."""
        state = self.new_state(torch.device("cpu"))
        state.add(*edits)
        return state.rows()


class LeastSquaresEditor(Joined, nn.Module):
    """targets: the edited weights. first_ridge: λ until it is trained."""

    first_scale = 1.0

    def __init__(self, targets: Sequence[Target], first_ridge: float) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.log_ridge = nn.Parameter(torch.full((len(self.targets),), first_ridge).log())
        # Not trained: while edits do not yet hold, it only learns to give the many up. Chosen on validation afterwards.
        self.register_buffer("fading", torch.zeros(()))
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

    def forms(self, rows: Rows) -> list[Rows]:
        """The forms that an edit may have: one."""
        return [rows]

    def new_state(self, device: torch.device) -> LeastSquaresState:
        """The state that this editor's edits are joined in; with no edit yet."""
        return LeastSquaresState(self.targets, *self.metrics(), device)

    def metrics(self) -> tuple[dict[str, Tensor], dict[str, Law]]:
        """L in float64, and by which law rows are joined, by the names of the targets."""
        named = {target.name: self.whitening(index).double() for index, target in enumerate(self.targets)}
        # Rounded to float32, in which no two mathematics libraries differ: the digest depends on every bit.
        ridges = torch.tensor([math.exp(log_ridge) for log_ridge in self.log_ridge.tolist()]).tolist()
        laws = {t.name: Law(ridge, self.fading.item()) for t, ridge in zip(self.targets, ridges, strict=True)}
        return named, laws


def ridged(covariance: Tensor) -> Tensor:
    """A covariance that can be inverted."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return covariance + RIDGE * covariance.diagonal().mean() * eye
