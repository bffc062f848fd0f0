"""`mend ledger`: what is in Redis, as a file and back, whether it is what was written, and made shorter.

Flow: settings -> the Redis of a service, running or not -> one of its ledgers -> what was asked. No model is loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn

import typer

from service.cli.options import read_settings, with_settings
from service.settings import Settings

if TYPE_CHECKING:
    from service.ledger import RedisLedger

ledger = typer.Typer(no_args_is_help=True, help="List, export, import, verify and compact the ledgers of a Redis.")

SETTINGS = ("data_dir", "redis_url", "redis_server", "namespace", "durability")
STDOUT = Path("-")
NameOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="NAME",
        help="Of several: its whole name in mend ledger list, or how it alone begins or ends.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


@ledger.command("list")
@with_settings(*SETTINGS)
def list_ledgers(as_json: JsonOption = False, **flags: Any) -> None:
    """List every ledger of a Redis, of any namespace: entries, active edits, size, time of the last entry."""
    with _redis(read_settings(flags)) as url:
        found = [_summary(url, name) for name in _names(url)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    elif not found:
        typer.echo("mend: this Redis holds no ledger", err=True)
    for facts in [] if as_json else found:
        typer.echo(f"{facts['namespace']}  {_told(facts)}")


@ledger.command("export")
@with_settings(*SETTINGS)
def export_file(
    file: Annotated[Path, typer.Argument(help="File to write, in gzip if its name ends in .gz; - is stdout.")],
    name: NameOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    **flags: Any,
) -> None:
    """Write a ledger to a file: every entry and all factors, byte for byte. A service may go on editing meanwhile."""
    from service.ledger import export_ledger

    if file != STDOUT and file.exists() and not (force and file.is_file()):
        _stop(f"{file} is there already; choose another file" + (", or replace it with --force" * file.is_file()))
    with _chosen(read_settings(flags), name) as opened, _draft(file) as draft:
        typer.echo(f"mend: exporting {opened.namespace} …", err=True)
        header = export_ledger(opened, draft, packed=file.suffix == ".gz")
    typer.echo(f"mend: {header.entries} entries, up to the link {header.chain}", err=True)
    if file != STDOUT:
        typer.echo(file)


@ledger.command("import")
@with_settings(*SETTINGS)
def import_file(
    file: Annotated[Path, typer.Argument(help="File that mend ledger export wrote.")], **flags: Any
) -> None:
    """Append what a ledger lacks of a file, which is verified first; a new ledger is made where there is none.

    It becomes the ledger of the model and the editor that it was exported from, in the namespace of the settings.
    """
    from service.ledger import LedgerFile, OutcomeUnknown, RedisLedger
    from service.ledger import import_file as append

    settings, source = read_settings(flags), LedgerFile(file)
    header = source.header
    namespace = f"{settings.namespace}:{header.model}:{header.editor}"
    if namespace != header.namespace:
        typer.echo(f"mend: {header.namespace} becomes {namespace}, as MEND_NAMESPACE says", err=True)
    typer.echo(f"mend: verifying {header.entries} entries …", err=True)
    source.require_sound()
    with (
        _redis(settings, make=True) as url,
        closing(RedisLedger.connect(url, namespace, settings.durability)) as opened,
    ):
        for weakness in opened.inspect().weaknesses:
            typer.echo(f"mend: warning: Redis may lose edits: {weakness}", err=True)
        typer.echo(f"mend: importing into {namespace} …", err=True)
        try:
            appended = append(source, opened)
        except OutcomeUnknown as error:
            _stop(f"Redis did not confirm that the last entries are durable ({error.facts['reason']}); import the file "
                  "again, which goes on where this has ended")  # fmt: skip
    typer.echo(f"{namespace}  {appended} of {header.entries} entries appended, up to the link {header.chain}")


@ledger.command()
@with_settings(*SETTINGS)
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="File of mend ledger export; without it, what is in Redis.")
    ] = None,
    name: NameOption = None,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Check every entry against the hash chain, and its factors against their digest; name all that are bad."""
    from service.ledger import LedgerFile, verify_ledger

    if file is None:
        with _chosen(read_settings(flags), name) as opened:
            typer.echo(f"mend: verifying {opened.namespace} …", err=True)
            what, found = opened.namespace, verify_ledger(opened)
    elif name is not None:
        _stop("--ledger is of Redis, and a file was named: leave one of them out")
    else:
        what, found = str(file), LedgerFile(file).verify()
    problems = [asdict(problem) for problem in found.problems]
    if as_json:
        facts = {"ledger": what, "ok": not problems, "entries": found.last, "good_entries": found.entries}
        facts |= {"good_factors": found.factors, "chain": found.chain, "problems": problems}
        typer.echo(json.dumps(facts, indent=2))
    else:
        for problem in found.problems:
            typer.echo(problem)
        end = f", up to the link {found.chain}" if found.chain else ""
        typer.echo(f"{found.entries} of {found.last} entries and {found.factors} factors are good{end}")
    raise typer.Exit(1 if problems else 0)


@ledger.command()
@with_settings(*SETTINGS)
def compact(name: NameOption = None, as_json: JsonOption = False, **flags: Any) -> None:
    """Fold the entries into a snapshot now, and drop the factors of edits that were rolled back."""
    with _chosen(read_settings(flags), name) as opened:
        typer.echo(f"mend: compacting {opened.namespace} …", err=True)
        done = opened.compact()
    facts = {"namespace": opened.namespace, "compacted": done is not None, **(asdict(done) if done else {})}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif done is None:
        typer.echo(f"{opened.namespace}  there is nothing to compact")
    else:
        typer.echo(f"{opened.namespace}  entries up to {done.sequence} are a snapshot of {done.snapshot_bytes} bytes; "
                   f"the factors of {done.dropped_factors} edits that were rolled back are dropped")  # fmt: skip


# Where the ledgers are


@contextmanager
def _redis(settings: Settings, *, make: bool = False) -> Iterator[str]:
    """The URL of the Redis of a service, whether it runs or not. make: also where there is none yet."""
    from service.ledger import EmbeddedRedis, EmbeddedRedisError

    if settings.redis_url is not None:
        yield settings.redis_url
        return
    if not make and not (settings.data_dir / "redis").is_dir():
        _stop(f"there is no ledger in {settings.data_dir}; point MEND_DATA_DIR at the folder of a service, or name "
              "its Redis with MEND_REDIS_URL")  # fmt: skip
    embedded = EmbeddedRedis(settings.data_dir, settings.redis_server)
    try:
        try:
            embedded.start()
        except EmbeddedRedisError as error:
            if "holder" not in error.facts:
                raise
            # The service that has the folder runs a Redis of its own, at the same URL as ours would be.
        yield embedded.url
    finally:
        embedded.stop()


def _names(url: str) -> list[str]:
    """Of every ledger of a service in a Redis."""
    from service.ledger import RedisLedger
    from service.ledger.file import NAMESPACE

    with closing(RedisLedger.connect(url, "")) as any_:
        return [name for name in any_.namespaces("") if re.match(NAMESPACE, name)]


@contextmanager
def _chosen(settings: Settings, name: str | None) -> Iterator[RedisLedger]:
    """The ledger that is meant."""
    from service.ledger import RedisLedger

    with _redis(settings) as url:
        namespace = _choose(_names(url), settings.namespace, name)
        with closing(RedisLedger.connect(url, namespace, settings.durability)) as opened:
            yield opened


def _choose(names: list[str], namespace: str, name: str | None) -> str:
    if name is None:
        found, whose = [each for each in names if each.startswith(f"{namespace}:")], f"of the namespace {namespace!r}"
    else:
        found = [name] if name in names else [each for each in names if each.startswith(name) or each.endswith(name)]
        whose = f"whose name is, begins or ends with {name!r}"
    if not names:
        _stop("this Redis holds no ledger at all; look at MEND_REDIS_URL or MEND_DATA_DIR")
    if len(found) != 1:
        number = len(found) or "no"
        _stop(f"this Redis holds {number} ledgers {whose}; choose with --ledger one of {', '.join(found or names)}")
    return found[0]


def _summary(url: str, name: str) -> dict[str, Any]:
    from service.engine.errors import EngineError
    from service.engine.history import History
    from service.ledger import LedgerCorrupt, RedisLedger

    history, entry = History(), None
    with closing(RedisLedger.connect(url, name)) as opened:
        try:
            for entry in opened.read():
                history.record(entry)
        except (LedgerCorrupt, EngineError) as error:
            return {"namespace": name, "problem": str(error)}
        return {
            "namespace": name,
            "entries": entry.sequence if entry else 0,
            "active_edits": len(history.all_active()),
            "size_bytes": opened.size_bytes(),
            "last_entry_at": entry.created_at.isoformat() if entry else None,
        }


def _told(facts: dict[str, Any]) -> str:
    if "problem" in facts:
        return f"damaged: {facts['problem']}"
    return (
        f"{facts['entries']} entries, {facts['active_edits']} active edits, {facts['size_bytes'] / 1e6:.1f} MB, "
        f"last at {facts['last_entry_at']}"
    )


@contextmanager
def _draft(file: Path) -> Iterator[BinaryIO]:
    """What becomes the file, or goes to stdout, when it is whole. It can be read by its owner alone."""
    if file == STDOUT:
        with TemporaryFile() as draft:
            yield draft
            draft.seek(0)
            shutil.copyfileobj(draft, typer.get_binary_stream("stdout"))
        return
    try:
        with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as draft:
            try:
                yield draft
                draft.flush()
                os.fsync(draft.fileno())
                os.replace(draft.name, file)
            except BaseException:
                os.unlink(draft.name)
                raise
    except OSError as error:
        _stop(f"{file} cannot be written: {error.strerror or error}")


def _stop(why: str) -> NoReturn:
    sys.exit(f"mend: {why}")
