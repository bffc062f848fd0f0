"""The engine: stage, judge, commit, publish; roll back; replay."""

from editors.decoding import Sampling
from service.engine.engine import Engine
from service.engine.errors import (
    AlreadyRolledBack,
    DidNotTake,
    DrawdownExceeded,
    EditNotFound,
    EditRefused,
    EngineError,
    NotReady,
    RevisionMismatch,
    TextTooLong,
    WouldBreakEdits,
)
from service.engine.guard import read_guard_prompts
from service.engine.requests import EditRequest, Limits, Outcome, Published

__all__ = [
    "AlreadyRolledBack",
    "DidNotTake",
    "DrawdownExceeded",
    "EditNotFound",
    "EditRefused",
    "EditRequest",
    "Engine",
    "EngineError",
    "Limits",
    "NotReady",
    "Outcome",
    "Published",
    "RevisionMismatch",
    "Sampling",
    "TextTooLong",
    "WouldBreakEdits",
    "read_guard_prompts",
]
