"""`mend compare`: two editors, or two reports of `mend evaluate`, side by side on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.options import DEFAULT_BASE_MODEL, BaseModelOption, DeviceOption

if TYPE_CHECKING:
    from editors.evaluation.compare import Entry


def compare(
    one: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or a report of mend evaluate --report.")],
    two: Annotated[Path, typer.Argument(help="The other, of the same sort.")],
    data: Annotated[Path | None, typer.Option(help="Data file on which two checkpoints are measured.")] = None,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure only the first N examples.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Measure only the last N examples.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts and of the intervals.")] = 0,
) -> None:
    """Compare prompt by prompt: every figure, its difference with a 95 % interval, and whether it is clear of zero."""
    from editors.errors import ReportError
    from editors.evaluation.compare import compare as compare_entries
    from editors.evaluation.compare import pair, read_report, table

    if one.is_dir() and two.is_dir():
        if data is None:
            raise ReportError("two checkpoints are compared on data: give --data FILE")
        pairs = [_measure(one, two, data, base_model, device, limit, last, seed)]
    elif one.is_dir() or two.is_dir():
        raise ReportError("give two folders of checkpoints, or two reports, not one of each")
    else:
        pairs = pair(read_report(one), read_report(two))
    for first, second in pairs:
        names = [f"{path.name} ({entry['method']})" for path, entry in ((one, first), (two, second))]
        typer.echo(f"\n{first['data']}, {first['setting']}: {first['examples']} edits\n")
        typer.echo(table(*names, compare_entries(first, second)) + "\n")


def _measure(
    one: Path,
    two: Path,
    data: Path,
    base_model: str,
    device: str | None,
    limit: int | None,
    last: int | None,
    seed: int,
) -> tuple[Entry, Entry]:
    from editors.base_model import load_base_model
    from editors.checkpoint import load_checkpoint
    from editors.data import read_data
    from editors.evaluation.methods import Mend
    from editors.evaluation.protocols import Bench

    file = read_data(data)
    examples = (file.split(last)[1] if last else file).examples[:limit]
    base = load_base_model(base_model, device=device)
    entries = []
    for folder in (one, two):
        checkpoint = load_checkpoint(folder, base)
        measured = Bench(base, seed).single(Mend(base, checkpoint.editor, checkpoint.margin_nats), examples)
        entries.append({"data": file.name, "data_digest": file.digest, **measured.to_json()})
    return entries[0], entries[1]
