"""Sessions: a key that is shown once in a browser, and a cookie that stands for it from then on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.api import sessions
from service.api.keys import Key, KeysUnusable, changed
from service.api.sessions import COOKIE, TOKEN_HEADER
from service.app import create_app
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import ADDRESS
from tests.api.test_keys import made, write

SECRET = "0123456789abcdef" * 4


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def tokens(keys: Path) -> dict[str, str]:
    pairs = {scope: made(f"the-{scope}", scope) for scope in ("read", "edit", "admin")}
    write(keys, *(key for _, key in pairs.values()))
    return {scope: token for scope, (token, _) in pairs.items()}


@pytest.fixture
def browser(keys: Path, tokens: dict[str, str]) -> Callable[..., TestClient]:
    """A client that keeps cookies, of a service that has not been started, signed in with a key of some scope."""

    def browser(scope: str | None = None, **settings: object) -> TestClient:
        app = create_app(Settings(api_keys=keys, **settings))
        client = TestClient(app, ADDRESS, raise_server_exceptions=False)
        if scope is not None:
            answer = client.post("/session", headers={"Authorization": f"Bearer {tokens[scope]}"})
            assert answer.status_code == 200, answer.text
        return client

    return browser


def token_of(client: TestClient) -> dict[str, str]:
    return {TOKEN_HEADER: client.get("/session").json()["csrf_token"]}


def let_in(answer) -> bool:
    """Nothing is loaded, so that it is the engine that refuses."""
    return answer.json().get("code") == "not_ready"


class TestSigningIn:
    def test_gives_a_cookie_that_is_not_the_key_and_that_no_script_reads(self, browser, tokens):
        client = browser()
        answer = client.post("/session", headers={"Authorization": f"Bearer {tokens['edit']}"})
        (cookie,) = answer.headers.get_list("set-cookie")
        assert re.search(r"; HttpOnly\b", cookie)
        assert re.search(r"; SameSite=lax\b", cookie)
        assert re.search(r"; Path=/(;|$)", cookie)
        assert "; Max-Age=43200" in cookie
        assert "Secure" not in cookie  # it would not be kept on plain HTTP
        assert tokens["edit"].removeprefix("mend_") not in cookie
        assert answer.json()["name"] == "the-edit"
        assert answer.json()["scope"] == "edit"
        until = datetime.fromisoformat(answer.json()["expires_at"])
        assert timedelta(hours=11.9) < until - datetime.now(UTC) <= timedelta(hours=12)

    def test_gives_one_for_tls_alone_where_the_browser_speaks_it(self, browser, tokens):
        headers = {"Authorization": f"Bearer {tokens['edit']}", "X-Forwarded-Proto": "https"}
        assert "; Secure" in browser().post("/session", headers=headers).headers["set-cookie"]

    @pytest.mark.parametrize("shown", [None, "Bearer mend_wrong", "Basic eDp5"])
    def test_takes_a_key(self, browser, shown):
        answer = browser().post("/session", headers={"Authorization": shown} if shown else {})
        assert_problem(answer, "unauthenticated")
        assert "set-cookie" not in answer.headers

    def test_does_not_make_a_session_last_longer(self, browser):
        client = browser("read")
        answer = client.post("/session", headers=token_of(client))
        assert answer.status_code == 200
        assert "set-cookie" not in answer.headers

    def test_is_nobodys_where_there_are_no_keys(self):
        client = TestClient(create_app(Settings()), ADDRESS)
        for answer in (client.post("/session"), client.get("/session")):
            assert answer.json() == {"name": None, "scope": "admin", "csrf_token": None, "expires_at": None}
            assert "set-cookie" not in answer.headers

    def test_ends_by_signing_out(self, browser):
        client = browser("edit")
        assert client.delete("/session", headers=token_of(client)).status_code == 204
        assert COOKIE not in client.cookies
        assert_problem(client.get("/session"), "unauthenticated")


class TestASession:
    @pytest.mark.parametrize("scope", ["read", "edit", "admin"])
    def test_may_do_what_its_key_may(self, browser, scope):
        client = browser(scope)
        csrf = token_of(client)
        edit = client.post("/edits", json={"prompt": "a", "correction": "b"}, headers=csrf)
        back = client.post("/rollback", json={"revision": 0}, headers=csrf)
        assert let_in(client.get("/edits"))
        assert let_in(edit) == (scope != "read")
        assert let_in(back) == (scope == "admin")
        if scope == "read":
            assert_problem(edit, "forbidden")

    @pytest.mark.parametrize("sent", [None, "", "wrong", "é".encode()])
    @pytest.mark.parametrize("request_", ["POST /edits", "DELETE /edits/edit_1", "PUT /kill-switch", "DELETE /session"])
    def test_changes_nothing_without_its_token(self, browser, request_, sent):
        method, path = request_.split()
        client = browser("admin")
        headers = {} if sent is None else {TOKEN_HEADER: sent}
        assert_problem(client.request(method, path, headers=headers), "csrf_failed")
        assert COOKIE in client.cookies

    def test_changes_nothing_with_the_token_of_another(self, browser):
        one, other = browser("admin"), browser("admin")
        assert token_of(one) != token_of(other)
        assert_problem(one.put("/kill-switch", headers=token_of(other)), "csrf_failed")

    def test_is_not_looked_at_where_a_key_is_shown(self, browser, tokens):
        client = browser("read")
        client.cookies.set(COOKIE, "nonsense")
        answer = client.post("/rollback", json={"revision": 0}, headers={"Authorization": f"Bearer {tokens['admin']}"})
        assert let_in(answer)

    def test_that_somebody_made_up_is_none(self, browser):
        client = browser("read")
        cookie = client.cookies[COOKIE]
        for forged in ("", "nonsense", cookie[:-1] + ("A" if cookie[-1] != "A" else "B"), "x" + cookie, "ü"):
            client.cookies.clear()
            assert_problem(client.get("/edits", headers={"Cookie": f"{COOKIE}={forged}".encode()}), "unauthenticated")

    def test_ends_with_its_time(self, browser, monkeypatch):
        client = browser("read")
        monkeypatch.setattr(sessions, "LASTS", timedelta(seconds=1))
        assert let_in(client.get("/edits"))
        time.sleep(2.1)  # signatures know whole seconds
        body = assert_problem(client.get("/edits"), "unauthenticated")
        assert "sign in again" in body["detail"]

    def test_ends_with_its_key(self, browser, keys):
        client = browser("edit")
        with changed(keys) as held:
            held[:] = [key for key in held if key.name != "the-edit"]
        assert "revoked" in assert_problem(client.get("/edits"), "unauthenticated")["detail"]

    def test_is_not_that_of_a_later_key_of_the_same_name(self, browser, keys):
        client = browser("edit")
        _, other = made("the-edit", "admin")
        with changed(keys) as held:
            held[:] = [key for key in held if key.name != "the-edit"]
            held.append(other)
        assert_problem(client.get("/edits"), "unauthenticated")

    def test_ends_when_its_key_expires(self, browser, keys, tokens):
        client = browser("edit")
        with changed(keys) as held:
            held[:] = [
                Key.model_validate({**key.model_dump(), "expires_at": datetime.now(UTC) - timedelta(seconds=1)})
                for key in held
            ]
        assert "expired" in assert_problem(client.get("/edits"), "unauthenticated")["detail"]

    def test_ends_with_the_process_unless_there_is_a_secret(self, browser, tmp_path):
        secret = tmp_path / "secret"
        secret.write_text(SECRET + "\n")
        for settings, good in (({}, False), ({"session_secret": secret}, True)):
            cookie = browser("read", **settings).cookies[COOKIE]
            other = browser(**settings)
            other.cookies.set(COOKIE, cookie)
            assert let_in(other.get("/edits")) == good


class TestTheSecret:
    @pytest.mark.parametrize("content", [None, "short", "x" * 31])
    def test_that_is_none_is_refused_before_anything_is_loaded(self, keys, tokens, tmp_path, content):
        path = tmp_path / "secret"
        if content is not None:
            path.write_text(content)
        with pytest.raises(KeysUnusable, match="MEND_SESSION_SECRET"):
            create_app(Settings(api_keys=keys, session_secret=path))
