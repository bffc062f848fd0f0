"""Which route a path is of: by its template, which has no end of values."""

from __future__ import annotations

from collections.abc import Sequence

import fastapi
from starlette.routing import BaseRoute

NO_ROUTE = "none"
"""What is told of paths that nobody knows, of which there could be any number."""


class Templates:
    """Of every route of an app: asked by path, since a request may be answered before it comes to a route."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        # Where FastAPI keeps included routers apart, it has a function that tells their routes.
        flat = getattr(fastapi.routing, "iter_route_contexts", iter)(routes)
        self._known = [
            (route.path_regex, getattr(route, "methods", None), route.path_format)
            for route in flat
            if hasattr(route, "path_regex")
        ]

    def find(self, method: str, path: str) -> str:
        """The route that is asked, or would be but for the method."""
        found = [(methods, template) for regex, methods, template in self._known if regex.match(path)]
        asked = (template for methods, template in found if methods is None or method in methods)
        return next(asked, found[0][1] if found else NO_ROUTE)

    def methods(self, path: str) -> list[str]:
        """All that some route takes on a path; where it is one of its own, not what a pattern would take."""
        found = [(methods or (), template) for regex, methods, template in self._known if regex.match(path)]
        own = [methods for methods, template in found if template == path]
        return sorted({method for methods in own or [methods for methods, _ in found] for method in methods})
