"""The health of the model."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from service.dashboard.api import Refused
from service.dashboard.charts import stepped
from service.dashboard.visits import Submitted, Visitor, or_refused

TWIN = "/model/health"

router = APIRouter()


@router.get("/ui/health")
async def health(visit: Visitor) -> HTMLResponse:
    """What the edits do to the model, and who else serves it."""
    found, replicas = await asyncio.gather(or_refused(visit.api.get(TWIN)), or_refused(visit.api.get("/replicas")))
    if isinstance(found, Refused):
        return visit.page("health.html", TWIN, found)
    audit = await visit.api.get("/edits/audit") if found["audit"] and found["audit"]["lost"] else {"edits": []}
    series = found["series"]
    return visit.page(
        "health.html",
        TWIN,
        health=found,
        lost=[each for each in audit["edits"] if not each["holds"]],
        replicas=None if isinstance(replicas, Refused) else replicas["items"],
        charts={
            "active_edits": stepped(series, "active_edits", percent=False),
            "drawdown": stepped(series, "drawdown", percent=True, limit=found["drawdown_budget"]),
            "capacity": stepped(series, "capacity", percent=True, limit=found["capacity"]["limit"]),
        },
    )


@router.post("/ui/audit")
async def audit(visit: Visitor, _form: Submitted) -> Response:
    """Look now whether all active edits hold."""
    await visit.api.get("/edits/audit", fresh="true")
    return RedirectResponse("/ui/health", 303)
