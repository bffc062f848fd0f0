"""Wire everything together: settings -> base model, editor, ledger -> engine -> HTTP. The only place that does.

One keeper thread loads the model, replays the ledger and then watches it (`service.watch`), so that the port answers
(`/livez`, and 503 with a reason) from the first moment. Others audit the edits from time to time and compact the
ledger, and roll back what expires. What fails while loading ends the process with one clear line.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime

import torch
from fastapi import FastAPI
from opentelemetry.trace import TracerProvider

from editors.base_model import load_base_model
from editors.checkpoint import CARD, Checkpoint, read_card
from editors.chosen import choose_editor
from editors.errors import CheckpointError, EditorsError
from service.api import (
    batch,
    docs,
    edit_weights,
    events,
    generation,
    health,
    metrics,
    openai,
    problems,
    replicas,
    rollbacks,
    scoring,
    sessions,
)
from service.api.doors import guard
from service.api.events import Events
from service.api.routes import router
from service.api.waiting import Waiting
from service.confidential import log_prompts
from service.dashboard import router as pages
from service.dashboard import visits
from service.engine import EditorChanged, Engine, EngineError, Limits, NotReady, read_guard_prompts
from service.ledger import (
    EmbeddedRedis,
    LedgerError,
    LedgerUnavailable,
    OutcomeUnknown,
    RedisLedger,
    Seen,
)
from service.settings import DEFAULT_EDITOR, Settings
from service.telemetry import Telemetry
from service.tracing import close, open_tracer_provider
from service.watch import EXPECTED, WATCH_EVERY_S, Watch, of_ours

logger = logging.getLogger("mend")

VERSION = "0.1.0"
LOADING_ENDS_WITHIN_S = 10.0
EXPIRY_EVERY_S = 0.25
"""Between two looks at which edit expires next, at most."""
HOUSEKEEPING_EVERY_S = 10.0
"""Between two looks at whether there is anything to audit or to compact."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def opened(settings: Settings, telemetry: Telemetry | None = None) -> Iterator[tuple[Engine, EmbeddedRedis | None]]:
    """The engine with its ledger replayed, and the embedded Redis if it is on one; all is closed behind it.

    Raises one of EXPECTED.
    """
    guard_prompts = read_guard_prompts(settings.guard_prompts)
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ValueError(f"MEND_DTYPE is {settings.dtype!r}; it must be one of {', '.join(DTYPES)}")
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    limits = Limits(
        prompt_tokens=settings.max_prompt_tokens,
        correction_tokens=settings.max_correction_tokens,
        new_tokens=settings.max_new_tokens,
        answer_tokens=settings.answer_tokens,
        guard_budget=settings.guard_budget,
        batch_edits=settings.max_batch,
        together=settings.max_generations,
        waiting=settings.max_queue,
        generation_s=settings.generate_timeout_s,
    )
    with ExitStack() as stack:
        embedded = None
        if settings.redis_url is None:
            embedded = stack.enter_context(EmbeddedRedis(settings.data_dir, settings.redis_server))
        base = load_base_model(settings.base_model, device=settings.device, dtype=dtype)
        checkpoint = choose_editor(settings.editor, DEFAULT_EDITOR, base, settings.data_dir / "editors")
        if checkpoint.notice:
            logger.warning("%s", checkpoint.notice)
        model, own = f"{settings.namespace}:{_short(base.digest)}", _short(checkpoint.digest)
        url = embedded.url if embedded else settings.redis_url
        ledger = RedisLedger.connect(url, f"{model}:{own}", settings.durability)
        stack.enter_context(closing(ledger))
        ledger.inspect()
        engine = Engine(base, checkpoint, ledger, guard_prompts, limits, telemetry)
        engine.catch_up()
        try:
            engine.expire()
        except (EngineError, LedgerError) as error:  # tried again as soon as the model is served
            logger.warning("what has expired is not rolled back yet: %s", error)
        unasked = settings.editor is None and engine.published.revision == 0
        _look_for_others(ledger, model, checkpoint, own, required=unasked)
        yield engine, embedded


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _named(digest: str) -> str:
    """The folder of the editor with this digest where it is shipped, else what is known of it."""
    for path in DEFAULT_EDITOR.parent.glob(f"*/{CARD}"):
        with suppress(CheckpointError):  # somebody else's, and damaged
            if _short(read_card(path.parent)["digest"]) == digest:
                return str(path.parent)
    return f"sha256:{digest}…"


def _look_for_others(ledger: RedisLedger, model: str, checkpoint: Checkpoint, own: str, *, required: bool) -> None:
    """Edits belong to the editor that made them: after a change of editor, say where those of before are.

    required: nobody named this editor, and it has made none yet; the change must not pass. Raises EditorChanged.
    """
    try:
        others = [name.rpartition(":")[2] for name in ledger.namespaces(f"{model}:")]
    except LedgerUnavailable:  # a user who may use one ledger need not be permitted to look for others
        return
    others = [_named(digest) for digest in others if digest != own]
    if not others:
        return
    if required:
        raise EditorChanged(
            f"this Redis holds edits of this base model that were made with another editor ({', '.join(others)}), and "
            f"none of {checkpoint.name}, which is taken when none is named: name the one that made them with "
            "MEND_EDITOR (a training-free one is in the folder `editors` of its service's MEND_DATA_DIR), or begin "
            f"without those edits by MEND_EDITOR={checkpoint.folder}",
            editors=others,
        )
    logger.warning(
        "this Redis also holds edits of other editors of this base model (%s), which are not served; "
        "to serve them, name the editor that made them with MEND_EDITOR",
        ", ".join(others),
    )


class Service:
    """What one process holds. `failure`: why it could not start, in one line."""

    def __init__(
        self, settings: Settings, telemetry: Telemetry, listeners: Events,
        on_failure: Callable[[], None], on_ready: Callable[[], None],
    ) -> None:  # fmt: skip
        self._settings, self._telemetry, self._events = settings, telemetry, listeners
        self._on_failure, self._on_ready = on_failure, on_ready
        self._engine: Engine | None = None
        self._embedded: EmbeddedRedis | None = None
        self._watch: Watch | None = None
        self._stopping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
        self._expirer = threading.Thread(target=self._expire, name="expirer", daemon=True)
        self.failure: str | None = None

    def start(self) -> None:
        self._keeper.start()

    def stop(self) -> None:
        """End in order; what is still being loaded is waited for a little only."""
        self._stopping.set()
        self._keeper.join(None if self._engine else LOADING_ENDS_WITHIN_S)
        for thread in (self._housekeeper, self._expirer):
            if thread.ident is not None:
                thread.join()

    def drain(self, within_s: float) -> None:
        """Let what is being generated end by then, and those who listen leave at once, since the service stops."""
        self._events.end()
        if self._engine is not None:
            self._engine.end_generations(within_s)

    @property
    def engine(self) -> Engine | None:
        """The engine once it is loaded, ready or not."""
        return self._engine

    def ready_engine(self) -> Engine:
        """The engine. Raises NotReady while the model is loading, and while the ledger contradicts it."""
        if self._engine is None:
            raise NotReady("the model is still being loaded; try again shortly, /readyz tells when")
        trouble = self._trouble
        if "state" in trouble:
            raise NotReady(trouble["state"])
        return self._engine

    @property
    def _trouble(self) -> dict[str, str]:
        return self._watch.trouble if self._watch else {}

    def checks(self) -> dict[str, str]:
        """Each part that readiness depends on: `ok`, or its trouble."""
        loaded = "ok" if self._engine else "loading"
        waiting = "waiting for the model"
        ledger = durability = "ok" if self._engine else waiting
        return {"model": loaded, "ledger": ledger, "durability": durability, **self._trouble}

    def require_ledger(self) -> None:
        """Raises LedgerUnavailable while the ledger is known to be gone, so that nobody waits to be told."""
        trouble = self._trouble
        if "ledger" in trouble:
            raise LedgerUnavailable(trouble["ledger"], reason="known")

    def head(self) -> int | None:
        """The last revision of the ledger; None while it cannot be asked, without trying again to."""
        if self._engine is None or "ledger" in self._trouble:
            return None
        with suppress(LedgerError):
            return self._engine.ledger.head()
        return None

    def warnings(self) -> list[str]:
        """What may go wrong, but need not: how Redis may lose edits, where that is accepted."""
        return list(self._watch.warnings) if self._watch else []

    @property
    def mismatches(self) -> int:
        """How often this replica took itself out because its state is not that of the ledger."""
        return self._watch.mismatches if self._watch else 0

    def replicas(self) -> tuple[str, list[Seen]]:
        """The id of this service, and every service on its ledger, once the engine is loaded. Raises LedgerError."""
        self.require_ledger()
        return self._watch.id, self._watch.replicas()

    def _keep(self) -> None:
        with ExitStack() as stack:
            try:
                engine, self._embedded = stack.enter_context(opened(self._settings, self._telemetry))
            except Exception as error:  # whatever it was: a service that can never be ready has to end
                if not isinstance(error, EXPECTED):
                    logger.exception("an error on our side")
                said = (str(error) if isinstance(error, EXPECTED) else of_ours(error)).splitlines()
                self.failure, *more = said or [type(error).__name__]
                for line in more:
                    logger.error("%s", line)
                self._events.end()
                self._on_failure()
                return
            if self._stopping.is_set():
                return
            self._watch = Watch(engine, self._embedded, VERSION, self._stopping)
            self._watch.look()
            self._engine, published = engine, engine.published
            logger.info(
                "revision %d, %d active edits, state %s", published.revision, published.active_edits, published.digest
            )
            self._on_ready()
            self._housekeeper.start()
            self._expirer.start()
            self._watch.run()

    def _keep_house(self) -> None:
        """Look from time to time whether the edits hold and the ledger is short. The watch must not wait for either."""
        audited_at = time.monotonic()
        every_s = self._settings.audit_every_s
        while not self._stopping.wait(min(HOUSEKEEPING_EVERY_S, every_s or HOUSEKEEPING_EVERY_S)):
            try:
                if every_s and time.monotonic() - audited_at >= every_s:
                    audited_at = time.monotonic()
                    last = self._engine.last_audit
                    if last is None or last.published.revision != self._engine.published.revision:
                        self._engine.audit(self._stopping)
            except Exception:  # the next time may go well
                logger.exception("the audit failed")
            if self._settings.compact_every and not self._trouble:
                self._compact(self._engine)

    def _expire(self) -> None:
        """Roll back what expires, when it does. Whoever is behind a change that takes long is late."""
        while not self._stopping.wait(self._until_expiry_s(self._engine)):
            try:
                for edit in self._engine.expire():
                    logger.info("edit %s has expired and was rolled back", edit.id)
            except (EngineError, LedgerError) as error:  # the next time may go well
                logger.warning("what has expired was not rolled back: %s", error)
                self._stopping.wait(WATCH_EVERY_S)
            except Exception:
                logger.exception("what has expired was not rolled back")
                self._stopping.wait(WATCH_EVERY_S)

    def _until_expiry_s(self, engine: Engine) -> float:
        """Not for long, since another edit may come that expires earlier."""
        due = engine.history.next_expiry()
        left_s = (due - datetime.now(UTC)).total_seconds() if due else EXPIRY_EVERY_S
        return min(max(left_s, 0.0), EXPIRY_EVERY_S)

    def _compact(self, engine: Engine) -> None:
        try:
            done = engine.compact(self._settings.compact_every)
        except OutcomeUnknown:
            logger.warning("whether the ledger was compacted is not known; it is as good as before")
        except (EngineError, LedgerError) as error:  # nothing depends on it; the next time may go well
            logger.warning("the ledger was not compacted: %s", error)
        except Exception:
            logger.exception("the ledger was not compacted")
        else:
            if done is None:
                return
            logger.info(
                "the ledger was compacted up to revision %d: a snapshot of %d bytes; the factors of %d edits that were "
                "rolled back were dropped", done.sequence, done.snapshot_bytes, done.dropped_factors,
            )  # fmt: skip


def create_app(
    settings: Settings,
    *,
    on_failure: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
    tracer_provider: TracerProvider | None = None,
) -> FastAPI:
    """The ASGI application. on_failure, on_ready: called once, from the keeper thread.

    tracer_provider: takes the spans, instead of the collector that settings or environment name.
    Raises TracingUnavailable, and KeysUnusable when the file of keys cannot be read.
    """
    own = None if tracer_provider else open_tracer_provider(settings.otlp_endpoint, VERSION)
    listeners = Events()
    telemetry = Telemetry(tracer_provider or own, listeners.tell)
    service = Service(settings, telemetry, listeners, on_failure, on_ready)
    telemetry.registry.register(metrics.StateCollector(service, VERSION))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()
        if own is not None:
            close(own)

    app = FastAPI(
        title="mend-service",
        version=VERSION,
        summary="Correct facts in a language model that is already serving.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # they would lead to whatever host the client named
        # FastAPI's own, where it has one, would tell query strings, and so prompts.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service, app.state.waiting, app.state.telemetry = service, Waiting(), telemetry
    app.state.events = listeners
    log_prompts(settings.log_prompts)
    # A batch before the routes of one edit, whose ids would match its path.
    others = (rollbacks, edit_weights, generation, scoring, health, openai, events, replicas, metrics, docs, sessions)
    guard(app, settings, [batch.router, router, *(part.router for part in others)], pages.router, telemetry)
    problems.install(app, EngineError, LedgerError, EditorsError)
    visits.install(app)
    return app
