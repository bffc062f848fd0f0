"""The exact state: what all active edits together do to the weights, as integers.

Each edit contributes, per weight, integers on a fixed grid of 2^-32: its product of 16-bit factors, formed exactly
in float64 (every partial sum is an integer below 2^53) and rounded once to the grid. A contribution depends on the
edit alone, and integers add up the same in any order and cancel exactly, so the state is a function of the set of
active edits, on every device, and taking one out costs the same however many are active.

`SumState` adds up by `sum`: ΔW = Σ of the edits' own ΔW, the original MEND.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from editors.errors import FactorsCorrupt, StateOverflow
from editors.factors import Factors, LayerFactors
from editors.targets import Target

GRID_BITS = 32
"""The grid of accumulated weight changes is 2^-32."""
CONTRIBUTION_BITS = 40
"""One edit may change a weight by less than 2^(40-32) = 256."""
MAX_EDITS = 2**22
"""So many contributions of that size stay below 2^62: no subset of active edits can overflow an int64."""
ROWS_PER_PASS = 4096


class SumState:
    """Accumulators of the active edits, int64 (d_out, d_in) per target.

    targets: the edited weights. device: where the accumulators live.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device | str = "cpu") -> None:
        self.targets = {target.name: target for target in targets}
        self.accumulators = {
            name: torch.zeros(target.d_out, target.d_in, dtype=torch.int64, device=device)
            for name, target in sorted(self.targets.items())
        }
        self.edits = 0

    def add(self, *edits: Factors) -> None:
        """Take edits in. All or nothing: raises StateOverflow or FactorsCorrupt with the state unchanged."""
        if self.edits + len(edits) > MAX_EDITS:
            raise StateOverflow(f"{MAX_EDITS} edits may be active at most; roll some back", active_edits=self.edits)
        added = 0
        try:
            for factors in edits:
                self._accumulate(factors, 1)
                added += 1
        except BaseException:
            self.remove(*edits[:added])
            raise

    def remove(self, *edits: Factors) -> None:
        """Take edits out again, exactly; each must be one that was added."""
        for factors in edits:
            self._accumulate(factors, -1)

    def overlaps(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[str, float, float]]:
        """Held edits whose keys are near to those of `rows`: none, since edits that are summed have no keys."""
        return []

    def fullness(self) -> float | None:
        """How much of the state's capacity is taken, 0 to 1: not known of a sum, which has no such figure."""
        return None

    def _accumulate(self, factors: Factors, sign: int) -> None:
        contributions = {name: self._contribution(name, layer) for name, layer in factors.layers.items()}
        for name, contribution in contributions.items():
            self.accumulators[name].add_(contribution, alpha=sign)
        self.edits += sign

    def _contribution(self, name: str, layer: LayerFactors) -> Tensor:
        target = self.targets.get(name)
        if target is None or (layer.u.shape[-1], layer.delta.shape[-1]) != target.shape:
            raise FactorsCorrupt(f"the factors of {name} do not fit this model", layer=name)
        device = self.accumulators[name].device
        product = layer.delta.to(device).double().T @ layer.u.to(device).double()  # (d_out, d_in), exact
        on_grid = (product * 2.0 ** (layer.exponent + GRID_BITS)).round_()
        if not on_grid.abs().max() < 2.0**CONTRIBUTION_BITS:
            raise StateOverflow(
                f"this edit would change {name} by {on_grid.abs().max().item() * 2.0**-GRID_BITS:.3g}, "
                f"more than the state can hold ({2.0 ** (CONTRIBUTION_BITS - GRID_BITS):g})",
                layer=name,
            )
        return on_grid.to(torch.int64)

    @torch.no_grad()
    def write(self, base: nn.Module, view: nn.Module) -> None:
        """Set the edited weights of `view` to base + state, in the view's own dtype.

        Where a weight is not changed at all it keeps the base's own bits, the sign of a zero included.
        """
        for name, target in self.targets.items():
            # Both are oriented to (d_out, d_in); writing through the transposed view writes the parameter itself.
            source = target.oriented(base.get_parameter(name))
            destination = target.oriented(view.get_parameter(name))
            for rows in torch.arange(target.d_out).split(ROWS_PER_PASS):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                change = self.accumulators[name][part]
                moved = source[part].double() + change.double() * 2.0**-GRID_BITS
                destination[part].copy_(torch.where(change == 0, source[part], moved.to(source.dtype)))

    def digest(self) -> str:
        """`sha256:…` of every accumulator, with its name and shape: equal for equal sets of edits, everywhere."""
        sha = hashlib.sha256()
        for name, accumulator in self.accumulators.items():
            sha.update(f"{name} {tuple(accumulator.shape)} 2^-{GRID_BITS}\n".encode())
            sha.update(accumulator.cpu().numpy().astype("<i8", copy=False))
        return f"sha256:{sha.hexdigest()}"
