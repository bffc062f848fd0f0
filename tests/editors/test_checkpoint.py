"""A checkpoint comes back as it was saved, for its own base model, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from editors.base_model import BaseModel
from editors.capture import capture
from editors.checkpoint import (
    build_editor,
    load_checkpoint,
    read_card,
    read_weights,
    save_checkpoint,
    write_card,
)
from editors.errors import BaseModelMismatch, CheckpointNotFound, CheckpointUnreadable
from editors.mend.variant import Variant
from editors.views import UpperBlocks
from tests.editors.dense import encoded
from tests.small import small_base, small_editor


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


@pytest.fixture
def folder(linear: BaseModel, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "mine", small_editor(linear), linear, {"command": "mend train"})
    return tmp_path / "mine"


def rewrite(folder: Path, **changes: object) -> None:
    """Change fields of the card; None takes one away."""
    card = json.loads((folder / "card.json").read_text()) | changes
    (folder / "card.json").write_text(json.dumps({name: value for name, value in card.items() if value is not None}))


class TestRoundTrip:
    def test_proposes_the_same_edits(self, base, tmp_path):
        editor = small_editor(base)
        for parameter in editor.parameters():
            parameter.copy_(parameter.half())  # what the file keeps of the matrices
        save_checkpoint(tmp_path, editor, base, {})
        loaded = load_checkpoint(tmp_path, base).editor
        upper, tokens = UpperBlocks(base.model, editor.targets), encoded(base)
        rows = capture(upper, upper.below([sequence.inputs for sequence in tokens]), tokens)
        for mine, theirs in zip(loaded(rows).delta, editor(rows).delta, strict=True):
            assert torch.equal(mine, theirs)
        assert loaded.targets == editor.targets

    def test_keeps_statistics_and_steps_to_the_bit(self, linear, folder):
        before, after = small_editor(linear).state_dict(), load_checkpoint(folder, linear).editor.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            expected = tensor.half().float() if name.endswith((".u", ".v")) else tensor
            assert torch.equal(after[name], expected), name

    def test_is_frozen_and_ready_to_edit(self, linear, folder):
        checkpoint = load_checkpoint(folder, linear)
        assert not any(parameter.requires_grad for parameter in checkpoint.editor.parameters())
        assert not checkpoint.editor.training
        assert (checkpoint.name, checkpoint.aggregate) == ("mine", "sum")
        assert checkpoint.margin_nats > 0
        assert checkpoint.digest == f"sha256:{hashlib.sha256((folder / 'editor.safetensors').read_bytes()).hexdigest()}"

    def test_writes_the_same_bytes_for_the_same_editor(self, linear, folder, tmp_path):
        save_checkpoint(tmp_path / "other" / "mine", small_editor(linear), linear, {"command": "mend train"})
        for name in ("editor.safetensors", "card.json", "card.md"):
            assert (tmp_path / "other" / "mine" / name).read_bytes() == (folder / name).read_bytes()

    def test_replaces_what_was_there_and_leaves_no_draft(self, linear, folder):
        save_checkpoint(folder, small_editor(linear, step=0.5), linear, {})
        assert load_checkpoint(folder, linear).editor.log_steps.exp().tolist() == pytest.approx([0.5] * 9)
        assert sorted(path.name for path in folder.iterdir()) == ["card.json", "card.md", "editor.safetensors"]

    def test_keeps_the_matrices_exactly_when_asked_to(self, linear, tmp_path):
        editor = small_editor(linear)
        save_checkpoint(tmp_path, editor, linear, {}, matrices=torch.float32)
        after = load_checkpoint(tmp_path, linear).editor.state_dict()
        assert all(torch.equal(tensor, after[name]) for name, tensor in editor.state_dict().items())


class TestShipped:
    def test_editor_is_what_it_was_before_there_were_variants(self):
        folder = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-instruct"
        card = read_card(folder)
        assert "variant" not in card
        editor = build_editor(folder, card, read_weights(folder, card))  # checks the digest
        assert card["digest"] == "sha256:826040b3b1f98a662a6d72cdbfff2ca8ba16dfe288133d220f78bfbbf40263aa"
        assert editor.variant == Variant(rank=512)
        assert editor.signs.tolist() == [-1] * 9

    def test_card_for_people_can_still_be_written(self, tmp_path):
        card = read_card(Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-instruct")
        write_card(tmp_path, card)
        assert "rank 512" in (tmp_path / "card.md").read_text()


class TestCard:
    def test_states_the_variant_and_the_signs(self, linear, tmp_path):
        variant = Variant(rank=4, sides="smaller", identity=False)
        save_checkpoint(tmp_path, small_editor(linear, variant=variant), linear, {})
        card = read_card(tmp_path)
        assert card["rank"] == 4
        assert card["variant"] == {
            "shared": True, "normalise": True, "sides": "smaller", "identity": False, "plain": False, "blocks": 2,
        }  # fmt: skip
        assert card["signs"] == [-1] * 9
        assert "a network for the smaller of u and δ" in (tmp_path / "card.md").read_text()

    def test_that_was_edited_by_hand_is_found_out(self, linear, folder):
        card = read_card(folder)
        targets = [card["targets"][1], card["targets"][0], *card["targets"][2:]]  # of one shape
        for name, value in {
            "variant": {**card["variant"], "identity": False},
            "signs": [1] * 9,
            "targets": targets,
        }.items():
            write_card(folder, {**card, name: value})
            with pytest.raises(CheckpointUnreadable, match=f"another {name}; has it been edited by hand"):
                load_checkpoint(folder, linear)
        write_card(folder, {**card, "base_model": {**card["base_model"], "digest": "sha256:another"}})
        with pytest.raises(CheckpointUnreadable, match="another base_model"):
            load_checkpoint(folder, dataclasses.replace(linear, digest="sha256:another"))

    def test_is_written_for_people_too(self, linear, folder):
        text = (folder / "card.md").read_text()
        for fact in ("# mine", linear.digest, load_checkpoint(folder, linear).digest, "mend train", "small-linear"):
            assert fact in text

    def test_shows_data_results_and_configuration(self, folder):
        card = read_card(folder) | {
            "training_data": [{"name": "a.json", "layout": "zsre", "examples": 7, "digest": "d1"}],
            "validation": {"efficacy": 0.5, "neighbour": float("nan")},
            "results": [{"command": "mend evaluate", "table": "| figure | … |"}],
            "config": {"rank": 4},
        }
        write_card(folder, card)
        text = (folder / "card.md").read_text()
        for fact in ("a.json (zsre, 7 examples)", "| efficacy | 0.500 |", "mend evaluate", "| figure | … |"):
            assert fact in text
        assert "| rank | 4 |" in text
        assert read_card(folder)["results"] == card["results"]


class TestRefused:
    def test_for_another_base_model_naming_both_digests(self, linear, folder):
        other = dataclasses.replace(linear, digest="sha256:another")
        with pytest.raises(BaseModelMismatch) as refused:
            load_checkpoint(folder, other)
        assert refused.value.facts == {"trained_for": linear.digest, "loaded": "sha256:another"}
        assert linear.digest in str(refused.value)
        assert "sha256:another" in str(refused.value)

    def test_for_the_same_architecture_with_other_weights(self, folder):
        with pytest.raises(BaseModelMismatch):
            load_checkpoint(folder, small_base("conv1d"))

    @pytest.mark.parametrize("name", ["nowhere", "mine/editor.safetensors"])
    def test_where_there_is_none(self, linear, folder, name):
        with pytest.raises(CheckpointNotFound, match="mend train"):
            load_checkpoint(folder.parent / name, linear)

    def test_without_its_weights(self, linear, folder):
        (folder / "editor.safetensors").unlink()
        with pytest.raises(CheckpointNotFound, match=r"editor\.safetensors is missing"):
            load_checkpoint(folder, linear)

    @pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"format": 1'])
    def test_when_the_card_is_not_json(self, linear, folder, raw):
        (folder / "card.json").write_bytes(raw)
        with pytest.raises(CheckpointUnreadable, match=r"card\.json is not JSON"):
            load_checkpoint(folder, linear)

    @pytest.mark.parametrize("base_model", ["small", {}, {"ref": "small"}, 5])
    def test_when_the_card_does_not_say_what_it_is_for(self, linear, folder, base_model):
        rewrite(folder, base_model=base_model)
        with pytest.raises(CheckpointUnreadable, match="does not say the digest of its base model"):
            load_checkpoint(folder, linear)

    @pytest.mark.parametrize("raw", [b"5", b"null", b"[]", b'"text"', b"{}"])
    def test_when_the_card_is_something_else(self, linear, folder, raw):
        (folder / "card.json").write_bytes(raw)
        with pytest.raises(CheckpointUnreadable, match=r"card\.json"):
            load_checkpoint(folder, linear)

    @pytest.mark.parametrize("field", ["digest", "base_model", "rank", "targets"])
    def test_when_the_card_lacks_a_field(self, linear, folder, field):
        rewrite(folder, **{field: None})
        with pytest.raises(CheckpointUnreadable, match=f"lacks {field}"):
            load_checkpoint(folder, linear)

    def test_when_its_format_is_of_another_version(self, linear, folder):
        rewrite(folder, format=2)
        with pytest.raises(CheckpointUnreadable, match="has format 2, not 1"):
            load_checkpoint(folder, linear)

    @pytest.mark.parametrize("keep", [0, 7, -1])
    def test_when_the_weights_are_cut_short(self, linear, folder, keep):
        path = folder / "editor.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointUnreadable, match=r"editor\.safetensors has the digest"):
            load_checkpoint(folder, linear)

    def test_when_one_bit_is_wrong(self, linear, folder):
        path = folder / "editor.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointUnreadable, match="digest"):
            load_checkpoint(folder, linear)

    def test_when_the_card_has_the_digest_of_a_file_that_is_no_editor(self, linear, folder):
        path = folder / "editor.safetensors"
        tensors = load_file(path)
        for raw in (b"not tensors", save({"stranger": torch.ones(2)}), save(dict(list(tensors.items())[:-1]))):
            path.write_bytes(raw)
            rewrite(folder, digest=f"sha256:{hashlib.sha256(raw).hexdigest()}")
            with pytest.raises(CheckpointUnreadable, match="does not hold the editor of its card"):
                load_checkpoint(folder, linear)

    @pytest.mark.parametrize("changes", [{"rank": 5}, {"rank": "4"}, {"targets": [{"name": "w"}]}, {"targets": []}])
    def test_when_the_card_describes_another_editor(self, linear, folder, changes):
        rewrite(folder, **changes)
        with pytest.raises(CheckpointUnreadable, match="does not hold the editor of its card"):
            load_checkpoint(folder, linear)
