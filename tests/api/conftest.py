"""The real application, with its lifespan, over a small model in a folder and an embedded Redis of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from socket import create_server

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.trace import TracerProvider

from editors.base_model import load_base_model
from editors.checkpoint import load_checkpoint
from service.app import create_app
from service.engine import EditRequest, Engine
from service.ledger import EmbeddedRedis, RedisLedger
from service.settings import Settings
from tests.service_fixtures import Folders, find_edits, small_engine

READY_WITHIN_S = 120
ADDRESS = "http://127.0.0.1:8000"

Serve = Callable[..., AbstractContextManager[TestClient]]


def wait_until(condition: Callable[[], bool], within_s: float = READY_WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def engine_of(client: TestClient) -> Engine:
    return client.app.state.service.ready_engine()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """GPT-2's layout: its positions are learnt, so that it is the one that breaks on texts that are too long."""
    return Folders.write(tmp_path_factory.mktemp("model"), "conv1d")


@pytest.fixture(scope="session")
def edits(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[EditRequest, ...]:
    """Three edits that take one after another."""
    base = load_base_model(str(folders.base_model))
    with (
        EmbeddedRedis(tmp_path_factory.mktemp("redis")) as redis,
        closing(RedisLedger.connect(redis.url, "edits")) as ledger,
    ):
        return find_edits(small_engine(base, load_checkpoint(folders.editor, base), ledger))


@pytest.fixture(scope="session")
def bodies(edits: tuple[EditRequest, ...]) -> tuple[dict, ...]:
    """The same, as a client sends them."""
    return tuple({"prompt": edit.prompt, "correction": edit.correction} for edit in edits)


@pytest.fixture(scope="session")
def serve(folders: Folders) -> Serve:
    """Start the application and wait until it is ready."""

    @contextmanager
    def serve(
        data_dir: Path, tracer_provider: TracerProvider | None = None, **settings: object
    ) -> Iterator[TestClient]:
        app = create_app(Settings(**{**folders.settings(data_dir), **settings}), tracer_provider=tracer_provider)
        with TestClient(app, ADDRESS, raise_server_exceptions=False) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200 or bool(app.state.service.failure))
            assert app.state.service.failure is None
            yield client

    return serve


@pytest.fixture(scope="session")
def shared(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serve(tmp_path_factory.mktemp("data")) as client:
        yield client


@pytest.fixture(scope="session")
def listening(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FastAPI]]:
    """The URL of an application on a real socket, and the application. Its limits are small, and no test edits it."""
    settings = Settings(
        **folders.settings(tmp_path_factory.mktemp("data")), max_generations=4, max_queue=2, max_new_tokens=200
    )
    with on_socket(create_app(settings)) as (url, app, _server):
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        yield url, app


@contextmanager
def on_socket(app: FastAPI, lifespan: str = "on") -> Iterator[tuple[str, FastAPI, uvicorn.Server]]:
    """Serve an application as `mend serve` does, in a thread of its own. lifespan: `off` for nothing to be loaded."""
    socket = create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10, lifespan=lifespan))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", app, server
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


@contextmanager
def slowed(engine: Engine, seconds: float = 0.02) -> Iterator[list[int]]:
    """Every pass of the live model takes a while. The rows of each pass are noted."""
    rows: list[int] = []

    def slow(_module: object, _args: object, told: dict, _output: object) -> None:
        rows.append(len(told["input_ids"]))
        time.sleep(seconds)

    handle = engine.weights.live.model.register_forward_hook(slow, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.fixture
def client(shared: TestClient) -> TestClient:
    """A client of the application that all tests share, with no edit active. Its revision is not 0."""
    for edit in engine_of(shared).history.all_active():
        engine_of(shared).rollback(edit.id)
    return shared


@pytest.fixture
def fresh(serve: Serve, tmp_path: Path) -> Iterator[TestClient]:
    """A client of an application of its own, at revision 0."""
    with serve(tmp_path / "data") as client:
        yield client
