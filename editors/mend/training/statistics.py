"""The normalisers' statistics over the micro-batches of a step, wherever these were captured.

Each micro-batch is counted by itself, and what was found is merged in the order of the micro-batches, on every
process alike: the result does not depend on who captured what (Chan et al., 1979).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from editors.capture import Capture
from editors.mend.editor import MendEditor
from editors.mend.network import RunningStatistics
from editors.mend.training.processes import Processes


@torch.no_grad()
def merge_statistics(editor: MendEditor, captures: Mapping[int, Capture], count: int, processes: Processes) -> None:
    """Count a step's rows.

    captures: this process' share of the micro-batches, by their place in the step. count: how many there are in all.
    """
    statistics = [module for module in editor.modules() if isinstance(module, RunningStatistics)]
    if not statistics:
        return
    held = [_read(each) for each in statistics]
    found = [state.new_zeros(count, len(state)) for state in held]
    for index, captured in captures.items():
        for each, state in zip(statistics, held, strict=True):
            _write(each, torch.zeros_like(state))
        editor.update_statistics(captured)
        for each, rows in zip(statistics, found, strict=True):
            rows[index] = _read(each)
    for each, state, rows in zip(statistics, held, found, strict=True):
        _write(each, state)
        for part in processes.unite(rows):
            _merge(each, part)


def _read(statistics: RunningStatistics) -> Tensor:
    """Count, mean and m2 as one float64 tensor, which holds each of them exactly."""
    return torch.cat([statistics.count.view(1), statistics.mean.double(), statistics.m2.double()])


def _write(statistics: RunningStatistics, state: Tensor) -> None:
    for buffer, value in zip((statistics.count, statistics.mean, statistics.m2), _parts(state), strict=True):
        buffer.copy_(value)


def _merge(statistics: RunningStatistics, state: Tensor) -> None:
    count, mean, m2 = _parts(state)
    total = (statistics.count + count).clamp(min=1)
    shift = mean.to(statistics.mean.dtype) - statistics.mean
    statistics.m2 += m2.to(shift.dtype) + shift.square() * (statistics.count * count / total).to(shift.dtype)
    statistics.mean += shift * (count / total).to(shift.dtype)
    statistics.count += count


def _parts(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = len(state) // 2
    return state[0], state[1 : 1 + width], state[1 + width :]
