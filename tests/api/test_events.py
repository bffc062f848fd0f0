"""What those who listen are told: what is live, how it is, and each step of a change; over real sockets."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service import watch
from service.api.events import MAX_LISTENERS, MAX_STEPS
from service.api.keys import changed
from service.app import create_app
from service.engine import Engine
from service.failpoints import arm
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import on_socket, wait_until
from tests.api.listening import Ear, listening
from tests.api.test_keys import made
from tests.ledger.servers import Server

WALK = ["wait", "catch_up", "before", "capture", "propose", "search", "stage", "judge", "commit", "publish"]
LOOK_HOLDS_S = 2.0


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def served(folders, redis, tmp_path_factory) -> Iterator[tuple[str, FastAPI]]:
    """An application on a Redis that may be killed or frozen, with all the patience that a URL can ask for."""
    settings = folders.settings(tmp_path_factory.mktemp("data"))
    app = create_app(Settings(**settings, redis_url=f"unix://{redis.path}?socket_timeout=60"))
    with on_socket(app) as (url, app, _server):
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        yield url, app


@pytest.fixture
def url(served) -> str:
    return served[0]


@pytest.fixture
def engine(served) -> Engine:
    """With no edit active."""
    engine = served[1].state.service.ready_engine()
    for edit in engine.history.all_active():
        engine.rollback(edit.id)
    return engine


def steps(ear: Ear, *, begun: bool = True) -> list[str]:
    return [step["step"] for step in ear.of("step") if (step["state"] == "begun") == begun]


class TestARevision:
    def test_that_is_live_is_told_at_once_with_the_health(self, url, engine):
        live = httpx.get(f"{url}/model").json()
        with listening(url) as ear:
            ear.until(lambda ear: len(ear.told) == 2, within_s=2)
        (revision, health) = ear.told
        assert (revision.name, revision.id) == ("revision", str(live["revision"]))
        assert revision.data == {name: live[name] for name in ("revision", "digest", "active_edits")}
        ready = httpx.get(f"{url}/readyz").json()
        assert (health.name, health.id) == ("health", None)
        assert health.data == {name: ready[name] for name in ("status", "checks")}

    def test_that_follows_is_told_when_it_is_live(self, url, engine, bodies):
        with listening(url) as ear, listening(url) as other:
            made = httpx.post(f"{url}/edits", json=bodies[0]).json()
            answered = time.monotonic()
            for each in (ear, other):
                each.until(lambda each: each.of("revision")[-1]["revision"] == made["revision"])
                told = next(event for event in each.told if event.id == str(made["revision"]))
                assert told.data == {"revision": made["revision"], "digest": made["digest"], "active_edits": 1}
                assert told.at < answered + 0.5

    def test_that_another_replica_made_is_told_too(self, serve, redis, url, engine, bodies, tmp_path):
        with serve(tmp_path, redis_url=f"unix://{redis.path}") as replica, listening(url) as ear:
            made = replica.post("/edits", json=bodies[0]).json()
            ear.until(lambda ear: ear.of("revision")[-1]["revision"] == made["revision"])
            assert ear.of("revision")[-1]["digest"] == made["digest"]
            assert not ear.of("step")

    def test_that_is_not_the_newest_any_more_is_left_out(self, served, url, engine, bodies):
        """Of what is published while nobody of the application's loop has the time."""
        before = engine.published.revision
        with listening(url) as ear:
            ear.until(lambda ear: ear.of("revision"))

            def keep_busy() -> None:
                while engine.published.revision < before + 3:
                    time.sleep(0.01)

            (listener,) = served[1].state.events._listeners
            listener._loop.call_soon_threadsafe(keep_busy)
            for number in range(3):
                engine.tag(f"name{number}")
            ear.until(lambda ear: ear.of("revision")[-1]["revision"] == before + 3)
        assert [each["revision"] for each in ear.of("revision")] == [before, before + 3]


class TestAStep:
    def test_begins_and_ends_with_the_request_that_asked_for_it_and_none_of_its_words(self, url, engine, bodies):
        with listening(url) as ear:
            asked = httpx.post(f"{url}/edits", json=bodies[0], headers={"X-Request-Id": "of-this-one"})
            ear.until(lambda ear: "publish" in steps(ear, begun=False))
        told = ear.of("step")
        assert steps(ear) == steps(ear, begun=False) == WALK
        assert {(step["request_id"], step["kind"]) for step in told} == {("of-this-one", "edit")}
        assert all((step["ms"] is None) == (step["state"] == "begun") for step in told)
        timed = {step["step"]: step["ms"] for step in told if step["ms"] is not None}
        assert {step: timed[step] for step in asked.json()["timings_ms"]} == pytest.approx(asked.json()["timings_ms"])
        assert all(set(step) == {"request_id", "kind", "step", "state", "ms"} for step in told)
        assert bodies[0]["prompt"] not in str(ear.told)

    def test_is_told_when_it_is_taken_and_not_when_all_is_over(self, url, engine, bodies):
        arm("capture=sleep:0.5")
        try:
            with listening(url) as ear:
                assert httpx.post(f"{url}/edits", json=bodies[0]).status_code == 201
                answered = time.monotonic()
        finally:
            arm("")
        captured = next(event for event in ear.told if event.data.get("step") == "capture" and event.data["ms"])
        assert captured.at < answered - 0.4

    def test_of_a_batch_a_rollback_and_what_nobody_asked_for(self, url, engine, bodies):
        with listening(url) as ear:
            body = {"edits": [*bodies[:2], {**bodies[2], "expires_at": str(datetime.now(UTC) + timedelta(seconds=1))}]}
            asked = httpx.post(f"{url}/edits/batch?allow_loss=true", json=body)
            assert asked.status_code == 201, asked.text
            one, *_ = asked.json()["edits"]
            undone = httpx.delete(f"{url}/edits/{one['id']}")
            assert undone.status_code == 200
            expired = {"kind": "expire", "step": "publish", "state": "ended"}
            ear.until(lambda ear: any(expired.items() <= step.items() for step in ear.of("step")))
        asked_for = {(step["kind"], step["request_id"]) for step in ear.of("step")}
        assert asked_for == {
            ("batch", asked.headers["x-request-id"]),
            ("rollback", undone.headers["x-request-id"]),
            ("expire", None),
        }

    def test_that_fails_has_ended_too(self, url, engine):
        refused = {"prompt": "The capital of France is", "correction": " ~{|}~ Zq~"}
        with listening(url) as ear:
            assert_problem(httpx.post(f"{url}/edits", json=refused), "did_not_take")
            ear.until(lambda ear: "search" in steps(ear, begun=False))
        assert steps(ear) == steps(ear, begun=False)


class TestHealth:
    def test_is_told_when_redis_is_gone_and_when_it_is_back(self, url, redis, engine):
        with listening(url) as ear:
            ear.until(lambda ear: ear.of("health"))
            redis.kill()
            killed = time.monotonic()
            ear.until(lambda ear: ear.of("health")[-1]["status"] == "not_ready")
            assert ear.told[-1].at < killed + 3
            assert ear.of("health")[-1]["checks"] == httpx.get(f"{url}/readyz").json()["checks"]
            assert ear.of("health")[-1]["checks"]["ledger"] != "ok"
            with listening(url) as late:
                late.until(lambda late: len(late.told) == 2, within_s=2)
                assert [each.name for each in late.told] == ["revision", "health"]
                redis.start()
                for each in (ear, late):
                    each.until(lambda each: each.of("health")[-1]["status"] == "ready")

    def test_is_not_that_of_a_look_that_hangs(self, url, redis, engine, monkeypatch):
        """A Redis that answers nothing, and nobody who gives up: as a name server that is gone keeps it from being
        asked. What is then known of it is as old as it is."""
        monkeypatch.setattr(watch, "LOOK_HOLDS_S", LOOK_HOLDS_S)
        with listening(url) as ear:
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            redis.freeze()
            frozen = time.monotonic()
            try:
                ear.until(lambda ear: ear.of("health")[-1]["status"] == "not_ready")
                assert LOOK_HOLDS_S - 1.5 < time.monotonic() - frozen < LOOK_HOLDS_S + 3
                ready = httpx.get(f"{url}/readyz")
                assert ready.status_code == 503
                assert ready.json()["checks"]["ledger"].startswith("not looked at for ")
                start = time.monotonic()
                for answer in (
                    httpx.post(f"{url}/edits", json={"prompt": "x", "correction": "y"}),
                    httpx.get(f"{url}/replicas"),
                ):
                    assert "not looked at" in assert_problem(answer, "ledger_unavailable")["detail"]
                assert httpx.get(f"{url}/revision").json()["head"] is None
                assert httpx.get(f"{url}/generate?prompt=The&max_new_tokens=1").status_code == 200
                assert time.monotonic() - start < 5
            finally:
                redis.thaw()
            ear.until(lambda ear: ear.of("health")[-1]["status"] == "ready")


class TestListeners:
    def test_are_limited_and_leave(self, served, url, engine):
        address = urlsplit(url)
        with ExitStack() as stack:
            clients = [
                stack.enter_context(httpx.stream("GET", f"http://{address.netloc}/events", timeout=60))
                for _ in range(MAX_LISTENERS)
            ]
            assert {answer.status_code for answer in clients} == {200}
            assert_problem(httpx.get(f"{url}/events"), "busy")
            assert httpx.get(f"{url}/livez").status_code == 200
            clients[0].close()
            wait_until(lambda: len(served[1].state.events._listeners) == MAX_LISTENERS - 1, within_s=10)
            with listening(url) as ear:
                ear.until(lambda ear: len(ear.told) == 2)
        wait_until(lambda: not served[1].state.events._listeners, within_s=10)

    def test_that_leave_in_the_middle_are_no_mistake(self, served, url, engine, caplog):
        telemetry, left = served[1].state.telemetry, threading.Event()

        def work() -> None:
            with telemetry.change("tag"):
                while not left.wait(0.0005):
                    telemetry.step("work").end()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            for _ in range(20):
                with listening(url) as ear:
                    ear.until(lambda ear: ear.of("step"))
        finally:
            left.set()
            worker.join()
        wait_until(lambda: not served[1].state.events._listeners, within_s=10)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_that_read_nothing_hold_nobody_up_and_miss_the_oldest_steps(self, served, url, engine):
        events = served[1].state.events
        with listening(url) as ear:
            (listener,) = events._listeners
            ear.until(lambda ear: len(ear.told) == 2)
            listener._loop.call_soon_threadsafe(time.sleep, 1)
            time.sleep(0.1)
            start = time.monotonic()
            telemetry = served[1].state.telemetry
            with telemetry.change("tag") as change:
                for number in range(MAX_STEPS):
                    telemetry.step(f"step{number}").end()
                change.came_to("done")
            assert time.monotonic() - start < 0.8
            ear.until(lambda ear: f"step{MAX_STEPS - 1}" in steps(ear, begun=False))
        told = ear.of("step")
        assert len(told) == MAX_STEPS
        assert told[0] == {
            "request_id": None,
            "kind": "tag",
            "step": f"step{MAX_STEPS // 2}",
            "state": "begun",
            "ms": None,
        }

    def test_that_never_read_are_no_burden(self, served, url, engine):
        """Of what is told, what the sockets do not take is not kept."""
        events, telemetry, address = served[1].state.events, served[1].state.telemetry, urlsplit(url)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((address.hostname, address.port))
            deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_until(lambda: events._listeners, within_s=5)
            with listening(url) as ear, telemetry.change("tag") as change:
                ear.until(lambda ear: ear.of("health"))
                for number in range(40):
                    for _ in range(100):
                        telemetry.step("long" * 300).end()
                    telemetry.step(f"last{number}").end()
                    last = {"step": f"last{number}", "state": "ended"}
                    ear.until(lambda ear, last=last: last.items() <= ear.told[-1].data.items())
                change.came_to("done")
                assert [len(each._steps) for each in events._listeners] == [MAX_STEPS, 0]
                assert httpx.get(f"{url}/livez").status_code == 200
        wait_until(lambda: not events._listeners, within_s=5)

    def test_hear_a_sign_of_life(self, url, engine, monkeypatch):
        monkeypatch.setattr("service.api.events.PING_EVERY_S", 0.2)
        with listening(url) as ear:
            ear.until(lambda ear: ear.comments > 1, within_s=5)

    def test_say_nothing_that_would_be_ignored(self, url):
        assert_problem(httpx.get(f"{url}/events?since=3"), "invalid_request")


@pytest.fixture
def keyed(folders, tmp_path) -> Iterator[tuple[str, dict[str, str], Path]]:
    """An application that takes keys, and never comes to load its model; a header, and the file of its keys."""
    path = tmp_path / "keys.json"
    with changed(path) as held:
        token, key = made("reader", "read")
        held.append(key)
    settings = Settings(**folders.settings(tmp_path), api_keys=path, rate_reads="4/minute")
    with on_socket(create_app(settings), lifespan="off") as (url, _app, _server):
        yield url, {"Authorization": f"Bearer {token}"}, path


def test_a_key_is_asked_for_counts_one_read_and_ends_the_stream_when_it_is_revoked(keyed):
    url, header, path = keyed
    assert_problem(httpx.get(f"{url}/events"), "unauthenticated")
    with listening(url, **header) as ear:
        ear.until(lambda ear: ear.of("health"))
        waiting = "waiting for the model"
        assert ear.of("health")[0]["status"] == "not_ready"
        assert ear.of("health")[0]["checks"] == {"model": "loading", "ledger": waiting, "durability": waiting}
        assert not ear.of("revision")
        for _ in range(3):
            assert httpx.get(f"{url}/metrics", headers=header).status_code == 200
        assert_problem(httpx.get(f"{url}/events", headers=header), "rate_limited")
        assert ear.ended is None
        with changed(path) as held:
            held.clear()
        ear.until(lambda ear: ear.ended, within_s=5)


def test_streams_end_with_a_service_that_cannot_start(folders, tmp_path):
    """Or it would wait for those who listen."""
    os.mkfifo(tmp_path / "guard.txt")
    servers: list[uvicorn.Server] = []
    settings = {**folders.settings(tmp_path), "guard_prompts": tmp_path / "guard.txt", "base_model": "/nowhere"}
    app = create_app(Settings(**settings), on_failure=lambda: setattr(servers[0], "should_exit", True))
    with on_socket(app) as (url, _app, server), listening(url) as ear:
        servers.append(server)
        ear.until(lambda ear: ear.of("health"))
        (tmp_path / "guard.txt").write_text("The language of Italy is\n")
        ear.until(lambda ear: ear.ended, within_s=5)
    assert "/nowhere" in app.state.service.failure
