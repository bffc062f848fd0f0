"""The single writer: every change of the live weights goes through here, one at a time.

What is published is what the ledger holds: an entry is durable before it is live, and a refused edit never is. Reading
(generate, status) waits for no step of an edit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

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
from service.engine.batch_items import BatchOutcome, Item, made_batch
from service.engine.errors import (
    BatchTooLarge,
    Busy,
    IdempotencyKeyReused,
    LedgerDiverged,
    RevisionMismatch,
    RevisionNotReached,
    TextTooLong,
)
from service.engine.export import Snapshot, write_export
from service.engine.generator import Generator
from service.engine.guard import Guard
from service.engine.held import HeldEdits
from service.engine.history import Edit, History
from service.engine.journal import Journal
from service.engine.judge import Judge
from service.engine.proposal import Proposer
from service.engine.requests import EditRequest, Limits, OnConflict, Outcome, Published, Terms
from service.engine.single import make_edit, repeated_edit
from service.engine.texts import Texts
from service.engine.weights import Proof, Weights
from service.engine.workshop import Workshop
from service.ledger import Compacted, LedgerConflict, RedisLedger, RolledBack

Changed = TypeVar("Changed")
MAX_RACES = 10
"""How often an edit is judged again because another writer was first."""
MAX_WAITING = 12
"""Changes that wait for the one under way, and readers that wait for a revision, at most of each: every one holds a
thread, of which generation needs some too."""


class Engine:
    """A model that can be corrected while it serves.

    base, checkpoint: loaded and matching. ledger: of their namespace. `catch_up` must run once before anything else.
    """

    def __init__(
        self,
        base: BaseModel,
        checkpoint: Checkpoint,
        ledger: RedisLedger,
        guard_prompts: list[str],
        limits: Limits | None = None,
    ) -> None:
        self.base, self.checkpoint, self.limits = base, checkpoint, limits or Limits()
        self.ledger = ledger
        self.weights = Weights(base, checkpoint)
        self.history = History(self._prompt_tokens)
        answers = Answers(base, self.limits.answer_tokens)
        held, guard = HeldEdits(base, answers), Guard(base, self.weights.pristine.upper, guard_prompts)
        self._auditor = Auditor(self.weights, self.history, held)
        self._texts = Texts(base, answers, self.limits)
        self._generator = Generator(base, self.weights.reading, self.limits)
        self._journal = Journal(ledger, self.history, self.weights)
        self._workshop = Workshop(
            base,
            answers,
            self.weights,
            self.history,
            self._journal,
            Proposer(checkpoint, self.weights.pristine.upper, self.weights.state),
            Judge(base, self.weights, answers, guard, held, self.limits),
            checkpoint.margin_nats,
        )
        self._writing = threading.RLock()
        self._queue, self._awaiting = (threading.BoundedSemaphore(MAX_WAITING) for _ in range(2))
        self._contradiction: LedgerDiverged | None = None

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
        tokens = self._texts.encode(request)
        terms = Terms(dry_run, on_conflict, allow_loss)

        def attempt() -> Outcome:
            made = self._repeated(request.idempotency_key, request.request_digest)
            if made:
                return repeated_edit(made)
            self._expect(expected_revision)
            return make_edit(self._workshop, request, tokens, terms)

        return self._behind_others(attempt)

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
        if len(requests) > self.limits.batch_edits:
            raise BatchTooLarge(
                f"{len(requests)} edits are more than the {self.limits.batch_edits} of one batch; send them in several",
                limit=self.limits.batch_edits,
            )
        items = [self._item(index, request) for index, request in enumerate(requests)]
        batch = Batch(self._workshop, items, Terms(dry_run, on_conflict, allow_loss, partial), tell)

        def attempt() -> BatchOutcome:
            made = self._repeated(requests[0].idempotency_key, requests[0].request_digest)
            if made:
                entries = [each.applied for each in self.history.batch(made.batch.id)]
                return replace(made_batch(entries), replayed=True)
            self._expect(expected_revision)
            return batch.make()

        return self._behind_others(attempt)

    def _item(self, index: int, request: EditRequest) -> Item:
        try:
            return Item(index, request, self._texts.encode(request))
        except (EditorsError, TextTooLong) as error:
            return Item(index, request, invalid=error)

    def rollback(
        self,
        edit_id: str,
        *,
        reason: str | None = None,
        actor: str | None = None,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        request_digest: str | None = None,
    ) -> Edit:
        """Take one edit back, bit for bit, and bring back what it superseded.

        One that is superseded itself leaves the state as it is.
        Raises EditNotFound, AlreadyRolledBack, RevisionMismatch, IdempotencyKeyReused, LedgerUnavailable.
        """

        def attempt() -> Edit:
            made = self._repeated(idempotency_key, request_digest)
            if made:
                return self.history.find(made.edit_id)
            change = self.history.rolling_back(edit_id)
            self._expect(expected_revision)
            leaving, returning = self._journal.factors(change.leaving), self._journal.factors(change.returning)
            with self.weights.staged(add=returning, remove=leaving):
                entry = RolledBack(
                    sequence=self.published.revision + 1,
                    edit_id=edit_id,
                    created_at=datetime.now(UTC),
                    actor=actor,
                    reason=reason,
                    state_digest=self.weights.state.digest(),
                    idempotency_key=idempotency_key,
                    request_digest=request_digest,
                )
                self._journal.commit((entry, b""))
            return self.history.find(edit_id)

        return self._behind_others(attempt)

    def _behind_others(self, attempt: Callable[[], Changed]) -> Changed:
        """Make a change after everything that the ledger holds; once more if another writer was first meanwhile."""
        with _place(self._queue, "changes"), self._writing:
            for _ in range(MAX_RACES - 1):
                self.catch_up()
                with suppress(LedgerConflict):
                    return attempt()
            self.catch_up()
            return attempt()

    def require(self, revision: int, within_s: float) -> None:
        """Come back when a revision, or a later one, is live. Raises RevisionNotReached after so many seconds; Busy."""
        if self.published.revision >= revision:
            return
        with _place(self._awaiting, "requests for a later revision"):
            if not self.weights.wait(revision, within_s):
                raise RevisionNotReached(revision, self.published.revision)

    def prove(self) -> Proof:
        """That the live weights are what the ledger's entries make, worked out anew. Waits for the edit under way.

        Raises Busy, LedgerUnavailable; LedgerDiverged when they are not, as `catch_up` does from then on.
        """
        with _place(self._queue, "changes"), self._writing:
            self.catch_up()
            proof = self.weights.proof()
            if not proof.holds:
                self._contradiction = LedgerDiverged(
                    f"the weights in memory are not those of revision {proof.published.revision}; restart this service",
                    revision=proof.published.revision,
                )
                raise self._contradiction
        return proof

    def compact(self, every: int) -> Compacted | None:
        """Fold the ledger's entries into a snapshot, if so many came since the last one. Nothing waits for it.

        Raises LedgerUnavailable, LedgerCorrupt.
        """
        return self.ledger.compact() if self.ledger.stored_since_snapshot() > every else None

    def catch_up(self) -> None:
        """Apply what the ledger holds beyond this process's revision: at start all of it, later what others wrote.

        Raises LedgerUnavailable; LedgerDiverged when the ledger's state is not the one that its entries lead to.
        """
        with self._writing:
            if self._contradiction is not None:
                raise self._contradiction
            self._journal.catch_up()

    def follow(self) -> bool:
        """Catch up unless a change is under way, which does so itself. Whether it did. Raises as `catch_up` does."""
        if not self._writing.acquire(blocking=False):
            return False
        try:
            self.catch_up()
        finally:
            self._writing.release()
        return True

    # Checking

    def _prompt_tokens(self, prompt: str) -> Hashable:
        """What makes two prompts the same. A prompt that no service of ours wrote may have none."""
        try:
            return self.base.encode(prompt).prompt
        except EmptyTextError:
            return prompt

    def _expect(self, revision: int | None) -> None:
        if revision is not None and revision != self.published.revision:
            raise RevisionMismatch(revision, self.published.revision)

    def _repeated(self, key: str | None, request_digest: str | None) -> Any:
        """The entry of an earlier request with the same key. Raises IdempotencyKeyReused if it was another request."""
        made = None if key is None else self.history.by_idempotency_key(key)
        if made is not None and made.request_digest != request_digest:
            raise IdempotencyKeyReused(
                "this Idempotency-Key was used for another request; take a new key", id=made.edit_id
            )
        return made


@contextmanager
def _place(queue: threading.BoundedSemaphore, what: str) -> Iterator[None]:
    """A place in a queue. Raises Busy when there is none."""
    if not queue.acquire(blocking=False):
        raise Busy(f"too many {what} are waiting; try again shortly", limit=MAX_WAITING)
    try:
        yield
    finally:
        queue.release()
