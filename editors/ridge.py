"""Ridge regression of wanted changes on keys, in float64: the same numbers in, the same bits out.

    solution = (KᵀK + λI)⁻¹ KᵀV       primal: a system of d_in equations, however many rows
             = Kᵀ (KKᵀ + λI)⁻¹ V      dual: a system of as many equations as there are rows

K (rows, d_in) are the keys, V (rows, d_out) the changes, λ the ridge. Both forms are one in exact arithmetic and
differ in the last bits of float64, so whoever needs equal bits must choose between them by the number of rows alone.

What also moves the last bits is how many threads share the work: a Cholesky decomposition is cut up among them. So
on a CPU `reproducibly` lets one single thread do it, whatever number the process allows for everything else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from editors.errors import StateOverflow

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ridge:
    """A regression that is solved. All tensors are float64.

    factor: lower Cholesky factor, of KKᵀ + λI where `keys` are given, of KᵀK + λI where not.
    solution: (d_in, d_out). keys: (rows, d_in), and weights: (rows, d_out), with solution = keysᵀ weights; in the dual
    form.
    """

    ridge: float
    factor: Tensor
    solution: Tensor
    keys: Tensor | None = None
    weights: Tensor | None = None

    @staticmethod
    def dual(keys: Tensor, changes: Tensor, ridge: float) -> Ridge:
        """keys: (rows, d_in). changes: (rows, d_out). Raises StateOverflow."""
        factor = _decompose(keys @ keys.T, ridge)
        weights = torch.cholesky_solve(changes, factor)
        return Ridge(ridge, factor, keys.T @ weights, keys, weights)

    @staticmethod
    def primal(gram: Tensor, products: Tensor, ridge: float) -> Ridge:
        """gram: KᵀK (d_in, d_in). products: KᵀV (d_in, d_out). Raises StateOverflow."""
        factor = _decompose(gram, ridge)
        return Ridge(ridge, factor, torch.cholesky_solve(products, factor))

    def times(self, strength: float) -> Ridge:
        """The regression of changes that are so many times as large."""
        weights = None if self.weights is None else strength * self.weights
        return replace(self, solution=strength * self.solution, weights=weights)

    def invert(self, right: Tensor) -> Tensor:
        """(KᵀK + λI)⁻¹ right, for right (d_in, n)."""
        if self.keys is None:
            return torch.cholesky_solve(right, self.factor)
        return (right - self.keys.T @ torch.cholesky_solve(self.keys @ right, self.factor)) / self.ridge

    def degrees_of_freedom(self) -> float:
        """tr(KᵀK (KᵀK + λI)⁻¹): how many directions the keys take, at most rows and at most d_in."""
        size = len(self.factor)
        inverse = torch.linalg.solve_triangular(self.factor, _eye(self.factor), upper=False)
        return max(0.0, size - self.ridge * inverse.square().sum().item())


def _decompose(gram: Tensor, ridge: float) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * _eye(gram))
    if failed:
        raise StateOverflow(
            f"the keys of so many edits are alike that they cannot be solved for (ridge {ridge:g}); roll some back",
            ridge=ridge,
        )
    return factor


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def reproducibly(device: torch.device, solve: Callable[..., Result], *arguments: object) -> Result:
    """Call `solve` where the number of threads cannot show in the result."""
    if device.type != "cpu":
        return solve(*arguments)
    return _single_thread().submit(solve, *arguments).result()


@functools.cache
def _single_thread() -> ThreadPoolExecutor:
    """A thread that computes alone, kept: torch sets the number of a single one together with that of all new ones."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "ridge", initializer=torch.set_num_threads, initargs=(1,))
    pool.submit(torch.get_num_threads).result()  # its first use of the number, by which the thread keeps it
    torch.set_num_threads(threads)
    return pool
