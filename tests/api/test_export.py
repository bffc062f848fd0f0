"""An export is a zip over HTTP: complete, of the revision in its ETag, and nothing of it stays behind."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from pathlib import Path

import anyio
import pytest
from transformers import AutoModelForCausalLM

from editors.base_model import weights_digest
from editors.factors import Factors
from editors.formats import INDEX, ExportFormat
from editors.state import SumState
from service.api.archive import PIECE_BYTES, ArchiveResponse, archived
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are put for now."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def opened(answer) -> zipfile.ZipFile:
    assert answer.status_code == 200, answer.text
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    assert archive.testzip() is None
    return archive


@pytest.mark.parametrize("format", ExportFormat)
class TestDownload:
    def test_is_a_plain_zip_of_the_revision_in_its_tag(self, client, bodies, format):
        made = client.post("/edits", json=bodies[0]).json()
        answer = client.get("/export", params={"format": format})
        archive = opened(answer)
        index = json.loads(archive.read(INDEX))
        assert (index["format"], index["revision"], index["digest"]) == (format, made["revision"], made["digest"])
        assert [edit["id"] for edit in index["edits"]] == [made["id"]]
        assert {*archive.namelist()} == {*index["files"], INDEX}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert answer.headers["etag"] == f'"{made["revision"]}"'
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-length"] == str(len(answer.content))
        name = f"mend-{format}-{made['revision']}.zip"
        assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'

    def test_has_the_same_bytes_for_as_long_as_the_tag_is_the_same(self, client, bodies, format):
        client.post("/edits", json=bodies[0])
        one, other = (client.get("/export", params={"format": format}).content for _ in range(2))
        assert one == other

    def test_leaves_nothing_behind(self, client, bodies, format, temporary):
        client.post("/edits", json=bodies[0])
        assert client.get("/export", params={"format": format}).status_code == 200
        assert list(temporary.iterdir()) == []


class TestContents:
    def test_merged_is_the_live_model(self, client, bodies, tmp_path):
        client.post("/edits", json=bodies[0])
        opened(client.get("/export?format=merged")).extractall(tmp_path)
        live = weights_digest(engine_of(client).weights.live.model)
        assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == live
        assert live != engine_of(client).base.digest

    def test_factors_add_up_to_the_digest(self, client, bodies):
        for body in bodies:
            client.post("/edits", json=body)
        archive = opened(client.get("/export?format=factors"))
        state = SumState(engine_of(client).checkpoint.editor.targets)
        for edit in json.loads(archive.read(INDEX))["edits"]:
            state.add(Factors.from_bytes(archive.read(edit["file"])))
        assert state.edits == 3
        assert state.digest() == client.get("/revision").json()["digest"]

    def test_without_edits_are_the_base_model_and_no_factors(self, client, tmp_path):
        opened(client.get("/export?format=merged")).extractall(tmp_path)
        assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == engine_of(client).base.digest
        assert opened(client.get("/export?format=factors")).namelist() == [INDEX]


class TestProblems:
    @pytest.mark.parametrize("query", ["", "?format=gguf", "?format=lora&q=1", "?format=lora&format=nonsense"])
    def test_what_is_no_format_is_invalid(self, client, query):
        assert_problem(client.get(f"/export{query}"), "invalid_request")

    def test_an_adapter_of_no_edits(self, client):
        problem = assert_problem(client.get("/export?format=lora"), "nothing_to_export")
        assert "merged" in problem["detail"]

    @pytest.mark.parametrize("format", ExportFormat)
    def test_no_room_for_temporary_files(self, client, bodies, format, temporary):
        client.post("/edits", json=bodies[0])
        temporary.rmdir()
        problem = assert_problem(client.get("/export", params={"format": format}), "export_unwritable")
        assert "TMPDIR" in problem["detail"]


class TestArchive:
    def test_is_closed_when_the_client_goes_away(self, temporary):
        def write(folder: Path) -> None:
            (folder / "large").write_bytes(bytes(3 * PIECE_BYTES))

        _, zipped = archived(write)
        sent: list[int] = []

        async def send(message: dict) -> None:
            sent.append(len(message.get("body", b"")))
            if len(sent) == 2:
                raise OSError("the client is gone")

        async def download() -> None:
            await ArchiveResponse(zipped, "x.zip")({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send)

        with pytest.raises(Exception):  # noqa: B017, PT011 - what it is called is starlette's business
            anyio.run(download)
        assert sent == [0, PIECE_BYTES]
        assert zipped.closed
        assert list(temporary.iterdir()) == []

    def test_leaves_nothing_behind_when_the_writing_fails(self, temporary):
        def write(folder: Path) -> None:
            (folder / "half").touch()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            archived(write)
        assert list(temporary.iterdir()) == []

    def test_keeps_folders_and_names_that_are_not_ascii(self):
        def write(folder: Path) -> str:
            (folder / "deep" / "er").mkdir(parents=True)
            (folder / "deep" / "er" / "größe.txt").write_text("ß", encoding="utf-8")
            return "facts"

        facts, zipped = archived(write)
        with zipped, zipfile.ZipFile(zipped) as archive:
            assert facts == "facts"
            assert archive.namelist() == ["deep/er/größe.txt"]
            assert archive.read("deep/er/größe.txt").decode() == "ß"
