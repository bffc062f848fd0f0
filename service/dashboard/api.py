"""The service's own HTTP API, asked on behalf of a visitor: over ASGI, without a socket, and with no rights of its own.

Whatever the visitor may not do, a page may not either; whatever a page shows, curl can ask for.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import Request

logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log URLs, and so what is searched for
SHOWN = ("host", "cookie", "x-request-id", "x-forwarded-proto", "traceparent")
"""Headers of a visitor that the API is to see."""
ORIGIN = ("origin", "sec-fetch-site")
"""The same of a change: the API decides whether a page of that origin may. Links from anywhere may lead to a page."""
OWN_SITE = ("same-origin", "none")


@dataclass(frozen=True)
class Answer:
    """body: parsed JSON; None where there is none."""

    status: int
    body: Any
    headers: httpx.Headers

    @property
    def revision(self) -> str:
        """As If-Match takes it."""
        return self.headers.get("etag", "")


class Refused(Exception):
    """The API answered with a problem (RFC 9457)."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.problem, self.status = answer, answer.body, answer.status
        super().__init__(self.problem.get("detail", ""))

    @property
    def code(self) -> str:
        return self.problem.get("code", "")


class Api:
    """csrf_token: of the visitor's session, to be sent with what changes anything. actor: who asks, if no key says."""

    def __init__(self, request: Request) -> None:
        self._app, self._client = request.app, request.scope.get("client") or ("unknown", 0)
        names = SHOWN if request.method == "GET" else SHOWN + ORIGIN
        self._headers = {name: request.headers[name] for name in names if name in request.headers}
        self._scheme = "https" if "https" in (request.url.scheme, self._headers.get("x-forwarded-proto")) else "http"
        self.origin = f"{self._scheme}://{self._headers.get('host', '')}"
        self.csrf_token: str | None = None
        self.actor: str | None = None

    async def get(self, path: str, **query: Any) -> Any:
        """The body of an answer. Raises Refused."""
        return (await self.ask("GET", path, query)).body

    async def ask(
        self, method: str, path: str, query: dict[str, Any] | None = None, body: Any = None, **headers: str
    ) -> Answer:
        """Raises Refused."""
        # In a task, whose context is its own: the inner request has an id, and a log line, of its own.
        return await asyncio.create_task(self._ask(method, path, query, body, headers))

    async def _ask(
        self, method: str, path: str, query: dict[str, Any] | None, body: Any, headers: dict[str, str]
    ) -> Answer:
        sent = {**self._headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        sent |= {"x-csrf-token": self.csrf_token or "", "x-actor": self.actor or ""}
        sent = {name: value for name, value in sent.items() if value}
        asked = {name: value for name, value in (query or {}).items() if value not in (None, "")}
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False, client=self._client)
        async with httpx.AsyncClient(transport=transport, base_url=f"{self._scheme}://mend", timeout=None) as client:
            said = await client.request(method, path, params=asked, json=body, headers=sent)
        answer = Answer(said.status_code, said.json() if said.content else None, said.headers)
        if said.status_code >= 400:
            raise Refused(answer)
        return answer


def of_another_site(request: Request) -> bool:
    """Whether a page of somebody else sent a form here, by the browser of somebody who may use this one."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if origin is None:
        return site is not None and site not in OWN_SITE
    try:
        return urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower()
    except ValueError:  # it is no URL at all
        return True
