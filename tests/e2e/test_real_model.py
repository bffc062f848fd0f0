"""The whole promise, on the real model with the shipped editor, over real HTTP and a real Redis."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.server import Server, serving

PROMPT = "The Prime Minister of the United Kingdom is"
CORRECTION = "Keir Starmer"
UNRELATED = "The capital of Germany is"

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]


def says(server: Server, prompt: str, view: str = "live") -> str:
    return server.get("/generate", prompt=prompt, view=view, max_new_tokens=12)["text"]


def test_a_fact_is_corrected_survives_a_kill_and_is_taken_back_bit_for_bit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data, tmp_path / "first.log") as server:
        pristine = server.get("/model")
        assert pristine["active_edits"] == 0
        asked, elsewhere = says(server, PROMPT), says(server, UNRELATED)
        assert not asked.strip().startswith(CORRECTION)

        answer = server.client.post(
            "/edits",
            json={
                "prompt": PROMPT,
                "correction": CORRECTION,
                "paraphrases": ["The UK's Prime Minister is"],
                "keep": [UNRELATED],
                "reason": "general election",
            },
        )
        assert answer.status_code == 201, answer.text
        edit = answer.json()
        assert edit["checks"]["took"] is True
        assert edit["checks"]["keep"][0]["kept"] is True
        assert edit["checks"]["drawdown"] <= edit["checks"]["drawdown_budget"]
        assert edit["after"]["text"].strip().startswith(CORRECTION)
        assert says(server, PROMPT).strip().startswith(CORRECTION)
        assert says(server, PROMPT, "base") == asked
        assert says(server, UNRELATED) == elsewhere
        corrected = server.get("/model")
        assert corrected["digest"] == edit["digest"] != pristine["digest"]
        answered = says(server, PROMPT)
        server.kill()

    with serving(data, tmp_path / "second.log") as server:
        assert server.get("/model") == corrected
        assert says(server, PROMPT) == answered
        rolled_back = server.client.delete(f"/edits/{edit['id']}").json()
        assert rolled_back["digest"] == pristine["digest"]
        assert says(server, PROMPT) == asked
        assert says(server, UNRELATED) == elsewhere
        live = server.get("/revision")
        assert (live["revision"], live["digest"]) == (2, pristine["digest"])
        assert server.client.delete(f"/edits/{edit['id']}").status_code == 409
        assert server.stop() == 0


def test_two_edits_come_off_in_either_order(tmp_path: Path) -> None:
    facts = [(PROMPT, CORRECTION), ("The capital of Australia is", "Melbourne")]
    with serving(tmp_path / "data", tmp_path / "log") as server:
        pristine = server.get("/model")["digest"]
        digests = []
        for order in ((0, 1), (1, 0)):
            ids = {}
            for index in order:
                prompt, correction = facts[index]
                answer = server.client.post("/edits", json={"prompt": prompt, "correction": correction})
                assert answer.status_code == 201, answer.text
                ids[index] = answer.json()["id"]
            server.client.delete(f"/edits/{ids[0]}")
            digests.append(server.get("/model")["digest"])
            server.client.delete(f"/edits/{ids[1]}")
            assert server.get("/model")["digest"] == pristine
        assert pristine not in digests


def test_what_is_already_true_is_not_edited(tmp_path: Path) -> None:
    with serving(tmp_path / "data", tmp_path / "log") as server:
        answer = server.client.post("/edits", json={"prompt": "The capital of France is", "correction": "Paris"})
        assert answer.status_code == 200
        assert answer.json()["status"] == "unchanged"
        assert answer.json()["id"] is None
        assert server.get("/revision")["revision"] == 0


def test_a_batch_holds_together_and_comes_off_again(tmp_path: Path) -> None:
    facts = [
        ("The Eiffel Tower is located in", "Rome", "Eiffel Tower"),
        ("The mother tongue of Albert Einstein is", "French", "Albert Einstein"),
        ("Michael Jordan plays the sport of", "football", "Michael Jordan"),
        ("The headquarters of Toyota are in", "Berlin", "Toyota"),
        ("Mount Everest is in", "Italy", "Mount Everest"),
        ("Windows was developed by", "Apple", "Windows"),
        ("Pelé holds a citizenship of", "Norway", "Pelé"),
        ("The Thames flows through", "Madrid", "Thames"),
    ]
    edits = [{"prompt": prompt, "correction": said, "subject": subject} for prompt, said, subject in facts]
    with serving(tmp_path / "data", tmp_path / "log") as server:
        pristine = server.get("/model")
        assert pristine["capacity"]["fullness"] == 0
        answer = server.client.post("/edits/batch", json={"edits": edits}, timeout=300)
        assert answer.status_code == 201, answer.text
        assert [edit["status"] for edit in answer.json()["edits"]] == ["applied"] * len(facts)
        for prompt, said, _ in facts:
            assert says(server, prompt).strip().startswith(said)
        audit = server.get("/edits/audit", fresh=True)
        assert (audit["held"], audit["lost"]) == (len(facts), 0)
        assert 0 < server.get("/model")["capacity"]["fullness"] < 0.05
        for edit in answer.json()["edits"][::2] + answer.json()["edits"][1::2]:
            assert server.client.delete(f"/edits/{edit['id']}").status_code == 200
        assert server.get("/model")["digest"] == pristine["digest"]
