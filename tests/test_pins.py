"""What `make lint` says of the pins: by a service that speaks as osv.dev does, and without one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "docker" / "audit.py"
FLAW = {
    "id": "GHSA-flaw",
    "affected": [
        {
            "package": {"name": "idna", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.99"}]}],
        }
    ],
}


@pytest.fixture
def service() -> Iterator[str]:
    """It knows of one flaw, in idna 3.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            flawed = (asked["package"]["name"], asked["version"]) == ("idna", "3.1")
            body = json.dumps({"vulns": [FLAW]} if flawed else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audited(pins: Path, url: str) -> tuple[int, str]:
    command = [sys.executable, str(AUDIT), "--pins", str(pins), "--osv-url", url]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert not ended.stderr
    return ended.returncode, ended.stdout


@pytest.mark.parametrize(("pin", "status", "says"), [
    ("idna==3.1", 1, "audit: idna 3.1 has GHSA-flaw; fixed in 3.99\naudit: 1 of 2 pins are known to be vulnerable"),
    ("idna==3.20", 0, "audit: nothing is known against 2 of 2 pins"),
])  # fmt: skip
def test_a_known_flaw_and_nothing_else_is_an_error(service, tmp_path, pin, status, says):
    pins = tmp_path / "pins.txt"
    pins.write_text(f"# by hand\n{pin}\nsix==1.17.0\n")
    ended, told = audited(pins, service)
    assert (ended, says in told) == (status, True), told


def test_a_service_that_cannot_be_reached_is_said_and_no_error(tmp_path):
    pins = tmp_path / "pins.txt"
    pins.write_text("idna==3.1\n")
    ended, told = audited(pins, "http://127.0.0.1:9/v1/query")
    assert ended == 0
    assert "NOT CHECKED: none of 1 pins" in told
