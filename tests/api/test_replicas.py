"""What services on one ledger know of each other; and that one that is behind is not taken for one without Redis."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from fastapi.testclient import TestClient

from service import watch
from service.app import VERSION
from service.failpoints import arm
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of, wait_until
from tests.ledger.servers import Server

FIELDS = {"id", "host", "revision", "lag", "ready", "version", "started_at", "seen_at", "self"}


@pytest.fixture(scope="module")
def redis() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def both(serve, redis, tmp_path_factory) -> Iterator[tuple[TestClient, TestClient]]:
    """Two services, of which the first was first."""
    url = f"unix://{redis.path}"
    with (
        serve(tmp_path_factory.mktemp("one"), redis_url=url) as one,
        serve(tmp_path_factory.mktemp("other"), redis_url=url) as other,
    ):
        yield one, other


def replicas(client: TestClient) -> list[dict]:
    answer = client.get("/replicas")
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


def test_each_knows_all_and_itself(both):
    for index, client in enumerate(both):
        wait_until(lambda client=client: len(replicas(client)) == 2, within_s=5)
        answer = client.get("/replicas")
        live = client.get("/revision").json()
        assert answer.headers["etag"] == f'"{live["revision"]}"'
        assert answer.json()["head"] == live["head"] == live["revision"]
        items = answer.json()["items"]
        assert [item["self"] for item in items] == [index == 0, index == 1]
        assert {frozenset(item) for item in items} == {frozenset(FIELDS)}
        for item in items:
            assert (item["host"], item["version"], item["lag"]) == (socket.gethostname(), VERSION, 0)
            assert item["ready"] is True
            started, seen = (datetime.fromisoformat(item[name]) for name in ("started_at", "seen_at"))
            assert started < datetime.now(UTC)
            assert abs((datetime.now(UTC) - seen).total_seconds()) < 5
        assert items[0]["started_at"] < items[1]["started_at"]
    assert [item["id"] for item in replicas(both[0])] == [item["id"] for item in replicas(both[1])]
    assert all(re.fullmatch(r"[0-9a-f]{32}", item["id"]) for item in items)


def test_say_so_over_and_over(both):
    before = {item["id"]: item["seen_at"] for item in replicas(both[0]) if not item["self"]}
    wait_until(
        lambda: all(item["seen_at"] > before[item["id"]] for item in replicas(both[0]) if not item["self"]), within_s=3
    )


def test_what_one_publishes_is_told_of_it_at_once(both, bodies):
    one, other = both
    made = one.post("/edits", json=bodies[0]).json()
    start = time.monotonic()
    wait_until(lambda: {item["revision"] for item in replicas(other)} == {made["revision"]}, within_s=2)
    assert time.monotonic() - start < 0.9
    one.delete(f"/edits/{made['id']}")


def test_one_that_is_long_in_following_lags_but_is_ready(both, bodies, monkeypatch):
    """The watch looks at Redis meanwhile, also during a change that takes long."""
    monkeypatch.setattr(watch, "LOOK_HOLDS_S", 2.0)
    one, other = both
    wait_until(lambda: [item["lag"] for item in replicas(one)] == [0, 0], within_s=5)
    lags = set()
    arm("replay=sleep:3.5")
    try:
        made = one.post("/edits", json=bodies[0]).json()
        with engine_of(one)._turns.taken():
            start = time.monotonic()
            while time.monotonic() < start + 3:
                lags |= {item["lag"] for item in replicas(one) if not item["self"]}
                for client in both:
                    assert client.get("/readyz").status_code == 200, client.get("/readyz").text
                time.sleep(0.1)
    finally:
        arm("")
    assert lags == {1}
    wait_until(lambda: [item["lag"] for item in replicas(one)] == [0, 0], within_s=5)
    assert other.get("/revision").json()["revision"] == made["revision"]
    one.delete(f"/edits/{made['id']}")


def test_one_that_stops_in_order_is_gone_at_once(both, serve, redis, tmp_path):
    with serve(tmp_path, redis_url=f"unix://{redis.path}") as third:
        wait_until(lambda: len(replicas(both[0])) == 3, within_s=5)
        (own,) = [item["id"] for item in replicas(third) if item["self"]]
        assert replicas(both[1])[2]["id"] == own
    assert own not in [item["id"] for item in replicas(both[0])]


def test_one_that_may_not_say_so_serves_all_the_same(serve, redis, bodies, tmp_path, caplog):
    redis.permit("resetkeys", "~*:entries", "~*:factors", "~*:snapshot", "+@all")
    with serve(tmp_path, redis_url=f"unix://ledger:any@{redis.path}", namespace="mute") as mute:
        made = mute.post("/edits", json=bodies[0])
        assert made.status_code == 201
        time.sleep(1.5)
        assert mute.get("/readyz").json()["status"] == "ready"
        assert "does not permit" in assert_problem(mute.get("/replicas"), "ledger_unavailable")["detail"]
    assert caplog.text.count("is missing in GET /replicas") == 1


def test_cannot_be_told_without_redis(both, redis):
    redis.kill()
    try:
        assert_problem(both[0].get("/replicas"), "ledger_unavailable")
        wait_until(lambda: both[0].get("/readyz").status_code == 503, within_s=5)
        assert_problem(both[0].get("/replicas"), "ledger_unavailable")
    finally:
        redis.start()
    wait_until(lambda: [client.get("/readyz").status_code for client in both] == [200, 200], within_s=10)
    wait_until(lambda: [len(replicas(client)) for client in both] == [2, 2], within_s=5)


def test_nothing_is_asked_that_would_be_ignored(both):
    assert_problem(both[0].get("/replicas?limit=1"), "invalid_request")
