"""The exact state of edits that know of each other: least squares in whitened coordinates, after MALMEN.

Each row of an edit is a key κ, of unit norm, and a change v that the weight's output is wanted to make for it. With K
(rows, d_in) and V (rows, d_out) those of all active edits, and L the lower Cholesky factor of the covariance of
generic inputs,

    ΔWᵀ = n^−f L⁻ᵀ (KᵀK + λI)⁻¹ KᵀV

is the change that gives every key its own output as nearly as the ridge λ lets it, and moves other inputs least. The
more rows n there are, the more they disturb each other and everything else: by the fading f all become weaker together.
What accumulates are KᵀK and KᵀV, as integers: keys lie on a grid of 2^-15 and changes on one of 2^-17, so that
nothing is rounded at all. Below d_in rows the solve takes the rows themselves, in the order of their edits' digests
(`editors.ridge`, the dual form); from there on it takes the integers, and no longer grows with the edits.

Promised: integers and digest are equal for equal multisets of edits, everywhere. The weights are a function of the
multiset too, whatever was added and removed on the way; their bits are those of one software on one kind of machine,
where they do not depend on the process, its threads or its settings for them.

Source: Tan et al., "Massive Editing for Large Language Models via Meta Learning", ICLR 2024.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from editors.errors import CheckpointUnreadable, FactorsNotHeld, StateOverflow
from editors.factors import BITS, GRID_BITS, Factors, LayerFactors, digest, quantise_keyed
from editors.ridge import Ridge, reproducibly
from editors.state import CONTRIBUTION_BITS, Increment, Rows, check_fit, write_change
from editors.targets import Target

CHANGE_BITS = CONTRIBUTION_BITS - BITS
"""A row may want an output changed by less than 2^(40-32) = 256."""
DISTINCT = 0.05
"""Of a key's squared length: what it must have in a direction of its own to take that."""
FORESEEN = 100
"""Rows among which an edit is to take, even while there are fewer: it should still when they have come."""
MAX_ROWS = 2**22
"""So many rows stay below 2^62 in KᵀV, and below 2^53 in KᵀK."""
MIN_RIDGE = 1e-6
"""Far above the rounding of float64, so that even edits with one and the same key can be solved for."""
ROWS_PER_PRODUCT = 2**13
"""So many products of a key (15 bits) and a change (25 bits) are exact in float64, in whatever order they add up."""


@dataclass(frozen=True)
class Law:
    """How rows are joined in one weight. ridge: λ, at least MIN_RIDGE. fading: f, at least 0."""

    ridge: float
    fading: float = 0.0

    def strength(self, rows: int) -> float:
        """What every wanted change is multiplied with among so many rows."""
        return max(1, rows) ** -self.fading


class LeastSquaresState:
    """The rows of the active edits, with KᵀK and KᵀV as int64 per target. A `State`.

    targets: the edited weights. device: where the accumulators live and systems are solved.
    whitening: per target name L, lower triangular (d_in, d_in) float64.
    laws: per target name its `Law`.
    steady: names of targets whose wanted changes keep the size that they were trained to have: an edit's scale is that
    of its other changes. Where there are any, their keys are what tells one edit from another.
    Raises CheckpointUnreadable when either is missing or cannot be what it should be.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        whitening: Mapping[str, Tensor],
        laws: Mapping[str, Law],
        device: torch.device | str = "cpu",
        steady: Collection[str] = (),
    ) -> None:
        self.targets = {target.name: target for target in targets}
        self._steady = frozenset(steady)
        self.edits = 0
        self._device = torch.device(device)
        self._whitening, self._laws, self._metrics = {}, {}, {}
        self.grams: dict[str, Tensor] = {}
        """KᵀK, (d_in, d_in), in units of 2^-30."""
        self.products: dict[str, Tensor] = {}
        """KᵀV, (d_in, d_out), in units of 2^-32."""
        for name, target in sorted(self.targets.items()):
            law = _checked_law(target, laws.get(name))
            L = _checked_factor(target, whitening.get(name))
            self._whitening[name], self._laws[name] = L.to(self._device), law
            raw = L.cpu().numpy().astype("<f8", copy=False)
            metric = hashlib.sha256(raw).hexdigest()
            self._metrics[name] = f"ridge {law.ridge.hex()} fading {law.fading.hex()} whitening sha256:{metric}"
            self.grams[name] = torch.zeros(target.d_in, target.d_in, dtype=torch.int64, device=self._device)
            self.products[name] = torch.zeros(target.d_in, target.d_out, dtype=torch.int64, device=self._device)
        self._held: dict[str, list[Factors]] = {}
        """By the digest of their bytes; a list as long as that edit is active times."""
        self._rows: Counter[str] = Counter()
        self._solved: dict[str, Ridge] = {}
        self._normal: dict[str, tuple[Tensor, Tensor]] = {}
        self._fullness: float | None = None

    def quantise(self, rows: Rows, scale: float = 1.0) -> Factors:
        """Keys and wanted changes as they are stored, those of steady targets at scale 1. Raises StateOverflow."""
        steady = quantise_keyed({name: own for name, own in rows.items() if name in self._steady})
        scaled = quantise_keyed({name: own for name, own in rows.items() if name not in self._steady}, scale)
        return Factors(dict(sorted({**steady.layers, **scaled.layers}.items())))

    def add(self, *factors: Factors) -> None:
        """Take edits in. All or nothing: raises StateOverflow or FactorsCorrupt with the state unchanged."""
        digests = [digest(edit.to_bytes()) for edit in factors]
        self._accumulate(factors, 1)
        for key, edit in zip(digests, factors, strict=True):
            self._held.setdefault(key, []).append(edit)

    def remove(self, *factors: Factors) -> None:
        """Take edits out again, exactly. All or nothing: raises FactorsNotHeld with the state unchanged."""
        leaving = Counter(digest(edit.to_bytes()) for edit in factors)
        for key, copies in leaving.items():
            if copies > len(self._held.get(key, ())):
                raise FactorsNotHeld(f"the factors {key} are not active, or not {copies} times", factors_digest=key)
        self._accumulate(factors, -1)
        for key, copies in leaving.items():
            del self._held[key][-copies:]
            if not self._held[key]:
                del self._held[key]

    def _accumulate(self, factors: Sequence[Factors], sign: int) -> None:
        layers = self._layers(factors)
        rows = {name: sign * sum(layer.rows for layer in of_target) for name, of_target in layers.items()}
        for name, more in rows.items():
            if self._rows[name] + more > MAX_ROWS:
                raise StateOverflow(f"{name} cannot hold more than {MAX_ROWS} rows; roll some edits back", layer=name)
        changes = {name: self._products(name, of_target) for name, of_target in layers.items()}
        for name, (gram, product) in changes.items():
            self.grams[name].add_(gram, alpha=sign)
            self.products[name].add_(product, alpha=sign)
            self._rows[name] += rows[name]
        self.edits += sign * len(factors)
        self._solved.clear()
        self._normal.clear()
        self._fullness = None

    def _layers(self, factors: Iterable[Factors]) -> dict[str, list[LayerFactors]]:
        layers: dict[str, list[LayerFactors]] = {}
        for edit in factors:
            for name, layer in edit.layers.items():
                check_fit(self.targets.get(name), name, layer)
                layers.setdefault(name, []).append(layer)
        return layers

    def _products(self, name: str, layers: Sequence[LayerFactors]) -> tuple[Tensor, Tensor]:
        """KᵀK and KᵀV of some rows, exact."""
        keys, changes = self._stack(layers)
        if any(layer.exponent < -GRID_BITS for layer in layers):
            raise StateOverflow(
                f"the changes wanted of {name} are finer than the grid; they are not of a keyed edit", layer=name
            )
        if (changes.abs() >= 2.0**CHANGE_BITS).any():
            raise StateOverflow(
                f"this edit would change an output of {name} by {changes.abs().max() * 2.0 ** (BITS - GRID_BITS):.3g}, "
                f"more than the state can hold ({2.0 ** (CHANGE_BITS + BITS - GRID_BITS):g})",
                layer=name,
            )
        gram, product = torch.zeros_like(self.grams[name]), torch.zeros_like(self.products[name])
        for some, wanted in zip(keys.split(ROWS_PER_PRODUCT), changes.split(ROWS_PER_PRODUCT), strict=True):
            gram += (some.T @ some).to(torch.int64)
            product += (some.T @ wanted).to(torch.int64)
        return gram, product

    def _stack(self, layers: Sequence[LayerFactors]) -> tuple[Tensor, Tensor]:
        """All rows as whole numbers in float64: keys (rows, d_in) of 2^-15, changes (rows, d_out) of 2^-17."""
        counts = torch.tensor([layer.rows for layer in layers])
        units = torch.tensor([2.0 ** (layer.exponent + GRID_BITS) for layer in layers], dtype=torch.float64)
        keys = torch.cat([layer.u for layer in layers]).to(self._device).double()
        changes = torch.cat([layer.delta for layer in layers]).to(self._device).double()
        return keys, changes * units.repeat_interleave(counts).to(self._device)[:, None]

    @torch.no_grad()
    def write(self, base: nn.Module, view: nn.Module) -> None:
        """Set the edited weights of `view` to base + state, in the view's own dtype.

        Where a weight is not changed at all it keeps the base's own bits, the sign of a zero included.
        Raises StateOverflow, before any is written, when the keys are too alike to be solved for.
        """
        changes = {name: self._change(name) for name in self.targets}
        for name, target in self.targets.items():
            write_change(target, changes[name], 1.0, base, view)

    def _change(self, name: str) -> Tensor:
        """ΔW, (d_out, d_in) float64."""
        target = self.targets[name]
        if not self._rows[name]:
            return torch.zeros(target.d_out, target.d_in, dtype=torch.float64, device=self._device)
        return reproducibly(self._device, self._unwhiten, name, self._solution(name).solution).T

    @torch.no_grad()
    def rows(self) -> Rows:
        """What all edits do together, as rows whose product is ΔW = deltaᵀ u: (rows, d_in) and (rows, d_out), float64.

        As many as the edits have, or d_in where they have more.
        """
        return {name: self._joined(name) for name in self.targets}

    def _joined(self, name: str) -> tuple[Tensor, Tensor]:
        solved = self._solution(name)
        if solved.keys is None:  # ΔW itself
            eye = torch.eye(self.targets[name].d_in, dtype=torch.float64, device=self._device)
            return eye, self._unwhiten(name, solved.solution)
        return self._unwhiten(name, solved.keys.T).T, solved.weights

    def _unwhiten(self, name: str, rows: Tensor) -> Tensor:
        """L⁻ᵀ rows, for rows (d_in, n)."""
        return torch.linalg.solve_triangular(self._whitening[name].T, rows, upper=True)

    def _solution(self, name: str) -> Ridge:
        if name not in self._solved:
            law = self._laws[name]
            solved = reproducibly(self._device, self._solve, name, law.ridge)
            self._solved[name] = solved.times(law.strength(self._rows[name]))
        return self._solved[name]

    def _solve(self, name: str, ridge: float) -> Ridge:
        target = self.targets[name]
        if self._rows[name] >= target.d_in:
            gram = self.grams[name].double() * 2.0 ** (-2 * BITS)
            return Ridge.primal(gram, self.products[name].double() * 2.0**-GRID_BITS, ridge)
        # In one order, whatever the edits came in: a sum of floats depends on it.
        held = self._layers(edit for key in sorted(self._held) for edit in self._held[key]).get(name)
        if held is None:
            nothing = torch.zeros(0, target.d_in + target.d_out, dtype=torch.float64, device=self._device)
            return Ridge.dual(*nothing.split(target.shape, dim=1), ridge)
        keys, changes = self._stack(held)
        return Ridge.dual(keys * 2.0**-BITS, changes * 2.0 ** (BITS - GRID_BITS), ridge)

    def digest(self) -> str:
        """`sha256:…` of every accumulator and of what weighs it: name, shape, ridge and whitening."""
        sha = hashlib.sha256()
        for name, gram in self.grams.items():
            units = f"2^-{2 * BITS} 2^-{GRID_BITS}"
            sha.update(f"least_squares {name} {self.targets[name].shape} {units} {self._metrics[name]}\n".encode())
            for accumulator in (gram, self.products[name]):
                sha.update(accumulator.cpu().numpy().astype("<i8", copy=False))
        return f"sha256:{sha.hexdigest()}"

    @torch.no_grad()
    def increments(self, rows: Rows) -> list[Increment]:
        """What adding one more edit would change now and, if edits fade, what will be left of it among FORESEEN."""
        changes = [self.increment(rows)]
        if any(self._laws[name].fading and self._rows[name] < FORESEEN for name in self._steady):
            changes.append(self.increment(rows, FORESEEN))
        return changes

    @torch.no_grad()
    def increment(self, rows: Rows, among: int = 0) -> Increment:
        """What adding one more edit would change: with P = (KᵀK + λI)⁻¹ and its rows K', V', by Woodbury's identity

            u = (I + K'PK'ᵀ)⁻¹ K'P L⁻¹,  delta = n^−f V',  offset = −K' Lᵀ ΔWᵀ

        where n counts the new rows, and is `among` at least; how they weaken those before is left to whoever writes the
        weights. The changes of steady targets are part of the offset.
        rows: per target name, keys (rows, d_in) and changes (rows, d_out), as `quantise_keyed` takes them.
        """
        found = {name: self._increment(name, keys, changes, among) for name, (keys, changes) in rows.items()}
        for name in self._steady & set(found):
            u, delta, offset = found[name]
            found[name] = u, torch.zeros_like(delta), offset + delta
        return found

    def _increment(self, name: str, keys: Tensor, changes: Tensor, among: int) -> tuple[Tensor, Tensor, Tensor]:
        solved, K = self._solution(name), keys.to(self._device).double()
        strength = self._laws[name].strength(max(self._rows[name] + len(K), among))
        PKt = solved.invert(K.T)  # (d_in, rows)
        inner = torch.eye(len(K), dtype=K.dtype, device=K.device) + K @ PKt
        u = torch.linalg.solve(inner, self._unwhiten(name, PKt).T)
        return u.to(keys), strength * changes, (-K @ solved.solution).to(changes)

    def overlaps(self, rows: Rows) -> list[tuple[str, float]]:
        """The digest of every held edit with the largest |cosine| between a key of its and one of these rows, 0 to 1.

        Largest first; over the steady targets, or all where none is. An edit that is active twice is named once.
        """
        digests = sorted(self._held)
        best = torch.zeros(len(digests), dtype=torch.float64, device=self._device)
        for name in self._steady or rows:
            keys, _ = rows[name]
            held, owners = self._directions(name, digests)
            if len(held) and len(keys):
                cosines = (held @ normalize(keys.to(self._device).double()).T).abs().amax(1)  # (rows held,)
                best.scatter_reduce_(0, owners, cosines.clamp(max=1), "amax")
        return sorted(zip(digests, best.tolist(), strict=True), key=lambda pair: -pair[1])

    def _directions(self, name: str, digests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """All held keys of one target, of length 1, (rows, d_in), and the place of each one's edit in `digests`."""
        if name not in self._normal:
            layers = [self._held[key][0].layers.get(name) for key in digests]
            counts = torch.tensor([layer.rows if layer is not None else 0 for layer in layers], dtype=torch.int64)
            held = [layer for layer in layers if layer is not None]
            keys = normalize(self._stack(held)[0]) if held else torch.zeros(0, self.targets[name].d_in)
            self._normal[name] = keys, torch.arange(len(digests)).repeat_interleave(counts).to(self._device)
        return self._normal[name]

    def fullness(self) -> float:
        """The largest share of a weight's d_in directions that is taken: tr(KᵀK (KᵀK + εI)⁻¹) / d_in, 0 to 1.

        ε is DISTINCT, not λ: however much the edits are held back, there are no more directions for them.
        """
        if self._fullness is None:
            self._fullness = max(self._taken(name) / target.d_in for name, target in self.targets.items())
        return self._fullness

    def _taken(self, name: str) -> float:
        return reproducibly(self._device, self._solve, name, DISTINCT).degrees_of_freedom() if self._rows[name] else 0.0


def _checked_law(target: Target, law: Law | None) -> Law:
    """Raises CheckpointUnreadable."""
    if law is None or not MIN_RIDGE <= law.ridge < math.inf or not 0 <= law.fading < math.inf:
        raise CheckpointUnreadable(
            f"the checkpoint's edits are joined in {target.name} by {law}, but a ridge must be a number from "
            f"{MIN_RIDGE:g} on and a fading one from 0 on; fetch or train the checkpoint again"
        )
    return law


def _checked_factor(target: Target, L: Tensor | None) -> Tensor:
    """Raises CheckpointUnreadable."""
    if (
        L is None
        or L.shape != (target.d_in, target.d_in)
        or not L.isfinite().all()
        or L.triu(1).any()
        or not (L.diagonal() > 0).all()
    ):
        raise CheckpointUnreadable(
            f"the checkpoint's whitening of {target.name} is not a lower Cholesky factor of {target.d_in} rows; "
            "fetch or train the checkpoint again"
        )
    return L.detach().double().contiguous()
