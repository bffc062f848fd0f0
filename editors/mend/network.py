"""MEND's gradient network: one per shape of weight, shared by all layers of that shape.

Shapes: u (rows, d_in) and δ (rows, d_out) -> normalised z (rows, d_in + d_out) -> ũ (rows, d_in), δ̃ (rows, d_out).
Source: arXiv:2110.11309, section 3.1. It begins as the identity on the normalised rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = 2
EPSILON = 1e-7


class RunningStatistics(nn.Module):
    """Mean and variance per feature over every row seen, merged a batch at a time (Chan et al., 1979).

    They are part of the editor and are saved with it, count included, so that resumed training goes on exactly.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("m2", torch.zeros(width))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """rows: (rows, width) float32."""
        if not len(rows):
            return
        count = self.count + len(rows)
        mean = rows.mean(0)
        shift = mean - self.mean
        self.m2 += (rows - mean).square().sum(0) + shift.square() * (self.count * len(rows) / count).float()
        self.mean += shift * (len(rows) / count).float()
        self.count.copy_(count)

    def normalise(self, rows: Tensor) -> Tensor:
        deviation = (self.m2 / (self.count - 1).clamp(min=1).float()).sqrt()
        return (rows - self.mean) / (deviation + EPSILON)


class _Block(nn.Module):
    """h <- h + relu(scale_m * (U V h + b) + shift_m), with U = 0 at the start.

    At the start the argument of relu is 0 everywhere. `clamp` passes the gradient there; `relu` would not, and
    the network would stay the identity for ever.
    """

    def __init__(self, width: int, rank: int, layers: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))

    def forward(self, h: Tensor, layer: Tensor) -> Tensor:
        linear = (h @ self.v.T) @ self.u.T + self.bias  # (rows, width)
        return h + (self.scale[layer] * linear + self.shift[layer]).clamp(min=0)


class GradientNetwork(nn.Module):
    """Rewrites captured rows of all layers of one shape.

    layers: how many layers share it; each has its own scale and shift row, in the order of the targets.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, layers: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.u_statistics = RunningStatistics(d_in)
        self.delta_statistics = RunningStatistics(d_out)
        self.blocks = nn.ModuleList(_Block(d_in + d_out, rank, layers) for _ in range(BLOCKS))

    def update_statistics(self, u: Tensor, delta: Tensor) -> None:
        """Count the rows of a training batch. Never called while editing."""
        kept = _carries_gradient(u, delta)
        self.u_statistics.update(u[kept])
        self.delta_statistics.update(delta[kept])

    def forward(self, u: Tensor, delta: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        """u (rows, d_in), delta (rows, d_out), layer (rows,) int64 -> ũ, δ̃ of the same shapes.

        Rows in which u or δ is all zero have no gradient, and come out as zeros.
        """
        h = torch.cat([self.u_statistics.normalise(u), self.delta_statistics.normalise(delta)], dim=-1)
        for block in self.blocks:
            h = block(h, layer)
        h = h.float() * _carries_gradient(u, delta)[:, None]
        return h[:, : self.d_in], h[:, self.d_in :]


def _carries_gradient(u: Tensor, delta: Tensor) -> Tensor:
    return u.ne(0).any(-1) & delta.ne(0).any(-1)
