"""`mend bench`: every step of an edit is measured, of single edits and beside many."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from service.cli.main import main
from tests.cli.test_evaluate import write_data
from tests.editors.mend.examples import capitals
from tests.service_fixtures import save_base, save_completed_editor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_completed_editor(folder / "keyed", save_base(folder / "base"))
    write_data(folder / "data.jsonl", capitals(8))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["mend", "bench", "--base-model", "./base", "--rounds", "2", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        if ended.value.code:
            raise ended.value
        said = capsys.readouterr()
        return said.out, said.err

    return run


def steps(table: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][1:]


def test_single_edits(run, tmp_path):
    said, refused = run("--editor", "training-free", "--report", str(tmp_path / "bench.json"))
    found = steps(said)
    assert {"forward pass", "edit, in all", "edit: propose", "edit: judge", "rollback"} <= set(found)
    assert any(step.startswith("restart: replay of ") for step in found)
    laps = json.loads((tmp_path / "bench.json").read_text())["laps_ms"]
    assert len(laps["edit, in all"]) + refused.count("refused: ") == 12
    assert all(each > 0 for values in laps.values() for each in values)


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--data", "data.jsonl", "--rounds", "99"], "give more data"), (["--report", "none/x"], "folder")],
)
def test_what_cannot_be_measured_is_said_first(run, flags, word):
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    assert word in str(ended.value)


def test_many_at_once(run):
    said, about = run("--editor", "keyed", "--data", "data.jsonl", "--edits", "5")
    made = int(about.split(" of 5 edits were made")[0].split()[-1])
    assert {"batch of 5", "batch: propose", "batch: judge", f"audit of {made} edits"} <= set(steps(said))
    assert f"of {made} hold" in about
    assert "kB of factors per edit" in said


def test_the_replay_of_a_long_ledger(run):
    said, _ = run("--editor", "keyed", "--replay", "100")
    assert {"restart: replay of 100 entries", "restart: replay of 100 entries, compacted"} <= set(steps(said))


def test_generations_by_three_ways_that_say_the_same(run, tmp_path):
    said, _ = run("--editor", "keyed", "--generations", "4", "--rounds", "1", "--report", str(tmp_path / "bench.json"))
    figures = json.loads((tmp_path / "bench.json").read_text())
    ways = ["a thread each", "transformers", "mend"]
    assert [(each["at_once"], each["way"]) for each in figures] == [(number, way) for number in (1, 4) for way in ways]
    assert all(each["same"] == each["requests"] == 8 and each["tokens"] > 8 for each in figures)
    assert all(f"| {number} | {way} |" in said for number in (1, 4) for way in ways)
