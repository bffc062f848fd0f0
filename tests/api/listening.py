"""A client that listens to `/events` over a real socket, and notes what it is told and when."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Told:
    name: str
    data: dict
    id: str | None
    at: float


@dataclass
class Ear:
    """What it was told so far. ended: when the stream was over."""

    told: list[Told] = field(default_factory=list)
    comments: int = 0
    ended: float | None = None

    def of(self, name: str) -> list[dict]:
        return [each.data for each in list(self.told) if each.name == name]

    def until(self, condition: Callable[[Ear], object], within_s: float = 20) -> None:
        """Wait until something has been told."""
        deadline = time.monotonic() + within_s
        while not condition(self):
            assert time.monotonic() < deadline, f"not told in time; but {self.told}"
            time.sleep(0.01)

    def read(self, answer: httpx.Response) -> None:
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                data = json.loads(fields["data"])
                self.told.append(Told(fields["event"], data, fields.get("id"), time.monotonic()))
                fields = {}


@contextmanager
def listening(url: str, **headers: str) -> Iterator[Ear]:
    """Somebody who listens, in a thread of his own; he leaves at the end."""
    ear = Ear()
    with httpx.Client(timeout=60, headers=headers) as client, client.stream("GET", f"{url}/events") as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")

        def listen() -> None:
            with suppress(httpx.HTTPError, httpx.StreamError, OSError):  # as it leaves
                ear.read(answer)
            ear.ended = time.monotonic()

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield ear
        finally:
            close(answer)
            thread.join(10)


def close(answer: httpx.Response) -> None:
    """Cut the connection, also under a thread that reads from it."""
    with suppress(OSError):
        answer.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
