"""Who listens to a real service, from before it is ready until it stops."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx

from tests.api.conftest import wait_until
from tests.api.listening import listening
from tests.e2e.server import Server
from tests.service_fixtures import ANSWERS, PROMPTS, Folders


def test_a_stream_tells_of_the_start_and_of_an_edit_and_holds_up_no_stop(tmp_path):
    settings = {**Folders.write(tmp_path).settings(tmp_path), "audit_every_s": 0}
    environment = {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}
    log = tmp_path / "log"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        starting = pool.submit(Server, tmp_path / "data", log, **environment, OMP_NUM_THREADS="1")
        stack.callback(lambda: starting.result().stop())
        wait_until(lambda: log.exists() and "listening on " in log.read_text())
        url = log.read_text().split("listening on ")[1].split(";")[0]
        ear = stack.enter_context(listening(url))
        assert stack.enter_context(httpx.stream("GET", f"{url}/events")).status_code == 200  # nobody reads it
        ear.until(lambda ear: ear.of("health"))
        assert ear.of("health")[0]["checks"]["model"] == "loading"
        server = starting.result()
        ear.until(lambda ear: ear.of("revision"))
        ear.until(lambda ear: ear.of("health")[-1]["status"] == "ready")
        assert [revision["revision"] for revision in ear.of("revision")] == [0]

        for answer in ANSWERS:
            body = {"prompt": PROMPTS["France"], "correction": f" {answer}"}
            if server.client.post("/edits", json=body).status_code == 201:
                break
        ear.until(lambda ear: ear.of("revision")[-1]["revision"] == 1)
        ear.until(lambda ear: any(step["step"] == "publish" and step["ms"] for step in ear.of("step")))

        asked = time.monotonic()
        server.process.terminate()
        ear.until(lambda ear: ear.ended)
        assert ear.ended - asked < 1
        assert server.process.wait(timeout=10) == 0
        assert time.monotonic() - asked < 8
    assert "Traceback" not in log.read_text()
    assert "timeout" not in log.read_text()
