"""What several processes that train one editor do together.

Started by `torchrun` or `accelerate launch`, each process holds the whole editor and works on its own share; what is
drawn, merged and decided is the same on all of them. A process alone is the same thing with nobody to talk to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from editors.errors import TrainingError

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, who wait while the first one samples or validates."""
PIECE_BYTES = 2**26
"""What is sent at a time, so that texts kept in main memory never fill an accelerator's."""


class Processes:
    """rank: this process' place among `count`. device: where its share is computed."""

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        self.rank, self.count, self.device = rank, count, device

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meet the processes that were started together, if there are several.

        device: `cpu`, or an accelerator, of which each process of a machine gets its own.
        """
        from accelerate import PartialState  # for its set-up alone, from whatever environment a launcher leaves

        state = PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)
        several = state.num_processes > 1 and torch.device(device).type != "cpu"
        return cls(state.process_index, state.num_processes, str(state.device) if several else device)

    def leave(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this process' own."""
        return range(self.rank, count, self.count)

    def from_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, on every process.

        Raises what it raises there, and on the others TrainingError with the same words.
        """
        if self.count == 1:
            return compute()
        if self.is_main:
            try:
                message = [(compute(), None)]
            except Exception as error:
                distributed.broadcast_object_list([(None, str(error))])
                raise
            distributed.broadcast_object_list(message)
        else:
            message = [None]
            distributed.broadcast_object_list(message)
        result, failure = message[0]
        if failure is not None:
            raise TrainingError(failure)
        return result

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(self.device)
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def unite(self, shared: Tensor) -> Tensor:
        """Fill in what the others computed of a tensor that is zero but for one's own share. Its bits are kept."""
        if self.count > 1:
            for piece in shared.view(-1).view(torch.uint8).split(PIECE_BYTES):
                sent = piece.to(self.device)
                distributed.all_reduce(sent)  # of bytes, of which all but one are zero
                piece.copy_(sent)
        return shared


ALONE = Processes()
