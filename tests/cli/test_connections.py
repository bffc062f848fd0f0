"""Connections by hand, to a real server: slow ones, too many, and what is no request. No model is loaded behind it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from service.app import create_app
from service.cli.connections import SPARE, protocol
from service.settings import Settings

WITHIN_S = 0.4
"""Time that a request has to arrive."""
MOST = 8
"""Connections at once."""
BIG = 50_000_000


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["x-content-type-options"] == "nosniff"
        assert self.headers["content-security-policy"].startswith("default-src 'none'")
        body = json.loads(self.body)
        assert body["status"] == self.status
        return body


class Line:
    """A connection, to say anything at all over."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def say(self, text: str | bytes) -> Line:
        self.socket.sendall(text.encode() if isinstance(text, str) else text)
        return self

    def hear(self) -> Answer | None:
        """One answer; None if the connection was closed instead."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            try:
                piece = self.socket.recv(1)
            except ConnectionResetError:
                piece = b""
            if not piece:
                assert not head
                return None
            head += piece
        first, *lines = head.decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = b""
        while len(body) < int(headers["content-length"]):
            body += self.socket.recv(65536)
        return Answer(int(first.split()[1]), headers, body)

    def closed_after_s(self, within_s: float = 5) -> float:
        start = time.monotonic()
        self.socket.settimeout(within_s)
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(65536):
                pass
        return time.monotonic() - start


Connect = Callable[[], Line]


@contextlib.contextmanager
def listening(app: FastAPI, within_s: float = WITHIN_S, most: int = MOST) -> Iterator[Connect]:
    with socket.create_server(("127.0.0.1", 0)) as bound, contextlib.ExitStack() as stack:
        config = uvicorn.Config(
            app, http=protocol(within_s, most), lifespan="off", log_level="error", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()

        def connect() -> Line:
            line = Line(bound.getsockname()[1])
            stack.callback(line.socket.close)
            return line

        try:
            while not server.started:
                time.sleep(0.01)
            yield connect
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = create_app(Settings(request_timeout_s=WITHIN_S, max_batch=1))

    @app.get("/big")
    def big() -> StreamingResponse:
        return StreamingResponse(iter([b"x" * 65536] * (BIG // 65536)))

    return app


@pytest.fixture(scope="module")
def server(app: FastAPI) -> Iterator[Connect]:
    with listening(app) as connect:
        yield connect


@pytest.fixture
def connect(server: Connect) -> Connect:
    """To a server that nobody else is connected to."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError):
            answer = server().say(GET.replace("livez", "model")).hear()
            if answer and answer.problem["code"] != "busy":
                return server
        time.sleep(0.05)
    raise AssertionError("connections of another test are still there")


GET = "GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
KEPT = "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class TestSlow:
    def dripped(self, line: Line, text: str, every_s: float = 0.05) -> Answer | None:
        """What is answered to somebody who never ends, but never rests."""
        for character in text:
            try:
                line.say(character)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(every_s)
        return line.hear()

    def test_headers_are_ended(self, connect):
        start = time.monotonic()
        answer = self.dripped(connect(), GET[:12] + "x" * 8)
        assert (answer.status, answer.problem["code"]) == (408, "request_timeout")
        assert "MEND_REQUEST_TIMEOUT_S" in answer.problem["detail"]
        assert answer.headers["connection"] == "close"
        assert WITHIN_S <= time.monotonic() - start < 3 * WITHIN_S + 1

    def test_headers_that_stop_are_ended(self, connect):
        line = connect().say("GET /livez HTTP/1.1\r\nHost: local")
        assert line.hear().problem["code"] == "request_timeout"
        assert line.hear() is None

    @pytest.mark.parametrize(
        ("path", "length"),
        [("/edits", "Content-Length: 1000"), ("/edits/batch", "Content-Length: 1000"),
         ("/generate", "Transfer-Encoding: chunked")],
    )  # fmt: skip
    def test_bodies_are_ended(self, connect, path, length):
        begun = '{"prompt":' if "Content" in length else '5\r\n{"pro\r\n'
        line = connect().say(f"{POST}{length}\r\n\r\n{begun}".replace("/generate", path))
        answer = line.hear()
        assert (answer.status, answer.problem["code"]) == (408, "request_timeout")
        assert line.hear() is None

    def test_bodies_of_who_is_refused_anyway_are_not_waited_for_forever(self, connect):
        line = connect().say(f"{POST.replace('localhost', 'evil.example')}Content-Length: 1000\r\n\r\n")
        assert line.hear().problem["code"] == "host_not_allowed"
        for _ in range(4):  # goes on to send, which alone would keep the connection
            line.say("x")
            time.sleep(WITHIN_S / 4)
        assert line.closed_after_s() < 2 * WITHIN_S

    def test_beginnings_are_ended_in_silence(self, connect):
        line = connect()
        assert WITHIN_S / 2 < line.closed_after_s() < WITHIN_S + 2

    def test_pauses_between_requests_are_not(self, connect):
        line = connect()
        for _ in range(3):
            assert line.say(KEPT).hear().status == 200
            time.sleep(1.2 * WITHIN_S)

    def test_requests_in_pieces_are_answered_where_they_are_in_time(self, connect):
        line = connect()
        for piece in (KEPT[:10], KEPT[10:30], KEPT[30:]):
            line.say(piece)
            time.sleep(WITHIN_S / 10)
        assert line.hear().status == 200
        body = b'{"prompt": "The"}'
        line.say(f"{POST}Content-Length: {len(body)}\r\n\r\n")
        time.sleep(WITHIN_S / 4)
        assert line.say(body).hear().problem["code"] == "not_ready"

    def test_readers_are_cut_off(self, connect):
        line = connect()
        line.say("GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3 * WITHIN_S)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := line.socket.recv(65536):
                got += len(piece)
        assert 0 < got < BIG

    def test_hold_nobody_else_up(self, connect):
        slow = [connect().say(GET[:20]) for _ in range(MOST - 2)]
        start = time.monotonic()
        assert connect().say(GET).hear().status == 200
        assert time.monotonic() - start < WITHIN_S
        assert all(line.hear().status == 408 for line in slow)


class TestTooMany:
    @pytest.fixture
    def full(self, connect: Connect) -> list[Line]:
        """As many connections as there may be, all of them at work."""
        lines = [connect().say(f"{POST}Content-Length: 10\r\n\r\n") for _ in range(MOST)]
        time.sleep(0.1)
        return lines

    def test_are_told_so(self, connect, full):
        answer = connect().say(GET.replace("livez", "model")).hear()
        assert (answer.status, answer.problem["code"]) == (503, "busy")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["connection"] == "close"

    def test_do_not_hide_the_service_from_probes(self, connect, full):
        assert connect().say(GET).hear().status == 200

    def test_beyond_all_measure_are_cut(self, connect, full):
        lines = [connect() for _ in range(SPARE + 5)]
        time.sleep(0.2)
        cut = [line for line in lines if self.is_cut(line)]
        assert len(cut) == 5

    def is_cut(self, line: Line) -> bool:
        line.socket.setblocking(False)
        try:
            return line.socket.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def test_are_forgotten_when_they_are_gone(self, connect, full):
        for line in full:
            line.socket.close()
        time.sleep(0.1)
        assert connect().say(GET.replace("livez", "model")).hear().problem["code"] == "not_ready"


class TestNoRequest:
    @pytest.mark.parametrize(
        "text", ["hello\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "GET / HTTP/1.1\r\n\r\n",
                 "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", f"{POST}Content-Length: -1\r\n\r\n"],
    )  # fmt: skip
    def test_is_a_problem(self, connect, text):
        line = connect().say(text)
        assert line.hear().problem["code"] == "malformed_request"
        assert line.hear() is None

    def test_of_headers_without_end_is_one_too(self, connect):
        for text in (f"GET /generate?prompt={'a' * 20_000}", f"{KEPT[:-2]}X-Long: {'a' * 20_000}"):
            answer = connect().say(text).hear()
            assert (answer.status, answer.problem["code"]) == (431, "headers_too_large")

    def test_after_its_answer_has_begun_just_ends(self, connect):
        line = connect().say("GET /big HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        line.socket.recv(100)
        line.say("xxxxxhello\r\n\r\n")
        assert line.closed_after_s(10) < 5


class TestBodies:
    def test_beyond_the_bound_are_refused_though_nothing_says_their_length(self, connect):
        line = connect().say(f"{POST}Transfer-Encoding: chunked\r\n\r\n")
        chunk = f"{100_000:x}\r\n{' ' * 100_000}\r\n"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(21):
                line.say(chunk)
        assert line.hear().problem["code"] == "body_too_large"

    def test_that_say_so_are_refused_at_once(self, connect):
        for path in ("/generate", "/edits", "/edits/batch"):
            line = connect().say(f"{POST}Content-Length: 2000001\r\n\r\n".replace("/generate", path))
            assert line.hear().problem["code"] == "body_too_large"

    def test_whose_sender_goes_away_are_no_error_of_ours(self, connect, caplog):
        for path in ("/generate", "/edits/batch"):
            connect().say(f"{POST}Content-Length: 1000\r\n\r\n{{".replace("/generate", path)).socket.close()
        assert connect().say(GET).hear().status == 200
        time.sleep(0.1)
        assert "unexpected" not in caplog.text
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
