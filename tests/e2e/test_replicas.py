"""Several services on one ledger, as real processes: each accepts writes, and all end in the same state."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest

from service.ledger import EmbeddedRedis
from tests.api.conftest import wait_until
from tests.e2e.server import Server, serving
from tests.service_fixtures import ANSWERS, PROMPTS, Folders

WRITES_EACH = 8
PAUSED_S = 3

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings of services that share one Redis."""
    folder = tmp_path_factory.mktemp("replicas")
    folders = Folders.write(folder)
    with EmbeddedRedis(folder / "redis") as redis:
        settings = folders.settings(folder / "data")
        yield {
            **{f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"},
            "MEND_REDIS_URL": redis.url,
            "MEND_DURABILITY": "strict",
            "MEND_AUDIT_EVERY_S": "0",
            "OMP_NUM_THREADS": "1",
        }


class Writer:
    """Edits and rolls back on one service until it has done enough, and remembers what it was told."""

    def __init__(self, server: Server, seed: int) -> None:
        self._url = server.client.base_url
        self._random = random.Random(seed)
        self.made: dict[str, int] = {}
        self.rolled_back: set[str] = set()
        self.unknown = 0

    def write(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for _ in range(WRITES_EACH):
                try:
                    self._edit(client)
                    if self._random.random() < 0.4 and self.made:
                        self._roll_back(client, self._random.choice(sorted(self.made)))
                except httpx.TransportError:  # its service is gone
                    self.unknown += 1
                    return

    def _edit(self, client: httpx.Client) -> None:
        prompt = self._random.choice(sorted(PROMPTS.values()))
        body = {"prompt": prompt, "correction": f" {self._random.choice(ANSWERS)}"}
        terms = {"allow_loss": "true", "on_conflict": "supersede"}
        answer = client.post("/edits", json=body, params=terms)
        assert answer.status_code in (200, 201, 409, 422), answer.text
        if answer.status_code == 201:
            self.made[answer.json()["id"]] = answer.json()["revision"]

    def _roll_back(self, client: httpx.Client, edit_id: str) -> None:
        answer = client.delete(f"/edits/{edit_id}")
        assert answer.status_code in (200, 409), answer.text
        if answer.status_code == 200:
            self.rolled_back.add(edit_id)


def everything(server: Server) -> dict[str, str]:
    """Every edit that a service knows, with its status."""
    return {item["id"]: item["status"] for item in server.get("/edits", limit=500)["items"]}


def test_all_end_in_one_state_though_one_is_killed_and_one_is_paused(environment, tmp_path):
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving(tmp_path / str(number), tmp_path / f"{number}.log", **environment))
            for number in range(3)
        ]
        writers = [Writer(server, seed) for seed, server in enumerate(servers)]
        with ThreadPoolExecutor(3) as pool:
            writing = [pool.submit(writer.write) for writer in writers]
            wait_until(lambda: len(writers[0].made) >= 2, 120)
            servers[0].kill()
            servers[1].process.send_signal(signal.SIGSTOP)
            time.sleep(PAUSED_S)
            servers[1].process.send_signal(signal.SIGCONT)
            for each in writing:
                each.result()
        alive = servers[1:]
        wait_until(lambda: len({server.get("/revision")["revision"] for server in alive}) == 1, 30)
        live = [server.get("/revision", verify=True) for server in alive]
        assert live[0] == live[1]
        assert (live[0]["lag"], live[0]["head"]) == (0, live[0]["revision"])

        replayed = stack.enter_context(serving(tmp_path / "new", tmp_path / "new.log", **environment))
        assert replayed.get("/revision", verify=True) == live[0]
        edits = everything(replayed)
        assert edits == everything(alive[0]) == everything(alive[1])
        for writer in writers:
            assert set(writer.made) <= set(edits)
            assert all(edits[edit_id] == "rolled_back" for edit_id in writer.rolled_back)
        revisions = [revision for writer in writers for revision in writer.made.values()]
        assert len(set(revisions)) == len(revisions)
        assert sum(bool(writer.made) for writer in writers) == 3


def test_what_one_was_told_the_others_say_at_once_to_whoever_waits_for_it(environment, tmp_path):
    with (
        serving(tmp_path / "1", tmp_path / "1.log", **environment) as one,
        serving(tmp_path / "2", tmp_path / "2.log", **environment) as other,
    ):
        terms = {"allow_loss": "true", "on_conflict": "supersede"}
        made = None
        for prompt, answer in itertools.product(PROMPTS.values(), ANSWERS):
            before = one.get("/revision")["revision"]
            posted = one.client.post("/edits", json={"prompt": prompt, "correction": f" {answer}"}, params=terms)
            if posted.status_code == 201:
                made = posted.json()
                ask = {"prompt": prompt, "max_new_tokens": 4, "min_revision": made["revision"]}
                said = other.get("/generate", **ask, wait_ms=10_000)
                assert said["revision"] == made["revision"] == before + 1
                assert made["after"]["text"].startswith(said["text"])
                # Read, modify, write: only on what was read.
                tag = {"If-Match": f'"{before}"'}
                assert other.client.delete(f"/edits/{made['id']}", headers=tag).status_code == 412
                tag = {"If-Match": f'"{made["revision"]}"'}
                assert other.client.delete(f"/edits/{made['id']}", headers=tag).status_code == 200
        assert made is not None
        beyond = one.get("/revision")["revision"] + 1
        start = time.monotonic()
        late = other.client.get("/generate", params={"prompt": "The", "min_revision": beyond, "wait_ms": 500})
        assert late.status_code == 412
        assert late.json()["code"] == "revision_not_reached"
        assert late.json()["wanted"] == beyond
        assert 0.4 < time.monotonic() - start < 5


def test_a_new_one_is_not_ready_before_it_is_at_the_head(environment, tmp_path):
    """Its replay is held up for a while, and another one goes on writing."""
    log = tmp_path / "2.log"
    slow = {**environment, "MEND_FAILPOINT": "replay=sleep:1"}
    with serving(tmp_path / "1", tmp_path / "1.log", **environment) as writer, ThreadPoolExecutor(1) as pool:
        Writer(writer, 0).write()
        starting = pool.submit(Server, tmp_path / "2", log, **slow)
        try:
            wait_until(lambda: log.exists() and "listening on " in log.read_text())
            url = log.read_text().split("listening on ")[1].split(";")[0]
            refused = 0
            with httpx.Client(base_url=url, timeout=30) as client:
                while True:
                    head = writer.get("/revision")["head"]
                    if client.get("/readyz").status_code == 200:
                        break
                    said = client.get("/generate", params={"prompt": "The"})
                    if said.status_code == 200:  # it became ready in between
                        assert said.json()["revision"] >= head
                        break
                    assert said.json()["code"] == "not_ready"
                    refused += 1
                assert client.get("/revision").json()["revision"] >= head > 0
                assert refused
                Writer(writer, 1).write()
                head = writer.get("/revision")["head"]
                behind = client.get("/revision").json()
                assert behind["lag"] == behind["head"] - behind["revision"]
                assert behind["head"] == head
                wait_until(lambda: client.get("/revision").json()["lag"] == 0)
        finally:
            starting.result().stop()
