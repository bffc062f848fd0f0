"""What people write is not in the log, whatever becomes of it; unless it is asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from copy import copy

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from service.app import create_app
from service.confidential import log_prompts, note_texts, told
from service.logs import formatter
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import ADDRESS, engine_of, wait_until
from tests.service_fixtures import never_takes

MARKER = "Xanadu marker"
OF_THE_CLIENT = ("httpx", "httpcore")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything that is logged, at every level."""
    with caplog.at_level(logging.DEBUG):
        yield caplog


@pytest.fixture
def asked() -> Iterator[None]:
    log_prompts(True)
    yield
    log_prompts(False)


def logged(log: pytest.LogCaptureFixture) -> str:
    """As `mend serve` prints it, in both forms."""
    records = [record for record in log.records if not record.name.startswith(OF_THE_CLIENT)]
    return "\n".join(formatter(form).format(copy(record)) for form in ("text", "json") for record in records)


def talk(client: TestClient, bodies: tuple[dict, ...]) -> list[str]:
    """Every way to say something. Returns what was said."""
    made = client.post("/edits", json={**bodies[0], "reason": f"r{MARKER}"}).json()
    refused = {"prompt": f"{MARKER} is", "correction": never_takes().correction}
    assert client.post("/edits", json=refused).json()["code"] == "did_not_take"
    lines = "\n".join(json.dumps(body) for body in (bodies[1], refused))
    assert "batch_refused" in client.post("/edits/batch", content=lines, headers={
        "content-type": "application/x-ndjson"}).text  # fmt: skip
    answer = client.get("/generate", params={"prompt": f"{MARKER} in", "view": "both"}).json()
    model = client.get("/v1/models").json()["data"][0]["id"]
    client.post("/v1/completions", json={"model": model, "prompt": f"{MARKER} by", "max_tokens": 2})
    client.post("/v1/completions", json={"model": MARKER, "prompt": MARKER})
    client.get("/generate", params={"prompt": f"{MARKER} as", "stream": True})
    client.post("/generate", json={"prompt": f"{MARKER} of"})
    client.post("/generate", json={"prompt": f"{MARKER} as", "no such field": MARKER})
    client.post("/generate", content=f'{{"prompt": "{MARKER} broken', headers={"content-type": "application/json"})
    client.get("/edits", params={"q": MARKER})
    client.get(f"/edits/{MARKER}")
    client.get(f"/{MARKER}")
    client.get("/edits/audit", params={"fresh": True})
    client.delete(f"/edits/{made['id']}", params={"reason": f"gone {MARKER}"})
    return [MARKER, bodies[0]["prompt"], bodies[0]["correction"].strip(), refused["correction"], answer["live"]["text"]]


def test_nothing_that_was_said_is_in_the_log(client, bodies, log):
    said = talk(client, bodies)
    text = logged(log)
    assert "mend.audit" in text
    assert [each for each in said if each in text] == []


def test_it_is_there_where_it_is_asked_for(client, bodies, log, asked):
    talk(client, bodies)
    noted = {record.getMessage(): record for record in log.records if record.name == "mend.prompts"}
    assert set(noted) == {"edit", "batch", "generate", "answer"}
    assert noted["edit"].prompt == f"{MARKER} is"
    assert noted["batch"].edits[1]["prompt"] == f"{MARKER} is"
    assert noted["generate"].prompt == f"{MARKER} of"
    assert noted["answer"].text
    assert f"{MARKER} of" in logged(log)


@pytest.mark.parametrize("wanted", [False, True])
def test_the_setting_is_what_asks_for_it(log, wanted):
    create_app(Settings(log_prompts=wanted))
    note_texts("edit", prompt=MARKER)
    log_prompts(False)
    assert (MARKER in logged(log)) == wanted


class TestErrorsOfOurs:
    @pytest.fixture
    def app(self) -> FastAPI:
        app = create_app(Settings())

        @app.get("/broken")
        def broken(prompt: str) -> None:
            try:
                raise KeyError(prompt)
            except KeyError as error:
                raise RuntimeError(f"no {prompt}") from error

        @app.get("/invalid")
        def invalid(prompt: str) -> None:
            class Number(BaseModel):
                number: int

            Number(number=prompt)

        return app

    @pytest.mark.parametrize("path", ["/broken", "/invalid"])
    def test_are_logged_by_their_lines_of_code_alone(self, app, log, path):
        client = TestClient(app, ADDRESS)
        assert client.get(path, params={"prompt": MARKER}).json()["code"] == "internal_error"
        text = logged(log)
        assert MARKER not in text
        assert "Traceback" in text  # by which the faults' harness knows a mistake
        assert "test_confidential.py" in text
        assert ("KeyError: " in text) == ("RuntimeError: " in text) == (path == "/broken")

    def test_are_logged_in_full_where_it_is_asked_for(self, app, log, asked):
        TestClient(app, ADDRESS).get("/broken", params={"prompt": MARKER})
        assert f"RuntimeError: no {MARKER}" in logged(log)

    @pytest.mark.parametrize("path", ["/generate?prompt=The&stream=true", "/generate?prompt=The"])
    def test_while_decoding_are_told_without_what_they_say(self, client, log, path):
        def fail(_module, _args, _output):
            raise RuntimeError(f"no {MARKER}")

        handle = engine_of(client).weights.live.model.register_forward_hook(fail)
        try:
            answer = client.get(path)
        finally:
            handle.remove()
        problem = assert_problem(answer, "generation_failed")
        assert "RuntimeError" in problem["detail"]
        assert MARKER not in answer.text
        assert MARKER not in logged(log)

    def test_of_the_watch_are_told_without_what_they_say(self, client, log, monkeypatch):
        def fail():
            raise LookupError(MARKER)

        with monkeypatch.context() as patch:
            patch.setattr(engine_of(client).ledger, "inspect", fail)
            wait_until(lambda: client.get("/readyz").status_code == 503)
            told = client.get("/readyz").text
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert "LookupError" in told
        assert MARKER not in told + logged(log)

    def test_that_caused_themselves_come_to_an_end(self):
        one, other = ValueError("a"), ValueError("b")
        one.__cause__, other.__cause__ = other, one
        assert told(one).count("ValueError") == 2
