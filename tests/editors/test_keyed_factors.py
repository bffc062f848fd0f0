"""Keys keep their scale when an edit is quantised."""

from __future__ import annotations

import pytest
import torch

from editors.errors import StateOverflow
from editors.factors import Factors, quantise, quantise_keyed
from editors.targets import Target
from tests.editors.keyed import TARGETS, some_edit, some_rows


class TestKeyedFactors:
    def test_keep_every_key_on_one_grid(self):
        keys, changes = some_rows([Target("w", 40, 30, transposed=False)], 0, 4)["w"]
        changes = changes * torch.tensor([10.0, 1.0, 0.1, 0.01])[:, None]
        layer = quantise_keyed({"w": (keys, changes)}, 2.0).layers["w"]
        assert torch.equal(layer.u, (keys * 2**15).round().short())
        restored = layer.delta.double() * 2.0 ** (layer.exponent + 15)
        assert (restored - 2 * changes).abs().max() <= 2.0**-15 * (2 * changes).abs().max()

    def test_are_less_wrong_than_keys_whose_scale_was_moved(self):
        keys, changes = some_rows([Target("w", 40, 30, transposed=False)], 0, 1)["w"]
        layer = quantise({"w": (keys, changes)}).layers["w"]
        assert not torch.equal(layer.u, (keys * 2**15).round().short())

    def test_do_not_go_below_the_grid_of_the_state(self):
        keys, _ = some_rows([Target("w", 40, 30, transposed=False)], 0, 1)["w"]
        layer = quantise_keyed({"w": (keys, torch.full((1, 30), 3 * 2.0**-17))}).layers["w"]
        assert layer.exponent == -32
        assert layer.delta.unique().tolist() == [3]

    def test_survive_their_bytes(self):
        edit = some_edit(TARGETS["linear"], 4)
        assert Factors.from_bytes(edit.to_bytes()).to_bytes() == edit.to_bytes()

    def test_drop_rows_without_a_key_and_keep_those_without_a_change(self):
        keys, changes = torch.eye(4)[:3], torch.ones(3, 2)
        keys[1] = 0
        changes[2] = 0
        layer = quantise_keyed({"w": (keys, changes)}).layers["w"]
        assert layer.u.argmax(1).tolist() == [0, 2]
        assert layer.delta.any(1).tolist() == [True, False]

    def test_refuse_keys_beyond_unit_norm(self):
        with pytest.raises(StateOverflow, match=r"norm 1\.41; keys have unit norm"):
            quantise_keyed({"w": (torch.ones(1, 2), torch.ones(1, 2))})

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_refuse_what_is_not_finite(self, bad):
        with pytest.raises(StateOverflow):
            quantise_keyed({"w": (torch.eye(2)[:1], torch.full((1, 2), bad))})
