"""Every error of the engine.

    EngineError
    ├── NotReady                 the model is still loading, or the ledger cannot be followed
    ├── Busy                     as many requests wait as may
    ├── EditRefused              judged and found wanting; the live weights are unchanged
    │   ├── DidNotTake           greedy decoding does not say the correction, at any scale
    │   ├── DrawdownExceeded     unrelated behaviour moved more than the budget
    │   ├── WouldBreakEdits      earlier edits would no longer hold
    │   ├── EditConflict         hardly another prompt than that of an active edit with another answer
    │   ├── StateFull            the active edits leave no room
    │   └── BatchRefused         some edits of a batch were refused, and so were all
    ├── BatchTooLarge            more edits, or more bytes, than one transaction can hold
    ├── DuplicatePrompt          a prompt that stands in the same batch before
    ├── EditNotFound
    ├── AlreadyExpired           an edit is to be made until a time that is over
    ├── AlreadyRolledBack
    ├── AlreadyStanding          an entry returns an edit that was never taken back
    ├── RevisionNotFound         nothing was ever live under this number
    ├── RevisionNotRestorable    what stood at a revision is no longer kept
    ├── FactorsDropped           those of an edit that was rolled back are no longer kept
    ├── TagNotFound
    ├── KillSwitchEngaged        no change is made until it is released, and none that is under way goes on
    ├── RevisionMismatch         the caller's expected revision is not the current one
    ├── RevisionNotReached       the caller wants a revision that is not live here, or not yet
    ├── ModelNotFound            of the models that are served none has that name
    ├── UnknownToken             a prompt of tokens that the model does not have
    ├── GenerationFailed         the model could not go on with a text
    ├── GenerationTimeout        no place became free in time
    ├── IdempotencyKeyReused     the same key with another request
    ├── RequestInFlight          the same request is being worked on
    ├── TextTooLong
    ├── LedgerDiverged           the ledger is not the one that this process has applied
    └── EditorChanged            the ledger's edits were made with another editor, which nobody took away on purpose

They carry facts and a stable `code`, and know nothing of HTTP.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of the engine's errors. `facts` is what a caller may show."""

    code = "engine_error"

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class NotReady(EngineError):
    code = "not_ready"


class Busy(EngineError):
    code = "busy"


class EditRefused(EngineError):
    code = "edit_refused"


class DidNotTake(EditRefused):
    code = "did_not_take"


class DrawdownExceeded(EditRefused):
    code = "drawdown_exceeded"


class WouldBreakEdits(EditRefused):
    code = "would_break_edits"


class EditConflict(EditRefused):
    code = "edit_conflict"


class StateFull(EditRefused):
    code = "state_full"


class BatchRefused(EditRefused):
    code = "batch_refused"


class BatchTooLarge(EngineError):
    code = "batch_too_large"


class DuplicatePrompt(EngineError):
    code = "duplicate_prompt"


class EditNotFound(EngineError):
    code = "edit_not_found"

    def __init__(self, edit_id: str) -> None:
        super().__init__(f"there is no edit {edit_id!r}; GET /edits lists them", id=edit_id)


class AlreadyExpired(EngineError):
    code = "already_expired"


class AlreadyRolledBack(EngineError):
    code = "already_rolled_back"


class AlreadyStanding(EngineError):
    code = "already_standing"


class RevisionNotFound(EngineError):
    code = "revision_not_found"


class RevisionNotRestorable(EngineError):
    code = "revision_not_restorable"


class FactorsDropped(EngineError):
    code = "factors_dropped"

    def __init__(self, edit_id: str) -> None:
        super().__init__(
            f"the factors of edit {edit_id!r} were dropped by compaction after it was rolled back, so what it did to "
            "the weights can no longer be worked out; GET /edits/{edit_id} still tells what was measured",
            id=edit_id,
        )


class TagNotFound(EngineError):
    code = "tag_not_found"


class KillSwitchEngaged(EngineError):
    code = "kill_switch_engaged"


class RevisionMismatch(EngineError):
    code = "revision_mismatch"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(
            f"expected revision {expected}, but the service is at revision {actual}; read again and retry",
            expected=expected,
            revision=actual,
        )


class RevisionNotReached(EngineError):
    code = "revision_not_reached"

    def __init__(self, wanted: int, actual: int) -> None:
        super().__init__(
            f"revision {wanted} is not live here yet, this is {actual}; try again, or wait longer with wait_ms",
            wanted=wanted,
            revision=actual,
        )


class ModelNotFound(EngineError):
    code = "model_not_found"


class UnknownToken(EngineError):
    code = "unknown_token"


class GenerationFailed(EngineError):
    code = "generation_failed"


class GenerationTimeout(EngineError):
    code = "generation_timeout"


class IdempotencyKeyReused(EngineError):
    code = "idempotency_key_reused"


class RequestInFlight(EngineError):
    code = "request_in_flight"


class TextTooLong(EngineError):
    code = "text_too_long"


class LedgerDiverged(EngineError):
    code = "ledger_diverged"


class EditorChanged(EngineError):
    code = "editor_changed"
