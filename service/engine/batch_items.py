"""The edits of a batch while it is worked on, and what became of each, as it is shown to the caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import JsonValue

from editors.errors import EditorsError
from editors.text import Tokens
from service.engine.conflicts import Place
from service.engine.entries import new_id
from service.engine.errors import EngineError
from service.engine.judge import Verdict
from service.engine.proposal import Draft
from service.engine.requests import EditRequest
from service.ledger import Applied

ItemStatus = Literal["applied", "dry_run", "unchanged", "refused", "withheld"]
"""withheld: nothing is known to be wrong with the edit, but its batch was refused."""
UNCHANGED = "unchanged"


@dataclass
class Item:
    """One edit of a batch. needless: whether the model says the correction without it.

    proposed: as it was worked out. draft: in the form in which it is tried.
    tokens: None of one that is invalid. invalid: why it cannot even be tried. refusal: why it is not made.
    searched: whether it is known at which scale it takes alone. margin_nats: when it was last tried.
    """

    index: int
    request: EditRequest
    tokens: Tokens | None = None
    invalid: EngineError | EditorsError | None = None
    refusal: EngineError | EditorsError | None = None
    id: str = field(default_factory=new_id)
    proposed: Draft | None = None
    draft: Draft | None = None
    before: str = ""
    needless: bool = False
    scale: float = 1.0
    searched: bool = False
    margin_nats: float = 0.0
    supersedes: tuple[str, ...] = ()
    place: Place | None = None
    verdict: Verdict | None = None

    @property
    def fits(self) -> bool:
        return self.refusal is None

    @property
    def changes(self) -> bool:
        return self.fits and not self.needless

    @property
    def staged(self) -> tuple[EditRequest, Tokens]:
        return self.request, self.tokens

    def shown(self, foretold: Applied | None = None) -> dict[str, JsonValue]:
        """What became of it, if it was not made. foretold: the entry that it would have."""
        if foretold is not None:
            return applied_shown(self.index, foretold, made=False)
        facts = dict(self.refusal.facts, code=self.refusal.code, detail=str(self.refusal)) if self.refusal else {}
        status = "refused" if self.refusal else UNCHANGED if self.needless else "withheld"
        after = {"after": {"text": self.verdict.after}} if self.verdict else {}
        return {"before": {"text": self.before}, **after, **facts, **_asked(self.index, self.request, status)}


@dataclass(frozen=True)
class BatchOutcome:
    """id: of the batch; None of one that made no edit. edits: what became of each, in order.

    checks: drawdown, its budget and the earlier edits that were lost, of all edits together.
    publish_ms: the steps that come after the entries were written, in milliseconds.
    """

    id: str | None
    revision: int
    digest: str
    edits: Sequence[Mapping[str, JsonValue]]
    checks: Mapping[str, JsonValue] = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    publish_ms: Mapping[str, float] = field(default_factory=dict)
    replayed: bool = False

    @property
    def committed(self) -> bool:
        return self.id is not None

    @property
    def status(self) -> Literal["applied", "unchanged", "dry_run", "replayed"]:
        if self.replayed or self.committed:
            return "replayed" if self.replayed else "applied"
        return "dry_run" if any(edit["status"] == "dry_run" for edit in self.edits) else "unchanged"


def made_batch(entries: Sequence[Applied]) -> BatchOutcome:
    """The outcome of a batch as its entries in the ledger tell it: the same whenever it is told."""
    *_, last = entries
    made, left_out = iter(entries), last.batch.left_out
    return BatchOutcome(
        last.batch.id,
        last.sequence,
        last.state_digest,
        [
            left_out[index] if index in left_out else applied_shown(index, next(made), made=True)
            for index in range(len(entries) + len(left_out))
        ],
        checks_of_all(last),
        last.timings_ms,
    )


def repeated_batch(entries: Sequence[Applied]) -> BatchOutcome:
    """The same, as a request that was made before is told it."""
    return replace(made_batch(entries), replayed=True)


def applied_shown(index: int, applied: Applied, *, made: bool) -> dict[str, JsonValue]:
    """An edit that was made, or (dry run) would be."""
    return {
        **_asked(index, applied, "applied" if made else "dry_run"),
        "id": applied.edit_id if made else None,
        "revision": applied.sequence if made else None,
        "scale": applied.scale,
        "before": {"text": applied.before},
        "after": {"text": applied.after},
        "checks": applied.checks,
        "supersedes": list(applied.supersedes),
    }


def checks_of_all(last: Applied) -> dict[str, JsonValue]:
    """What the last entry of a batch holds about all of it."""
    return {name: last.checks[name] for name in ("drawdown", "drawdown_budget", "lost")}


def _asked(index: int, request: EditRequest | Applied, status: ItemStatus) -> dict[str, JsonValue]:
    asked = {"index": index, "status": status, "prompt": request.prompt, "correction": request.correction}
    if request.messages:
        asked["messages"] = [{"role": each.role, "content": each.content} for each in request.messages]
    return asked
