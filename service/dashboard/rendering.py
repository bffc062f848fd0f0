"""Templates to HTML. Everything that comes from a model, a ledger or a visitor is escaped, without exception."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""No script and no style but the two files of ours, so that whatever came through the escaping could do nothing."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",  # without any, browsers say that forms come from nowhere
}
STATIC = {
    name: (files("service.dashboard") / "static" / name).read_bytes() for name in ("dashboard.css", "dashboard.js")
}
TYPES = {"dashboard.css": "text/css; charset=utf-8", "dashboard.js": "text/javascript; charset=utf-8"}
VERSION = sha256(b"".join(STATIC.values())).hexdigest()[:12]
"""In the URLs of both, so that a browser never mixes those of two releases."""


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """An answer made of a template."""
    html = _templates.get_template(template).render(values)
    return HTMLResponse(html, status, HEADERS)


def _when(iso: str | None) -> str:
    """`2026-11-23 21:40:05`, in UTC."""
    return "" if iso is None else datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return "0 %" if share == 0 else f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def _milliseconds(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms"


def _visible(text: str) -> str:
    """A token, with the white space at its ends and the line ends in it made visible."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return shown if shown.strip() else shown.replace(" ", "␣")


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _curl(method: str, url: str, body: Any = None, *, key: bool = False) -> str:
    """A command that asks the same. key: whether the service asks for one."""
    words = ["curl", "-sS"]
    if method != "GET" and not (method == "POST" and body is not None):
        words += ["-X", method]
    line = shlex.join([*words, url])
    if key:
        line += ' \\\n  -H "Authorization: Bearer $MEND_API_KEY"'
    if body is not None:
        line += " \\\n  -H 'Content-Type: application/json'"
        line += f" \\\n  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    return line


_templates = Environment(
    loader=PackageLoader("service.dashboard"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_templates.globals |= {"version": VERSION, "curl": _curl}
_templates.filters |= {"when": _when, "percent": _percent, "ms": _milliseconds, "visible": _visible, "pretty": _pretty}
