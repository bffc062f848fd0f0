"""`mend evaluate`: measure an editor on a data file."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import DEFAULT_BASE_MODEL, DEFAULT_EDITOR, BaseModelOption, DeviceOption


def evaluate(
    data: Annotated[list[Path], typer.Option(help="Data file; each is measured by itself.")],
    editor: Annotated[Path, typer.Option(envvar="MEND_EDITOR", help="Folder of the checkpoint.")] = DEFAULT_EDITOR,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    limit: Annotated[int | None, typer.Option(help="Measure only the first N examples.")] = None,
    last: Annotated[int | None, typer.Option(help="Measure only the last N examples (those of --holdout).")] = None,
    margin: Annotated[float | None, typer.Option(help="Margin of the scale search in nats, not the card's.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
    write_card: Annotated[bool, typer.Option(help="Add the figures to the checkpoint's card.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of unrelated prompts and of the intervals.")] = 0,
) -> None:
    """Measure single edits: efficacy, paraphrases, locality, before and after, with 95 % intervals."""
    from editors.base_model import load_base_model
    from editors.data import read_data
    from editors.evaluation.single import evaluate_single
    from editors.mend.checkpoint import load_checkpoint
    from editors.mend.checkpoint import write_card as write

    files = [read_data(path) for path in data]
    base = load_base_model(base_model, device=device)
    checkpoint = load_checkpoint(editor, base)
    command = shlex.join(["mend", *(Path(a).name if Path(a).exists() else a for a in sys.argv[1:])])
    results = []
    for file in files:
        chosen = file.split(last)[1] if last else file
        measured = evaluate_single(
            base,
            checkpoint.editor,
            chosen.examples[:limit],
            margin=checkpoint.margin_nats if margin is None else margin,
            seed=seed,
        )
        typer.echo(f"\n{file.name}: {measured.examples} single edits\n\n{measured.table()}\n")
        results.append(
            {
                "command": command,
                "data": file.name,
                "data_digest": file.digest,
                "examples": measured.examples,
                "seed": seed,
                "median_scale": sorted(measured.scales)[len(measured.scales) // 2],
                "figures": {name: asdict(value) for name, value in measured.figures.items()},
                "before": {name: asdict(value) for name, value in measured.before.items()},
                "table": f"{file.name}, {measured.examples} single edits:\n\n{measured.table()}",
            }
        )
    if report:
        report.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    if write_card:
        measured_before = [r for r in checkpoint.card.get("results", []) if r["data"] not in {f.name for f in files}]
        write(editor, {**checkpoint.card, "results": measured_before + results})
