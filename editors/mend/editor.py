"""The trained editor: captured gradients in, low-rank weight changes out.

Flow: Capture(u, δ) -> GradientNetwork per shape -> ΔW_m = −α_m Σ_t δ̃_t ũ_tᵀ, kept as its factors. The sign is
learned too in the original code, so an editor that was imported from there has one for each target.
Pure: reads captures, never touches a model's weights. Source: arXiv:2110.11309, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.capture import Capture
from editors.factors import Factors
from editors.mend.network import GradientNetwork
from editors.mend.variant import Variant
from editors.state import Rows, SumState, stacked
from editors.targets import Target

FIRST_STEP = 1e-4
"""α at the start of training, before calibration."""
FIRST_RAW_STEP = 0.1
"""The same where rows are not normalised: the size of a gradient is in them."""


@dataclass(frozen=True)
class Proposal:
    """Unquantised factors of a batch of edits: ΔW of target m is Σ delta[m]ᵀ u[m] over an edit's rows.

    u, delta: one tensor per target, (rows, d_in) and (rows, d_out), of the editor's dtype; sign and step are in delta.
    example: one tensor per target, (rows,) int64, the edit that each row belongs to, in ascending order.
    edits: how many there are; one may have no rows.
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
        # Most targets see the same rows, and so share one tensor.
        places = {id(example): self._places(example) for example in self.example}

        def scatter(rows: Tensor, example: Tensor) -> Tensor:
            place, longest = places[id(example)]
            return rows.new_zeros(self.edits, longest, rows.shape[-1]).index_put((example, place), rows)

        return {
            target.name: (scatter(u, example), scatter(delta, example))
            for target, u, delta, example in zip(targets, self.u, self.delta, self.example, strict=True)
        }

    def _places(self, example: Tensor) -> tuple[Tensor, int]:
        """Each row's place within its edit, (rows,) int64, and the number of rows of the longest edit."""
        counts = torch.bincount(example, minlength=self.edits)
        # Rows are grouped by edit, so a row's place is its index less that of its edit's first row.
        first = torch.cumsum(counts, 0) - counts
        return torch.arange(len(example), device=example.device) - first[example], int(counts.max())


class MendEditor(nn.Module):
    """Gradient networks shared by shape, and a learned step per layer.

    targets: the edited weights, in the order that fixes the meaning of `log_steps` and of the layer rows.
    variant: what its networks are made of.
    signs: per target, −1 (against the gradient) or 1; −1 for all without any.
    """

    aggregate = "sum"
    first_scale = 1.0

    def __init__(self, targets: Sequence[Target], variant: Variant, signs: Sequence[int] | None = None) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.variant = variant
        self.groups: dict[str, list[int]] = {}
        for index, target in enumerate(self.targets):
            name = f"{target.d_in}x{target.d_out}" if variant.shared else target.name.replace(".", "#")
            self.groups.setdefault(name, []).append(index)
        self.networks = nn.ModuleDict(
            {
                name: GradientNetwork(*self.targets[members[0]].shape, variant, len(members))
                for name, members in self.groups.items()
            }
        )
        first = FIRST_STEP if variant.has_statistics else FIRST_RAW_STEP
        self.log_steps = nn.Parameter(torch.full((len(self.targets),), first).log())
        signs = [-1] * len(self.targets) if signs is None else list(signs)
        if len(signs) != len(self.targets) or not set(signs) <= {-1, 1}:
            raise ValueError(f"signs are {signs}, not −1 or 1 for each of {len(self.targets)} targets")
        # Fixed by the checkpoint's card, as targets and variant are.
        self.register_buffer("signs", torch.tensor(signs, dtype=self.log_steps.dtype), persistent=False)

    @property
    def captured(self) -> tuple[Target, ...]:
        """The weights whose inputs and gradients are captured."""
        return self.targets

    @property
    def scalars(self) -> list[nn.Parameter]:
        """Parameters that are trained at a rate of their own."""
        return [self.log_steps]

    def forms(self, rows: Rows) -> list[Rows]:
        """The forms that an edit may have: one."""
        return [rows]

    def new_state(self, device: torch.device) -> SumState:
        """The state that this editor's edits add up in; with no edit yet."""
        return SumState(self.targets, device)

    def joined(self, edits: Sequence[Factors]) -> Rows:
        """What edits do together, as rows whose product is ΔW = deltaᵀ u: those of all of them; float64, on the CPU."""
        return stacked(self.targets, edits)

    @torch.no_grad()
    def update_statistics(self, capture: Capture) -> None:
        """Merge a training batch into the normalisers. Only training calls this."""
        for name, members in self.groups.items():
            self.networks[name].update_statistics(self._rows(capture.u, members), self._rows(capture.delta, members))

    def forward(self, capture: Capture) -> Proposal:
        """Rewrite each example's gradient into an edit that lowers its loss. See `Proposal` for shapes."""
        u: dict[int, Tensor] = {}
        delta: dict[int, Tensor] = {}
        for name, members in self.groups.items():
            counts = [len(capture.u[m]) for m in members]
            place = torch.arange(len(members), device=self.log_steps.device)
            layer = place.repeat_interleave(torch.tensor(counts, device=place.device), output_size=sum(counts))
            new_u, new_delta = self.networks[name](
                self._rows(capture.u, members), self._rows(capture.delta, members), layer
            )
            u.update(zip(members, new_u.split(counts), strict=True))
            delta.update(zip(members, new_delta.split(counts), strict=True))
        order = range(len(self.targets))
        return Proposal(
            u=tuple(u[m] for m in order),
            delta=tuple(self.signs[m] * self.log_steps[m].exp() * delta[m] for m in order),
            example=capture.example,
            edits=len(capture.loss),
        )

    def together(self, proposal: Proposal, size: int, targets: Sequence[Target]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What groups of `size` edits do together, for `views.edited` under the names of `targets`: their sums."""
        # Targets that see the same rows share one tensor, and go on doing so.
        group = {id(example): example // size for example in proposal.example}
        examples = tuple(group[id(example)] for example in proposal.example)
        return Proposal(proposal.u, proposal.delta, examples, proposal.edits // size).padded(targets)

    def _rows(self, captured: Sequence[Tensor], members: Sequence[int]) -> Tensor:
        """Rows of a group's targets, one after the other, in the editor's dtype."""
        return torch.cat([captured[m] for m in members]).to(self.log_steps.dtype)
