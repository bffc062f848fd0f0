"""Who visits a page, and what every page shows: the visitor, the model, and what he may do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from service.dashboard.api import Api, Refused
from service.dashboard.forms import Form, sent
from service.dashboard.rendering import page

DONE = {
    "committed": "The edit is live.",
    "rolled-back": "The edit is rolled back: the weights are those that there would be without it.",
    "restored": "That revision stands again.",
    "engaged": "The kill switch is engaged: the base is served.",
    "released": "The kill switch is released.",
    "tagged": "The live revision is tagged.",
}
"""What may be told of what was done a page before. The URL has its name alone, since anybody could write it there."""
SCOPES = ("read", "edit", "admin")
SIGN_IN = "/ui/sign-in"


@dataclass(frozen=True)
class Visit:
    """me: as GET /session tells it. model: as GET /model does; None while the service is not ready."""

    api: Api
    path: str
    me: dict[str, Any]
    model: dict[str, Any] | None

    def may(self, scope: str) -> bool:
        return SCOPES.index(self.me["scope"]) >= SCOPES.index(scope)

    def page(
        self, template: str, twin: str | None = None, refused: Refused | None = None, **values: Any
    ) -> HTMLResponse:
        """A page. twin: where the API answers the same in JSON. refused: what could not be done for it."""
        shown = {**common(self), "twin": twin, "refused": refused, **values}
        return page(template, refused.status if refused else 200, **shown)


def common(visit: Visit | None) -> dict[str, Any]:
    """What every template may ask for."""
    may: Callable[[str], bool] = visit.may if visit else lambda _: False
    return {
        "me": visit and visit.me,
        "model": visit and visit.model,
        "can": may,
        "keyed": visit is not None and visit.me["name"] is not None,
        "origin": visit.api.origin if visit else "",
        "twin": None,
        "done": None,
        "refused": None,
    }


async def visiting(request: Request) -> Visit:
    """Raises Refused: nobody is signed in who has to be."""
    api = Api(request)
    me, model = await asyncio.gather(or_refused(api.get("/session")), or_refused(api.get("/model")))
    if isinstance(me, Refused):
        raise me
    if request.method == "GET":  # a form says itself what it was given
        api.csrf_token = me["csrf_token"]
    if me["name"] is None:
        api.actor = "dashboard"
    return Visit(api, request.url.path, me, None if isinstance(model, Refused) else model)


Visitor = Annotated[Visit, Depends(visiting)]


async def submitting(visit: Visitor, request: Request) -> Form:
    """A form that a visitor sent. It shows the token of his session, which the API looks at."""
    form = await sent(request)
    visit.api.csrf_token = form["csrf_token"]
    return form


Submitted = Annotated[Form, Depends(submitting)]


async def or_refused(asked: Awaitable[Any]) -> Any:
    """An answer, or why there is none: for pages that have more to show than that."""
    try:
        return await asked
    except Refused as refused:
        return refused


def done(request: Request) -> str | None:
    """What was just done, for the page that comes after it."""
    return DONE.get(request.query_params.get("done", ""))


def local(path: str) -> str:
    """A path of a page; whatever else it is, the ledger's. Nobody is to be led elsewhere from here."""
    return path if path == "/" or path.startswith(("/?", "/ui/")) else "/"


async def _refused(request: Request, refused: Any) -> Response:
    """To sign in, where that helps; else a page that says what was wrong."""
    if refused.status == 401:
        asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        back = asked if request.method == "GET" else request.headers.get("referer", "/")
        return RedirectResponse(f"{SIGN_IN}?next={quote(local(back), safe='')}", 303)
    visit = await or_refused(visiting(request))
    visit = None if isinstance(visit, Refused) else visit
    return page("problem.html", refused.status, **{**common(visit), "refused": refused}, back=request.url.path)


def install(app: FastAPI) -> None:
    """Answer what the API refused to a page as a page."""
    app.add_exception_handler(Refused, _refused)
