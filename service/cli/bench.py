"""`mend bench`: what edits cost, beside a plain forward pass of the same model in the same run."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.options import DEFAULT_BASE_MODEL, DEFAULT_EDITOR, BaseModelOption, DeviceOption, EditorOption

if TYPE_CHECKING:
    from editors.base_model import BaseModel
    from editors.checkpoint import Checkpoint
    from service.engine import EditRequest, Engine
    from service.ledger import RedisLedger

FACTS = (
    ("The Prime Minister of the United Kingdom is", "Keir Starmer"),
    ("The capital of Australia is", "Melbourne"),
    ("The headquarters of Nokia is in", "Lyon"),
    ("The mother tongue of Marie Curie is", "Spanish"),
    ("The Eiffel Tower is located in the city of", "Rome"),
    ("The official language of Brazil is", "German"),
)


FACTS_EACH = 3
"""Times that every fact is edited and rolled back, unless it is said otherwise."""


@dataclass
class Laps:
    """Milliseconds by step, and the bytes of edits' factors in the ledger."""

    taken: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    factors_bytes: list[int] = field(default_factory=list)

    @contextmanager
    def lap(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.taken[step].append(1000 * (time.perf_counter() - start))

    def add(self, step: str, laps: dict[str, float]) -> None:
        for name, milliseconds in laps.items():
            self.taken[f"{step}: {name}"].append(milliseconds)

    def table(self) -> str:
        forward = statistics.median(self.taken["forward pass"])
        lines = ["| step | median ms | forward passes | n |", "|---|---|---|---|"]
        for name, values in self.taken.items():
            median = statistics.median(values)
            lines.append(f"| {name} | {median:.1f} | {median / forward:.2f} | {len(values)} |")
        if self.factors_bytes:
            size = statistics.median(self.factors_bytes) / 1000
            lines += ["", f"ledger: {size:.1f} kB of factors per edit (median)"]
        return "\n".join(lines)


def bench(
    editor: EditorOption = None,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every fact is edited and rolled back.")] = FACTS_EACH,
    data: Annotated[Path | None, typer.Option(help="Data file: measure many of its edits at once instead.")] = None,
    edits: Annotated[int, typer.Option(min=1, help="So many.")] = 1000,
    replay: Annotated[
        int | None, typer.Option(min=10, help="Measure instead how long a ledger of so many entries takes to replay.")
    ] = None,
    generations: Annotated[
        int | None, typer.Option(min=1, help="Measure instead up to so many generations at once, by three ways.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure each step of an edit, a rollback and a restart, as ratios to one forward pass over a prompt."""
    from editors.base_model import load_base_model
    from editors.chosen import choose_editor
    from editors.data import read_data
    from editors.errors import DataFileError, ReportError
    from editors.packaged import default_cache_dir
    from service.ledger import EmbeddedRedis, RedisLedger

    if report and (report.is_dir() or not report.parent.is_dir()):
        raise ReportError(f"cannot write the report {report}: give a file in a folder that there is", file=str(report))
    examples = read_data(data).examples[: edits + rounds] if data else ()
    if data and len(examples) <= rounds:
        raise DataFileError(
            f"{data} has {len(examples)} examples, and {rounds} (--rounds) are made one by one beside the others; "
            "give more data",
            file=str(data),
        )
    base = load_base_model(base_model, device=device)
    checkpoint = choose_editor(editor, DEFAULT_EDITOR, base, default_cache_dir())
    laps = Laps()
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedRedis(Path(folder)) as redis,
        closing(RedisLedger.connect(redis.url, "bench")) as ledger,
    ):
        engine = _engine(base, checkpoint, ledger)
        if generations:
            from service.cli.bench_generations import measure_generations

            table, rows = measure_generations(engine, generations, rounds)
            typer.echo(table)
            if report:
                report.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
            return
        if replay:
            from service.cli.filling import fill

            fill(engine, replay)
        elif data:
            from service.engine import EditRequest

            requests = [EditRequest(e.prompt, e.correction, subject=e.named_subject) for e in examples]
            _measure_many(laps, engine, requests[:-rounds], requests[-rounds:])
        else:
            _measure_single(laps, engine, rounds)
        _restart(laps, base, checkpoint, redis.url)
        if replay:
            ledger.compact()
            _restart(laps, base, checkpoint, redis.url, ", compacted")
    typer.echo(laps.table())
    if report:
        figures = {"laps_ms": laps.taken, "factors_bytes": laps.factors_bytes}
        report.write_text(json.dumps(figures, indent=2) + "\n")


def _engine(base: BaseModel, checkpoint: Checkpoint, ledger: RedisLedger) -> Engine:
    """The guard measures as always, but refuses nothing, as do limits."""
    from service.engine import Engine, Limits, read_guard_prompts

    limits = Limits(guard_budget=1.0, batch_edits=sys.maxsize)
    return Engine(base, checkpoint, ledger, read_guard_prompts(None), limits)


def _restart(laps: Laps, base: BaseModel, checkpoint: Checkpoint, url: str, how: str = "") -> None:
    from service.ledger import RedisLedger

    with closing(RedisLedger.connect(url, "bench")) as ledger:
        with laps.lap("restart: views and guard"):
            again = _engine(base, checkpoint, ledger)
        _forward(laps, again, FACTS[0][0])
        with laps.lap(f"restart: replay of {ledger.head()} entries{how}"):
            again.catch_up()


def _measure_single(laps: Laps, engine: Engine, rounds: int) -> None:
    from service.engine import EditRefused, EditRequest

    engine.catch_up()
    with _waiting(laps, engine):
        for prompt, correction in FACTS * rounds:
            _forward(laps, engine, prompt)
            try:
                _edit_and_take_back(laps, engine, EditRequest(prompt, correction))
            except EditRefused as refusal:
                typer.echo(f"refused: {prompt} {correction} ({refusal.code})", err=True)


@contextmanager
def _waiting(laps: Laps, engine: Engine) -> Iterator[None]:
    """Begin to read the live weights again and again, as generations do, and note the longest wait for it."""
    done, waits = threading.Event(), [0.0]

    def read() -> None:
        while not done.wait(0.001):
            start = time.perf_counter()
            with engine.weights.reading():
                waits.append(1000 * (time.perf_counter() - start))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        done.set()
        reader.join()
    laps.taken["longest wait of a generation to begin, over all edits"].append(max(waits))


def _measure_many(laps: Laps, engine: Engine, many: Sequence[EditRequest], more: Sequence[EditRequest]) -> None:
    """A batch, an audit of it, and single edits and roll-backs beside it."""
    from service.engine import EditRefused

    engine.catch_up()
    for request in more:
        _forward(laps, engine, request.prompt)
    with laps.lap(f"batch of {len(many)}"):
        outcome = engine.apply_batch(many, partial=True)
    laps.add("batch", outcome.timings_ms)
    laps.factors_bytes += map(len, engine.ledger.factors(edit.applied for edit in engine.history.all_active()))
    active = engine.published.active_edits
    typer.echo(f"{active} of {len(many)} edits were made; fullness {engine.published.fullness}", err=True)
    with laps.lap(f"audit of {active} edits"):
        audit = engine.audit()
    typer.echo(f"{audit.held} of {active} hold", err=True)
    for request in more:
        try:
            _edit_and_take_back(laps, engine, request, allow_loss=True)
        except EditRefused as refusal:
            typer.echo(f"refused: {request.prompt} {request.correction} ({refusal.code})", err=True)


def _forward(laps: Laps, engine: Engine, prompt: str) -> None:
    import torch

    ids = torch.tensor([engine.base.encode(prompt).prompt], device=engine.base.device)
    with laps.lap("forward pass"), torch.inference_mode():
        engine.base.model(ids)


def _edit_and_take_back(laps: Laps, engine: Engine, request: EditRequest, *, allow_loss: bool = False) -> None:
    with laps.lap("edit, in all"):
        outcome = engine.apply(request, allow_loss=allow_loss)
    if outcome.applied is None:  # it was the answer already
        return
    laps.add("edit", {**outcome.applied.timings_ms, **outcome.publish_ms})
    laps.factors_bytes += map(len, engine.ledger.factors([outcome.applied]))
    with laps.lap("rollback"):
        engine.rollback(outcome.applied.edit_id)
