"""Taking back: one edit, everything since a revision, or everything at once. Whatever it is, first what it changes."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from service.dashboard.api import Answer, Refused
from service.dashboard.forms import Form, new_key
from service.dashboard.visits import Submitted, Visit, Visitor, done, or_refused

TARGETS = ("edit", "revision", "tag")

router = APIRouter()


@router.get("/ui/rollback")
async def rollback(visit: Visitor, request: Request) -> HTMLResponse:
    """What may be taken back; of one edit, a revision or a tag, what that would change."""
    return await _page(visit, Form(dict(request.query_params)), told=done(request))


@router.post("/ui/rollback")
async def go_back(visit: Visitor, form: Submitted) -> Response:
    """Do what was previewed, if nothing came between."""
    try:
        await _back(visit, form, if_match=f'"{form["live"]}"', idempotency_key=form["key"])
    except Refused as refused:
        return await _page(visit, form, refused)
    if form["edit"]:
        return RedirectResponse(f"/ui/edits/{quote(form['edit'], safe='')}?done=rolled-back", 303)
    return RedirectResponse("/?done=restored", 303)


@router.post("/ui/kill-switch")
async def switch(visit: Visitor, form: Submitted) -> Response:
    """Serve the base to everybody, or what was served before."""
    asked = {"idempotency_key": form["key"]}
    try:
        if form["action"] == "release":
            await visit.api.ask("DELETE", "/kill-switch", {"reason": form.text("reason")}, **asked)
        else:
            await visit.api.ask("PUT", "/kill-switch", body={"reason": form.text("reason")}, **asked)
    except Refused as refused:
        return await _page(visit, Form({}), refused)
    return RedirectResponse(f"/?done={'released' if form['action'] == 'release' else 'engaged'}", 303)


@router.post("/ui/tags")
async def tag(visit: Visitor, form: Submitted) -> Response:
    """Name what is live now."""
    try:
        await visit.api.ask("PUT", f"/tags/{quote(form['name'].strip(), safe='')}")
    except Refused as refused:
        return await _page(visit, Form({}), refused)
    return RedirectResponse("/ui/rollback?done=tagged", 303)


async def _page(visit: Visit, form: Form, refused: Refused | None = None, told: str | None = None) -> HTMLResponse:
    """form: names what is to be taken back, if anything is. refused: why it was not done. told: what was done."""
    target = {name: form[name] for name in TARGETS if form[name]}
    tags, switch = await asyncio.gather(or_refused(visit.api.get("/tags")), or_refused(visit.api.get("/kill-switch")))
    preview = await or_refused(_back(visit, form, dry_run=True)) if target else None
    if isinstance(preview, Refused):
        refused, preview = refused or preview, None
    return visit.page(
        "rollback.html",
        f"/edits/{quote(form['edit'], safe='')}" if form["edit"] else "/tags",
        refused,
        done=told,
        target={**dict.fromkeys(TARGETS), **target},
        given=target,
        preview=preview and preview.body,
        edit=preview and preview.body.get("edit"),
        reason=form["reason"],
        key=new_key(),
        tags=[] if isinstance(tags, Refused) else tags["items"],
        switch=None if isinstance(switch, Refused) else switch,
    )


async def _back(visit: Visit, form: Form, *, dry_run: bool = False, **headers: str) -> Answer:
    """Raises Refused."""
    query: dict[str, Any] = {"dry_run": "true" if dry_run else None}
    if form["edit"]:
        path = f"/edits/{quote(form['edit'], safe='')}"
        return await visit.api.ask("DELETE", path, {**query, "reason": form.text("reason")}, **headers)
    body = {"tag": form["tag"]} if form["tag"] else {"revision": form.number("revision")}
    return await visit.api.ask("POST", "/rollback", query, {**body, "reason": form.text("reason")}, **headers)
