"""Sign-in for browsers: a key is shown once, and from then on a signed cookie stands for it.

Flow: POST /session with a key -> a cookie, which names the key but is not it -> the gate -> the caller that the key is.
Whoever changes anything by the cookie also sends a token that no page of another site can read: GET /session tells it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from fastapi import APIRouter, Request, Response
from itsdangerous import BadSignature, URLSafeTimedSerializer
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import cookie_parser

from service.api.callers import AccessRefused, Asking, Unauthenticated, needs
from service.api.keys import TOKEN_BYTES, Key, Keyring, Scope
from service.api.problems import responses

COOKIE = "mend_session"
TOKEN_HEADER = "X-CSRF-Token"
LASTS = timedelta(hours=12)
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class CsrfFailed(AccessRefused):
    """A change by a cookie, without the token that shows who sends it."""

    code = "csrf_failed"


@dataclass(frozen=True)
class Session:
    """A key that was shown in a browser. token: to be sent beside the cookie with what changes anything."""

    key: Key
    token: str
    expires_at: datetime

    @property
    def over(self) -> bool:
        return self.expires_at <= datetime.now(UTC)


class Sessions:
    """Nothing is kept: a cookie is good while its signature is, its time lasts, and its key is one of the ring's."""

    def __init__(self, ring: Keyring, secret: bytes | None = None) -> None:
        self._ring = ring
        self._secret = secret or secrets.token_bytes(TOKEN_BYTES)
        self._signer = URLSafeTimedSerializer(
            self._secret, salt="mend-session", signer_kwargs={"digest_method": hashlib.sha256}
        )

    def begin(self, key: Key) -> tuple[str, Session]:
        """A cookie for a key, and what it stands for."""
        cookie = self._signer.dumps([key.name, key.created_at.isoformat(), secrets.token_urlsafe(16)])
        return str(cookie), self.read(str(cookie))

    def read(self, cookie: str) -> Session:
        """Raises Unauthenticated."""
        try:
            (name, created_at, _), signed_at = self._signer.loads(
                cookie, max_age=LASTS.total_seconds(), return_timestamp=True
            )
        except BadSignature as error:
            raise Unauthenticated("this session is over; sign in again") from error
        key = self._ring.named(name)
        if key is None or key.created_at.isoformat() != created_at:
            raise Unauthenticated("the key of this session was revoked; sign in with another")
        return Session(key, self._token(cookie), signed_at.astimezone(UTC) + LASTS)

    def of(self, headers: Headers, method: str) -> Session | None:
        """The session that a request shows, if it shows one. Raises Unauthenticated, CsrfFailed."""
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        if cookie is None:
            return None
        session = self.read(cookie)
        sent = headers.get(TOKEN_HEADER, "")
        if method not in SAFE and not hmac.compare_digest(sent.encode(), session.token.encode()):
            raise CsrfFailed(
                f"a change by the cookie of a session also takes the header {TOKEN_HEADER}, as GET /session tells it; "
                "or send the key itself, as `Authorization: Bearer mend_…`"
            )
        return session

    def _token(self, cookie: str) -> str:
        return hmac.new(self._secret, b"csrf:" + cookie.encode(), hashlib.sha256).hexdigest()


class SessionView(BaseModel):
    """Who asks. name: of the key; null where the service has no keys, and everybody may do everything.

    csrf_token, expires_at: of a session; null for who shows the key itself, or needs none.
    """

    name: str | None
    scope: Scope
    csrf_token: str | None = None
    expires_at: datetime | None = None


router = APIRouter()


@router.post("/session", dependencies=[needs("read")], responses=responses(400))
async def post_session(caller: Asking, request: Request, response: Response) -> SessionView:
    """Sign in: show a key in `Authorization`, and get a cookie that stands for it for twelve hours.

    The cookie is for browsers. Where it is used for a change, `X-CSRF-Token` must be sent, too.
    """
    session, sessions = caller.session, request.app.state.sessions
    if session is None and caller.key is not None:
        cookie, session = sessions.begin(caller.key)
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=int(LASTS.total_seconds()),
            secure=request.headers.get("x-forwarded-proto", request.url.scheme) == "https",
            httponly=True,
            samesite="lax",  # strict would sign out whoever follows a link to an edit
        )
    return _view(caller, session)


@router.get("/session", dependencies=[needs("read")], responses=responses(400))
async def get_session(caller: Asking) -> SessionView:
    """Who asks, what he may do, and the token that he needs to do it by his cookie."""
    return _view(caller, caller.session)


@router.delete("/session", dependencies=[needs("read")], responses=responses(400), status_code=204)
async def delete_session(response: Response) -> None:
    """Sign out: the browser forgets the cookie."""
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")


def _view(caller: Asking, session: Session | None) -> SessionView:
    return SessionView(
        name=caller.name,
        scope=caller.scope,
        csrf_token=session and session.token,
        expires_at=session and session.expires_at,
    )
