"""Promise 1: the weights are a function of the set of active edits, bit for bit."""

from __future__ import annotations

import copy
import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editors.errors import FactorsCorrupt, StateOverflow
from editors.factors import Factors, LayerFactors, digest, quantise
from editors.state import CONTRIBUTION_BITS, SumState
from editors.targets import Target, resolve_targets
from editors.views import view
from tests.small import small_gpt2, small_llama

MODELS = {"linear": small_llama(), "conv1d": small_gpt2()}
TARGETS = {layout: resolve_targets(model) for layout, model in MODELS.items()}


def some_factors(targets: tuple[Target, ...], seed: int, rows: int = 3, size: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def random(width: int) -> Tensor:
        spread = torch.exp(torch.randn(rows, 1, generator=generator))
        return size * spread * torch.randn(rows, width, generator=generator)

    return quantise({target.name: (random(target.d_in), 1e-3 * random(target.d_out)) for target in targets})


def bits(model: torch.nn.Module, targets: tuple[Target, ...]) -> list[Tensor]:
    return [model.get_parameter(target.name).clone().view(torch.int32) for target in targets]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def weights_with(layout: str, edits: list[Factors]) -> tuple[list[Tensor], str]:
    """The bits of a model that was only ever given these edits."""
    model, targets = MODELS[layout], TARGETS[layout]
    state = SumState(targets)
    for factors in edits:
        state.add(factors)
    fresh = view(model, [target.name for target in targets])
    state.write(model, fresh)
    return bits(fresh, targets), state.digest()


steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "restart"]), st.integers(0, 11)), max_size=30)


@pytest.mark.parametrize("layout", MODELS)
class TestAnySequence:
    @settings(max_examples=60, deadline=None)
    @given(steps=steps, order=st.randoms(use_true_random=False))
    def test_equals_a_model_given_only_the_survivors_in_any_order(self, layout, steps, order):
        model, targets = MODELS[layout], TARGETS[layout]
        state, live = SumState(targets), view(model, [target.name for target in targets])
        stored: dict[int, bytes] = {}
        for action, seed in steps:
            if action == "add" and seed not in stored:
                factors = some_factors(targets, seed)
                stored[seed] = factors.to_bytes()
                state.add(factors)
            elif action == "remove" and seed in stored:
                state.remove(Factors.from_bytes(stored.pop(seed)))
            elif action == "restart":
                state = SumState(targets)
                for raw in stored.values():
                    state.add(Factors.from_bytes(raw))
            state.write(model, live)
        survivors = [Factors.from_bytes(raw) for raw in stored.values()]
        order.shuffle(survivors)
        expected, expected_digest = weights_with(layout, survivors)
        assert same_bits(bits(live, targets), expected)
        assert state.digest() == expected_digest
        if not survivors:
            assert same_bits(bits(live, targets), bits(model, targets))
            assert state.digest() == SumState(targets).digest()

    def test_every_order_of_four_gives_the_same_bits(self, layout):
        edits = [some_factors(TARGETS[layout], seed) for seed in range(4)]
        first, first_digest = weights_with(layout, edits)
        for order in itertools.permutations(edits):
            other, other_digest = weights_with(layout, list(order))
            assert same_bits(first, other)
            assert first_digest == other_digest

    def test_the_edit_is_really_in_the_weights(self, layout):
        targets, factors = TARGETS[layout], some_factors(TARGETS[layout], 5)
        live = view(MODELS[layout], [target.name for target in targets])
        state = SumState(targets)
        state.add(factors)
        state.write(MODELS[layout], live)
        for target in targets:
            u, delta = factors.layers[target.name].decode()
            before = target.oriented(MODELS[layout].get_parameter(target.name))
            after = target.oriented(live.get_parameter(target.name))
            torch.testing.assert_close(after, before + delta.T @ u, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_nothing_active_is_the_base_itself_in_half_precision_too(self, layout, dtype):
        model, targets = copy.deepcopy(MODELS[layout]).to(dtype), TARGETS[layout]
        live = view(model, [target.name for target in targets])
        state, factors = SumState(targets), some_factors(targets, 1)
        state.add(factors)
        state.write(model, live)
        state.remove(factors)
        state.write(model, live)
        for target in targets:
            assert torch.equal(
                live.get_parameter(target.name).view(torch.int16), model.get_parameter(target.name).view(torch.int16)
            )


class TestNegativeZero:
    def test_keeps_its_sign_when_nothing_is_active(self):
        model, targets = small_llama(), TARGETS["linear"]
        model.get_parameter(targets[0].name)[:4] = -0.0
        live = view(model, [target.name for target in targets])
        SumState(targets).write(model, live)
        assert same_bits(bits(live, targets), bits(model, targets))


class TestRollback:
    def test_costs_the_same_with_one_edit_or_a_thousand(self):
        targets = TARGETS["linear"]
        state, probe = SumState(targets), some_factors(targets, 999)

        def seconds() -> float:
            best = float("inf")
            for _ in range(20):
                state.add(probe)
                start = time.perf_counter()
                state.remove(probe)
                best = min(best, time.perf_counter() - start)
            return best

        state.add(some_factors(targets, 0))
        with_one = seconds()
        for seed in range(1, 1000):
            state.add(some_factors(targets, seed, rows=1))
        assert seconds() < 3 * with_one

    def test_a_refused_edit_leaves_the_state_as_it_was(self):
        targets = TARGETS["linear"]
        state = SumState(targets)
        state.add(some_factors(targets, 0))
        before = state.digest()
        good = some_factors(targets, 1).layers
        last = targets[-1].name
        huge = LayerFactors(good[last].u, good[last].delta, CONTRIBUTION_BITS)
        with pytest.raises(StateOverflow):
            state.add(Factors({**good, last: huge}))
        assert state.digest() == before
        assert state.edits == 1

    def test_a_refused_edit_takes_those_that_came_with_it_along(self):
        targets = TARGETS["linear"]
        state = SumState(targets)
        with pytest.raises(FactorsCorrupt):
            state.add(some_factors(targets, 0), some_factors(TARGETS["conv1d"], 0))
        assert (state.digest(), state.edits) == (SumState(targets).digest(), 0)

    def test_several_at_once_are_as_one_by_one(self):
        targets, edits = TARGETS["linear"], [some_factors(TARGETS["linear"], seed) for seed in range(5)]
        together, in_turn = SumState(targets), SumState(targets)
        together.add(*edits)
        together.remove(edits[1], edits[3])
        for index in (4, 0, 2):
            in_turn.add(edits[index])
        assert (together.digest(), together.edits) == (in_turn.digest(), 3)

    def test_more_edits_than_are_counted_on_are_refused(self, monkeypatch):
        monkeypatch.setattr("editors.state.MAX_EDITS", 2)
        state = SumState(TARGETS["linear"])
        state.add(some_factors(TARGETS["linear"], 0))
        with pytest.raises(StateOverflow, match="1 edits are active, and 2 more would be above 2"):
            state.add(some_factors(TARGETS["linear"], 1), some_factors(TARGETS["linear"], 2))
        state.add(some_factors(TARGETS["linear"], 1))

    def test_factors_of_another_model_are_refused(self):
        state = SumState(TARGETS["linear"])
        with pytest.raises(FactorsCorrupt):
            state.add(some_factors(TARGETS["conv1d"], 0))
        assert state.digest() == SumState(TARGETS["linear"]).digest()


class TestQueries:
    def test_one_more_edit_adds_its_own_product(self):
        state, rows = SumState(TARGETS["linear"]), {"w": (torch.ones(2, 3), torch.ones(2, 4))}
        for seed in (0, 1):
            ((u, delta, offset),) = (increment["w"] for increment in state.increments(rows))
            assert torch.equal(u, rows["w"][0])
            assert torch.equal(delta, rows["w"][1])
            assert torch.equal(offset, torch.zeros(2, 4))
            state.add(some_factors(TARGETS["linear"], seed))

    def test_a_sum_knows_neither_whose_keys_are_taken_nor_when_it_is_full(self):
        state = SumState(TARGETS["linear"])
        state.add(some_factors(TARGETS["linear"], 0))
        assert state.overlaps({"w": (torch.ones(2, 3), torch.ones(2, 4))}) == []
        assert state.fullness() is None


class TestFactors:
    def test_survive_their_bytes(self):
        factors = some_factors(TARGETS["linear"], 3)
        raw = factors.to_bytes()
        again = Factors.from_bytes(raw)
        assert again.to_bytes() == raw
        assert digest(raw) == digest(again.to_bytes())
        for name, layer in factors.layers.items():
            assert torch.equal(layer.u, again.layers[name].u)
            assert torch.equal(layer.delta, again.layers[name].delta)
            assert layer.exponent == again.layers[name].exponent

    @pytest.mark.parametrize("raw", [b"", b"not factors", b"\x00" * 64])
    def test_other_bytes_are_refused(self, raw):
        with pytest.raises(FactorsCorrupt):
            Factors.from_bytes(raw)

    def test_factors_that_are_not_matrices_are_refused(self):
        layer = LayerFactors(torch.ones(1, 2, 3, dtype=torch.int16), torch.ones(1, 2, 3, dtype=torch.int16), 0)
        with pytest.raises(FactorsCorrupt):
            Factors.from_bytes(Factors({"w": layer}).to_bytes())

    def test_bytes_cut_short_are_refused(self):
        with pytest.raises(FactorsCorrupt):
            Factors.from_bytes(some_factors(TARGETS["linear"], 3).to_bytes()[:-1])

    def test_quantising_keeps_the_product_to_fifteen_bits(self):
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(5, 40, generator=generator) * torch.tensor([1e-4, 1.0, 1e3, 7.0, 1e-9])[:, None]
        delta = torch.randn(5, 30, generator=generator) * torch.tensor([10.0, 1.0, 1e-3, 1e-2, 1e9])[:, None]
        decoded_u, decoded_delta = quantise({"w": (u, delta)}).layers["w"].decode()
        exact = delta.double().T @ u.double()
        error = (decoded_delta.double().T @ decoded_u.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-13

    def test_zero_rows_are_dropped(self):
        u, delta = torch.ones(3, 4), torch.ones(3, 2)
        u[1] = 0
        delta[2] = 0
        assert quantise({"w": (u, delta)}).layers["w"].rows == 1

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, bad):
        with pytest.raises(StateOverflow):
            quantise({"w": (torch.full((1, 2), bad), torch.ones(1, 2))})
