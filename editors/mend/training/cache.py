"""Tensors that take long to compute and depend on little: kept in a folder from one run to the next."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from editors.mend.training.processes import ALONE, Processes


def cached(folder: Path | None, key: object, compute: Callable[[], Tensor], processes: Processes = ALONE) -> Tensor:
    """What `compute` gives, or what it gave under the same key in an earlier run.

    key: all that it depends on; its `repr` names the file. folder: where it is kept; without one it is not.
    processes: those that compute it together; the main one reads and writes, and the others are sent it.
    """
    if folder is None:
        return compute()
    file = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.pt"
    read: list[Tensor] = []

    def look() -> tuple[torch.Size, torch.dtype] | None:
        if not file.is_file():
            return None
        read.append(torch.load(file, weights_only=True))
        return read[0].shape, read[0].dtype

    found = processes.from_main(look)
    if found is not None:
        shape, dtype = found
        return processes.unite(read[0] if read else torch.zeros(shape, dtype=dtype))
    tensor = compute()
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        torch.save(tensor, draft)
        draft.replace(file)
    return tensor
