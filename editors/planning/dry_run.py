"""Run real code on tensors without data, and count what it would cost.

On the meta device a tensor has a shape and a dtype but no memory. `DryRun` lets any code run on such tensors, counts
the arithmetic and the memory traffic of every operation, and follows how many bytes are alive at once.

Code that looks at its data is told what is true of the data that is planned for: sequences of one length and rows
that all carry a gradient, so every mask is full and every check passes.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

GATHERING = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Of their first argument they read only what they return."""
RESERVING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
"""They touch no memory."""
FILLING = {aten.new_zeros, aten.new_full, aten.zeros_like, aten.ones_like, aten.full_like, aten.zero_, aten.fill_}
"""Of their first argument they take the shape alone."""


@dataclass
class Cost:
    """What was run.

    operations: how often each (dtype, floating point operations, bytes read and written) was.
    quantised_values, digested_bytes: work of the host, which is not made of tensor operations.
    held_bytes, peak_bytes: alive before, and the most that was alive at once, everything that was held included.
    """

    operations: Counter[tuple[torch.dtype, int, int]] = field(default_factory=Counter)
    quantised_values: int = 0
    digested_bytes: int = 0
    held_bytes: int = 0
    peak_bytes: int = 0

    @property
    def flops(self) -> int:
        return sum(flops * count for (_, flops, _), count in self.operations.items())

    @property
    def moved_bytes(self) -> int:
        return sum(moved * count for (_, _, moved), count in self.operations.items())


class DryRun(TorchDispatchMode):
    """While it is active, operations on meta tensors are counted. `live_bytes`: of all that were made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self._cost = Cost()
        self._alive: dict[int, weakref.ref] = {}

    @contextmanager
    def count(self) -> Iterator[Cost]:
        """The cost of what runs inside."""
        self._cost = cost = Cost(held_bytes=self.live_bytes, peak_bytes=self.live_bytes)
        try:
            yield cost
        finally:
            self._cost = Cost()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = _answer(operation, args, kwargs)
        inputs, outputs = _meta_tensors((args, kwargs)), _meta_tensors(result)
        for tensor in outputs:
            self._follow(tensor)
        if (inputs or outputs) and not _is_view(operation, inputs, outputs):
            count = flop_registry.get(operation.overloadpacket, lambda *_, **__: 0)
            flops = count(*args, **kwargs, out_val=result)
            self._cost.operations[(inputs or outputs)[0].dtype, flops, _moved(operation, inputs, outputs)] += 1
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.live_bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.live_bytes += size
        self._cost.peak_bytes = max(self._cost.peak_bytes, self.live_bytes)


def _meta_tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_meta]


def _is_view(operation: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Nothing is computed where what comes out is what went in."""
    memory = {tensor.untyped_storage()._cdata for tensor in inputs}
    return not operation._schema.is_mutable and all(out.untyped_storage()._cdata in memory for out in outputs)


def _moved(operation: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes."""
    written = sum(map(_size, outputs))
    packet = operation.overloadpacket
    if packet in RESERVING:
        return 0
    if packet in FILLING:
        return written
    if packet is aten.copy_:
        return written + sum(map(_size, inputs[1:]))
    if packet in GATHERING:
        return written + sum(map(_size, inputs[1:])) + written
    return written + sum(map(_size, inputs))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor's different values: an expanded one repeats them."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size for size, stride in steps if stride)


def _answer(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation, or say what it says of full data."""
    asked = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
    if asked is not None and operation in _ABOUT_DATA:
        return _ABOUT_DATA[operation](*args, **kwargs)
    return operation(*args, **kwargs)


def _to_copy(tensor: Tensor, **kwargs: Any) -> Tensor:
    if kwargs.get("device") == torch.device("cpu"):
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
    return aten._to_copy.default(tensor, **kwargs)


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    full = [
        torch.ones(index.shape, dtype=torch.bool) if index is not None and index.dtype == torch.bool else index
        for index in indices
    ]
    return aten.index.Tensor(tensor, full)


_ABOUT_DATA: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda tensor: tensor.dtype == torch.bool or 1,
    aten.equal.default: lambda one, other: True,
    aten.nonzero.default: lambda mask: torch.ones(mask.shape, dtype=torch.bool).nonzero(),
    aten.bincount.default: lambda tensor, weights=None, minlength=0: tensor.new_empty(minlength),
    aten.index.Tensor: _index,
    aten._to_copy.default: _to_copy,
}
"""Operations whose result depends on the data, not on the shape alone."""
