"""The exact state: what all active edits together do to the weights, as integers.

Each edit contributes, per weight, integers on a fixed grid of 2^-32: its product of 16-bit factors, formed exactly
in float64 (every partial sum is an integer below 2^53) and rounded once to the grid. A contribution depends on the
edit alone, and integers add up the same in any order and cancel exactly, so the state is a function of the set of
active edits, on every device, and taking one out costs the same however many are active.

`State` is what every way of adding up can do. `SumState` adds up by `sum`: ΔW = Σ of the edits' own ΔW, the original
MEND. `editors.least_squares` holds the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from editors.errors import FactorsCorrupt, StateOverflow
from editors.factors import GRID_BITS, Factors, LayerFactors, quantise
from editors.targets import Target

CONTRIBUTION_BITS = 40
"""One edit may change a weight by less than 2^(40-32) = 256."""
MAX_EDITS = 2**22
"""So many contributions of that size stay below 2^62: no subset of active edits can overflow an int64."""
ROWS_PER_PASS = 4096

Rows = Mapping[str, tuple[Tensor, Tensor]]
"""An edit before it is quantised. Per target name: u (rows, d_in) and delta (rows, d_out), float."""
Increment = Mapping[str, tuple[Tensor, Tensor, Tensor]]
"""What one more edit, at scale s, does to the weights: ΔW changes by (s·delta + offset)ᵀ u.

Per target name: u (rows, d_in), delta and offset (rows, d_out).
"""


class State(Protocol):
    """The active edits, a multiset, and the weights that they make together. For one thread at a time.

    targets: the edited weights by name. edits: how many are active.
    """

    targets: Mapping[str, Target]
    edits: int

    def quantise(self, rows: Rows, scale: float = 1.0) -> Factors:
        """An edit as it is stored and added, at a scale. Raises StateOverflow."""

    def add(self, *factors: Factors) -> None:
        """Take edits in. All or nothing: raises StateOverflow or FactorsCorrupt with the state unchanged."""

    def remove(self, *factors: Factors) -> None:
        """Take edits out again, exactly. All or nothing; they must be in."""

    def write(self, base: nn.Module, view: nn.Module) -> None:
        """Set the edited weights of `view` to base + state, in the view's own dtype.

        Where a weight is not changed at all it keeps the base's own bits, the sign of a zero included.
        """

    def digest(self) -> str:
        """`sha256:…` of the exact state: equal for equal multisets of edits, everywhere."""

    def increments(self, rows: Rows) -> list[Increment]:
        """What adding one more edit would change, as rows, so that many scales can be tried in one batch.

        More than one where that will not stay as it is: an edit is to take under all of them.
        """

    def overlaps(self, rows: Rows) -> list[tuple[str, float]]:
        """The digests of held factors with how much of their keys these rows take, 0 to 1, largest first."""

    def fullness(self) -> float | None:
        """How much of what the fullest weight can hold is taken, 0 to 1; None where there is no such measure."""


class SumState:
    """Accumulators of the active edits, int64 (d_out, d_in) per target. A `State`.

    targets: the edited weights. device: where the accumulators live.
    """

    def __init__(self, targets: Sequence[Target], device: torch.device | str = "cpu") -> None:
        self.targets = {target.name: target for target in targets}
        self.accumulators = {
            name: torch.zeros(target.d_out, target.d_in, dtype=torch.int64, device=device)
            for name, target in sorted(self.targets.items())
        }
        self.edits = 0

    def quantise(self, rows: Rows, scale: float = 1.0) -> Factors:
        """u and delta as they are stored, `scale` times as strong. Raises StateOverflow."""
        return quantise(rows, scale)

    def add(self, *factors: Factors) -> None:
        """Take edits in. All or nothing: raises StateOverflow or FactorsCorrupt with the state unchanged."""
        if self.edits + len(factors) > MAX_EDITS:
            raise StateOverflow(
                f"{self.edits} edits are active, and {len(factors)} more would be above {MAX_EDITS}; roll some back",
                active_edits=self.edits,
            )
        self._accumulate(factors, 1)

    def remove(self, *factors: Factors) -> None:
        """Take edits out again, exactly; each must be one that was added."""
        self._accumulate(factors, -1)

    def _accumulate(self, factors: Sequence[Factors], sign: int) -> None:
        changes: dict[str, Tensor] = {}
        for edit in factors:
            for name, layer in edit.layers.items():
                contribution = self._contribution(name, layer)
                changes[name] = changes[name].add_(contribution) if name in changes else contribution
        for name, change in changes.items():
            self.accumulators[name].add_(change, alpha=sign)
        self.edits += sign * len(factors)

    def _contribution(self, name: str, layer: LayerFactors) -> Tensor:
        check_fit(self.targets.get(name), name, layer)
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

    def write(self, base: nn.Module, view: nn.Module) -> None:
        """Set the edited weights of `view` to base + state, in the view's own dtype.

        Where a weight is not changed at all it keeps the base's own bits, the sign of a zero included.
        """
        for name, target in self.targets.items():
            write_change(target, self.accumulators[name], 2.0**-GRID_BITS, base, view)

    def digest(self) -> str:
        """`sha256:…` of every accumulator, with its name and shape: equal for equal sets of edits, everywhere."""
        sha = hashlib.sha256()
        for name, accumulator in self.accumulators.items():
            sha.update(f"{name} {tuple(accumulator.shape)} 2^-{GRID_BITS}\n".encode())
            sha.update(accumulator.cpu().numpy().astype("<i8", copy=False))
        return f"sha256:{sha.hexdigest()}"

    def increments(self, rows: Rows) -> list[Increment]:
        """The rows themselves: edits that add up do not feel each other."""
        return [standalone(rows)]

    def overlaps(self, rows: Rows) -> list[tuple[str, float]]:
        """None: single edits leave no trace in their sum."""
        return []

    def fullness(self) -> None:
        """None: a sum is never full."""


def standalone(rows: Rows) -> Increment:
    """What an edit changes where no other is active, or where edits add up: its own product."""
    return {name: (u, delta, torch.zeros_like(delta)) for name, (u, delta) in rows.items()}


def stacked(targets: Iterable[Target], edits: Sequence[Factors]) -> Rows:
    """The rows of all edits, one after the other: what they do where edits add up.

    In float64, which holds decoded factors exactly; on the CPU.
    """
    return {target.name: _stack(target, edits) for target in targets}


def _stack(target: Target, edits: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    layers = [factors.layers[target.name] for factors in edits if target.name in factors.layers]
    u = [layer.u.double() for layer in layers]
    delta = [layer.delta.double() * 2.0**layer.exponent for layer in layers]
    none = torch.empty(0, dtype=torch.float64)
    return torch.cat([none.reshape(0, target.d_in), *u]), torch.cat([none.reshape(0, target.d_out), *delta])


def check_fit(target: Target | None, name: str, layer: LayerFactors) -> None:
    """Raises FactorsCorrupt unless `layer` is of this target."""
    if target is None or (layer.u.shape[-1], layer.delta.shape[-1]) != target.shape:
        raise FactorsCorrupt(f"the factors of {name} do not fit this model", layer=name)


@torch.no_grad()
def write_change(target: Target, change: Tensor, unit: float, base: nn.Module, view: nn.Module) -> None:
    """Set one weight of `view` to base + unit · change, and to the base's own bits where the change is 0.

    change: (d_out, d_in), int64 or float64.
    """
    # Both are oriented to (d_out, d_in); writing through the transposed view writes the parameter itself.
    source = target.oriented(base.get_parameter(target.name))
    destination = target.oriented(view.get_parameter(target.name))
    for rows in torch.arange(target.d_out).split(ROWS_PER_PASS):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        moved = source[part].double() + change[part].double() * unit
        destination[part].copy_(torch.where(change[part] == 0, source[part], moved.to(source.dtype)))
