"""GET /edits by who made them and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from service.api.listing import EditsQuery
from service.engine import Edit
from tests.api.answers import assert_problem
from tests.ledger.entries import applied, rolled_back

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
EDITS = (
    Edit(applied(1, actor="Zoë (for ÅSA)", created_at=MIDNIGHT - timedelta(microseconds=1))),
    Edit(applied(2, actor="ci", created_at=MIDNIGHT), rolled_back(5, "edit-2")),
    Edit(applied(3, created_at=MIDNIGHT + timedelta(hours=12))),
    Edit(applied(4, actor="ci (for Zoë)", created_at=MIDNIGHT + timedelta(days=1) - timedelta(microseconds=1))),
    Edit(applied(5, actor="CI", created_at=MIDNIGHT + timedelta(days=1))),
)


def picked(**query: str) -> list[int]:
    return [edit.applied.sequence for edit in EDITS if EditsQuery(**query).picks(edit)]


@pytest.mark.parametrize(("query", "expected"), [
    ({}, [1, 2, 3, 4, 5]),
    ({"actor": ""}, [1, 2, 3, 4, 5]),
    ({"actor": "ci"}, [2, 4, 5]),
    ({"actor": "ZOË"}, [1, 4]),
    ({"actor": "åsa"}, [1]),
    ({"actor": "nobody"}, []),
    ({"since": "2026-03-01"}, [2, 3, 4, 5]),
    ({"until": "2026-03-01"}, [1, 2, 3, 4]),
    ({"since": "2026-03-01", "until": "2026-03-01"}, [2, 3, 4]),
    ({"since": "2026-03-01T12:00:00Z"}, [3, 4, 5]),
    ({"until": "2026-03-01T12:00:00Z"}, [1, 2, 3]),
    ({"since": "2026-03-01T13:00:00+01:00", "until": "2026-03-01T07:00:00-05:00"}, [3]),
    ({"since": "2026-03-01t12:00:00.000001z"}, [4, 5]),
    ({"since": "2026-03-01 00:00:00Z", "until": "2026-03-01"}, [2, 3, 4]),
    ({"since": "0001-01-01", "until": "9999-12-31"}, [1, 2, 3, 4, 5]),
    ({"actor": "ci", "status": "applied", "until": "2026-03-01"}, [4]),
    ({"actor": "zoë", "cursor": "4"}, [1]),
    ({"q": "EIFFEL", "since": "2026-03-02"}, [5]),
])  # fmt: skip
def test_picks(query, expected):
    assert picked(**query) == expected


BAD = ("yesterday", "", "2026-02-30", "2026-3-1", "20260301", "1772323200", "2026-03-01T12:00:00",
       "2026-03-01T12:00Z", "2026-03-01T25:00:00Z", "2026-03-01T12:00:00+0100", "2026-03-01T12:00:00 01:00",
       "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "0000-01-01", "\uff12026-03-01",
       "2026-03-01T12:00:00+24:00", "2026-W09-7")  # fmt: skip


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["since", "until"])
def test_what_is_no_date_is_refused_with_what_is_one(client, name, value):
    problem = assert_problem(client.get("/edits", params={name: value}), "invalid_request")
    (error,) = problem["errors"]
    assert error["field"] == f"query.{name}"
    assert "2030-01-31T12:00:00Z" in error["message"]


@pytest.mark.parametrize(("since", "until"), [
    ("2026-03-02", "2026-03-01"), ("2026-03-01T12:00:00Z", "2026-03-01T12:59:59+01:00"),
    ("2026-03-02T00:00:00Z", "2026-03-01"),
])  # fmt: skip
def test_an_end_before_the_beginning_is_refused_once(client, since, until):
    problem = assert_problem(client.get("/edits", params={"since": since, "until": until}), "invalid_request")
    (error,) = problem["errors"]
    assert "is after until" in error["message"]


def test_edits_are_listed_by_who_made_them_and_when_page_by_page(client, bodies):
    ids = [
        client.post("/edits", json=body, headers={"X-Actor": actor.encode()}).json()["id"]
        for body, actor in zip(bodies, ("listing Zoë", "listing ci", "LISTING ZOË 2"), strict=True)
    ]
    here = datetime.now(UTC).astimezone(timezone(timedelta(hours=5, minutes=30)))

    def listed(**query: object) -> list[str]:
        found, page = [], {"next_cursor": None}
        while True:
            cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else {}
            page = client.get("/edits", params={"limit": 1, **query, **cursor}).json()
            found += [edit["id"] for edit in page["items"]]
            if page["next_cursor"] is None:
                return found

    assert listed(actor="listing zoë") == [ids[2], ids[0]]
    assert listed(actor="listing", status="applied") == ids[::-1]
    assert listed(actor="listing", until=here.isoformat()) == ids[::-1]
    assert listed(actor="listing", since=here.isoformat()) == []
    first, made, last = (client.get(f"/edits/{edit_id}").json()["created_at"] for edit_id in ids)
    assert listed(actor="listing", since=first[:10], until=last[:10]) == ids[::-1]
    assert listed(actor="listing", since=made) == [ids[2], ids[1]]
    assert listed(actor="listing", until=made) == [ids[1], ids[0]]
