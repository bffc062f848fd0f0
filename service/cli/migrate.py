"""`mend ledger migrate`: carry the active edits of one editor's ledger over to another editor."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.options import read_settings, with_settings

REFUSED = 2
"""Exit status when some edits could not be made."""


@with_settings(
    "data_dir", "redis_url", "redis_server", "namespace", "base_model", "editor", "device", "dtype", "durability",
    "guard_prompts", "guard_budget",
)  # fmt: skip
def migrate(
    source: Annotated[
        str | None,
        typer.Option("--from", help="The ledger to take edits from, as `mend ledger list` names it; the other one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would become of each.")] = False,
    allow_loss: Annotated[bool, typer.Option("--allow-loss", help="Though earlier edits would be lost.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write what became of each edit here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    **flags: Any,
) -> None:
    """Make the edits of another editor again with this one (MEND_EDITOR), from their prompts, and report the changes.

    Their ledger stays as it is. Exit status 2 when some could not be made.
    """
    from service.app import EXPECTED, opened
    from service.engine.migration import migrate
    from service.ledger import RedisLedger

    settings = read_settings(flags).model_copy(update={"max_batch": sys.maxsize})
    if report and (report.is_dir() or not report.parent.is_dir()):
        sys.exit(f"mend: cannot write the report {report}: give a file in a folder that there is")
    if settings.editor is None:
        sys.exit("mend: name the editor to migrate to with --editor or MEND_EDITOR")
    try:
        with opened(settings) as (engine, embedded):
            own = engine.ledger.namespace
            source = _other(engine.ledger.namespaces(own.rpartition(":")[0] + ":"), own, source)
            url = embedded.url if embedded else settings.redis_url
            with closing(RedisLedger.connect(url, source)) as other:
                done = migrate(engine, other.read(), source, dry_run=dry_run, allow_loss=allow_loss, tell=_tell)
            revision, digest = engine.published.revision, engine.published.digest
    except EXPECTED as error:
        sys.exit(f"mend: {error}")
    told = {
        "from": source,
        "to": own,
        "dry_run": dry_run,
        "revision": revision,
        "digest": digest,
        "edits": list(done.edits),
    }
    text = json.dumps(told, indent=2, ensure_ascii=False)
    if report:
        report.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else _table(told))
    if done.refusal:
        typer.echo(f"mend: {done.refusal}", err=True)
    if done.refusal or done.refused:
        sys.exit(REFUSED)


def _other(names: list[str], own: str, wanted: str | None) -> str:
    others = [name for name in names if name != own and (wanted is None or name == wanted)]
    if len(others) != 1:
        known = ", ".join(name for name in names if name != own) or "none"
        sys.exit(f"mend: name the ledger to take edits from with --from; of this base model there are: {known}")
    return others[0]


def _tell(step: str, done: int, of: int) -> None:
    if done == of:
        typer.echo(f"mend: {step} {done}/{of}", err=True)


def _table(told: dict[str, Any]) -> str:
    lines = [
        f"{edit['status']:>9}  {edit['prompt']} {edit['correction'].strip()}"
        + (f"  ({edit['code']}; it says {edit['says']!r})" if edit["status"] == "refused" else "")
        for edit in told["edits"]
    ]
    counts = Counter(edit["status"] for edit in told["edits"])
    became = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no active edits"
    state = f"revision {told['revision']}, {told['digest']}"
    return "\n".join([*lines, f"{told['from']} -> {told['to']}: {became}; {state}"])
