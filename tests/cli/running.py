"""A real service on a small model, commands that ask it, and a proxy between them that misbehaves when told to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from editors.base_model import load_base_model
from service.cli import main
from service.ledger import EmbeddedRedis, RedisLedger
from tests.e2e.server import Server, serving
from tests.service_fixtures import ANSWERS, Folders, find_edits, small_checkpoint, small_engine


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """Why it did nothing: the last line, behind what it was about to do."""
        assert self.status in (1, 4), self
        *_, last = self.err.splitlines()
        assert last.startswith("mend: "), self
        return last.removeprefix("mend: ")


@dataclass(frozen=True)
class Live:
    """A service. edits: bodies of three that take, one after another and in any order."""

    server: Server
    url: str
    edits: tuple[dict, ...]

    def get(self, path: str, **query: object) -> dict:
        return self.server.get(path, **query)

    def active(self) -> list[dict]:
        """The active edits, newest first."""
        return self.get("/edits", status="applied", limit=500)["items"]

    def post(self, body: dict, **query: object) -> dict:
        """An edit that somebody else makes."""
        answer = self.server.client.post("/edits", json=body, params=query)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def clear(self) -> None:
        while active := self.active():
            for edit in active:
                assert self.server.client.delete(f"/edits/{edit['id']}").status_code == 200


@contextmanager
def live_service(folder: Path, **more: str) -> Iterator[Live]:
    """A service on a small model. more: settings, as variables."""
    folders = Folders.write(folder / "model")
    base = load_base_model(str(folders.base_model))
    with EmbeddedRedis(folder / "search") as redis:
        ledger = RedisLedger.connect(redis.url, "edits")
        found = find_edits(small_engine(base, small_checkpoint(folder / "editor", base), ledger))
        ledger.close()
    settings = folders.settings(Path())
    environment = {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}
    with serving(folder / "data", folder / "log", **environment, MEND_AUDIT_EVERY_S="0", **more) as server:
        edits = tuple({"prompt": edit.prompt, "correction": edit.correction} for edit in found)
        yield Live(server, str(server.client.base_url).rstrip("/"), edits)


def run_mend(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """`mend …` in this process, as a shell sees it."""
    monkeypatch.setattr(sys, "argv", ["mend", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert not isinstance(end.value.code, str), end.value.code
    return Ended(end.value.code or 0, out, err)


@dataclass
class Fault:
    """What happens to one request.

    before: called before it is passed on. says: status, headers and body to be answered instead of passing it on.
    passed_on: so much of the answer's body comes through, 0 to 1; None for nothing at all.
    """

    before: Callable[[], object] = lambda: None
    says: tuple[int, dict[str, str], bytes] | None = None
    passed_on: float | None = 1


Mend = Callable[..., Ended]
"""`mend …`, as a shell sees it."""
LOST = Fault(passed_on=None)


@dataclass
class Between:
    """A proxy before a service. The requests to `path` meet the faults, one each, until none is left."""

    service: str
    path: str
    faults: list[Fault]
    url: str = ""
    asked: list[tuple[str, str, httpx.Headers]] = field(default_factory=list)

    @property
    def keys(self) -> list[str | None]:
        """The Idempotency-Keys of the requests to that path, in order."""
        return [headers.get("idempotency-key") for _, path, headers in self.asked if path.startswith(self.path)]


@contextmanager
def between(service: str, path: str, *faults: Fault, port: int = 0) -> Iterator[Between]:
    proxy = Between(service, path, list(faults))

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = httpx.Headers({name: value for name, value in self.headers.items() if name.lower() != "host"})
            body = self.rfile.read(int(headers.get("content-length", 0)))
            proxy.asked.append((self.command, self.path, headers))
            hit = self.path.startswith(path) and proxy.faults
            fault = proxy.faults.pop(0) if hit else Fault()
            fault.before()
            if fault.says is not None:
                self.say(*fault.says)
                return
            answer = httpx.request(
                self.command, service + self.path, content=body, headers=headers, timeout=120, trust_env=False
            )
            if fault.passed_on is not None:
                kept = {name: answer.headers[name] for name in ("content-type", "etag") if name in answer.headers}
                self.say(answer.status_code, kept, answer.content, fault.passed_on)

        def say(self, status: int, headers: dict[str, str], body: bytes, passed_on: float = 1) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: int(passed_on * len(body))])

        do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield proxy
        finally:
            server.shutdown()


def superseding(live: Live, older: dict) -> dict:
    """Another answer to the same prompt."""
    for answer in ANSWERS:
        body = {"prompt": older["prompt"], "correction": f" {answer}"}
        made = live.server.client.post("/edits", json=body, params={"allow_loss": True})
        if made.status_code == 201:
            return made.json()
    raise AssertionError("no other answer takes")
