"""Which edits to list: what `GET /edits` can be asked, and which edits that picks.

Days are whole days in UTC, so that a moment is between both of its ends, whatever its fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from service.api.requests import StrictRequest
from service.engine import Edit

DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
SCHEMA = {"anyOf": [{"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}]}


def _moment(of_day: time) -> Callable[[Any], datetime]:
    """Reads a moment, or a day, for which it takes a time of it."""

    def read(value: Any) -> datetime:
        try:
            if DAY.fullmatch(value):
                return datetime.combine(date.fromisoformat(value), of_day, UTC)
            if MOMENT.fullmatch(value):
                return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError):  # a day that is not in the calendar, or beyond its years
            pass
        raise ValueError(
            "must be a day such as 2030-01-31, or a moment with its zone such as 2030-01-31T12:00:00Z or "
            "2030-01-31T13:00:00+01:00 (in a URL, + is written %2B)"
        )

    return read


Since = Annotated[datetime, BeforeValidator(_moment(time.min)), WithJsonSchema(SCHEMA)]
Until = Annotated[datetime, BeforeValidator(_moment(time.max)), WithJsonSchema(SCHEMA)]


class EditsQuery(StrictRequest):
    """Which edits to list, newest first."""

    status: Literal["applied", "superseded", "rolled_back"] | None = None
    q: str | None = Field(None, max_length=1000, description="Text in the prompt or the correction.")
    actor: str | None = Field(None, max_length=200, description="Text in the name of who made it.")
    since: Since | None = Field(None, description="Made then or later: a day in UTC, or a moment with its zone.")
    until: Until | None = Field(None, description="Made then or before; a day is meant with all of it.")
    limit: int = Field(50, ge=1, le=500)
    cursor: str | None = Field(None, pattern=r"^[0-9]{1,15}$", description="`next_cursor` of the page before.")

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.since and self.until and self.since > self.until:
            raise ValueError(f"since ({self.since.isoformat()}) is after until ({self.until.isoformat()}); swap them")
        return self

    def picks(self, edit: Edit) -> bool:
        """Whether an edit is one of those."""
        applied = edit.applied
        return (
            (self.cursor is None or applied.sequence < int(self.cursor))
            and self.status in (None, edit.status)
            and _says(f"{applied.prompt}\n{applied.correction}", self.q)
            and _says(applied.actor or "", self.actor)
            and (self.since is None or applied.created_at >= self.since)
            and (self.until is None or applied.created_at <= self.until)
        )


def _says(text: str, wanted: str | None) -> bool:
    return not wanted or wanted.casefold() in text.casefold()
