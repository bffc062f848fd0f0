"""What is planned without any data is what really happens, byte for byte and operation for operation."""

from __future__ import annotations

import functools
import gc

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from editors.errors import TargetsError
from editors.factors import quantise
from editors.mend.editor import MendEditor
from editors.mend.variant import Variant
from editors.planning.plan import TRAINING, Plan, plan
from editors.planning.shapes import read_shape
from editors.planning.walk import EditWalk, TrainingWalk, Workload
from editors.state import SumState
from editors.targets import resolve_targets
from editors.views import view
from tests.editors.planning.configs import WORK


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


class Arithmetic(TorchDispatchMode):
    """Floating point operations of what really runs."""

    flops = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        count = flop_registry.get(operation.overloadpacket, lambda *_, **__: 0)
        self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def flops_of(step):
    with Arithmetic() as arithmetic:
        step()
    return arithmetic.flops


def peak_of(step):
    """The most bytes that torch's own allocator had given out at once, beyond those at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


class TestBytesThatStay:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_are_those_of_the_real_things(self, make_shape, kind, dtype):
        shape = make_shape(kind)
        held = plan(shape, dtype, WORK).held
        model = shape.build(dtype, "cpu")
        targets = resolve_targets(model)
        names = [target.name for target in targets]
        live = view(model, names)
        editor = MendEditor(targets, Variant(rank=WORK.rank))
        assert held.base == nbytes(model.parameters())
        assert held.live == held.candidate == nbytes(live.get_parameter(name) for name in names)
        assert held.live == nbytes({*live.parameters()} - {*model.parameters()})
        assert held.accumulators == nbytes(SumState(targets).accumulators.values())
        assert held.editor == nbytes([*editor.parameters(), *editor.buffers()])
        assert held.dense_gradient == 4 * sum(model.get_parameter(name).numel() for name in names)
        assert held.serving == sum((held.base, held.buffers, held.live, held.candidate, held.accumulators, held.editor))

    def test_of_training_are_those_of_a_real_step(self, make_shape, kind, planned):
        held = planned.held
        model = make_shape(kind).build(torch.float32, "cpu")
        walk = TrainingWalk(model, resolve_targets(model), WORK)
        walk.step()
        states = walk.trainer.optimizer.state.values()
        assert held.gradients == nbytes(parameter.grad for parameter in walk.editor.parameters())
        assert held.moments == nbytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
        buffers = held.training - (held.base + held.editor + held.gradients + held.moments)
        assert buffers == nbytes(model.buffers()) + sum(
            nbytes(module.buffers()) for module in (walk.upper._full, walk.upper.module)
        )

    def test_of_an_edit_in_the_ledger_are_those_of_its_factors(self, make_shape, kind, planned):
        model = make_shape(kind).build(torch.float32, "cpu")
        walk = EditWalk(model, resolve_targets(model), WORK)
        rows = {
            target.name: tuple(torch.randn(walk.pristine.rows_seen(short, [walk.tokens])[0], d) for d in target.shape)
            for target, short in zip(walk.targets, walk.pristine.targets, strict=True)
        }
        assert planned.held.factors == len(quantise(rows).to_bytes())

    def test_of_an_edit_in_the_ledger_are_fewer_where_rows_have_no_gradient(self, make_shape):
        shape = make_shape("decoder")
        model = shape.build(torch.float32, "cpu")
        walk = EditWalk(model, resolve_targets(model), WORK)
        for step in walk.steps.values():
            step()
        rows = {name: layer.rows for name, layer in walk.factors.layers.items()}
        assert {rows[target.name] for target in walk.targets[:6]} == {WORK.tokens}
        assert {rows[target.name] for target in walk.targets[6:]} == {2}  # of the last block, those that are scored
        assert len(walk.factors.to_bytes()) < plan(shape, torch.float32, WORK).held.factors


class TestSteps:
    def test_compute_what_the_real_ones_do(self, make_shape, kind, planned):
        laps = planned.laps
        model = make_shape(kind).build(torch.float32, "cpu")
        edit = EditWalk(model, resolve_targets(model), WORK)
        real = {name: flops_of(step) for name, step in edit.steps.items()}
        stored = sum(layer.rows for layer in edit.factors.layers.values())
        every = sum(edit.pristine.rows_seen(target, [edit.tokens])[0] for target in edit.pristine.targets)
        assert real.pop("add to the state") == laps["add to the state"].flops * stored / every
        training = TrainingWalk(model, edit.targets, WORK)
        training.step()
        real[TRAINING] = flops_of(training.step)
        assert {name: laps[name].flops for name in real} == real
        assert all(real[name] > 0 for name in ("forward pass", "lower blocks", "capture", "editor", "search", TRAINING))

    def test_need_the_memory_that_the_real_ones_do(self, make_shape, kind, planned):
        laps = planned.laps
        model = make_shape(kind).build(torch.float32, "cpu")
        edit = EditWalk(model, resolve_targets(model), WORK)
        training = TrainingWalk(model, edit.targets, WORK)
        training.step()
        real = {name: peak_of(step) for name, step in {**edit.steps, TRAINING: training.step}.items()}
        extra = {name: laps[name].peak_bytes - laps[name].held_bytes for name in real}
        del real["quantise"]  # the host's
        # Indices are made on the CPU and not planned.
        assert {name: extra[name] for name in real} == pytest.approx(real, rel=0.05)

    def test_of_the_host_are_counted_in_values_and_bytes(self, planned):
        assert planned.laps["digest"].digested_bytes == planned.held.accumulators
        assert 2 * planned.laps["quantise"].quantised_values < planned.held.factors


@pytest.fixture(scope="module")
def plan_of(make_shape):
    @functools.cache
    def plan_of(width: int, work: Workload = WORK) -> Plan:
        shape = make_shape("decoder", hidden_size=width, intermediate_size=2 * width, head_dim=width // 2)
        return plan(shape, torch.float32, work)

    return plan_of


class TestGrowth:
    """What the paper is about: the editor, and an edit, grow with the width of a weight and not with its size."""

    def test_twice_as_wide_is_four_times_the_weights_and_twice_the_editor(self, plan_of):
        narrow, wide = plan_of(256), plan_of(512)
        for name in ("live", "candidate", "accumulators", "dense_gradient"):
            assert getattr(wide.held, name) == 4 * getattr(narrow.held, name)
        for name in ("editor", "factors", "gradients", "moments"):
            assert getattr(wide.held, name) == pytest.approx(2 * getattr(narrow.held, name), rel=0.02)
        assert wide.laps["editor"].flops == 2 * narrow.laps["editor"].flops
        assert wide.laps["add to the state"].flops == 4 * narrow.laps["add to the state"].flops

    def test_twice_the_tokens_are_twice_the_factors(self, plan_of):
        few, many = plan_of(256), plan_of(256, Workload(2 * WORK.tokens, WORK.rank, WORK.batch))
        assert many.laps["quantise"].quantised_values == 2 * few.laps["quantise"].quantised_values
        assert many.held.serving == few.held.serving

    def test_of_a_batch_concerns_training_alone(self, plan_of):
        small, large = plan_of(256), plan_of(256, Workload(WORK.tokens, WORK.rank, 2 * WORK.batch))
        assert large.edit_peak == small.edit_peak
        assert large.held == small.held
        assert large.training_peak - large.held.training > 1.5 * (small.training_peak - small.held.training)


class TestPeaks:
    def test_are_the_highest_of_all_steps(self, planned):
        assert planned.edit_peak == planned.laps["search"].peak_bytes > planned.held.serving
        assert planned.training_peak > planned.held.training

    def test_of_billions_of_parameters_are_planned_without_them(self):
        before = psutil.Process().memory_info().rss
        planned = plan(read_shape("gpt-j-6b"), torch.bfloat16, Workload(batch=2))
        gc.collect()
        assert psutil.Process().memory_info().rss - before < 500e6
        assert planned.edit_peak > 20e9
        assert planned.first_block == 25


class TestLayers:
    def test_may_be_chosen(self, make_shape):
        planned = plan(make_shape("decoder"), torch.float32, WORK, [r"layers\.1\.self_attn\.o_proj"])
        assert [target.name for target in planned.targets] == ["model.layers.1.self_attn.o_proj.weight"]
        assert (planned.first_block, planned.blocks) == (1, 4)

    def test_that_match_nothing_are_refused(self, make_shape):
        with pytest.raises(TargetsError, match="'gate_up' matches no linear layer"):
            plan(make_shape("decoder"), torch.float32, WORK, ["gate_up"])

    def test_a_plan_describes_its_model(self, kind, planned):
        assert (planned.kind, planned.dtype, planned.work) == (kind, torch.float32, WORK)
        assert planned.parameters * 4 == planned.held.base
