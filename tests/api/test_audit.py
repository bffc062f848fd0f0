"""GET /edits/audit and the background task behind it."""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime

import pytest

from tests.api.answers import assert_fields, assert_problem
from tests.api.conftest import engine_of, wait_until
from tests.service_fixtures import ANSWERS, COUNTRIES


class TestGetAudit:
    def test_says_of_every_active_edit_whether_it_holds(self, client, bodies):
        made = [client.post("/edits", json=body).json() for body in bodies]
        answer = client.get("/edits/audit", params={"fresh": "true"})
        assert answer.status_code == 200
        audit = answer.json()
        now = client.get("/revision").json()
        assert (audit["revision"], audit["digest"], audit["current"]) == (now["revision"], now["digest"], True)
        assert answer.headers["etag"] == f'"{now["revision"]}"'
        assert (audit["held"], audit["lost"]) == (3, 0)
        assert abs((datetime.fromisoformat(audit["taken_at"]) - datetime.now(UTC)).total_seconds()) < 60
        assert audit["took_ms"] > 0
        for each, edit in zip(audit["edits"], made, strict=True):
            assert_fields(each, "id", "prompt", "correction", "holds", "margin_nats", "text", "lost_to")
            assert {name: each[name] for name in ("id", "prompt", "correction")} == {
                name: edit[name] for name in ("id", "prompt", "correction")
            }
            assert each["holds"] is True
            assert each["margin_nats"] > 0
            assert each["lost_to"] is None

    def test_names_what_is_lost_and_to_which_edit(self, client, bodies):
        made = client.post("/edits", json=bodies[0]).json()
        for country, correction in itertools.product(COUNTRIES, ANSWERS):
            request = {"prompt": f"The capital of {country} is", "correction": f" {correction}"}
            if request["prompt"] != bodies[0]["prompt"]:
                answer = client.post("/edits", json=request)
                if answer.status_code == 409:
                    break
                if answer.status_code == 201:
                    client.delete(f"/edits/{answer.json()['id']}")
        breaker = client.post("/edits", params={"allow_loss": "true"}, json=request).json()
        audit = client.get("/edits/audit?fresh=true").json()
        lost, held = audit["edits"]
        assert (lost["id"], lost["holds"], lost["lost_to"]) == (made["id"], False, breaker["id"])
        said = client.get("/generate", params={"prompt": lost["prompt"], "max_new_tokens": 4}).json()["text"]
        assert lost["text"] == said
        assert (held["id"], held["holds"], held["lost_to"]) == (breaker["id"], True, None)
        assert (audit["held"], audit["lost"]) == (1, 1)

    def test_is_the_last_one_unless_it_is_to_be_fresh(self, fresh, bodies):
        assert fresh.get("/model").json()["audit"] is None
        first = fresh.get("/edits/audit").json()
        assert (first["revision"], first["edits"]) == (0, [])
        made = fresh.post("/edits", json=bodies[0]).json()
        again = fresh.get("/edits/audit")
        assert again.json() == {**first, "current": False}
        assert again.headers["etag"] == '"0"'
        now = fresh.get("/edits/audit", params={"fresh": "true"}).json()
        assert (now["revision"], now["held"], now["current"]) == (made["revision"], 1, True)
        shown = fresh.get("/model").json()["audit"]
        assert shown == {name: now[name] for name in ("revision", "digest", "taken_at", "took_ms", "held", "lost")}

    @pytest.mark.parametrize("query", ["fresh=maybe", "refresh=true"])
    def test_of_what_is_not_understood_is_invalid(self, client, query):
        assert_problem(client.get(f"/edits/audit?{query}"), "invalid_request")


class TestTheBackgroundTask:
    def test_looks_again_when_the_revision_has_changed(self, serve, tmp_path, bodies):
        with serve(tmp_path, audit_every_s=0.05) as client:
            wait_until(lambda: engine_of(client).last_audit is not None)
            first = client.get("/model").json()["audit"]
            time.sleep(0.3)
            assert client.get("/model").json()["audit"] == first
            made = client.post("/edits", json=bodies[0]).json()
            wait_until(lambda: client.get("/model").json()["audit"]["revision"] == made["revision"])
            audit = client.get("/edits/audit").json()
            assert (audit["held"], audit["current"]) == (1, True)

    def test_can_be_switched_off(self, serve, tmp_path):
        with serve(tmp_path, audit_every_s=0) as client:
            time.sleep(0.3)
            assert client.get("/model").json()["audit"] is None
            assert client.get("/edits/audit").json()["revision"] == 0

    def test_survives_an_audit_that_fails(self, serve, tmp_path, bodies, monkeypatch, caplog):
        failed: list[bool] = []
        with serve(tmp_path, audit_every_s=0.05) as client:
            engine = engine_of(client)
            wait_until(lambda: engine.last_audit is not None)
            audit = engine.audit

            def fails_once(*args: object) -> object:
                if not failed:
                    failed.append(True)
                    raise RuntimeError("out of memory")
                return audit(*args)

            monkeypatch.setattr(engine, "audit", fails_once)
            made = client.post("/edits", json=bodies[0]).json()
            wait_until(lambda: client.get("/model").json()["audit"]["revision"] == made["revision"])
        assert failed
        assert "out of memory" in caplog.text
