"""Nothing that was acknowledged is lost, and nothing that was refused is there, whatever fails; with real processes.

`python -m tests.faults` does the same for longer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random, SystemRandom

import pytest

from tests.faults.check import Model
from tests.faults.cycle import Result, run_cycle
from tests.faults.faults import AT_RANDOM, FAULTS, Fault, Missed

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="limits the files of processes, and ends them with another one"),
]


def strike(fault: Fault, seed: int, folder: Path, models: tuple[Model, Model]) -> Result:
    """One cycle; with another seed where a fault did not come about."""
    for again in range(5):
        try:
            return run_cycle(fault, seed + again, folder / str(again), Random(seed + again).choice(models))
        except Missed:
            continue
    raise AssertionError(f"{fault.name} does not come about")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_loses_nothing_by(fault: Fault, models: tuple[Model, Model], tmp_path: Path) -> None:
    result = strike(fault, 1, tmp_path / "cycle", models)
    assert not result.losses, result
    assert result.acknowledged_edits, result


@pytest.mark.parametrize("number", range(3))
def test_loses_nothing_at_random(number: int, models: tuple[Model, Model], tmp_path: Path) -> None:
    seed = SystemRandom().getrandbits(32)
    result = strike(Random(seed).choice(AT_RANDOM), seed, tmp_path / "cycle", models)
    assert not result.losses, result
