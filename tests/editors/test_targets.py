"""Which weights may be edited: the family's MLPs, or what the patterns say, but never a shared or quantised one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from editors.errors import TargetsError
from editors.targets import Target, find_stacks, first_edited_block, named_targets, resolve_targets
from tests.editors.families import family_model
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
        ((stack, _),) = find_stacks(model)
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

    @pytest.mark.parametrize("pattern", ["embed_tokens|wpe", "wte|wpe|embed"])
    def test_of_embeddings_are_refused_by_name(self, model, pattern):
        with pytest.raises(TargetsError, match=r"matches the embeddings .*(embed_tokens|wte|wpe), which must not be"):
            resolve_targets(model, [pattern])

    def test_of_the_output_embeddings_are_refused(self, model):
        with pytest.raises(TargetsError, match="lm_head is an embedding"):
            resolve_targets(model, ["lm_head"])

    def test_of_a_tied_weight_name_what_it_is_tied_to(self):
        model = small_llama()
        layers = model.model.layers
        layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
        with pytest.raises(TargetsError, match=r"1.mlp.up_proj shares its weight with model.layers.2.mlp.up_proj"):
            resolve_targets(model)

    def test_outside_the_blocks_are_refused(self):
        with pytest.raises(TargetsError, match=r"bert.pooler.dense is not inside the stack of blocks bert"):
            resolve_targets(family_model("bert"), ["pooler"])

    def test_that_are_no_regular_expression_say_so(self, model):
        with pytest.raises(TargetsError, match=r"'mlp\(' is not a regular expression"):
            resolve_targets(model, ["mlp("])

    def test_of_a_quantised_weight_are_refused(self):
        model = small_llama()
        layer = model.model.layers[2].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        with pytest.raises(TargetsError, match=r"up_proj holds quantised weights \(torch.int8\)"):
            resolve_targets(model)


class TestLayout:
    @pytest.mark.parametrize(("model", "name"), [(small_llama(), "up_proj"), (small_gpt2(), "c_fc")])
    def test_widths_are_those_of_input_and_output(self, model, name):
        (target,) = resolve_targets(model, [rf"\.2\.mlp\.{name}"])
        layer = model.get_submodule(target.module)
        assert target == Target(f"{target.module}.weight", 32, 48, isinstance(layer, Conv1D))
        assert target.shape == (32, 48)
        assert target.oriented(layer.weight).shape == (48, 32)
        x = torch.randn(2, 32)
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(layer(x), x @ target.oriented(layer.weight).T + bias)


class TestBlocks:
    def test_are_the_longest_stack(self, model):
        ((name, blocks),) = find_stacks(model)
        assert name in ("model.layers", "transformer.h")
        assert len(blocks) == 4

    def test_of_an_encoder_decoder_are_two_the_encoders_first(self):
        assert [name for name, _ in find_stacks(family_model("t5"))] == ["encoder.block", "decoder.block"]
        assert [name for name, _ in find_stacks(family_model("bart"))] == [
            "model.encoder.layers",
            "model.decoder.layers",
        ]

    def test_are_missed_where_there_is_no_stack(self):
        model = small_llama()
        model.model.layers = nn.Sequential(*model.model.layers)
        with pytest.raises(TargetsError, match="LlamaForCausalLM has no stack of blocks"):
            resolve_targets(model)

    def test_first_is_the_lowest_that_holds_a_target(self, model):
        assert first_edited_block(model, resolve_targets(model))[0] == 1
        assert first_edited_block(model, resolve_targets(model, [r"\.3\.mlp", r"\.0\.mlp"])[::-1])[0] == 0

    def test_first_is_the_encoders_last_where_only_the_decoder_is_edited(self):
        model = family_model("t5")
        assert first_edited_block(model, resolve_targets(model, [r"decoder\.block\.0.*\.wo"])) == (3, "encoder.block")


class TestFused:
    def test_projections_are_one_matrix_each(self):
        phi3 = resolve_targets(family_model("phi3"), [r"3\.mlp\.gate_up_proj"])
        assert [target.shape for target in phi3] == [(32, 96)]
        attention = resolve_targets(small_gpt2(), [r"3\.attn\.c_attn"])
        assert [(target.shape, target.transposed) for target in attention] == [((32, 96), True)]

    def test_stacks_of_experts_are_refused_by_name(self):
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2,
        )  # fmt: skip
        model = MixtralForCausalLM(config)
        with pytest.raises(TargetsError, match=r"model.layers.0.mlp.experts, which fuses the matrices"):
            resolve_targets(model, [r"mlp\.experts"])


class TestQuantised:
    def test_weights_in_float8_are_refused(self):
        model = small_llama()
        layer = model.model.layers[2].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        with pytest.raises(TargetsError, match=r"up_proj holds quantised weights \(torch.float8_e4m3fn\)"):
            resolve_targets(model)

    def test_layers_that_pack_their_weights_are_refused_by_name(self):
        class Packed(nn.Module):
            """As GPTQ's and AWQ's: no weight, but integers in a buffer."""

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

        model = small_llama()
        model.model.layers[2].mlp.up_proj = Packed()
        with pytest.raises(TargetsError, match=r"2.mlp.up_proj, whose weights are quantised"):
            resolve_targets(model, [r"2\.mlp\.up_proj"])
        with pytest.raises(TargetsError, match=r"2.mlp.up_proj, whose weights are quantised"):
            resolve_targets(model)


class TestNames:
    def test_give_the_weights_in_their_own_order(self, model):
        found = resolve_targets(model)
        assert named_targets(model, [target.name for target in found[::-1]]) == found[::-1]

    def test_that_are_no_linear_layers_weights_are_listed(self):
        wrong = ["model.norm.weight", "model.layers.1.mlp.up_proj", "model.layers.9.mlp.up_proj.weight"]
        with pytest.raises(TargetsError, match=", ".join(wrong)) as refused:
            named_targets(small_llama(), ["model.layers.1.mlp.up_proj.weight", *wrong])
        assert refused.value.facts["layer"] == wrong[0]

    def test_of_embeddings_are_refused(self):
        with pytest.raises(TargetsError, match="is an embedding"):
            named_targets(small_llama(), ["lm_head.weight"])
