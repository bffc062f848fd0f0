"""A run leaves the best editor in a folder, with its card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from editors.base_model import BaseModel
from editors.checkpoint import load_checkpoint
from editors.mend.training.config import TrainingConfig
from editors.mend.training.objective import Validation
from editors.mend.training.recipe import train
from tests.editors.mend.examples import capitals, data_set, languages
from tests.editors.mend.training.runs import SMALL


def recipe(base: BaseModel, folder: Path, **more: object) -> Validation | None:
    training, validation = data_set(capitals(2) + languages(), "all.json").split(6)
    config = TrainingConfig(**(SMALL | {"steps": 3}))
    return train(base, [training], [validation], config, folder, **more)


@pytest.fixture(scope="module")
def trained(linear: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Validation]:
    folder = tmp_path_factory.mktemp("recipe") / "mine"
    return folder, recipe(linear, folder, command="mend train --data all.json")


class TestRecipe:
    def test_leaves_the_best_editor_with_its_card(self, linear, trained):
        folder, figures = trained
        checkpoint = load_checkpoint(folder, linear)
        card = json.loads((folder / "card.json").read_text())
        assert card["validation"] == dataclasses.asdict(figures)
        assert card["command"] == "mend train --data all.json"
        assert card["config"]["rank"] == checkpoint.editor.variant.rank == 4
        assert card["step"] == 3
        assert [(entry["name"], entry["examples"]) for entry in card["training_data"]] == [("all.json", 8)]
        assert [(entry["name"], entry["examples"]) for entry in card["validation_data"]] == [("all.json", 6)]

    def test_gives_the_same_editor_twice_with_or_without_a_cache(self, linear, trained, tmp_path):
        folder, figures = trained
        assert recipe(linear, tmp_path / "again", cache=tmp_path / "cache") == figures
        assert load_checkpoint(tmp_path / "again", linear).digest == load_checkpoint(folder, linear).digest

    def test_resumed_after_its_end_changes_nothing(self, linear, trained):
        folder, _ = trained
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert recipe(linear, folder, resume=True) is None
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
