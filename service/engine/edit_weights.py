"""What one edit alone makes of the base's weights, worked out from its factors in the ledger.

Flow: factors -> rows of a state of its own, which nobody else sees -> rank and norm of each weight's change.
Nothing live is read or touched; one is worked out at a time, and never a whole change.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from editors.factors import Factors
from editors.magnitude import magnitude
from service.engine.errors import FactorsDropped
from service.engine.history import Edit, History
from service.engine.turns import MAX_READING, Places
from service.ledger import FactorsMissing, RedisLedger


@dataclass(frozen=True)
class WeightChange:
    """shape: (d_out, d_in). norm: Frobenius norm of the change. relative: to that of the base's weight."""

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative: float


class WeightChanges:
    def __init__(self, base: BaseModel, checkpoint: Checkpoint, ledger: RedisLedger, history: History) -> None:
        self._base, self._editor, self._ledger, self._history = base, checkpoint.editor, ledger, history
        self._places, self._working = Places("requests for what an edit does to weights", MAX_READING), threading.Lock()

    def of(self, edit_id: str) -> list[WeightChange]:
        """For every weight that may be edited. Raises EditNotFound, FactorsDropped; Busy; LedgerUnavailable."""
        edit = self._history.find(edit_id)
        with self._places.one(), self._working:
            rows = self._editor.joined([self._factors(edit)])
            return [self._change(target.name, *rows[target.name]) for target in self._editor.targets]

    @torch.no_grad()
    def _change(self, name: str, u: torch.Tensor, delta: torch.Tensor) -> WeightChange:
        found = magnitude(u, delta)
        whole = float(torch.linalg.vector_norm(self._base.model.get_parameter(name), dtype=torch.float64))
        shape = (delta.shape[1], u.shape[1])
        return WeightChange(name, shape, found.rank, found.norm, found.norm / whole if whole else 0.0)

    def _factors(self, edit: Edit) -> Factors:
        try:
            (raw,) = self._ledger.factors([edit.applied])
        except FactorsMissing as error:
            if self._history.find(edit.id).standing:  # as it is now
                raise
            raise FactorsDropped(edit.id) from error
        return Factors.from_bytes(raw)
