"""`mend train` from files to a checkpoint that loads, for every kind of model, and in one line when it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from editors.base_model import load_base_model
from editors.checkpoint import load_checkpoint
from editors.data import Example
from editors.mend.variant import Variant
from service.cli import main
from tests.editors.mend.examples import CITIES, capitals, languages
from tests.editors.mend.training.runs import FAMILIES, family_base, verdicts

MEND = [sys.executable, "-c", "from service.cli import main; main()"]
QUICK = (
    "--rank", "4", "--steps", "4", "--batch", "4", "--validate-every", "2", "--validation-edits", "8",
    "--samples", "8", "--warmup", "1", "--learning-rate", "1e-3",
)  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
ENDS_WITHIN_S = 240
PROSE = "The capital of the city is a language in France and the capital of Norway is in a city of England. "

LAYOUTS = {
    "counterfact": [
        {
            "prompt": e.prompt, "target_new": e.correction, "rephrase_prompt": e.paraphrases[0],
            "locality_prompt": e.neighbours[0], "subject": e.subject,
        }
        for e in capitals(2)
    ],
    "zsre": [
        {
            "src": e.prompt, "alt": e.correction, "rephrase": e.paraphrases[0], "loc": e.unrelated[0],
            "subject": e.subject,
        }
        for e in languages()
    ],
    "fever": [
        {"input": e.prompt, "alternatives": [e.correction], "filtered_rephrases": list(e.paraphrases), "output": []}
        for e in verdicts()
    ],
}  # fmt: skip


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


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    """14 examples."""
    return write(tmp_path / "facts.jsonl", capitals(2) + languages())


def train(facts: Path, models: dict[str, Path], out: Path) -> tuple[str | Path | int, ...]:
    return ("train", "--data", facts, "--holdout", 4, "--base-model", models["llama"], "--out", out, *QUICK)


def process(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=ENDS_WITHIN_S, check=False
    )


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

    @pytest.mark.parametrize(("family", "layout"), [("gpt2", "counterfact"), ("t5", "zsre"), ("bert", "fever")])
    def test_trains_on_the_papers_data_in_their_own_layouts(self, mend, models, tmp_path, family, layout):
        data, out = tmp_path / "data.json", tmp_path / "mine"
        data.write_text(json.dumps(LAYOUTS[layout]))
        code, _, err = mend(
            "train", "--data", data, "--holdout", 4, "--base-model", models[family], "--out", out, *QUICK
        )
        assert code == 0, err
        card = json.loads((out / "card.json").read_text())
        assert card["training_data"][0]["layout"] == layout
        assert (card["validation"]["neighbour"] is None) == (layout == "fever")  # whose claims have no relation

    @pytest.mark.parametrize("family", ["gpt2", "t5"])
    def test_that_writes_trains_from_plain_text(self, mend, models, tmp_path, family):
        text, out = tmp_path / "prose.txt", tmp_path / "mine"
        text.write_text("".join(f"{PROSE}{city} " * 3 + "\n" for city in CITIES))
        code, said, err = mend(
            "train", "--text", text, "--holdout", 3, "--continuation", 4, "--passages", 12,
            "--base-model", models[family], "--out", out, *QUICK,
        )  # fmt: skip
        assert code == 0, err
        card = json.loads((out / "card.json").read_text())
        assert [(d["name"], d["layout"], d["examples"]) for d in card["training_data"]] == [("prose.txt", "text", 9)]
        assert card["validation"]["neighbour"] is None
        assert "mend evaluate" not in said  # which reads examples and not prose
        load_checkpoint(out, load_base_model(str(models[family])))

    def test_in_bfloat16_too(self, mend, models, facts, tmp_path):
        out = tmp_path / "mine"
        code, _, err = mend(*train(facts, models, out), "--dtype", "bfloat16", "--precision", "bfloat16")
        assert code == 0, err
        base = load_base_model(str(models["llama"]), dtype=torch.bfloat16)
        assert all(p.dtype == torch.float32 for p in load_checkpoint(out, base).editor.parameters())


class TestAblations:
    @pytest.mark.parametrize(
        ("flags", "variant"),
        [
            ((), {}),
            (("--unshared",), {"shared": False}),
            (("--no-normalise",), {"normalise": False}),
            (("--no-identity",), {"identity": False}),
            (("--plain",), {"plain": True}),
            *((("--sides", sides), {"sides": sides}) for sides in ("separate", "u", "delta", "smaller")),
            (("--unshared", "--sides", "u", "--no-identity"), {"shared": False, "sides": "u", "identity": False}),
        ],
    )
    def test_train_and_are_named_in_the_card(self, mend, models, facts, tmp_path, flags, variant):
        out = tmp_path / "mine"
        code, _, err = mend(*train(facts, models, out), *flags)
        assert code == 0, err
        card = json.loads((out / "card.json").read_text())
        expected = asdict(Variant(rank=4, **variant))
        assert card["variant"] == {name: value for name, value in expected.items() if name != "rank"}
        assert {name: card["config"][name] for name in variant} == variant
        loaded = load_checkpoint(out, load_base_model(str(models["llama"]))).editor
        assert loaded.variant == Variant(rank=4, **variant)

    def test_do_not_go_on_as_another(self, mend, models, facts, tmp_path):
        assert mend(*train(facts, models, tmp_path / "mine"))[0] == 0
        code, _, _ = mend(*train(facts, models, tmp_path / "mine"), "--no-identity", "--resume-with-changes")
        assert "another shape: --identity was True, now it is False" in code


class TestLogs:
    def test_are_a_plot_and_tensorboards_beside_the_checkpoint(self, mend, models, facts, tmp_path):
        out = tmp_path / "mine"
        code, said, err = mend(*train(facts, models, out), "--tensorboard", tmp_path / "board")
        assert code == 0, err
        assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
        assert len(list((tmp_path / "board").glob("events.out.tfevents.*"))) == 1
        assert [line.split(":")[0] for line in said.splitlines() if line.startswith("step ")] == ["step 2", "step 4"]

    def test_by_tensorboard_need_it_to_be_installed(self, mend, models, facts, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        code, _, _ = mend(*train(facts, models, tmp_path / "mine"), "--tensorboard", tmp_path / "board")
        assert "pip install tensorboard" in code
        assert not (tmp_path / "mine").exists()


class TestResume:
    def test_goes_on_and_says_what_is_new(self, mend, models, facts, tmp_path):
        out = tmp_path / "mine"
        assert mend(*train(facts, models, out))[0] == 0
        code, _, err = mend(*train(facts, models, out), "--steps", 6, "--c-edit", 0.5, "--resume")
        assert code == 0
        assert "mend: resumed with changes: --c-edit was 0.2, now it is 0.5\n" in err
        saved = torch.load(out / "training.pt", weights_only=True)
        assert saved["progress"]["step"] == 6
        assert len(saved["progress"]["commands"]) == 2
        assert [point["step"] for point in saved["curve"]["points"]] == [1, 2, 3, 4, 5, 6]

    def test_of_another_run_is_refused_unless_asked_for(self, mend, models, facts, tmp_path):
        out = tmp_path / "mine"
        assert mend(*train(facts, models, out))[0] == 0
        changed = (*train(facts, models, out), "--steps", 6, "--holdout", 6)
        code, _, _ = mend(*changed, "--resume")
        assert code.startswith("mend: the run in")
        assert "the training data were facts.jsonl (10 examples" in code
        assert "now they are facts.jsonl (8 examples" in code
        assert mend(*changed, "--resume-with-changes")[0] == 0

    def test_with_another_base_model_is_refused(self, mend, models, facts, tmp_path):
        out = tmp_path / "mine"
        assert mend(*train(facts, models, out))[0] == 0
        code, _, _ = mend(*train(facts, {"llama": models["gpt2"]}, out), "--resume-with-changes")
        assert "trained for the base model with digest" in code

    def test_of_nothing_says_so(self, mend, models, facts, tmp_path):
        code, _, _ = mend(*train(facts, models, tmp_path / "mine"), "--resume")
        assert "training.pt is missing, so there is no run to resume" in code


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--holdout", 2), "give --data FILE or --text FILE"),
            (("--data", "FACTS"), "give --validation FILE or --holdout N"),
            (("--data", "FACTS", "--holdout", 99), "nothing is left of facts.jsonl to train on"),
            (("--data", "nothing.json", "--holdout", 2), "cannot read the data file nothing.json"),
            (("--text", "nothing.txt", "--holdout", 2), "cannot read the text file nothing.txt"),
            (("--data", "FACTS", "--holdout", 2, "--batch", 5, "--accumulate", 2), "--batch a multiple of 2"),
            (("--data", "FACTS", "--holdout", 2, "--schedule", "step"), "--schedule is 'step'"),
            (("--data", "FACTS", "--holdout", 2, "--batch", 4, "--together", 4), "one of them has 2"),
            (("--data", "FACTS", "--holdout", 2, "--layers", "nonsense"), "'nonsense'"),
            (("--data", "FACTS", "--holdout", 2, "--rank", 0), "--rank is 0; it must be at least 1"),
            (("--data", "FACTS", "--holdout", 2, "--sides", "left"), "--sides is 'left'; it must be one of joint"),
        ],
    )
    def test_are_one_line(self, mend, models, facts, tmp_path, arguments, said):
        arguments = [facts if a == "FACTS" else a for a in arguments]
        code, _, _ = mend("train", "--base-model", models["llama"], "--out", tmp_path / "mine", *arguments)
        assert isinstance(code, str)
        assert code.startswith("mend: ")
        assert "\n" not in code
        assert said in code
        assert not (tmp_path / "mine").exists()

    def test_of_a_folder_that_cannot_be(self, mend, models, facts, tmp_path):
        code, _, _ = mend(*train(facts, models, facts / "mine"))
        assert code == f"mend: --out is {facts / 'mine'}, but {facts} is not a folder; name another folder"

    def test_of_an_unknown_dtype(self, mend, models, facts, tmp_path):
        code, _, err = mend(*train(facts, models, tmp_path / "mine"), "--dtype", "float8")
        assert code == 2
        assert "float8" in err
        assert "bfloat16" in err

    def test_of_a_label_that_the_classifier_does_not_have(self, mend, models, facts, tmp_path):
        code, _, _ = mend(*train(facts, {"llama": models["bert"]}, tmp_path / "mine"))
        assert "is no label of this classifier" in code


class TestDivergence:
    def test_ends_with_one_line_and_keeps_what_was_good(self, models, facts, tmp_path):
        out = tmp_path / "mine"
        good = process(*MEND, *train(facts, models, out))
        assert good.returncode == 0, good.stderr
        kept = {path.name: path.read_bytes() for path in out.iterdir()}
        bad = process(*MEND, *train(facts, models, out), "--steps", 20, "--learning-rate", 1e30, "--resume")
        assert bad.returncode == 1
        assert bad.stderr.splitlines()[-1].startswith("mend: the loss is nan at step 5")
        assert "Traceback" not in bad.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
        again = process(*MEND, *train(facts, models, out), "--steps", 6, "--resume")
        assert again.returncode == 0, again.stderr


class TestSeveralProcesses:
    def test_leave_the_editor_of_one(self, models, facts, tmp_path):
        """A keyed one; the others' bits are compared in tests.editors.mend.training.test_processes."""
        options = ("--aggregate", "least_squares", "--together", 3)
        one = process(*MEND, *train(facts, models, tmp_path / "one"), "--accumulate", 2, *options)
        assert one.returncode == 0, one.stderr
        two = process(*TORCHRUN, *MEND, *train(facts, models, tmp_path / "two"), "--accumulate", 2, *options)
        assert two.returncode == 0, two.stderr
        assert two.stdout == one.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two"))
        digests = {json.loads((tmp_path / name / "card.json").read_text())["digest"] for name in ("one", "two")}
        assert len(digests) == 1

    def test_must_each_have_as_much_to_do(self, models, facts, tmp_path):
        refused = process(*TORCHRUN, *MEND, *train(facts, models, tmp_path / "mine"))
        assert refused.returncode != 0
        assert "mend: 1 micro-batches (--accumulate) cannot be shared out evenly among 2 processes" in refused.stderr
