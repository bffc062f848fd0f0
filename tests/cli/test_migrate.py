"""`mend ledger migrate`: the edits of one editor are made again by another, and what became of each is reported."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from editors.base_model import load_base_model
from editors.checkpoint import load_checkpoint
from service.app import _short
from service.cli import main
from service.ledger import EmbeddedRedis, RedisLedger
from tests.service_fixtures import (
    Folders,
    find_edits,
    never_takes,
    save_completed_editor,
    small_engine,
)


@dataclass(frozen=True)
class Moved:
    status: int | str
    out: str
    err: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Folders, Path]:
    """A small model with its editor, and another editor for it."""
    folder = tmp_path_factory.mktemp("model")
    folders = Folders.write(folder)
    return folders, save_completed_editor(folder / "newer", load_base_model(str(folders.base_model)))


@pytest.fixture
def made(folders, tmp_path) -> list[str]:
    """Prompts of edits in the first editor's ledger; the last one is of what no editor can make the model say."""
    base = load_base_model(str(folders[0].base_model))
    checkpoint = load_checkpoint(folders[0].editor, base)
    name = f"default:{_short(base.digest)}:{_short(checkpoint.digest)}"
    with EmbeddedRedis(tmp_path / "data") as redis, closing(RedisLedger.connect(redis.url, name)) as ledger:
        engine = small_engine(base, checkpoint, ledger)
        edits = find_edits(engine)
        made = [engine.apply(edit, allow_loss=True).applied for edit in edits[:2]]
        head, digest = ledger.head(), engine.published.digest
        stubborn = made[-1].model_copy(
            update={
                "sequence": head + 1,
                "edit_id": "stubborn",
                "prompt": "Who says what?",
                "correction": never_takes().correction,
                "state_digest": digest,
            }
        )
        ledger.append(stubborn, next(ledger.factors([made[-1]])))
    return [edit.prompt for edit in edits[:2]] + [stubborn.prompt]


@pytest.fixture
def move(folders, tmp_path, monkeypatch, capsys):
    def move(*flags: str) -> Moved:
        for name in [name for name in os.environ if name.startswith("MEND_")]:
            monkeypatch.delenv(name)
        own = [
            part
            for name, value in folders[0].settings(tmp_path / "data").items()
            if name not in ("editor", "answer_tokens")
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        monkeypatch.setattr(sys, "argv", ["mend", "ledger", "migrate", *own, *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return Moved(end.value.code or 0, said.out, said.err)

    return move


def test_reports_what_became_of_each_and_exits_2_where_some_cannot_be_made(move, made, folders, tmp_path):
    foretold = move("--editor", str(folders[1]), "--allow-loss", "--dry-run", "--json")
    assert foretold.status == 2
    assert json.loads(foretold.out)["revision"] == 0
    moved = move("--editor", str(folders[1]), "--allow-loss", "--report", str(tmp_path / "report.json"))
    assert moved.status == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert [edit["prompt"] for edit in report["edits"]] == made
    assert [edit["status"] for edit in report["edits"]] == ["applied", "applied", "refused"]
    assert report["revision"] == 2
    assert "did_not_take" in moved.out
    assert "2 applied, 1 refused" in moved.out
    again = json.loads(move("--editor", str(folders[1]), "--allow-loss", "--json").out)
    assert [edit["status"] for edit in again["edits"]] == ["unchanged", "unchanged", "refused"]
    assert (again["revision"], again["digest"]) == (report["revision"], report["digest"])


def test_wants_to_be_told_which_editor_and_which_ledger(move, made, folders):
    assert "--editor" in str(move().status)
    assert "--from" in str(move("--editor", str(folders[1]), "--from", "default:nothing:here").status)
