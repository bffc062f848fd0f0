"""`mend evaluate` and `mend compare`: what they print, what they write, and the one line in which they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from editors.checkpoint import load_checkpoint
from editors.data import Example
from editors.evaluation.methods import Mend
from editors.evaluation.protocols import Bench
from service.cli.main import main
from tests.editors.mend.examples import capitals, languages
from tests.service_fixtures import save_base, save_completed_editor, save_editor
from tests.small import small_base

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base model, two editors for it, and data."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = save_base(folder / "base")
    save_editor(folder / "one", base)
    save_completed_editor(folder / "keyed", base)
    shutil.copytree(folder / "one", folder / "two")
    card = json.loads((folder / "two" / "card.json").read_text())
    (folder / "two" / "card.json").write_text(json.dumps(card | {"name": "two", "margin_nats": 0.0}))
    write_data(folder / "data.jsonl", capitals(2) + languages())
    write_data(folder / "other.jsonl", languages())
    (folder / "text.txt").write_text("The capital of France is Paris. He speaks the language of Italy. " * 20)
    return folder


def write_data(path: Path, examples: list[Example]) -> None:
    names = {"neighbours": "keep"}
    kept = ("prompt", "correction", "subject", "paraphrases", "neighbours", "unrelated")
    records = [{names.get(name, name): getattr(example, name) for name in kept} for example in examples]
    path.write_text("\n".join(map(json.dumps, records)))


@pytest.fixture
def run(folders, monkeypatch, capsys) -> Run:
    """Run a command in the folder; its output. An error is raised as SystemExit, as in a shell."""
    monkeypatch.chdir(folders)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mend", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        if ended.value.code:
            raise ended.value
        return capsys.readouterr().out

    return run


def evaluate(run: Run, *arguments: str) -> str:
    data = () if "--data" in " ".join(arguments) else ("--data", "data.jsonl")
    words = " ".join(arguments).split()
    return run("evaluate", "--base-model", "./base", "--editor", "one", *data, *words)


class TestEvaluate:
    def test_reports_what_a_bench_measures(self, run, folders):
        out = evaluate(run, "--limit", "4", "--report", "report.json", "--seed", "3")
        (found,) = json.loads((folders / "report.json").read_text())
        base = small_base()
        checkpoint = load_checkpoint(folders / "one", base)
        examples = [dataclasses.replace(e) for e in capitals(2)[:4]]
        measured = Bench(base, seed=3).single(Mend(base, checkpoint.editor, checkpoint.margin_nats), examples)
        for name, figure in measured.figures.items():
            assert found["figures"][name] == dataclasses.asdict(figure)
        assert (found["method"], found["setting"], found["examples"], found["seed"]) == ("mend", "single", 4, 3)
        assert found["command"].startswith("mend evaluate --base-model base --editor one --data data.jsonl")
        assert found["dtype"] == "float32"
        assert "data.jsonl, 4 single edits" in out
        assert "| efficacy, greedy |" in out
        assert "| perplexity |" in out

    def test_measures_every_method_in_every_setting(self, run, folders):
        methods, settings = "--baseline ft --baseline ft+kl --tune 2", "--batched 2 --batched 3 --accumulated 4"
        evaluate(run, methods, settings, "--limit 6 --text text.txt --report all.json --plots plots")
        found = json.loads((folders / "all.json").read_text())
        settings = ("single", "batched 2", "batched 3", "accumulated 4")
        assert [(entry["method"], entry["setting"]) for entry in found] == [
            (method, setting) for method in ("mend", "ft", "ft+kl") for setting in settings
        ]
        assert found[0]["figures"]["perplexity"]["count"] > 1
        grid = found[4]["grid"]
        best = max(grid, key=lambda trial: (trial["score"], trial["recipe"]["steps"]))
        assert best["recipe"] == found[4]["recipe"] == found[5]["recipe"]
        written = sorted(path.name for path in (folders / "plots").iterdir())
        assert written == ["data-accumulated.png", "data-batched.png", "data-single.png"]
        for path in (folders / "plots").iterdir():
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 5000

    def test_puts_editors_and_baselines_in_one_table_over_the_number_of_edits(self, run, folders):
        out = evaluate(run, "--editor", "keyed", "--batched", "3", "--limit", "2", "--baseline ft --tune 1",
                       "--report", "many.json")  # fmt: skip
        assert "data.jsonl, 2 of 3 edits, batched 3, by keyed" in out
        rows = [line.split(" | ")[:2] for line in out.partition("all active at once")[2].splitlines() if "|" in line]
        assert rows[2] == ["| 0", "base"]
        assert rows[3:] == [[f"| {count}", method] for count in (1, 3) for method in ("one", "keyed", "ft")]
        found = json.loads((folders / "many.json").read_text())
        assert [(entry["method"], entry["examples"]) for entry in found] == [
            (method, 2) for method in ("one", "keyed", "ft") for _ in (1, 3)
        ]
        digests = [json.loads((folders / name / "card.json").read_text())["digest"] for name in ("one", "keyed")]
        assert [entry.get("editor") for entry in found[::2]] == [*digests, None]

    def test_adds_to_each_card_what_its_editor_gave(self, run, folders):
        for name in ("one", "keyed"):
            shutil.copytree(folders / name, folders / f"each-{name}")
        run("evaluate", "--base-model", "./base", "--editor", "each-one", "--editor", "each-keyed", "--data",
            "data.jsonl", "--limit", "1", "--write-card")  # fmt: skip
        for name in ("one", "keyed"):
            (result,) = json.loads((folders / f"each-{name}" / "card.json").read_text())["results"]
            assert result["method"] == name

    def test_can_leave_single_edits_out(self, run, folders):
        evaluate(run, "--no-single", "--batched", "2", "--limit", "5", "--report", "batched.json")
        (found,) = json.loads((folders / "batched.json").read_text())
        assert (found["setting"], found["examples"]) == ("batched 2", 4)

    def test_writes_the_card_without_the_values(self, run, folders):
        shutil.copytree(folders / "one", folders / "carded")
        old = json.loads((folders / "carded" / "card.json").read_text())
        old["results"] = [{"data": name, "command": "old", "table": "old"} for name in ("data.jsonl", "other.jsonl")]
        (folders / "carded" / "card.json").write_text(json.dumps(old))
        for more in ([], ["--no-single", "--batched", "2"]):
            run("evaluate", "--base-model", "./base", "--editor", "carded", "--data", "data.jsonl", "--limit", "2",
                "--write-card", *more)  # fmt: skip
        other, result, batched = json.loads((folders / "carded" / "card.json").read_text())["results"]
        assert (other["data"], batched["setting"]) == ("other.jsonl", "batched 2")
        assert result["figures"]["efficacy, greedy"]["count"] == 2
        assert not {"values", "text_losses"} & set(result)
        assert "data.jsonl, 2 single edits" in (folders / "carded" / "card.md").read_text()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_serves_the_model_in_half_precision(self, run, folders, dtype):
        evaluate(run, "--dtype", dtype, "--limit", "2", "--baseline", "ft", "--tune", "1", "--report", "half.json")
        found = json.loads((folders / "half.json").read_text())
        assert [entry["dtype"] for entry in found] == [dtype, dtype]

    def test_tunes_on_a_file_of_its_own(self, run):
        out = evaluate(run, "--baseline", "ft", "--validation", "other.jsonl", "--tune", "2", "--limit", "3")
        assert "chosen on 2 examples" in out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("--baseline ft", "no example to choose a baseline's learning rate on: measure fewer with --limit"),
            ("--accumulated 15", "15 edits at once cannot be measured on 14 examples"),
            ("--batched 0 --no-single", "0 edits at once cannot be measured on 14 examples"),
            ("--text nothing.txt", "cannot read the text nothing.txt: No such file"),
            ("--text base/model.safetensors", "cannot read the text base/model.safetensors: not UTF-8"),
            ("--text empty.txt", "empty.txt holds fewer than two tokens of text"),
            ("--validation nothing.json", "cannot read the data file nothing.json"),
        ],
    )
    def test_refuses_in_one_line(self, run, folders, arguments, said):
        (folders / "empty.txt").write_text("\n")
        with pytest.raises(SystemExit, match=f"^mend: .*{said}"):
            evaluate(run, "--limit 14", arguments)


class TestReport:
    @pytest.mark.parametrize("option", ["--report", "--plots"])
    def test_says_before_measuring_that_results_have_nowhere_to_go(self, run, option):
        wrong = "nowhere/report.json" if option == "--report" else "data.jsonl"
        with pytest.raises(SystemExit, match=r"^mend: cannot (write the report|draw into)"):
            evaluate(run, "--limit", "1", option, wrong)


class TestCompare:
    def test_puts_two_editors_side_by_side(self, run):
        out = run("compare", "one", "two", "--data", "data.jsonl", "--base-model", "./base", "--limit", "5")
        assert "data.jsonl, single: 5 edits" in out
        assert "| figure | one (mend) | two (mend) | difference (95 %) | clear of zero |" in out
        assert "| efficacy, greedy |" in out

    def test_of_a_report_with_itself_finds_no_difference(self, run):
        evaluate(run, "--limit", "4", "--report", "same.json")
        lines = [line for line in run("compare", "same.json", "same.json").splitlines() if "(0.000" in line]
        assert lines
        assert all(line.endswith("| 0.000 (0.000–0.000) | no |") for line in lines)

    def test_refuses_reports_of_other_seeds_and_data(self, run):
        evaluate(run, "--limit", "2", "--report", "a.json")
        evaluate(run, "--limit", "2", "--report", "b.json", "--seed", "1")
        evaluate(run, "--limit", "2", "--report", "c.json", "--data", "other.jsonl")
        with pytest.raises(SystemExit, match=r"^mend: these reports cannot be compared .* and 1"):
            run("compare", "a.json", "b.json")
        with pytest.raises(SystemExit, match=r"data: data\.jsonl and other\.jsonl"):
            run("compare", "a.json", "c.json")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("one two", "two checkpoints are compared on data: give --data FILE"),
            ("one report.json", "give two folders of checkpoints, or two reports"),
            ("nothing.json nothing.json", "cannot read the report nothing.json: No such file"),
        ],
    )
    def test_refuses_in_one_line(self, run, arguments, said):
        with pytest.raises(SystemExit, match=f"^mend: {said}"):
            run("compare", *arguments.split())
