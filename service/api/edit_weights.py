"""`/edits/{edit_id}/weights`: how far one edit alone moves the base's weights."""

from __future__ import annotations

from typing import Self

from fastapi import APIRouter, Response
from pydantic import BaseModel

from service.api.callers import needs
from service.api.headers import Loaded, tag
from service.api.problems import responses
from service.engine import WeightChange

router = APIRouter()


class WeightView(BaseModel):
    """shape: [out, in]. rank: of the change; 0 where this edit leaves the weight as it is. norm: Frobenius norm of the
    change. relative: to that of the base's weight."""

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    relative: float

    @classmethod
    def of(cls, change: WeightChange) -> Self:
        return cls(**vars(change))


class EditWeightsView(BaseModel):
    """Every weight that the editor may edit. Beside other edits this one may do more or less than alone."""

    id: str
    items: list[WeightView]


@router.get("/edits/{edit_id}/weights", dependencies=[needs("read")], responses=responses(400, 404, 410, 422, 503))
def get_edit_weights(edit_id: str, engine: Loaded, response: Response) -> EditWeightsView:
    """What one edit alone makes of the base's weights, worked out from its factors in the ledger.

    Also of edits that were superseded or rolled back; 410 once compaction has dropped their factors.
    """
    changes = engine.weight_changes.of(edit_id)
    tag(response, engine.published)
    return EditWeightsView(id=edit_id, items=[WeightView.of(change) for change in changes])
