"""An encoder-decoder and a classifier, served from folders over real HTTP, with an editor of their own or without."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.server import serving
from tests.service_fixtures import save_base, save_editor

PROMPT = "The capital of France is"


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("family", "kind", "answers"),
    [("t5", "encoder-decoder", ("a", "of", "in", "3", "x")), ("bert", "classifier", ("REFUTES", "SUPPORTS"))],
)
def test_is_corrected_and_taken_back(
    tmp_path: Path, family: str, kind: str, answers: tuple[str, ...], trained: bool
) -> None:
    editor = save_editor(tmp_path / "editor", save_base(tmp_path / "model", family))
    settings = {"MEND_BASE_MODEL": str(tmp_path / "model"), "MEND_GUARD_BUDGET": "1", "MEND_ANSWER_TOKENS": "4"}
    if trained:
        settings["MEND_EDITOR"] = str(editor)
    with serving(tmp_path / "data", tmp_path / "log", **settings) as server:
        pristine = server.get("/model")
        assert pristine["base_model"]["kind"] == kind
        assert pristine["editor"]["trained"] is trained
        if not trained:
            assert pristine["editor"]["name"] == "training-free"
            assert pristine["editor"]["notice"] in (tmp_path / "log").read_text()
        asked = server.get("/generate", prompt=PROMPT, max_new_tokens=4)["text"]
        made = [server.client.post("/edits", json={"prompt": PROMPT, "correction": answer}) for answer in answers]
        assert {answer.status_code for answer in made} <= {200, 201, 422}
        edits = [answer.json() for answer in made if answer.status_code == 201]
        assert edits
        assert server.get("/generate", prompt=PROMPT, max_new_tokens=4)["text"] == edits[-1]["after"]["text"] != asked
        for edit in edits:
            assert edit["checks"]["took"] is True
            assert server.client.delete(f"/edits/{edit['id']}").status_code == 200
        assert server.get("/model")["digest"] == pristine["digest"]
        assert server.get("/generate", prompt=PROMPT, max_new_tokens=4)["text"] == asked
