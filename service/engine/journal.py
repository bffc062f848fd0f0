"""The ledger, and what this process has made of it: commit what is staged, and follow what others wrote.

Flow: staged weights -> ledger -> history -> live weights; or ledger -> history -> state -> live weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from editors.errors import EditorsError
from editors.factors import Factors
from service.engine.clock import Clock
from service.engine.errors import EngineError, LedgerDiverged
from service.engine.history import Edit, History
from service.engine.requests import Published
from service.engine.weights import Weights
from service.failpoints import reach
from service.ledger import Entry, FactorsMissing, RedisLedger, Restored, decode
from service.telemetry import Telemetry


class Journal:
    """Used by the one writer alone."""

    def __init__(self, ledger: RedisLedger, history: History, weights: Weights, telemetry: Telemetry) -> None:
        self._ledger, self._history, self._weights, self._telemetry = ledger, history, weights, telemetry
        self._last: Entry | None = None
        """The last entry that the state and the history hold; what is published may be behind it, never ahead."""

    @property
    def reached(self) -> int:
        """The sequence of that entry."""
        return self._last.sequence if self._last else 0

    def factors(self, edits: Iterable[Edit]) -> list[Factors]:
        """What edits add to the state, as the ledger holds it.

        Raises LedgerUnavailable, LedgerCorrupt, LedgerDiverged.
        """
        edits = list(edits)
        stored = self._ledger.factors(edit.applied for edit in edits)
        return [_decoded(edit, raw) for edit, raw in zip(edits, stored, strict=True)]

    def commit(self, *stored: tuple[Entry, bytes], needs: Iterable[Edit] = ()) -> dict[str, float]:
        """Make what is staged durable, with its factors, and then live. Returns the milliseconds of both steps.

        needs: edits whose factors must be kept still.
        Raises LedgerConflict, LedgerUnavailable, FactorsMissing, EntryInvalid; then nothing is live. What fails later
        leaves what the ledger then holds to the next `catch_up`.
        """
        with Clock(self._telemetry) as clock:
            clock.begin("commit")
            last, _ = stored[-1]
            published = self._weights.as_published(last.sequence, last.state_digest)
            if len(stored) == 1:
                self._ledger.append(*stored[0], needs=[edit.applied for edit in needs])
            else:
                self._ledger.append_all(stored)
            clock.begin("publish")
            for entry, _ in stored:
                self._record(entry)
            self._weights.settle()
            reach("settle")
            self._publish(published)
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
        if head == published == self.reached:
            return
        entries = self._read_on()
        try:
            self._replay(entries)
        except FactorsMissing:
            if not entries or self._ledger.head() == entries[-1].sequence:
                raise
            # Their edit was rolled back, and they were dropped, since its entry was read: as the entries say now.
            self._replay(self._read_on())
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
                revision=published,
            )
        reach("replay")
        self._weights.write_candidate()
        self._publish(self._weights.as_published(last.sequence, last.state_digest))

    def _publish(self, published: Published) -> None:
        self._weights.publish(published)
        self._telemetry.published()

    def sees_kill(self) -> int | None:
        """Where the kill switch is engaged beyond what was reached. For any thread, while the writer is at work."""
        for _, fields in self._ledger.page(self.reached, snapshot=False):
            entry = decode(fields[b"entry"])
            if isinstance(entry, Restored) and entry.kill_switch == "engaged":
                return entry.sequence
        return None

    def _read_on(self) -> list[Entry]:
        """What the ledger holds beyond what was reached.

        What another service appended may be readable before it is durable, and Redis may still lose it; nothing is made
        of it before that is over.
        """
        entries = list(self._ledger.read(after=self.reached))
        self._ledger.confirm()
        return entries

    def _replay(self, entries: Sequence[Entry]) -> None:
        """Take entries into the history and what they come to into the state: both, or neither of them.

        Only what is active at the end is added, so that a replay takes as long as there are active edits, however many
        came and went. Raises LedgerDiverged when an entry does not follow on those before.
        """
        ahead = self._history.fork()
        for entry in entries:
            try:
                ahead.record(entry)
            except EngineError as error:
                raise _diverged(entry.sequence, error) from error
        before = {edit.id: edit for edit in self._history.all_active()}
        after = {edit.id: edit for edit in ahead.all_active()}
        coming = [edit for edit_id, edit in after.items() if edit_id not in before]
        try:
            leaving = self.factors(edit for edit_id, edit in before.items() if edit_id not in after)
        except FactorsMissing:
            # They were dropped while this service was behind: begin anew, without them.
            leaving, coming = None, list(after.values())
        self._add(coming, self.factors(coming), leaving)
        self._history.adopt(ahead)
        self._last = entries[-1] if entries else self._last

    def _add(self, edits: Sequence[Edit], factors: Sequence[Factors], leaving: Sequence[Factors] | None) -> None:
        """Move the state; leaving: None to begin anew. Raises LedgerDiverged, naming what does not fit."""
        try:
            if leaving is None:
                self._weights.rebuild(factors)
            else:
                self._weights.move(add=factors, remove=leaving)
        except EditorsError as error:
            for edit, own in zip(edits, factors, strict=True):
                try:
                    self._weights.move(add=[own])
                    self._weights.move(remove=[own])
                except EditorsError as own_error:
                    raise _diverged(edit.applied.sequence, own_error) from own_error
            raise _diverged(edits[-1].applied.sequence if edits else 0, error) from error

    def _record(self, entry: Entry) -> None:
        self._history.record(entry)
        self._last = entry


def _decoded(edit: Edit, raw: bytes) -> Factors:
    try:
        return Factors.from_bytes(raw)
    except EditorsError as error:
        raise _diverged(edit.applied.sequence, error) from error


def _diverged(sequence: int, error: Exception) -> LedgerDiverged:
    return LedgerDiverged(
        f"entry {sequence} of the ledger cannot be applied: {error}; "
        "do not trust this ledger with this model and editor",
        sequence=sequence,
    )
