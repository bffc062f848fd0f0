"""`mend train` from files to a checkpoint that loads, for every kind of model, and in one line when it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from editors.base_model import load_base_model
from editors.data import Example
from editors.mend.checkpoint import load_checkpoint
from service.cli import main
from tests.editors.mend.examples import capitals, languages
from tests.editors.mend.training.runs import FAMILIES, family_base, verdicts

MEND = [sys.executable, "-c", "from service.cli import main; main()"]
QUICK = (
    "--rank", "4", "--steps", "4", "--batch", "4", "--validate-every", "2", "--validation-edits", "8",
    "--samples", "8", "--warmup", "1", "--learning-rate", "1e-3",
)  # fmt: skip
ENDS_WITHIN_S = 240
PROSE = "The capital of the city is a language in France and the capital of Norway is in a city of England. "


def write(path: Path, examples: list[Example]) -> Path:
    """As JSON Lines of the project's own layout."""
    lines = [
        {
            "prompt": e.prompt, "correction": e.correction, "subject": e.subject,
            "paraphrases": e.paraphrases, "keep": e.neighbours, "unrelated": e.unrelated,
        }
        for e in examples
    ]  # fmt: skip
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if v}) + "\n" for line in lines))
    return path


def save(folder: Path, family: str) -> Path:
    base = family_base(family)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save(folder / family, family) for family in FAMILIES}


@pytest.fixture
def mend(monkeypatch, capsys):
    """Run the command here; returns its exit status and what it wrote to standard output and error."""

    def run(*arguments: str | Path) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["mend", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


class TestEveryKind:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_trains_from_a_data_file_to_a_checkpoint_that_loads(self, mend, models, tmp_path, family):
        facts = verdicts() if family == "bert" else capitals(2) + languages()
        data = write(tmp_path / "facts.jsonl", facts)
        out = tmp_path / "mine"
        code, said, err = mend(
            "train", "--data", data, "--holdout", 4, "--base-model", models[family], "--out", out, *QUICK
        )
        assert (code, err.count("Traceback")) == (0, 0), err
        base = load_base_model(str(models[family]))
        checkpoint = load_checkpoint(out, base)
        assert len(checkpoint.editor.targets) >= 6
        card = json.loads((out / "card.json").read_text(), parse_constant=pytest.fail)
        assert card["training_data"][0]["examples"] == len(facts) - 4
        assert f"mend serve --base-model {models[family]} --editor {out}" in said
        assert f"mend evaluate --data {data} --last 4" in said
