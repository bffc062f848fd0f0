"""What a plan promises, measured: the same walks with random weights, on a real device.

Memory is what tensors occupy: on a GPU what torch has allocated, on a CPU the growth of the process, sampled by a
thread. What an allocator keeps for the next tensor is not counted on either.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from editors.errors import BaseModelUnreadable
from editors.planning.machine import finish
from editors.planning.plan import TRAINING
from editors.planning.shapes import TINY, Shape
from editors.planning.walk import EditWalk, TrainingWalk, Workload
from editors.targets import resolve_targets

SAMPLED_EVERY_S = 0.001


@dataclass(frozen=True)
class Measured:
    """seconds, peak_bytes: of each lap of a plan, by its name; the median of several rounds, and of one round.

    serving_bytes, training_bytes: held between edits, and between training steps. factors_bytes: of one edit.
    """

    seconds: dict[str, float]
    peak_bytes: dict[str, int]
    serving_bytes: int
    training_bytes: int
    factors_bytes: int


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    work: Workload,
    patterns: Sequence[str] | None = None,
    rounds: int = 5,
) -> Measured:
    """Build the model with random weights, and run edits and training steps.

    Raises BaseModelUnreadable when its logits are not finite, since nothing measured then would mean anything.
    """
    _run_once(TINY, dtype, device)  # so that code and libraries are loaded, which is no part of what is measured
    memory = _Memory(device)
    seconds: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, int] = {}

    def time_lap(name: str, step: Callable[[], None]) -> None:
        finish(device)
        start = time.perf_counter()
        step()
        finish(device)
        seconds[name].append(time.perf_counter() - start)

    def weigh_lap(name: str, step: Callable[[], None]) -> None:
        with memory.peak() as peak:
            step()
            finish(device)
        peaks[name] = peak()

    model = shape.build(dtype, device)
    targets = resolve_targets(model, patterns)
    edit = EditWalk(model, targets, work)
    if not edit.forward().isfinite().all():
        raise BaseModelUnreadable(
            f"with random weights in {dtype} the logits of {shape.name} are not finite; try another --dtype",
            file=shape.name,
        )
    for number in range(rounds + 1):
        for name, step in edit.steps.items():
            (time_lap if number else weigh_lap)(name, step)
        factors_bytes = len(edit.factors.to_bytes())
        edit.take_back()
    serving_bytes = memory.held()
    del edit, step
    training = TrainingWalk(model, targets, work)
    training.step()  # as the plan does: its first step holds less than those that follow
    weigh_lap(TRAINING, training.step)
    for _ in range(rounds):
        time_lap(TRAINING, training.step)
    medians = {name: statistics.median(laps) for name, laps in seconds.items()}
    return Measured(medians, peaks, serving_bytes, memory.held(), factors_bytes)


def _run_once(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    model = shape.build(dtype, device)
    targets = resolve_targets(model)
    edit = EditWalk(model, targets, Workload(rank=8, batch=2))
    for step in edit.steps.values():
        step()
    TrainingWalk(model, targets, Workload(rank=8, batch=2)).step()


class _Memory:
    """Bytes in use beyond those at its making."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._before = 0
        self._before = self.held()

    def held(self) -> int:
        """Bytes in use now, garbage aside."""
        gc.collect()  # views are rings of modules and their hooks
        _return_free_memory(self._device)
        return self._now()

    @contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Yields what to ask, afterwards, for the most bytes that were in use inside."""
        highest = self.held()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield lambda: torch.cuda.max_memory_allocated(self._device) - self._before
            return
        ended = threading.Event()

        def sample() -> None:
            nonlocal highest
            while not ended.wait(SAMPLED_EVERY_S):
                highest = max(highest, self._now())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield lambda: highest
        finally:
            ended.set()
            thread.join()
            highest = max(highest, self._now())

    def _now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._before
        return self._process.memory_info().rss - self._before


def free_bytes(device: torch.device) -> int:
    """What a device has left."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _return_free_memory(device: torch.device) -> None:
    """Give back what allocators keep for the next tensor. Of C libraries only glibc can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
