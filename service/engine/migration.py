"""Edits of another editor made anew by this one.

Factors belong to the editor that made them, so what is carried over is what was asked: prompts, corrections, and who
asked for them why. Flow: the other ledger's entries -> its active edits -> one batch, as anybody would send it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue

from editors.chat import Message
from service.engine.batch import Tell
from service.engine.batch_items import BatchOutcome
from service.engine.engine import Engine
from service.engine.errors import EditRefused
from service.engine.history import History
from service.engine.requests import EditRequest
from service.ledger import Applied, Entry


@dataclass(frozen=True)
class Migration:
    """What became of each edit of the other ledger.

    outcome: None where none was made. refusal: why, if they were refused as a whole.
    """

    edits: Sequence[Mapping[str, JsonValue]]
    outcome: BatchOutcome | None = None
    refusal: EditRefused | None = None

    @property
    def refused(self) -> int:
        return sum(edit["status"] == "refused" for edit in self.edits)


def migrate(
    engine: Engine, entries: Iterable[Entry], source: str, *, dry_run: bool, allow_loss: bool, tell: Tell
) -> Migration:
    """Make the active edits of another ledger with this engine's editor: all that can be made, as one transaction.

    source: name of that ledger. Doing it again, also after a crash, makes nothing twice.
    Raises what `Engine.apply_batch` raises, but refusals.
    """
    history = History()
    for entry in entries:
        history.record(entry)
    old = [edit.applied for edit in history.all_active()]
    if not old:
        return Migration([])
    outcome, refusal = None, None
    try:
        outcome = engine.apply_batch(
            [_asked_again(applied, source) for applied in old],
            dry_run=dry_run,
            partial=True,
            on_conflict="keep",
            allow_loss=allow_loss,
            tell=tell,
        )
        items = outcome.edits
    except EditRefused as error:
        refusal, items = error, error.facts.get("edits") or [{"status": "withheld"}] * len(old)
    edits = [_compared(applied, item) for applied, item in zip(old, items, strict=True)]
    return Migration(edits, outcome, refusal)


def _asked_again(applied: Applied, source: str) -> EditRequest:
    return EditRequest(
        prompt=applied.prompt,
        correction=applied.correction,
        subject=applied.subject,
        paraphrases=applied.paraphrases,
        keep=applied.keep,
        reason=applied.reason,
        actor=applied.actor,
        expires_at=applied.expires_at,
        messages=tuple(Message(each.role, each.content) for each in applied.messages),
        check_forms=applied.check_forms,
        metadata={**applied.metadata, "migrated_from": {"ledger": source, "id": applied.edit_id}},
    )


def _compared(old: Applied, item: Mapping[str, Any]) -> dict[str, JsonValue]:
    """One line of the report: what the model said with the other editor's edit, and what it says now."""
    checks, said = item.get("checks") or {}, item.get("after") or item.get("before") or {}
    paraphrases = checks.get("paraphrases", [])
    return {
        "id": old.edit_id,
        "prompt": old.prompt,
        "correction": old.correction,
        "status": item["status"],
        "new_id": item.get("id"),
        "code": item.get("code"),
        "said": old.after,
        "says": said.get("text"),
        "paraphrases_took": [
            sum(bool(each["took"]) for each in old.checks.get("paraphrases", [])),
            sum(bool(each["took"]) for each in paraphrases),
        ],
        "scale": [old.scale, item.get("scale")],
    }
