"""The engine: stage, judge, commit, publish; roll back; replay."""

from editors.decoding import Sampling
from service.engine.audit import Audit
from service.engine.batch import Tell
from service.engine.batch_items import BatchOutcome, ItemStatus
from service.engine.capacity import Capacity
from service.engine.engine import Engine
from service.engine.errors import (
    AlreadyRolledBack,
    BatchRefused,
    BatchTooLarge,
    DidNotTake,
    DrawdownExceeded,
    EditConflict,
    EditNotFound,
    EditorChanged,
    EditRefused,
    EngineError,
    IdempotencyKeyReused,
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

__all__ = [
    "AlreadyRolledBack",
    "Audit",
    "BatchOutcome",
    "BatchRefused",
    "BatchTooLarge",
    "Capacity",
    "CheckForm",
    "DidNotTake",
    "DrawdownExceeded",
    "Edit",
    "EditConflict",
    "EditNotFound",
    "EditRefused",
    "EditRequest",
    "EditorChanged",
    "Engine",
    "EngineError",
    "IdempotencyKeyReused",
    "ItemStatus",
    "Limits",
    "NotReady",
    "Note",
    "OnConflict",
    "Outcome",
    "Published",
    "Reversal",
    "RevisionMismatch",
    "Sampling",
    "StateFull",
    "Tell",
    "TextTooLong",
    "WouldBreakEdits",
    "read_guard_prompts",
]
