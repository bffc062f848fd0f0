"""Who may do what: each route declares the scope that it takes, and every request has a caller that holds one.

Flow: `dependencies=[needs("edit")]` at a route -> Routes, which knows every route's scope, or refuses to be built ->
the gate finds the caller and lets him demand that scope -> the route finds him at `request.state.caller`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Security
from fastapi.params import Security as SecurityParameter
from fastapi.security import HTTPBearer
from starlette.routing import BaseRoute, Route

from service.api.keys import SCOPES, Key, Scope
from service.api.rates import Rates

if TYPE_CHECKING:
    from service.api.sessions import Session

OPEN = frozenset({"/", "/docs", "/openapi.json", "/livez", "/readyz"})
"""Paths that take no key: the probes, and what the API looks like."""

CHALLENGE = 'Bearer realm="mend-service"'

_bearer = HTTPBearer(
    scheme_name="key",
    auto_error=False,
    description="An API key: `Authorization: Bearer mend_…`. Not asked for where the service has no keys.",
)


def needs(scope: Scope) -> SecurityParameter:
    """Declare what a route takes. It is the gate that looks: before a body is read, and for whatever key."""
    return Security(_bearer, scopes=[scope])


class AccessRefused(Exception):
    """Base of what keeps a request out. headers: of the answer."""

    code = "access_refused"

    def __init__(self, message: str, headers: dict[str, str] | None = None, **facts: object) -> None:
        super().__init__(message)
        self.headers, self.facts = headers or {}, facts


class Unauthenticated(AccessRefused):
    """No key, or none that is good."""

    code = "unauthenticated"

    def __init__(self, message: str, *, error: str | None = None) -> None:
        super().__init__(message, {"WWW-Authenticate": CHALLENGE + (f', error="{error}"' if error else "")})


class Forbidden(AccessRefused):
    """A good key, of a scope that is too narrow."""

    code = "forbidden"

    def __init__(self, name: str, needed: Scope, held: Scope) -> None:
        super().__init__(
            f"this takes a key of scope {needed}, and {name} has scope {held}; ask with another key",
            {"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{needed}"'},
            needed=needed,
            held=held,
        )


class RateLimited(AccessRefused):
    code = "rate_limited"

    def __init__(self, limit: str, wait_s: int) -> None:
        super().__init__(
            f"more than {limit}; try again in {wait_s} s", {"Retry-After": str(wait_s)}, retry_after_s=wait_s
        )


class CrossSite(AccessRefused):
    """A browser asks for a page of somebody else."""

    code = "cross_site"


class HostNotAllowed(AccessRefused):
    """The service is addressed by a name that is not its own."""

    code = "host_not_allowed"


class UndeclaredRoute(Exception):
    """A mistake of ours: a route that does not say who may use it."""


@dataclass
class Caller:
    """Who asks. key, and its name: None where the service has no keys, and everybody may do everything.

    address: where he asks from. session: by which he shows his key, if he does not show the key itself.
    demanded: the widest scope that the request has taken so far. holds: whether what he shows is still good, for what
    goes on for long.
    """

    key: Key | None
    address: str
    rates: Rates
    session: Session | None = None
    demanded: Scope | None = None
    holds: Callable[[], bool] = lambda: True

    @property
    def name(self) -> str | None:
        return self.key and self.key.name

    @property
    def scope(self) -> Scope:
        return self.key.scope if self.key else SCOPES[-1]

    def demand(self, needed: Scope) -> None:
        """Raises Forbidden; RateLimited, which what is refused for its scope does not count for."""
        self.demanded = needed
        if SCOPES.index(self.scope) < SCOPES.index(needed):
            raise Forbidden(self.name or "nobody", needed, self.scope)
        kind = "reads" if needed == "read" else "changes"
        if wait_s := self.rates.wait_s(kind, self.name or self.address):
            raise RateLimited(self.rates.of(kind), wait_s)

    def acts_for(self, actor: str | None) -> str | None:
        """Who did it, for the ledger. actor: who he says he asks for, which nobody checks where there is a key."""
        if self.name is None:
            return actor
        return f"{self.name} (for {actor})" if actor else self.name


async def caller_of(request: Request) -> Caller:
    return request.state.caller


Asking = Annotated[Caller, Depends(caller_of)]


@dataclass(frozen=True)
class Declared:
    """What a route says of itself. template: its path, with the names of its parameters."""

    template: str
    methods: frozenset[str]
    pattern: re.Pattern[str]
    scope: Scope


class Routes:
    """The scope of every route of an app. Raises UndeclaredRoute, so that none can be forgotten."""

    def __init__(self, routers: Iterable[APIRouter]) -> None:
        self._declared = [
            _declared(route) for router in routers for route in router.routes if getattr(route, "path", "") not in OPEN
        ]

    def find(self, method: str, path: str) -> Declared | None:
        """The route that would answer; None if there is none."""
        for each in self._declared:
            if method in each.methods and each.pattern.match(path):
                return each
        return None


def _declared(route: BaseRoute) -> Declared:
    scopes: list[Any] = [
        scope
        for dependency in getattr(route, "dependencies", ())
        if isinstance(dependency, SecurityParameter) and dependency.dependency is _bearer
        for scope in dependency.scopes
    ]
    if not isinstance(route, Route) or len(scopes) != 1 or scopes[0] not in SCOPES:
        raise UndeclaredRoute(
            f"{getattr(route, 'path', route)} should declare a scope, as in dependencies=[needs('read')], or be OPEN"
        )
    return Declared(route.path, frozenset(route.methods or ()), route.path_regex, scopes[0])
