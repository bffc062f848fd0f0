"""How large a low-rank change is, from its rows alone: the product itself, as large as the weight, is never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Magnitude:
    """rank: of the change, numerically. norm: its Frobenius norm."""

    rank: int
    norm: float


def magnitude(u: Tensor, delta: Tensor) -> Magnitude:
    """Of ΔW = deltaᵀ u, for rows (rows, d_in) and (rows, d_out) in float64.

    With uᵀ = Q R and deltaᵀ = P S, ΔW = P (S Rᵀ) Qᵀ, whose singular values are those of S Rᵀ.
    """
    if not len(u):
        return Magnitude(0, 0.0)
    R, S = (torch.linalg.qr(rows.T, mode="r").R for rows in (u, delta))  # (at most rows, rows)
    core = S @ R.T
    rounding = max(u.shape[1], delta.shape[1]) * torch.finfo(core.dtype).eps
    return Magnitude(int(torch.linalg.matrix_rank(core, rtol=rounding)), float(torch.linalg.matrix_norm(core)))
