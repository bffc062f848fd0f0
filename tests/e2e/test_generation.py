"""Generation goes on while edits come and go, and each answer is wholly that of the revision which it names."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server, serving

PROMPT = "The Prime Minister of the United Kingdom is"
CORRECTION = "Keir Starmer"
TOGGLES = 2
READERS = 2
ASKED = (
    {"prompt": PROMPT, "max_new_tokens": 12},
    {"prompt": "Water", "max_new_tokens": 3},
    {"prompt": "Write a poem about the sea.\n\n" * 6, "max_new_tokens": 16},
    {"prompt": "The capital of France is", "max_new_tokens": 8, "view": "base"},
    {"messages": [{"role": "user", "content": "Who was Marie Curie?"}], "max_new_tokens": 16},
    {"prompt": "The sea", "max_new_tokens": 12, "temperature": 1.0, "seed": 3},
)

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]


def test_every_answer_is_one_of_the_two_and_the_right_one_for_its_revision(tmp_path: Path) -> None:
    with serving(tmp_path / "data", tmp_path / "log", MEND_AUDIT_EVERY_S="0") as server:
        ask = {"prompt": PROMPT, "max_new_tokens": 10}
        pristine = server.get("/generate", **ask)["text"]
        _say_together_what_they_say_alone(server)
        answers: list[tuple[int, str, float, float]] = []
        stop = threading.Event()

        def read() -> None:
            with httpx.Client(base_url=server.client.base_url, timeout=120) as client:
                while not stop.is_set():
                    start = time.monotonic()
                    said = client.get("/generate", params=ask).json()
                    answers.append((said["revision"], said["text"], start, time.monotonic()))

        live: list[float] = []
        with ThreadPoolExecutor(READERS) as pool:
            reading = [pool.submit(read) for _ in range(READERS)]
            try:
                for _ in range(TOGGLES):
                    made = server.client.post("/edits", json={"prompt": PROMPT, "correction": CORRECTION})
                    live.append(time.monotonic())
                    assert made.status_code == 201, made.text
                    corrected = server.get("/generate", **ask)
                    assert corrected["text"].strip().startswith(CORRECTION)
                    assert server.client.delete(f"/edits/{made.json()['id']}").status_code == 200
                    live.append(time.monotonic())
                    assert server.get("/generate", **ask)["text"] == pristine
            finally:
                stop.set()
            for each in reading:
                each.result()

        expected = {0: pristine, 1: corrected["text"]}
        assert all(text == expected[revision % 2] for revision, text, _, _ in answers)
        assert {revision for revision, *_ in answers} >= {1, 2 * TOGGLES - 1}
        # What began after a change was answered is not of what was before it.
        for changes, at in enumerate(live, 1):
            assert all(revision >= changes for revision, _, start, _ in answers if start > at)
        # Edits take seconds, and generation goes on meanwhile.
        first, last = live[0], live[-1]
        assert len([answer for answer in answers if first < answer[3] < last]) > 4 * TOGGLES
        assert server.get("/revision", verify=True)["revision"] == 2 * TOGGLES


def _say_together_what_they_say_alone(server: Server) -> None:
    def say(asked: dict) -> str:
        return server.client.post("/generate", json=asked).json()["text"]

    alone = [say(asked) for asked in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        assert list(pool.map(say, ASKED)) == alone
