"""When traces are sent, and why they cannot be. That they arrive is shown over a real process (`tests.cli`)."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest

from service import tracing
from service.tracing import TracingUnavailable, close, open_tracer_provider

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL",
             "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME",
             "OTEL_RESOURCE_ATTRIBUTES")  # fmt: skip
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_collector_that_does_not_answer_holds_the_end_up_for_a_moment_only(monkeypatch):
    monkeypatch.setattr(tracing, "SENT_WITHIN_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        provider = open_tracer_provider(f"http://127.0.0.1:{silent.getsockname()[1]}", "1.2")
        provider.get_tracer("test").start_span("test").end()
        begun = time.monotonic()
        close(provider)
        assert 0.1 <= time.monotonic() - begun < 0.9
        (ending,) = [thread for thread in threading.enumerate() if thread.name == "traces"]
        ending.join(10)
    assert not ending.is_alive()


def opened(endpoint=None):
    provider = open_tracer_provider(endpoint, "1.2")
    if provider is not None:
        close(provider)
    return provider


class TestAreSent:
    @pytest.mark.parametrize("name", VARIABLES[:2])
    def test_when_a_standard_variable_says_so(self, monkeypatch, name):
        monkeypatch.setenv(name, NOWHERE)
        assert opened() is not None

    def test_when_the_setting_says_so_under_a_name(self):
        attributes = opened(NOWHERE).resource.attributes
        assert (attributes["service.name"], attributes["service.version"]) == ("mend-service", "1.2")

    def test_under_the_name_that_the_environment_gives(self, monkeypatch):
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        attributes = opened(NOWHERE).resource.attributes
        assert (attributes["service.name"], attributes["deployment.environment"]) == ("mine", "test")


class TestAreNotSent:
    def test_unless_somebody_asks(self):
        assert opened() is None

    @pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
    def test_when_a_standard_variable_says_so(self, monkeypatch, name, value):
        monkeypatch.setenv(name, value)
        assert opened(NOWHERE) is None


class TestCannotBeSent:
    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(TracingUnavailable, match=r"pip install 'mend-service\[otel\]'"):
            opened(NOWHERE)

    @pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://localhost:4317", "http://", "nonsense"])
    def test_to_what_is_no_address(self, endpoint):
        with pytest.raises(TracingUnavailable, match="MEND_OTLP_ENDPOINT"):
            opened(endpoint)

    def test_by_another_protocol(self, monkeypatch):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOWHERE)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        with pytest.raises(TracingUnavailable, match="http/protobuf only, not by grpc"):
            opened()
