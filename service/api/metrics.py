"""What Prometheus asks for. What is true at the moment is read at every scrape; the rest was counted meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from service.api.callers import needs
from service.api.problems import responses
from service.engine import Engine

if TYPE_CHECKING:
    from service.app import Service

router = APIRouter()
CHECKS = ("model", "ledger", "durability", "state")


@router.get(
    "/metrics",
    dependencies=[needs("read")],
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **responses()},
)
async def get_metrics(request: Request) -> Response:
    """For Prometheus: edits by outcome, latencies by step, tokens, revision and lag of this replica, capacity, …"""
    # In a thread that generations cannot take away: one should see how busy a service is while it is busy.
    text = await asyncio.to_thread(generate_latest, request.app.state.telemetry.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


class StateCollector:
    """What can be read at any time."""

    def __init__(self, service: Service, version: str) -> None:
        self._service, self._version = service, version

    def collect(self) -> Iterator[Metric]:
        """Everything that is known now; of a model that is still loading, that it is not ready."""
        service, engine, checks = self._service, self._service.engine, self._service.checks()
        yield InfoMetricFamily("mend_build", "What runs here.", {"version": self._version})
        ready = all(check == "ok" for check in checks.values())
        yield GaugeMetricFamily("mend_ready", "Whether this replica is ready, as /readyz says.", float(ready))
        well = GaugeMetricFamily(
            "mend_check_ok", "What readiness depends on: 1 where nothing is wrong.", labels=["check"]
        )
        for name in CHECKS:
            well.add_metric([name], float(checks.get(name, "ok") == "ok"))
        yield well
        yield GaugeMetricFamily(
            "mend_durability_weaknesses", "How many ways Redis has to lose an edit.", len(service.warnings())
        )
        yield CounterMetricFamily(
            "mend_state_mismatches", "How often the state here was not that of the ledger.", service.mismatches
        )
        if engine is not None:
            yield from self._of_engine(engine)

    def _of_engine(self, engine: Engine) -> Iterator[Metric]:
        base, checkpoint, published, head = engine.base, engine.checkpoint, engine.published, self._service.head()
        yield InfoMetricFamily(
            "mend_model", "What is loaded.",
            {"base_model": base.name, "base_digest": base.digest, "editor": checkpoint.name,
             "editor_digest": checkpoint.digest, "device": str(base.device),
             "dtype": str(base.dtype).removeprefix("torch.")},
        )  # fmt: skip
        yield GaugeMetricFamily("mend_revision", "The revision that is live here.", published.revision)
        killed = float(engine.history.killed is not None)
        yield GaugeMetricFamily("mend_kill_switch_engaged", "Whether the base is served, by the switch.", killed)
        yield GaugeMetricFamily("mend_active_edits", "Edits that are live here.", published.active_edits)
        if head is not None:
            yield GaugeMetricFamily("mend_ledger_head", "The last revision of the ledger.", head)
            lag = max(0, head - published.revision)
            yield GaugeMetricFamily("mend_replica_lag_entries", "Entries of the ledger that are not live here.", lag)
        if published.fullness is not None:
            yield GaugeMetricFamily("mend_capacity_ratio", "How full the fullest weight is.", published.fullness)
        newest = next((edit for edit in engine.history.newest_first() if edit.active), None)
        drawdown = newest.applied.checks.get("drawdown", 0.0) if newest else 0.0
        yield GaugeMetricFamily(
            "mend_drawdown_ratio", "On the guard prompts, as judged before the newest active edit went live.", drawdown
        )
        yield GaugeMetricFamily(
            "mend_drawdown_budget_ratio", "Drawdown beyond which edits are refused.", engine.limits.guard_budget
        )
        if engine.last_audit is not None:
            yield GaugeMetricFamily(
                "mend_lost_edits", "Of the last audit: edits that no longer hold.", engine.last_audit.lost
            )
