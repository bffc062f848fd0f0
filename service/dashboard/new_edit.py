"""A new edit: first what it would do, then the edit."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from service.dashboard.api import Refused
from service.dashboard.forms import Form, edit_body, edit_query, new_key
from service.dashboard.visits import Submitted, Visit, Visitor, or_refused

MOST_NAMED = 20
"""Of the edits that would be lost, or are near."""
TWIN = "/openapi.json"
"""What the form asks for; what it sends is shown as a command."""
BASE_TOKENS = 16
"""Of the base's answer, which the API does not tell with an edit."""

router = APIRouter()


@router.get("/ui/new")
async def new(visit: Visitor, request: Request) -> HTMLResponse:
    """A form for a correction, which may be filled in by the URL."""
    return visit.page("new.html", TWIN, form=Form(dict(request.query_params)), seen=None, body=None)


@router.post("/ui/new")
async def make(visit: Visitor, form: Submitted) -> Response:
    """Preview a correction, or make the one that was previewed."""
    body, query = edit_body(form), edit_query(form)
    if form["action"] != "commit":
        return await _preview(visit, form, body, query)
    try:
        made = await visit.api.ask(
            "POST", "/edits", query, body, if_match=f'"{form["revision"]}"', idempotency_key=form["key"]
        )
    except Refused as refused:
        return await _shown(visit, form, body, refused.problem, refused)
    if made.body["id"] is None:
        return await _shown(visit, form, body, made.body)
    return RedirectResponse(f"/ui/edits/{made.body['id']}?done=committed", 303)


async def _preview(visit: Visit, form: Form, body: dict[str, Any], query: dict[str, Any]) -> HTMLResponse:
    try:
        seen = await visit.api.ask("POST", "/edits", {**query, "dry_run": "true"}, body)
    except Refused as refused:
        return await _shown(visit, form, body, refused.problem, refused)
    return await _shown(visit, form, body, seen.body)


async def _shown(
    visit: Visit, form: Form, body: dict[str, Any], seen: dict[str, Any], refused: Refused | None = None
) -> HTMLResponse:
    """seen: the edit as it would be, or the problem, with what was measured. The form keeps what was filled in."""
    measured = seen.get("before") is not None or seen.get("conflicts") is not None
    base = None
    if measured:
        wish = {"prompt": form["prompt"], "view": "base", "max_new_tokens": BASE_TOKENS}
        base = await or_refused(visit.api.ask("POST", "/generate", body=wish))
    checks = seen.get("checks") or {}
    lost, conflicts = (seen.get(name) or checks.get(name, []) for name in ("lost", "conflicts"))
    known = {"before": None, "after": None, "checks": None, "scale": None, "best_margin_nats": None, "status": None}
    return visit.page(
        "new.html",
        TWIN,
        refused,
        form=form,
        body=body,
        seen={**known, **seen} if measured else None,
        base_text=None if base is None or isinstance(base, Refused) else base.body["text"],
        losses=len(lost),
        lost=await _named(visit, lost),
        conflicts=await _named(visit, conflicts),
        key=new_key(),
    )


async def _named(visit: Visit, edits: list[Any]) -> list[dict[str, Any]]:
    """Edits with prompt and correction, of which some are known by their id alone."""
    named = []
    for each in edits[:MOST_NAMED]:
        known = each if isinstance(each, dict) else {"id": each}
        if "prompt" not in known:
            found = await visit.api.get(f"/edits/{known['id']}")
            known = {**known, "prompt": found["prompt"], "correction": found["correction"]}
        named.append({"overlap": None, "superseded": False, **known})
    return named
