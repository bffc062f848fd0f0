"""A plan in words: tables for people, one object for programs, with what was measured beside it where there is some."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from editors.planning.machine import Machine
from editors.planning.measure import Measured
from editors.planning.plan import TRAINING, Plan
from editors.planning.walk import FORWARD
from editors.scale import SCALES

SQUARE, LINEAR = "Σ d_in · d_out", "tokens · Σ (d_in + d_out)"
"""Over the edited weights."""
LAPS_GROW_WITH = {
    FORWARD: "tokens · (width + vocabulary)",
    "lower blocks": "tokens · width",
    "capture": f"{LINEAR}, and what autograd keeps of the blocks from the lowest edited one on",
    "editor": LINEAR,
    "search": f"{len(SCALES)} scales · tokens · (width + d_in + d_out)",
    "add to the state": f"{SQUARE} in int64, and one weight in float64",
    "write the candidate": "d_in · 4096 rows in float64",
}
EDIT = "an edit, but for decoding"
Row = Sequence[str]
Number = TypeVar("Number", int, float)


def tables(plan: Plan, machine: Machine, measured: Measured | None = None) -> str:
    """Memory and time, and what they grow with, in Markdown."""
    work = plan.work
    parts = [
        f"{plan.name}: {plan.parameters:,} parameters ({plan.kind}) in {_name(plan.dtype)}; {len(plan.targets)} edited "
        f"weights, from block {plan.first_block} of {plan.blocks} on; {work.tokens} tokens, rank {work.rank}, batches "
        f"of {work.batch}",
        _table(("memory", "planned", "grows with"), _memory(plan)),
        _table(("step", "operations", "moved", "ms", "forward passes"), _times(plan, machine)),
        _speed(machine),
        f"The gradient of the edited weights is never formed: it would take {_bytes(plan.held.dense_gradient)} in "
        f"float32, and grows with {SQUARE}. Capture, editor and ledger see only its factors, "
        f"{_bytes(plan.held.factors)} per edit, which grow with {LINEAR}. What does grow with {SQUARE} are the copies "
        "and the exact state, and the steps that add to it, write, digest and publish it.",
    ]
    if measured:
        parts += [
            _table(("memory", "planned", "measured", "measured / planned"), _compared_memory(plan, measured)),
            _table(
                ("step", "planned ms", "measured ms", "planned forward passes", "measured forward passes", "ratio"),
                _compared_times(plan, machine, measured),
            ),
        ]
    return "\n\n".join(parts)


def as_object(plan: Plan, machine: Machine, measured: Measured | None = None) -> dict[str, Any]:
    """The same for programs, in bytes, operations and seconds."""
    forward = machine.seconds(plan.laps[FORWARD])
    speeds = asdict(machine)
    return {
        "model": {
            "name": plan.name,
            "kind": plan.kind,
            "dtype": _name(plan.dtype),
            "parameters": plan.parameters,
            "first_edited_block": plan.first_block,
            "blocks": plan.blocks,
            "edited": [asdict(target) for target in plan.targets],
        },
        "workload": asdict(plan.work),
        "bytes": {
            **asdict(plan.held),
            "serving": plan.held.serving,
            "edit_peak": plan.edit_peak,
            "training_peak": plan.training_peak,
        },
        "steps": {
            name: {
                "flops": lap.flops,
                "moved_bytes": lap.moved_bytes,
                "held_bytes": lap.held_bytes,
                "peak_bytes": lap.peak_bytes,
                "seconds": machine.seconds(lap),
                "forward_passes": machine.seconds(lap) / forward,
            }
            for name, lap in plan.laps.items()
        },
        "machine": {**speeds, "flops": {_name(dtype): rate for dtype, rate in machine.flops.items()}},
        "measured": asdict(measured) if measured else None,
    }


def _memory(plan: Plan) -> list[Row]:
    held = plan.held
    rows = [
        ("base weights", held.base, "parameters"),
        ("buffers, with their copies in the views", held.buffers, ""),
        ("live copy of the edited weights", held.live, SQUARE),
        ("candidate copy of them", held.candidate, SQUARE),
        ("exact state, int64", held.accumulators, f"{SQUARE}; not the number of edits"),
        ("editor, float32", held.editor, "rank · (d_in + d_out) of each shape"),
        ("**serving**, caches of requests aside", held.serving, ""),
        *(
            (f"… and {name}", plan.laps[name].peak_bytes - held.serving, grows)
            for name, grows in LAPS_GROW_WITH.items()
        ),
        ("**an edit at its peak**", plan.edit_peak, ""),
        ("an edit in the ledger, at most", held.factors, LINEAR),
        ("training: base weights, buffers, editor", held.training - held.gradients - held.moments, ""),
        ("… and the editor's gradients", held.gradients, "as the editor"),
        ("… and Adam's moments", held.moments, "as the editor"),
        ("… and activations of a step", plan.training_peak - held.training, f"edits in a batch; {LINEAR}; vocabulary"),
        ("**a training step at its peak**", plan.training_peak, ""),
    ]
    return [(name, _bytes(size), grows) for name, size, grows in rows]


def _times(plan: Plan, machine: Machine) -> Iterable[Row]:
    seconds = _with_sum({name: machine.seconds(lap) for name, lap in plan.laps.items()})
    flops, moved = (
        _with_sum({name: getattr(lap, what) for name, lap in plan.laps.items()}) for what in ("flops", "moved_bytes")
    )
    for name, planned in seconds.items():
        passes = planned / seconds[FORWARD]
        yield name, _scaled(flops[name], "flop"), _bytes(moved[name]), _milliseconds(planned), f"{passes:.2f}"


def _compared_memory(plan: Plan, measured: Measured) -> Iterable[Row]:
    pairs = {
        "serving": (plan.held.serving, measured.serving_bytes),
        **{f"{name}, at its peak": (plan.laps[name].peak_bytes, peak) for name, peak in measured.peak_bytes.items()},
        "between training steps": (plan.held.training, measured.training_bytes),
        "an edit in the ledger": (plan.held.factors, measured.factors_bytes),
    }
    for name, (planned, found) in pairs.items():
        yield name, _bytes(planned), _bytes(found), f"{found / planned:.2f}"


def _compared_times(plan: Plan, machine: Machine, measured: Measured) -> Iterable[Row]:
    planned = _with_sum({name: machine.seconds(lap) for name, lap in plan.laps.items()})
    found, passes = _with_sum(measured.seconds), _with_sum(measured.forward_passes)
    for name, seconds in planned.items():
        expected = seconds / planned[FORWARD]
        yield (
            name,
            *map(_milliseconds, (seconds, found[name])),
            *(f"{value:.2f}" for value in (expected, passes[name], passes[name] / expected)),
        )


def _with_sum(laps: Mapping[str, Number]) -> dict[str, Number]:
    """The laps, with the sum of those that make an edit before the training step."""
    edit = sum(value for name, value in laps.items() if name not in (FORWARD, TRAINING))
    return {**{name: value for name, value in laps.items() if name != TRAINING}, EDIT: edit, TRAINING: laps[TRAINING]}


def _speed(machine: Machine) -> str:
    rates = ", ".join(f"{_scaled(rate, 'flop')}/s in {_name(dtype)}" for dtype, rate in machine.flops.items())
    return (
        f"Times are for {rates}; {_bytes(machine.bandwidth)}/s; {1e6 * machine.launch_s:.3g} µs to start an operation; "
        f"a digest of {_bytes(machine.digested)}/s."
    )


def _table(header: Row, rows: Iterable[Row]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds:.3g}"


def _bytes(count: float) -> str:
    return _scaled(count, "B")


def _scaled(count: float, unit: str) -> str:
    """Three digits and a decimal prefix."""
    if not count:
        return f"0 {unit}"
    power = min(max(0, math.floor(math.log10(abs(count)) / 3)), 5)
    return f"{count / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
