"""`mend evaluate`: measure an editor, and baselines beside it, on a data file."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import (
    DEFAULT_BASE_MODEL,
    DEFAULT_EDITOR,
    BaseModelOption,
    DeviceOption,
    Dtype,
    command_line,
)

if TYPE_CHECKING:
    from editors.base_model import BaseModel
    from editors.checkpoint import Checkpoint
    from editors.data import DataSet, Example
    from editors.evaluation.methods import Mend, Method
    from editors.evaluation.protocols import Bench
    from editors.evaluation.report import Report
    from editors.targets import Target


class Baseline(StrEnum):
    FT = "ft"
    FT_KL = "ft+kl"


def evaluate(
    data: Annotated[list[Path], typer.Option(help="Data file; each is measured by itself.")],
    editor: Annotated[
        list[str], typer.Option(envvar="MEND_EDITOR", help="Folder of a checkpoint, or training-free; repeatable.")
    ] = [],  # noqa: B006
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the base model, as it would be served.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure only the first N examples, and of a larger batch so many of its.")
    ] = None,
    last: Annotated[
        int | None, typer.Option(min=1, help="Measure only the last N examples (those of --holdout).")
    ] = None,
    single: Annotated[bool, typer.Option(help="Measure single edits.")] = True,
    batched: Annotated[list[int], typer.Option(help="Also N edits in one change; repeatable.")] = [],  # noqa: B006
    accumulated: Annotated[list[int], typer.Option(help="Also N edits one after another; repeatable.")] = [],  # noqa: B006
    baseline: Annotated[list[Baseline], typer.Option(help="Also fine-tuning; repeatable.")] = [],  # noqa: B006
    validation: Annotated[Path | None, typer.Option(help="Where the baselines' step size is chosen.")] = None,
    tune: Annotated[int, typer.Option(min=1, help="On so many examples; unmeasured ones without --validation.")] = 24,
    text: Annotated[Path | None, typer.Option(help="Plain text for perplexity, not the model's own.")] = None,
    margin: Annotated[float | None, typer.Option(help="Margin of the scale search in nats, not the card's.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures and all values here as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.")] = None,
    write_card: Annotated[bool, typer.Option(help="Add the figures to the checkpoint's card.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts and texts, and of the intervals.")] = 0,
) -> None:
    """Measure edits: efficacy, paraphrases, locality, before and after, with 95 % intervals."""
    import torch

    from editors.base_model import load_base_model
    from editors.checkpoint import write_card as write
    from editors.chosen import choose_editor
    from editors.data import read_data
    from editors.evaluation.methods import Mend
    from editors.evaluation.plots import draw_plots
    from editors.evaluation.protocols import Bench
    from editors.evaluation.report import over_counts
    from editors.evaluation.texts import own_text, read_text
    from editors.packaged import default_cache_dir

    _require_room(report, plots)
    files = [read_data(path) for path in data]
    held_out = read_data(validation).examples if validation else None
    base = load_base_model(base_model, device=device, dtype=getattr(torch, dtype) if dtype else None)
    cache = default_cache_dir()
    checkpoints = [choose_editor(named, DEFAULT_EDITOR, base, cache) for named in editor or [None]]
    names = _names(checkpoints)
    mends = [
        Mend(base, c.editor, c.margin_nats if margin is None else margin, name)
        for c, name in zip(checkpoints, names, strict=True)
    ]
    texts = read_text(base, text) if text else own_text(base, seed)
    command = command_line()
    results: list[dict[str, Any]] = []
    for file in files:
        examples, more, others = _chosen(file, last, limit, max([0, *batched, *accumulated]))
        bench = Bench(base, seed, texts, others)
        about = {
            "command": command,
            "data": file.name,
            "data_digest": file.digest,
            "base_model": base.digest,
            "dtype": str(base.dtype).removeprefix("torch."),
        }
        tuning = others if held_out is None else held_out
        methods = [(mend, {"editor": c.digest}) for mend, c in zip(mends, checkpoints, strict=True)]
        methods += [_tuned(base, _tuned_weights(base, mends), name, tuning, tune, seed) for name in baseline]
        typer.echo(f"{file.name}: sha256:{file.digest}, seed {seed}, {about['dtype']}")
        reports: list[Report] = []
        for method, facts in methods:
            for measured in _measured(bench, method, examples, more, single, batched, accumulated):
                heading = f"{file.name}, {measured.heading}"
                typer.echo(f"\n{heading}\n\n{measured.table()}\n")
                reports.append(measured)
                results.append({**about, **facts, **measured.to_json(), "table": f"{heading}:\n\n{measured.table()}"})
                if report:  # after each, so that a later failure loses nothing
                    report.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        if batched:
            typer.echo(f"{file.name}, all active at once:\n\n{over_counts(reports)}\n")
        if plots:
            for path in draw_plots(reports, plots, Path(file.name).stem):
                typer.echo(f"plot: {path}")
    for checkpoint in checkpoints if write_card else ():
        own = [result for result in results if result.get("editor", checkpoint.digest) == checkpoint.digest]
        again = {_about(result) for result in own}
        kept = [result for result in checkpoint.card.get("results", []) if _about(result) not in again]
        short = [{key: value for key, value in r.items() if key not in ("values", "text_losses")} for r in own]
        write(checkpoint.folder, {**checkpoint.card, "results": kept + short})


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What editors are called in tables and plots, each differently."""
    if len(checkpoints) == 1:
        return ["mend"]
    names = Counter(checkpoint.name for checkpoint in checkpoints)
    return [c.name if names[c.name] == 1 else f"{c.name} {c.digest[7:15]}" for c in checkpoints]


def _about(result: dict[str, Any]) -> tuple[str, str, str]:
    """What a result is of; cards of old know of MEND's single edits alone."""
    return result["data"], result.get("method", "mend"), result.get("setting", "single")


def _require_room(report: Path | None, plots: Path | None) -> None:
    """Measuring takes long: where its results cannot go is said before. Raises ReportError."""
    from editors.errors import ReportError

    if report and (report.is_dir() or not report.parent.is_dir()):
        raise ReportError(f"cannot write the report {report}: give a file in a folder that there is", file=str(report))
    if plots and plots.exists() and not plots.is_dir():
        raise ReportError(f"cannot draw into {plots}: it is a file, give a folder", file=str(plots))


def _chosen(
    file: DataSet, last: int | None, limit: int | None, most: int
) -> tuple[Sequence[Example], Sequence[Example], Sequence[Example]]:
    """The examples that are measured, all that larger batches may take, and those of the file that are not measured.

    most: edits in the largest of these.
    """
    early, late = file.split(last) if last else (file.split(0)[1], file)
    examples = late.examples[:limit]
    return examples, late.examples, early.examples + late.examples[max(len(examples), most) :]


def _measured(
    bench: Bench,
    method: Method,
    examples: Sequence[Example],
    more: Sequence[Example],
    single: bool,
    batched: Sequence[int],
    accumulated: Sequence[int],
) -> Iterator[Report]:
    if single:
        yield bench.single(method, examples)
    for count in batched:
        yield bench.batched(method, more[: max(count, len(examples))], count, len(examples))
    for count in accumulated:
        yield bench.accumulated(method, more[: max(count, len(examples))], count)


def _tuned_weights(base: BaseModel, mends: Sequence[Mend]) -> Sequence[Target]:
    """What baselines edit: what the first editor of single edits edits, or the preset of these."""
    from editors.targets import resolve_targets

    return next((mend.targets for mend in mends if mend.editor.aggregate == "sum"), None) or resolve_targets(base.model)


def _tuned(
    base: BaseModel, targets: Sequence[Target], name: Baseline, examples: Sequence[Example], count: int, seed: int
) -> tuple[Method, dict[str, Any]]:
    """A baseline, and how its step size was chosen."""
    from editors.finetune.choice import KL_WEIGHT, choose

    chosen = random.Random(seed).sample(list(examples), min(count, len(examples)))
    method, trials = choose(base, targets, chosen, kl=KL_WEIGHT if name is Baseline.FT_KL else 0.0, seed=seed)
    typer.echo(f"{name.value}: learning rate {method.recipe.learning_rate:g}, at most {method.recipe.steps} steps, "
               f"chosen on {len(chosen)} examples")  # fmt: skip
    return method, {"recipe": asdict(method.recipe), "grid": [asdict(trial) for trial in trials]}
