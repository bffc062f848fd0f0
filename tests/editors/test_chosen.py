"""Which editor is used: the named one, the one that fits, or the training-free one; never one for another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from editors.base_model import BaseModel
from editors.chosen import choose_editor
from editors.errors import BaseModelMismatch, CheckpointNotFound, CheckpointUnreadable
from tests.service_fixtures import save_editor
from tests.small import small_base


@pytest.fixture(scope="module")
def linear() -> BaseModel:
    return small_base("linear")


@pytest.fixture(scope="module")
def conv1d() -> BaseModel:
    return small_base("conv1d")


@pytest.fixture
def shipped(linear: BaseModel, tmp_path: Path) -> Path:
    return save_editor(tmp_path / "shipped", linear)


def test_the_shipped_one_where_it_fits(shipped, linear, tmp_path):
    chosen = choose_editor(None, shipped, linear, tmp_path)
    assert (chosen.name, chosen.trained, chosen.notice, chosen.folder) == ("shipped", True, None, shipped)


def test_the_training_free_one_for_any_other_model(shipped, conv1d, tmp_path):
    chosen = choose_editor(None, shipped, conv1d, tmp_path / "cache")
    assert (chosen.name, chosen.trained) == ("training-free", False)
    assert chosen.folder.parent == tmp_path / "cache"


def test_the_training_free_one_where_none_is_shipped(conv1d, tmp_path):
    assert choose_editor(None, tmp_path / "none", conv1d, tmp_path).name == "training-free"


def test_the_training_free_one_by_its_name(shipped, linear, tmp_path):
    assert choose_editor("training-free", shipped, linear, tmp_path).name == "training-free"


def test_the_named_one(shipped, linear, tmp_path):
    named = save_editor(tmp_path / "named", linear)
    assert choose_editor(str(named), shipped, linear, tmp_path).name == "named"


def test_a_named_one_for_another_model_is_refused(shipped, conv1d, tmp_path):
    with pytest.raises(BaseModelMismatch, match="training-free"):
        choose_editor(shipped, shipped, conv1d, tmp_path)


def test_a_named_one_that_is_missing_is_refused(shipped, linear, tmp_path):
    with pytest.raises(CheckpointNotFound):
        choose_editor(tmp_path / "nowhere", shipped, linear, tmp_path)


def test_a_damaged_shipped_one_is_refused_rather_than_passed_over(shipped, linear, tmp_path):
    (shipped / "card.json").write_text("{")
    with pytest.raises(CheckpointUnreadable):
        choose_editor(None, shipped, linear, tmp_path)
