"""Every route, as everybody meets it: with no key, a bad one, and one of each scope; and who did it, as it is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from service.api import rates
from service.api.callers import OPEN, UndeclaredRoute, needs
from service.api.doors import PAGES, guard
from service.api.keys import SCOPES, changed
from service.logs import formatter
from service.settings import Settings
from service.telemetry import Telemetry
from tests.api.answers import assert_problem
from tests.api.conftest import Serve
from tests.api.test_keys import made
from tests.service_fixtures import never_takes

TAKES = {
    "GET /edits": "read",
    "GET /edits/audit": "read",
    "GET /edits/audit?fresh=true": "edit",
    "GET /edits/{edit_id}": "read",
    "GET /edits/{edit_id}/weights": "read",
    "GET /events": "read",
    "GET /generate": "read",
    "POST /generate": "read",
    "GET /metrics": "read",
    "GET /model": "read",
    "GET /model/health": "read",
    "POST /score": "read",
    "GET /v1/models": "read",
    "GET /v1/models/{model:path}": "read",
    "POST /v1/completions": "read",
    "POST /v1/chat/completions": "read",
    "GET /replicas": "read",
    "GET /revision": "read",
    "GET /revision?verify=true": "edit",
    "POST /edits": "edit",
    "POST /edits?dry_run=true": "edit",
    "POST /edits/batch": "edit",
    "DELETE /edits/{edit_id}": "edit",
    "GET /tags": "read",
    "GET /tags/{name}": "read",
    "PUT /tags/{name}": "edit",
    "DELETE /tags/{name}": "edit",
    "GET /kill-switch": "read",
    "PUT /kill-switch": "admin",
    "DELETE /kill-switch": "admin",
    "POST /rollback": "admin",
    "POST /rollback?dry_run=true": "admin",
    "GET /export": "admin",
    "POST /session": "read",
    "GET /session": "read",
    "DELETE /session": "read",
}
"""The scope that each route takes, by what is asked of it."""
WITHOUT_KEY = {"GET /", "GET /docs", "GET /livez", "GET /readyz", "GET /openapi.json", "HEAD /openapi.json"}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The file of keys, and a token of each scope. Each key is named by its scope."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    pairs = {scope: made(scope, scope) for scope in SCOPES}
    with changed(path) as held:
        held += [key for _, key in pairs.values()]
    return path, {scope: token for scope, (token, _) in pairs.items()}


@pytest.fixture(scope="module")
def keyed(serve: Serve, keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "MOST_FAILED", "100000/minute")  # all tests here ask from one address
        with serve(tmp_path_factory.mktemp("data"), api_keys=keys[0], audit_every_s=0) as client:
            yield client


@pytest.fixture
def ask(keyed: TestClient, keys) -> Callable:
    """Send a request with the key of a scope, with a text for one, or with none."""

    def ask(who: str | None, request: str, **given):
        method, _, path = request.partition(" ")
        headers = given.pop("headers", {})
        if path == "/events":  # which would not end
            given["params"] = {"until": "now"}
        if who is not None:
            headers = {"Authorization": f"Bearer {keys[1].get(who, who)}", **headers}
        return keyed.request(
            method, path.replace("{edit_id}", "edit_0").replace("{name}", "a"), headers=headers, **given
        )

    return ask


def routes_of(app: FastAPI) -> set[str]:
    return {f"{method} {each.path}" for each in iter_route_contexts(app.routes) for method in each.methods or {"ANY"}}


class TestEveryRoute:
    def test_is_in_the_table_here_or_open(self, keyed):
        asked = {route for route in routes_of(keyed.app) if PAGES not in route}
        assert asked == {request.partition("?")[0] for request in TAKES} | WITHOUT_KEY
        assert {request.partition(" ")[2] for request in WITHOUT_KEY} == OPEN

    def test_tells_openapi_which_scope_it_takes(self, keyed):
        described = keyed.app.openapi()
        (scheme,) = described["components"]["securitySchemes"].values()
        assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
        told = {
            f"{method.upper()} {path}": operation.get("security")
            for path, operations in described["paths"].items()
            for method, operation in operations.items()
        }
        taken = {
            request.replace(":path", ""): [{"key": [scope]}] for request, scope in TAKES.items() if "?" not in request
        }
        assert {request: told[request] for request in taken} == taken
        assert all(told[request] is None for request in set(told) - set(taken))

    def test_tells_openapi_that_none_needs_a_key_where_there_are_none(self, client):
        for operations in client.app.openapi()["paths"].values():
            for operation in operations.values():
                assert operation.get("security", [{}])[0] == {}

    @pytest.mark.parametrize("request_", TAKES)
    @pytest.mark.parametrize("who", [None, "mend_" + "x" * 43, *SCOPES])
    def test_lets_in_whom_it_should(self, ask, request_, who):
        answer = ask(who, request_, headers={"If-Match": '"1"'} if "kill" in request_ else {})  # switched by nobody
        if who not in SCOPES and "/v1/" in request_:
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated")
            assert answer.json()["error"]["type"] == "authentication_error"
        elif who not in SCOPES:
            assert_problem(answer, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith('Bearer realm="mend-service"')
            assert ("invalid_token" in answer.headers["www-authenticate"]) == (who is not None)
        elif SCOPES.index(who) < SCOPES.index(TAKES[request_]):
            body = assert_problem(answer, "forbidden")
            assert (body["needed"], body["held"]) == (TAKES[request_], who)
            assert f'scope="{TAKES[request_]}"' in answer.headers["www-authenticate"]
        else:
            assert answer.status_code in (200, 201, 204, 400, 404, 409, 412, 422), answer.text

    @pytest.mark.parametrize("request_", sorted(WITHOUT_KEY - {"HEAD /openapi.json"}))
    def test_that_is_open_takes_no_key(self, ask, request_):
        answer = ask(None, request_, follow_redirects=False)
        assert answer.status_code == (303 if request_ == "GET /" else 200)  # a page, which leads to where one signs in

    @pytest.mark.parametrize("request_", ["GET /nothing", "POST /livez/x", "PUT /edits", "GET /edits/", "PATCH /model"])
    def test_that_there_is_not_is_not_told_to_strangers(self, ask, request_):
        assert_problem(ask(None, request_), "unauthenticated")
        assert ask("read", request_, follow_redirects=False).status_code in (307, 404, 405)

    def test_asks_for_the_key_before_it_reads_a_body(self, ask):
        for content in (b"{", b" " * 2_000_001):
            given = {"content": content, "headers": {"content-type": "application/json"}}
            assert_problem(ask(None, "POST /edits", **given), "unauthenticated")
            assert_problem(ask("read", "POST /edits", **given), "forbidden")
            assert_problem(ask("read", "POST /edits/batch", **given), "forbidden")

    @pytest.mark.parametrize("dependencies", [[], [needs("read"), needs("edit")]])
    def test_that_does_not_say_what_it_takes_keeps_the_app_from_being_built(self, dependencies):
        router = APIRouter()

        @router.get("/new", dependencies=dependencies)
        def get_new() -> None: ...

        with pytest.raises(UndeclaredRoute, match="/new"):
            guard(FastAPI(), Settings(), [router], APIRouter(), Telemetry())


class TestKey:
    @pytest.mark.parametrize(
        "header",
        [
            "",
            "Bearer",
            "Bearer ",
            "Basic {}",
            "{}",
            "Bearer {} x",
            "Bearer {}x",
            "Bearer mend_",
            "Token {}",
            "Bearer \xff",
        ],
    )
    def test_that_is_not_sent_as_one_is_none(self, keyed, keys, header):
        sent = header.format(keys[1]["admin"]).encode("latin-1")
        assert_problem(keyed.get("/model", headers={"Authorization": sent}), "unauthenticated")

    @pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER   {} "])
    def test_is_sent_as_clients_of_other_services_do(self, keyed, keys, header):
        sent = header.format(keys[1]["read"])
        assert keyed.get("/model", headers={"Authorization": sent}).status_code == 200

    def test_sent_twice_is_none(self, keyed, keys):
        sent = [("Authorization", f"Bearer {keys[1][scope]}") for scope in ("read", "admin")]
        assert_problem(keyed.get("/model", headers=sent), "unauthenticated")

    def test_that_expired_says_so(self, keyed, keys):
        token, key = made("late", expires_at="2020-01-01T00:00:00Z")
        with changed(keys[0]) as held:
            held.append(key)
        answer = keyed.get("/model", headers={"Authorization": f"Bearer {token}"})
        assert "expired at 2020-01-01" in assert_problem(answer, "unauthenticated")["detail"]

    def test_that_is_revoked_is_refused_from_then_on(self, keyed, keys):
        token, key = made("leaver", "edit")
        with changed(keys[0]) as held:
            held.append(key)
        headers = {"Authorization": f"Bearer {token}"}
        assert keyed.get("/model", headers=headers).status_code == 200
        with changed(keys[0]) as held:
            held.remove(key)
        assert_problem(keyed.get("/model", headers=headers), "unauthenticated")

    def test_is_not_asked_for_where_the_service_has_none(self, client):
        assert client.get("/model", headers={"Authorization": "Bearer anything"}).status_code == 200


class TestWhoDidWhat:
    @pytest.mark.parametrize(
        ("actor", "told"),
        [
            (None, "edit"),
            ("", "edit"),
            ("Zoë".encode(), "edit (for Zoë)"),
            ("admin) (for me", "edit (for admin) (for me)"),
        ],
    )
    def test_is_told_to_the_ledger_by_the_name_of_the_key(self, ask, bodies, actor, told):
        headers = {} if actor is None else {"X-Actor": actor}
        edit = ask("edit", "POST /edits", json=bodies[0], headers=headers).json()
        gone = ask("admin", f"DELETE /edits/{edit['id']}", headers=headers).json()
        assert edit["actor"] == told
        assert gone["edit"]["rolled_back"]["actor"] == told.replace("edit", "admin", 1)

    def test_is_told_of_tags_and_of_going_back_too(self, ask):
        revision = ask("read", "GET /revision").json()["revision"]
        tagged = ask("edit", "PUT /tags/mine", headers={"X-Actor": "ops"}).json()
        assert tagged["actor"] == "edit (for ops)"
        assert ask("edit", "DELETE /tags/mine").status_code == 200
        assert ask("admin", "PUT /kill-switch", headers={"X-Actor": "me"}).json()["actor"] == "admin (for me)"
        assert ask("admin", "DELETE /kill-switch").json()["actor"] == "admin"
        assert ask("admin", "POST /rollback", json={"revision": revision}).status_code == 200

    def test_is_told_of_a_batch_too(self, ask, bodies):
        batch = ask("edit", "POST /edits/batch", json={"edits": [bodies[0]]}, headers={"X-Actor": "ops"}).json()
        edit = ask("read", f"GET /edits/{batch['edits'][0]['id']}").json()
        assert edit["actor"] == "edit (for ops)"
        assert ask("edit", f"DELETE /edits/{edit['id']}").status_code == 200


class TestAudit:
    @pytest.fixture
    def lines(self, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[dict]]]:
        names = ("key", "actor", "method", "route", "status", "code", "edit_id", "revision")

        def lines() -> list[dict]:
            found = [
                {name: getattr(record, name, None) for name in names}
                for record in caplog.records
                if record.name == "mend.audit"
            ]
            caplog.clear()
            return found

        with caplog.at_level(logging.INFO, "mend.audit"):
            yield lines

    def test_has_what_changed_something(self, ask, bodies, lines):
        edit = ask("edit", "POST /edits", json=bodies[0], headers={"X-Actor": "ops"}).json()
        (line,) = lines()
        assert line == {
            "key": "edit", "actor": "edit (for ops)", "method": "POST", "route": "/edits", "status": 201, "code": None,
            "edit_id": edit["id"], "revision": edit["revision"],
        }  # fmt: skip
        gone = ask("edit", f"DELETE /edits/{edit['id']}").json()
        (line,) = lines()
        assert (line["method"], line["route"]) == ("DELETE", "/edits/{edit_id}")
        assert (line["edit_id"], line["revision"], line["status"]) == (edit["id"], gone["revision"], 200)

    def test_has_what_tried_to(self, ask, lines):
        refused = {"prompt": never_takes().prompt, "correction": never_takes().correction}
        for request, given, status, code in [
            ("POST /edits", {"json": refused}, 422, "did_not_take"),
            ("POST /edits", {"content": b"{"}, 422, "invalid_request"),
            ("POST /edits/batch", {"json": {"edits": []}}, 422, "invalid_request"),
            ("DELETE /edits/{edit_id}", {}, 404, "edit_not_found"),
            ("GET /edits/audit?fresh=true", {}, 200, None),
        ]:
            ask("edit", request, **given)
            (line,) = lines()
            assert (line["key"], line["status"], line["code"]) == ("edit", status, code), request

    def test_has_the_outcome_of_a_batch_that_is_told_line_by_line(self, ask, bodies, lines):
        headers = {"content-type": "application/x-ndjson"}
        refused = {"prompt": "nobody asks this", "correction": never_takes().correction}
        for last, code in ((bodies[1], None), (refused, "batch_refused")):
            content = "\n".join(json.dumps(each) for each in (bodies[0], last))
            told = ask("edit", "POST /edits/batch", content=content, headers=headers)
            made = [json.loads(line)["edit"]["id"] for line in told.text.splitlines() if '"status":"applied"' in line]
            *_, outcome, answer = sorted(lines(), key=lambda line: line["status"] or 0)
            assert (answer["status"], answer["code"]) == (200, code)
            assert (outcome["status"], outcome["key"], outcome["code"]) == (None, "edit", code)
            assert (outcome["revision"] is None) == (code is not None)
            for edit_id in made:
                ask("edit", f"DELETE /edits/{edit_id}")
            assert len(lines()) == len(made) == (0 if code else 2)

    def test_has_everybody_who_was_kept_out(self, ask, lines, caplog):
        ask(None, "GET /model")
        ask("mend_bad", "POST /edits")
        ask("read", "GET /export")
        ask("read", "GET /revision?verify=true")
        assert [record.levelname for record in caplog.records if record.name == "mend.audit"] == ["WARNING"] * 4
        told = [(line["key"], line["route"], line["status"], line["code"]) for line in lines()]
        assert told == [
            (None, "/model", 401, "unauthenticated"),
            (None, "/edits", 401, "unauthenticated"),
            ("read", "/export", 403, "forbidden"),
            ("read", "/revision", 403, "forbidden"),
        ]

    def test_is_kept_however_little_else_is_logged(self):
        ours = logging.getLogger("mend")
        before = ours.level
        ours.setLevel(logging.ERROR)
        try:
            assert logging.getLogger("mend.audit").isEnabledFor(logging.INFO)
            assert not logging.getLogger("mend.access").isEnabledFor(logging.INFO)
        finally:
            ours.setLevel(before)

    def test_has_nothing_of_what_only_reads(self, ask, lines):
        for request in ("GET /model", "GET /edits", "GET /generate?prompt=The", "GET /nothing"):
            ask("edit", request)
        assert lines() == []

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_is_a_line_that_is_safe_to_print(self, ask, bodies, caplog, keys, form):
        with caplog.at_level(logging.INFO, "mend.audit"):
            ask(
                "edit",
                "POST /edits?dry_run=true",
                json=bodies[0],
                headers={"X-Actor": ("\x1b[2J\u0085" + "ops" * 60).encode()},
            )
        (record,) = [record for record in caplog.records if record.name == "mend.audit"]
        told = formatter(form).format(record)
        assert told.isprintable() == (form == "text" or told.isascii())
        assert "edit (for " in told
        assert "/edits" in told
        assert bodies[0]["prompt"] not in told
        assert not any(token in told for token in keys[1].values())


class TestLimits:
    def test_are_told_in_readyz_only_where_something_is_wrong(self, keyed):
        assert keyed.get("/readyz").json()["warnings"] == []
