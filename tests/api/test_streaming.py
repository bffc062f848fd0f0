"""Generation over real sockets: server-sent events, limits, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request

from editors.continuation import Piece
from service.api.answering import streamed
from service.api.generation import _Frames
from service.app import create_app
from service.engine import Said, Sampling, Ticket
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import on_socket, slowed, wait_until

PROMPT = "The capital of France is"
LONG = {"prompt": PROMPT, "max_new_tokens": 200, "temperature": 2.0, "seed": 1}
"""Goes on for long, since nothing ends it soon."""


@pytest.fixture
def url(listening):
    return listening[0]


@pytest.fixture
def engine(listening):
    engine = listening[1].state.service.ready_engine()
    yield engine
    wait_until(lambda: not engine._generator._strands, within_s=20)


def events(answer: httpx.Response) -> list[tuple[str, dict]]:
    """Read as the format says: fields by line, an event ends at an empty line."""
    told = []
    for block in answer.read().decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            told.append((fields["event"], json.loads(fields["data"])))
    return told


def ask(url: str, **body) -> tuple[httpx.Response, list[tuple[str, dict]]]:
    with httpx.stream("POST", f"{url}/generate", json={"stream": True, **body}, timeout=30) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return answer, events(answer)


class TestEvents:
    @pytest.mark.parametrize(
        "asked",
        [
            {"prompt": PROMPT},
            {"prompt": PROMPT, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 5, "max_new_tokens": 60},
            {"prompt": PROMPT, "view": "base", "stop": ["a"], "max_new_tokens": 40},
            {"messages": [{"role": "user", "content": "Which city?"}], "repetition_penalty": 1.5},
        ],
    )
    def test_are_the_whole_answer_in_pieces(self, url, asked):
        whole = httpx.post(f"{url}/generate", json=asked)
        answer, told = ask(url, **asked)
        *tokens, (last, done) = told
        assert {name for name, _ in tokens} == {"token"}
        assert last == "done"
        assert done == whole.json()
        assert "".join(piece["text"] for _, piece in tokens) == done["text"]
        assert all(piece["view"] == done["view"] for _, piece in tokens)
        assert tokens[0][1]["revision"] == done["revision"]
        assert answer.headers["etag"] == whole.headers["etag"] == f'"{done["revision"]}"'
        assert len(tokens) > 1

    def test_of_both_views_are_labelled(self, url):
        asked = {"prompt": PROMPT, "view": "both", "logprobs": 1}
        whole = httpx.post(f"{url}/generate", json=asked).json()
        _, (*tokens, (_, done)) = ask(url, **asked)
        for view in ("live", "base"):
            pieces = [piece for _, piece in tokens if piece["view"] == view]
            assert "".join(piece["text"] for piece in pieces) == whole[view]["text"]
            assert [token for piece in pieces for token in piece["logprobs"]] == whole[view].pop("logprobs")
        assert done == whole

    def test_by_get_are_the_same(self, url):
        query = {"prompt": PROMPT, "stream": True, "stop": ["q", "zz"]}
        with httpx.stream("GET", f"{url}/generate", params=query) as answer:
            assert events(answer) == ask(url, prompt=PROMPT, stop=["q", "zz"])[1]

    def test_come_while_the_text_is_written(self, url, engine):
        with slowed(engine, 0.05), httpx.stream("POST", f"{url}/generate", json={**LONG, "stream": True}) as answer:
            start = time.monotonic()
            first = next(answer.iter_bytes())
            assert first.startswith(b"event: token")
            assert time.monotonic() - start < 2

    @pytest.mark.parametrize(
        ("asked", "code"),
        [
            ({"prompt": PROMPT, "max_new_tokens": 10**6}, "text_too_long"),
            ({"prompt": PROMPT * 1000}, "text_too_long"),
            ({"prompt": PROMPT, "min_revision": 99, "wait_ms": 0}, "revision_not_reached"),
            ({"messages": [{"role": "user", "content": "x"}], "prompt": PROMPT}, "invalid_request"),
        ],
    )
    def test_are_a_problem_with_its_status_before_the_first(self, url, asked, code):
        assert_problem(httpx.post(f"{url}/generate", json={"stream": True, **asked}), code)

    def test_end_with_the_problem_that_came_later(self, url, engine):
        passes = []

        def fail(_module, _args, _output):
            passes.append(1)
            if len(passes) > 4:
                raise RuntimeError("worn out")

        handle = engine.weights.live.model.register_forward_hook(fail)
        try:
            _, told = ask(url, **LONG)
        finally:
            handle.remove()
        assert [name for name, _ in told] == ["token"] * 4 + ["error"]
        problem = told[-1][1]
        assert (problem["code"], problem["status"]) == ("generation_failed", 500)
        assert "RuntimeError, an error on our side" in problem["detail"]


class TestAClientThatLeaves:
    def leave(self, url: str, body: dict, until) -> None:
        """Send a request, wait, and close the connection."""
        address = urlsplit(url)
        raw = json.dumps(body).encode()
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(
                b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw)
            )
            until(connection)

    @pytest.mark.parametrize("stream", [True, False])
    def test_stops_the_decoding_within_a_token_or_so(self, url, engine, stream):
        with slowed(engine) as rows:
            self.leave(url, {**LONG, "stream": stream}, lambda _: wait_until(lambda: len(rows) > 3, within_s=10))
            left_at = len(rows)
            wait_until(lambda: not engine._generator._strands, within_s=1)
            time.sleep(0.2)
            assert len(rows) <= left_at + 3
        assert not engine.weights._readers

    def test_does_not_stop_the_others(self, url, engine):
        expected = httpx.post(f"{url}/generate", json={**LONG, "max_new_tokens": 60}).json()
        with slowed(engine, 0.01) as rows, ThreadPoolExecutor(1) as pool:
            other = pool.submit(httpx.post, f"{url}/generate", json={**LONG, "max_new_tokens": 60})
            self.leave(url, {**LONG, "stream": True}, lambda _: wait_until(lambda: 2 in rows))
            assert other.result().json() == expected
        assert max(rows) == 2

    def test_gives_up_its_place_in_the_queue(self, url, engine):
        with slowed(engine) as rows:
            running = [
                threading.Thread(target=self.leave, args=(url, LONG, lambda _: time.sleep(0.5))) for _ in range(4)
            ]
            for each in running:
                each.start()
            wait_until(lambda: rows and max(rows) == 4, within_s=10)
            self.leave(url, LONG, lambda _: wait_until(lambda: len(engine._generator._queue) == 1, within_s=5))
            wait_until(lambda: not engine._generator._queue, within_s=1)
            assert max(rows) == 4
            for each in running:
                each.join()


class TestLimits:
    def test_beyond_the_queue_is_busy(self, url, engine):
        with slowed(engine), ThreadPoolExecutor(8) as pool:
            body = {**LONG, "max_new_tokens": 12}
            asked = [pool.submit(httpx.post, f"{url}/generate", json=body, timeout=30) for _ in range(6)]
            wait_until(lambda: len(engine._generator._strands) == 6, within_s=10)
            for stream in (True, False):
                assert_problem(httpx.post(f"{url}/generate", json={**body, "stream": stream}), "busy")
            assert_problem(httpx.post(f"{url}/generate", json={**body, "view": "both"}), "busy")
            answers = [each.result() for each in asked]
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1

    def test_of_time_end_a_text_as_timeout(self, url, engine, monkeypatch):
        whole, _ = engine.generate(PROMPT, 200, sampling=Sampling(2.0, seed=1))
        monkeypatch.setattr(engine._generator, "_limits", replace(engine.limits, generation_s=0.2))
        with slowed(engine):
            said = httpx.post(f"{url}/generate", json=LONG).json()
            _, told = ask(url, **LONG)
        assert said["finish_reason"] == told[-1][1]["finish_reason"] == "timeout"
        assert said["text"]
        assert whole.text.startswith(said["text"])

    def test_of_time_refuse_what_did_not_get_a_place(self, url, engine, monkeypatch):
        monkeypatch.setattr(engine._generator, "_limits", replace(engine.limits, generation_s=0.3, together=1))
        with slowed(engine):
            answer = httpx.post(f"{url}/generate", json={**LONG, "view": "both"})
        assert_problem(answer, "generation_timeout")

    def test_a_stop_of_the_service_ends_streams_in_order(self, folders, tmp_path):
        with on_socket(create_app(Settings(**folders.settings(tmp_path)))) as (url, app, server):
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            engine = app.state.service.ready_engine()
            with slowed(engine, 0.03), ThreadPoolExecutor(1) as pool:
                streaming = pool.submit(ask, url, **LONG)
                wait_until(lambda: engine._generator._batches, within_s=10)
                app.state.service.drain(0.3)
                server.should_exit = True
                start = time.monotonic()
                _, told = streaming.result()
                assert time.monotonic() - start < 2
        assert told[-1][0] == "done"
        assert told[-1][1]["finish_reason"] == "timeout"


def test_a_client_that_leaves_just_before_its_stream_is_no_error_of_ours(listening, caplog):
    engine = listening[1].state.service.ready_engine()

    async def left() -> list[bytes]:
        loop, leaves = asyncio.get_running_loop(), asyncio.Event()

        async def receive() -> dict:
            await leaves.wait()
            return {"type": "http.disconnect"}

        def begin(tell) -> Ticket:
            """As the engine's, but for what comes to pass before it returns: a piece, and then the client leaves."""
            ticket = Ticket(1, tell, time.monotonic() + 10)
            ticket.published = engine.published
            ticket.tell(Said(0, Piece("a piece")))
            loop.call_soon_threadsafe(leaves.set)
            time.sleep(0.05)
            return ticket

        stream = await streamed(Request({"type": "http"}, receive), begin, lambda at: _Frames(("live",), at, False))
        return [frame async for frame in stream.body_iterator]

    with caplog.at_level(logging.INFO):
        (frame,) = asyncio.run(left())
    assert b"a piece" in frame
    assert not caplog.records
