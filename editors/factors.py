"""One edit as stored and as applied: low-rank factors in 16-bit integers with power-of-two scales.

ΔW = 2^exponent · deltaᵀ u, of shape (d_out, d_in). Quantisation happens once, before anything is judged; from then
on these integers are the edit. `quantise` scales each row of u to fill 16 bits and moves its scale into delta, so that
a token with large inputs does not cost the others their precision. `quantise_keyed` leaves every row its scale: its u
are keys of unit norm, with a meaning of their own beside the product.

Bytes: a safetensors file with three tensors per layer, `<name>:u` (rows, d_in) int16, `<name>:delta` (rows, d_out)
int16 and `<name>:exponent` () int64.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from editors.errors import FactorsCorrupt, StateOverflow

BITS = 15
"""Magnitude bits of a quantised factor."""
LIMIT = 2**BITS - 1
MAX_EXPONENT = 512
"""More than any product of two float32 numbers needs."""
GRID_BITS = 32
"""The grid on which edits add up (`editors.state`) is 2^-32; a keyed edit's own products lie on it already."""


@dataclass(frozen=True)
class LayerFactors:
    """u (rows, d_in) int16, delta (rows, d_out) int16, and the exponent of their common scale."""

    u: Tensor
    delta: Tensor
    exponent: int

    @property
    def rows(self) -> int:
        return len(self.u)

    def decode(self) -> tuple[Tensor, Tensor]:
        """(u, delta) in float32, whose product deltaᵀ u is ΔW up to float32 rounding."""
        return self.u.float(), (self.delta.double() * 2.0**self.exponent).float()


@dataclass(frozen=True)
class Factors:
    """The factors of one edit, per target name, on the CPU."""

    layers: Mapping[str, LayerFactors]

    def to_bytes(self) -> bytes:
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}:u"] = layer.u.contiguous()
            tensors[f"{name}:delta"] = layer.delta.contiguous()
            tensors[f"{name}:exponent"] = torch.tensor(layer.exponent)
        return save(tensors)

    @staticmethod
    def from_bytes(raw: bytes) -> Factors:
        """Raises FactorsCorrupt when the bytes are not factors."""
        try:
            tensors = load(raw)
            names = [name.removesuffix(":u") for name in tensors if name.endswith(":u")]
            layers = {
                name: LayerFactors(
                    tensors[f"{name}:u"], tensors[f"{name}:delta"], int(tensors[f"{name}:exponent"].item())
                )
                for name in sorted(names)
            }
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise FactorsCorrupt(f"these bytes are not factors ({error})") from error
        for name, layer in layers.items():
            if abs(layer.exponent) > MAX_EXPONENT:
                raise FactorsCorrupt(f"the factors of {name} have an impossible scale", layer=name)
            matrices = layer.u.dim() == layer.delta.dim() == 2 and layer.rows == len(layer.delta)
            if not matrices or layer.u.dtype != torch.int16 or layer.delta.dtype != torch.int16:
                raise FactorsCorrupt(f"the factors of {name} have the wrong type or shape", layer=name)
        return Factors(layers)


def digest(raw: bytes) -> str:
    """`sha256:…` of the bytes of factors."""
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def quantise(rows: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> Factors:
    """Round an edit to 16 bits.

    rows: per target name, u (rows, d_in) and delta (rows, d_out), float; ΔW = scale · deltaᵀ u.
    Rows in which either is zero are dropped. Raises StateOverflow on NaN or infinity.
    """
    return Factors({name: _quantise(name, u, delta, scale) for name, (u, delta) in sorted(rows.items())})


def quantise_keyed(rows: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0) -> Factors:
    """Round an edit of keys and wanted changes to 16 bits: its keys to 2^-15, its changes to 2^-17 or coarser.

    rows: per target name, keys (rows, d_in) of unit norm and changes (rows, d_out), float; the changes are scaled.
    Rows without a key are dropped; one without a change is kept: what it reads is to stay as it is.
    Raises StateOverflow on NaN, infinity, or a key beyond unit norm.
    """
    return Factors({name: _quantise(name, u, delta, scale, keyed=True) for name, (u, delta) in sorted(rows.items())})


def _quantise(name: str, u: Tensor, delta: Tensor, scale: float, *, keyed: bool = False) -> LayerFactors:
    # In numpy, whose frexp and ldexp are exact; torch computes ldexp through a float32 power.
    u = u.detach().cpu().double().numpy()
    delta = delta.detach().cpu().double().numpy() * scale
    if not (np.isfinite(u).all() and np.isfinite(delta).all()):
        raise StateOverflow(f"the edit proposed for {name} is not finite", layer=name)
    kept = u.any(-1) & (keyed | delta.any(-1))
    u, delta = u[kept], delta[kept]
    if not len(u):
        return LayerFactors(_int16(u), _int16(delta), 0)
    if keyed and (longest := np.linalg.norm(u, axis=-1).max()) > 1 + 2.0**-BITS:
        raise StateOverflow(f"a key proposed for {name} has norm {longest:.3g}; keys have unit norm", layer=name)
    row_exponent = 0 if keyed else np.frexp(np.abs(u).max(-1, keepdims=True))[1]  # (rows, 1): |u| < 2^e
    u = np.ldexp(u, BITS - row_exponent)
    delta = np.ldexp(delta, row_exponent)
    exponent = int(np.frexp(np.abs(delta).max())[1])
    if keyed:
        exponent = max(exponent, 2 * BITS - GRID_BITS)
    return LayerFactors(_int16(u), _int16(np.ldexp(delta, BITS - exponent)), exponent - 2 * BITS)


def _int16(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.rint(rows).clip(-LIMIT, LIMIT).astype(np.int16))
