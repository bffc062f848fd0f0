"""How fast a machine is, and how long a counted cost would take on it.

A roofline: an operation costs its arithmetic, its memory traffic, and the start of it. A GPU does the three at the
same time, so that the longest counts; a CPU core does one after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from editors.factors import quantise
from editors.planning.dry_run import Cost, DryRun
from editors.planning.shapes import TINY
from editors.state import SumState
from editors.targets import Target

LONG_ENOUGH_S = 0.02
LARGEST = 8192
SAMPLE_BYTES, COPIES = 2**28, 4
SIDE = 2**12
"""Of a sample weight: as wide as one of a large model."""


@dataclass(frozen=True)
class Machine:
    """flops: per second, of a large matrix product in each dtype. bandwidth: bytes read and written per second.

    launch_s: what an operation on next to nothing takes. overlaps: whether an operation's three costs fall together.
    digested, quantised: bytes and values per second, of what the host does to the state and to an edit's rows.
    """

    flops: Mapping[torch.dtype, float]
    bandwidth: float
    launch_s: float
    overlaps: bool
    digested: float
    quantised: float

    def seconds(self, cost: Cost) -> float:
        """How long a cost would take."""
        together = max if self.overlaps else sum
        operations = sum(
            count * together((flops / self.flops.get(dtype, torch.inf), moved / self.bandwidth, self.launch_s))
            for (dtype, flops, moved), count in cost.operations.items()
        )
        return operations + cost.digested_bytes / self.digested + cost.quantised_values / self.quantised


@torch.no_grad()
def measure_machine(
    device: torch.device, dtype: torch.dtype, flops: float | None = None, bandwidth: float | None = None
) -> Machine:
    """Time what the model's work is made of, in a second or two.

    flops, bandwidth: taken as they are where they are given, flops for every dtype.
    """
    # The editor computes in float32, the state in float64.
    dtypes = dict.fromkeys((dtype, torch.float32, torch.float64))
    state = SumState([Target("sample", SIDE, SIDE, transposed=False)], device)
    rows = {"sample": (torch.randn(16, SIDE), torch.randn(16, SIDE))}
    return Machine(
        flops={each: flops or _matmul_rate(device, each) for each in dtypes},
        bandwidth=bandwidth or _copy_rate(device),
        launch_s=_launch_time(device, dtype),
        overlaps=device.type == "cuda" or None not in (flops, bandwidth),
        digested=8 * SIDE * SIDE / clock(state.digest, device),
        quantised=2 * 16 * SIDE / clock(lambda: quantise(rows), device),
    )


def _launch_time(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds per operation, Python included, of a model so small that nothing else takes time."""
    with DryRun() as run:
        sketch = TINY.build(dtype, "meta")
        with run.count() as cost:
            sketch(torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    model = TINY.build(dtype, device)
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    return clock(lambda: model(ids), device, rounds=20) / cost.operations.total()


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second, of the smallest product that takes long enough to be timed well."""
    side = 256
    while True:
        matrix = torch.randn(side, side, device=device).to(dtype)
        seconds = clock(lambda matrix=matrix: matrix @ matrix, device)
        if seconds >= LONG_ENOUGH_S or side >= LARGEST:
            return 2 * side**3 / seconds
        side *= 2


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(SAMPLE_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    return 2 * COPIES * SAMPLE_BYTES / clock(copy, device)


def clock(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Seconds that work takes to its end on the device: the median, after one more round to warm up."""
    work()
    laps = []
    for _ in range(rounds):
        finish(device)
        start = time.perf_counter()
        work()
        finish(device)
        laps.append(time.perf_counter() - start)
    return statistics.median(laps)


def finish(device: torch.device) -> None:
    """Wait for everything that was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
