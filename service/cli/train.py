"""`mend train`: train an editor for a base model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from editors.mend.variant import DEFAULT_VARIANT, VARIANTS
from service.cli.options import DEFAULT_BASE_MODEL, BaseModelOption, DeviceOption


def train(
    data: Annotated[list[Path], typer.Option(help="Training file: CounterFact, zsRE or the project's JSONL.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    validation: Annotated[list[Path], typer.Option(help="Validation file.")] = [],  # noqa: B006 - typer's idiom
    holdout: Annotated[int, typer.Option(help="Keep the last N examples of each training file for validation.")] = 0,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    layers: Annotated[list[str], typer.Option(help="Pattern of the layers to edit, instead of the preset.")] = [],  # noqa: B006
    resume: Annotated[bool, typer.Option(help="Go on from training.pt in the folder.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps hidden states between runs.")] = None,
    variant: Annotated[str, typer.Option(help=f"MEND or an ablation of it: {', '.join(VARIANTS)}.")] = DEFAULT_VARIANT,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the editor's networks.")] = 512,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 2400,
    batch: Annotated[int, typer.Option(help="Independent edits in a step.")] = 24,
    c_edit: Annotated[float, typer.Option(help="Weight of the edit loss.")] = 0.2,
    c_neighbour: Annotated[float, typer.Option(help="Weight of the locality loss on neighbours.")] = 1.0,
    c_unrelated: Annotated[float, typer.Option(help="Weight of the locality loss on unrelated text.")] = 2.0,
    self_share: Annotated[float, typer.Option(help="How often an edit is scored on its own prompt.")] = 0.2,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the networks.")] = 2e-4,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 100,
    patience: Annotated[int, typer.Option(help="Validations without improvement before stopping.")] = 20,
    samples: Annotated[int, typer.Option(help="Texts of the model's own, for locality.")] = 1024,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16 matrix products.")] = "float32",
    seed: Annotated[int, typer.Option(help="Fixes the run.")] = 0,
) -> None:
    """Train a MEND editor; stop and resume it at will."""
    from editors.base_model import load_base_model
    from editors.data import read_data
    from editors.errors import DataFileError
    from editors.mend.recipe import train as run
    from editors.mend.training import TrainingConfig

    if variant not in VARIANTS:
        sys.exit(f"mend: --variant is {variant!r}, none of {', '.join(VARIANTS)}")
    splits = [read_data(path).split(holdout) for path in data]
    held_out = [late for _, late in splits if late.examples] + [read_data(path) for path in validation]
    if not held_out:
        raise DataFileError("training needs examples to validate on: give --validation FILE or --holdout N")
    config = TrainingConfig(
        variant=variant,
        rank=rank,
        steps=steps,
        batch=batch,
        c_edit=c_edit,
        c_neighbour=c_neighbour,
        c_unrelated=c_unrelated,
        self_share=self_share,
        learning_rate=learning_rate,
        validate_every=validate_every,
        patience=patience,
        samples=samples,
        precision=precision,
        seed=seed,
    )
    base = load_base_model(base_model, device=device)
    command = shlex.join(["mend", *(Path(a).name if Path(a).exists() else a for a in sys.argv[1:])])
    best = run(base, [early for early, _ in splits], held_out, config, out, layers=layers or None,
               command=command, resume=resume, cache=cache)  # fmt: skip
    if best:
        typer.echo(f"best validation score {best.score:.3f}; the editor is in {out}")
    else:
        typer.echo(f"nothing better than before was found; the editor in {out} is unchanged")
