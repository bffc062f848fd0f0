"""GET /model/health: one document of how the live model fares."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from service.engine.guard import REFERENCE_TOKENS
from tests.api.answers import assert_fields, assert_problem
from tests.api.conftest import engine_of, wait_until
from tests.service_fixtures import GUARD_PROMPTS, Standing


def health(client, **query: object) -> dict:
    answer = client.get("/model/health", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{answer.json()["revision"]}"'
    return answer.json()


def says(client, prompt: str, view: str) -> str:
    asked = {"prompt": prompt, "view": view, "max_new_tokens": REFERENCE_TOKENS}
    return client.get("/generate", params=asked).json()["text"]


class TestTheDocument:
    def test_is_of_what_is_live(self, client, bodies):
        client.post("/edits", json=bodies[0])
        found, model, live = health(client), client.get("/model").json(), client.get("/revision").json()
        for name in ("revision", "digest", "active_edits", "capacity", "kill_switch_engaged", "audit"):
            assert found[name] == model[name]
        assert (found["head"], found["lag"]) == (live["head"], live["lag"])

    def test_of_a_fresh_ledger_has_nothing_to_tell(self, fresh):
        found = health(fresh)
        assert (found["revision"], found["drawdown"], found["series"]) == (0, 0, [])
        assert (found["audit"], found["audit_current"]) == (None, False)
        assert all(each["moved"] == 0 and each["live"] == each["base"] for each in found["guard"])

    def test_tells_whether_the_audit_is_of_this_revision(self, client, bodies):
        client.get("/edits/audit?fresh=true")
        assert health(client)["audit_current"] is True
        client.post("/edits", json=bodies[0])
        found = health(client)
        assert (found["audit_current"], found["audit"]["revision"]) == (False, found["revision"] - 1)
        client.get("/edits/audit?fresh=true")
        assert health(client)["audit_current"] is True

    def test_of_an_engaged_kill_switch_is_of_the_base(self, client, bodies):
        client.post("/edits", json=bodies[0])
        client.put("/kill-switch", json={})
        try:
            found = health(client)
            assert (found["kill_switch_engaged"], found["active_edits"], found["drawdown"]) == (True, 0, 0)
        finally:
            client.delete("/kill-switch")

    def test_changes_nothing(self, client, bodies):
        client.post("/edits", json=bodies[0])
        standing = Standing.of(engine_of(client))
        health(client)
        assert Standing.of(engine_of(client)) == standing

    @pytest.mark.parametrize("query", ["points=0", "points=2001", "points=many", "fresh=true"])
    def test_of_what_is_not_understood_is_invalid(self, client, query):
        assert_problem(client.get(f"/model/health?{query}"), "invalid_request")


class TestTheGuard:
    def test_tells_what_each_prompt_says(self, client, bodies):
        moved = 0
        for body in bodies:
            made = client.post("/edits", json=body).json()
            found = health(client)
            assert found["drawdown"] == made["checks"]["drawdown"]
            assert found["drawdown_budget"] == made["checks"]["drawdown_budget"]
            guard = found["guard"]
            assert {each["prompt"] for each in guard} == set(GUARD_PROMPTS)
            assert [each["moved"] for each in guard] == sorted((each["moved"] for each in guard), reverse=True)
            tokens = sum(each["tokens"] for each in guard)
            assert sum(each["moved"] for each in guard) == pytest.approx(found["drawdown"] * tokens)
            for each in guard:
                assert each["base"] == says(client, each["prompt"], "base")
                assert each["live"] == says(client, each["prompt"], "live")
                assert (each["moved"] > 0) == (each["live"] != each["base"])
                moved += each["moved"]
        assert moved

    def test_is_asked_once_for_every_state(self, client, bodies):
        engine, asked = engine_of(client), []
        missed = engine.drift._guard.missed
        before = health(client)
        engine.drift._guard.missed = lambda upper: asked.append(upper) or missed(upper)
        try:
            assert health(client) == before
            client.put("/tags/health", json={})  # a revision of the same state
            assert health(client) == {**before, "revision": before["revision"] + 1, "head": before["head"] + 1}
            assert asked == []
            made = client.post("/edits", json=bodies[0]).json()
            asked.clear()  # by the judge
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda _: health(client), range(4)))
            assert found == [found[0]] * 4
            assert found[0]["revision"] == made["revision"]
            assert len(asked) == 1
        finally:
            del engine.drift._guard.missed

    def test_holds_nobody_up(self, client, bodies):
        engine, held, reading = engine_of(client), threading.Event(), threading.Event()
        health(client)
        made = client.post("/edits", json=bodies[0]).json()
        handle = engine.drift._view.upper.module.register_forward_hook(
            lambda *_: reading.set() or (held.wait(60) and None)
        )
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(health, client)
            try:
                assert reading.wait(60)
                assert client.get("/generate", params={"prompt": "Oslo"}).json()["revision"] == made["revision"]
                newer = client.post("/edits", json=bodies[1]).json()
                assert newer["status"] == "applied"
            finally:
                held.set()
                handle.remove()
            assert (asked.result()["revision"], asked.result()["active_edits"]) == (made["revision"], 1)
        wait_until(lambda: health(client)["revision"] == newer["revision"])


class TestTheSeries:
    def test_has_a_point_for_every_change_of_the_state(self, fresh, bodies):
        one, two = (fresh.post("/edits", json=body).json() for body in bodies[:2])
        fresh.put("/tags/named", json={})
        fresh.delete(f"/edits/{one['id']}")
        fresh.post("/rollback", json={"tag": "named"})
        fresh.post("/rollback", json={"tag": "named"}, headers={"Idempotency-Key": "again"})  # an entry, and no change
        fresh.put("/kill-switch", json={})
        found = health(fresh)
        assert [(each["revision"], each["kind"], each["active_edits"]) for each in found["series"]] == [
            (1, "applied", 1), (2, "applied", 2), (4, "rolled_back", 1), (5, "restored", 2), (7, "restored", 0),
        ]  # fmt: skip
        assert found["revision"] == 7
        for point, made in zip(found["series"], (one, two), strict=False):
            assert_fields(point, "revision", "at", "kind", "active_edits", "drawdown", "capacity")
            assert point["drawdown"] == made["checks"]["drawdown"]
            assert point["capacity"] == made["checks"]["capacity"] is None  # edits are summed here
            assert datetime.fromisoformat(point["at"]) == datetime.fromisoformat(made["created_at"])
        assert all(each["drawdown"] is each["capacity"] is None for each in found["series"][2:])

    def test_is_of_the_newest(self, client, bodies):
        client.post("/edits", json=bodies[0])
        whole = health(client, points=2000)["series"]
        assert len(whole) > 3
        assert health(client, points=3)["series"] == whole[-3:]
        assert health(client)["series"] == whole[-200:]

    def test_has_one_point_for_a_batch(self, client, bodies):
        before = health(client)["series"]
        made = client.post("/edits/batch", json={"edits": list(bodies)}).json()
        assert made["applied"] == 3, made
        *rest, last = health(client)["series"]
        assert rest == before[-len(rest) :]
        assert (last["revision"], last["active_edits"]) == (made["revision"], 3)
        assert last["drawdown"] == made["checks"]["drawdown"]
