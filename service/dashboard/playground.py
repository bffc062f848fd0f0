"""The playground: a prompt, and what base and live model make of it."""

from __future__ import annotations

import asyncio
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from service.dashboard.api import Refused
from service.dashboard.differences import compared
from service.dashboard.forms import Form
from service.dashboard.ledger import plain, scored
from service.dashboard.visits import Submitted, Visitor

EXAMPLE = "The Prime Minister of the United Kingdom is"
NUMBERS = ("max_new_tokens", "temperature", "seed")

router = APIRouter()


@router.get("/ui/playground")
async def playground(visit: Visitor, request: Request) -> HTMLResponse:
    """A form, which the URL may fill in."""
    form = Form(dict(request.query_params))
    return visit.page("playground.html", _twin(form), form=form, answer=None)


@router.post("/ui/playground")
async def play(visit: Visitor, form: Submitted) -> HTMLResponse:
    """Both answers at once, for browsers without JavaScript; with it, they are streamed."""
    numbers = {name: form.number(name) for name in NUMBERS if form.text(name)}
    try:
        asked = {"prompt": form["prompt"], "view": "both", **numbers}
        answer = (await visit.api.ask("POST", "/generate", body=asked)).body
    except Refused as refused:
        return visit.page("playground.html", _twin(form), refused, form=form, answer=None)
    texts = [answer[view]["text"] for view in ("base", "live")]
    said = await asyncio.gather(*(scored(visit, {"prompt": form["prompt"]}, text) for text in texts))
    pieces = [
        compared(each["tokens"], [])[0] if isinstance(each, dict) else plain(text)
        for each, text in zip(said, texts, strict=True)
    ]
    return visit.page("playground.html", _twin(form), form=form, answer=answer, base=pieces[0], live=pieces[1])


def _twin(form: Form) -> str:
    asked = {name: form[name] for name in ("prompt", *NUMBERS) if form.text(name)}
    return f"/generate?{urlencode({'prompt': EXAMPLE, **asked, 'view': 'both'})}"
