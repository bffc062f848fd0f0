"""`/replicas`: every service on the ledger of this one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from service.api.callers import needs
from service.api.headers import Loaded, tag
from service.api.problems import responses
from service.api.replica_views import ReplicaList, ReplicaView
from service.api.requests import NoQuery

router = APIRouter()


@router.get("/replicas", dependencies=[needs("read")], responses=responses(400, 422, 503))
def get_replicas(engine: Loaded, request: Request, response: Response, _: Annotated[NoQuery, Query()]) -> ReplicaList:
    """Every service on this ledger, the oldest first: what is live there, and how far behind the ledger that is.

    One that stops in order is gone at once, any other ten seconds after it was seen last.
    """
    service = request.app.state.service
    own_id, replicas = service.replicas()
    head = service.head()
    tag(response, engine.published)
    return ReplicaList(head=head, items=[ReplicaView.of(each, head, own_id) for each in replicas])
