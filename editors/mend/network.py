"""MEND's gradient network: one per shape of weight, shared by all layers of that shape.

Shapes: u (rows, d_in) and δ (rows, d_out) -> normalised z (rows, d_in + d_out) -> ũ (rows, d_in), δ̃ (rows, d_out).
Source: arXiv:2110.11309, section 3.1. It begins as the identity on the normalised rows. What a `Variant` takes away
is an empty list of blocks, statistics that are None, or a block without its residual, scale and shift.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from editors.mend.variant import Variant

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
        """rows: (rows, width), of the statistics' own dtype."""
        if not len(rows):
            return
        count = self.count + len(rows)
        mean = rows.mean(0)
        shift = mean - self.mean
        self.m2 += (rows - mean).square().sum(0) + shift.square() * (self.count * len(rows) / count).to(shift.dtype)
        self.mean += shift * (len(rows) / count).to(shift.dtype)
        self.count.copy_(count)

    @property
    def deviation(self) -> Tensor:
        """(width,)"""
        return (self.m2 / (self.count - 1).clamp(min=1).to(self.m2.dtype)).sqrt()

    def normalise(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / (self.deviation + EPSILON)


class _Block(nn.Module):
    """h <- h + relu(scale_m * (U V h + b) + shift_m), with U = 0 at the start.

    At the start the argument of relu is 0 everywhere. `clamp` passes the gradient there; `relu` would not, and
    the network would stay the identity for ever.
    """

    def __init__(self, width: int, variant: Variant, layers: int) -> None:
        super().__init__()
        rank = min(variant.rank, width)
        self.identity = variant.identity
        self.v = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width)) if variant.shared else None
        self.shift = nn.Parameter(torch.zeros(layers, width)) if variant.shared else None
        if not self.identity:
            nn.init.xavier_uniform_(self.u, gain=nn.init.calculate_gain("relu"))
            nn.init.xavier_uniform_(self.v)

    def forward(self, h: Tensor, layer: Tensor) -> Tensor:
        linear = (h @ self.v.T) @ self.u.T + self.bias  # (rows, width)
        if self.scale is not None:
            linear = self.scale[layer] * linear + self.shift[layer]
        active = linear.clamp(min=0)
        return h + active if self.identity else active


class GradientNetwork(nn.Module):
    """Rewrites captured rows of all layers of one shape.

    layers: how many layers share it; each has its own scale and shift row, in the order of the targets.
    """

    def __init__(self, d_in: int, d_out: int, variant: Variant, layers: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.u_statistics = RunningStatistics(d_in) if variant.has_statistics else None
        self.delta_statistics = RunningStatistics(d_out) if variant.has_statistics else None
        widths = variant.widths(d_in, d_out)

        def blocks(name: str) -> nn.ModuleList:
            count = variant.blocks if name in widths else 0
            return nn.ModuleList(_Block(widths[name], variant, layers) for _ in range(count))

        self.blocks = blocks("blocks")
        self.u_blocks = blocks("u_blocks")
        self.delta_blocks = blocks("delta_blocks")

    def update_statistics(self, u: Tensor, delta: Tensor) -> None:
        """Count the rows of a training batch. Never called while editing."""
        if self.u_statistics is not None:
            kept = _carries_gradient(u, delta)
            self.u_statistics.update(u[kept])
            self.delta_statistics.update(delta[kept])

    def forward(self, u: Tensor, delta: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
        """u (rows, d_in), delta (rows, d_out), layer (rows,) int64 -> ũ, δ̃ of the same shapes.

        Rows in which u or δ is all zero have no gradient, and come out as zeros.
        """
        kept = _carries_gradient(u, delta)[:, None]
        if self.u_statistics is not None:
            u, delta = self.u_statistics.normalise(u), self.delta_statistics.normalise(delta)
        if self.blocks:
            u, delta = _run(self.blocks, torch.cat([u, delta], dim=-1), layer).split([self.d_in, self.d_out], dim=-1)
        u, delta = _run(self.u_blocks, u, layer), _run(self.delta_blocks, delta, layer)
        return u * kept, delta * kept


def _run(blocks: nn.ModuleList, h: Tensor, layer: Tensor) -> Tensor:
    for block in blocks:
        h = block(h, layer)
    return h


def _carries_gradient(u: Tensor, delta: Tensor) -> Tensor:
    return u.ne(0).any(-1) & delta.ne(0).any(-1)
