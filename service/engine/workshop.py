"""What making an edit takes. Used by the one writer alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from editors.base_model import BaseModel
from service.engine.answers import Answers
from service.engine.history import History
from service.engine.journal import Journal
from service.engine.judge import Judge
from service.engine.proposal import Proposer
from service.engine.weights import Weights
from service.telemetry import Telemetry


@dataclass(frozen=True)
class Workshop:
    """margin_nats: how far ahead each token of a correction should be (see `editors.scale`).

    give_way: called between steps; raises KillSwitchEngaged where a change has to stop.
    """

    base: BaseModel
    answers: Answers
    weights: Weights
    history: History
    journal: Journal
    proposer: Proposer
    judge: Judge
    margin_nats: float
    give_way: Callable[[], None]
    telemetry: Telemetry
