"""What a plan promises, measured: the same walks with random weights, on a real device.

Memory is what tensors occupy: on a GPU what torch has allocated, on a CPU the growth of the process, sampled by a
thread. What an allocator keeps for the next tensor is not counted on either.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import torch

from editors.errors import BaseModelUnreadable
from editors.planning.machine import finish
from editors.planning.plan import TRAINING
from editors.planning.shapes import TINY, Shape
from editors.planning.walk import FORWARD, EditWalk, TrainingWalk, Workload, read
from editors.targets import resolve_targets

SAMPLED_EVERY_S = 0.001


@dataclass(frozen=True)
class Measured:
    """Of the laps of a plan, by their names.

    seconds: median of several rounds. forward_passes: median of what a lap took over what a forward pass took in the
    same round, which is to be trusted more where a machine has other things to do. peak_bytes: of one round.
    serving_bytes, training_bytes: held between edits, and between training steps. factors_bytes: of one edit.
    """

    seconds: dict[str, float]
    forward_passes: dict[str, float]
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
    model = shape.build(dtype, device)
    targets = resolve_targets(model, patterns)
    edit = EditWalk(model, targets, work)
    tokens = edit.tokens
    if not edit.forward().isfinite().all():
        raise BaseModelUnreadable(
            f"with random weights in {dtype} the logits of {shape.name} are not finite; try another --dtype",
            file=shape.name,
        )
    peaks = {name: memory.peak_of(step) for name, step in edit.steps.items()}
    factors_bytes = len(edit.factors.to_bytes())
    edit.take_back()
    serving_bytes = memory.held()
    edits = []
    for _ in range(rounds):
        edits.append({name: _time(step, device) for name, step in edit.steps.items()})
        edit.take_back()
    del edit
    training = TrainingWalk(model, targets, work)
    training.step()  # as the plan does: its first step holds less than those that follow
    peaks[TRAINING] = memory.peak_of(training.step)
    pair = {FORWARD: lambda: read(model, tokens), TRAINING: training.step}
    steps = [{name: _time(step, device) for name, step in pair.items()} for _ in range(rounds)]
    laps = {**dict.fromkeys(edits[0], edits), TRAINING: steps}
    return Measured(
        seconds={name: median(lap[name] for lap in taken) for name, taken in laps.items()},
        forward_passes={name: median(lap[name] / lap[FORWARD] for lap in taken) for name, taken in laps.items()},
        peak_bytes=peaks,
        serving_bytes=serving_bytes,
        training_bytes=memory.held(),
        factors_bytes=factors_bytes,
    )


def _time(step: Callable[[], object], device: torch.device) -> float:
    finish(device)
    start = time.perf_counter()
    step()
    finish(device)
    return time.perf_counter() - start


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

    def peak_of(self, step: Callable[[], object]) -> int:
        """The most bytes that are in use while a step runs."""
        highest = self.held()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            step()
            return torch.cuda.max_memory_allocated(self._device) - self._before
        ended = threading.Event()

        def sample() -> None:
            nonlocal highest
            while not ended.wait(SAMPLED_EVERY_S):
                highest = max(highest, self._now())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            step()
        finally:
            ended.set()
            thread.join()
        return max(highest, self._now())

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
