"""The ledger, and one edit of it."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from service.dashboard.api import Refused
from service.dashboard.differences import Piece, compared
from service.dashboard.visits import Visit, Visitor, done, or_refused

PER_PAGE = 50
FILTERS = ("q", "status", "actor", "since", "until", "cursor")

router = APIRouter()


@router.get("/")
async def ledger(visit: Visitor, request: Request) -> HTMLResponse:
    """Edits, newest first."""
    filters = {name: request.query_params.get(name, "") for name in FILTERS}
    asked = {name: value for name, value in filters.items() if value}
    wanted = {name: value for name, value in asked.items() if name != "cursor"}
    limit = request.query_params.get("limit", PER_PAGE)
    twin = f"/edits?{urlencode({**asked, 'limit': limit})}"
    shown = {"filters": filters, "filtered": bool(wanted), "limit": limit, "done": done(request)}
    wanted |= {} if limit == PER_PAGE else {"limit": limit}
    try:
        edits = await visit.api.get("/edits", **asked, limit=limit)
    except Refused as refused:
        return visit.page("ledger.html", twin, refused, **shown, items=[])
    cursor = edits["next_cursor"]
    return visit.page(
        "ledger.html",
        twin,
        **shown,
        items=edits["items"],
        older=cursor and f"/?{urlencode({**wanted, 'cursor': cursor})}",
        newest=f"/?{urlencode(wanted)}",
    )


@router.get("/ui/edits/{edit_id}")
async def edit(visit: Visitor, request: Request, edit_id: str) -> HTMLResponse:
    """Everything about one edit."""
    twin = f"/edits/{quote(edit_id, safe='')}"
    shown = await visit.api.get(twin)
    audited = visit.model is not None and visit.model["audit"] is not None  # else one would be taken, for a page
    before, after, weights, audit = await asyncio.gather(
        scored(visit, shown, shown["before"]["text"]),
        scored(visit, shown, shown["after"]["text"]),
        or_refused(visit.api.get(f"{twin}/weights")),
        or_refused(visit.api.get("/edits/audit") if audited else asyncio.sleep(0)),
    )
    unscored = next((each for each in (before, after) if isinstance(each, Refused)), None)
    if unscored:
        pieces = compared(words(shown["before"]["text"]), words(shown["after"]["text"]))
    else:
        pieces = compared(before["tokens"] if before else [], after["tokens"] if after else [])
    items = [] if isinstance(weights, Refused) else weights["items"]
    found = [each for each in audit["edits"] if each["id"] == shown["id"]] if isinstance(audit, dict) else []
    return visit.page(
        "edit.html",
        twin,
        edit=shown,
        done=done(request),
        before=pieces[0],
        after=pieces[1],
        scored=None if unscored else after or before,
        unscored=unscored,
        weights=items,
        unweighed=weights,
        largest=max((each["norm"] for each in items), default=0),
        slowest=max(shown["timings_ms"].values(), default=0),
        audit=audit,
        audited=found[0] if found else None,
        body=repeated(shown),
    )


async def scored(visit: Visit, asked: dict[str, Any], text: str) -> dict[str, Any] | Refused | None:
    """The tokens of an answer with their probabilities on base and live; None where nothing was said.

    asked: with its prompt, and its messages if it has any.
    """
    text = text.rstrip("\ufffd")  # of a character that was cut off, for which no token stands
    if not text:
        return None
    prompt = {"messages": asked["messages"]} if asked.get("messages") else {"prompt": asked["prompt"]}
    answer = await or_refused(visit.api.ask("POST", "/score", body={**prompt, "continuation": text}))
    return answer if isinstance(answer, Refused) else answer.body


def words(text: str) -> list[str]:
    """A text in pieces, each with the white space before it, where the model does not say what its tokens are."""
    return re.findall(r"\s*\S+|\s+$", text)


def plain(text: str) -> list[Piece]:
    """A text of which nothing more is known."""
    return [Piece(text, changed=False)] if text else []


def repeated(shown: dict[str, Any]) -> dict[str, Any]:
    """What to send for the same edit once more."""
    checks = shown["checks"] or {}
    body = {"messages": shown["messages"]} if shown["messages"] else {"prompt": shown["prompt"]}
    body["correction"] = shown["correction"]
    more = {
        "subject": shown["subject"],
        "paraphrases": [each["prompt"] for each in checks.get("paraphrases", ())],
        "keep": [each["prompt"] for each in checks.get("keep", ())],
        "check_forms": [each["form"] for each in checks.get("forms", ())],
        "reason": shown["reason"],
        "metadata": shown["metadata"],
    }
    return body | {name: value for name, value in more.items() if value}
