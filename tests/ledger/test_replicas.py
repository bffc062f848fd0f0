"""Services announce themselves beside their ledger, and are forgotten when they no longer do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from service.ledger import LedgerUnavailable, RedisLedger, Replica, verify_ledger
from service.ledger.replicas import Replicas
from tests.ledger.entries import FACTORS, applied
from tests.ledger.servers import NAMESPACE, VALKEY, Server

KEY = f"mend:{{{NAMESPACE}}}:replicas"
PERMITTED = (
    "eval xadd xrange xrevrange xread xinfo xlen xsetid xtrim hset hmget hexists hdel get set exists scan memory|usage "
    "ping info"
)
"""What the README asks for."""


def replica(name: str, **said: object) -> Replica:
    said = {"revision": 1, "ready": True, "started_at": datetime(2030, 1, 1, tzinfo=UTC), **said}
    return Replica(id=name, host=f"host-{name}", version="0.1.0", **said)


@pytest.fixture(scope="module", params=[VALKEY, shutil.which("redis-server")], ids=["valkey", "redis"])
def redis(request) -> Iterator[Server]:
    if request.param is None:
        pytest.skip("no redis-server here")
    with Server(binary=request.param) as server:
        yield server


@pytest.fixture
def ledger(redis: Server) -> RedisLedger:
    redis.client.flushall()
    return redis.ledger()


def ids(ledger: RedisLedger, asking: str = "me") -> list[str]:
    return [seen.replica.id for seen in ledger.replicas.list(replica(asking))]


class TestAService:
    def test_is_told_to_the_others_as_it_said_last(self, redis, ledger):
        one, other = ledger.replicas, redis.ledger().replicas
        one.announce(replica("1"))
        one.announce(replica("1", revision=7, ready=False))
        before = redis.client.time()
        (first, second) = other.list(replica("2", started_at=datetime.now(UTC) + timedelta(days=9999)))
        assert first.replica == replica("1", revision=7, ready=False)
        assert second.replica.id == "2"
        assert abs(first.at.timestamp() - before[0]) < 5
        assert first.at <= second.at

    def test_that_is_older_comes_first(self, ledger):
        for age, name in enumerate("abc"):
            ledger.replicas.announce(replica(name, started_at=datetime(2020 - age, 1, 1, tzinfo=UTC)))
        assert ids(ledger) == ["c", "b", "a", "me"]

    def test_that_leaves_is_gone_at_once(self, ledger):
        ledger.replicas.announce(replica("1"))
        assert ids(ledger) == ["1", "me"]
        ledger.replicas.leave(replica("1"))
        assert ids(ledger) == ["me"]

    def test_that_says_nothing_any_more_is_forgotten(self, redis, ledger):
        impatient = Replicas(ledger._connection, KEY, forgotten_after_s=0.3)
        impatient.announce(replica("1"))
        assert len(impatient.list(replica("me"))) == 2
        time.sleep(0.4)
        assert [seen.replica.id for seen in impatient.list(replica("me"))] == ["me"]
        assert redis.client.xlen(KEY) == 1

    def test_of_another_ledger_is_not_among_them(self, redis, ledger):
        RedisLedger(ledger._connection, "other").replicas.announce(replica("other"))
        assert ids(ledger) == ["me"]

    def test_of_a_later_version_is_and_what_no_service_said_is_not(self, redis, ledger):
        later = replica("later").model_dump_json()[:-1] + ',"gpu":"H100"}'
        redis.client.xadd(KEY, {"id": "later", "said": later})
        redis.client.xadd(KEY, {"id": "x", "said": "nonsense"})
        redis.client.xadd(KEY, {"one": "1", "two": "2", "three": "3"})
        assert ids(ledger) == ["later", "me"]


def test_takes_no_command_beyond_those_of_the_ledger(redis, ledger):
    redis.permit(*(f"+{command}" for command in PERMITTED.split()))
    permitted = redis.ledger(user="ledger").replicas
    permitted.announce(replica("1"))
    assert len(permitted.list(replica("me"))) == 2
    permitted.leave(replica("1"))


def test_are_no_part_of_the_ledger(redis, ledger):
    for sequence in (1, 2, 3):
        ledger.append(applied(sequence), FACTORS)
    before = ledger.last()
    ledger.replicas.announce(replica("1"))
    assert ledger.namespaces("") == [NAMESPACE]
    assert ledger.compact().sequence == 3
    ledger.replicas.announce(replica("1"))
    assert ledger.last() == before
    assert not verify_ledger(ledger).problems
    assert ids(ledger) == ["1", "me"]


def test_cannot_be_asked_while_redis_is_gone():
    with Server() as redis:
        ledger = redis.ledger()
        ledger.replicas.announce(replica("1"))
        redis.kill()
        with pytest.raises(LedgerUnavailable):
            ids(ledger)
        redis.start()
        assert ids(ledger) == ["1", "me"]
