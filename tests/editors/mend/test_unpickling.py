"""A file from strangers is read without running anything in it, whatever it tries."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION
from transformers import GPT2Config

from editors.errors import ArchiveUnreadable, ArchiveUnsafe
from editors.mend.unpickling import Placeholder, load_untrusted

RAN = "MEND_TEST_RAN"
"""Whatever runs leaves this in the environment."""
CODE = f"__import__('os').environ.__setitem__('{RAN}', '1')"


class Calls:
    """Pickles as a call, as in the attacks that are known."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable, tuple[object, ...]]:
        return self.reduced


def global_(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def string(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


EVAL = global_("builtins", "eval")
CALLED = string(CODE)
INERT = global_("transformers.models.gpt2.configuration_gpt2", "GPT2Config")
ATTACKS: dict[str, tuple[bytes | object, str]] = {
    "os.system": (Calls(os.system, "true"), "posix.system"),
    "eval": (Calls(eval, CODE), "builtins.eval"),
    "exec": (Calls(exec, CODE), "builtins.exec"),
    "getattr of getattr": (Calls(getattr, Calls(__import__, "os"), "system"), "builtins.getattr"),
    "torch.load inside": (Calls(torch.load, "another.pt"), "torch.serialization.load"),
    "torch.hub": (Calls(torch.hub.load, "nobody/nothing", "x"), "torch.hub.load"),
    "by the names of Python 2": (b"\x80\x02" + call(global_("__builtin__", "eval"), CALLED) + b".", "builtins.eval"),
    "claiming to be in transformers": (
        b"\x80\x02" + call(INERT, call(EVAL, CALLED)) + b".",
        "builtins.eval",
    ),
    "as the state of a configuration": (
        b"\x80\x02" + INERT + b")\x81" + call(EVAL, CALLED) + b"b.",
        "builtins.eval",
    ),
    "by the oldest opcodes": (b"(i__builtin__\neval\np0\n.", "builtins.eval"),
    "a dotted path": (
        b"\x80\x04" + string("torch") + string("_utils.importlib.import_module") + b"\x93(" + string("os") + b"tR.",
        "STACK_GLOBAL torch._utils.importlib.import_module",
    ),
    "behind a name that is allowed": (
        # The name that is used is fetched from the memo, and the last strings are a decoy.
        b"\x80\x04" + string("builtins") + b"q\x00" + string("eval") + b"q\x01" + string("collections")
        + string("OrderedDict") + b"00" + b"h\x00h\x01\x93(" + CALLED + b"tR.",
        "STACK_GLOBAL collections.OrderedDict",
    ),
    "with the newest protocol": (pickle.dumps(Calls(eval, CODE), protocol=5), "STACK_GLOBAL builtins.eval"),
}  # fmt: skip


def zipped(path: Path, pickled: bytes) -> Path:
    """A file of torch.save in its zip form, around a pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", content)
    return path


def legacy(path: Path, pickled: bytes) -> Path:
    """The same in the form of before torch 1.6."""
    head = (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in head) + pickled + pickle.dumps([], protocol=2))
    return path


FORMS = {"zip": zipped, "legacy": legacy}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[Path, bytes], Path]:
    return request.param


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> object:
    """In any test of this module."""
    monkeypatch.delenv(RAN, raising=False)
    yield None
    assert RAN not in os.environ


class TestAttack:
    @pytest.mark.parametrize("name", ATTACKS)
    def test_is_refused_by_the_name_of_what_it_would_run(self, tmp_path, form, name):
        attack, imported = ATTACKS[name]
        pickled = attack if isinstance(attack, bytes) else pickle.dumps({"model": attack}, protocol=2)
        path = form(tmp_path / "evil.pt", pickled)
        with pytest.raises(ArchiveUnsafe, match="nothing in it was run") as refused:
            load_untrusted(path)
        assert imported in refused.value.facts["names"]
        assert imported in str(refused.value)

    def test_would_have_run_without_this(self, tmp_path, form, monkeypatch):
        """Else the tests above could not fail."""
        path = form(tmp_path / "evil.pt", pickle.dumps({"model": Calls(eval, CODE)}, protocol=2))
        torch.load(path, weights_only=False)
        assert os.environ.pop(RAN) == "1"

    def test_in_any_pickle_of_the_older_form_is_refused(self, tmp_path):
        evil = pickle.dumps(Calls(eval, CODE), protocol=2)
        parts = [pickle.dumps(part, protocol=2) for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {}, {}, [])]
        for place in range(5):
            (tmp_path / "evil.pt").write_bytes(b"".join([*parts[:place], evil, *parts[place + 1 :]]))
            with pytest.raises(ArchiveUnsafe, match=r"builtins\.eval"):
                load_untrusted(tmp_path / "evil.pt")

    def test_that_names_a_source_file_to_patch_is_refused(self, tmp_path, monkeypatch):
        """In the older form torch compares a class's source with one in the file, and may write a patch."""
        monkeypatch.chdir(tmp_path)
        module = b"\x80\x02(" + string("module") + INERT + string("a.py") + string("source") + b"tQ."
        with pytest.raises(ArchiveUnreadable, match="Only persistent_load of storage is allowed"):
            load_untrusted(legacy(tmp_path / "evil.pt", module))
        assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]

    def test_by_a_program_of_torchscript_is_refused(self, tmp_path):
        # Written out: torch.jit.save warns of its own end.
        with zipfile.ZipFile(zipped(tmp_path / "evil.pt", pickle.dumps({}, protocol=2)), "a") as archive:
            archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))
            archive.writestr("archive/code/__torch__.py", "def forward(self): pass")
        with pytest.raises(ArchiveUnreadable, match="TorchScript"):
            load_untrusted(tmp_path / "evil.pt")

    def test_leaves_the_placeholders_of_one_file_to_that_file(self, tmp_path, form):
        before = set(torch.serialization.get_safe_globals())
        assert load_untrusted(form(tmp_path / "a.pt", b"\x80\x02" + INERT + b")\x81.")).kind.endswith("GPT2Config")
        assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize(
        ("name", "can_be"), [("", True), ("a b", True), ("A.B", True), ("\0", False), ("é", False)]
    )
    def test_with_an_odd_name_comes_to_nothing(self, tmp_path, form, name, can_be):
        path = form(tmp_path / "a.pt", b"\x80\x02" + global_("transformers", name) + b")\x81.")
        if can_be:
            assert isinstance(load_untrusted(path), Placeholder)
        else:
            with pytest.raises(ArchiveUnreadable):
                load_untrusted(path)

    def test_with_a_configuration_that_is_called_gets_something_inert(self, tmp_path, form):
        """Arguments, state and methods that a class has go nowhere: the class is never looked up."""
        pickled = b"\x80\x02" + call(global_("transformers.nowhere", "Invented"), string("x")) + b"}" + b"b."
        found = load_untrusted(form(tmp_path / "a.pt", pickled))
        assert isinstance(found, Placeholder)
        assert (found.kind, found.state) == ("transformers.nowhere.Invented", {})
        assert importlib.util.find_spec("transformers.nowhere") is None


class TestHonestFile:
    @pytest.mark.parametrize("zip_form", [True, False])
    def test_comes_back_with_its_configuration_inert(self, tmp_path, zip_form):
        state = OrderedDict(
            weight=torch.randn(3, 4), half=torch.ones(2).half(), parameter=torch.nn.Parameter(torch.ones(2)),
            view=torch.arange(12).view(3, 4)[:, 1:3], model_config=GPT2Config(n_layer=3, dtype=torch.float16),
        )  # fmt: skip
        content = {"model": state, "step": 5, "mean": np.float64(0.5), "raw": b"\xff", "seen": {1, 2}, "none": None}
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_form)
        found = load_untrusted(tmp_path / "a.pt")
        for name in ("weight", "half", "parameter", "view"):
            assert torch.equal(found["model"][name], state[name])
        config = found["model"]["model_config"]
        assert config.kind == "transformers.models.gpt2.configuration_gpt2.GPT2Config"
        assert config.state["n_layer"] == 3
        assert isinstance(found["mean"], Placeholder)
        assert (found["step"], found["raw"], found["seen"], found["none"]) == (5, b"\xff", {1, 2}, None)


class TestUnreadable:
    @pytest.mark.parametrize("zip_form", [True, False])
    def test_at_whatever_place_it_is_cut(self, tmp_path, zip_form):
        path = tmp_path / "a.pt"
        torch.save({"model": {"w": torch.randn(40, 40)}}, path, _use_new_zipfile_serialization=zip_form)
        whole = path.read_bytes()
        for length in (0, 1, 3, 10, 60, len(whole) // 2, len(whole) - 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ArchiveUnreadable, match=r"a\.pt cannot be read as a file of torch\.save"):
                load_untrusted(path)

    def test_when_one_byte_of_a_tensor_is_wrong(self, tmp_path):
        path = tmp_path / "a.pt"
        torch.save({"model": {"w": torch.full((40, 40), 1.5)}}, path)
        raw = path.read_bytes()
        place = raw.index(torch.full((8,), 1.5).numpy().tobytes())
        path.write_bytes(raw[:place] + b"\x01" + raw[place + 1 :])
        with pytest.raises(ArchiveUnreadable, match="checksum of a/data/0 is wrong"):
            load_untrusted(path)

    def test_when_it_is_something_else(self, tmp_path):
        path = tmp_path / "a.pt"
        plain = io.BytesIO()
        with zipfile.ZipFile(plain, "w") as archive:
            archive.writestr("letter.txt", "hello")
        for raw in (
            b"hello",
            b"config:\n  a: 1\n",  # would begin with an import, if it were a pickle
            b"# a text\n" * 99,
            bytes(range(256)),
            pickle.dumps([1, 2], protocol=2),
            plain.getvalue(),
        ):
            path.write_bytes(raw)
            with pytest.raises(ArchiveUnreadable, match="cut short, damaged or something else"):
                load_untrusted(path)

    def test_when_it_is_compressed_and_may_be_a_bomb(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
        with pytest.raises(ArchiveUnreadable, match="it is compressed"):
            load_untrusted(tmp_path / "a.pt")

    def test_when_it_is_not_there(self, tmp_path):
        for path in (tmp_path / "nothing.pt", tmp_path):
            with pytest.raises(ArchiveUnreadable, match="there is no file"):
                load_untrusted(path)

    def test_reasons_do_not_pass_on_advice_to_load_it_unchecked(self, tmp_path, form):
        pickled = b"\x80\x02" + call(global_("collections", "OrderedDict"), b"K\x05") + b"K\x01b."
        with pytest.raises(ArchiveUnreadable) as refused:
            load_untrusted(form(tmp_path / "a.pt", pickled))
        assert "weights_only" not in str(refused.value)
