"""What one of several processes does in a test; run as a module, with the folder to write to.

Every process leaves what it came to in `<rank>.pt`.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from editors.errors import DataFileError, EditorsError
from editors.mend.training.processes import Processes
from tests.editors.mend.training.runs import family_base, nothing, trainer

PIECES = 5


def together(processes: Processes) -> dict[str, object]:
    """What is drawn, sent and summed by the operations themselves."""
    pieces = torch.zeros(PIECES, 3, dtype=torch.bfloat16)
    for piece in processes.share(PIECES):
        pieces[piece] = torch.tensor([piece + 0.1, -0.0, float("nan")])
    sums = [torch.full((2,), float(processes.rank)), torch.ones((), dtype=torch.float64)]
    processes.add(sums)
    return {
        "united": processes.unite(pieces).view(torch.int16),
        "sums": sums,
        "from main": processes.from_main(lambda: {"rank": processes.rank}),
    }


def failing(processes: Processes) -> str:
    """A failure of the main process alone."""

    def fail() -> None:
        raise DataFileError("no such file")

    try:
        processes.from_main(fail)
    except EditorsError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def trained(processes: Processes, folder: Path, family: str, accumulate: int) -> dict[str, object]:
    """A whole run, with its own samples' and the data's hidden states and answers."""
    run = trainer(family_base(family), folder, processes=processes, accumulate=accumulate)
    losses: list[dict[str, float]] = []
    run.run(losses.append, nothing)
    again = trainer(family_base(family), folder, initial=9, processes=processes, accumulate=accumulate)
    again.resume()
    return {
        "resumed": [again.progress.step, again.editor.state_dict()],
        "editor": run.editor.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "history": run.progress.history,
        "curve": dataclasses.asdict(run.curve),
        "told": losses,
        "answers": sorted(run.corpus._answers.items()),
        "states": run.corpus.hidden._states,
    }


def diverging(processes: Processes, folder: Path) -> str:
    """A loss that is infinite on the last process alone."""
    run = trainer(family_base("llama"), folder, processes=processes, accumulate=2)
    if processes.rank == processes.count - 1:
        run.objective.config = dataclasses.replace(run.config, c_edit=1e39)  # more than float32 holds
    run.progress.step = 4
    try:
        run.step()
    except EditorsError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(folder: Path) -> None:
    processes = Processes.join("cpu")
    found = {"count": processes.count, "together": together(processes), "failing": failing(processes)}
    for family, accumulate in (("llama", 2), ("t5", 2), ("llama", 4)):
        found[f"{family} {accumulate}"] = trained(processes, folder / f"{family}-{accumulate}", family, accumulate)
    found["diverging"] = diverging(processes, folder / "diverging")
    torch.save(found, folder / f"{processes.rank}.pt")
    processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
