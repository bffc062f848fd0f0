"""What the state tells before an edit is made: what it would change, whose keys it takes, and how much room is left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from editors.factors import Factors, digest, quantise_keyed
from editors.least_squares import DISTINCT, FORESEEN, Law, LeastSquaresState
from tests.editors.keyed import (
    METRICS,
    MODELS,
    ROWS,
    TARGETS,
    dense_change,
    keys_and_changes,
    new_state,
    some_edit,
    some_rows,
    written,
)
from tests.editors.test_state import same_bits


@pytest.mark.parametrize("seeds", [(), (1,), (4, 5, 6), (11, 10, 7)], ids=str)
class TestIncrement:
    @pytest.mark.parametrize("layout", MODELS)
    @pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
    def test_is_the_difference_that_one_more_edit_makes(self, layout, seeds, scale):
        targets, (whitening, laws) = TARGETS[layout], METRICS[layout]
        state, held = new_state(layout), [some_edit(targets, seed) for seed in seeds]
        state.add(*held)
        rows = some_rows(targets, 99, 3)
        more = quantise_keyed(rows, scale)
        for target in targets:
            u, delta, offset = state.increment(rows)[target.name]
            L, law = whitening[target.name], laws[target.name]
            expected = dense_change(target, [*held, more], L, law) - dense_change(target, held, L, law)
            got = ((scale * delta + offset).T @ u).numpy()
            assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()  # of the rounding to 16 bits

    def test_is_of_the_rows_own_precision_and_leaves_the_state_alone(self, seeds):
        state = new_state("linear")
        state.add(*(some_edit(TARGETS["linear"], seed) for seed in seeds))
        before = state.digest(), written("linear", state)
        rows = {name: (u.float(), v.float()) for name, (u, v) in some_rows(TARGETS["linear"], 99, 2).items()}
        for name, parts in state.increment(rows).items():
            assert [part.dtype for part in parts] == [torch.float32] * 3
            assert [part.shape for part in parts] == [rows[name][0].shape, rows[name][1].shape, rows[name][1].shape]
        assert (state.digest(), state.edits) == (before[0], len(seeds))
        assert same_bits(written("linear", state), before[1])


class TestSteadyTargets:
    """Those of which no edit has another size than the one that it was trained to have."""

    @staticmethod
    def state_of(layout: str, fading: float = 0.0) -> tuple[LeastSquaresState, str]:
        (first, *_), (whitening, laws) = TARGETS[layout], METRICS[layout]
        laws = {name: Law(law.ridge, fading if name == first.name else 0.0) for name, law in laws.items()}
        return LeastSquaresState(TARGETS[layout], whitening, laws, steady=[first.name]), first.name

    @pytest.mark.parametrize("layout", MODELS)
    @pytest.mark.parametrize("scale", [0.0, 0.25, 4.0])
    def test_store_their_changes_unscaled(self, layout, scale):
        state, steady = self.state_of(layout)
        rows = some_rows(TARGETS[layout], 99, 3)
        stored, whole = state.quantise(rows, scale), quantise_keyed(rows)
        for name, layer in stored.layers.items():
            assert torch.equal(layer.u, whole.layers[name].u)
            size = layer.decode()[1].norm() / whole.layers[name].decode()[1].norm()
            assert size == pytest.approx(1 if name == steady else scale, rel=1e-3)
        assert list(stored.layers) == sorted(stored.layers)

    @pytest.mark.parametrize("scale", [0.0, 0.25, 4.0])
    def test_are_in_every_increment_whole(self, scale):
        state, _ = self.state_of("linear")
        held = [some_edit(TARGETS["linear"], seed) for seed in (4, 5)]
        state.add(*held)
        rows = some_rows(TARGETS["linear"], 99, 3)
        more = state.quantise(rows, scale)
        whitening, laws = METRICS["linear"]
        for target in TARGETS["linear"]:
            u, delta, offset = state.increment(rows)[target.name]
            L, law = whitening[target.name], laws[target.name]
            expected = dense_change(target, [*held, more], L, law) - dense_change(target, held, L, law)
            got = ((scale * delta + offset).T @ u).numpy()
            assert np.abs(got - expected).max() < 2e-4 * np.abs(expected).max()

    def test_are_tried_as_weak_as_they_will_be_among_many(self):
        """An edit that takes now should still when others have come."""
        rows, fading = some_rows(TARGETS["linear"], 99, 1), 0.5
        state, steady = self.state_of("linear", fading)
        _, changes = rows[steady]
        now, later = state.increments(rows)
        for increment, strength in ((now, 1.0), (later, FORESEEN**-fading)):
            u, delta, offset = increment[steady]
            assert torch.equal(u, now[steady][0])
            assert not delta.any()
            torch.testing.assert_close(offset, strength * changes)
        for name in set(rows) - {steady}:
            assert all(torch.equal(a, b) for a, b in zip(now[name], later[name], strict=True))
        state.add(*(some_edit(TARGETS["linear"], 11) for _ in range(1 + FORESEEN // ROWS[11])))
        assert len(state.increments(rows)) == 1

    def test_that_do_not_fade_are_tried_once(self):
        state, _ = self.state_of("linear")
        assert len(state.increments(some_rows(TARGETS["linear"], 99, 1))) == 1

    def test_alone_tell_one_edit_from_another(self):
        state, steady = self.state_of("linear")
        rows = some_rows(TARGETS["linear"], 99, 2)
        state.add(some_edit(TARGETS["linear"], 4), quantise_keyed({n: own for n, own in rows.items() if n != steady}))
        other, (whitening, laws) = some_edit(TARGETS["linear"], 4), METRICS["linear"]
        expected = LeastSquaresState([t for t in TARGETS["linear"] if t.name == steady], whitening, laws)
        expected.add(Factors({steady: other.layers[steady]}))
        (first, overlap), (_, none) = state.overlaps(rows)
        assert first == digest(other.to_bytes())
        assert overlap == pytest.approx(expected.overlaps({steady: rows[steady]})[0][1])
        assert none == 0


class TestOverlaps:
    def test_are_the_largest_cosines_of_each_edit(self):
        targets, state = TARGETS["linear"], new_state("linear")
        edits = [some_edit(targets, seed) for seed in (1, 4, 5, 6, 10)]
        state.add(*edits, edits[2])
        rows = some_rows(targets, 99, 2)
        expected = {}
        for edit in edits:
            cosines = []
            for target in targets:
                keys, _ = keys_and_changes(target, [edit])
                for key, other in itertools.product(keys, rows[target.name][0].numpy()):
                    cosines.append(abs(key @ other) / np.linalg.norm(key) / np.linalg.norm(other))
            expected[digest(edit.to_bytes())] = max(cosines)
        found = state.overlaps(rows)
        assert dict(found) == pytest.approx(expected, abs=1e-12)
        values = [value for _, value in found]
        assert values == sorted(values, reverse=True)

    def test_name_the_edit_that_has_this_very_key_first(self):
        state, rows = new_state("conv1d"), some_rows(TARGETS["conv1d"], 3, 2)
        state.add(*(some_edit(TARGETS["conv1d"], seed) for seed in (1, 5, 10)), quantise_keyed(rows, 2.0))
        (first, overlap), (_, next_overlap), *_ = state.overlaps({name: (-u, v) for name, (u, v) in rows.items()})
        assert first == digest(quantise_keyed(rows, 2.0).to_bytes())
        assert 0.999 < overlap <= 1
        assert next_overlap < 0.9

    def test_are_none_where_there_are_no_keys(self):
        state, rows = new_state("linear"), some_rows(TARGETS["linear"], 99, 2)
        assert state.overlaps(rows) == []
        state.add(some_edit(TARGETS["linear"], 0), some_edit(TARGETS["linear"], 4))
        found = state.overlaps({name: (u[:0], v[:0]) for name, (u, v) in rows.items()})
        assert [value for _, value in found] == [0.0, 0.0]
        rowless = digest(some_edit(TARGETS["linear"], 0).to_bytes())
        assert state.overlaps(rows)[-1] == (rowless, 0.0)


class TestFullness:
    @pytest.mark.parametrize("seeds", [(0,), (1,), (4, 5, 6), (11,), (11, 10, 7)], ids=str)
    def test_is_the_share_of_directions_taken_in_the_fullest_weight(self, seeds):
        targets = TARGETS["linear"]
        state, edits = new_state("linear"), [some_edit(targets, seed) for seed in seeds]
        state.add(*edits)
        shares = []
        for target in targets:
            keys, _ = keys_and_changes(target, edits)
            gram = keys.T @ keys
            shares.append(np.trace(gram @ np.linalg.inv(gram + DISTINCT * np.eye(len(gram)))) / len(gram))
        assert state.fullness() == pytest.approx(max(shares), abs=1e-12)

    def test_does_not_hide_behind_a_ridge(self):
        targets, (whitening, laws) = TARGETS["linear"], METRICS["linear"]
        grown = {name: Law(10 * law.ridge, 0.5) for name, law in laws.items()}
        state, other = new_state("linear"), LeastSquaresState(targets, whitening, grown)
        for each in (state, other):
            each.add(*(some_edit(targets, seed) for seed in range(1, 9)))
        assert other.fullness() == pytest.approx(state.fullness(), abs=1e-9)

    def test_rises_from_nothing_and_never_above_one(self):
        state, seen = new_state("conv1d"), [0.0]
        assert state.fullness() == 0
        for seed in (1, 4, 7, 10, 11, 11, 11):
            state.add(some_edit(TARGETS["conv1d"], seed))
            seen.append(state.fullness())
        assert seen == sorted(set(seen))
        assert 0.9 < seen[-1] < 1
