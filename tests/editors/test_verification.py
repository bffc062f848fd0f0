"""Every way in which a checkpoint can be wrong is found by the check that is named for it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from editors.base_model import BaseModel
from editors.checkpoint import read_card, save_checkpoint, write_card
from editors.mend.variant import Variant
from editors.training_free.calibration import calibrate
from editors.verification import verify_checkpoint
from tests.small import small_base, small_editor, small_keyed_editor


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base()


@pytest.fixture
def folder(linear: BaseModel, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "mine", small_editor(linear), linear, {})
    return tmp_path / "mine"


def outcome(folder: Path, base: BaseModel | None) -> dict[str, bool]:
    return {check.name: check.ok for check in verify_checkpoint(folder, base)}


def failures(folder: Path, base: BaseModel | None) -> dict[str, str]:
    return {check.name: check.detail for check in verify_checkpoint(folder, base) if not check.ok}


def rewrite(folder: Path, name: str, value: object) -> None:
    write_card(folder, {**read_card(folder), name: value})


def redigest(folder: Path) -> None:
    """As whoever changes the weights' file and knows what the card says would."""
    raw = (folder / "editor.safetensors").read_bytes()
    rewrite(folder, "digest", f"sha256:{hashlib.sha256(raw).hexdigest()}")


class TestSound:
    @pytest.mark.parametrize("variant", [Variant(rank=4), Variant(rank=4, shared=False), Variant(plain=True)])
    def test_passes_every_check(self, base, tmp_path, variant):
        save_checkpoint(tmp_path, small_editor(base, variant=variant), base, {})
        names = ("card", "digest", "tensors", "finite", "base model", "targets")
        assert outcome(tmp_path, base) == dict.fromkeys(names, True)

    @pytest.mark.parametrize(
        ("make", "words"),
        [(small_keyed_editor, "rank 4, keyed at the subject's last token"), (calibrate, "natural gradient")],
    )
    def test_passes_every_check_where_edits_are_joined_by_least_squares(self, base, tmp_path, make, words):
        save_checkpoint(tmp_path, make(base), base, {})
        found = {check.name: check for check in verify_checkpoint(tmp_path, base)}
        assert all(check.ok for check in found.values())
        assert words in found["tensors"].detail

    def test_says_what_was_found(self, linear, folder):
        found = {check.name: check.detail for check in verify_checkpoint(folder, linear)}
        assert found["digest"] == read_card(folder)["digest"]
        assert found["base model"] == linear.digest
        assert found["tensors"].startswith("9 weights, one network for u and δ, shared by shape")
        assert "model.layers.3.mlp.down_proj.weight" in found["targets"]

    def test_without_a_base_model_passes_what_needs_none(self, folder):
        assert outcome(folder, None) == dict.fromkeys(("card", "digest", "tensors", "finite"), True)

    def test_the_shipped_editor_is(self):
        shipped = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-instruct"
        assert failures(shipped, None) == {}


class TestUnsound:
    @pytest.mark.parametrize("keep", [0, 7, 1000, -1])
    def test_cut_short(self, linear, folder, keep):
        path = folder / "editor.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert outcome(folder, linear) == {"card": True, "digest": False, "base model": True}
        redigest(folder)
        assert outcome(folder, linear) == {"card": True, "digest": True, "tensors": False, "base model": True}

    def test_without_a_card_or_with_a_damaged_one(self, linear, folder):
        (folder / "card.json").write_text("{")
        assert "is not JSON" in failures(folder, linear)["card"]
        (folder / "card.json").unlink()
        assert outcome(folder, linear) == {"card": False}

    def test_without_weights(self, linear, folder):
        (folder / "editor.safetensors").unlink()
        assert "editor.safetensors is missing" in failures(folder, linear)["digest"]

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("rank", 5),
            ("variant", {"sides": "separate"}),
            ("variant", {"identity": False}),
            ("variant", {"unheard of": True}),
            ("variant", None),
            ("variant", 5),
            ("signs", [1] * 9),
            ("targets", []),
            ("targets", [{"name": "w"}]),
            ("targets", None),
        ],
    )
    def test_with_a_card_edited_by_hand(self, linear, folder, name, value):
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps({**card, name: value}))
        assert list(failures(folder, linear)) == ["tensors"]

    @pytest.mark.parametrize("value", ["2", None, -1, float("nan"), float("inf")])
    def test_with_a_margin_that_is_none(self, linear, folder, value):
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps({**card, "margin_nats": value}))
        assert f"margin_nats {value!r}" in failures(folder, linear)["card"]

    def test_by_a_method_of_another_version(self, linear, folder):
        card = json.loads((folder / "card.json").read_text())
        (folder / "card.json").write_text(json.dumps({**card, "method": "clairvoyance"}))
        assert failures(folder, linear)["card"].endswith(
            "is of an editor by 'clairvoyance'; this version knows mend, training-free"
        )

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    def test_with_a_number_that_is_none(self, linear, folder, wrong):
        editor = small_editor(linear)
        editor.networks["32x48"].delta_statistics.mean[3] = wrong
        save_checkpoint(folder, editor, linear, {})
        assert failures(folder, linear) == {
            "finite": "there is NaN or infinity in networks.32x48.delta_statistics.mean"
        }

    def test_of_another_base_model(self, folder):
        found = failures(folder, small_base("conv1d"))
        assert list(found) == ["base model", "targets"]
        assert "has no linear layer with model.layers.1.mlp.gate_proj.weight, model.layers.1" in found["targets"]

    def test_of_a_base_model_with_other_shapes_under_the_same_names(self, linear, folder):
        path = folder / "editor.safetensors"
        tensors, card = load_file(path), read_card(folder)
        card["targets"][0] |= {"transposed": True}
        save_file(tensors, path)  # without its statement, as files of the first release are
        card["digest"] = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        write_card(folder, card)
        assert failures(folder, linear) == {
            "targets": "the base model has other shapes or layouts of model.layers.1.mlp.gate_proj.weight"
        }

    def test_of_a_base_model_whose_weights_have_changed(self, linear, folder):
        found = failures(folder, dataclasses.replace(linear, digest="sha256:another"))
        assert list(found) == ["base model"]
