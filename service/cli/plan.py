"""`mend plan`: what serving, editing and training would take for a model of any size, without its weights."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.options import DeviceOption

if TYPE_CHECKING:
    import torch

Dtype = StrEnum("Dtype", ["float32", "bfloat16", "float16", "float64"])


def plan(
    model: Annotated[
        str, typer.Option(help="Folder with a config.json, such a file, or the name of a built-in shape.")
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; as `mend serve` would choose without it.")
    ] = None,
    device: DeviceOption = None,
    layers: Annotated[list[str], typer.Option(help="Pattern of the layers to edit, instead of the preset.")] = [],  # noqa: B006
    rank: Annotated[int, typer.Option(min=1, help="Rank of the editor's networks.")] = 512,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that the model reads for an edit.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Independent edits in a training step.")] = 24,
    flops: Annotated[float | None, typer.Option(min=1, help="Operations per second, instead of measuring.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1, help="Bytes per second, instead of measuring.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run it with random weights, and compare.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of --measure.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object instead of tables.")] = False,
) -> None:
    """Work out the memory and time of serving, an edit and a training step, from the shapes alone."""
    import torch
    import transformers

    from editors.base_model import default_device, default_dtype
    from editors.planning.machine import measure_machine
    from editors.planning.measure import free_bytes
    from editors.planning.measure import measure as run
    from editors.planning.plan import plan as work_out
    from editors.planning.report import as_object, tables
    from editors.planning.shapes import read_shape
    from editors.planning.walk import Workload

    transformers.logging.set_verbosity_error()
    shape, where = read_shape(model), _usable(device or default_device())
    positions = getattr(shape.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        sys.exit(f"mend: {model} has {positions} positions, fewer than --tokens {tokens}")
    chosen = getattr(torch, dtype) if dtype else default_dtype(where.type)
    work = Workload(tokens=tokens, rank=rank, batch=batch)
    planned = work_out(shape, chosen, work, layers or None)
    needed, free = max(planned.edit_peak, planned.training_peak), free_bytes(where)
    if measure and needed > free:
        sys.exit(
            f"mend: {model} in {chosen} needs {needed / 1e9:.1f} GB at its peak, and {where} has {free / 1e9:.1f} GB "
            "free; leave out --measure, or choose another --dtype, --batch or --device"
        )
    machine = measure_machine(where, chosen, flops, bandwidth)
    try:
        measured = run(shape, chosen, where, work, layers or None, rounds) if measure else None
    except torch.OutOfMemoryError as error:
        sys.exit(f"mend: {where} ran out of memory with {model}: {str(error).splitlines()[0]}")
    if as_json:
        typer.echo(json.dumps(as_object(planned, machine, measured), indent=2, ensure_ascii=False))
    else:
        typer.echo(tables(planned, machine, measured))


def _usable(name: str) -> torch.device:
    import torch

    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, and torch built without it
        sys.exit(f"mend: the device {name!r} cannot be used: {str(error).splitlines()[0]}")
