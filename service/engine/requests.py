"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import JsonValue

from service.ledger import Applied

OnConflict = Literal["refuse", "supersede", "keep"]


@dataclass(frozen=True)
class Limits:
    """Bounds on what one request may ask for, in tokens. guard_budget: largest drawdown, 0 to 1.

    batch_edits: most edits of one batch. together, waiting: generations that are decoded at once, and that wait.
    generation_s: seconds that a generation may take, waiting included.
    """

    batch_edits: int = 5000
    prompt_tokens: int = 1024
    correction_tokens: int = 64
    new_tokens: int = 512
    answer_tokens: int = 16
    guard_budget: float = 0.3
    together: int = 16
    waiting: int = 64
    generation_s: float = 120.0


@dataclass(frozen=True)
class EditRequest:
    """What a caller wants corrected. keep: prompts whose answers must stay as the base's."""

    prompt: str
    correction: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    reason: str | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)
    actor: str | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None


@dataclass(frozen=True)
class Terms:
    """On which terms edits are made. dry_run: judge, but do not commit.

    on_conflict: what to do about an active edit whose prompt is hardly another, and whose answer is.
    allow_loss: although earlier edits would no longer hold. partial: of a batch, make those that can be made.
    """

    dry_run: bool = False
    on_conflict: OnConflict = "refuse"
    allow_loss: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a request. applied: the edit, as committed or (dry run) as it would have been.

    unchanged: the correction was the answer already, so there is no edit. committed: the ledger holds it.
    publish_ms: the steps that come after the entry was written, in milliseconds.
    """

    applied: Applied | None
    revision: int
    digest: str
    before: str
    committed: bool
    replayed: bool = False
    publish_ms: dict[str, float] = field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        return self.applied is None


@dataclass(frozen=True)
class Published:
    """The state that the live weights are in; replaced whole, so that readers see one or the other.

    fullness: how much of its capacity is taken, 0 to 1; None of a state that has no such figure.
    """

    revision: int
    digest: str
    active_edits: int
    fullness: float | None = None
