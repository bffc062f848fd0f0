"""Sign-in by an API key, which becomes a session, and sign-out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from service.dashboard.api import Answer, Api, Refused, of_another_site
from service.dashboard.forms import sent
from service.dashboard.rendering import page
from service.dashboard.visits import SIGN_IN, Submitted, Visitor, common, local

router = APIRouter()


@router.get(SIGN_IN)
async def show(request: Request) -> HTMLResponse:
    """The form."""
    return _form(local(request.query_params.get("next", "/")))


@router.post(SIGN_IN)
async def sign_in(request: Request) -> Response:
    """Show a key to the API, and hand its cookie on."""
    form = await sent(request)
    back = local(form["next"])
    if of_another_site(request):  # which would sign somebody in as somebody else
        return RedirectResponse(SIGN_IN, 303)
    api = Api(request)
    try:
        key = form["key"].strip().encode("ascii", "replace").decode()
        answer = await api.ask("POST", "/session", authorization=f"Bearer {key}")
    except Refused as refused:
        return _form(back, refused)
    return _with_cookies(RedirectResponse(back, 303), answer)


@router.post("/ui/sign-out")
async def sign_out(visit: Visitor, form: Submitted) -> Response:
    """Forget the cookie."""
    answer = await visit.api.ask("DELETE", "/session")
    return _with_cookies(RedirectResponse(SIGN_IN, 303), answer)


def _form(back: str, refused: Refused | None = None) -> HTMLResponse:
    status = refused.status if refused else 200
    return page("sign_in.html", status, **{**common(None), "twin": "/session", "refused": refused}, next=back)


def _with_cookies(response: Response, answer: Answer) -> Response:
    for cookie in answer.headers.get_list("set-cookie"):
        response.headers.append("set-cookie", cookie)
    return response
