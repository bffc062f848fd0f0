"""What is wrong here: whether Redis answers and keeps what it is told, and whether the state here is the ledger's.

Two threads, since to apply what others appended may take long, and nobody should take Redis for gone meanwhile: one
looks after Redis and announces this service to the others (`look_after`), one follows the ledger (`follow`). A look
that takes too long, as in a name server that does not answer, is trouble too.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from uuid import uuid4

from editors.errors import EditorsError
from service.engine import Engine, EngineError
from service.ledger import (
    EmbeddedRedis,
    EmbeddedRedisError,
    LedgerError,
    LedgerNotDurable,
    LedgerUnavailable,
    Replica,
    Seen,
)

logger = logging.getLogger("mend")

WATCH_EVERY_S = 1.0
"""Between two looks at whether Redis is well, at most; what other services append is followed at once."""
BUSY_WAIT_S = 0.1
LOOK_HOLDS_S = 10.0
"""How long one is worth anything. One that fails takes less, unless it hangs where there is no timeout."""
LAST_LOOK_ENDS_WITHIN_S = 5.0
OWN = (EditorsError, EngineError, LedgerError)
EXPECTED = (*OWN, OSError, ValueError)
"""What may go wrong at a start and says why in one line; anything else is a mistake of ours."""

Trouble = dict[str, str]
"""What is wrong, by the part that it is wrong with: `ledger`, `durability`, `state`."""


def of_ours(error: Exception) -> str:
    """What is told of an unexpected error: its message may quote what somebody wrote."""
    return f"an error on our side ({type(error).__name__}), which the log tells of"


class Watch:
    """engine: that has replayed its ledger. embedded: its Redis, where that is one of our own. stopping: ends it."""

    def __init__(self, engine: Engine, embedded: EmbeddedRedis | None, version: str, stopping: threading.Event) -> None:
        self._engine, self._embedded, self._stopping = engine, embedded, stopping
        self._looker = threading.Thread(target=self._look_after, name="watch", daemon=True)
        self._looked_at = time.monotonic()
        self._looking: Trouble = {}
        self._following: Trouble = {}
        self._mutex = threading.Lock()
        self._announced = True
        self._itself = Replica(
            id=uuid4().hex,
            host=socket.gethostname(),
            revision=0,
            ready=True,
            version=version,
            started_at=datetime.now(UTC),
        )
        self.id = self._itself.id
        self.warnings: tuple[str, ...] = ()
        """How Redis may lose edits, where that is accepted."""
        self.mismatches = 0
        """How often this replica took itself out because its state is not that of the ledger."""

    @property
    def trouble(self) -> Trouble:
        """What is wrong now, as everybody may be told; nothing where all is well."""
        overdue = (time.monotonic() - self._looked_at) // LOOK_HOLDS_S
        # In steps, so that who is told of every change is not told each second.
        late = {"ledger": f"not looked at for {overdue * LOOK_HOLDS_S:g} s"} if overdue else {}
        return {**self._following, **self._looking, **late}

    def run(self) -> None:
        """Watch until it is time to stop, in this thread and another one."""
        self._looker.start()
        while not self._stopping.is_set():
            self.follow()
            self._await_news()
        self._looker.join(LAST_LOOK_ENDS_WITHIN_S)

    def replicas(self) -> list[Seen]:
        """Every service on this ledger, this one among them. Raises LedgerError."""
        return self._engine.ledger.replicas.list(self._as_it_is())

    # Redis

    def _look_after(self) -> None:
        while not self._stopping.is_set():
            self.look()
            revision = self._announce()
            if self.trouble:
                self._stopping.wait(WATCH_EVERY_S)
            else:
                self._engine.weights.wait(revision + 1, WATCH_EVERY_S)
        self._leave()

    def look(self) -> None:
        """Bring the embedded Redis back if it died, and ask Redis how it is."""
        trouble = self._found(self._inspect, "ledger", self._looking)
        with self._mutex:
            before = {**self._following, **self._looking}
            self._looking, self._looked_at = trouble, time.monotonic()
            self._say(before)

    def _inspect(self) -> Trouble:
        if self._embedded is not None:
            self._embedded.ensure_running()
        durability = self._engine.ledger.inspect()
        self._warn(durability.weaknesses)
        return {"ledger": f"{durability.server} stores nothing: {durability.refuses}"} if durability.refuses else {}

    def _warn(self, weaknesses: Sequence[str]) -> None:
        for weakness in weaknesses:
            if weakness not in self.warnings:
                logger.warning("Redis may lose edits: %s", weakness)
        self.warnings = tuple(weaknesses)

    def _announce(self) -> int:
        """Tell the other services of this one; nothing depends on it. Returns the revision that they are told."""
        itself = self._as_it_is()
        if "ledger" in self.trouble:
            return itself.revision
        try:
            self._engine.ledger.replicas.announce(itself)
        except Exception as error:
            if self._announced:
                said = str(error) if isinstance(error, OWN) else of_ours(error)
                logger.warning("this service is missing in GET /replicas: %s", said)
            self._announced = False
        else:
            self._announced = True
        return itself.revision

    def _leave(self) -> None:
        if not self._announced or "ledger" in self.trouble:
            return
        try:
            self._engine.ledger.replicas.leave(self._itself)
        except Exception as error:  # the others will see that it is gone
            logger.debug("this service did not take leave: %s", type(error).__name__)

    def _as_it_is(self) -> Replica:
        now = {"revision": self._engine.published.revision, "ready": not self.trouble}
        return self._itself.model_copy(update=now)

    # The ledger

    def follow(self) -> None:
        """Apply what the ledger holds beyond what is live here."""
        trouble = self._found(self._catch_up, "state", self._following)
        with self._mutex:
            before = {**self._following, **self._looking}
            self._following = trouble
            self._say(before)

    def _catch_up(self) -> Trouble:
        if self._engine.follow():
            return {}
        self._stopping.wait(BUSY_WAIT_S)  # a change is under way, and would be first to see what is new
        return {part: said for part, said in self._following.items() if part == "state"}

    def _await_news(self) -> None:
        """Until somebody appends to the ledger, or it is time to look again."""
        if self.trouble:
            self._stopping.wait(WATCH_EVERY_S)
            return
        engine = self._engine
        try:
            engine.ledger.wait(max(engine.published.revision, engine.reached), WATCH_EVERY_S)
        except Exception:  # what is wrong is told by whoever looks
            self._stopping.wait(WATCH_EVERY_S)

    # Both

    def _found(self, look: Callable[[], Trouble], part: str, before: Trouble) -> Trouble:
        """What a look finds. part: that is wrong if it fails by itself. before: what it found last."""
        try:
            return look()
        except LedgerNotDurable as error:
            self._warn(error.facts["weaknesses"])
            return {"durability": str(error)}
        except (LedgerUnavailable, EmbeddedRedisError) as error:
            return {"ledger": self._gone(error, before)}
        except OWN as error:
            return {part: str(error)}
        except Exception as error:  # the watch goes on, whatever it was
            return {part: self._unexpected(error, before)}

    def _unexpected(self, error: Exception, before: Trouble) -> str:
        said = of_ours(error)
        if said not in before.values():
            logger.exception("an error on our side")
        return said

    def _gone(self, error: LedgerUnavailable | EmbeddedRedisError, before: Trouble) -> str:
        """Where Redis is, and its own words, are for the log."""
        said = f"{error.brief}; the log says where, and more"
        if said not in before.values():
            logger.error("%s", error)
        return said

    def _say(self, before: Trouble) -> None:
        """Log what has changed."""
        trouble = {**self._following, **self._looking}
        for part, said in trouble.items():
            if before.get(part) != said:
                logger.error("%s: %s", part, said)
        if before and not trouble:
            logger.info("the ledger is back")
        if "state" in trouble and "state" not in before:
            self.mismatches += 1
