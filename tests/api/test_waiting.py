"""What a client is told that does not wait to the end, or asks twice at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from service.engine.turns import MAX_WAITING
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of, wait_until

KEY = {"Idempotency-Key": "asked"}


@contextmanager
def busy(client):
    """While another change, which takes long, is under way."""
    with engine_of(client)._turns.taken():
        yield


class TestInFlight:
    def test_the_same_request_is_told_to_ask_again_and_then_the_outcome(self, fresh, bodies):
        with ThreadPoolExecutor(1) as pool:
            with busy(fresh):
                first = pool.submit(fresh.post, "/edits", json=bodies[0], headers=KEY)
                wait_until(lambda: engine_of(fresh)._turns._keys)
                answer = fresh.post("/edits", json=bodies[0], headers=KEY)
                assert_problem(answer, "request_in_flight")
                assert int(answer.headers["retry-after"]) > 0
                other = fresh.post("/edits", json=bodies[1], headers=KEY)
                assert_problem(other, "idempotency_key_reused")
                assert_problem(fresh.delete("/edits/x", headers=KEY), "idempotency_key_reused")
            made = first.result()
        assert made.status_code == 201
        assert fresh.post("/edits", json=bodies[0], headers=KEY).content == made.content
        assert fresh.get("/revision").json()["revision"] == 1

    def test_a_refused_request_frees_its_key(self, fresh, bodies):
        refused = {**bodies[0], "correction": " ~{|}~ Zq~"}
        for _ in range(2):
            assert_problem(fresh.post("/edits", json=refused, headers=KEY), "did_not_take")


class TestWait:
    def test_that_is_long_enough_changes_nothing_of_the_answer(self, fresh, bodies):
        waited = fresh.post("/edits?wait=60", json=bodies[0], headers=KEY)
        assert waited.status_code == 201
        assert waited.headers["location"] == f"/edits/{waited.json()['id']}"
        for path in ("/edits?wait=60", "/edits"):
            again = fresh.post(path, json=bodies[0], headers=KEY)
            assert (again.status_code, again.content) == (201, waited.content)

    @pytest.mark.parametrize("batch", [False, True])
    def test_that_is_too_short_is_pending_until_the_same_request_asks_again(self, fresh, bodies, batch):
        path, body = ("/edits/batch", {"edits": list(bodies)}) if batch else ("/edits", bodies[0])

        def ask(wait_s: float):
            return fresh.post(path, params={"wait": wait_s}, json=body, headers=KEY)

        with busy_elsewhere(fresh):
            for _ in range(2):
                pending = ask(0.05)
                assert (pending.status_code, pending.json()["status"]) == (202, "pending")
                assert int(pending.headers["retry-after"]) > 0
            other = fresh.post(path, params={"wait": 0}, json={**body, "edits": [bodies[0]]} if batch else bodies[1],
                               headers=KEY)  # fmt: skip
            assert_problem(other, "idempotency_key_reused")
        made = ask(60)
        assert made.status_code == 201
        assert ask(60).content == made.content
        assert fresh.get("/revision").json()["revision"] == (len(bodies) if batch else 1)

    def test_tells_why_it_was_refused(self, fresh, bodies):
        refused = {**bodies[0], "correction": " ~{|}~ Zq~"}
        with busy_elsewhere(fresh):
            assert fresh.post("/edits?wait=0", json=refused, headers=KEY).status_code == 202
        assert_problem(fresh.post("/edits?wait=60", json=refused, headers=KEY), "did_not_take")

    def test_tells_what_was_made_since_rather_than_why_it_was_refused_before(self, fresh, bodies):
        fresh.put("/kill-switch")
        with busy_elsewhere(fresh):
            assert fresh.post("/edits?wait=0", json=bodies[0], headers=KEY).status_code == 202
        wait_until(lambda: not engine_of(fresh)._turns._keys)
        fresh.delete("/kill-switch")
        made = fresh.post("/edits?wait=60", json=bodies[0], headers=KEY)
        assert made.status_code == 201
        assert fresh.post("/edits", json=bodies[0], headers=KEY).content == made.content

    def test_of_too_many_is_refused_and_each_can_be_asked_again(self, fresh, bodies):
        def ask(number: int, wait_s: float):
            return fresh.post(f"/edits?wait={wait_s}", json=bodies[0], headers={"Idempotency-Key": f"key-{number}"})

        with busy_elsewhere(fresh):
            told = [ask(number, 0) for number in range(MAX_WAITING + 2)]
            assert [answer.status_code for answer in told[:MAX_WAITING]] == [202] * MAX_WAITING
            for answer in told[MAX_WAITING:]:
                assert_problem(answer, "busy")
        assert {ask(number, 60).status_code for number in range(MAX_WAITING + 2)} == {200, 201}

    @pytest.mark.parametrize("wait", ["-1", "601", "long", "nan"])
    def test_of_no_sensible_time_is_refused(self, client, bodies, wait):
        assert_problem(client.post(f"/edits?wait={wait}", json=bodies[0], headers=KEY), "invalid_request")

    def test_needs_a_key_to_ask_again_by(self, client, bodies):
        told = assert_problem(client.post("/edits?wait=1", json=bodies[0]), "invalid_request")
        assert "Idempotency-Key" in told["detail"]

    def test_is_not_for_what_tells_of_its_progress(self, client, bodies):
        headers = {**KEY, "content-type": "application/x-ndjson"}
        answer = client.post("/edits/batch?wait=1", content='{"prompt": "a", "correction": "b"}', headers=headers)
        assert_problem(answer, "invalid_request")


@contextmanager
def busy_elsewhere(client):
    """The same, held by another thread than the one that asks."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with busy(client):
            held.set()
            done.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        held.wait()
        try:
            yield
        finally:
            done.set()
