"""What Prometheus asks for, read anew at every scrape: nothing is counted here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from service.app import Service

router = APIRouter()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def get_metrics(request: Request) -> Response:
    """For Prometheus: revision and lag of this replica, edits, capacity, and whether its state is the ledger's."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(request.app.state.service))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collector:
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Everything that is known now; of a model that is still loading, that it is not ready."""
        service, engine = self._service, self._service.engine
        ready = all(check == "ok" for check in service.checks().values())
        yield GaugeMetricFamily("mend_ready", "Whether this replica is ready, as /readyz says.", float(ready))
        yield GaugeMetricFamily(
            "mend_durability_weaknesses", "How many ways Redis has to lose an edit.", len(service.warnings())
        )
        yield CounterMetricFamily(
            "mend_state_mismatches", "How often the state here was not that of the ledger.", service.mismatches
        )
        if engine is None:
            return
        published, head = engine.published, service.head()
        yield GaugeMetricFamily("mend_revision", "The revision that is live here.", published.revision)
        yield GaugeMetricFamily("mend_active_edits", "Edits that are live here.", published.active_edits)
        if head is not None:
            yield GaugeMetricFamily("mend_ledger_head", "The last revision of the ledger.", head)
            lag = max(0, head - published.revision)
            yield GaugeMetricFamily("mend_replica_lag_entries", "Entries of the ledger that are not live here.", lag)
        if published.fullness is not None:
            yield GaugeMetricFamily("mend_capacity_ratio", "How full the fullest weight is.", published.fullness)
        if engine.last_audit is not None:
            yield GaugeMetricFamily("mend_lost_edits", "Of the last audit: edits that no longer hold.",
                                    engine.last_audit.lost)  # fmt: skip
