"""What serving, editing and training would take for a model of any shape, worked out without its weights.

Flow: Shape -> model on the meta device -> EditWalk and TrainingWalk under `DryRun` -> bytes and operations.
Nothing is estimated by a formula of one architecture: the code that serves and trains is run on tensors without data,
and what it holds, computes and moves is counted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.kinds import Kind, kind_of
from editors.planning.dry_run import Cost, DryRun
from editors.planning.shapes import Shape
from editors.planning.walk import DIGEST, QUANTISE, EditWalk, TrainingWalk, Workload
from editors.targets import Target, find_stacks, resolve_targets

TRAINING = "training step"


@dataclass(frozen=True)
class Held:
    """Bytes that stay. Edited weights are d_in · d_out each; the model's own dtype holds all but the state's integers.

    base: every parameter. buffers: the model's, with the copies in all its views. live, candidate: copies of the
    edited weights. accumulators: of the exact state, int64. editor: parameters and statistics.
    factors: of one edit in the ledger, at most: rows without a gradient are left out.
    dense_gradient: of the edited weights in float32, which is never formed.
    gradients, moments: of the editor's parameters, in training. training: all that training holds between two steps.
    """

    base: int
    buffers: int
    live: int
    candidate: int
    accumulators: int
    editor: int
    factors: int
    dense_gradient: int
    gradients: int
    moments: int
    training: int

    @property
    def serving(self) -> int:
        return self.base + self.buffers + self.live + self.candidate + self.accumulators + self.editor


@dataclass(frozen=True)
class Plan:
    """laps: what each step of an edit costs, a plain forward pass before them and a training step after them.

    first_block: the lowest one that is edited, of `blocks` in the first stack.
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    parameters: int
    targets: tuple[Target, ...]
    first_block: int
    blocks: int
    work: Workload
    held: Held
    laps: dict[str, Cost]

    @property
    def edit_peak(self) -> int:
        return max(lap.peak_bytes for name, lap in self.laps.items() if name != TRAINING)

    @property
    def training_peak(self) -> int:
        return self.laps[TRAINING].peak_bytes


def plan(shape: Shape, dtype: torch.dtype, work: Workload, patterns: Sequence[str] | None = None) -> Plan:
    """Work out a plan. patterns: of the layers to edit; the family's preset without any.

    Raises BaseModelUnreadable when the shape cannot be built, TargetsError as `resolve_targets` does.
    """
    with DryRun() as run:
        model = shape.build(dtype, "meta")
        targets = resolve_targets(model, patterns)
        laps: dict[str, Cost] = {}
        walk = EditWalk(model, targets, work)
        serving = run.live_bytes
        for name, step in walk.steps.items():
            with run.count() as laps[name]:
                if name != DIGEST:  # which the host makes of the state's bytes
                    step()
        first_block, factors = walk.pristine.first, len(walk.factors.to_bytes())
        held = {
            "base": weigh(model.parameters()),
            "live": weigh(walk.live.get_parameter(target.name) for target in targets),
            "candidate": weigh(walk.candidate.get_parameter(target.name) for target in targets),
            "accumulators": weigh(walk.state.accumulators.values()),
            "editor": weigh([*walk.editor.parameters(), *walk.editor.buffers()]),
        }
        laps[DIGEST].digested_bytes = held["accumulators"]
        laps[QUANTISE].quantised_values = sum(u.numel() + delta.numel() for u, delta in walk.rows.values())
        held["buffers"] = serving - sum(held.values())
        del walk, step
        gc.collect()  # views are rings of modules and their hooks
        walk = TrainingWalk(model, targets, work)
        walk.step()  # the optimiser's moments exist from here on
        training = run.live_bytes
        with run.count() as laps[TRAINING]:
            walk.step()
        moments = (value for state in walk.trainer.optimizer.state.values() for value in state.values())
        return Plan(
            name=shape.name,
            kind=kind_of(model),
            dtype=dtype,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            targets=targets,
            first_block=first_block,
            blocks=len(find_stacks(model)[0][1]),
            work=work,
            held=Held(
                **held,
                factors=factors,
                dense_gradient=sum(4 * target.d_in * target.d_out for target in targets),
                gradients=weigh(parameter.grad for parameter in walk.editor.parameters()),
                moments=weigh(moment for moment in moments if moment.is_meta),
                training=training,
            ),
            laps=laps,
        )


def weigh(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, where several share it counted once."""
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())
