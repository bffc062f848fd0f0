"""`mend checkpoint`: editors from elsewhere, for elsewhere, and whether one is sound."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import DEFAULT_BASE_MODEL, BaseModelOption

checkpoint = typer.Typer(no_args_is_help=True, help="Import, export and verify trained editors.")

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the checkpoint.")]


@checkpoint.command("import")
def import_archive(
    file: Annotated[Path, typer.Argument(help="Archive of MEND's original code, of ROME's or of EasyEdit's.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    inner_params: Annotated[
        Path | None, typer.Option(help="Its configuration, YAML or JSON: the edited weights in order, init, norm.")
    ] = None,
    layers: Annotated[list[str], typer.Option(help="Pattern of the layers, in order, in place of the former.")] = [],  # noqa: B006 - typer's idiom
    init: Annotated[
        str | None, typer.Option(help="id or xavier, if the configuration does not say it; without, id.")
    ] = None,
    norm: Annotated[
        bool | None, typer.Option("--norm/--no-norm", help="Whether rows are normalised, likewise; without, yes.")
    ] = None,
) -> None:
    """Make an editor of this project from an archive. Nothing in the archive is run."""
    from dataclasses import replace

    import torch

    from editors.base_model import load_base_model
    from editors.checkpoint import CARD, read_card, save_checkpoint
    from editors.errors import CheckpointError
    from editors.mend.archive import read_archive
    from editors.mend.archive_config import INITS, ArchiveConfig, read_config
    from editors.mend.archive_import import editor_of, ordered_targets

    if init is not None and init not in INITS:
        sys.exit(f"mend: --init is {init!r}, none of {', '.join(INITS)}")
    if inner_params and layers:
        sys.exit("mend: --inner-params and --layers both give the order; leave one of them out")
    if (out / CARD).exists():
        raise CheckpointError(f"there is an editor in {out} already; choose another folder")
    config = read_config(inner_params) if inner_params else ArchiveConfig()
    config = replace(
        config,
        identity=config.identity if init is None else INITS[init],
        normalise=config.normalise if norm is None else norm,
    )
    archive = read_archive(file)
    base = load_base_model(base_model, device="cpu")
    editor = editor_of(archive, ordered_targets(archive, base.model, config.inner_params, layers), config)
    origin = {
        "file": archive.file,
        "digest": f"sha256:{archive.digest}",
        "made_for": archive.model,
        "step": archive.step,
        "val_stats": archive.val_stats,
    }
    # In float32, as the archive has them: what it proposes should be what the original would.
    try:
        save_checkpoint(out, editor, base, {"imported_from": origin}, matrices=torch.float32)
    except OSError as error:
        raise CheckpointError(f"{error.filename or out} cannot be written ({error.strerror})") from error
    typer.echo(f"{len(editor.targets)} weights, {editor.variant}", err=True)
    if archive.model:
        typer.echo(f"the archive was made for {archive.model}; the base model is {base.ref}", err=True)
    typer.echo(f"{read_card(out)['digest']}  {out}")


@checkpoint.command("export")
def export_archive(
    folder: FolderArgument,
    out: Annotated[Path, typer.Option(help="File to write; its configuration is put beside it, as .yaml.")],
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
) -> None:
    """Write an editor as an archive that the original code, ROME's and EasyEdit's can load."""
    from editors.base_model import load_base_model
    from editors.checkpoint import load_checkpoint
    from editors.mend.archive import write_archive

    base = load_base_model(base_model, device="cpu")
    sidecar = write_archive(load_checkpoint(folder, base), base, out, replace=force)
    typer.echo(f"its configuration is in {sidecar}", err=True)
    typer.echo(out)


@checkpoint.command()
def verify(
    folder: FolderArgument,
    base_model: Annotated[str | None, typer.Option(help="Hub id, folder, or the packaged model's name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check that an editor is whole and is what its card says; with a base model, that it belongs to it."""
    from dataclasses import asdict

    from editors.base_model import load_base_model
    from editors.verification import verify_checkpoint

    checks = verify_checkpoint(folder, load_base_model(base_model, device="cpu") if base_model else None)
    sound = all(check.ok for check in checks)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "ok": sound, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        for check in checks:
            typer.echo(f"{'ok' if check.ok else 'failed':8}{check.name}: {check.detail}")
    if not base_model:
        typer.echo("whether it belongs to its base model was not checked; give --base-model for that", err=True)
    raise typer.Exit(0 if sound else 1)
