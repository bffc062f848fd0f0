"""`mend keys`: make, list and revoke the API keys of a service. It reads their file again by itself."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.api.keys import SCOPES, Key, KeysUnusable, changed, hashed, new_token, read_keys
from service.cli.client_command import stop

keys = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

ScopeName = StrEnum("ScopeName", {scope.upper(): scope for scope in SCOPES})
FileOption = Annotated[
    Path | None, typer.Option(envvar="MEND_API_KEYS", metavar="FILE", help="The file of keys of the service.")
]
NameArgument = Annotated[str, typer.Argument(help="Who holds the key: letters, digits and ._@-; the ledger names it.")]


@keys.command()
def create(
    name: NameArgument,
    scope: Annotated[ScopeName, typer.Option(help="read; edit, which may read too; admin, which may do all.")],
    days: Annotated[
        int | None, typer.Option(min=1, max=36500, help="It is good for so long; without it, for good.")
    ] = None,
    file: FileOption = None,
) -> None:
    """Make a key, and print it, once: the file holds its hash alone."""
    token, now = new_token(), datetime.now(UTC).replace(microsecond=0)
    try:
        key = Key(
            name=name,
            scope=scope.value,
            sha256=hashed(token),
            created_at=now,
            expires_at=now + timedelta(days=days) if days else None,
        )
    except ValidationError:
        stop(f"{name!r} is no name of a key: it takes up to 64 letters, digits and . _ @ -, a letter or digit first")
    path = _given(file)
    try:
        with changed(path) as held:
            if any(each.name == name for each in held):
                stop(f"there is a key named {name} already; revoke it first, or take another name")
            held.append(key)
    except KeysUnusable as error:
        stop(str(error))
    typer.echo(token)
    typer.echo(f"mend: {name} may {scope.value}; this key is not shown again. Its hash is in {path}", err=True)


@keys.command("list")
def list_keys(
    file: FileOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False
) -> None:
    """List the keys: name, scope, since when and until when; of the keys themselves nothing is known."""
    try:
        held = read_keys(_given(file))
    except KeysUnusable as error:
        stop(str(error))
    if as_json:
        typer.echo(json.dumps([key.model_dump(mode="json", exclude={"sha256"}) for key in held], indent=2))
        return
    for key in held:
        until = "" if key.expires_at is None else f"  {'expired' if key.expired else 'until'} {_day(key.expires_at)}"
        typer.echo(f"{key.name}  {key.scope:<5}  since {_day(key.created_at)}{until}")
    if not held:
        typer.echo("mend: no keys", err=True)


@keys.command()
def revoke(name: NameArgument, file: FileOption = None) -> None:
    """Take a key back: from its next request on it is refused. What it did stays in the ledger under its name."""
    path = _given(file)
    try:
        read_keys(path)  # which, unlike a change, takes no missing file for an empty one
        with changed(path) as held:
            found = [key for key in held if key.name == name]
            if not found:
                stop(f"there is no key named {name}; mend keys list shows them")
            held.remove(found[0])
    except KeysUnusable as error:
        stop(str(error))
    typer.echo(f"mend: {name} is revoked", err=True)


def _given(file: Path | None) -> Path:
    return file or stop("name the file of keys with --file or MEND_API_KEYS")


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M}"
