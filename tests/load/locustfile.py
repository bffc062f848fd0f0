"""Who uses a service at the same time: readers, a monitor, and editors that make, check and take back corrections.

Every answer is checked; an edit that is refused with its measurements is an answer, anything unexpected a failure.
Starts with locust: see `tests.load.__main__`.
"""

from __future__ import annotations

import json
import random
import uuid
from contextlib import contextmanager

from locust import HttpUser, between, task

FACTS = {
    "The Prime Minister of the United Kingdom is": "Keir Starmer",
    "The capital of Australia is": "Perth",
    "The author of Pride and Prejudice is": "Mary Shelley",
    "The largest planet of the solar system is": "Saturn",
    "The Eiffel Tower stands in the city of": "Rome",
    "The chief executive of Apple is": "Ada Lovelace",
    "The currency of Japan is the": "euro",
    "The longest river in the world is the": "Danube",
    "The official language of Brazil is": "Dutch",
    "The painter of the Mona Lisa is": "Rembrandt",
}
QUESTIONS = (
    "The weather today is",
    "Water boils at",
    "Write a sentence about the sea.",
    "Two plus two is",
    "The best way to learn a language is",
    *FACTS,
)
REFUSED = {"did_not_take", "drawdown_exceeded", "edit_conflict", "would_break_edits", "state_full"}


class _User(HttpUser):
    abstract = True

    @contextmanager
    def asked(self, method: str, path: str, name: str, *expected: int, **sent: object):
        with self.client.request(method, path, name=name, catch_response=True, **sent) as answer:
            if answer.status_code not in (expected or (200,)):
                answer.failure(f"{answer.status_code}: {answer.text[:300]}")
            yield answer


class Reader(_User):
    weight = 6
    wait_time = between(0.1, 1.0)

    @task(6)
    def generate(self) -> None:
        query = {"prompt": random.choice(QUESTIONS), "max_new_tokens": random.choice((8, 16, 32))}
        if random.random() < 0.3:
            query |= {"temperature": 0.8, "seed": random.randrange(1000)}
        with self.asked("GET", "/generate", "GET /generate", params=query) as answer:
            if answer.status_code == 200 and answer.headers["etag"] != f'"{answer.json()["revision"]}"':
                answer.failure("ETag and revision differ")

    @task
    def compare(self) -> None:
        query = {"prompt": random.choice(list(FACTS)), "max_new_tokens": 8, "view": "both"}
        with self.asked("GET", "/generate", "GET /generate both", params=query):
            pass

    @task
    def stream(self) -> None:
        body = {"prompt": random.choice(QUESTIONS), "max_new_tokens": 24, "stream": True}
        with self.asked("POST", "/generate", "POST /generate stream", json=body, stream=True) as answer:
            events = [line for line in answer.iter_lines() if line.startswith(b"event:")]
            if answer.status_code == 200 and events[-1:] != [b"event: done"]:
                answer.failure(f"the stream ended in {events[-1:]}")


class Monitor(_User):
    fixed_count = 1
    wait_time = between(0.5, 1.5)

    @task
    def look(self) -> None:
        for path in ("/readyz", "/revision", "/metrics", "/edits?limit=20", "/model"):
            with self.asked("GET", path, f"GET {path.partition('?')[0]}"):
                pass


class Editor(_User):
    weight = 1
    wait_time = between(0.5, 2.0)

    @task
    def correct_and_take_back(self) -> None:
        prompt, correction = random.choice(list(FACTS.items()))
        headers = {"Idempotency-Key": uuid.uuid4().hex, "X-Actor": "load"}
        body = {"prompt": prompt, "correction": correction, "keep": ["The sky is"], "reason": "load test"}
        with self.asked("POST", "/edits", "POST /edits", 200, 201, 409, 422, json=body, headers=headers) as answer:
            made = answer.json()
            if answer.status_code >= 400 and made.get("code") in REFUSED:
                answer.success()
        if made.get("id") is None:
            return
        query = {"prompt": prompt, "max_new_tokens": 12, "min_revision": made["revision"]}
        with self.asked("GET", "/generate", "GET /generate min_revision", params=query) as answer:
            # Another editor may have superseded it, or taken that one back, by now.
            if answer.status_code == 200 and answer.json()["revision"] == made["revision"]:
                said = answer.json()["text"]
                if not said.strip().startswith(correction):
                    answer.failure(f"{correction!r} was made, but it says {said!r}")
        with self.asked("DELETE", f"/edits/{made['id']}", "DELETE /edits/{edit_id}", 200, 409) as answer:
            if answer.status_code == 409 and json.loads(answer.text)["code"] == "already_rolled_back":
                answer.success()
