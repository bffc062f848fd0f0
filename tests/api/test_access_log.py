"""Every request has an id, and is told of once it is over: over the real application, and over real sockets."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client import generate_latest

from service import logs
from service.api import problems
from service.api.access_log import AccessMiddleware
from service.failpoints import arm
from service.telemetry import Telemetry
from tests.api.answers import assert_problem
from tests.api.conftest import wait_until

SECRET = "swordfish"


@contextmanager
def logged(level: int = logging.DEBUG) -> Iterator[Callable[[], list[dict]]]:
    """What is logged inside, as JSON; asked for while it goes on."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("json"))
    mend, server = logging.getLogger("mend"), logging.getLogger("uvicorn.error")
    before = mend.level
    mend.setLevel(level)
    for each in (mend, server):
        each.addHandler(handler)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        mend.setLevel(before)
        for each in (mend, server):
            each.removeHandler(handler)


@pytest.fixture
def log() -> Iterator[Callable[[], list[dict]]]:
    with logged() as log:
        yield log


def requests(log: Callable[[], list[dict]]) -> list[dict]:
    return [line for line in log() if line["logger"] == "mend.access"]


class TestRequestId:
    @pytest.mark.parametrize("given", ["a", "req_1.2:3/4+5=6@7-8", "x" * 128])
    def test_is_the_clients(self, client, given):
        assert client.get("/revision", headers={"X-Request-Id": given}).headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a","level":"error', "a\tb", "ä".encode(), b"a\xff"])
    def test_is_made_where_the_clients_may_not_stand_in_a_log(self, client, given, log):
        made = client.get("/revision", headers={"X-Request-Id": given}).headers["x-request-id"]
        assert len(made) == 32
        assert made.isalnum()
        assert [line["request_id"] for line in requests(log)] == [made]

    def test_is_another_one_every_time(self, client):
        assert len({client.get("/livez").headers["x-request-id"] for _ in range(3)}) == 3

    @pytest.mark.parametrize(
        ("method", "path", "body", "code"),
        [
            ("GET", "/nothing", b"", "not_found"),
            ("GET", "/edits/edit_1", b"", "edit_not_found"),
            ("PUT", "/edits", b"", "method_not_allowed"),
            ("GET", "/generate?prompt=%ff", b"", "invalid_utf8"),
            ("POST", "/edits", b"{", "malformed_body"),
            ("POST", "/edits", b"{}", "invalid_request"),
            ("POST", "/edits", b" " * 2_000_001, "body_too_large"),
        ],
    )
    def test_is_in_every_problem(self, client, method, path, body, code):
        headers = {"X-Request-Id": "mine", "Content-Type": "application/json"}
        answer = client.request(method, path, content=body, headers=headers)
        assert assert_problem(answer, code)["request_id"] == answer.headers["x-request-id"] == "mine"

    def test_is_in_no_other_body(self, client):
        assert "request_id" not in client.get("/revision").json()

    def test_is_in_what_is_logged_of_an_error_on_our_side(self, client, bodies, log):
        arm("append=error")
        try:
            answer = client.post("/edits", json=bodies[0], headers={"X-Request-Id": "mine"})
        finally:
            arm("")
        assert assert_problem(answer, "internal_error")["request_id"] == answer.headers["x-request-id"] == "mine"
        error, request = (line for line in log() if "request_id" in line and line["logger"] != "mend.audit")
        assert (error["level"], error["request_id"]) == ("error", "mine")
        assert "service.failpoints.Failed: " in error["exception"]
        assert (request["status"], request["code"]) == (500, "internal_error")

    def test_is_in_what_a_batch_logs_in_a_thread_of_its_own(self, client, bodies, log):
        arm("append=error")
        try:
            line = json.dumps(bodies[0])
            headers = {"X-Request-Id": "mine", "Content-Type": "application/x-ndjson"}
            answer = client.post("/edits/batch", content=line, headers=headers)
        finally:
            arm("")
        *_, last = map(json.loads, answer.text.splitlines())
        assert (last["problem"]["code"], last["problem"]["request_id"]) == ("internal_error", "mine")
        error, request = (line for line in log() if "request_id" in line and line["logger"] != "mend.audit")
        assert {error["request_id"], request["request_id"]} == {"mine"}
        assert (request["status"], request["code"]) == (200, "internal_error")


class TestLine:
    def test_says_what_was_asked_of_which_route_and_what_it_came_to(self, client, log):
        client.get("/edits/edit_1", headers={"X-Request-Id": "mine"})
        (line,) = requests(log)
        assert line.pop("duration_ms") > 0
        assert line.pop("timestamp").endswith("Z")
        assert line == {
            "level": "info", "logger": "mend.access", "event": "request", "request_id": "mine",
            "method": "GET", "route": "/edits/{edit_id}", "status": 404, "code": "edit_not_found",
        }  # fmt: skip

    def test_has_nothing_of_what_was_asked(self, client, log):
        client.get("/generate", params={"prompt": SECRET, "max_new_tokens": 1})
        client.post("/generate", json={"prompt": SECRET, "max_new_tokens": 1})
        client.get(f"/edits/{SECRET}")
        client.get(f"/{SECRET}")
        client.get(f"/edits?q={SECRET}")
        assert len(requests(log)) == 5
        assert SECRET not in json.dumps(log())

    @pytest.mark.parametrize("probe", ["/livez", "/readyz", "/metrics"])
    def test_of_a_probe_is_for_those_who_look_for_mistakes(self, client, probe):
        with logged() as everything:
            client.get(probe)
        with logged(logging.INFO) as as_always:
            client.get(probe)
        (line,) = everything()
        assert (line["level"], line["route"]) == ("debug", probe)
        assert as_always() == []


class Sockets:
    """An application of a few routes behind the same layer, served by uvicorn."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.go_on, self.waiting = threading.Event(), threading.Event()
        app = FastAPI()

        @app.get("/stream")
        def stream() -> StreamingResponse:
            return StreamingResponse(self.pieces())

        @app.get("/slow")
        def slow() -> str:
            self.waiting.set()
            self.go_on.wait(60)
            logging.getLogger("mend").info("still at it")
            return "done"

        @app.get("/breaks")
        def breaks() -> StreamingResponse:
            return StreamingResponse(broken())

        @app.get("/who")
        def who(request: Request) -> str:
            request.state.principal = "alice"
            return "alice"

        @app.post("/reads")
        async def reads(request: Request) -> int:
            return len(await request.body())

        problems.install(app)
        app.add_middleware(AccessMiddleware, telemetry=self.telemetry)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, args=([self._listening],))

    def pieces(self) -> Iterator[bytes]:
        yield b"first"
        self.waiting.set()
        self.go_on.wait(60)
        yield b"second"

    def told(self, status: int) -> list[str]:
        text = generate_latest(self.telemetry.registry).decode()
        return [line for line in text.splitlines() if f'status="{status}"' in line]


def broken() -> Iterator[bytes]:
    yield b"first"
    raise RuntimeError("no second")


@pytest.fixture(scope="module")
def module_sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    sockets.thread.start()
    wait_until(lambda: sockets.server.started)
    yield sockets
    sockets.server.should_exit = True
    sockets.thread.join()


@pytest.fixture
def sockets(module_sockets) -> Sockets:
    module_sockets.go_on.clear()
    module_sockets.waiting.clear()
    return module_sockets


@pytest.fixture
def http(sockets) -> Iterator[httpx.Client]:
    with httpx.Client(base_url="http://{}:{}".format(*sockets.address), trust_env=False, timeout=60) as http:
        yield http


class TestOverSockets:
    def test_a_stream_stays_one_and_lasts_until_its_last_byte(self, sockets, http, log):
        with http.stream("GET", "/stream") as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b"first"
            assert answer.headers["x-request-id"]
            sockets.waiting.wait(60)
            assert requests(log) == []
            threading.Timer(0.2, sockets.go_on.set).start()
            assert list(pieces) == [b"second"]
        wait_until(lambda: bool(requests(log)))
        (line,) = requests(log)
        assert (line["status"], line["request_id"]) == (200, answer.headers["x-request-id"])
        assert line["duration_ms"] >= 200

    def test_a_client_that_leaves_a_stream_is_told_as_such(self, sockets, http, log):
        with http.stream("GET", "/stream") as answer:
            next(answer.iter_raw())
        wait_until(lambda: bool(requests(log)))
        sockets.go_on.set()
        assert [(line["route"], line["status"]) for line in requests(log)] == [("/stream", 499)]
        assert sockets.told(499) == ['mend_http_requests_total{method="GET",route="/stream",status="499"} 1.0']

    def test_a_client_that_does_not_wait_is_told_as_such(self, sockets, log):
        with socket.create_connection(sockets.address) as gone:
            gone.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: mine\r\n\r\n")
            sockets.waiting.wait(60)
        threading.Timer(0.2, sockets.go_on.set).start()
        wait_until(lambda: bool(requests(log)))
        said, line = log()
        assert (said["event"], said["request_id"]) == ("still at it", "mine")
        assert (line["route"], line["status"], line["request_id"]) == ("/slow", 499, "mine")

    def test_a_client_that_leaves_before_it_has_sent_all_is_told_as_such(self, sockets, log):
        with socket.create_connection(sockets.address) as gone:
            gone.sendall(b"POST /reads HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nhalf")
        wait_until(lambda: bool(requests(log)))
        assert [(line["route"], line["status"]) for line in log()] == [("/reads", 499)]

    def test_a_client_that_waits_is_not(self, sockets, http, log):
        sockets.go_on.set()
        assert http.get("/slow").json() == "done"
        assert http.post("/reads", content=b"all of it").json() == 9
        wait_until(lambda: len(requests(log)) == 2)
        assert [line["status"] for line in requests(log)] == [200, 200]

    def test_what_breaks_behind_its_beginning_is_cut_and_logged(self, sockets, http, log):
        with pytest.raises(httpx.RemoteProtocolError), http.stream("GET", "/breaks") as answer:
            for _ in answer.iter_raw():
                pass
        wait_until(lambda: any("exception" in line for line in log()))
        (error,) = [line for line in log() if "exception" in line]
        assert "no second" in error["exception"]
        assert {line["request_id"] for line in log()} == {answer.headers["x-request-id"]}

    def test_who_asked_is_told_where_it_is_known(self, sockets, http, log):
        http.get("/who")
        wait_until(lambda: bool(requests(log)))
        assert [line["who"] for line in requests(log)] == ["alice"]
