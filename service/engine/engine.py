"""The single writer: every change of the live weights goes through here, one at a time.

What is published is what the ledger holds: an entry is durable before it is live, and a refused edit never is. Reading
(generate, status) waits for no step of an edit.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from editors.base_model import BaseModel
from editors.chat import Message, chat_prompt
from editors.checkpoint import Checkpoint
from editors.continuation import Wish
from editors.decoding import Generation
from editors.errors import EditorsError, EmptyTextError
from editors.formats import ExportFormat
from editors.sampling import Sampling
from service.engine.answers import Answers
from service.engine.asking import Ask, Ended, Event, Listener, Ticket, Which
from service.engine.audit import Audit, Auditor
from service.engine.batch import Batch, Tell
from service.engine.batch_items import BatchOutcome, Item, repeated_batch
from service.engine.changes import Changes
from service.engine.drift import DriftReader
from service.engine.edit_weights import WeightChanges
from service.engine.errors import AlreadyExpired, AlreadyRolledBack, BatchTooLarge, RevisionNotReached, TextTooLong
from service.engine.export import Snapshot, write_export
from service.engine.generator import Generator
from service.engine.guard import Guard
from service.engine.held import HeldEdits
from service.engine.history import Edit, History
from service.engine.journal import Journal
from service.engine.judge import Judge
from service.engine.proposal import Proposer
from service.engine.requests import EditRequest, Limits, Note, OnConflict, Outcome, Published, Terms
from service.engine.rollbacks import Reversal, Target, engage, put_tag, release, remove_tag, restore, roll_back
from service.engine.scorer import Scorer
from service.engine.single import make_edit, repeated_edit, require_time
from service.engine.texts import Texts
from service.engine.turns import Places, Turns
from service.engine.weights import Proof, Weights
from service.engine.workshop import Workshop
from service.ledger import Applied, Compacted, RedisLedger, Restored, RolledBack, Tagged
from service.telemetry import Telemetry

NOTHING = Note()
EXPIRED = Note(reason="expired")


class Engine:
    """A model that can be corrected while it serves.

    base, checkpoint: loaded and matching. ledger: of their namespace. telemetry: is told of changes and generations.
    `catch_up` must run once before anything else.
    """

    def __init__(
        self,
        base: BaseModel,
        checkpoint: Checkpoint,
        ledger: RedisLedger,
        guard_prompts: list[str],
        limits: Limits | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.base, self.checkpoint, self.limits = base, checkpoint, limits or Limits()
        self.ledger, self._telemetry = ledger, telemetry or Telemetry()
        self.weights = Weights(base, checkpoint)
        self.history = History(self._prompt_tokens)
        self._turns, self._awaiting = Turns(), Places("requests for a later revision")
        answers = Answers(base, self.limits.answer_tokens)
        held, guard = HeldEdits(base, answers), Guard(base, self.weights.pristine.upper, guard_prompts)
        self._auditor = Auditor(self.weights, self.history, held)
        self.drift = DriftReader(base, self.weights, guard)
        self._texts = Texts(base, answers, self.limits)
        self.scorer = Scorer(base, self.weights.reading, self._texts)
        self.weight_changes = WeightChanges(base, checkpoint, ledger, self.history)
        self._generator = Generator(base, self.weights.reading, self.limits, self._telemetry)
        self._journal = Journal(ledger, self.history, self.weights, self._telemetry)
        self._workshop = Workshop(
            base,
            answers,
            self.weights,
            self.history,
            self._journal,
            Proposer(checkpoint, self.weights.pristine.upper, self.weights.state),
            Judge(base, self.weights, answers, guard, held, self.limits),
            checkpoint.margin_nats,
            self._turns.give_way,
            self._telemetry,
        )
        self._changes = Changes(self._turns, self._journal, self.history, self.weights, self._telemetry)

    # Reading

    @property
    def published(self) -> Published:
        return self.weights.published

    @property
    def reached(self) -> int:
        """The last entry that was read of the ledger or written to it; what is published is not beyond it."""
        return self._journal.reached

    def generate(
        self, prompt: str, max_new_tokens: int, which: Which = "live", sampling: Sampling | None = None
    ) -> tuple[Generation, Published]:
        """Continue a prompt on one view; the answer comes from exactly the state that is returned with it."""
        events: SimpleQueue[Event] = SimpleQueue()
        ticket = self.begin([Ask(prompt, Wish(max_new_tokens, sampling or Sampling()), which)], events.put)
        text = ""
        while not isinstance(event := events.get(), Ended):
            if isinstance(event, Exception):
                raise event
            text += event.piece.text
        return (
            Generation(text, event.finish_reason, event.prompt_tokens, event.completion_tokens),
            ticket.published,
        )

    def begin(self, asks: Sequence[Ask], tell: Listener) -> Ticket:
        """Have prompts continued, all from one state, which the ticket names from the first event on.

        tell: called from another thread, with every piece of every answer as it is made.
        Raises EmptyTextError, TextTooLong, UnknownToken, BatchTooLarge, Busy.
        """
        return self._generator.submit([self._texts.worded(ask) for ask in asks], tell)

    def text(self, prompt: str | Sequence[int]) -> str:
        """A prompt as it reads. Raises UnknownToken."""
        return prompt if isinstance(prompt, str) else self._texts.read(prompt)

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """What the model reads when it is asked these messages. Raises NoChatTemplate, ChatRefused."""
        return chat_prompt(self.base.tokenizer, messages)

    def end_generations(self, within_s: float) -> None:
        """Let every generation end by then with what it has said, since the service stops."""
        self._generator.end_within(within_s)

    def export(self, format: ExportFormat, folder: Path) -> dict[str, Any]:
        """Write what is live now into an empty folder; returns its index, which names the revision and the state.

        Raises NothingToExport, ExportUnwritable, LedgerUnavailable.
        """
        with self.weights.reading() as (live, published):
            weights = self.weights.edited(live) if format == ExportFormat.MERGED else {}
        snapshot = Snapshot(published, self.history.active_at(published.revision), weights)
        return write_export(snapshot, self.base, self.checkpoint, self.ledger, format, folder)

    @property
    def last_audit(self) -> Audit | None:
        return self._auditor.last

    def audit(self, stopping: threading.Event | None = None) -> Audit | None:
        """Find out which active edits still hold. Neither generation nor editing waits for it.

        stopping: ends it, when set, without a result.
        """
        return self._auditor.take(stopping)

    # Writing

    def apply(
        self,
        request: EditRequest,
        *,
        expected_revision: int | None = None,
        dry_run: bool = False,
        on_conflict: OnConflict = "refuse",
        allow_loss: bool = False,
    ) -> Outcome:
        """Make a correction, or find out what it would do.

        Raises EditRefused with the measurements; RevisionMismatch; TextTooLong; EmptyTextError; LedgerUnavailable.
        Whatever is raised, the live weights are as they were.
        """
        terms = Terms(dry_run, on_conflict, allow_loss)
        with self._telemetry.change("edit") as change:
            request = self._texts.put(request)
            attempt = partial(make_edit, self._workshop, request, self._texts.encode(request), terms)
            outcome = self._changes.make(request, attempt, repeated_edit, expected_revision)
            change.came_to(outcome.status, **outcome.traced)
        return outcome

    def apply_batch(
        self,
        requests: Sequence[EditRequest],
        *,
        expected_revision: int | None = None,
        dry_run: bool = False,
        on_conflict: OnConflict = "refuse",
        allow_loss: bool = False,
        partial: bool = False,
        tell: Tell = lambda step, done, of: None,
    ) -> BatchOutcome:
        """Make many corrections as one transaction, or find out what they would do.

        requests: with one idempotency key and request digest, if any. partial: make those that can be made.
        Raises BatchTooLarge; otherwise as `apply`, with every verdict.
        """
        terms = Terms(dry_run, on_conflict, allow_loss, partial)
        with self._telemetry.change("batch", len(requests)) as change:
            if len(requests) > self.limits.batch_edits:
                raise BatchTooLarge(
                    f"{len(requests)} edits are more than the {self.limits.batch_edits} of one batch; send them in "
                    "several",
                    limit=self.limits.batch_edits,
                )
            items = [self._item(index, request) for index, request in enumerate(requests)]
            batch = Batch(self._workshop, items, terms, tell)
            outcome = self._changes.make(requests[0], batch.make, self._repeated_batch, expected_revision)
            edits = len(outcome.edits) if outcome.replayed else outcome.edits
            change.came_to(outcome.status, edits, revision=outcome.revision, batch_size=len(outcome.edits))
        return outcome

    def _item(self, index: int, request: EditRequest) -> Item:
        try:
            require_time(request)
            request = self._texts.put(request)
            return Item(index, request, self._texts.encode(request))
        except (EditorsError, AlreadyExpired, TextTooLong) as error:
            return Item(index, request, invalid=error)

    def _repeated_batch(self, made: Applied) -> BatchOutcome:
        return repeated_batch([each.applied for each in self.history.batch(made.batch.id)])

    def rollback(
        self, edit_id: str, note: Note = NOTHING, *, expected_revision: int | None = None, dry_run: bool = False
    ) -> Reversal:
        """Take one edit back, bit for bit, and bring back what it superseded, or find out what that would do.

        One that is superseded itself leaves the state as it is.
        Raises EditNotFound, AlreadyRolledBack, RevisionMismatch, IdempotencyKeyReused, LedgerUnavailable.
        """
        attempt = partial(roll_back, self._workshop, edit_id, note, dry_run=dry_run)
        return self._changes.make_told(
            "rollback", note, attempt, self._reversal_of, expected_revision, dry_run=dry_run, edit_id=edit_id
        )

    def restore(
        self, to: int | str, note: Note = NOTHING, *, expected_revision: int | None = None, dry_run: bool = False
    ) -> Reversal:
        """Make exactly those edits stand that stood at a revision, or that of a tag, but for what expired since.

        to: 0 is the base. Raises as `rollback` does; RevisionNotFound, TagNotFound, RevisionNotRestorable.
        """

        def attempt() -> Reversal:
            target = Target(self.history.tag(to).revision, to) if isinstance(to, str) else Target(to)
            return restore(self._workshop, target, note, dry_run=dry_run)

        return self._changes.make_told("restore", note, attempt, self._reversal_of, expected_revision, dry_run=dry_run)

    def kill(self, note: Note = NOTHING, *, expected_revision: int | None = None) -> Restored:
        """Serve the base, and make no change until `revive`. Returns the entry that says so. Raises as `restore`.

        A change that is under way is given up.
        """
        turn, attempt = self._turns.taken_first(note), partial(engage, self._workshop, note)
        return self._changes.make_told(
            "kill", note, attempt, expected_revision=expected_revision, turn=turn, killed_or_not=True
        )

    def revive(self, note: Note = NOTHING, *, expected_revision: int | None = None) -> Restored | None:
        """Serve again what was served before `kill`, but for what expired since; None if nothing was killed."""
        turn, attempt = self._turns.taken(note), partial(release, self._workshop, note)
        return self._changes.make_told(
            "revive", note, attempt, expected_revision=expected_revision, turn=turn, killed_or_not=True
        )

    def tag(
        self, name: str, revision: int | None = None, note: Note = NOTHING, *, expected_revision: int | None = None
    ) -> Tagged:
        """Name a revision, by default the live one, so that it can be restored however much is compacted.

        Raises RevisionNotFound, RevisionNotRestorable; RevisionMismatch, IdempotencyKeyReused, LedgerUnavailable.
        """
        attempt = partial(put_tag, self._workshop, name, revision, note)
        return self._changes.make_told("tag", note, attempt, expected_revision=expected_revision, killed_or_not=True)

    def untag(self, name: str, note: Note = NOTHING, *, expected_revision: int | None = None) -> Tagged:
        """Take a name away; what it named stays. Raises TagNotFound, and as `tag` does."""
        attempt = partial(remove_tag, self._workshop, name, note)
        return self._changes.make_told("tag", note, attempt, expected_revision=expected_revision, killed_or_not=True)

    def expire(self) -> list[Edit]:
        """Roll back the edits whose time has come. Returns them. Raises Busy, LedgerUnavailable."""
        due = self.history.next_expiry()
        if due is None or due > datetime.now(UTC):
            return []
        done = []
        for edit in self.history.expired(datetime.now(UTC)):
            attempt = partial(roll_back, self._workshop, edit.id, EXPIRED, expired=True)
            # Another service has a clock too.
            with suppress(AlreadyRolledBack), self._telemetry.change("expire") as change:
                self._changes.make(EXPIRED, attempt, turn=self._turns.taken(), killed_or_not=True)
                change.came_to("done", edit_id=edit.id)
                done.append(edit)
        return done

    def _reversal_of(self, entry: RolledBack | Restored) -> Reversal:
        return Reversal.of(entry, self.history)

    def require(self, revision: int, within_s: float) -> None:
        """Come back when a revision, or a later one, is live. Raises RevisionNotReached after so many seconds; Busy."""
        if self.published.revision >= revision:
            return
        with self._awaiting.one():
            if not self.weights.wait(revision, within_s):
                raise RevisionNotReached(revision, self.published.revision)

    def prove(self) -> Proof:
        """That the live weights are what the ledger's entries make, worked out anew. Waits for the edit under way.

        Raises Busy, LedgerUnavailable; LedgerDiverged when they are not, as `catch_up` does from then on.
        """
        return self._changes.prove()

    def compact(self, every: int) -> Compacted | None:
        """Fold the ledger's entries into a snapshot, if so many came since the last one. Nothing waits for it.

        Raises LedgerUnavailable, LedgerCorrupt.
        """
        return self.ledger.compact() if self.ledger.stored_since_snapshot() > every else None

    def catch_up(self) -> None:
        """Apply what the ledger holds beyond this process's revision: at start all of it, later what others wrote.

        Raises LedgerUnavailable; LedgerDiverged when the ledger's state is not the one that its entries lead to.
        """
        self._changes.catch_up()

    def follow(self) -> bool:
        """Catch up unless a change is under way, which does so itself. Whether it did. Raises as `catch_up` does."""
        return self._changes.follow()

    def _prompt_tokens(self, prompt: str) -> Hashable:
        """What makes two prompts the same. A prompt that no service of ours wrote may have none."""
        try:
            return self.base.encode(prompt).prompt
        except EmptyTextError:
            return prompt
