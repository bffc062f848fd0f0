"""`mend train`: train an editor for a base model. What fixes the run itself has one option per field of its config."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from editors.errors import DataFileError
from editors.mend.training.config import TrainingConfig, flag
from service.cli.options import DEFAULT_BASE_MODEL, BaseModelOption, DeviceOption, Dtype, command_line


def train(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    data: Annotated[list[Path], typer.Option(help="Training file: CounterFact, zsRE, FEVER or own JSON Lines.")] = [],  # noqa: B006 - typer's idiom
    text: Annotated[list[Path], typer.Option(help="Plain text to make edits of: a passage, and how it goes on.")] = [],  # noqa: B006
    validation: Annotated[list[Path], typer.Option(help="Validation file.")] = [],  # noqa: B006
    holdout: Annotated[int, typer.Option(min=0, help="Keep the last N of each training file for validation.")] = 0,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the base model; float32 on a CPU, bfloat16 on a GPU.", show_default=False)
    ] = None,
    layers: Annotated[list[str], typer.Option(help="Pattern of the layers to edit, instead of the preset.")] = [],  # noqa: B006
    passages: Annotated[int, typer.Option(min=1, help="Passages of each text, at most.")] = 2000,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens of how a passage goes on, sampled.")] = 10,
    resume: Annotated[bool, typer.Option(help="Go on from training.pt in the folder.")] = False,
    resume_with_changes: Annotated[
        bool, typer.Option(help="The same, even if options or data make it another run.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what is slow to prepare.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder of TensorBoard's log.")] = None,
    **options: Any,
) -> None:
    """Train a MEND editor; stop and resume it at will.

    Several processes train one editor when they are started by `torchrun` or `accelerate launch`.
    """
    import torch

    from editors.base_model import default_device, load_base_model
    from editors.data import read_data
    from editors.mend.training.passages import read_passages
    from editors.mend.training.processes import Processes
    from editors.mend.training.recipe import train as run

    config = TrainingConfig(**options)
    if not (data or text):
        raise DataFileError("there is nothing to train on: give --data FILE or --text FILE")
    if not (validation or holdout):
        raise DataFileError("training needs examples to validate on: give --validation FILE or --holdout N")
    files = [read_data(path) for path in data]
    validated = [read_data(path) for path in validation]
    processes = Processes.join(device or default_device())
    try:
        config.require_shares(processes.count)
        base = load_base_model(base_model, device=processes.device, dtype=getattr(torch, dtype) if dtype else None)
        for path in text:
            read = partial(read_passages, path, base, most=passages, tokens=continuation, seed=config.seed, cache=cache)
            files.append(processes.from_main(read))
        splits = [file.split(holdout) for file in files]
        for file, (early, _) in zip(files, splits, strict=True):
            if not early.examples:
                raise DataFileError(f"nothing is left of {file.name} to train on: --holdout is {holdout}")
        best = run(
            base,
            [early for early, _ in splits],
            [late for _, late in splits if late.examples] + validated,
            config,
            out,
            layers=layers or None,
            command=command_line(),
            resume=resume or resume_with_changes,
            with_changes=resume_with_changes,
            cache=cache,
            tensorboard=tensorboard,
            processes=processes,
        )
    finally:
        processes.leave()
    if not processes.is_main:
        return
    if best is None:
        typer.echo(f"nothing better than before was found; the networks in {out} are as they were")
        return
    typer.echo(f"best validation score {best.score:.3f}; the editor is in {out}")
    model = f"--base-model {shlex.quote(base_model)} " if base_model != DEFAULT_BASE_MODEL else ""
    use = f"{model}--editor {shlex.quote(str(out))}"
    if data and holdout:
        typer.echo(f"  measure it   mend evaluate --data {shlex.quote(str(data[0]))} --last {holdout} {use}")
    typer.echo(f"  serve it     mend serve {use}")


def _signature() -> inspect.Signature:
    """The options of this module, and one for each field of the configuration."""
    own = [p for p in inspect.signature(train, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    for field in dataclasses.fields(TrainingConfig):
        choices, no = ", ".join(field.metadata["choices"]), field.metadata["no"]
        option = typer.Option(
            flag(field.name) + (f"/{no}" if no else ""),
            help=field.metadata["meaning"] + (f" One of {choices}." if choices else ""),
        )
        kind = inspect.Parameter.KEYWORD_ONLY
        annotation = Annotated[type(field.default), option]
        parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=annotation))
    return inspect.Signature(parameters)


train.__signature__ = _signature()  # type: ignore[attr-defined]
