"""Clients of the service, and the record of what they asked and what they were answered.

Flow: a client draws an Ask -> sends it, with an Idempotency-Key of its own -> Answer -> Record.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal, Self

import httpx

from tests.faults.processes import Service
from tests.service_fixtures import ANSWERS, PROMPTS

Kind = Literal["edit", "batch", "rollback", "supersede", "restore"]
Verdict = Literal["made", "unchanged", "refused", "unknown"]
TERMS = {"allow_loss": True, "on_conflict": "supersede"}
"""Under which most edits of a small model are made."""
LINES = "application/x-ndjson"
PATIENCE_S = 20.0
CLIENTS = 3
REFUSALS = {
    "already_rolled_back",
    "batch_refused",
    "did_not_take",
    "drawdown_exceeded",
    "duplicate_prompt",
    "edit_conflict",
    "revision_not_found",
    "revision_not_restorable",
    "state_full",
    "would_break_edits",
}
"""Codes of what these clients may be refused for."""


@dataclass(frozen=True)
class Answer:
    status: int
    body: dict[str, Any]

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """Of JSON Lines the last one decides, and holds nothing but what an answer in JSON has beside the edits."""
        if response.headers["Content-Type"] != LINES:
            return cls(response.status_code, response.json())
        *told, last = map(json.loads, response.text.splitlines())
        if "problem" in last:
            return cls(last["problem"]["status"], last["problem"])
        return cls(response.status_code, {**last["batch"], "edits": [line["edit"] for line in told if "edit" in line]})


@dataclass
class Ask:
    """A request, and every answer to it that settled its outcome.

    lines: a batch that is sent as JSON Lines, and so answered. unknown: what came instead of an answer, each time.
    """

    kind: Kind
    key: str
    method: str
    path: str
    query: dict[str, Any]
    body: dict[str, Any] | None = None
    lines: bool = False
    answers: list[Answer] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def send(self, http: httpx.Client, patience_s: float = PATIENCE_S) -> Answer | None:
        """Ask once, or once more. Returns the answer if it settles the outcome. Raises httpx.ConnectError."""
        headers, sent = {"Idempotency-Key": self.key}, {"json": self.body}
        if self.lines:
            headers["Content-Type"] = LINES
            sent = {"content": "\n".join(map(json.dumps, self.body["edits"]))}
        try:
            answer = Answer.of(
                http.request(self.method, self.path, params=self.query, headers=headers, timeout=patience_s, **sent)
            )
        except httpx.TransportError as error:
            self.unknown.append(type(error).__name__)
            if isinstance(error, httpx.ConnectError):
                raise
            return None
        if answer.status >= 500 or answer.body.get("code") == "request_in_flight":
            self.unknown.append(answer.body["code"])
            return None
        self.answers.append(answer)
        return answer

    @property
    def verdict(self) -> Verdict:
        if not self.answers:
            return "unknown"
        first = self.answers[0]
        if first.status >= 400:
            return "refused"
        made = first.body["status"] == "restored" if self.kind == "restore" else first.body["id"]
        return "made" if made else "unchanged"

    @property
    def entries(self) -> list[tuple[str, str | None]]:
        """What the ledger must hold of it: the kind of each entry, and the id of its edit if it is of one."""
        if self.kind == "restore" and self.answers and self.answers[0].status < 400:
            return [("restored", None)]  # of a request with a key, also where it changes nothing
        if self.verdict != "made":
            return []
        body = self.answers[0].body
        if self.kind == "rollback":
            return [("rolled_back", body["id"])]
        edits = body["edits"] if self.kind == "batch" else [body]
        return [("applied", edit["id"]) for edit in edits if edit["status"] == "applied"]

    @property
    def contradictions(self) -> list[Answer]:
        """Answers that are not what the first one said."""
        return [answer for answer in self.answers if answer != self.answers[0]]


class Record:
    """Everything that was asked, and every state that was seen live, by its revision. Threads share it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self.asks: list[Ask] = []
        self.seen: set[tuple[int, str]] = set()

    def draw(self, rng: Random, kind: Kind | None = None) -> Ask:
        """A request of this kind, or of any; a plain edit where there is nothing yet to roll back or supersede."""
        with self._mutex:
            standing = self._standing()
            kind = kind or rng.choices(["edit", "batch", "rollback", "supersede", "restore"], [5, 2, 2, 1, 1])[0]
            if kind in ("rollback", "supersede", "restore") and not standing:
                kind = "edit"
            key = f"{len(self.asks)}-{rng.getrandbits(64):016x}"
            if kind == "rollback":
                path = f"/edits/{rng.choice(list(standing))}"
                ask = Ask(kind, key, "DELETE", path, {"reason": key})
            elif kind == "restore":
                revision = rng.choice([0, *(revision for revision, _ in sorted(self.seen.copy()))])
                ask = Ask(kind, key, "POST", "/rollback", {}, {"revision": revision, "reason": key})
            elif kind == "batch":
                prompts = rng.sample(list(PROMPTS.values()), rng.randint(2, 4))
                edits = [_edit(prompt, rng.choice(ANSWERS), key) for prompt in prompts]
                query = {**TERMS, "partial": rng.random() < 0.7}
                ask = Ask(kind, key, "POST", "/edits/batch", query, {"edits": edits}, lines=rng.random() < 0.5)
            else:
                prompt, answer = rng.choice(list(PROMPTS.values())), rng.choice(ANSWERS)
                if kind == "supersede":
                    prompt, before = rng.choice(list(standing.values()))
                    answer = rng.choice([other for other in ANSWERS if other != before])
                ask = Ask(kind, key, "POST", "/edits", TERMS, _edit(prompt, answer, key))
            self.asks.append(ask)
            return ask

    def _standing(self) -> dict[str, tuple[str, str]]:
        """Prompt and answer of every edit that was made and that nobody asked to roll back, by its id."""
        asked = {ask.path.removeprefix("/edits/") for ask in self.asks if ask.kind == "rollback"}
        edits = {}
        for ask in self.asks:
            if ask.kind not in ("rollback", "restore") and ask.verdict == "made":
                body = ask.answers[0].body
                for edit in body["edits"] if ask.kind == "batch" else [body]:
                    if edit["status"] == "applied" and edit["id"] not in asked:
                        edits[edit["id"]] = edit["prompt"], edit["correction"].strip()
        return edits

    def of(self, verdict: Verdict) -> list[Ask]:
        return [ask for ask in self.asks if ask.verdict == verdict]

    @property
    def acknowledged_edits(self) -> int:
        return sum(kind == "applied" for ask in self.asks for kind, _ in ask.entries)

    @property
    def resolved(self) -> int:
        """Requests whose outcome was unknown and is known by now."""
        return sum(bool(ask.unknown) and ask.verdict != "unknown" for ask in self.asks)

    def write(self, path: Path, losses: Sequence[str]) -> None:
        """For whoever looks into losses."""
        told = {"losses": losses, "asks": [asdict(ask) for ask in self.asks], "seen": sorted(self.seen)}
        path.write_text(json.dumps(told, indent=1))

    def __str__(self) -> str:
        counted = Counter(f"{ask.kind} {ask.verdict}" for ask in self.asks)
        counted += Counter(why for ask in self.asks for why in ask.unknown)
        return ", ".join(f"{number} {what}" for what, number in sorted(counted.items()))


def _edit(prompt: str, answer: str, key: str) -> dict[str, Any]:
    return {"prompt": prompt, "correction": f" {answer}", "reason": key}


@contextmanager
def clients(
    record: Record, rng: Random, *services: Service, patience_s: Sequence[float] = (PATIENCE_S,)
) -> Iterator[None]:
    """Some that ask one thing after the other for as long as this is open, or until the services are gone, any of them
    at each time; and one for each service that watches what is live.

    patience_s: how long they wait for an answer before they hang up, drawn anew each time.
    """
    stop = threading.Event()
    own = [Random(rng.getrandbits(64)) for _ in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS + len(services)) as pool:
        working = [pool.submit(_work, services, record, each, stop, patience_s) for each in own]
        working += [pool.submit(_watch, service.http, record, stop) for service in services]
        try:
            yield
        finally:
            stop.set()
    for each in working:
        each.result()


def _work(
    services: Sequence[Service], record: Record, rng: Random, stop: threading.Event, patience_s: Sequence[float]
) -> None:
    alive = list(services)
    ask = None
    while alive and not stop.is_set():
        # What is unknown is asked again at once, or left to be asked again in the end.
        if ask is None or ask.verdict != "unknown" or rng.random() < 0.25:
            ask = record.draw(rng)
        service = rng.choice(alive)
        try:
            if ask.send(service.http, rng.choice(patience_s)) is None:
                time.sleep(rng.uniform(0.05, 0.4))
        except httpx.ConnectError:
            alive.remove(service)


def _watch(http: httpx.Client, record: Record, stop: threading.Event) -> None:
    while not stop.wait(0.01):
        try:
            live = http.get("/revision")
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            continue
        if live.status_code == 200:
            record.seen.add((live.json()["revision"], live.json()["digest"]))
