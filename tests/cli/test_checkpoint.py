"""`mend checkpoint`: archives in and out, and verification, each with one clear line when something is wrong."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from editors.base_model import BaseModel, load_base_model
from editors.checkpoint import load_checkpoint
from service.cli import main
from tests.editors.mend.archives import Original
from tests.editors.mend.test_archive import assert_same_changes, shuffled
from tests.service_fixtures import Folders

MEND = [sys.executable, "-c", "from service.cli import main; main()"]


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Mend = Callable[..., Ended]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.write(tmp_path_factory.mktemp("model"), "conv1d")


@pytest.fixture(scope="module")
def base(folders: Folders) -> BaseModel:
    return load_base_model(str(folders.base_model))


@pytest.fixture
def original(base: BaseModel, tmp_path: Path) -> Original:
    """An archive `a.pt` and its configuration `a.yaml`, in the test's folder."""
    original = Original(base.model, shuffled(base), {"n_hidden": 2})
    original.save(tmp_path / "a.pt")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": {"inner_params": original.inner_params}}))
    return original


@pytest.fixture
def mend(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mend:
    """`mend checkpoint …` in the test's folder, with the small base model."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mend", "checkpoint", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        why = end.value.code
        return Ended(1, said.out, f"{said.err}{why}\n") if isinstance(why, str) else Ended(why or 0, said.out, said.err)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEND_BASE_MODEL", str(folders.base_model))
    monkeypatch.setenv("COLUMNS", "200")
    return run


def refusal(ended: Ended) -> str:
    """The one line on stderr of a command that failed."""
    assert (ended.status, ended.out) == (1, "")
    (line,) = ended.err.splitlines()
    assert line.startswith("mend: ")
    return line


class TestImport:
    def test_makes_an_editor_that_loads_and_says_where_it_is_from(self, mend, original, base, tmp_path):
        ended = mend("import", "a.pt", "--inner-params", "a.yaml", "--out", "mine")
        assert ended.status == 0, ended.err
        checkpoint = load_checkpoint(tmp_path / "mine", base)
        assert ended.out == f"{checkpoint.digest}  mine\n"
        assert "6 weights, one network for u and δ, shared by shape, 3 blocks of rank 5" in ended.err
        assert "made for GPT2Config" in ended.err
        assert_same_changes(checkpoint.editor, original)
        assert (checkpoint.aggregate, checkpoint.margin_nats) == ("sum", 2.0)
        origin = checkpoint.card["imported_from"]
        assert (origin["file"], origin["step"]) == ("a.pt", 123)
        assert origin["val_stats"] == {"edit/acc_val": 0.75, "n_tokens/pre_val": 12}
        assert len(origin["digest"]) == len("sha256:") + 64
        text = (tmp_path / "mine" / "card.md").read_text()
        for fact in ("Imported from", "a.pt", origin["digest"], "| step | 123 |", "| edit/acc_val | 0.75 |"):
            assert fact in text

    def test_takes_patterns_and_switches_in_place_of_a_configuration(self, mend, base, tmp_path):
        names = [f"transformer.h.{block}.mlp.{name}.weight" for block in (3, 1) for name in ("c_fc", "c_proj")]
        other = Original(base.model, names, {"init": "xavier", "norm": False})
        other.save(tmp_path / "b.pt")
        patterns = ("--layers", r"h\.3\.mlp", "--layers", r"h\.1\.mlp")
        ended = mend("import", "b.pt", *patterns, "--init", "xavier", "--no-norm", "--out", "mine")
        assert ended.status == 0, ended.err
        assert_same_changes(load_checkpoint(tmp_path / "mine", base).editor, other)

    def test_switches_go_before_the_configuration(self, mend, base, original, tmp_path):
        mend("import", "a.pt", "--inner-params", "a.yaml", "--init", "xavier", "--out", "mine")
        assert load_checkpoint(tmp_path / "mine", base).editor.variant.identity is False

    def test_without_an_order_says_how_to_give_it(self, mend, original, tmp_path):
        why = refusal(mend("import", "a.pt", "--out", "mine"))
        assert "--inner-params" in why
        assert not (tmp_path / "mine").exists()

    def test_of_a_hostile_file_names_what_it_would_run(self, mend, tmp_path):
        class Evil:
            def __reduce__(self) -> tuple[Callable, tuple[str]]:
                return os.system, ("touch ran",)

        torch.save({"model": Evil()}, tmp_path / "evil.pt")
        assert "posix.system" in refusal(mend("import", "evil.pt", "--layers", "mlp", "--out", "mine"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"]

    def test_does_not_write_over_an_editor(self, mend, original, folders):
        why = refusal(mend("import", "a.pt", "--inner-params", "a.yaml", "--out", str(folders.editor)))
        assert f"there is an editor in {folders.editor} already" in why

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["a.pt", "--inner-params", "none.yaml"], "none.yaml cannot be read (No such file or directory)"),
            (["none.pt", "--layers", "mlp"], "there is no file none.pt"),
            (["a.yaml", "--layers", "mlp"], "a.yaml cannot be read as a file of torch.save"),
            (["a.pt", "--layers", "nothing"], "matches no linear layer"),
            (["a.pt", "--layers", "c_fc"], "a network for (48, 32), which no named weight has"),
            (["a.pt", "--inner-params", "a.yaml", "--base-model", "./nowhere"], "there is no model folder nowhere"),
            (["a.pt", "--inner-params", "a.yaml", "--out", "a.yaml/mine"], "cannot be written (Not a directory)"),
        ],
    )
    def test_of_what_is_wrong_says_it_in_a_line(self, mend, original, arguments, why):
        assert why in refusal(mend("import", "--out", "mine", *arguments))

    @pytest.mark.parametrize(
        ("flags", "why"),
        [
            (["--layers", "mlp", "--init", "zeros"], "--init is 'zeros', none of id, xavier"),
            (["--layers", "mlp", "--inner-params", "a.yaml"], "--inner-params and --layers both give the order"),
        ],
    )
    def test_with_flags_that_make_no_sense_says_so(self, mend, original, flags, why):
        assert why in refusal(mend("import", "a.pt", "--out", "mine", *flags))


class TestExport:
    def test_gives_a_file_that_imports_as_the_same_editor(self, mend, folders, base, tmp_path):
        ended = mend("export", str(folders.editor), "--out", "b.pt")
        assert (ended.status, ended.out) == (0, "b.pt\n")
        assert "its configuration is in b.yaml" in ended.err
        assert mend("import", "b.pt", "--inner-params", "b.yaml", "--out", "again").status == 0
        own, again = (load_checkpoint(folder, base).editor for folder in (folders.editor, tmp_path / "again"))
        assert own.state_dict().keys() == again.state_dict().keys()
        for name, tensor in own.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-6, atol=0)

    def test_of_what_is_no_checkpoint_says_so(self, mend, tmp_path):
        assert "there is no editor checkpoint in" in refusal(mend("export", str(tmp_path), "--out", "b.pt"))
        assert list(tmp_path.iterdir()) == []

    def test_into_a_new_folder_makes_it(self, mend, folders, tmp_path):
        assert mend("export", str(folders.editor), "--out", "new/b.pt").status == 0
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["b.pt", "b.yaml"]

    def test_to_where_nothing_can_be_written_says_so(self, mend, folders, original):
        why = refusal(mend("export", str(folders.editor), "--out", "a.yaml/b.pt"))
        assert "a.yaml cannot be written (File exists)" in why


class TestVerify:
    def test_of_a_sound_editor_lists_every_check_and_ends_well(self, mend, folders):
        ended = mend("verify", str(folders.editor), "--base-model", str(folders.base_model))
        assert (ended.status, ended.err) == (0, "")
        lines = [line.split(maxsplit=1) for line in ended.out.splitlines()]
        assert [status for status, _ in lines] == ["ok"] * 6
        names = ("card", "digest", "tensors", "finite", "base model", "targets")
        assert [claim.split(":")[0] for _, claim in lines] == list(names)

    def test_without_a_base_model_says_what_it_left_out(self, mend, folders, monkeypatch):
        ended = mend("verify", str(folders.editor))
        assert ended.status == 0
        assert len(ended.out.splitlines()) == 4
        assert "give --base-model" in ended.err

    def test_of_a_damaged_editor_ends_with_status_1(self, mend, folders, tmp_path):
        for name in ("card.json", "editor.safetensors"):
            (tmp_path / name).write_bytes((folders.editor / name).read_bytes())
        path = tmp_path / "editor.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        ended = mend("verify", ".")
        assert ended.status == 1
        assert [line.split()[0] for line in ended.out.splitlines()] == ["ok", "failed"]

    def test_as_json_for_a_program(self, mend, folders):
        ended = mend("verify", str(folders.editor), "--json")
        found = json.loads(ended.out)
        assert (ended.status, found["ok"], found["folder"]) == (0, True, str(folders.editor))
        assert [check["ok"] for check in found["checks"]] == [True] * 4
        found = json.loads(mend("verify", "nowhere", "--json").out)
        assert found["ok"] is False
        assert found["checks"][0]["name"] == "card"

    def test_of_a_foreign_base_model_ends_with_status_1(self, mend, folders, tmp_path):
        foreign = Folders.write(tmp_path, "linear")
        ended = mend("verify", str(folders.editor), "--base-model", str(foreign.base_model))
        assert ended.status == 1
        failed = [
            line.split(maxsplit=1)[1].split(":")[0] for line in ended.out.splitlines() if line.startswith("failed")
        ]
        assert failed == ["base model", "targets"]


def test_as_a_process_too_a_failure_is_one_line_and_status_1(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system, protocol=2))
    arguments = ["checkpoint", "import", "evil.pt", "--layers", "mlp", "--out", "mine"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [*MEND, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("mend: evil.pt would import posix.system")
    assert len(ended.stderr.splitlines()) == 1
