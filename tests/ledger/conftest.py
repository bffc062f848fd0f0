"""A real Redis server for every test that needs one: shared where it only answers, its own where it dies."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.ledger import EmbeddedRedis, RedisLedger


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that this test may kill or configure."""
    with EmbeddedRedis(tmp_path) as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisLedger]]:
    """Ledgers on a server, in a namespace of their own unless one is named; closed after the test."""
    ledgers: list[RedisLedger] = []

    def connect(server: EmbeddedRedis, namespace: str | None = None) -> RedisLedger:
        ledgers.append(RedisLedger.connect(server.url, namespace or uuid.uuid4().hex))
        return ledgers[-1]

    yield connect
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def ledger(server: EmbeddedRedis, connect: Callable[..., RedisLedger]) -> RedisLedger:
    """An empty ledger."""
    return connect(server)
