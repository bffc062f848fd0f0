"""Which weights may be edited: the family's MLPs, or what the patterns say, but never a shared or quantised one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from editors.errors import TargetsError
from editors.targets import Target, block_index, find_blocks, named_targets, resolve_targets
from tests.small import small_gpt2, small_llama


class TestPreset:
    def test_is_the_mlp_of_the_last_three_blocks(self):
        assert [target.name for target in resolve_targets(small_llama())] == [
            f"model.layers.{block}.mlp.{name}_proj.weight" for block in (1, 2, 3) for name in ("gate", "up", "down")
        ]
        assert [target.name for target in resolve_targets(small_gpt2())] == [
            f"transformer.h.{block}.mlp.{name}.weight" for block in (1, 2, 3) for name in ("c_fc", "c_proj")
        ]

    def test_of_an_unknown_family_lists_those_that_there_are(self):
        model = small_llama()
        model.config.model_type = "unheard-of"
        with pytest.raises(TargetsError, match=r"unheard-of.*gpt2.*llama.*--layers") as unknown:
            resolve_targets(model)
        assert unknown.value.facts["architecture"] == "unheard-of"


class TestPatterns:
    def test_are_searched_in_module_names_and_keep_the_models_order(self, model):
        stack, _ = find_blocks(model)
        names = [target.name for target in resolve_targets(model, [rf"{stack}\.3\.mlp", rf"{stack}\.0\.mlp"])]
        assert len(names) == (6 if "layers" in stack else 4)
        assert names == [name for name, _ in model.named_parameters() if name in names]
        assert all(name.startswith((f"{stack}.0.", f"{stack}.3.")) for name in names)

    def test_that_overlap_give_each_weight_once(self, model):
        one = resolve_targets(model, [r"\.2\.mlp\."])
        assert resolve_targets(model, [r"\.2\.mlp\.", r"2\.mlp"]) == one

    @pytest.mark.parametrize("pattern", ["nothing_of_the_kind", r"mlp$", "norm", "ln_1"])
    def test_that_match_no_linear_layer_are_named(self, model, pattern):
        with pytest.raises(TargetsError, match="matches no linear layer") as nothing:
            resolve_targets(model, [r"\.2\.mlp\.", pattern])
        assert nothing.value.facts["pattern"] == pattern

    @pytest.mark.parametrize("pattern", ["embed_tokens", "wte|wpe|embed"])
    def test_of_embeddings_match_nothing(self, model, pattern):
        with pytest.raises(TargetsError, match="matches no linear layer"):
            resolve_targets(model, [pattern])

    def test_of_a_tied_weight_name_what_it_is_tied_to(self, model):
        with pytest.raises(TargetsError, match=r"lm_head shares its weight with .*(embed_tokens|wte)"):
            resolve_targets(model, ["lm_head"])

    def test_of_a_quantised_weight_are_refused(self):
        model = small_llama()
        layer = model.model.layers[2].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TargetsError, match=r"up_proj holds quantised weights \(torch.int8\)"):
            resolve_targets(model)


class TestLayout:
    @pytest.mark.parametrize(("layer", "transposed"), [(nn.Linear(3, 5), False), (Conv1D(5, 3), True)])
    def test_widths_are_those_of_input_and_output(self, layer, transposed):
        (target,) = resolve_targets(nn.ModuleDict({"layer": layer}), ["layer"])
        assert target == Target("layer.weight", 3, 5, transposed)
        assert target.shape == (3, 5)
        assert target.module == "layer"
        assert target.oriented(layer.weight).shape == (5, 3)
        x = torch.randn(2, 3)
        torch.testing.assert_close(layer(x), x @ target.oriented(layer.weight).T + layer.bias)


class TestBlocks:
    def test_are_the_longest_stack(self, model):
        name, blocks = find_blocks(model)
        assert name in ("model.layers", "transformer.h")
        assert len(blocks) == 4

    def test_are_missed_where_there_is_no_stack(self):
        with pytest.raises(TargetsError, match="Linear has no stack of blocks"):
            find_blocks(nn.Linear(2, 2))

    def test_first_is_the_lowest_that_holds_a_target(self, model):
        stack, _ = find_blocks(model)
        assert block_index(resolve_targets(model), stack) == 1
        assert block_index(resolve_targets(model, [r"\.3\.mlp", r"\.0\.mlp"])[::-1], stack) == 0


class TestNames:
    def test_give_the_weights_in_their_own_order(self, model):
        found = resolve_targets(model)
        assert named_targets(model, [target.name for target in found[::-1]]) == found[::-1]

    def test_that_are_no_linear_layers_weights_are_listed(self):
        wrong = ["model.norm.weight", "model.layers.1.mlp.up_proj", "model.layers.9.mlp.up_proj.weight"]
        with pytest.raises(TargetsError, match=", ".join(wrong)) as refused:
            named_targets(small_llama(), ["model.layers.1.mlp.up_proj.weight", *wrong])
        assert refused.value.facts["layer"] == wrong[0]

    def test_of_a_shared_weight_are_refused(self):
        with pytest.raises(TargetsError, match="shares its weight"):
            named_targets(small_llama(), ["lm_head.weight"])
