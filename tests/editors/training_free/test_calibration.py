"""A training-free editor is made once for a base model, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from editors.checkpoint import CARD, load_checkpoint
from editors.errors import CheckpointUnreadable
from editors.training_free import calibration
from editors.training_free.calibration import calibrated_folder
from tests.small import small_base


def test_is_made_once(base, tmp_path):
    folder = calibrated_folder(base, tmp_path / "new")
    first = (folder / CARD).stat().st_mtime_ns
    assert calibrated_folder(base, tmp_path / "new") == folder
    assert (folder / CARD).stat().st_mtime_ns == first
    checkpoint = load_checkpoint(folder, base)
    assert checkpoint.name == "training-free"
    assert checkpoint.card["calibration"]["samples"] == calibration.SAMPLES
    assert list((tmp_path / "new").iterdir()) == [folder]


def test_is_another_one_for_another_base_model(tmp_path):
    one, other = (calibrated_folder(small_base(layout), tmp_path) for layout in ("linear", "conv1d"))
    assert one != other
    digests = [json.loads((folder / CARD).read_text())["base_model"]["digest"] for folder in (one, other)]
    assert digests == [small_base(layout).digest for layout in ("linear", "conv1d")]


def test_knows_directions_that_the_texts_never_take():
    """With fewer rows than inputs a covariance alone could not be inverted."""
    base = small_base()
    editor = calibration.TrainingFreeEditor([calibration.last_projection(base.model)])
    generator = torch.Generator().manual_seed(0)
    u, delta = torch.randn(3, 48, generator=generator), torch.randn(3, 32, generator=generator)
    editor.calibrate(0, u, delta, torch.randn(32, 48, generator=generator))
    for tensor in editor.state_dict().values():
        assert tensor.isfinite().all()


def test_leaves_nothing_behind_when_it_fails(base, tmp_path, monkeypatch):
    def fail(_base):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(calibration, "calibrate", fail)
    with pytest.raises(RuntimeError):
        calibrated_folder(base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_says_where_it_cannot_be_kept(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointUnreadable, match="MEND_DATA_DIR"):
        calibrated_folder(base, tmp_path / "file")


def test_keeps_what_another_process_made_meanwhile(base, tmp_path, monkeypatch):
    made = calibrated_folder(base, tmp_path)
    kept = made.rename(tmp_path / "aside")
    original = calibration.calibrate

    def slowly(base):
        editor = original(base)
        kept.rename(made)
        return editor

    before = json.loads((kept / CARD).read_text())
    monkeypatch.setattr(calibration, "calibrate", slowly)
    assert calibrated_folder(base, tmp_path) == made
    assert json.loads((made / CARD).read_text()) == before
    assert list(tmp_path.iterdir()) == [made]
