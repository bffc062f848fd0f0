"""What visitors fill in, as what the API takes."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request

TEXTS = ("prompt", "correction", "subject", "reason", "expires_at")
LINES = ("paraphrases", "keep")


@dataclass(frozen=True)
class Form:
    """The fields of a form as they were sent; one that was left out is empty."""

    fields: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.fields.get(name, "")

    def text(self, name: str) -> str | None:
        """None where nothing was filled in."""
        return self[name].strip() or None

    def number(self, name: str) -> Any:
        """As JSON has it. What is none is passed on, so that it is the API that says what is wrong with it."""
        given = self[name].strip()
        try:
            number = json.loads(given)
        except ValueError:
            return given or None
        return number if isinstance(number, int | float) and math.isfinite(number) else given


async def sent(request: Request) -> Form:
    """Browsers send line ends as CR LF, whatever was typed; models know LF."""
    raw = (await request.body()).decode(errors="replace")
    return Form({name: value.replace("\r\n", "\n") for name, value in parse_qsl(raw, keep_blank_values=True)})


def edit_body(form: Form) -> dict[str, Any]:
    """A correction. A prompt keeps the white space that was typed, since the model would read it."""
    body: dict[str, Any] = {name: form[name] for name in TEXTS if form[name].strip()}
    body |= {name: lines for name in LINES if (lines := [line for line in form[name].split("\n") if line.strip()])}
    if "expires_at" in body and not body["expires_at"].endswith("Z") and "+" not in body["expires_at"]:
        body["expires_at"] += ":00Z" if body["expires_at"].count(":") == 1 else "Z"  # a browser's field knows no zone
    return body


def edit_query(form: Form) -> dict[str, Any]:
    """On which terms."""
    return {"on_conflict": form.text("on_conflict"), "allow_loss": "true" if form["allow_loss"] else None}


def new_key() -> str:
    """An Idempotency-Key for a form, so that a button which is pressed twice acts once."""
    return f"dashboard-{secrets.token_urlsafe(16)}"
