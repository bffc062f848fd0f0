"""The engine: stage, judge, commit, publish; roll back; replay."""

from editors.continuation import FinishReason, Scored, Wish
from editors.sampling import Sampling
from service.engine.asking import Ask, Ended, Event, Listener, Said, Ticket, Which
from service.engine.audit import Audit
from service.engine.batch import Tell
from service.engine.batch_items import BatchOutcome, ItemStatus
from service.engine.capacity import Capacity
from service.engine.drift import Drift, GuardPrompt
from service.engine.edit_weights import WeightChange
from service.engine.engine import Engine
from service.engine.errors import (
    AlreadyRolledBack,
    BatchRefused,
    BatchTooLarge,
    Busy,
    DidNotTake,
    DrawdownExceeded,
    EditConflict,
    EditNotFound,
    EditorChanged,
    EditRefused,
    EngineError,
    GenerationFailed,
    GenerationTimeout,
    IdempotencyKeyReused,
    ModelNotFound,
    NotReady,
    RevisionMismatch,
    StateFull,
    TextTooLong,
    WouldBreakEdits,
)
from service.engine.guard import read_guard_prompts
from service.engine.history import Edit
from service.engine.requests import CheckForm, EditRequest, Limits, Note, OnConflict, Outcome, Published
from service.engine.rollbacks import Reversal
from service.engine.scorer import Scores
from service.engine.series import MAX_POINTS, Point

__all__ = [
    "MAX_POINTS",
    "AlreadyRolledBack",
    "Ask",
    "Audit",
    "BatchOutcome",
    "BatchRefused",
    "BatchTooLarge",
    "Busy",
    "Capacity",
    "CheckForm",
    "DidNotTake",
    "DrawdownExceeded",
    "Drift",
    "Edit",
    "EditConflict",
    "EditNotFound",
    "EditRefused",
    "EditRequest",
    "EditorChanged",
    "Ended",
    "Engine",
    "EngineError",
    "Event",
    "FinishReason",
    "GenerationFailed",
    "GenerationTimeout",
    "GuardPrompt",
    "IdempotencyKeyReused",
    "ItemStatus",
    "Limits",
    "Listener",
    "ModelNotFound",
    "NotReady",
    "Note",
    "OnConflict",
    "Outcome",
    "Point",
    "Published",
    "Reversal",
    "RevisionMismatch",
    "Said",
    "Sampling",
    "Scored",
    "Scores",
    "StateFull",
    "Tell",
    "TextTooLong",
    "Ticket",
    "WeightChange",
    "Which",
    "Wish",
    "WouldBreakEdits",
    "read_guard_prompts",
]
