"""`mend rollback`, `tag`, `tags` and `kill-switch`: take edits back, name revisions, and serve the base in need.

Flow: options -> one request of the API -> its answer, in a line or a few, or as it is with --json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from service.cli.client import Refused, Service, connected, edit_path
from service.cli.client_command import (
    DEFAULT_SERVICE,
    DEFAULT_WAIT_S,
    REFUSED,
    ActorOption,
    IfMatchOption,
    JsonOption,
    KeyFileOption,
    ReasonOption,
    ServiceOption,
    WaitOption,
    stop,
)

BASE = "base"
"""As a target: revision 0."""
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would change, but do not change it.")]


def rollback(
    edit_ids: Annotated[list[str], typer.Argument(metavar="[ID…]", help="Which edits.")] = [],  # noqa: B006 - typer's idiom
    to: Annotated[
        str | None, typer.Option(metavar="REVISION|TAG|base", help="Everything, to the state of a revision.")
    ] = None,
    dry_run: DryRunOption = False,
    reason: ReasonOption = None,
    actor: ActorOption = None,
    if_match: IfMatchOption = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take edits back, exactly, or go back to a revision, which also returns what was taken back since.

    Of several edits, one that is refused does not keep the others; the exit status is 1 then. --if-match is for the
    first; each of the others expects the revision that the one before led to. Several answers with --json are a line
    each.
    """
    if bool(edit_ids) == (to is not None):
        stop("give the IDs of edits, or --to with a revision, a tag or base")
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        if to is not None:
            body = {**_target(to), "reason": reason}
            answer = running.change(
                "POST", "/rollback", "undo", query={"dry_run": dry_run}, body=body, actor=actor, if_match=if_match
            )
            typer.echo(answer.text if as_json else "\n".join(_restored(answer.body)))
        elif not _each(running, edit_ids, {"reason": reason, "dry_run": dry_run}, actor, if_match, as_json=as_json):
            raise typer.Exit(REFUSED)


def _target(to: str) -> dict[str, Any]:
    if to == BASE:
        return {"revision": 0}
    return {"revision": int(to)} if to.isascii() and to.isdigit() else {"tag": to}


def _each(
    running: Service,
    edit_ids: Sequence[str],
    query: Mapping[str, Any],
    actor: str | None,
    if_match: int | None,
    *,
    as_json: bool,
) -> bool:
    """Whether all were taken back."""
    refused = False
    for edit_id in edit_ids:
        try:
            answer = running.change(
                "DELETE", edit_path(edit_id), "revived", query=query, actor=actor, if_match=if_match
            )
        except Refused as error:
            refused = True
            typer.echo(f"mend: {error}", err=True)
            if as_json and error.body:
                typer.echo(error.body)
            continue
        if if_match is not None:
            if_match = answer.body["revision"]
        typer.echo(answer.text if as_json else "\n".join(_rolled_back(answer.body)))
    return not refused


def tag(
    name: Annotated[str, typer.Argument(help="Begins with a letter.")],
    revision: Annotated[int | None, typer.Option(min=0, help="What it names; without it, what is live.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the name away.")] = False,
    reason: ReasonOption = None,
    actor: ActorOption = None,
    if_match: IfMatchOption = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Name a revision, so that it can be gone back to, however much is compacted."""
    if remove and revision is not None:
        stop("--remove takes the name away from whatever it names; leave out --revision")
    path = f"/tags/{quote(name, safe='')}"
    asked = {"query": {"reason": reason}} if remove else {"body": {"revision": revision, "reason": reason}}
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        answer = running.change("DELETE" if remove else "PUT", path, "name", actor=actor, if_match=if_match, **asked)
    if as_json:
        typer.echo(answer.text)
    else:
        typer.echo(f"{name}  removed" if remove else _tagged(answer.body))


def tags(
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the tags, newest first."""
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        answer = running.read("GET", "/tags", "items")
    if as_json:
        typer.echo(answer.text)
        return
    for item in answer.body["items"]:
        typer.echo(_tagged(item))
    if not answer.body["items"]:
        typer.echo("mend: no tags", err=True)


def kill_switch(
    action: Annotated[str | None, typer.Argument(metavar="[engage|release]", help="Without it: how it is.")] = None,
    reason: ReasonOption = None,
    actor: ActorOption = None,
    if_match: IfMatchOption = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve the pristine base and let nobody change anything, until it is released; then all is as it was."""
    path, expects = "/kill-switch", "engaged"
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        if action is None:
            answer = running.read("GET", path, expects)
        elif action == "engage":
            answer = running.change("PUT", path, expects, body={"reason": reason}, actor=actor, if_match=if_match)
        elif action == "release":
            answer = running.change("DELETE", path, expects, query={"reason": reason}, actor=actor, if_match=if_match)
        else:
            stop(f"{action!r} is no action; give engage or release, or none")
    typer.echo(answer.text if as_json else _switched(answer.body))


def _rolled_back(done: Mapping[str, Any]) -> Iterator[str]:
    back = f"; {', '.join(done['revived'])} came back" if done["revived"] else ""
    if done["status"] == "dry_run":
        yield f"{done['id']}  dry run: {done['active_edits']} active edits"
        yield from _changes(done)
    else:
        yield f"{done['id']}  rolled back at revision {done['revision']}, {done['active_edits']} active edits{back}"


def _restored(done: Mapping[str, Any]) -> Iterator[str]:
    if done["status"] == "unchanged":
        yield f"unchanged  revision {done['revision']}, {done['active_edits']} active edits"
    else:
        undo = f"; --to {done['undo']['revision']} undoes it" if done["undo"] else ""
        at = "dry run" if done["status"] == "dry_run" else f"revision {done['revision']}"
        yield f"{at}: the state of revision {done['target']['revision']}, {done['active_edits']} active edits{undo}"
    yield from _changes(done)
    for edit_id in done["expired"]:
        yield f"  {edit_id}  has expired, and stays away"


def _changes(done: Mapping[str, Any]) -> Iterator[str]:
    for change in done["changes"]:
        said = f": {change['now']['text']!r} -> {change['then']['text']!r}" if change["now"] else ""
        yield f"  {change['id']}  {change['change']:<7}  {change['prompt']!r}{said}"


def _tagged(item: Mapping[str, Any]) -> str:
    by = f"  by {item['actor']}" if item["actor"] else ""
    why = f": {item['reason']!r}" if item["reason"] else ""
    return f"{item['name']}  revision {item['revision']}  {item['created_at'][:19]}{by}{why}"


def _switched(found: Mapping[str, Any]) -> str:
    how = "engaged: the base is served, and nothing can be changed" if found["engaged"] else "not engaged"
    by = f" by {found['actor']}" if found["actor"] else ""
    why = f": {found['reason']!r}" if found["reason"] else ""
    since = f"; since {found['at'][:19]}{by}{why}" if found["engaged"] else ""
    return f"{how}{since}\n  revision {found['revision']}, {found['active_edits']} active edits"
