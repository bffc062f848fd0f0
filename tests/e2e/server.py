"""A real server process, as `make serve` starts it, driven over real HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_WITHIN_S = 240


class Server:
    """`mend serve` on a free port. environment: MEND_… settings on top of the test's own."""

    def __init__(self, data_dir: Path, log: Path, **environment: str) -> None:
        self._log = log
        settings = {"MEND_DATA_DIR": str(data_dir), "MEND_PORT": "0", **environment}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from service.cli import main; main()", "serve"],
                env={**os.environ, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.client = httpx.Client(base_url=self._address(), timeout=120)
        self._await_ready()

    def _address(self) -> str:
        return self._await(lambda: next(iter(_after("listening on ", self._log.read_text())), None))

    def _await_ready(self) -> None:
        self._await(lambda: self._is_ready() or None)

    def _is_ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _await(self, condition):
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            found = condition()
            if found is not None:
                return found
            assert self.process.poll() is None, f"the server ended:\n{self._log.read_text()}"
            time.sleep(0.1)
        raise AssertionError(f"not ready in {READY_WITHIN_S} s:\n{self._log.read_text()}")

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.client.close()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.terminate()
        status = self.process.wait(timeout=60)
        self.client.close()
        return status

    def get(self, path: str, **query: object) -> dict:
        answer = self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()


def _after(mark: str, text: str) -> Iterator[str]:
    for line in text.splitlines():
        if mark in line:
            yield line.split(mark, 1)[1].split(";", 1)[0].strip()


@contextmanager
def serving(data_dir: Path, log: Path, **environment: str) -> Iterator[Server]:
    """A server that is gone at the end, however the test ended."""
    server = Server(data_dir, log, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
