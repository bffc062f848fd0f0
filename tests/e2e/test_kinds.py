"""An encoder-decoder and a classifier, served from folders over real HTTP, with an editor of their own or without."""

from __future__ import annotations

import html
from pathlib import Path

import pytest

from tests.e2e.server import Server, serving
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
        pages(server, edits[-1])
        for edit in edits:
            assert edit["checks"]["took"] is True
            assert server.client.delete(f"/edits/{edit['id']}").status_code == 200
        assert server.get("/model")["digest"] == pristine["digest"]
        assert server.get("/generate", prompt=PROMPT, max_new_tokens=4)["text"] == asked


def pages(server: Server, edit: dict) -> None:
    """The dashboard shows a model of any family."""
    form = {"prompt": PROMPT, "correction": edit["correction"]}
    for page, shown in (
        (server.client.get("/"), edit["correction"]),
        (server.client.get(f"/ui/edits/{edit['id']}"), edit["correction"]),
        (server.client.get("/ui/health"), "Drawdown"),
        (server.client.post("/ui/new", data={**form, "action": "preview"}), edit["correction"]),
        (server.client.post("/ui/playground", data={"prompt": PROMPT, "max_new_tokens": "4"}), edit["after"]["text"]),
    ):
        assert page.status_code == 200, page.text
        assert html.escape(shown, quote=False).strip() in page.text
