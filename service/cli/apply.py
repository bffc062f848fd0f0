"""`mend apply`: bring the active edits to what a file of wanted corrections says.

Flow: file -> wanted; the service's active edits -> plan -> what the service foretells of it (dry run) -> consent ->
rollbacks -> one batch. Every request expects the revision that the plan was made at, or that the one before it led to.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, ValidationError

from service.cli.client import Refused, Service, connected, edit_path, told_problem
from service.cli.client_command import (
    DEFAULT_SERVICE,
    DEFAULT_WAIT_S,
    DRIFT,
    REFUSED,
    ActorOption,
    KeyFileOption,
    ReasonOption,
    ServiceOption,
    WaitOption,
    stop,
)

Action = Literal["create", "change", "remove", "keep", "refuse"]
PLANNED = {"create": "to create", "change": "to change", "remove": "to remove"}
DONE = {"create": "created", "change": "changed", "remove": "removed"}

MARK = "applied_by"
"""Member of the metadata of every edit that this command makes."""
BY = "mend apply"
SET = "applied_set"
"""Beside it, the name of the file's set: of several files that are applied to one service, each has its own."""


def _sound(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty or only white space")
    text.encode()  # raises ValueError of a lone surrogate
    return text


def _not_ours(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if metadata.keys() & {MARK, SET}:
        raise ValueError(f"{MARK} and {SET} are this command's own")
    return metadata


Text = Annotated[str, AfterValidator(_sound)]


class Wanted(BaseModel):
    """A correction in a file. What texts and numbers of them there may be, the service knows."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    correction: Text
    subject: Text | None = None
    paraphrases: list[Text] = []
    keep: list[Text] = []
    reason: str | None = None
    metadata: Annotated[dict[str, JsonValue], AfterValidator(_not_ours)] = {}


@dataclass
class Step:
    """What becomes of one prompt. entry: where it stands in the file. active: the edit that is on it now.

    foretold: what the service says of it before it is made. supersedes: ids of other active edits, of nearly the same
    prompt, whose place it takes too.
    """

    action: Action
    prompt: str
    entry: str | None = None
    wanted: Wanted | None = None
    active: Mapping[str, Any] | None = None
    foretold: str | None = None
    supersedes: list[str] = field(default_factory=list)

    @property
    def outlook(self) -> Action:
        if self.foretold == "refused":
            return "refuse"
        return "keep" if self.foretold == "unchanged" else self.action

    @property
    def sent(self) -> bool:
        """Also if the model says it already: what is rolled back before may be why it does."""
        return self.action in ("create", "change") and self.foretold != "refused"

    def shown(self) -> dict[str, Any]:
        return {
            "action": self.outlook,
            "entry": self.entry,
            "prompt": self.prompt,
            "correction": self.wanted and self.wanted.correction,
            "id": self.active and self.active["id"],
            "before": self.active and self.active["correction"],
            "supersedes": self.supersedes,
        }

    def told(self) -> str:
        texts = [self.active and self.active["correction"], self.wanted and self.wanted.correction]
        own = f"  ({self.active['id']})" if self.active else ""
        others = f"; takes the place of {', '.join(self.supersedes)} too" if self.supersedes else ""
        corrections = " -> ".join(repr(text) for text in texts if text is not None)
        return f"{self.outlook:<7} {self.prompt!r}: {corrections}{own}{others}"


def apply(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="YAML: a list of corrections, or `edits:` with one. Or JSON Lines (.jsonl), one a line.",
        ),
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit status 2 when something would be.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    prune: Annotated[
        bool, typer.Option(help="Take back what mend apply made for this set and the file no longer has.")
    ] = True,
    partial: Annotated[bool, typer.Option("--partial", help="Make what can be made, not all or none.")] = False,
    set_: Annotated[
        str, typer.Option("--set", metavar="NAME", help="Which file this is, of several for one service.")
    ] = "default",
    actor: ActorOption = None,
    reason: ReasonOption = None,
    service: ServiceOption = DEFAULT_SERVICE,
    wait: WaitOption = DEFAULT_WAIT_S,
    key_file: KeyFileOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and what was done as JSON.")] = False,
) -> None:
    """Bring the active edits to what FILE says: make what is missing, change what differs, take back what is gone.

    An entry has the fields of POST /edits: prompt, correction and, if wanted, subject, paraphrases, keep, reason and
    metadata. It is met by an active edit with that prompt, correction and subject (if it has one), or by what the
    model says anyway. Edits that others made are superseded where FILE has their prompt, and left alone otherwise.
    """
    wanted = read_wanted(file)
    with connected(service, wait, as_json=as_json, key_file=key_file) as running:
        target = Target(running, set_, actor, reason, partial)
        steps, revision = target.plan(wanted, prune)
        target.foretell(steps, revision)
        counts = Counter(step.outlook for step in steps)
        for step in steps:
            if step.outlook != "keep":
                typer.echo(step.told(), err=as_json)
        typer.echo(f"{_counted(counts, PLANNED)}; {counts['keep']} are so already", err=as_json)
        told = {"revision": revision, "plan": [step.shown() for step in steps], "rolled_back": [], "batch": None}
        drift = any(counts[action] for action in PLANNED)
        if drift and not check:
            if not yes:
                _ask(running)
            told |= target.carry_out(steps, revision)
            typer.echo(_result(told, steps), err=as_json)
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
    if counts["refuse"] or (told["batch"] and told["batch"]["refused"]):
        raise typer.Exit(REFUSED)
    if drift and check:
        raise typer.Exit(DRIFT)


class Target:
    """A service that is brought to what a file says, by the requests of one run."""

    def __init__(self, service: Service, set_: str, actor: str | None, reason: str | None, partial: bool) -> None:
        self._service, self._actor, self._reason, self._partial = service, actor, reason, partial
        self._mark = {MARK: BY, SET: set_}
        self._active: frozenset[str] = frozenset()
        """Ids of the active edits that the plan was made from."""

    def plan(self, wanted: Mapping[str, Wanted], prune: bool) -> tuple[list[Step], int]:
        """What is to become of every prompt, and the revision at which it was looked at. wanted: by entry."""
        pages = list(self._service.edits({"status": "applied"}, most=None))
        revision, *others = {page.revision for page in pages}
        if others or revision is None:
            stop("the edits changed while they were read, or came without their revision (ETag); try again")
        self._active = frozenset(edit["id"] for page in pages for edit in page.body["items"])
        active = {edit["prompt"]: edit for page in pages for edit in page.body["items"]}
        steps = [_step(entry, each, active.pop(each.prompt, None)) for entry, each in wanted.items()]
        if prune:
            steps += [Step("remove", prompt, active=edit) for prompt, edit in active.items() if self._made(edit)]
        return steps, revision

    def foretell(self, steps: Sequence[Step], revision: int) -> None:
        """Correct a plan by what the service says would become of it: what needs no edit, and what is refused.

        Before anything is rolled back: so a batch that is refused leaves everything as it was.
        """
        sent = [step for step in steps if step.sent]
        if not sent:
            return
        kept = {step.active["id"]: step for step in steps if step.action == "keep"}
        others = self._active - {step.active["id"] for step in steps if step.active and step.action != "keep"}
        for step, item in zip(sent, self._send(sent, revision, dry_run=True)["edits"], strict=True):
            step.foretold = item["status"]
            step.supersedes = [each for each in item.get("supersedes", []) if each in others]
            for other in (kept[each] for each in step.supersedes if each in kept):
                stop(
                    f"{step.entry} would take the place of {other.entry}, {other.prompt!r}: to the model their "
                    "prompts hardly differ. Nothing was changed; word one of them otherwise, or leave it out"
                )

    def carry_out(self, steps: Sequence[Step], revision: int) -> dict[str, Any]:
        """Roll back, then make the batch."""
        prompts = {step.prompt for step in steps if step.wanted}
        removed = [step.active["id"] for step in steps if step.action == "remove"]
        rolled_back = []
        for edit_id in removed:
            done = self._service.change(
                "DELETE", edit_path(edit_id), "revived",
                query={"reason": self._reason or "no longer wanted"}, actor=self._actor, if_match=revision,
            ).body  # fmt: skip
            revision = done["revision"]
            rolled_back.append(done)
            typer.echo(f"mend: {edit_id} is rolled back, at revision {revision}", err=True)
            # What it had superseded is back. What this command made for an earlier state of the file goes as well.
            for revived in done["revived"]:
                edit = self._service.read("GET", edit_path(revived), "prompt").body
                if self._made(edit) and edit["prompt"] not in prompts:
                    removed.append(revived)
        sent = [step for step in steps if step.sent]
        batch = self._send(sent, revision, dry_run=False) if sent else None
        return {"revision": batch["revision"] if batch else revision, "rolled_back": rolled_back, "batch": batch}

    def _send(self, steps: Sequence[Step], revision: int, *, dry_run: bool) -> dict[str, Any]:
        """One batch, or what would become of it. Tells of every edit that is refused. Raises as `Service.batch`."""
        typer.echo(f"mend: {'trying' if dry_run else 'making'} {len(steps)} edits …", err=True)
        query = {"dry_run": dry_run, "partial": self._partial, "on_conflict": "supersede"}
        bodies = [self._body(step.wanted) for step in steps]
        try:
            done = self._service.batch(bodies, query, actor=self._actor, if_match=revision)
        except Refused as error:
            done = error.problem
            _tell_refused(steps, done.get("edits", []))
            # So the service refuses a partial batch of which nothing is left.
            if not (dry_run and self._partial and done.get("code") == "batch_refused"):
                raise
        else:
            _tell_refused(steps, done["edits"])
        return done

    def _body(self, wanted: Wanted) -> dict[str, Any]:
        fields = wanted.model_dump(exclude_defaults=True)
        if self._reason is not None:
            fields.setdefault("reason", self._reason)
        return fields | {"metadata": {**wanted.metadata, **self._mark}}

    def _made(self, edit: Mapping[str, Any]) -> bool:
        return self._mark.items() <= edit["metadata"].items()


def _step(entry: str, wanted: Wanted, active: Mapping[str, Any] | None) -> Step:
    if active is None:
        action: Action = "create"
    else:
        same = active["correction"].strip() == wanted.correction.strip()
        same = same and wanted.subject in (None, active["subject"])
        action = "keep" if same else "change"
    return Step(action, wanted.prompt, entry, wanted, active)


def _ask(service: Service) -> None:
    if not sys.stdin.isatty():
        stop("nothing was changed: there is no terminal to ask on; --yes applies the plan without asking, --check only "
             "looks")  # fmt: skip
    if not typer.confirm(f"Apply this to {service.url}?", err=True):
        stop("nothing was changed")


def _tell_refused(steps: Sequence[Step], items: Sequence[Mapping[str, Any]]) -> None:
    for item in items:
        if item["status"] == "refused":
            typer.echo(f"mend: {steps[item['index']].entry}, {item['prompt']!r}: {told_problem(item)}", err=True)


def _counted(counts: Mapping[str, int], words: Mapping[str, str]) -> str:
    return ", ".join(f"{counts.get(action, 0)} {word}" for action, word in words.items())


def _result(told: Mapping[str, Any], steps: Sequence[Step]) -> str:
    sent = [step for step in steps if step.sent]
    items = told["batch"]["edits"] if told["batch"] else []
    counts = Counter(step.action for step, item in zip(sent, items, strict=True) if item["status"] == "applied")
    counts["remove"] = len(told["rolled_back"])
    return f"{_counted(counts, DONE)}; revision {told['revision']}"


# The file


def read_wanted(file: Path) -> dict[str, Wanted]:
    """The corrections of a file, by where they stand in it. Ends the command when one makes no sense."""
    readers = {".yaml": _yaml_entries, ".yml": _yaml_entries, ".jsonl": _lines}
    if file.suffix not in readers:
        stop(f"{file} should be YAML (.yaml, .yml) or JSON Lines (.jsonl)")
    try:
        raw = file.read_bytes()
    except OSError as error:
        stop(f"{file} cannot be read: {error.strerror}")
    if not raw.strip():
        # Half-written, more likely than meant; taken at its word it would take everything back.
        stop(f"{file} is empty; a file that wants no corrections is YAML and says `edits: []`")
    wanted: dict[str, Wanted] = {}
    by_prompt: dict[str, str] = {}
    for entry, fields in readers[file.suffix](file, raw):
        try:
            wanted[entry] = each = Wanted.model_validate(fields)
        except ValidationError as error:
            stop(f"{file}, {entry}: {_readable(error)}")
        if each.prompt in by_prompt:
            stop(f"{file}, {entry}: {by_prompt[each.prompt]} has the same prompt; leave one of them out")
        by_prompt[each.prompt] = entry
    return wanted


def _yaml_entries(file: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    import yaml

    try:
        data = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second of a date that there is not
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        stop(f"{file}{f', line {mark.line + 1}' if mark else ''} is not YAML: {' '.join(str(problem).split())}")
    if isinstance(data, dict) and data.keys() == {"edits"}:
        data = data["edits"]
    if not isinstance(data, list):
        stop(f"{file} should be a list of corrections, or have nothing but `edits:` with such a list")
    return ((f"entry {number}", fields) for number, fields in enumerate(data, 1))


def _lines(file: Path, raw: bytes) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # the former of bad UTF-8 too
                stop(f"{file}, line {number} is not JSON: {error}")


def _readable(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "model_type":
        return f"it should have at least a prompt and a correction, and is {first['input']!r}"
    if first["type"] == "extra_forbidden":
        return f"{name} is not a known field; the known ones are {', '.join(Wanted.model_fields)}"
    if first["type"] == "missing":
        return f"it has no {name}"
    if first["type"] == "string_type":
        return f"{name} should be text, and is {first['input']!r}; put it in quotes"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}"
