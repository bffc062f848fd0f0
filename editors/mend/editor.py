"""The trained editor: captured gradients in, low-rank weight changes out.

Flow: Capture(u, δ) -> GradientNetwork per shape -> ΔW_m = −α_m Σ_t δ̃_t ũ_tᵀ, kept as its factors.
Pure: reads captures, never touches a model's weights. Source: arXiv:2110.11309, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.capture import Capture
from editors.mend.network import GradientNetwork
from editors.targets import Target

FIRST_STEP = 1e-4
"""α at the start of training, before calibration."""


@dataclass(frozen=True)
class Proposal:
    """Unquantised factors of a batch of edits: ΔW of target m is Σ delta[m]ᵀ u[m] over an edit's rows.

    u, delta: one tensor per target, (rows, d_in) and (rows, d_out), float32; sign and step are in delta.
    example: one (rows,) int64 tensor per target, the edit that each row belongs to. edits: how many there are.
    """

    u: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    example: tuple[Tensor, ...]
    edits: int

    def rows_of(self, targets: Sequence[Target], edit: int) -> dict[str, tuple[Tensor, Tensor]]:
        """(u, delta) of one edit, per target name."""
        return {
            target.name: (u[example == edit], delta[example == edit])
            for target, u, delta, example in zip(targets, self.u, self.delta, self.example, strict=True)
        }

    def padded(self, targets: Sequence[Target]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """One row of factors per edit, zero rows at the end: the form that `views.edited` runs."""
        return {
            target.name: (_padded(u, example, self.edits), _padded(delta, example, self.edits))
            for target, u, delta, example in zip(targets, self.u, self.delta, self.example, strict=True)
        }


def _padded(rows: Tensor, example: Tensor, edits: int) -> Tensor:
    """(rows, width), grouped by edit -> (edits, most rows of an edit, width)."""
    counts = torch.bincount(example, minlength=edits)
    # Rows are grouped by edit, so a row's place is its index less that of its edit's first row.
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(example), device=example.device) - first[example]
    return rows.new_zeros(edits, int(counts.max()), rows.shape[-1]).index_put((example, place), rows)


class MendEditor(nn.Module):
    """Gradient networks shared by shape, and a learned step per layer.

    targets: the edited weights, in the order that fixes the meaning of `log_steps` and of the layer rows.
    rank: of the networks' factorised linear maps.
    """

    def __init__(self, targets: Sequence[Target], rank: int) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.rank = rank
        self.groups: dict[str, list[int]] = {}
        for index, target in enumerate(self.targets):
            self.groups.setdefault(f"{target.d_in}x{target.d_out}", []).append(index)
        self.networks = nn.ModuleDict(
            {
                name: GradientNetwork(*self.targets[members[0]].shape, rank, len(members))
                for name, members in self.groups.items()
            }
        )
        self.log_steps = nn.Parameter(torch.full((len(self.targets),), FIRST_STEP).log())

    @torch.no_grad()
    def update_statistics(self, capture: Capture) -> None:
        """Merge a training batch into the normalisers. Only training calls this."""
        for name, members in self.groups.items():
            self.networks[name].update_statistics(
                torch.cat([capture.u[m] for m in members]), torch.cat([capture.delta[m] for m in members])
            )

    def forward(self, capture: Capture) -> Proposal:
        """Rewrite each example's gradient into an edit that lowers its loss. See `Proposal` for shapes."""
        u: dict[int, Tensor] = {}
        delta: dict[int, Tensor] = {}
        for name, members in self.groups.items():
            counts = [len(capture.example[m]) for m in members]
            layer = torch.arange(len(members)).repeat_interleave(torch.tensor(counts)).to(self.log_steps.device)
            new_u, new_delta = self.networks[name](
                torch.cat([capture.u[m] for m in members]), torch.cat([capture.delta[m] for m in members]), layer
            )
            for member, u_part, delta_part in zip(members, new_u.split(counts), new_delta.split(counts), strict=True):
                u[member], delta[member] = u_part, -self.log_steps[member].exp() * delta_part
        order = range(len(self.targets))
        edits = len(capture.loss)
        return Proposal(tuple(u[m] for m in order), tuple(delta[m] for m in order), capture.example, edits)
