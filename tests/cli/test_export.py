"""`mend export`, from a running service and from the ledger that it leaves."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from editors.base_model import load_base_model
from editors.formats import INDEX, ExportFormat
from service.ledger import EmbeddedRedis, RedisLedger
from tests.e2e.server import Server, serving
from tests.service_fixtures import Folders, find_edits, small_checkpoint, small_engine

MEND = [sys.executable, "-c", "from service.cli import main; main()"]
ENDS_WITHIN_S = 240


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def environment(folders: Folders) -> dict[str, str]:
    """Settings of a service that starts, but for its data folder."""
    return {
        f"MEND_{name.upper()}": str(value) for name, value in folders.settings(Path()).items() if name != "data_dir"
    }


class Live:
    """A server, its data folder and settings, and the edit that is active on it."""

    def __init__(self, server: Server, data_dir: Path, environment: dict[str, str], edit: dict) -> None:
        self.server, self.data_dir, self.environment, self.edit = server, data_dir, environment, edit
        self.url = str(server.client.base_url)


@pytest.fixture(scope="module")
def live(folders: Folders, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service that runs, on which one edit is active and another was taken back."""
    folder = tmp_path_factory.mktemp("live")
    base = load_base_model(str(folders.base_model))
    with EmbeddedRedis(folder / "search") as redis:
        ledger = RedisLedger.connect(redis.url, "edits")
        edits = find_edits(small_engine(base, small_checkpoint(folder / "editor", base), ledger))
        ledger.close()
    with serving(folder / "data", folder / "log", **environment) as server:
        made = [
            server.client.post("/edits", json={"prompt": edit.prompt, "correction": edit.correction}).json()
            for edit in edits[:2]
        ]
        assert server.client.delete(f"/edits/{made[0]['id']}").status_code == 200
        yield Live(server, folder / "data", environment, made[1])


def mend(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [*MEND, "export", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


def refusal(*arguments: object, **environment: str) -> str:
    """Why an export was not made: the last line."""
    ended = mend(*arguments, **environment)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout == ""
    *before, last = ended.stderr.splitlines()
    assert last.startswith("mend: "), ended.stderr
    assert all(line.endswith(" …") for line in before if line.startswith("mend: "))
    return last.removeprefix("mend: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def index_of(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text(encoding="utf-8"))


class TestFromAService:
    @pytest.mark.parametrize("format", ExportFormat)
    def test_is_unpacked_whole_and_its_facts_are_told(self, live, tmp_path, format):
        ended = mend("--service", live.url, "--format", format, "--out", tmp_path / "out", "--json")
        assert ended.returncode == 0, ended.stderr
        facts, index = json.loads(ended.stdout), index_of(tmp_path / "out")
        model = live.server.get("/model")
        assert (facts["revision"], facts["digest"]) == (model["revision"], model["digest"]) == (3, index["digest"])
        assert facts["base_model"]["digest"] == model["base_model"]["digest"]
        assert facts["editor"]["digest"] == model["editor"]["digest"]
        assert (facts["format"], facts["active_edits"], facts["folder"]) == (format, 1, str(tmp_path / "out"))
        assert [edit["id"] for edit in index["edits"]] == [live.edit["id"]]
        assert {*contents(tmp_path / "out")} == {*index["files"], INDEX}
        assert ("rank" in facts) == (format == "lora")

    def test_goes_into_an_empty_folder_and_is_told_in_words(self, live, tmp_path):
        ended = mend("--service", f"{live.url}/", "--format", "lora", "--out", tmp_path)
        assert ended.returncode == 0, ended.stderr
        index = index_of(tmp_path)
        assert index["digest"] in ended.stdout
        assert f"rank        {index['rank']} at most" in ended.stdout
        assert "mend: unpacking" in ended.stderr

    def test_what_the_service_refuses_is_said_in_its_words(self, live, tmp_path):
        said = refusal("--service", f"{live.url}/nowhere", "--format", "lora", "--out", tmp_path / "out")
        assert "(not_found)" in said
        assert not (tmp_path / "out").exists()

    def test_takes_no_settings_of_a_service(self, tmp_path):
        said = refusal("--service", "http://x", "--data-dir", "y", "--format", "lora", "--out", tmp_path / "out")
        assert "--data-dir" in said


class TestFromTheLedger:
    def test_of_a_running_service_is_refused_with_the_way_out(self, live, tmp_path):
        environment = {**live.environment, "MEND_DATA_DIR": str(live.data_dir)}
        said = refusal("--format", "merged", "--out", tmp_path / "out", **environment)
        assert "--service" in said
        assert str(live.data_dir) in said
        assert not (tmp_path / "out").exists()
        assert live.server.get("/readyz")["status"] == "ready"

    @pytest.mark.parametrize("format", ExportFormat)
    def test_is_what_the_service_gives_bit_for_bit(self, live, tmp_path, format):
        # Every answer of the service was on disk before it was given, so a copy of its data is whole at any time.
        shutil.copytree(live.data_dir / "redis", tmp_path / "data" / "redis")
        here, there = tmp_path / "here", tmp_path / "there"
        ended = mend("--format", format, "--out", here, "--data-dir", tmp_path / "data", **live.environment)
        assert ended.returncode == 0, ended.stderr
        assert "mend: writing revision 3" in ended.stderr
        assert mend("--service", live.url, "--format", format, "--out", there).returncode == 0
        assert contents(here) == contents(there)

    def test_without_edits_is_the_base_model_and_no_adapter(self, folders, environment, tmp_path):
        with EmbeddedRedis(tmp_path / "data"):
            pass
        environment = {**environment, "MEND_DATA_DIR": str(tmp_path / "data")}
        said = refusal("--format", "lora", "--out", tmp_path / "out", **environment)
        assert "no adapter" in said
        assert not (tmp_path / "out").exists()
        ended = mend("--format", "merged", "--out", tmp_path / "out", **environment)
        assert "no edit is active" in ended.stderr
        assert load_base_model(str(tmp_path / "out")).digest == load_base_model(str(folders.base_model)).digest

    def test_that_is_not_there_is_not_made(self, environment, tmp_path):
        said = refusal("--format", "merged", "--out", tmp_path / "out", "--data-dir", tmp_path / "no", **environment)
        assert "MEND_DATA_DIR" in said
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"MEND_REDIS_URL": "redis://127.0.0.1:1/0"}, "127.0.0.1:1"),
            ({"MEND_BASE_MODEL": "/nowhere", "MEND_REDIS_URL": "redis://127.0.0.1:1/0"}, "/nowhere"),
            ({"MEND_MAX_NEW_TOKENS": "many"}, "MEND_MAX_NEW_TOKENS is 'many'"),
        ],
        ids=["redis", "model", "setting"],
    )
    def test_with_settings_that_are_wrong_says_which(self, environment, tmp_path, wrong, says):
        assert says in refusal("--format", "merged", "--out", tmp_path / "out", **{**environment, **wrong})
        assert not (tmp_path / "out").exists()


def zipped(compression: int = zipfile.ZIP_STORED, **files: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return packed.getvalue()


def index(*files: str, **facts: object) -> str:
    """The index of an export that has these files."""
    return json.dumps(
        {
            "format": "lora",
            "revision": 1,
            "digest": "sha256:1",
            "base_model": {"ref": "base", "digest": "sha256:2"},
            "editor": {"name": "editor", "digest": "sha256:3"},
            "files": files,
            "edits": [{}],
            **facts,
        }
    )


@contextmanager
def answering(body: bytes, length: int | None = None) -> Iterator[str]:
    """A server that says this to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class TestWhatIsNoExport:
    @pytest.mark.parametrize(
        ("body", "says"),
        [
            (b"<html>", "zip"),
            (zipped(**{INDEX: index()})[:-30], "zip"),
            (zipped(other="file"), INDEX),
            (zipped(**{INDEX: "[]"}), INDEX),
            (zipped(**{INDEX: "{"}), INDEX),
            (zipped(zipfile.ZIP_DEFLATED, **{INDEX: index(), "bomb": "0" * 100_000}), "compressed"),
            (zipped(**{INDEX: index(), "../evil": "x"}), "'../evil'"),
            (zipped(**{INDEX: index(), "a/../../../evil": "x"}), "evil"),
        ],
        ids=["no zip", "cut short", "no index", "another index", "half an index", "bomb", "outside", "far outside"],
    )
    def test_is_refused_and_leaves_nothing(self, body, says, tmp_path):
        with answering(body) as url:
            said = refusal("--service", url, "--format", "lora", "--out", tmp_path / "a" / "out")
        assert says in said
        assert contents(tmp_path) == {}

    def test_an_absolute_path_is_refused(self, tmp_path):
        with answering(zipped(**{INDEX: index(), str(tmp_path / "evil"): "x"})) as url:
            assert "evil" in refusal("--service", url, "--format", "lora", "--out", tmp_path / "out")
        assert contents(tmp_path) == {}

    def test_a_download_that_breaks_off_is_refused(self, tmp_path):
        body = zipped(**{INDEX: index()})
        with answering(body, len(body) + 1) as url:
            refusal("--service", url, "--format", "lora", "--out", tmp_path / "out")
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("url", ["http://127.0.0.1:1", "localhost:8000", "http://[", ""])
    def test_nobody_there_is_said(self, url, tmp_path):
        assert "mend-service" in refusal("--service", url, "--format", "lora", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestFolder:
    def test_that_is_not_empty_is_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        with answering(zipped(**{INDEX: index()})) as url:
            said = refusal("--service", url, "--format", "lora", "--out", tmp_path)
        assert "--force" in said
        assert contents(tmp_path) == {"mine": b"mine"}

    def test_that_is_a_file_is_left_alone(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with answering(zipped(**{INDEX: index()})) as url:
            assert str(tmp_path / "file") in refusal(
                "--service", url, "--format", "lora", "--out", tmp_path / "file", "--force"
            )
        assert contents(tmp_path) == {"file": b"mine"}

    def test_with_force_loses_an_earlier_export_and_nothing_else(self, tmp_path):
        (tmp_path / "mine").write_text("mine")
        outside = tmp_path.with_name("outside")
        outside.write_text("mine too")
        first = {"adapter": "a", "deep/old": "b", INDEX: index("adapter", "deep/old", "../outside", "gone")}
        second = {"model": "c", "deep/new": "d", INDEX: index("model", "deep/new")}
        for files in (first, second):
            with answering(zipped(**files)) as url:
                assert mend("--service", url, "--format", "lora", "--out", tmp_path, "--force").returncode == 0
        assert contents(tmp_path) == {"mine": b"mine", **{name: text.encode() for name, text in second.items()}}
        assert outside.read_text() == "mine too"

    def test_with_force_keeps_an_earlier_export_when_the_new_one_fails(self, tmp_path):
        files = {"adapter": "a", INDEX: index("adapter")}
        with answering(zipped(**files)) as url:
            assert mend("--service", url, "--format", "lora", "--out", tmp_path).returncode == 0
        before = contents(tmp_path)
        refusal("--service", "http://127.0.0.1:1", "--format", "lora", "--out", tmp_path, "--force")
        assert contents(tmp_path) == before

    def test_that_cannot_be_made_is_said(self, tmp_path):
        (tmp_path / "file").touch()
        with answering(zipped(**{INDEX: index()})) as url:
            said = refusal("--service", url, "--format", "lora", "--out", tmp_path / "file" / "out")
        assert str(tmp_path / "file" / "out") in said


def test_a_warning_of_the_rank_is_told(tmp_path):
    with answering(zipped(**{INDEX: index(rank=600, ranks={"layer": 600}, warning="rank 600 is too much")})) as url:
        ended = mend("--service", url, "--format", "lora", "--out", tmp_path)
    assert "mend: warning: rank 600 is too much" in ended.stderr


def test_an_unknown_format_is_a_mistake_of_use(tmp_path):
    ended = mend("--format", "gguf", "--out", tmp_path)
    assert ended.returncode == 2
    assert "gguf" in ended.stderr
