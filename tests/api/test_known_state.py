"""Which state is live here: told, waited for, proven, and given up when it is not the ledger's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from service.engine.turns import MAX_WAITING
from service.ledger import RedisLedger, digest_of
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of, wait_until
from tests.ledger.entries import stored_in
from tests.service_fixtures import namespace_of

SAY = {"prompt": "The capital of", "max_new_tokens": 4}


def metrics(client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


class TestRevision:
    def test_is_verified_against_the_weights_in_memory(self, client, bodies):
        empty = client.get("/revision", params={"verify": "true"}).json()
        made = client.post("/edits", json=bodies[0]).json()
        edited = client.get("/revision", params={"verify": "true"}).json()
        assert edited["revision"] == edited["head"] == made["revision"]
        assert edited["digest"] == made["digest"]
        assert edited["weights_digest"] != empty["weights_digest"]
        client.delete(f"/edits/{made['id']}")
        assert client.get("/revision?verify=true").json()["weights_digest"] == empty["weights_digest"]

    def test_of_weights_that_were_altered_in_memory_is_refused(self, fresh, bodies):
        fresh.post("/edits", json=bodies[0])
        live = engine_of(fresh).weights
        with torch.no_grad():
            live.live.model.get_parameter(live._own[0]).view(-1)[0] += 1
        assert fresh.get("/revision").status_code == 200
        problem = assert_problem(fresh.get("/revision?verify=true"), "ledger_diverged")
        assert "restart" in problem["detail"]
        wait_until(lambda: fresh.get("/readyz").status_code == 503)
        assert metrics(fresh)["mend_state_mismatches_total"] == 1
        for answer in (fresh.get("/generate", params=SAY), fresh.post("/edits", json=bodies[1])):
            assert "restart" in assert_problem(answer, "not_ready")["detail"]


class TestAnAnswerFromARevisionOrLater:
    def test_that_is_live_comes_at_once(self, client, bodies):
        made = client.post("/edits", json=bodies[0]).json()
        said = client.get("/generate", params={**SAY, "min_revision": made["revision"], "wait_ms": 0})
        assert said.json()["revision"] == made["revision"]
        assert client.post("/generate", json={**SAY, "min_revision": made["revision"]}).status_code == 200

    def test_that_is_not_yet_live_is_waited_for(self, client, bodies):
        head = client.get("/revision").json()["revision"]
        later = threading.Timer(0.5, lambda: client.post("/edits", json=bodies[0]))
        later.start()
        said = client.get("/generate", params={**SAY, "min_revision": head + 1, "wait_ms": 30_000})
        later.join()
        assert said.json()["revision"] == head + 1

    @pytest.mark.parametrize("view", ["live", "both", "base"])
    def test_that_does_not_come_is_refused(self, client, view):
        head = client.get("/revision").json()["revision"]
        answer = client.get("/generate", params={**SAY, "view": view, "min_revision": head + 1, "wait_ms": 50})
        problem = assert_problem(answer, "revision_not_reached")
        assert (problem["wanted"], problem["revision"]) == (head + 1, head)

    def test_that_too_many_wait_for_is_refused_and_nothing_else_is_held_up(self, client, bodies):
        head = client.get("/revision").json()["revision"]
        ask = {**SAY, "min_revision": head + 1, "wait_ms": 20_000}
        with ThreadPoolExecutor(2 * MAX_WAITING) as pool:
            asked = [pool.submit(client.get, "/generate", params=ask) for _ in range(2 * MAX_WAITING)]
            wait_until(lambda: sum(each.done() for each in asked) == MAX_WAITING)
            for each in asked:
                if each.done():
                    assert_problem(each.result(), "busy")
            assert client.get("/generate", params=SAY).status_code == 200
            assert client.post("/edits", json=bodies[0]).status_code == 201
            said = [each.result() for each in asked]
        assert [answer.json()["revision"] for answer in said if answer.status_code == 200] == [head + 1] * MAX_WAITING

    @pytest.mark.parametrize("wrong", [{"min_revision": -1}, {"min_revision": "x"}, {"wait_ms": 60_001}])
    def test_that_makes_no_sense_is_refused(self, client, wrong):
        assert_problem(client.get("/generate", params={**SAY, **wrong}), "invalid_request")


class TestMetrics:
    def test_tell_what_is_live(self, client, bodies):
        made = client.post("/edits", json=bodies[0]).json()
        told = metrics(client)
        assert told["mend_ready"] == 1
        assert told["mend_revision"] == told["mend_ledger_head"] == made["revision"]
        assert told["mend_replica_lag_entries"] == 0
        assert told["mend_active_edits"] == 1
        assert told["mend_durability_weaknesses"] == 0


def test_a_replica_whose_digest_differs_takes_itself_out(fresh, bodies):
    """Somebody appends an entry whose state is not the one that it leads to here."""
    fresh.post("/edits", json=bodies[0])
    engine = engine_of(fresh)
    published = engine.published
    url = fresh.app.state.service._embedded.url
    ledger = RedisLedger.connect(url, namespace_of(engine))
    entry, raw = stored_in(ledger)[-1]
    strange = {"sequence": entry.sequence + 1, "edit_id": "other", "state_digest": digest_of(b"elsewhere")}
    ledger.append(entry.model_copy(update=strange), raw)
    ledger.close()

    wait_until(lambda: fresh.get("/readyz").status_code == 503)
    why = fresh.get("/readyz").json()["checks"]["state"]
    assert digest_of(b"elsewhere") in why
    told = metrics(fresh)
    assert (told["mend_ready"], told["mend_state_mismatches_total"]) == (0, 1)
    assert (told["mend_revision"], told["mend_replica_lag_entries"]) == (published.revision, 1)
    for answer in (fresh.get("/generate", params=SAY), fresh.post("/edits", json=bodies[1]), fresh.get("/revision")):
        assert why in assert_problem(answer, "not_ready")["detail"]
    assert engine.published == published


class TestARepeatedRollback:
    def test_answers_the_same_body(self, client, bodies):
        first = client.post("/edits", json=bodies[0]).json()
        headers = {"Idempotency-Key": "take it back"}
        url = f"/edits/{first['id']}?reason=wrong"
        once = client.delete(url, headers=headers)
        client.post("/edits", json=bodies[1])
        again = client.delete(url, headers=headers)
        assert (once.status_code, again.status_code) == (200, 200)
        assert again.json() == once.json()

    def test_with_the_key_of_another_request_is_refused(self, client, bodies):
        headers = {"Idempotency-Key": "used already"}
        first = client.post("/edits", json=bodies[0], headers=headers).json()
        second = client.post("/edits", json=bodies[1]).json()
        for url in (f"/edits/{first['id']}", f"/edits/{second['id']}"):
            assert_problem(client.delete(url, headers=headers), "idempotency_key_reused")
        client.delete(f"/edits/{second['id']}", headers={"Idempotency-Key": "another"})
        for url in (f"/edits/{first['id']}", f"/edits/{second['id']}?reason=another"):
            assert_problem(client.delete(url, headers={"Idempotency-Key": "another"}), "idempotency_key_reused")
