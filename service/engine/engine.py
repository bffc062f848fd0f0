"""The single writer: every change of the live weights goes through here, one at a time.

    capture -> propose -> search -> stage -> judge -> commit -> publish

What is published is what the ledger holds: the entry is durable before a live weight moves, and a refused edit
never touches them. Reading (generate, status) never waits for any step but the last.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from editors.base_model import BaseModel
from editors.decoding import Generation, Sampling, generate
from editors.errors import EmptyTextError, StateError
from editors.factors import Factors, digest
from editors.formats import ExportFormat
from editors.mend.checkpoint import Checkpoint
from editors.scale import SCALES
from editors.state import SumState
from editors.text import Tokens
from editors.views import UpperBlocks, view
from service.engine.clock import Clock
from service.engine.errors import (
    AlreadyRolledBack,
    EditNotFound,
    IdempotencyKeyReused,
    LedgerDiverged,
    RevisionMismatch,
    TextTooLong,
)
from service.engine.export import Snapshot, write_export
from service.engine.gate import Gate
from service.engine.guard import Guard
from service.engine.held import HeldEdits
from service.engine.history import Edit, History
from service.engine.judge import Verdict, judge_keep, judge_paraphrases, refusal
from service.engine.proposal import Attempts, Proposer
from service.engine.requests import EditRequest, Limits, Outcome, Published
from service.ledger import Applied, Entry, LedgerConflict, RedisLedger, RolledBack

View = Literal["live", "base"]
Changed = TypeVar("Changed")
MAX_RACES = 3
"""How often an edit is judged again because another writer was first."""


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
        self.history = History()
        self._state = SumState(checkpoint.editor.targets, base.device)
        own = [target.name for target in checkpoint.editor.targets]
        self._live, self._candidate = view(base.model, own), view(base.model, own)
        pristine = UpperBlocks(base.model, checkpoint.editor.targets)
        self._upper_candidate = UpperBlocks(self._candidate, checkpoint.editor.targets)
        self._proposer = Proposer(checkpoint, pristine, UpperBlocks(self._live, checkpoint.editor.targets))
        self._guard = Guard(base, pristine, guard_prompts)
        self._held = HeldEdits(base, pristine)
        self._positions: int | None = getattr(base.model.config, "max_position_embeddings", None)
        self._gate = Gate()
        self._writing = threading.RLock()
        self._last: Entry | None = None
        """The last entry that the state and the history hold; `published` may be behind it, never ahead."""
        self.published = Published(0, self._state.digest(), 0)

    # Reading

    def generate(
        self, prompt: str, max_new_tokens: int, which: View = "live", sampling: Sampling | None = None
    ) -> tuple[Generation, Published]:
        """Continue a prompt on one view; the answer comes from exactly the state that is returned with it."""
        self._check_length("prompt", prompt, max_new_tokens)
        with self._gate.reading():
            model = self._live if which == "live" else self.base.model
            return generate(model, self.base.tokenizer, prompt, max_new_tokens, sampling), self.published

    def export(self, format: ExportFormat, folder: Path) -> dict[str, Any]:
        """Write what is live now into an empty folder; returns its index, which names the revision and the state.

        Raises NothingToExport, ExportUnwritable, LedgerUnavailable.
        """
        names = [target.name for target in self.checkpoint.editor.targets] if format == ExportFormat.MERGED else []
        with self._gate.reading():
            published = self.published
            weights = {name: self._live.get_parameter(name).detach().to("cpu", copy=True) for name in names}
        snapshot = Snapshot(published, self.history.active_at(published.revision), weights)
        return write_export(snapshot, self.base, self.checkpoint, self.ledger, format, folder)

    # Writing

    def apply(self, request: EditRequest, *, expected_revision: int | None = None, dry_run: bool = False) -> Outcome:
        """Make a correction, or find out what it would do.

        Raises DidNotTake or DrawdownExceeded with the measurements; RevisionMismatch; TextTooLong; EmptyTextError;
        LedgerUnavailable. Whatever is raised, the live weights are as they were.
        """
        tokens = self._encode(request)

        def attempt() -> Outcome:
            repeated = self._repeated(request)
            if repeated:
                return repeated
            self._expect(expected_revision)
            return self._apply(request, tokens, dry_run)

        return self._behind_others(attempt)

    def _apply(self, request: EditRequest, tokens: Tokens, dry_run: bool) -> Outcome:
        clock = Clock()
        before = self._answer(self._live, tokens)(request.prompt).text
        clock.lap("before")
        now = self.published
        if self.base.says(before, request.correction):
            return Outcome(None, now.revision, now.digest, before, committed=False)
        hidden = self._proposer.below(tokens)
        rows = self._proposer.propose(tokens, hidden)
        clock.lap("propose")
        proposed = self._proposer.search(tokens, hidden, rows, self._state.increment(rows))
        clock.lap("search")
        verdict: Verdict | None = None
        attempts = Attempts(proposed)
        for index in attempts:
            factors = proposed.factors(index)
            with self._staged(factors):
                clock.lap("stage")
                verdict = self._judge(request, tokens)
                clock.lap("judge")
                if verdict.accepted:
                    return self._commit(request, factors, SCALES[index], before, verdict, clock, dry_run)
            if verdict.took and verdict.drawdown > verdict.drawdown_budget:
                attempts.too_strong()
        raise refusal(request.correction, before, proposed.best_margin, verdict)

    @contextmanager
    def _staged(self, factors: Factors) -> Iterator[None]:
        """The candidate with one more edit; the state keeps it only if it is committed inside."""
        self._state.add(factors)
        committed = self.published.revision
        try:
            self._state.write(self.base.model, self._candidate)
            yield
        finally:
            if self.published.revision == committed:
                self._state.remove(factors)

    def _judge(self, request: EditRequest, tokens: Tokens) -> Verdict:
        candidate, pristine = self._answer(self._candidate, tokens), self._answer(self.base.model, tokens)
        after = candidate(request.prompt).text

        def says(text: str) -> bool:
            return self.base.says(text, request.correction)

        return Verdict(
            after=after,
            took=says(after),
            paraphrases=judge_paraphrases(request.paraphrases, candidate, says),
            keep=judge_keep(request.keep, pristine, candidate),
            drawdown=self._guard.drawdown(self._upper_candidate),
            drawdown_budget=self.limits.guard_budget,
            lost=self._held.lost(self.history.all_active(), self._upper_candidate),
        )

    def _commit(
        self,
        request: EditRequest,
        factors: Factors,
        scale: float,
        before: str,
        verdict: Verdict,
        clock: Clock,
        dry_run: bool,
    ) -> Outcome:
        raw = factors.to_bytes()
        entry = Applied(
            sequence=self.published.revision + 1,
            edit_id=f"edit_{uuid.uuid4().hex}",
            created_at=datetime.now(UTC),
            actor=request.actor,
            reason=request.reason,
            state_digest=self._state.digest(),
            prompt=request.prompt,
            correction=request.correction,
            subject=request.subject,
            paraphrases=request.paraphrases,
            keep=request.keep,
            metadata=request.metadata,
            scale=scale,
            before=before,
            after=verdict.after,
            checks=verdict.checks(),
            timings_ms=clock.laps,
            factors_digest=digest(raw),
            idempotency_key=request.idempotency_key,
            request_digest=request.request_digest,
        )
        if dry_run:
            now = self.published
            return Outcome(entry, now.revision, entry.state_digest, before, committed=False)
        after = Clock()
        self.ledger.append(entry, raw)
        after.lap("commit")
        self._publish(entry)
        after.lap("publish")
        return Outcome(entry, entry.sequence, entry.state_digest, before, committed=True, publish_ms=after.laps)

    def rollback(
        self, edit_id: str, *, reason: str | None = None, actor: str | None = None, expected_revision: int | None = None
    ) -> Edit:
        """Take one edit back, bit for bit.

        Raises EditNotFound, AlreadyRolledBack, RevisionMismatch, LedgerUnavailable.
        """

        def attempt() -> Edit:
            edit = self.history.active(edit_id)
            self._expect(expected_revision)
            factors = Factors.from_bytes(self.ledger.factors(edit.applied.sequence))
            self._state.remove(factors)
            try:
                entry = RolledBack(
                    sequence=self.published.revision + 1,
                    edit_id=edit_id,
                    created_at=datetime.now(UTC),
                    actor=actor,
                    reason=reason,
                    state_digest=self._state.digest(),
                )
                self._state.write(self.base.model, self._candidate)
                self.ledger.append(entry)
            except BaseException:
                self._state.add(factors)
                raise
            self._publish(entry)
            return self.history.find(edit_id)

        return self._behind_others(attempt)

    def _behind_others(self, attempt: Callable[[], Changed]) -> Changed:
        """Make a change after everything that the ledger holds; once more if another writer was first meanwhile."""
        with self._writing:
            for _ in range(MAX_RACES - 1):
                self.catch_up()
                with suppress(LedgerConflict):
                    return attempt()
            self.catch_up()
            return attempt()

    def catch_up(self) -> None:
        """Apply what the ledger holds beyond this process's revision: at start all of it, later what others wrote.

        Raises LedgerUnavailable; LedgerDiverged when the ledger's state is not the one that its entries lead to.
        """
        with self._writing:
            head = self.ledger.head()
            if head < self.published.revision:
                raise LedgerDiverged(
                    f"the ledger ends at revision {head}, but this service has applied {self.published.revision}: "
                    "entries were lost; restore the Redis data, or restart the service to serve what is left",
                    head=head,
                    revision=self.published.revision,
                )
            if head == self.published.revision:
                return
            # The state keeps what was read even if reading breaks off: the next call goes on behind it.
            for entry, raw in self.ledger.read(after=self._last.sequence if self._last else 0):
                self._replay(entry, raw)
            last = self._last
            actual = self._state.digest()
            if actual != last.state_digest:
                raise LedgerDiverged(
                    f"replaying the ledger to revision {last.sequence} gives the state {actual}, "
                    f"but its entry says {last.state_digest}; do not trust this ledger with this model and editor",
                    expected=last.state_digest,
                    actual=actual,
                )
            self._state.write(self.base.model, self._candidate)
            self._make_live(last)

    def follow(self) -> None:
        """Catch up unless a change is under way, which would do so itself. Raises as `catch_up` does."""
        if self._writing.acquire(blocking=False):
            try:
                self.catch_up()
            finally:
                self._writing.release()

    def _replay(self, entry: Entry, raw: bytes) -> None:
        """Take one entry of the ledger into the state. Raises LedgerDiverged when it does not follow on it."""
        try:
            if isinstance(entry, Applied):
                self._state.add(Factors.from_bytes(raw))
            else:
                applied = self.history.active(entry.edit_id).applied
                self._state.remove(Factors.from_bytes(self.ledger.factors(applied.sequence)))
        except (StateError, EditNotFound, AlreadyRolledBack) as error:
            raise LedgerDiverged(
                f"entry {entry.sequence} of the ledger cannot be applied: {error}; "
                "do not trust this ledger with this model and editor",
                sequence=entry.sequence,
            ) from error
        self._record(entry)

    def _publish(self, entry: Entry) -> None:
        self._record(entry)
        self._make_live(entry)

    def _record(self, entry: Entry) -> None:
        self.history.record(entry)
        self._last = entry

    def _make_live(self, entry: Entry) -> None:
        """The only exclusive section: copy the candidate's weights over the live ones."""
        with self._gate.publishing(), torch.no_grad():
            for target in self.checkpoint.editor.targets:
                self._live.get_parameter(target.name).copy_(self._candidate.get_parameter(target.name))
            self.published = Published(entry.sequence, entry.state_digest, self._state.edits)

    # Checking

    def _encode(self, request: EditRequest) -> Tokens:
        tokens = self.base.encode(request.prompt, request.correction)
        length = self._answer_length(tokens)
        self._check_length("prompt", request.prompt, length)
        if len(tokens.target) > self.limits.correction_tokens:
            raise TextTooLong(
                f"correction has {len(tokens.target)} tokens, more than {self.limits.correction_tokens}; shorten it",
                field="correction",
                tokens=len(tokens.target),
                limit=self.limits.correction_tokens,
            )
        for name in ("paraphrases", "keep"):
            for prompt in getattr(request, name):
                self._check_length(name, prompt, length)
        return tokens

    def _check_length(self, name: str, text: str, new_tokens: int) -> None:
        """Refuse a prompt without words, beyond the limit, or that leaves no positions for what is to follow it."""
        if not text.strip():
            raise EmptyTextError(f"{name} is empty; give it some words", field=name)
        tokens = len(self.base.encode(text).prompt)
        if tokens > self.limits.prompt_tokens:
            raise TextTooLong(
                f"{name} has {tokens} tokens, more than {self.limits.prompt_tokens}; shorten it",
                field=name,
                tokens=tokens,
                limit=self.limits.prompt_tokens,
            )
        new_tokens = new_tokens if self.base.kind == "decoder" else 0  # only there do they follow in the same text
        if self._positions is not None and tokens + new_tokens > self._positions:
            raise TextTooLong(
                f"{name} has {tokens} tokens, which with {new_tokens} to follow is more than the model's "
                f"{self._positions} positions; shorten it, or ask for fewer",
                field=name,
                tokens=tokens + new_tokens,
                limit=self._positions,
            )

    def _expect(self, revision: int | None) -> None:
        if revision is not None and revision != self.published.revision:
            raise RevisionMismatch(revision, self.published.revision)

    def _repeated(self, request: EditRequest) -> Outcome | None:
        """The outcome of an earlier request with the same key. Raises IdempotencyKeyReused if it was another one."""
        if request.idempotency_key is None:
            return None
        edit = self.history.by_idempotency_key(request.idempotency_key)
        if edit is None:
            return None
        if edit.applied.request_digest != request.request_digest:
            raise IdempotencyKeyReused("this Idempotency-Key was used for another request; take a new key", id=edit.id)
        applied = edit.applied
        return Outcome(applied, applied.sequence, applied.state_digest, applied.before, committed=True, replayed=True)

    def _answer(self, model: torch.nn.Module, tokens: Tokens) -> Callable[[str], Generation]:
        """Answers that are long enough to tell whether they begin with the correction."""
        return lambda prompt: generate(model, self.base.tokenizer, prompt, self._answer_length(tokens))

    def _answer_length(self, tokens: Tokens) -> int:
        return max(self.limits.answer_tokens, len(tokens.target) + 2)
