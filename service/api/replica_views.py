"""What is told of the services on one ledger. Field names are a contract: add to them, do not rename."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field

from service.ledger import Seen


class ReplicaView(BaseModel):
    """A service. id: of its process. revision: which is live there; lag: by how many entries that is behind the head;
    null while that is not known. seen_at: by the clock of Redis. self: the one that answers."""

    id: str
    host: str
    revision: int
    lag: int | None
    ready: bool
    version: str
    started_at: datetime
    seen_at: datetime
    itself: bool = Field(serialization_alias="self")

    @classmethod
    def of(cls, seen: Seen, head: int | None, own_id: str) -> Self:
        replica = seen.replica
        return cls(
            **replica.model_dump(),
            lag=None if head is None else max(0, head - replica.revision),
            seen_at=seen.at,
            itself=replica.id == own_id,
        )


class ReplicaList(BaseModel):
    """head: the last revision of the ledger. items: the oldest service first."""

    head: int | None
    items: list[ReplicaView]
