"""The benchmark: many cycles of every fault. Prints a table in Markdown; exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from tests.faults.check import Model
from tests.faults.cycle import Result, run_cycle
from tests.faults.faults import FAULTS, Missed

COLUMNS = ("fault injected", "cycles", "acknowledged edits", "outcomes unknown and resolved", "losses found")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--cycles", type=int, default=200, help="of all faults together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first cycle; printed")
    parser.add_argument("--workers", type=int, default=2, help="cycles at the same time")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    given = parser.parse_args()
    faults = [fault for fault in FAULTS if given.only.lower() in fault.name.lower()]
    if not faults:
        parser.error(f"no fault has {given.only!r} in its name; there are: {'; '.join(each.name for each in FAULTS)}")

    folder = Path(tempfile.mkdtemp(prefix="mend-faults-"))
    models = [Model.write(folder / "summed"), Model.write(folder / "keyed", keyed=True)]

    def cycle(number: int) -> Result | None:
        seed = given.seed + number
        fault, model = faults[number % len(faults)], Random(seed).choice(models)
        try:
            result = run_cycle(fault, seed, folder / str(seed), model)
        except Missed as missed:
            say(f"seed {seed}: {fault.name}: missed: {missed}")
            return None
        except Exception as error:
            raise RuntimeError(f"seed {seed}: {fault.name}, in {folder / str(seed)}") from error
        for loss in result.losses:
            say(f"LOSS with seed {seed}: {fault.name}: {loss}; kept in {result.folder}")
        say(f"seed {seed}: {fault.name}: {result.asked}")
        return result

    say(f"{given.cycles} cycles from seed {given.seed} on, in {folder}")
    with ThreadPoolExecutor(given.workers) as pool:
        results = [result for result in pool.map(cycle, range(given.cycles)) if result]
    sys.stdout.write(table(results))
    if any(result.losses for result in results):
        return 1
    shutil.rmtree(folder)
    return 0


def say(line: str) -> None:
    """What happens on the way, beside the table."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def table(results: Sequence[Result]) -> str:
    """A row for each fault, and one for all."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.fault.name, []).append(result)
    rows = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)]]
    for name, own in [*by_name.items(), ("all", results)]:
        figures = (
            len(own),
            sum(each.acknowledged_edits for each in own),
            sum(each.resolved for each in own),
            sum(len(each.losses) for each in own),
        )
        rows.append([name, *map(str, figures)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
