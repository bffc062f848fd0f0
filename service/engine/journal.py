"""The ledger, and what this process has made of it: commit what is staged, and follow what others wrote.

Flow: staged weights -> ledger -> history -> live weights; or ledger -> state and history -> live weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from editors.errors import EditorsError
from editors.factors import Factors
from service.engine.clock import Clock
from service.engine.errors import AlreadyRolledBack, EditNotFound, LedgerDiverged
from service.engine.history import Edit, History
from service.engine.weights import Weights
from service.ledger import Applied, Entry, RedisLedger


class Journal:
    """Used by the one writer alone."""

    def __init__(self, ledger: RedisLedger, history: History, weights: Weights) -> None:
        self._ledger, self._history, self._weights = ledger, history, weights
        self._last: Entry | None = None
        """The last entry that the state and the history hold; what is published may be behind it, never ahead."""

    def factors(self, edits: Iterable[Edit]) -> list[Factors]:
        """What edits add to the state, as the ledger holds it. Raises LedgerUnavailable, LedgerCorrupt."""
        return [Factors.from_bytes(self._ledger.factors(edit.applied.sequence)) for edit in edits]

    def commit(self, *stored: tuple[Entry, bytes]) -> dict[str, float]:
        """Make what is staged durable, with its factors, and then live. Returns the milliseconds of both steps.

        Raises LedgerConflict, LedgerUnavailable, EntryInvalid; then nothing is live. What fails later leaves what the
        ledger then holds to the next `catch_up`.
        """
        clock, (last, _) = Clock(), stored[-1]
        published = self._weights.as_published(last.sequence, last.state_digest)
        if len(stored) == 1:
            self._ledger.append(*stored[0])
        else:
            self._ledger.append_all(stored)
        clock.lap("commit")
        for entry, _ in stored:
            self._record(entry)
        self._weights.settle()
        self._weights.publish(published)
        clock.lap("publish")
        return clock.laps

    def catch_up(self) -> None:
        """Apply what the ledger holds beyond what is published. Raises LedgerUnavailable, LedgerDiverged."""
        head, published = self._ledger.head(), self._weights.published.revision
        if head < published:
            raise LedgerDiverged(
                f"the ledger ends at revision {head}, but this service has applied {published}: "
                "entries were lost; restore the Redis data, or restart the service to serve what is left",
                head=head,
                revision=published,
            )
        reached = self._last.sequence if self._last else 0
        if head == published == reached:
            return
        # The state keeps what was read even if reading breaks off: the next call goes on behind it.
        for entry, raw in self._ledger.read(after=reached):
            self._replay(entry, raw)
        last = self._last
        if last.state_digest is None:
            raise LedgerDiverged(
                f"the ledger ends at entry {last.sequence}, inside a batch; entries were lost: restore the Redis data",
                sequence=last.sequence,
            )
        actual = self._weights.state.digest()
        if actual != last.state_digest:
            raise LedgerDiverged(
                f"replaying the ledger to revision {last.sequence} gives the state {actual}, "
                f"but its entry says {last.state_digest}; do not trust this ledger with this model and editor",
                expected=last.state_digest,
                actual=actual,
            )
        self._weights.write_candidate()
        self._weights.publish(self._weights.as_published(last.sequence, last.state_digest))

    def _replay(self, entry: Entry, raw: bytes) -> None:
        """Take one entry of the ledger into the state. Raises LedgerDiverged when it does not follow on it."""
        try:
            change = self._history.change(entry)
            applied = [Factors.from_bytes(raw)] if isinstance(entry, Applied) else []
            self._weights.move(add=[*applied, *self.factors(change.returning)], remove=self.factors(change.leaving))
            self._record(entry)
        except (EditorsError, EditNotFound, AlreadyRolledBack) as error:
            raise LedgerDiverged(
                f"entry {entry.sequence} of the ledger cannot be applied: {error}; "
                "do not trust this ledger with this model and editor",
                sequence=entry.sequence,
            ) from error

    def _record(self, entry: Entry) -> None:
        self._history.record(entry)
        self._last = entry
