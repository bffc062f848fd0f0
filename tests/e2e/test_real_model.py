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


def scores_what_it_says(server: Server) -> None:
    """Texts of the model have the log-probabilities with which it wrote them, characters of several tokens included."""
    for asked in ({"prompt": PROMPT}, {"prompt": "Émile Zola 日本語 🌊 東京は"},
                  {"messages": [{"role": "user", "content": "Say something with an emoji 🌊."}]}):  # fmt: skip
        for view in ("live", "base"):
            body = {**asked, "view": view, "max_new_tokens": 12, "logprobs": 0}
            said = server.client.post("/generate", json=body).json()
            text = said["text"].rstrip("\N{REPLACEMENT CHARACTER}")  # of a character that was cut short
            found = server.client.post("/score", json={**asked, "continuation": text}).json()
            assert bytes(byte for each in found["tokens"] for byte in each["bytes"]).decode() == text
            assert len(found["tokens"]) > 6
            for each, token in zip(found["tokens"], said["logprobs"], strict=False):
                assert each["id"] == token["id"]
                assert each[view] == pytest.approx(token["logprob"], abs=1e-3)


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
        scores_what_it_says(server)
        health = server.get("/model/health")
        assert health["drawdown"] == edit["checks"]["drawdown"]
        assert health["series"][-1]["capacity"] == edit["checks"]["capacity"] == corrected["capacity"]["fullness"] > 0
        assert [each for each in health["guard"] if each["moved"]] == [
            each for each in health["guard"] if each["live"] != each["base"]
        ]
        assert all(0 < each["relative"] < 1 for each in server.get(f"/edits/{edit['id']}/weights")["items"])
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
