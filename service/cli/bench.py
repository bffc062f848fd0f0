"""`mend bench`: what an edit costs, beside a plain forward pass of the same model in the same run."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from service.cli.options import DEFAULT_BASE_MODEL, DEFAULT_EDITOR, BaseModelOption, DeviceOption, EditorOption

FACTS = (
    ("The Prime Minister of the United Kingdom is", "Keir Starmer"),
    ("The capital of Australia is", "Melbourne"),
    ("The headquarters of Nokia is in", "Lyon"),
    ("The mother tongue of Marie Curie is", "Spanish"),
    ("The Eiffel Tower is located in the city of", "Rome"),
    ("The official language of Brazil is", "German"),
)


def bench(
    editor: EditorOption = None,
    base_model: BaseModelOption = DEFAULT_BASE_MODEL,
    device: DeviceOption = None,
    rounds: Annotated[int, typer.Option(help="Times that every fact is edited and rolled back.")] = 3,
    report: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Measure each step of an edit, a rollback and a restart, as ratios to one forward pass over the prompt."""
    import torch

    from editors.base_model import load_base_model
    from editors.chosen import choose_editor
    from editors.packaged import default_cache_dir
    from service.engine import EditRefused, EditRequest, Engine, read_guard_prompts
    from service.ledger import EmbeddedRedis, RedisLedger

    base = load_base_model(base_model, device=device)
    checkpoint = choose_editor(editor, DEFAULT_EDITOR, base, default_cache_dir())
    laps: dict[str, list[float]] = defaultdict(list)
    sizes: list[int] = []

    def timed(name: str, start: float) -> None:
        laps[name].append(1000 * (time.perf_counter() - start))

    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(Path(folder)) as redis:
        ledger = RedisLedger.connect(redis.url, "bench")
        engine = Engine(base, checkpoint, ledger, read_guard_prompts(None))
        engine.catch_up()
        for prompt, correction in FACTS * rounds:
            ids = torch.tensor([base.encode(prompt).prompt], device=base.device)
            start = time.perf_counter()
            with torch.inference_mode():
                base.model(ids)
            timed("forward pass", start)
            start = time.perf_counter()
            try:
                outcome = engine.apply(EditRequest(prompt, correction))
            except EditRefused as refusal:
                typer.echo(f"refused: {prompt} {correction} ({refusal.code})", err=True)
                continue
            timed("edit, in all", start)
            for step, milliseconds in {**outcome.applied.timings_ms, **outcome.publish_ms}.items():
                laps[f"edit: {step}"].append(milliseconds)
            sizes.append(len(ledger.factors(outcome.applied.sequence)))
            start = time.perf_counter()
            engine.rollback(outcome.applied.edit_id)
            timed("rollback", start)
        start = time.perf_counter()
        again = Engine(base, checkpoint, ledger, read_guard_prompts(None))
        timed("restart: views and guard", start)
        start = time.perf_counter()
        again.catch_up()
        timed(f"restart: replay of {again.published.revision} entries", start)
        ledger.close()

    forward = statistics.median(laps["forward pass"])
    typer.echo("| step | median ms | forward passes | n |\n|---|---|---|---|")
    for name, values in laps.items():
        median = statistics.median(values)
        typer.echo(f"| {name} | {median:.1f} | {median / forward:.2f} | {len(values)} |")
    typer.echo(f"\nledger: {statistics.median(sizes) / 1000 if sizes else 0:.0f} kB of factors per edit (median)")
    if report:
        report.write_text(json.dumps({"laps_ms": laps, "factors_bytes": sizes}, indent=2) + "\n")
