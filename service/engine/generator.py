"""One thread that decodes everything that people ask, as long as there is anything.

    queue -> a chunk of newcomers reads its prompts -> joins the batch of its view -> a token for every row -> …

Newcomers join between two steps and leave when they end, so that nobody waits for somebody else's end while there is
a place. Every request is answered from one view, which stays as it is until the last token; a newer view has a batch
of its own. Where a batch fails, its texts go on one by one, and only those that fail alone are given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field

from torch import OutOfMemoryError, Tensor
from transformers import PreTrainedModel

from editors.base_model import BaseModel
from editors.continuation import Continuation
from editors.stepping import Rows, Together, rows_of
from editors.wording import Wording
from service.engine.asking import Ask, Ended, Event, Listener, Said, Ticket, Which
from service.engine.errors import BatchTooLarge, Busy, GenerationFailed, GenerationTimeout, NotReady
from service.engine.requests import Limits, Published
from service.engine.weights import View
from service.telemetry import Generating, Telemetry, code_of

logger = logging.getLogger("mend")

CHUNK = 1024
"""Tokens that newcomers read in one go, unless one prompt alone is longer. The others wait for it."""
PADDING = 64
"""Most padding that is read to save a pass, which costs as much as so many tokens."""
PATIENCE = 4
"""Steps from one such reading to the next, unless as many wait: newcomers who read together cost others less time."""
STOPPING = "the service is stopping; ask again, which another or the next one answers"
LINGERS_S = 5.0
"""How long the thread waits for more before it ends."""

Reading = Callable[[], AbstractContextManager[tuple[View, Published]]]


@dataclass(eq=False)
class _Request:
    """What one caller asks. view: the live one when its first text began, which stays as it is until the last ends."""

    ticket: Ticket
    left: int
    view: View | None = None
    reading: ExitStack = field(default_factory=ExitStack)


@dataclass(eq=False)
class _Strand:
    """One text under way."""

    request: _Request
    index: int
    which: Which
    text: Continuation
    told: Generating | None = None

    @property
    def ids(self) -> list[int]:
        return [*self.text.prompt, *self.text.said]


@dataclass(eq=False)
class _Batch:
    """Texts of one view. open: whether others may join."""

    model: PreTrainedModel
    strands: list[_Strand]
    rows: Rows | None
    open: bool


class Generator:
    """reading: gives the live view and its state, which stay as they are inside."""

    def __init__(self, base: BaseModel, reading: Reading, limits: Limits, telemetry: Telemetry) -> None:
        self._base, self._reading, self._limits, self._telemetry = base, reading, limits, telemetry
        self._rows, self._wording = rows_of(base.model), Wording(base.model, base.tokenizer)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._strands: set[_Strand] = set()
        """All that have not ended."""
        self._queue: list[_Strand] = []
        self._batches: list[_Batch] = []
        self._steps = 0
        """Since newcomers read last."""
        self._ends_at = float("inf")

    def submit(self, asks: Sequence[tuple[Ask, Sequence[int]]], tell: Listener) -> Ticket:
        """Have prompts continued, each given with its tokens. Raises BatchTooLarge, Busy; NotReady when it ends.

        tell: called from the decoding thread, with everything in the order in which it comes to pass.
        """
        most = self._limits.together + self._limits.waiting
        if len(asks) > most:
            raise BatchTooLarge(f"one request may ask for {most} texts at most; ask for fewer at once", limit=most)
        if self._is_ending():
            raise NotReady(STOPPING)
        request = _Request(Ticket(len(asks), tell, time.monotonic() + self._limits.generation_s), len(asks))
        strands = [
            _Strand(request, index, ask.which, Continuation(self._wording, ids, ask.wish))
            for index, (ask, ids) in enumerate(asks)
        ]
        with self._changed:
            if len(self._strands) + len(strands) > most:
                raise Busy(
                    f"{self._limits.together} generations run and {self._limits.waiting} may wait, which leaves no "
                    f"place for {len(strands)} more; try again shortly",
                    limit=self._limits.waiting,
                )
            for strand in strands:
                strand.told = self._telemetry.generation(strand.which)
            self._strands.update(strands)
            self._queue += strands
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="generator", daemon=True)
                self._thread.start()
            self._changed.notify()
        return request.ticket

    def end_within(self, seconds: float) -> None:
        """Let every generation, also those to come, end by then with what it has said."""
        self._ends_at = time.monotonic() + seconds

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._strands:
                    self._changed.wait(LINGERS_S)
                if not self._strands:
                    self._thread = None
                    return
            try:
                self._turn()
            except Exception as error:  # a mistake of ours: everybody is told, and the next request is served
                logger.exception("an error on our side while decoding")
                self._batches.clear()
                with self._changed:
                    self._queue.clear()
                for strand in list(self._strands):
                    with suppress(Exception):  # whatever it is, this thread must not end with others waiting
                        self._leave(strand, error)

    def _turn(self) -> None:
        """A token for everybody; then newcomers read their prompts."""
        for batch in self._batches[:]:
            try:
                batch.rows.step([strand.text.said[-1] for strand in batch.strands])
            except Exception as error:
                self._split(batch, error)
            else:
                self._say(batch)
        self._steps += 1
        if self._batches and self._steps < PATIENCE and len(self._queue) < PATIENCE:
            return
        if newcomers := self._newcomers():
            self._steps = 0
            for strands in self._passes(newcomers):
                for batch in self._begun(self._model(strands[0]), strands, open=self._rows is Together):
                    self._say(batch)
                    if batch.strands:
                        self._join(batch)

    def _newcomers(self) -> list[_Strand]:
        """Who reads next: the first of the queue, and those behind it as far as there are places."""
        with self._changed:
            waiting = self._queue[:]
            places = self._limits.together - (len(self._strands) - len(waiting))
        gone = [strand for strand in waiting if self._is_over(strand)]
        chosen, tokens = [], 0
        for strand in [strand for strand in waiting if strand not in gone][:places]:
            tokens += len(strand.ids)
            if chosen and tokens > CHUNK:
                break
            chosen.append(strand)
        with self._changed:
            for strand in (*gone, *chosen):
                self._queue.remove(strand)
        for strand in gone:
            self._leave(strand)
        return chosen

    def _passes(self, strands: Sequence[_Strand]) -> list[list[_Strand]]:
        """Who reads in one pass: texts of one view and of like length."""
        passes: list[list[_Strand]] = []
        for strand in sorted(strands, key=lambda strand: (id(self._model(strand)), len(strand.ids))):
            last = passes[-1] if passes else []
            padding = sum(len(strand.ids) - len(each.ids) for each in last)
            if last and self._rows is Together and self._model(strand) is self._model(last[0]) and padding <= PADDING:
                last.append(strand)
            else:
                passes.append([strand])
        return passes

    def _is_over(self, strand: _Strand) -> bool:
        """Whether one that waits is not to be decoded."""
        ticket = strand.request.ticket
        if not ticket.over and self._is_late(strand):
            limit_s = self._limits.generation_s
            late = GenerationTimeout(f"no place became free in time ({limit_s:g} s); try again later", limit_s=limit_s)
            ticket.tell(NotReady(STOPPING) if self._is_ending() else late)
        return ticket.over

    def _is_late(self, strand: _Strand) -> bool:
        return self._is_ending() or time.monotonic() > strand.request.ticket.deadline

    def _is_ending(self) -> bool:
        return time.monotonic() > self._ends_at

    def _model(self, strand: _Strand) -> PreTrainedModel:
        """What a text is decoded from."""
        request = strand.request
        if request.view is None:
            request.view, request.ticket.published = request.reading.enter_context(self._reading())
        return request.view.model if strand.which == "live" else self._base.model

    def _begun(self, model: PreTrainedModel, strands: list[_Strand], *, open: bool) -> list[_Batch]:
        """Batches of texts that have been read as far as there is something of them; without those that cannot be."""
        try:
            return [_Batch(model, strands, self._rows(model, [strand.ids for strand in strands]), open)]
        except Exception as error:  # memory, most of all
            if len(strands) == 1:
                self._fail(strands[0], error)
                return []
        return [batch for strand in strands for batch in self._begun(model, [strand], open=False)]

    def _join(self, batch: _Batch) -> None:
        """Let texts go on in the batch of their view if there is one, else beside the others."""
        host = next((each for each in self._batches if each.open and each.model is batch.model), None)
        if host is not None and batch.open:
            try:
                host.rows.join(batch.rows)
            except Exception as error:  # memory
                logger.warning("texts could not join a batch: %s", type(error).__name__)
            else:
                host.strands += batch.strands
                return
        self._batches.append(batch)

    def _say(self, batch: _Batch) -> None:
        """Take each row's next token, tell what it makes, and drop the rows that have ended."""
        scores = batch.rows.scores
        best, sound = scores.argmax(-1).tolist(), scores.amax(-1).isfinite().tolist()
        going = [
            row for row, strand in enumerate(batch.strands) if self._goes_on(strand, scores[row], best[row], sound[row])
        ]
        if len(going) == len(batch.strands):
            return
        batch.strands = [batch.strands[row] for row in going]
        if not going:
            self._forget(batch)
            return
        try:
            batch.rows.keep(going)
        except Exception as error:
            self._split(batch, error)

    def _goes_on(self, strand: _Strand, scores: Tensor, best: int, sound: bool) -> bool:
        """Let a text say its next token. Whether there is more to come."""
        ticket, text = strand.request.ticket, strand.text
        if ticket.over:
            self._leave(strand)
            return False
        try:
            if not sound:
                raise GenerationFailed(f"its scores after {len(text.said)} tokens are no finite numbers")
            pieces = [text.take(scores, best)]
            if text.finish_reason is None and self._is_late(strand):
                pieces.append(text.end("timeout"))
        except Exception as error:
            self._fail(strand, error)
            return False
        for piece in filter(None, pieces):
            ticket.tell(Said(strand.index, piece))
        if text.finish_reason is None:
            return True
        self._leave(strand, Ended(strand.index, text.finish_reason, len(text.prompt), len(text.said)))
        return False

    def _split(self, batch: _Batch, error: Exception) -> None:
        """Let each text of a batch that failed go on alone, from what it has said; give one up that was alone."""
        self._forget(batch)
        strands, batch.strands, batch.rows = batch.strands, [], None
        if len(strands) == 1:
            self._fail(strands[0], error)
            return
        failed = type(error).__name__
        logger.warning("a batch of %d texts failed, and each goes on alone: %s", len(strands), failed)
        for strand in strands:
            for alone in self._begun(batch.model, [strand], open=False):
                self._batches.append(alone)
                self._say(alone)

    def _forget(self, batch: _Batch) -> None:
        self._batches = [each for each in self._batches if each is not batch]

    def _fail(self, strand: _Strand, error: Exception) -> None:
        logger.error("a generation failed", exc_info=error)
        if not isinstance(error, GenerationFailed):  # what it says may quote the text
            memory = isinstance(error, OutOfMemoryError | MemoryError)
            error = GenerationFailed(
                "there is no memory for it; ask again, or for less"
                if memory
                else f"{type(error).__name__}, an error on our side; it is in the service's log"
            )
        self._leave(strand, GenerationFailed(f"the model could not go on with this text: {error}"))

    def _leave(self, strand: _Strand, event: Event | None = None) -> None:
        """A text is not decoded any more. event: as it is told."""
        with self._changed:
            self._strands.discard(strand)
        failure = code_of(event) if isinstance(event, Exception) else None
        strand.told.end(len(strand.text.prompt), len(strand.text.said), failure)
        strand.request.left -= 1
        if not strand.request.left:
            strand.request.reading.close()
        if event is not None:
            strand.request.ticket.tell(event)
