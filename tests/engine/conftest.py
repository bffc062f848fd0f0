"""Engines over small models, each on a ledger of its own unless a namespace is named, in one real Redis server."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from service.engine import EditRequest, Engine, Limits
from service.ledger import EmbeddedRedis, RedisLedger
from tests.service_fixtures import LIMITS, find_edits, small_checkpoint, small_engine
from tests.small import small_base

Open = Callable[..., Engine]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that this test may kill."""
    with EmbeddedRedis(tmp_path / "own") as server:
        yield server


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> BaseModel:
    """The Linear layout; a test that wants both says so with `both_layouts`."""
    return small_base(getattr(request, "param", "linear"))


@pytest.fixture(scope="session")
def checkpoint(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_checkpoint(tmp_path_factory.mktemp("editor"), base)


@pytest.fixture
def open_engine(base: BaseModel, checkpoint: Checkpoint, server: EmbeddedRedis) -> Iterator[Open]:
    """Start an engine. namespace: of its ledger. on: the server. ledger: the kind of ledger."""
    opened: list[RedisLedger] = []

    def open_engine(
        namespace: str | None = None,
        *,
        limits: Limits = LIMITS,
        on: EmbeddedRedis = server,
        ledger: type[RedisLedger] = RedisLedger,
    ) -> Engine:
        opened.append(ledger.connect(on.url, namespace or uuid.uuid4().hex))
        return small_engine(base, checkpoint, opened[-1], limits)

    yield open_engine
    for each in opened:
        each.close()


@pytest.fixture
def engine(open_engine: Open) -> Engine:
    """An engine at revision 0."""
    return open_engine()


@pytest.fixture(scope="session")
def edits(base: BaseModel, checkpoint: Checkpoint, server: EmbeddedRedis) -> tuple[EditRequest, ...]:
    with closing(RedisLedger.connect(server.url, uuid.uuid4().hex)) as ledger:
        return find_edits(small_engine(base, checkpoint, ledger))


@pytest.fixture
def first(edits: tuple[EditRequest, ...]) -> EditRequest:
    """An edit that takes."""
    return edits[0]


@pytest.fixture
def second(edits: tuple[EditRequest, ...]) -> EditRequest:
    """An edit that takes, also after the first."""
    return edits[1]


@pytest.fixture
def third(edits: tuple[EditRequest, ...]) -> EditRequest:
    """An edit that takes, also after either of the others or both."""
    return edits[2]
