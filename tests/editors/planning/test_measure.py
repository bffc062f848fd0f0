"""A plan is measured by the same steps on a real device, and a machine's speed turns operations into seconds."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from editors.errors import BaseModelUnreadable
from editors.planning.dry_run import Cost
from editors.planning.machine import Machine, measure_machine
from editors.planning.measure import _Memory, free_bytes, measure
from editors.planning.report import EDIT, as_object, tables
from editors.planning.walk import EditWalk, TrainingWalk
from editors.targets import resolve_targets
from tests.editors.planning.configs import WORK

CPU = torch.device("cpu")
MIB = 2**20


def machine(**changes):
    speeds = {"flops": {torch.float32: 100.0}, "bandwidth": 10.0, "launch_s": 0.5, "overlaps": False}
    return Machine(**{**speeds, "digested": 4.0, "quantised": 2.0, **changes})


class TestMachine:
    def test_adds_an_operations_costs_up_unless_they_overlap(self):
        cost = Cost(Counter({(torch.float32, 300, 20): 2, (torch.float32, 0, 1): 4}))
        assert machine().seconds(cost) == pytest.approx(2 * (3 + 2 + 0.5) + 4 * (0.1 + 0.5))
        assert machine(overlaps=True).seconds(cost) == pytest.approx(2 * 3 + 4 * 0.5)

    def test_counts_what_the_host_does(self):
        assert machine().seconds(Cost(quantised_values=6, digested_bytes=8)) == 3 + 2

    def test_is_measured_in_the_dtypes_that_an_edit_needs(self):
        measured = measure_machine(CPU, torch.bfloat16)
        assert list(measured.flops) == [torch.bfloat16, torch.float32, torch.float64]
        assert not measured.overlaps
        assert all(1e8 < rate < 1e14 for rate in measured.flops.values())
        assert 1e8 < measured.bandwidth < 1e12
        assert 1e-7 < measured.launch_s < 1e-2
        assert 1e7 < measured.digested < 1e11
        assert 1e5 < measured.quantised < 1e10

    def test_may_be_another_one(self):
        given = measure_machine(CPU, torch.float32, flops=1e15, bandwidth=3e12)
        assert set(given.flops.values()) == {1e15}
        assert given.bandwidth == 3e12
        assert given.overlaps


@pytest.fixture(scope="session")
def measured(make_shape, kind):
    return measure(make_shape(kind), torch.float32, CPU, WORK, rounds=1)


class TestMeasure:
    def test_has_every_step_of_the_plan(self, planned, measured):
        for figures in (measured.seconds, measured.forward_passes, measured.peak_bytes):
            assert list(figures) == list(planned.laps)
        assert measured.forward_passes["forward pass"] == 1
        assert all(seconds > 0 for seconds in measured.seconds.values())
        assert 0 < measured.factors_bytes <= planned.held.factors

    def test_is_reported_beside_the_plan(self, planned, measured):
        text = tables(planned, machine(), measured)
        for name in (*planned.laps, EDIT):
            assert text.count(f"| {name} |") == 2
        assert "measured / planned" in text
        alone = tables(planned, machine())
        assert "measured" not in alone
        assert text.startswith(alone)
        assert as_object(planned, machine(), measured)["measured"]["seconds"] == measured.seconds
        assert as_object(planned, machine())["measured"] is None

    def test_a_model_that_overflows_is_refused(self, make_shape):
        wide = {"hidden_size": 512, "intermediate_size": 1024, "hidden_act": "relu2", "initializer_range": 1.0}
        with pytest.raises(BaseModelUnreadable, match=r"in torch.float16 the logits of .* are not finite"):
            measure(make_shape("decoder", **wide), torch.float16, CPU, WORK, rounds=1)


class TestMemory:
    def test_sees_what_is_held_and_what_was_only_there_for_a_moment(self):
        memory = _Memory(CPU)
        kept = torch.ones(64 * MIB, dtype=torch.uint8)
        assert memory.held() / MIB == pytest.approx(64, abs=8)
        peak = memory.peak_of(lambda: torch.ones(128 * MIB, dtype=torch.uint8).amax())
        assert peak / MIB == pytest.approx(64 + 128, abs=16)
        del kept
        assert memory.held() / MIB == pytest.approx(0, abs=8)

    def test_that_is_free_is_known(self):
        assert 2**20 < free_bytes(CPU) < 2**50


class TestWalk:
    def test_an_edit_that_was_taken_back_left_nothing(self, make_shape, kind):
        model = make_shape(kind).build(torch.float32, "cpu")
        walk = EditWalk(model, resolve_targets(model), WORK)
        weights = [walk.live.get_parameter(target.name).clone() for target in walk.targets]
        empty = walk.state.digest()
        for step in walk.steps.values():
            step()
        changed = [walk.live.get_parameter(target.name) for target in walk.targets]
        assert walk.state.digest() != empty
        assert not any(torch.equal(old, new) for old, new in zip(weights, changed, strict=True))
        walk.take_back()
        assert walk.state.digest() == empty
        assert all(torch.equal(old, new) for old, new in zip(weights, changed, strict=True))

    def test_all_texts_are_as_long_as_the_workload_says(self, make_shape, kind):
        model = make_shape(kind).build(torch.float32, "cpu")
        corpus = TrainingWalk(model, resolve_targets(model), WORK).trainer.corpus
        chosen = corpus.choose(random.Random(0), 3)
        batch = corpus.draw(random.Random(0), chosen, self_share=0.0, unrelated=2)
        assert {len(text.tokens.inputs) for text in (*batch.edits, *batch.targets)} == {WORK.tokens}
        assert {len(text.tokens.inputs) for text in batch.locality} == {WORK.tokens - (kind == "decoder")}
        assert batch.target_owner == [0, 1, 2]
        assert batch.locality_owner == [owner for owner in (0, 1, 2) for _ in range(4)]
        assert batch.locality_near == [True, True, False, False] * 3
        assert sum(batch.locality_weight) == 6

    def test_training_learns(self, make_shape, kind):
        model = make_shape(kind).build(torch.float32, "cpu")
        walk = TrainingWalk(model, resolve_targets(model), WORK)
        before = [parameter.clone() for parameter in walk.editor.parameters()]
        walk.step()
        assert walk.trainer.progress.step == 1
        after = [*walk.editor.parameters()]
        assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
