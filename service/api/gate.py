"""The one door: before a body is read, every request shows where it comes from, and who sends it.

Flow: host -> the site that a browser asks for -> key -> scope -> rate -> the app; and a line for the audit.
Where there are no keys whoever reaches the service may do everything, so the pages that a browser shows must not.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.audit import CLIP, Record
from service.api.callers import (
    OPEN,
    AccessRefused,
    Caller,
    CrossSite,
    HostNotAllowed,
    RateLimited,
    Routes,
    Unauthenticated,
)
from service.api.headers import as_sent
from service.api.hosts import host_name, is_address
from service.api.keys import Key, Keyring
from service.api.problems import refused
from service.api.rates import FAILED, Rates
from service.api.sessions import Session, Sessions

EDIT_PATH = "/edits/"
OWN_SITE = ("same-origin", "none")
"""What a browser says of a request that no other page made; `none`: somebody typed it."""


class GateMiddleware:
    """ring, sessions: None where there are no keys. hosts: names by which the service may be addressed; None for any.
    origins: whose pages may ask, where browsers would let them. pages: below it are pages, which ask for themselves."""

    def __init__(
        self, app: ASGIApp, *, routes: Routes, ring: Keyring | None, sessions: Sessions | None, rates: Rates,
        hosts: Set[str] | None, origins: Set[str], pages: str,
    ) -> None:  # fmt: skip
        self.app, self._sessions, self._pages = app, sessions, pages
        self._routes, self._ring, self._rates, self._hosts, self._origins = routes, ring, rates, hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none, and none that would come past here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] in OPEN or scope["path"].startswith(self._pages):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        address = (scope.get("client") or ("unknown",))[0]
        declared = self._routes.find(scope["method"], scope["path"])
        actor = as_sent(headers.get("x-actor"))
        record = state["audit"] = Record(scope["method"], declared, address, actor)
        status, answered = None, Headers()

        async def watched(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], Headers(raw=message["headers"])
            await send(message)

        try:
            try:
                self._check_host(headers)
                self._check_site(headers)
                key, session = self._known(headers, scope["method"], address)
                state["principal"] = key and key.name
                record.caller = state["caller"] = Caller(key, address, self._rates, session)
                record.caller.holds = partial(self._holds, key, session)
                if declared:
                    record.caller.demand(declared.scope)
            except AccessRefused as error:
                await refused(scope["path"], error)(scope, receive, watched)
            else:
                await self.app(scope, receive, watched)
        except ClientDisconnect:
            raise
        except Exception:
            status = status or 500  # as it will be answered, further out
            raise
        finally:
            if record.wanted(status):
                record.tell(status, edit_id=_edit(scope, answered), revision=_revision(answered.get("etag", "")))

    def _check_host(self, headers: Headers) -> None:
        if self._hosts is None:
            return
        given = headers.get("host", "")
        name = host_name(given)
        if name in self._hosts or is_address(name):
            return
        raise HostNotAllowed(
            f"this service is not addressed as {given[:CLIP]!r}; name it in MEND_ALLOWED_HOSTS if it is meant",
            allowed=sorted(self._hosts),
        )

    def _check_site(self, headers: Headers) -> None:
        """Without keys, a page of another site must not use the service by the browser of somebody who reaches it."""
        if self._ring is not None:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None:
            foreign = site is not None and site not in OWN_SITE
        else:
            foreign = origin not in self._origins and not _is_of(origin, headers.get("host", ""))
        if foreign:
            raise CrossSite(
                f"a page of {origin[:CLIP] if origin else 'another site'} may not ask; name its origin in "
                "MEND_CORS_ORIGINS if it is meant, or give the service keys with MEND_API_KEYS"
            )

    def _known(self, headers: Headers, method: str, address: str) -> tuple[Key | None, Session | None]:
        """A good key is let in however many bad ones came from its address, which may be that of a proxy."""
        try:
            return self._shown(headers, method)
        except Unauthenticated:
            if wait_s := self._rates.wait_s(FAILED, address):
                raise RateLimited(self._rates.of(FAILED), wait_s) from None
            raise

    def _shown(self, headers: Headers, method: str) -> tuple[Key | None, Session | None]:
        """The key of a request, and the session that stands for it where it is not shown itself."""
        if self._ring is None:
            return None, None
        given = headers.getlist("authorization")
        session = None if given else self._sessions.of(headers, method)
        key = session.key if session else self._key(given)
        if key.expired:
            raise Unauthenticated(f"this key expired at {key.expires_at.isoformat()}", error="invalid_token")
        return key, session

    def _holds(self, key: Key | None, session: Session | None) -> bool:
        """Whether what was shown is still good."""
        return key is None or (self._ring.holds(key) and (session is None or not session.over))

    def _key(self, given: list[str]) -> Key:
        scheme, _, token = given[0].strip().partition(" ") if len(given) == 1 else ("", "", "")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("this service takes a key: send `Authorization: Bearer mend_…`")
        key = self._ring.find(token)
        if key is None:
            raise Unauthenticated("this key is not one of this service's, or was revoked", error="invalid_token")
        return key


def _is_of(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:  # it is no URL at all
        return False


def _edit(scope: Scope, answered: Headers) -> str | None:
    """The edit that was made, or asked about."""
    made = answered.get("location", "")
    if made.startswith(EDIT_PATH):
        return made.removeprefix(EDIT_PATH)
    asked = scope.get("path_params", {}).get("edit_id")
    return asked and str(asked)[:CLIP]


def _revision(tag: str) -> int | None:
    number = tag.removeprefix("W/").strip('"')
    return int(number) if number.isdigit() else None
