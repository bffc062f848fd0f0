"""One cycle: changes are made, a fault strikes, all comes back and is checked; then once more, after a SIGKILL."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.faults.check import Model, find_losses
from tests.faults.clients import Record
from tests.faults.faults import COMPACTING, Fault

LINGERING = ("", "send=sleep:0.05", "commit=sleep:0.05", "publish=sleep:0.05")
"""Where services stay for a moment, so that what strikes at random strikes there more often."""


@dataclass(frozen=True)
class Result:
    """What a cycle came to. folder: kept where there are losses."""

    fault: Fault
    seed: int
    folder: Path
    acknowledged_edits: int
    resolved: int
    asked: str
    losses: list[str] = field(default_factory=list)


def run_cycle(fault: Fault, seed: int, folder: Path, model: Model) -> Result:
    """Let a fault strike in a folder of its own. Raises Missed."""
    rng, record = Random(seed), Record()
    housekeeping = COMPACTING if rng.random() < 0.3 else {}
    with fault.scene(folder, {**model.environment(), **housekeeping}, rng.choice(LINGERING)) as scene:
        scene.add()
        fault.strike(scene, record, rng)
        losses = find_losses(scene, record, model)
        if not losses:
            scene.kill()
            losses = [f"after another SIGKILL: {each}" for each in find_losses(scene, record, model)]
    result = Result(fault, seed, folder, record.acknowledged_edits, record.resolved, str(record), losses)
    if losses:
        record.write(folder / "record.json", losses)
    else:
        shutil.rmtree(folder)
    return result
