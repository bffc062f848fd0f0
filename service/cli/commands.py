"""`mend edit`, `edits`, `generate` and `audit`: one request each to a running service.

Flow: options -> the fields of the API, which judges them -> its answer, in a line or two, or as it is with --json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from service.cli.client import connected, edit_path
from service.cli.client_command import (
    DEFAULT_SERVICE,
    DEFAULT_WAIT_S,
    LOST,
    ActorOption,
    IfMatchOption,
    JsonOption,
    KeyFileOption,
    ReasonOption,
    ServiceOption,
    WaitOption,
    stop,
)

ChatOption = Annotated[bool, typer.Option("--chat", help="What the user says to a chat model, by its own template.")]
SystemOption = Annotated[str | None, typer.Option(help="What the system says first, with --chat.")]


def edit(
    prompt: Annotated[
        str, typer.Argument(help="What is asked, as the model reads it; with --chat what the user says.")
    ],
    correction: Annotated[str, typer.Argument(help="What the answer should begin with.")],
    chat: ChatOption = False,
    system: SystemOption = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about, as it stands in the prompt.")] = None,
    paraphrase: Annotated[list[str], typer.Option(help="Another wording, to be judged; as often as wanted.")] = [],  # noqa: B006 - typer's idiom
    keep: Annotated[list[str], typer.Option(help="A prompt whose answer must stay, likewise.")] = [],  # noqa: B006
    check_form: Annotated[list[str], typer.Option(help="Ask the same as text, or as chat; likewise.")] = [],  # noqa: B006
    reason: ReasonOption = None,
    actor: ActorOption = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="An object of your own, for the ledger.")] = None,
    expires_at: Annotated[
        str | None, typer.Option(metavar="TIME", help="When it is rolled back by itself, as 2030-01-01T00:00:00Z.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge it, but do not make it.")] = False,
    on_conflict: Annotated[
        str, typer.Option(help="With an edit of nearly the same prompt: refuse, supersede or keep.")
    ] = "refuse",
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Make it although earlier edits would no longer hold.")
    ] = False,
    if_match: IfMatchOption = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Of the edit that this repeats; without it, a new one.")
    ] = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Correct a fact: what the model answers to PROMPT is to begin with CORRECTION from now on."""
    given = {"subject": subject, "paraphrases": paraphrase, "keep": keep, "check_forms": check_form, "reason": reason}
    given["expires_at"] = expires_at
    body: dict[str, Any] = {**_asked(prompt, chat, system), "correction": correction}
    body |= {name: value for name, value in given.items() if value not in (None, [])}
    if metadata is not None:
        try:
            body["metadata"] = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            stop(f"--metadata is not JSON: {error}")
    terms = {"dry_run": dry_run, "on_conflict": on_conflict, "allow_loss": allow_loss}
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        answer = running.change(
            "POST", "/edits", "before", query=terms, body=body, actor=actor, if_match=if_match, key=idempotency_key
        )
    typer.echo(answer.text if as_json else _told(answer.body))


def edits(
    edit_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only this one, with all that is known.")
    ] = None,
    status: Annotated[str | None, typer.Option(help="applied, superseded or rolled_back.")] = None,
    q: Annotated[str | None, typer.Option(help="Text in the prompt or the correction.")] = None,
    actor: Annotated[str | None, typer.Option(help="Text in the name of who made it.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Made then or later: 2030-01-31, or 2030-01-31T12:00:00Z.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Made then or before; a day with all of it, in UTC.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many at most.")] = 50,
    all_: Annotated[bool, typer.Option("--all", help="Every one, however many.")] = False,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List edits, newest first, or show one."""
    query = {"status": status, "q": q, "actor": actor, "since": since, "until": until}
    if edit_id is not None and any(value is not None for value in query.values()):
        stop(f"an ID names one edit already; leave out {', '.join(f'--{name}' for name in query)}")
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        if edit_id is not None:
            answer = running.read("GET", edit_path(edit_id), "prompt")
            typer.echo(answer.text if as_json else _shown(answer.body))
            return
        pages = list(running.edits(query, None if all_ else limit))
    items = [item for page in pages for item in page.body["items"]]
    if as_json:
        first, *more = pages
        whole = {**first.body, "items": items, "next_cursor": pages[-1].body["next_cursor"]}
        typer.echo(json.dumps(whole, ensure_ascii=False) if more else first.text)
        return
    for item in items:
        typer.echo(_listed(item))
    if not items:
        typer.echo("mend: no edits", err=True)
    elif pages[-1].body["next_cursor"] is not None:
        typer.echo(f"mend: there are more than {len(items)}; --limit or --all shows them", err=True)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    max_new_tokens: Annotated[int | None, typer.Option(help="So many at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0, or not given: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the probability, so much is sampled from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of so many tokens is sampled.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over 1: what was said is less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    stop_at: Annotated[list[str], typer.Option("--stop", help="The text ends before this; as often as wanted.")] = [],  # noqa: B006
    logprobs: Annotated[int | None, typer.Option(help="Tell tokens and so many alternatives, with --json.")] = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    view: Annotated[str | None, typer.Option(help="live, base, or both with a label each.")] = None,
    min_revision: Annotated[int | None, typer.Option(help="Of this revision, or a later one.")] = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, and print the text alone. With --stream and --json every event is a line."""
    if stream and view == "both" and not as_json:
        stop("a stream of both views has no order of its own; leave out --stream, or add --json")
    body = {
        **_asked(prompt, chat, system),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "stop": stop_at or None,
        "logprobs": logprobs,
        "stream": stream or None,
        "seed": seed,
        "view": view,
        "min_revision": min_revision,
    }
    given = {name: value for name, value in body.items() if value is not None}
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        if stream:
            _print_stream(running.stream("/generate", given), as_json=as_json)
            return
        answer = running.read("POST", "/generate", "live" if view == "both" else "text", body=given)
    if as_json:
        typer.echo(answer.text)
    elif view == "both":
        typer.echo(f"live: {answer.body['live']['text']}\nbase: {answer.body['base']['text']}")
    else:
        typer.echo(answer.body["text"])


def audit(
    fresh: Annotated[bool, typer.Option("--fresh", help="Look now, not at what was seen last.")] = False,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the active edits that no longer hold, and what they were lost to. Exit status 3 when there are any."""
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        answer = running.read("GET", "/edits/audit", "lost", query={"fresh": fresh})
    found = answer.body
    if as_json:
        typer.echo(answer.text)
    else:
        typer.echo(f"{found['held']} of {found['held'] + found['lost']} active edits hold at revision "
                   f"{found['revision']}, {found['digest']}")  # fmt: skip
        for each in found["edits"]:
            if not each["holds"]:
                typer.echo(_lost(each))
    if not found["current"]:
        typer.echo("mend: that revision is no longer the live one; --fresh looks at what is", err=True)
    if found["lost"]:
        raise typer.Exit(LOST)


def _asked(prompt: str, chat: bool, system: str | None) -> dict[str, Any]:
    """The fields of a prompt, or of a conversation that ends with it."""
    if system is not None and not chat:
        stop("--system is for a chat; add --chat")
    if not chat:
        return {"prompt": prompt}
    said = [("system", system)] if system is not None else []
    return {"messages": [{"role": role, "content": content} for role, content in (*said, ("user", prompt))]}


def _print_stream(events: Iterable[tuple[str, dict[str, Any]]], *, as_json: bool) -> None:
    for event, fields in events:
        if as_json:
            typer.echo(json.dumps({"event": event, **fields}, ensure_ascii=False))
        else:
            typer.echo(fields["text"] if event == "token" else "", nl=event == "done")


def _told(made: Mapping[str, Any]) -> str:
    """An edit that was asked for."""
    before, after = made["before"]["text"], made["after"]["text"]
    if made["status"] == "unchanged":
        return f"unchanged  revision {made['revision']}: {made['detail']}\n  {before!r}"
    first = f"{made['id'] or 'dry run'}  revision {made['revision']}{_failed(made['checks'])}"
    return f"{first}{_superseding(made)}\n  {before!r} -> {after!r}"


def _failed(checks: Mapping[str, Any]) -> str:
    """What did not come out as it should, although the edit was made."""
    failed = []
    if missed := [each for each in checks["paraphrases"] if not each["took"]]:
        failed.append(f"did not take: {', '.join(repr(each['prompt']) for each in missed)}")
    if missed := [each for each in checks["forms"] if not each["took"]]:
        failed.append(f"did not take as {' and '.join(each['form'] for each in missed)}")
    if moved := [each for each in checks["keep"] if not each["kept"]]:
        failed.append(f"did not stay: {', '.join(repr(each['prompt']) for each in moved)}")
    if checks["lost"]:
        failed.append(f"no longer hold: {', '.join(checks['lost'])}")
    return "".join(f"; {each}" for each in failed)


def _superseding(made: Mapping[str, Any]) -> str:
    return f"; supersedes {', '.join(made['supersedes'])}" if made["supersedes"] else ""


def _listed(item: Mapping[str, Any]) -> str:
    by = f"  by {item['actor']}" if item["actor"] else ""
    return (
        f"{item['id']}  {item['status']:<11}  revision {item['revision']}  {item['created_at'][:19]}  "
        f"{_question(item)!r} -> {item['correction']!r}{by}"
    )


def _question(item: Mapping[str, Any]) -> str:
    """What was asked; of a chat what the user said last."""
    return item["messages"][-1]["content"] if item["messages"] else item["prompt"]


def _shown(item: Mapping[str, Any]) -> str:
    lines = [
        _listed(item),
        f"  {item['before']['text']!r} -> {item['after']['text']!r}{_failed(item['checks'])}",
    ]
    if item["reason"]:
        lines.append(f"  reason: {item['reason']!r}")
    if item["expires_at"]:
        lines.append(f"  expires {item['expires_at'][:19]}")
    if item["superseded_by"]:
        lines.append(f"  superseded by {item['superseded_by']}")
    if by := item["rolled_back"]:
        who = f" by {by['actor']}" if by["actor"] else ""
        why = f": {by['reason']!r}" if by["reason"] else ""
        lines.append(f"  rolled back at revision {by['revision']}, {by['at'][:19]}{who}{why}")
    return "\n".join(lines)


def _lost(each: Mapping[str, Any]) -> str:
    says = "" if each["text"] is None else f", says {each['text']!r}"
    return (
        f"{each['id']}  {each['prompt']!r} -> {each['correction']!r}{says}; "
        f"lost to {each['lost_to'] or 'nothing that is known'}"
    )
