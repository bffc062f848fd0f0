"""Which services are on a ledger now: each announces itself over and over, and is forgotten when it no longer does.

    mend:{<namespace>}:replicas    stream: when, by the clock of Redis -> id, and what it says of itself; "" if it left

Flow: Replica -> announce -> the last seconds of all announcements -> list -> Replica, with the time it was seen.
It is beside the ledger: no entry of it, in no export, and nothing but `list` depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from service.ledger.connection import Connection
from service.ledger.scripts import ANNOUNCE, LIST

FORGOTTEN_AFTER_S = 10.0


class Replica(BaseModel):
    """What a service says of itself. id: of its process alone. revision: which is live there."""

    # What a later version says beyond this is no reason to overlook it.
    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    host: str
    revision: int
    ready: bool
    version: str
    started_at: AwareDatetime


@dataclass(frozen=True)
class Seen:
    """at: by the clock of Redis."""

    replica: Replica
    at: datetime


class Replicas:
    """Those of one ledger. key: of their stream. forgotten_after_s: since they last announced themselves."""

    def __init__(self, connection: Connection, key: str, forgotten_after_s: float = FORGOTTEN_AFTER_S) -> None:
        self._connection, self._key = connection, key
        self._kept_ms = int(1000 * forgotten_after_s)

    def announce(self, replica: Replica) -> None:
        """Say that a service is there. Raises LedgerError."""
        self._run(ANNOUNCE, replica.id, replica.model_dump_json())

    def leave(self, replica: Replica) -> None:
        """Say that it is there no more. Raises LedgerError."""
        self._run(ANNOUNCE, replica.id, "")

    def list(self, asking: Replica) -> list[Seen]:
        """Every service that is there, the oldest first; the one that asks announces itself. Raises LedgerError."""
        newest: dict[bytes, tuple[bytes, bytes]] = {}
        for stored_id, fields in self._run(LIST, asking.id, asking.model_dump_json()):
            if len(fields) == 4:
                newest[fields[1]] = stored_id, fields[3]
        seen = [each for stored_id, said in newest.values() if (each := _seen(stored_id, said))]
        return sorted(seen, key=lambda each: (each.replica.started_at, each.replica.id))

    def _run(self, script: str, replica_id: str, said: str) -> list[tuple[bytes, list[bytes]]]:
        return self._connection.ask(
            lambda client: client.eval(script, 1, self._key, replica_id, said, str(self._kept_ms))
        )


def _seen(stored_id: bytes, said: bytes) -> Seen | None:
    """None of one that left, and of what no service wrote."""
    try:
        replica = Replica.model_validate_json(said)
    except ValidationError:
        return None
    return Seen(replica, datetime.fromtimestamp(int(stored_id.partition(b"-")[0]) / 1000, UTC))
