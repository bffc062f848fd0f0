"""`mend serve` as a process that is watched: every word of it is JSON, and its traces reach a collector."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.cli.test_serve import ENDS_WITHIN_S, MEND
from tests.e2e.server import serving
from tests.service_fixtures import Folders

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes traces by OTLP/HTTP, as any OpenTelemetry collector."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def listening(self) -> Iterator[Collector]:
        with self._server:
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
            yield self
            self._server.shutdown()

    def spans(self):
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    settings = Folders.write(tmp_path_factory.mktemp("model")).settings(Path())
    named = {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}
    return {**named, "MEND_LOG_FORMAT": "json", "MEND_LOG_LEVEL": "debug"}


def test_from_its_first_word_to_its_last(environment, tmp_path):
    log, edit = tmp_path / "log", {"prompt": "The capital of France is", "correction": " Rome"}
    with (
        Collector().listening() as collector,
        serving(tmp_path / "data", log, **environment, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as server,
    ):
        headers = {"X-Request-Id": "mine", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = server.client.post("/edits?dry_run=true", json=edit, headers=headers)
        server.client.post("/edits", content=b"{")
        assert server.stop() == 0

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"timestamp", "level", "logger", "event"} <= set(line) for line in lines)
    events = [line["event"] for line in lines]
    assert events[0].startswith(f"listening on {server.client.base_url}".rstrip("/"))
    assert any(event.startswith("mend-service is ready at") for event in events)
    assert any(event.startswith("stopping when all requests are answered") for event in events)
    line, audited = sorted(
        (line for line in lines if line.get("request_id") == "mine"), key=lambda each: each["logger"]
    )
    assert (line["logger"], audited["logger"]) == ("mend.access", "mend.audit")
    assert (line["route"], line["status"]) == ("/edits", answer.status_code)
    assert line["trace_id"] == TRACE
    assert "capital of France" not in log.read_text()

    edits = [span for span in collector.spans() if span.trace_id.hex() == TRACE]
    (request,) = [span for span in edits if span.name == "POST /edits"]
    assert request.parent_span_id.hex() == PARENT
    steps = [span for span in edits if span is not request]
    assert {"before", "capture", "propose", "search"} <= {step.name for step in steps}
    assert {step.parent_span_id for step in steps} == {request.span_id}
    for step in steps:
        assert request.start_time_unix_nano <= step.start_time_unix_nano
        assert step.start_time_unix_nano <= step.end_time_unix_nano <= request.end_time_unix_nano
    (sent, *_) = collector.requests[0].resource_spans
    told = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert told["service.name"] == "mend-service"
    assert b"capital of France" not in b"".join(each.SerializeToString() for each in collector.requests)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"MEND_PORT": "many"}, "MEND_PORT is 'many'"),
        ({"MEND_LOG_LEVEL": "loud"}, "MEND_LOG_LEVEL is 'loud'"),
        ({"MEND_OTLP_ENDPOINT": "localhost:4318"}, "MEND_OTLP_ENDPOINT is 'localhost:4318'"),
    ],
    ids=["setting", "of the log", "of traces"],
)
def test_why_it_does_not_start_is_json_too(environment, tmp_path, settings, says):
    ended = subprocess.run(
        [*MEND, "serve"],
        env={**os.environ, "MEND_PORT": "0", "MEND_DATA_DIR": str(tmp_path), **environment, **settings},
        capture_output=True, text=True, timeout=ENDS_WITHIN_S, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert (line["level"], line["logger"]) == ("critical", "mend")
    assert line["event"].startswith(says)
