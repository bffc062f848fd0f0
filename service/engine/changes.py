"""How a change is made: in its turn, behind everything that the ledger holds, and once however often it is asked for.

Flow: a turn -> catch up -> the entry of an earlier request with the same key; or the revision is the expected one, the
kill switch is released -> the change. When another writer was first, all of it again but the turn.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

from service.engine.errors import IdempotencyKeyReused, KillSwitchEngaged, LedgerDiverged, RevisionMismatch
from service.engine.history import History
from service.engine.journal import Journal
from service.engine.requests import EditRequest, Note
from service.engine.turns import Turns
from service.engine.weights import Proof, Weights
from service.ledger import LedgerConflict
from service.telemetry import Kind, Telemetry

Changed = TypeVar("Changed")
Repeated = Callable[[Any], Changed]
"""What a change came to when it was made, from its entry."""
MAX_RACES = 10
"""How often a change is tried because another writer was first."""


class Changes:
    """Any thread may ask for one; there is one at a time."""

    def __init__(
        self, turns: Turns, journal: Journal, history: History, weights: Weights, telemetry: Telemetry
    ) -> None:
        self._turns, self._journal, self._history, self._weights = turns, journal, history, weights
        self._telemetry = telemetry
        self._contradiction: LedgerDiverged | None = None
        """Why there are no more changes: the weights in memory are not what the ledger says."""

    def make(
        self,
        asked: EditRequest | Note,
        attempt: Callable[[], Changed],
        repeated: Repeated[Changed] = lambda entry: entry,
        expected_revision: int | None = None,
        *,
        turn: AbstractContextManager[None] | None = None,
        killed_or_not: bool = False,
    ) -> Changed:
        """What a change comes to, or came to when it was asked for before.

        turn: another one than to wait for it. killed_or_not: the kill switch does not keep it from being made.
        Raises what `attempt` raises, and before it IdempotencyKeyReused, RequestInFlight, Busy, RevisionMismatch,
        KillSwitchEngaged; LedgerConflict only when another writer was first every time.
        """

        def once() -> Changed:
            with self._telemetry.step("catch_up"):
                self.catch_up()
            made = self._made_before(asked)
            if made is not None:
                return repeated(made)
            self._expect(expected_revision)
            if not killed_or_not:
                self._require_released()
            return attempt()

        with self._telemetry.waited(turn or self._turns.wait(asked)):
            for _ in range(MAX_RACES - 1):
                with suppress(LedgerConflict):
                    return once()
            return once()

    def make_told(
        self,
        kind: Kind,
        note: Note,
        attempt: Callable[[], Changed],
        repeated: Repeated[Changed] = lambda entry: entry,
        expected_revision: int | None = None,
        *,
        turn: AbstractContextManager[None] | None = None,
        killed_or_not: bool = False,
        dry_run: bool = False,
        **traced: str,
    ) -> Changed:
        """The same, with telemetry told of what it came to. traced: what else a trace may tell of it."""

        def attempted() -> Changed:
            before, done = self._weights.published.revision, attempt()
            now = self._weights.published.revision
            change.came_to("done" if now > before else "dry_run" if dry_run else "unchanged", revision=now, **traced)
            return done

        def replayed(entry: Any) -> Changed:
            change.came_to("replayed", revision=entry.sequence, **traced)
            return repeated(entry)

        with self._telemetry.change(kind) as change:
            return self.make(note, attempted, replayed, expected_revision, turn=turn, killed_or_not=killed_or_not)

    # What this process holds, and the ledger

    def catch_up(self) -> None:
        """Apply what the ledger holds beyond this process's revision. Raises LedgerUnavailable, LedgerDiverged."""
        with self._turns.taken():
            if self._contradiction is not None:
                raise self._contradiction
            self._journal.catch_up()

    def follow(self) -> bool:
        """Catch up unless a change is under way, which does so itself. Whether it did. Raises as `catch_up` does."""
        with self._turns.at_once() as free:
            if free:
                self.catch_up()
            elif kill := self._journal.sees_kill():
                # It may be the kill of whoever has the turn, who is about to have reached it.
                self._turns.interrupt(lambda: self._journal.reached < kill)
            return free

    def prove(self) -> Proof:
        """That the live weights are what the ledger's entries make. Raises Busy, LedgerUnavailable; LedgerDiverged."""
        with self._telemetry.waited(self._turns.wait()):
            self.catch_up()
            proof = self._weights.proof()
            if not proof.holds:
                self._contradiction = LedgerDiverged(
                    f"the weights in memory are not those of revision {proof.published.revision}; restart this service",
                    revision=proof.published.revision,
                )
                raise self._contradiction
        return proof

    # What comes before an attempt

    def _made_before(self, asked: EditRequest | Note) -> Any:
        """The entry of an earlier request with the same key. Raises IdempotencyKeyReused if it was another request."""
        key = asked.idempotency_key
        made = None if key is None else self._history.by_idempotency_key(key)
        if made is not None and made.request_digest != asked.request_digest:
            raise IdempotencyKeyReused(
                "this Idempotency-Key was used for another request; take a new key",
                id=getattr(made, "edit_id", None),
                revision=made.sequence,
            )
        return made

    def _expect(self, revision: int | None) -> None:
        live = self._weights.published.revision
        if revision not in (None, live):
            raise RevisionMismatch(revision, live)

    def _require_released(self) -> None:
        killed = self._history.killed
        if killed is not None:
            raise KillSwitchEngaged(
                f"the kill switch is engaged since revision {killed.sequence}: the base is served, and nothing is "
                "changed until it is released (DELETE /kill-switch)",
                revision=killed.sequence,
                actor=killed.actor,
                reason=killed.reason,
            )
