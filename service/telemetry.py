"""What is counted and traced while it happens: edits, their steps, generations, requests.

Flow: engine and routes tell one Telemetry; `GET /metrics` reads its registry, a collector gets the spans of its tracer,
and whoever listens (`GET /events`) is told of each step as it begins and ends.
Each application has one of its own, so that several in one process share no figure. What can be read at any time
(revision, capacity, lag) is not here, but read at the scrape (`service.api.metrics`).
"""

from __future__ import annotations

import time
from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from opentelemetry import trace
from opentelemetry.trace import NoOpTracerProvider, Span, StatusCode, TracerProvider
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from structlog.contextvars import get_contextvars

disable_created_metrics()  # else every series had another one, of when it began

Kind = Literal["edit", "batch", "rollback", "restore", "kill", "revive", "expire", "tag"]
Attribute = str | int | float

STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
WHOLE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 900)
EDITS = ("applied", "unchanged", "dry_run", "replayed",
         "did_not_take", "drawdown_exceeded", "edit_conflict", "would_break_edits", "state_full")  # fmt: skip
"""Outcomes that are told as 0 before there are any, so that the first one is seen as an increase."""
ROLLBACKS = ("rollback", "restore", "kill", "revive", "expire")
"""Kinds of changes that take edits back or return them."""


@dataclass(frozen=True)
class StepNews:
    """A step of a change has begun, or ended. request_id: None where no request asked for the change."""

    request_id: str | None
    kind: Kind
    step: str
    state: Literal["begun", "ended"]
    ms: float | None = None


Tell = Callable[[StepNews | None], None]
"""Is told of a step; None: another state is live. Called by the thread that does it, which must not be held up."""

_under_way: ContextVar[tuple[str | None, Kind] | None] = ContextVar("under_way", default=None)
"""Who asked for the change that this context is making, and which kind it is."""


class Telemetry:
    """Threads may share one. tracer_provider: takes the spans; without it there are none."""

    def __init__(self, tracer_provider: TracerProvider | None = None, tell: Tell = lambda _: None) -> None:
        self._tell = tell
        self.tracer = (tracer_provider or NoOpTracerProvider()).get_tracer("mend-service")
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        of_edits = self._counter("mend_edits", "Edits by what became of them; of a batch each one.", "outcome")
        of_rollbacks = self._counter(
            "mend_rollbacks", "Rollbacks of one edit, to a revision, or by a switch, and what became of them.",
            "kind", "outcome",
        )  # fmt: skip
        self._outcomes = {kind: partial(of_rollbacks.labels, kind) for kind in ROLLBACKS}
        self._outcomes |= {"edit": of_edits.labels, "batch": of_edits.labels}
        seconds = {
            kind: self._histogram(f"mend_{kind}_seconds", f"From asking for {what} to its outcome.", WHOLE_S)
            for kind, what in (("edit", "a single edit"), ("batch", "a batch"), ("rollback", "a rollback"))
        }
        self._change_seconds = dict.fromkeys(ROLLBACKS, seconds["rollback"]) | seconds
        self._step_seconds = self._histogram(
            "mend_step_seconds", "Each step of edits, batches and rollbacks, also one that failed.", STEP_S, "step"
        )
        self._waiting = Gauge("mend_waiting_changes", "Changes that wait for another one.", registry=self.registry)
        self._tokens = self._counter(
            "mend_tokens", "Tokens that generations read (prompt) and wrote (completion).", "kind", "view"
        )
        self._generation_seconds = self._histogram("mend_generation_seconds", "A generation.", WHOLE_S, "view")
        self._generations = Gauge("mend_running_generations", "Generations under way.", registry=self.registry)
        self._requests = self._counter(
            "mend_http_requests", "Answers; 499 where nobody waited for it.", "method", "route", "status"
        )
        self._request_seconds = self._histogram(
            "mend_http_request_seconds", "From a request to the last byte of its answer.", WHOLE_S, "method", "route"
        )
        self._problems = self._counter("mend_problems", "Problems that were answered, by their code.", "code")
        for outcome in EDITS:
            of_edits.labels(outcome)
        for kind in ROLLBACKS:
            of_rollbacks.labels(kind, "done")

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, buckets=buckets, registry=self.registry)

    # The engine

    @contextmanager
    def change(self, kind: Kind, edits: int = 1) -> Iterator[Change]:
        """A change that was asked for, of so many edits; what it comes to is to be said inside.

        One that fails came to the code of its error, and so did each of its edits that has none of its own. Tags
        change nothing that is counted.
        """
        change = Change()
        before = _under_way.set((get_contextvars().get("request_id"), kind))
        seconds = self._change_seconds[kind].time() if kind in self._change_seconds else nullcontext()
        with seconds, self._in_a_span(kind):
            try:
                yield change
            except Exception as error:
                items = getattr(error, "facts", {}).get("edits")
                change.came_to(code_of(error), items if kind == "batch" and items else edits)
                raise
            finally:
                _under_way.reset(before)
                for outcome, number in change.outcomes.items():
                    if kind in self._outcomes:
                        self._outcomes[kind](outcome).inc(number)

    @contextmanager
    def _in_a_span(self, name: str) -> Iterator[None]:
        """In that of a request, or one of its own where nobody asked."""
        if trace.get_current_span().get_span_context().is_valid:
            yield
            return
        span = self.tracer.start_span(name)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield

    @contextmanager
    def waited(self, turn: AbstractContextManager[None]) -> Iterator[None]:
        """Take a turn. Until it comes, a change waits."""
        with ExitStack() as taken:
            with self._waiting.track_inprogress(), self.step("wait"):
                taken.enter_context(turn)
            yield

    def step(self, name: str, **attributes: Attribute) -> Step:
        """Begin a step of a change."""
        span = self.tracer.start_span(name, attributes=_named(attributes))
        under_way = _under_way.get()
        tell = partial(self._tell_step, *under_way, name) if under_way else None
        return Step(name, span, self._step_seconds.labels(name), tell)

    def _tell_step(
        self, request_id: str | None, kind: Kind, step: str, state: Literal["begun", "ended"], ms: float | None = None
    ) -> None:
        self._tell(StepNews(request_id, kind, step, state, ms))

    def published(self) -> None:
        """Another state is live."""
        self._tell(None)

    def generation(self, view: str) -> Generating:
        """Begin a generation on a view, in the span of the request that wants it."""
        self._generations.inc()
        return Generating(self, view, self.tracer.start_span("generate", attributes=_named({"view": view})))

    def generated(self, view: str, seconds: float, tokens: Mapping[str, int]) -> None:
        """A generation has ended, however it did."""
        self._generations.dec()
        self._generation_seconds.labels(view).observe(seconds)
        for kind, number in tokens.items():
            self._tokens.labels(kind, view).inc(number)

    # HTTP

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered. route: its template, of which there are few."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def problem(self, code: str) -> None:
        """A problem was answered."""
        self._problems.labels(code).inc()


@dataclass
class Generating:
    """A generation under way, which may end in another thread than it began in."""

    telemetry: Telemetry
    view: str
    span: Span
    begun_at: float = field(default_factory=time.perf_counter)

    def end(self, prompt_tokens: int, completion_tokens: int, error: str | None = None) -> None:
        """error: the code of what ended it, if it is one. Its words may be those of a prompt."""
        tokens = {"prompt": prompt_tokens, "completion": completion_tokens}
        self.telemetry.generated(self.view, time.perf_counter() - self.begun_at, tokens)
        for kind, number in tokens.items():
            self.span.set_attribute(f"mend.{kind}_tokens", number)
        if error is not None:
            self.span.set_attribute("error.type", error)
            self.span.set_status(StatusCode.ERROR)
        self.span.end()


@dataclass
class Change:
    """outcomes: how many edits came to what."""

    outcomes: Count[str] = field(default_factory=Count)

    def came_to(self, outcome: str, edits: int | Iterable[Mapping[str, Any]] = 1, **attributes: Attribute) -> None:
        """Say what became of it, and tell the request's span. edits: how many, or what became of each of a batch."""
        if isinstance(edits, int):
            self.outcomes[outcome] += edits
        else:
            self.outcomes.update(item.get("code") or _status(item, outcome) for item in edits)
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attributes(_named({"outcome": outcome, **attributes}))


def _status(item: Mapping[str, Any], outcome: str) -> str:
    """Of an edit of a batch: those of which nothing is wrong came to what the batch came to."""
    return outcome if item["status"] == "withheld" else item["status"]


class Step:
    """A step that is under way. As a context manager it ends itself."""

    def __init__(self, name: str, span: Span, seconds: Histogram, tell: Callable[..., None] | None = None) -> None:
        self.name, self._span, self._seconds, self._tell = name, span, seconds, tell
        self._start = time.perf_counter()
        if tell:
            tell("begun")

    def end(self, error: BaseException | None = None) -> float:
        """It is over. Returns how many seconds it took. error: what ended it."""
        took_s = time.perf_counter() - self._start
        if error is not None:
            self._span.set_attribute("error.type", code_of(error))
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
        self._seconds.observe(took_s)
        if self._tell:
            self._tell("ended", round(1000 * took_s, 3))
        return took_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.end(error)


def code_of(error: BaseException) -> str:
    """The stable code of an error of ours, else `internal_error`."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else "internal_error"


def _named(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {f"mend.{name}": value for name, value in attributes.items()}
