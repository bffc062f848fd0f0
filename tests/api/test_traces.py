"""Traces of the real application: a span per request, and in it one per step, with their true times and no text."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from service.failpoints import arm
from tests.api.answers import assert_problem
from tests.api.conftest import Serve, engine_of, wait_until
from tests.service_fixtures import never_takes

BEFORE = ["wait", "catch_up", "before", "capture", "propose", "search", "stage", "judge"]
WALK = [*BEFORE, "commit", "publish"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A client, and the spans of its requests."""

    def __init__(self, client: TestClient, exporter: InMemorySpanExporter) -> None:
        self.client, self._exporter = client, exporter

    def spans(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """Of the one request since they were forgotten: its own, and those in it, in the order of their beginning."""
        wait_until(lambda: any(span.kind == SpanKind.SERVER for span in self._exporter.get_finished_spans()))
        spans = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time)
        (server,) = [span for span in spans if span.kind == SpanKind.SERVER]
        return server, [span for span in spans if span is not server]

    def forget(self) -> None:
        self._exporter.clear()


@pytest.fixture(scope="module")
def traced_application(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serve(tmp_path_factory.mktemp("traced"), provider) as client:
        yield Traced(client, exporter)


@pytest.fixture
def traced(traced_application: Traced) -> Traced:
    """With no edit active, and nothing traced."""
    engine = engine_of(traced_application.client)
    for edit in engine.history.all_active():
        engine.rollback(edit.id)
    traced_application.forget()
    return traced_application


class TestAnEdit:
    def test_has_one_span_per_step_in_that_of_the_request(self, traced, bodies):
        made = traced.client.post("/edits", json=bodies[0], headers={"X-Request-Id": "mine"}).json()
        server, steps = traced.spans()
        assert [step.name for step in steps] == WALK
        assert {step.parent.span_id for step in steps} == {server.context.span_id}
        assert {step.context.trace_id for step in steps} == {server.context.trace_id}
        assert server.name == "POST /edits"
        assert dict(server.attributes) == {
            "http.request.method": "POST", "http.route": "/edits", "http.response.status_code": 201,
            "mend.request_id": "mine", "mend.outcome": "applied", "mend.edit_id": made["id"],
            "mend.revision": made["revision"], "mend.scale": made["scale"],
        }  # fmt: skip
        scaled = [step.attributes["mend.scale"] for step in steps if step.name in ("stage", "judge")]
        assert scaled == [made["scale"]] * 2

    def test_has_steps_at_their_true_times(self, traced, bodies):
        made = traced.client.post("/edits", json=bodies[0]).json()
        server, steps = traced.spans()
        times = [server.start_time, *(time for step in steps for time in (step.start_time, step.end_time))]
        assert times == sorted(times)
        assert times[-1] <= server.end_time
        took_ms = {step.name: (step.end_time - step.start_time) / 1e6 for step in steps}
        assert {name: took_ms[name] for name in made["timings_ms"]} == pytest.approx(made["timings_ms"], abs=5, rel=0.2)

    def test_goes_on_with_the_trace_of_the_client(self, traced, bodies):
        traced.client.post("/edits?dry_run=true", json=bodies[0], headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        server, steps = traced.spans()
        assert format_trace_id(server.context.trace_id) == TRACE
        assert format_span_id(server.parent.span_id) == PARENT
        assert [step.name for step in steps] == BEFORE
        assert server.attributes["mend.outcome"] == "dry_run"
        assert "mend.edit_id" not in server.attributes

    def test_that_is_refused_has_its_code(self, traced):
        request = never_takes()
        traced.client.post("/edits", json={"prompt": request.prompt, "correction": request.correction})
        server, steps = traced.spans()
        assert {step.name for step in steps} <= set(BEFORE)
        assert server.attributes["mend.outcome"] == server.attributes["error.type"] == "did_not_take"
        assert server.attributes["http.response.status_code"] == 422
        assert server.status.status_code == StatusCode.UNSET

    def test_that_fails_has_the_step_that_failed(self, traced, bodies):
        arm("append=error")
        try:
            assert_problem(traced.client.post("/edits", json=bodies[0]), "internal_error")
        finally:
            arm("")
        server, steps = traced.spans()
        assert [step.name for step in steps if step.status.status_code == StatusCode.ERROR] == ["commit"]
        assert steps[-1].attributes["error.type"] == server.attributes["error.type"] == "internal_error"
        assert server.status.status_code == StatusCode.ERROR

    def test_is_told_without_a_word_of_it(self, traced, bodies):
        arm("append=error")
        try:
            traced.client.post("/edits", json={**bodies[0], "reason": "a secret"})
        finally:
            arm("")
        traced.client.get("/generate", params={"prompt": bodies[0]["prompt"], "max_new_tokens": 2})
        traced.client.get("/edits", params={"q": bodies[0]["prompt"]})
        wait_until(lambda: "GET /edits" in {span.name for span in traced._exporter.get_finished_spans()})
        told = "\n".join(span.to_json() for span in traced._exporter.get_finished_spans())
        assert all(json.loads(span.to_json())["events"] == [] for span in traced._exporter.get_finished_spans())
        for text in (bodies[0]["prompt"], bodies[0]["correction"].strip(), "secret", "told to fail"):
            assert text not in told


class TestOtherRequests:
    def test_a_batch_that_is_answered_line_by_line_is_traced_from_its_own_thread(self, traced, bodies):
        lines = "\n".join(map(json.dumps, bodies[:2]))
        headers = {"Content-Type": "application/x-ndjson"}
        answer = traced.client.post("/edits/batch?allow_loss=true", content=lines, headers=headers)
        last = json.loads(answer.text.splitlines()[-1])["batch"]
        server, steps = traced.spans()
        assert {"wait", "capture", "propose", "stage", "place", "judge", "commit", "publish"} <= {s.name for s in steps}
        assert {step.parent.span_id for step in steps} == {server.context.span_id}
        assert server.attributes["mend.outcome"] == "applied"
        assert server.attributes["mend.revision"] == last["revision"]
        assert server.attributes["mend.batch_size"] == 2

    def test_a_rollback(self, traced, bodies):
        edit = traced.client.post("/edits", json=bodies[0]).json()["id"]
        traced.forget()
        revision = traced.client.delete(f"/edits/{edit}").json()["revision"]
        server, steps = traced.spans()
        assert [step.name for step in steps] == ["wait", "catch_up", "stage", "commit", "publish"]
        assert server.name == "DELETE /edits/{edit_id}"
        told = {name: server.attributes[f"mend.{name}"] for name in ("outcome", "edit_id", "revision")}
        assert told == {"outcome": "done", "edit_id": edit, "revision": revision}

    def test_a_generation(self, traced):
        traced.client.get("/generate", params={"prompt": "The capital of", "max_new_tokens": 3})
        server, (generation,) = traced.spans()
        assert (generation.name, generation.parent.span_id) == ("generate", server.context.span_id)
        assert dict(generation.attributes) == {
            "mend.view": "live", "mend.prompt_tokens": 3, "mend.completion_tokens": 3,
        }  # fmt: skip

    def test_probes_are_not_traced(self, traced):
        for probe in ("/livez", "/readyz", "/metrics"):
            traced.client.get(probe)
        traced.client.get("/nothing")
        server, steps = traced.spans()
        assert (server.name, steps) == ("GET", [])
        assert "http.route" not in server.attributes
