"""Pages as HTTP: what they answer to whom, in which state of the service. A browser's part is in tests/browser."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.dashboard.rendering import POLICY, STATIC
from service.settings import Settings
from tests.api.conftest import ADDRESS
from tests.api.test_keys import made, write

PAGES = ["/", "/ui/new", "/ui/rollback", "/ui/health", "/ui/playground", "/ui/sign-in"]
HARM = """<script>alert('"&"""


class Read(HTMLParser):
    """What a page has: its text, links by their rel, the value of every field, and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.fields, self.tags = "", {}, {}, []
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag == "link":
            self.links[given["rel"]] = given["href"]
        if tag == "input":
            self.fields[given.get("name")] = given.get("value", "")
        self._in = given.get("name", "") if tag == "textarea" else ""

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        self.text += data
        if self._in:
            self.fields[self._in] = self.fields.get(self._in, "") + data


def read(answer, status: int = 200) -> Read:
    assert answer.status_code == status, answer.text[:2000]
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"] == POLICY
    return Read(answer.text)


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[TestClient]:
    """A client of a service with keys that has not been started; `tokens` by scope."""
    pairs = {scope: made(f"the-{scope}", scope) for scope in ("read", "edit", "admin")}
    write(tmp_path / "keys.json", *(key for _, key in pairs.values()))
    app = create_app(Settings(api_keys=tmp_path / "keys.json"))
    keyed = TestClient(app, ADDRESS, raise_server_exceptions=False)
    keyed.tokens = {scope: token for scope, (token, _) in pairs.items()}
    return keyed


class TestEveryPage:
    @pytest.mark.parametrize("path", PAGES)
    def test_is_a_page_under_a_policy_without_inline_anything(self, client, path):
        answer = client.get(path)
        page = read(answer)
        assert "unsafe" not in POLICY
        for tag, given in page.tags:
            assert "style" not in given, tag
            assert not [name for name in given if name.startswith("on")], tag
            assert tag != "script" or given["src"].startswith("/ui/static/")
        assert "<style" not in answer.text

    @pytest.mark.parametrize("path", [*PAGES, "/?q=x&status=applied&limit=3", "/ui/playground?prompt=The+dog&seed=1"])
    def test_names_its_twin_in_json(self, client, path):
        twin = read(client.get(path)).links["alternate"]
        answer = client.get(twin)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"

    def test_has_files_of_its_own_alone(self, client):
        answer = client.get("/")
        for source in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
            assert source.startswith(("/", "#", "data:")), source
        for name in STATIC:
            assert client.get(f"/ui/static/{name}").content == STATIC[name]
        assert client.get("/ui/static/other.css").status_code == 404

    @pytest.mark.parametrize("path", PAGES[:-1])
    def test_is_a_page_while_the_model_is_loading(self, path):
        answer = TestClient(create_app(Settings()), ADDRESS, raise_server_exceptions=False).get(path)
        page = read(answer, answer.status_code)
        assert answer.status_code in (200, 503)
        assert "not ready" in page.text

    def test_that_there_is_not_is_a_problem(self, client):
        page = read(client.get("/ui/edits/edit_of_nobody"), 404)
        assert "edit_not_found" in page.text


class TestTheLedger:
    def test_without_edits_shows_how_to_make_one(self, fresh):
        page = read(fresh.get("/"))
        assert "No edits yet" in page.text
        assert f"curl -sS {ADDRESS}/edits" in page.text

    def test_without_a_match_shows_how_to_ask_the_same(self, client):
        page = read(client.get("/", params={"q": "nothing of the kind", "status": "applied"}))
        assert "No edit matches" in page.text
        assert "q=nothing+of+the+kind&status=applied" in page.text

    def test_of_an_edit_names_it_in_json(self, client, bodies):
        edit = client.post("/edits", json=bodies[0]).json()
        twin = read(client.get(f"/ui/edits/{edit['id']}")).links["alternate"]
        assert client.get(twin).json()["id"] == edit["id"]


class TestSigningIn:
    @pytest.mark.parametrize("path", [*PAGES[:-1], "/?q=a%26b", "/ui/edits/edit_1"])
    def test_is_asked_for_and_leads_back(self, keyed, path):
        answer = keyed.get(path, follow_redirects=False)
        assert answer.status_code == 303
        page = read(keyed.get(answer.headers["location"]))
        assert page.fields["next"] == path

    @pytest.mark.parametrize(
        "back", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/docs", ""]
    )
    def test_leads_nowhere_else(self, keyed, back):
        form = {"key": keyed.tokens["read"], "next": back}
        answer = keyed.post("/ui/sign-in", data=form, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "HttpOnly" in answer.headers["set-cookie"]

    @pytest.mark.parametrize("key", ["", "mend_x", "ключ", "a\nb", "a" * 10_000])
    def test_with_what_is_no_key_is_refused(self, keyed, key):
        page = read(keyed.post("/ui/sign-in", data={"key": key, "next": "/ui/health"}), 401)
        assert "unauthenticated" in page.text
        assert page.fields["next"] == "/ui/health"
        assert page.fields["key"] == ""

    @pytest.mark.parametrize("origin", ["https://evil.example", "http://[x", "null"])
    def test_by_a_page_of_another_site_is_refused(self, keyed, origin):
        headers = {"Origin": origin}
        answer = keyed.post("/ui/sign-in", data={"key": keyed.tokens["read"]}, headers=headers, follow_redirects=False)
        assert "set-cookie" not in answer.headers

    def test_ends_by_signing_out(self, keyed):
        keyed.post("/ui/sign-in", data={"key": keyed.tokens["read"], "next": "/"})
        token = keyed.get("/session").json()["csrf_token"]
        read(keyed.post("/ui/sign-out", data={"csrf_token": token}))
        assert not keyed.cookies

    @pytest.mark.parametrize("path", ["/ui/new", "/ui/rollback", "/ui/kill-switch", "/ui/tags", "/ui/sign-out"])
    def test_lets_nobody_change_anything_without_the_token_of_the_page(self, keyed, path):
        keyed.post("/ui/sign-in", data={"key": keyed.tokens["admin"], "next": "/"})
        form = {"prompt": "a", "correction": "b", "revision": "0", "name": "a", "reason": "x"}
        for more in ({}, {"csrf_token": "wrong"}):
            page = read(keyed.post(path, data={**form, **more}), 403)
            assert "csrf_failed" in page.text
        assert keyed.cookies


class TestWithoutKeys:
    @pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
    @pytest.mark.parametrize("path", ["/ui/new", "/ui/rollback", "/ui/kill-switch", "/ui/tags", "/ui/playground"])
    def test_pages_of_other_sites_change_nothing(self, client, path, headers):
        before = client.get("/revision").json()
        form = {"action": "commit", "prompt": "The", "correction": "b", "name": "a", "reason": "x", "revision": "0"}
        page = read(client.post(path, data=form, headers=headers), 403)
        assert "cross_site" in page.text
        assert client.get("/revision").json() == before

    def test_links_of_other_sites_lead_to_a_page(self, client):
        read(client.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}))

    def test_names_of_others_are_refused(self, client):
        assert "host_not_allowed" in read(client.get("/", headers={"Host": "evil.example"}), 421).text

    def test_the_ledger_says_where_an_edit_was_made(self, client, bodies):
        made = self.commit(client, bodies[0])
        assert client.get(f"/edits/{made}").json()["actor"] == "dashboard"

    def commit(self, client, body) -> str:
        page = read(client.post("/ui/new", data={**body, "action": "preview"}))
        form = {name: page.fields[name] for name in ("prompt", "correction", "revision", "key")}
        answer = client.post("/ui/new", data={**form, "action": "commit"}, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        return re.search(r"edit_\w+", answer.headers["location"])[0]


class TestText:
    def test_is_escaped_wherever_it_is_from(self, client):
        for answer in (
            client.get("/", params={"q": HARM, "actor": HARM}),
            client.get("/ui/new", params={"prompt": HARM, "correction": HARM, "reason": HARM}),
            client.get("/ui/rollback", params={"tag": HARM, "edit": HARM}),
            client.get("/ui/playground", params={"prompt": HARM}),
            client.get("/ui/sign-in", params={"next": f"/ui/{HARM}"}),
            client.get(f"/ui/edits/{HARM}"),
            client.post("/ui/new", data={"prompt": HARM, "correction": HARM, "paraphrases": HARM, "expires_at": HARM}),
            client.post("/ui/playground", data={"prompt": HARM, "seed": HARM}),
            client.get("/", params={"done": HARM}),
        ):
            assert "<script>alert" not in answer.text
            assert ("script", {}) not in Read(answer.text).tags

    def test_of_a_form_comes_back_as_it_was_typed(self, client):
        typed = {"prompt": f"  {HARM}\r\nand\r\n", "correction": f" {HARM}", "paraphrases": "one\r\n\r\ntwo "}
        page = read(client.post("/ui/new", data={**typed, "expires_at": "then"}), 422)
        assert page.fields["correction"] == typed["correction"]
        assert page.fields["prompt"].removeprefix("\n") == typed["prompt"].replace("\r\n", "\n")

    def test_of_a_command_is_one_that_does_the_same(self, client, bodies):
        body = {**bodies[0], "reason": 'it\'s "so" $HOME `id` \\', "metadata": {"a'b": [1]}}
        edit = client.post("/edits", json=body).json()
        (command,) = re.findall(r"curl -sS .*", read(client.get(f"/ui/edits/{edit['id']}")).text, re.DOTALL)
        words = shlex.split(command.split("Copy")[0])
        assert words[:3] == ["curl", "-sS", f"{ADDRESS}/edits"]
        assert json.loads(words[words.index("-d") + 1]) == body


def test_no_text_of_a_visitor_is_logged(client, bodies, caplog):
    with caplog.at_level(logging.DEBUG):
        client.get("/", params={"q": "the-marker", "actor": "the-marker"})
        client.get("/ui/new", params={"prompt": "the-marker"})
        client.post("/ui/new", data={**bodies[0], "reason": "the-marker", "paraphrases": "the-marker"})
        client.post("/ui/playground", data={"prompt": "the-marker"})
    own = [record for record in caplog.records if not record.name.startswith(("asyncio", "httpcore"))]
    assert any(record.name == "mend.access" for record in own)
    sent_by_the_test = "http://127.0.0.1:8000"
    told = [record.getMessage() for record in own]
    assert not [each for each in told if "the-marker" in each and sent_by_the_test not in each]


def test_a_number_that_is_none_is_refused_by_the_api(client):
    for given in ("x", "-1", "1e99", "9" * 30, "9" * 5000, "nan", "Infinity", "-inf", "true", "[1]", "1_0"):
        page = read(client.get("/ui/rollback", params={"revision": given}), 422)
        assert "invalid_request" in page.text
