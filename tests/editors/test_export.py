"""What leaves the service says the same elsewhere: to peft, to transformers, and to a state made anew."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from editors import DEFAULT_MODEL
from editors.base_model import BaseModel, load_base_model, weights_digest
from editors.errors import ExportUnwritable, NothingToExport
from editors.export import LARGEST_RANK, reduce_rank, write_factors, write_index, write_lora, write_merged
from editors.factors import Factors, quantise
from editors.state import SumState, stacked
from editors.targets import Target, resolve_targets
from editors.views import view
from tests.small import SMALL_MODELS, small_base, small_tokenizer

# peft 0.21 still asks transformers 5.23 by the name that this one is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[5, 9, 30, 31, 7, 40, 2, 11]])
OTHERS = ("t5", "bart", "bert")
"""Families that are no decoders."""


@dataclass(frozen=True)
class Edited:
    """A base model, some edits, and the model that they make of it."""

    base: BaseModel
    targets: tuple[Target, ...]
    edits: list[Factors]
    live: PreTrainedModel

    @classmethod
    def of(cls, base: BaseModel, rows: Sequence[int], patterns: list[str] | None = None) -> Edited:
        """rows: of each edit."""
        targets = resolve_targets(base.model, patterns)
        edits = [some_edit(targets, seed, count) for seed, count in enumerate(rows)]
        live, state = view(base.model, [target.name for target in targets]), SumState(targets)
        for factors in edits:
            state.add(factors)
        state.write(base.model, live)
        return cls(base, targets, edits, live)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {target.name: self.live.get_parameter(target.name).detach() for target in self.targets}


def some_edit(targets: Sequence[Target], seed: int, rows: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    size = 0.1 / rows
    return quantise(
        {
            target.name: (
                torch.randn(rows, target.d_in, generator=generator),
                size * torch.randn(rows, target.d_out, generator=generator),
            )
            for target in targets
        }
    )


def as_base(model: PreTrainedModel) -> BaseModel:
    model = model.eval().requires_grad_(False)
    return BaseModel(model, small_tokenizer(), "small", weights_digest(model), model.num_parameters())


def cast(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    """Its parameters alone: what a model derives from its configuration stays in float32, as where it is loaded."""
    for parameter in base.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return base


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def adapted(base: BaseModel, folder: Path, **options: object) -> PeftModel:
    """What peft makes of the base model and the adapter in a folder."""
    return PeftModel.from_pretrained(copy.deepcopy(base.model), folder, **options).eval()


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@contextmanager
def files_no_larger_than(limit_bytes: int) -> Iterator[None]:
    """To whoever writes, much like a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestLora:
    @pytest.mark.parametrize("rows", [[1], [3, 2, 4], [20, 30, 10]], ids=["one row", "low rank", "more rows than rank"])
    def test_gives_the_logits_of_the_live_model(self, base, tmp_path, rows):
        made = Edited.of(base, rows)
        facts = write_lora(base, made.targets, stacked(made.targets, made.edits), tmp_path)
        assert facts["rank"] == min(sum(rows), 32)
        assert facts["ranks"] == {target.module: facts["rank"] for target in made.targets}
        assert facts["warning"] is None
        model = adapted(base, tmp_path)
        torch.testing.assert_close(logits(model), logits(made.live), rtol=0, atol=1e-4)
        assert (logits(base.model) - logits(made.live)).abs().max() > 0.01

    def test_merged_by_peft_gives_the_live_weights(self, base, tmp_path):
        made = Edited.of(base, [3, 2])
        write_lora(base, made.targets, stacked(made.targets, made.edits), tmp_path)
        merged = adapted(base, tmp_path).merge_and_unload()
        for name, weight in made.weights.items():
            torch.testing.assert_close(merged.get_parameter(name), weight, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("layout", SMALL_MODELS)
    def test_fits_a_base_model_in_half_precision(self, layout, tmp_path):
        base = cast(small_base(layout), torch.bfloat16)
        made = Edited.of(base, [3, 2])
        write_lora(base, made.targets, stacked(made.targets, made.edits), tmp_path)
        assert all(
            tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "adapter_model.safetensors").values()
        )
        # bfloat16 keeps 8 bits: of each weight in the live model, of each layer's output under the adapter.
        torch.testing.assert_close(logits(adapted(base, tmp_path)), logits(made.live), rtol=0.02, atol=0.02)
        # With the rounding out of the way it is the same model.
        exact = Edited.of(replace(base, model=copy.deepcopy(base.model).float()), [3, 2])
        torch.testing.assert_close(logits(adapted(exact.base, tmp_path)), logits(exact.live), rtol=0, atol=1e-4)

    def test_has_a_rank_of_its_own_for_every_layer(self, base, tmp_path):
        targets = resolve_targets(base.model)
        whole = some_edit(targets, 0, 5)
        layers = {
            target.name: replace(layer, u=layer.u[:place], delta=layer.delta[:place])
            for place, target in enumerate(targets[:4])
            for layer in [whole.layers[target.name]]
        }
        facts = write_lora(base, targets, stacked(targets, [Factors(layers)]), tmp_path)
        # The first of the four has no rows; the layers beyond them are not mentioned at all.
        assert facts["ranks"] == {targets[place].module: place for place in (1, 2, 3)}
        assert facts["rank"] == 3
        assert config_of(tmp_path)["target_modules"] == sorted(facts["ranks"])
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6
        live, state = view(base.model, [target.name for target in targets]), SumState(targets)
        state.add(Factors(layers))
        state.write(base.model, live)
        model = adapted(base, tmp_path)
        torch.testing.assert_close(logits(model), logits(live), rtol=0, atol=1e-4)
        assert [module.scaling for module in model.modules() if isinstance(module, LoraLayer)] == [{"default": 1.0}] * 3

    def test_counts_what_two_edits_have_in_common_once(self, base, tmp_path):
        edit = some_edit(resolve_targets(base.model), 0, 3)
        assert (
            write_lora(base, resolve_targets(base.model), stacked(resolve_targets(base.model), [edit, edit]), tmp_path)[
                "rank"
            ]
            == 3
        )

    def test_comes_with_directions_that_work(self, base, tmp_path):
        base.model.save_pretrained(tmp_path / "base")
        made = Edited.of(replace(base, ref=str(tmp_path / "base")), [2])
        write_lora(made.base, made.targets, stacked(made.targets, made.edits), tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert made.base.ref in card
        assert made.base.digest in card
        told: dict[str, PeftModel] = {}
        exec(card.split("```")[1].removeprefix("python").replace("this folder", str(tmp_path / "adapter")), told)
        torch.testing.assert_close(logits(told["model"].eval()), logits(made.live), rtol=0, atol=1e-4)

    def test_of_the_packaged_model_says_how_to_get_at_it(self, base, tmp_path):
        made = Edited.of(replace(base, ref=DEFAULT_MODEL), [2])
        write_lora(made.base, made.targets, stacked(made.targets, made.edits), tmp_path)
        assert f"load_base_model('{DEFAULT_MODEL}')" in (tmp_path / "README.md").read_text()

    def test_finds_its_base_model_by_itself(self, base, tmp_path):
        base.model.save_pretrained(tmp_path / "base")
        stored = replace(base, ref=str(tmp_path / "base"))
        made = Edited.of(stored, [2])
        write_lora(stored, made.targets, stacked(made.targets, made.edits), tmp_path / "adapter")
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(model), logits(made.live), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("family", OTHERS)
    def test_works_for_models_that_are_no_decoders(self, family, tmp_path):
        base = small_base(family)
        made = Edited.of(base, [3, 2])
        write_lora(base, made.targets, stacked(made.targets, made.edits), tmp_path)
        torch.testing.assert_close(logits(adapted(base, tmp_path)), logits(made.live), rtol=0, atol=1e-4)
        assert (logits(base.model) - logits(made.live)).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("family", "task", "auto"),
        [
            ("t5", "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM),
            ("bart", "SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM),
            ("bert", "SEQ_CLS", AutoPeftModelForSequenceClassification),
        ],
    )
    def test_of_no_decoder_states_its_task_and_finds_its_base_model_by_itself(self, family, task, auto, tmp_path):
        base = small_base(family)
        base.model.save_pretrained(tmp_path / "base")
        made = Edited.of(replace(base, ref=str(tmp_path / "base")), [2])
        write_lora(made.base, made.targets, stacked(made.targets, made.edits), tmp_path / "adapter")
        assert config_of(tmp_path / "adapter")["task_type"] == task
        model = auto.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(logits(model), logits(made.live), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("beyond", [0, 1])
    def test_warns_of_a_rank_beyond_what_runtimes_take(self, beyond, tmp_path):
        width = LARGEST_RANK + 8
        config = LlamaConfig(
            vocab_size=128, hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=1
        )
        base = as_base(LlamaForCausalLM(config))
        made = Edited.of(base, [LARGEST_RANK + beyond], [r"up_proj$"])
        facts = write_lora(base, made.targets, stacked(made.targets, made.edits), tmp_path)
        assert facts["rank"] == LARGEST_RANK + beyond
        assert bool(facts["warning"]) == bool(beyond)
        if beyond:
            assert str(LARGEST_RANK + 1) in facts["warning"]
            assert "merged" in facts["warning"]

    def test_of_nothing_is_refused(self, base, tmp_path):
        targets = resolve_targets(base.model)
        empty = some_edit(targets, 0, 2)
        empty = Factors(
            {name: replace(layer, u=layer.u[:0], delta=layer.delta[:0]) for name, layer in empty.layers.items()}
        )
        for edits in ([], [empty]):
            with pytest.raises(NothingToExport):
                write_lora(base, targets, stacked(targets, edits), tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestReduceRank:
    @pytest.mark.parametrize("shape", [(1, 5, 7), (4, 5, 7), (6, 5, 7), (50, 5, 7), (50, 7, 5)])
    def test_keeps_the_product(self, shape):
        rows, d_in, d_out = shape
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
        delta = torch.randn(rows, d_out, generator=generator, dtype=torch.float64)
        a, b = reduce_rank(u, delta)
        assert a.shape == (min(shape), d_in)
        assert b.shape == (d_out, min(shape))
        torch.testing.assert_close((b.double() @ a.double()), delta.T @ u, rtol=1e-5, atol=1e-5)

    def test_keeps_small_edits_beside_large_ones(self):
        u, delta = torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1e4, 1.0, 1e-2], dtype=torch.float64))
        a, b = reduce_rank(u, delta)
        torch.testing.assert_close((b @ a).diagonal(), torch.tensor([1e4, 1.0, 1e-2]), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rows", [0, 1])
    def test_of_nothing_is_zero(self, rows):
        a, b = reduce_rank(torch.ones(rows, 3, dtype=torch.float64), torch.zeros(rows, 2, dtype=torch.float64))
        assert (a.shape, b.shape) == ((0, 3), (2, 0))


class TestMerged:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("layout", SMALL_MODELS)
    def test_is_read_back_bit_for_bit(self, layout, dtype, tmp_path):
        base = cast(small_base(layout), dtype)
        made = Edited.of(base, [3, 2])
        assert write_merged(base, made.weights, tmp_path) == {}
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert again.dtype == dtype
        assert weights_digest(again) == weights_digest(made.live) != weights_digest(base.model)
        assert torch.equal(logits(again.eval()), logits(made.live))

    def test_brings_its_tokenizer_and_serves_as_a_base_model(self, base, tmp_path):
        made = Edited.of(base, [3])
        write_merged(base, made.weights, tmp_path)
        again = load_base_model(str(tmp_path), device="cpu", dtype=torch.float32)
        assert again.digest == weights_digest(made.live)
        text = "The capital of France is (perhaps) Rome"
        assert again.tokenizer(text).input_ids == base.tokenizer(text).input_ids
        assert AutoTokenizer.from_pretrained(tmp_path).eos_token == base.tokenizer.eos_token

    @pytest.mark.parametrize(
        ("family", "auto"),
        [("t5", AutoModelForSeq2SeqLM), ("bert", AutoModelForSequenceClassification)],
    )
    def test_works_for_models_that_are_no_decoders(self, family, auto, tmp_path):
        made = Edited.of(small_base(family), [3])
        write_merged(made.base, made.weights, tmp_path)
        assert weights_digest(auto.from_pretrained(tmp_path)) == weights_digest(made.live)

    def test_leaves_the_base_model_and_its_configuration_alone(self, base, tmp_path):
        made = Edited.of(base, [3])
        before = weights_digest(base.model), base.model.config.to_dict()
        write_merged(base, made.weights, tmp_path)
        assert (weights_digest(base.model), base.model.config.to_dict()) == before

    def test_names_no_path_of_the_machine(self, base, tmp_path):
        base.model.save_pretrained(tmp_path / "secret")
        base.tokenizer.save_pretrained(tmp_path / "secret")
        loaded = load_base_model(str(tmp_path / "secret"), device="cpu")
        made = Edited.of(loaded, [1])
        write_merged(loaded, made.weights, tmp_path / "out")
        for file in (tmp_path / "out").iterdir():
            assert b"secret" not in file.read_bytes(), file


class TestFactors:
    def test_added_to_a_fresh_state_give_its_digest(self, base, tmp_path):
        made = Edited.of(base, [3, 2, 5])
        state = SumState(made.targets)
        for factors in made.edits:
            state.add(factors)
        raws = [factors.to_bytes() for factors in made.edits]
        written = write_factors(zip((1, 4, 1_000_000), raws, strict=True), tmp_path)
        assert [each["file"] for each in written] == [
            f"factors/{name}.safetensors" for name in ("000001", "000004", "1000000")
        ]
        again = SumState(made.targets)
        for each, raw in zip(written, raws, strict=True):
            assert (tmp_path / each["file"]).read_bytes() == raw
            again.add(Factors.from_bytes((tmp_path / each["file"]).read_bytes()))
        assert again.digest() == state.digest()

    def test_of_no_edits_are_no_files(self, tmp_path):
        assert write_factors([], tmp_path) == []
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("write", ["lora", "merged", "factors", "index"])
class TestADiskThatIsFull:
    def test_is_said_in_one_line(self, write, base, tmp_path):
        made = Edited.of(base, [8])
        with files_no_larger_than(1000), pytest.raises(ExportUnwritable) as raised:
            export(write, made, tmp_path)
        assert str(tmp_path) in str(raised.value)
        assert "\n" not in str(raised.value)
        assert raised.value.facts == {"folder": str(tmp_path)}

    def test_or_a_folder_that_is_gone(self, write, base, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ExportUnwritable):
            export(write, Edited.of(base, [1]), tmp_path / "file")


def export(write: str, made: Edited, folder: Path) -> None:
    match write:
        case "lora":
            write_lora(made.base, made.targets, stacked(made.targets, made.edits), folder)
        case "merged":
            write_merged(made.base, made.weights, folder)
        case "factors":
            write_factors([(1, made.edits[0].to_bytes())], folder)
        case "index":
            write_index({"text": "long " * 1000}, folder / "edits.json")
