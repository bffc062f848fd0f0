"""Shapes are read from names, files and folders; what is wrong with one is said in a line."""

from __future__ import annotations

import json

import pytest
import torch

from editors.errors import BaseModelNotFound, BaseModelUnreadable
from editors.kinds import kind_of
from editors.planning.shapes import SHAPES, read_shape
from tests.editors.planning.configs import FAMILIES, small_config

PARAMETERS = {
    "llama-30m": 28_322_688,
    "llama-135m": 134_515_008,
    "llama-360m": 361_821_120,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "gpt2": 124_439_808,
    "gpt-j-6b": 6_050_882_784,
    "t5-xl": 2_849_757_184,
    "t5-xxl": 11_135_332_352,
    "bart-base": 139_420_416,
    "bert-base": 109_483_778,
}
"""Of the published models, but for llama-30m, which is nobody's."""


def test_every_built_in_shape_has_the_parameters_of_its_model():
    counted = {}
    for name in SHAPES:
        model = read_shape(name).build(torch.bfloat16, "meta")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert model.dtype == torch.bfloat16
        counted[name] = sum(parameter.numel() for parameter in model.parameters())
    assert counted == PARAMETERS


@pytest.mark.parametrize("kind", FAMILIES)
class TestRead:
    def test_a_file_or_the_folder_that_holds_it(self, tmp_path, kind):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(small_config(kind)))
        for name in (path, tmp_path):
            shape = read_shape(str(name))
            assert shape.name == str(name)
            assert kind_of(shape.build(torch.float32, "meta")) == kind

    def test_and_built_for_real_it_is_finite_and_frozen(self, make_shape, kind):
        model = make_shape(kind).build(torch.bfloat16, "cpu")
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        ids = torch.arange(5)[None]
        inputs = {"decoder_input_ids": ids} if kind == "encoder-decoder" else {}
        assert model(input_ids=ids, **inputs).logits.isfinite().all()


def test_a_folder_is_preferred_to_a_shape_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-7b").mkdir()
    (tmp_path / "llama-7b" / "config.json").write_text(json.dumps(small_config("decoder")))
    assert read_shape("llama-7b").config.hidden_size == 32


def test_rotary_frequencies_are_in_full_precision():
    model = read_shape("llama-30m").build(torch.bfloat16, "cpu")
    frequencies = model.model.rotary_emb.inv_freq
    expected = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    torch.testing.assert_close(frequencies.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_tied_where_the_configuration_says_so(make_shape, tied):
    for kind in ("decoder", "encoder-decoder"):
        model = make_shape(kind, tie_word_embeddings=tied).build(torch.float32, "cpu")
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


class TestRefused:
    @pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all", "llama-8b"])
    def test_what_is_not_there(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BaseModelNotFound, match=rf"there is no {name}; give .* llama-7b, llama-13b") as caught:
            read_shape(name)
        assert caught.value.facts == {"file": name}

    def test_a_folder_without_a_configuration(self, tmp_path):
        with pytest.raises(BaseModelNotFound, match=r"there is no .*config\.json"):
            read_shape(str(tmp_path))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "is not JSON"),
            (b'{"model_type": "llama"', "is not JSON"),
            (b"\xff\xfe\xfd", "is not JSON"),
            (b"[1, 2]", "does not name a 'model_type'"),
            (b"{}", "does not name a 'model_type'"),
            (b'{"model_type": 7}', "does not name a 'model_type'"),
            (b'{"model_type": "new-thing"}', "transformers does not know the architecture 'new-thing'"),
            (b'{"model_type": "llama", "hidden_size": "wide"}', "no configuration that can be used"),
        ],
    )
    def test_a_file_that_is_no_configuration(self, tmp_path, content, reason):
        path = tmp_path / "mine.json"
        path.write_bytes(content)
        with pytest.raises(BaseModelUnreadable, match=reason) as caught:
            read_shape(str(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"hidden_size": 33}, "cannot be built: "),
            ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM neither writes text nor chooses one label"),
            ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "cannot be built: "),
        ],
    )
    def test_a_model_that_cannot_be_built(self, tmp_path, changes, reason):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(small_config("classifier", **changes)))
        with pytest.raises(BaseModelUnreadable, match=reason) as caught:
            read_shape(str(path)).build(torch.float32, "meta")
        assert "\n" not in str(caught.value)
