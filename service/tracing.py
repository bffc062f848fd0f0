"""Spans to an OpenTelemetry collector, where somebody asked for them: by our own setting or by the standard variables.

Without the extra `otel` there is only its interface, which does nothing and costs nothing.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SUPPORTED = "http/protobuf"
PATH = "/v1/traces"
SENT_WITHIN_S = 3.0
"""What is still unsent at the end, if the collector does not answer, is lost after that."""


class TracingUnavailable(Exception):
    """Traces were asked for, and cannot be sent."""


def wanted(endpoint: str | None) -> bool:
    """Whether anybody asked for traces. endpoint: base URL of a collector; without one the variables are asked.

    Raises TracingUnavailable.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if endpoint is None and not any(map(os.environ.get, ENDPOINTS)):
        return False
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    _check(endpoint)
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise TracingUnavailable(
            f"traces need the extra `otel` ({error}): pip install 'mend-service[otel]', or unset MEND_OTLP_ENDPOINT "
            f"and {', '.join(ENDPOINTS)}"
        ) from error
    return True


def open_tracer_provider(endpoint: str | None, version: str) -> TracerProvider | None:
    """What takes spans and sends them; None when nobody asked for it. Whoever takes it closes it.

    Raises TracingUnavailable.
    """
    if not wanted(endpoint):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own = Resource.create({"service.name": "mend-service", "service.version": version})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
    url = endpoint and endpoint.rstrip("/").removesuffix(PATH) + PATH
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


def close(provider: TracerProvider) -> None:
    """Send what has not been sent, for a few seconds at most."""
    ending = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
    ending.start()
    ending.join(SENT_WITHIN_S)


def _check(endpoint: str | None) -> None:
    name, url = "MEND_OTLP_ENDPOINT", endpoint
    if url is None:
        name = next(name for name in ENDPOINTS if os.environ.get(name))
        url = os.environ[name]
        protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), SUPPORTED)
        if protocol != SUPPORTED:
            raise TracingUnavailable(f"traces are sent by {SUPPORTED} only, not by {protocol}; unset {PROTOCOLS[1]}")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise TracingUnavailable(f"{name} is {url!r}; it should be like http://localhost:4318")
