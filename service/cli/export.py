"""`mend export`: take the active edits elsewhere, from a ledger or from a running service.

Flow: the engine's files, or a download of them -> a draft inside the folder -> their places, the index last.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Annotated, Any, BinaryIO, NoReturn
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import typer

from editors.formats import INDEX, ExportFormat
from service.cli.client import KEY_ADVICE, Refused, key_headers, told_problem
from service.cli.client_command import KeyFileOption
from service.cli.options import read_settings, with_settings
from service.settings import Settings

TOLD = {"format", "revision", "digest", "base_model", "editor", "files", "edits"}
"""What the index of every export says."""
Write = Callable[[Path], None]
"""Puts the files of an export into a folder."""


@with_settings("data_dir", "redis_url", "redis_server", "base_model", "editor", "device", "dtype")
def export(
    format: Annotated[ExportFormat, typer.Option(help="A PEFT adapter, a whole model, or each edit's factors.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must be empty, or not there yet.")],
    service: Annotated[str | None, typer.Option(help="URL of a running service, instead of its ledger.")] = None,
    key_file: KeyFileOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that is not empty, in place of an export there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
    **flags: Any,
) -> None:
    """Write the active edits as a LoRA adapter, a merged model, or their factors."""
    if service is None:
        settings = read_settings(flags)
        index = _fill(out, force, lambda folder: _replay(settings, format, folder))
    else:
        given = [name for name, value in flags.items() if value is not None]
        if given:
            _stop(f"a running service has its own settings: leave out --{given[0].replace('_', '-')} or --service")
        index = _fill(out, force, lambda folder: _download(service, format, folder, key_file))
    facts = {name: value for name, value in index.items() if name not in ("files", "edits")}
    facts |= {"active_edits": len(index["edits"]), "folder": str(out)}
    typer.echo(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else _told(facts))
    if not index["edits"]:
        typer.echo("mend: no edit is active here, so this is the base model as it is", err=True)
    if facts.get("warning"):
        typer.echo(f"mend: warning: {facts['warning']}", err=True)


def _replay(settings: Settings, format: ExportFormat, folder: Path) -> None:
    """Open the ledger as `mend serve` would, and write what would be live."""
    if settings.redis_url is None and not (settings.data_dir / "redis").is_dir():
        _stop(f"there is no ledger in {settings.data_dir}; point MEND_DATA_DIR at the folder of a service, or name "
              "its Redis with MEND_REDIS_URL")  # fmt: skip
    typer.echo(f"mend: loading {settings.base_model} …", err=True)
    from service.app import EXPECTED, opened
    from service.ledger import EmbeddedRedisError

    try:
        with opened(settings) as (engine, _):
            typer.echo(f"mend: writing revision {engine.published.revision} …", err=True)
            engine.export(format, folder)
    except EmbeddedRedisError as error:
        _stop(f"{error}; or export from it with --service URL" if "holder" in error.facts else str(error))
    except EXPECTED as error:
        _stop(str(error))


def _download(service: str, format: ExportFormat, folder: Path, key_file: Path | None) -> None:
    """Have a running service write the export, and unpack it."""
    import httpx

    typer.echo(f"mend: asking {service} …", err=True)
    url, waits = f"{service.rstrip('/')}/export", httpx.Timeout(10, read=None)  # writing it takes what it takes
    try:
        with (
            httpx.stream(
                "GET", url, params={"format": format.value}, headers=key_headers(key_file), timeout=waits
            ) as answer,
            TemporaryFile(dir=folder.parent) as zipped,
        ):
            if answer.status_code != httpx.codes.OK:
                _stop(f"{service} refused: {_reason(answer.read(), answer.status_code)}")
            for piece in answer.iter_bytes():
                zipped.write(piece)
            typer.echo(f"mend: unpacking {zipped.tell() / 1e6:.1f} MB …", err=True)
            _unpack(zipped, folder)
    except Refused as error:
        _stop(str(error))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _stop(f"{service} cannot be read from: {error}; give the URL of a running mend-service")
    except BadZipFile as error:
        _stop(f"what {service} sent is not an export: {error}")


def _reason(body: bytes, status: int) -> str:
    """The problem's own words, if it is one of mend-service."""
    with suppress(ValueError, KeyError, TypeError):
        problem = json.loads(body)
        return told_problem(problem) + KEY_ADVICE.get(problem["code"], "")
    return f"it answered with status {status}, and not as mend-service does"


def _unpack(zipped: BinaryIO, folder: Path) -> None:
    """Raises BadZipFile when it is damaged, would write anywhere else or more than was sent, or is no export."""
    with ZipFile(zipped) as archive:
        for entry in archive.infolist():
            if not _inside(folder, entry.filename):
                raise BadZipFile(f"it would write to {entry.filename!r}")
            if entry.compress_type != ZIP_STORED:
                raise BadZipFile(f"{entry.filename!r} in it is compressed")
        archive.extractall(folder)
    try:
        _read_index(folder)
    except (OSError, ValueError) as error:
        raise BadZipFile(f"it has no {INDEX} that can be read ({error})") from error


def _fill(out: Path, force: bool, write: Write) -> dict[str, Any]:
    """Write an export into a folder, whole or not at all, and return its index."""
    new = not out.exists()
    try:
        if not new and (not out.is_dir() or (any(out.iterdir()) and not force)):
            _stop(f"{out} is not an empty folder; name another, or write into the folder with --force")
        out.mkdir(parents=True, exist_ok=True)
        # Inside the folder, and so on the same disk, where moving a file is a matter of its name.
        with TemporaryDirectory(prefix=".mend-export-", dir=out) as draft:
            written = Path(draft, "files")
            written.mkdir()
            write(written)
            index = _read_index(written)
            _remove_export(out)
            files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda file: file == Path(INDEX)):
                (out / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(written / file, out / file)
        return index
    except BaseException as error:
        if new:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            _stop(f"the export cannot be written: {error}")
        raise


def _read_index(folder: Path) -> dict[str, Any]:
    """Raises ValueError when it is not that of an export."""
    index = json.loads((folder / INDEX).read_bytes())
    if not isinstance(index, dict) or not index.keys() >= TOLD:
        raise ValueError(f"it should say {', '.join(sorted(TOLD))}")
    return index


def _remove_export(out: Path) -> None:
    """What an earlier export left would mix with the new one: a merged model is not to find an adapter beside it."""
    with suppress(OSError, ValueError, TypeError):
        for name in [*_read_index(out)["files"], INDEX]:
            if _inside(out, name):
                (out / name).unlink(missing_ok=True)


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def _told(facts: dict[str, Any]) -> str:
    base, edits = facts["base_model"], facts["active_edits"]
    lines = [
        f"{facts['format']}, {edits} active {'edit' if edits == 1 else 'edits'}, written to {facts['folder']}",
        f"revision    {facts['revision']}, {facts['digest']}",
        f"base model  {base['ref']}, {base['digest']}",
        f"editor      {facts['editor']['name']}, {facts['editor']['digest']}",
    ]
    if "rank" in facts:
        lines.append(f"rank        {facts['rank']} at most, over {len(facts['ranks'])} weights")
    return "\n".join(lines)


def _stop(why: str) -> NoReturn:
    sys.exit(f"mend: {why}")
