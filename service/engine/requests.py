"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import JsonValue

from editors.chat import Message
from service.ledger import Applied

CheckForm = Literal["text", "chat"]
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
    """What a caller wants corrected. keep: prompts whose answers must stay as the base's.

    messages: a conversation that ends in the user's turn, to which the correction is the reply; the prompt is made of
    it, and so is what is asked for paraphrases and keep, each in place of its last turn.
    check_forms: in which forms the question is asked once more, to be reported: bare, or as a chat of one turn.
    expires_at: when it is to be rolled back by itself.
    """

    prompt: str
    correction: str
    subject: str | None = None
    paraphrases: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    reason: str | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)
    expires_at: datetime | None = None
    messages: tuple[Message, ...] = ()
    check_forms: tuple[CheckForm, ...] = ()
    actor: str | None = None
    idempotency_key: str | None = None
    request_digest: str | None = None


@dataclass(frozen=True)
class Note:
    """Who asks for a change, and why. request_digest: by which a repeated request is known, where there is a key."""

    actor: str | None = None
    reason: str | None = None
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

    prompt: as the model reads it. unchanged: the correction was the answer already, so there is no edit.
    committed: the ledger holds it.
    publish_ms: the steps that come after the entry was written, in milliseconds.
    """

    applied: Applied | None
    revision: int
    digest: str
    before: str
    committed: bool
    prompt: str
    replayed: bool = False
    publish_ms: dict[str, float] = field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        return self.applied is None

    @property
    def status(self) -> Literal["applied", "unchanged", "dry_run", "replayed"]:
        if self.replayed:
            return "replayed"
        if self.applied is None:
            return "unchanged"
        return "applied" if self.committed else "dry_run"

    @property
    def traced(self) -> dict[str, Any]:
        """What a trace may tell of it: no text."""
        facts: dict[str, Any] = {"revision": self.revision}
        if self.applied is not None:
            facts["scale"] = self.applied.scale
        return facts | {"edit_id": self.applied.edit_id} if self.committed else facts


@dataclass(frozen=True)
class Published:
    """The state that the live weights are in; replaced whole, so that readers see one or the other.

    fullness: how much of its capacity is taken, 0 to 1; None of a state that has no such figure.
    """

    revision: int
    digest: str
    active_edits: int
    fullness: float | None = None
