"""The engine: stage, judge, commit, publish; roll back; replay."""

from editors.decoding import Sampling
from service.engine.capacity import Capacity
from service.engine.engine import Engine
from service.engine.errors import (
    AlreadyRolledBack,
    DidNotTake,
    DrawdownExceeded,
    EditConflict,
    EditNotFound,
    EditRefused,
    EngineError,
    NotReady,
    RevisionMismatch,
    StateFull,
    TextTooLong,
    WouldBreakEdits,
)
from service.engine.guard import read_guard_prompts
from service.engine.requests import EditRequest, Limits, OnConflict, Outcome, Published

__all__ = [
    "AlreadyRolledBack",
    "Capacity",
    "DidNotTake",
    "DrawdownExceeded",
    "EditConflict",
    "EditNotFound",
    "EditRefused",
    "EditRequest",
    "Engine",
    "EngineError",
    "Limits",
    "NotReady",
    "OnConflict",
    "Outcome",
    "Published",
    "RevisionMismatch",
    "Sampling",
    "StateFull",
    "TextTooLong",
    "WouldBreakEdits",
    "read_guard_prompts",
]
