"""What stands before the routes: names of the service, pages of others, rates, and headers for browsers.

Most of it needs no model: what is let in is answered by 503, since nothing is loaded.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from service.api import docs
from service.api.keys import changed
from service.app import create_app
from service.settings import Settings
from tests.api.answers import assert_problem
from tests.api.conftest import ADDRESS
from tests.api.test_keys import made

LET_IN = 503
OWN = ADDRESS
ELSEWHERE = "https://elsewhere.example"

Door = Callable[..., TestClient]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    with changed(path) as held:
        pairs = [made("one", "edit"), made("other", "edit")]
        held += [key for _, key in pairs]
    return path, pairs[0][0], pairs[1][0]


@pytest.fixture(scope="module")
def door() -> Door:
    """A client of a service that has not been started, with these settings."""

    def door(**settings: object) -> TestClient:
        return TestClient(create_app(Settings(**settings)), ADDRESS, raise_server_exceptions=False)

    return door


def let_in(answer) -> bool:
    return (answer.status_code, answer.json()["code"]) == (LET_IN, "not_ready")


class TestHost:
    """A name that somebody may lead here, by his DNS, makes his pages those of the service. An address does not."""

    @pytest.mark.parametrize(
        "host", ["localhost", "localhost:8000", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.1.2.3:99", "[::1]:8000",
                 "[::1]", "10.1.2.3:8000", "[fe80::1]:8000"],
    )  # fmt: skip
    def test_of_this_machine_is_its_own(self, door, host):
        assert let_in(door().get("/model", headers={"Host": host}))

    @pytest.mark.parametrize(
        "host", ["", "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
                 "a.localhost", "evil.example@localhost", "localhost@evil.example", "[::1].evil.example", "127.1",
                 "0x7f000001"],
    )  # fmt: skip
    @pytest.mark.parametrize("request_", ["GET /model", "POST /edits", "DELETE /edits/edit_1", "GET /nothing"])
    def test_of_anybody_else_is_refused(self, door, host, request_):
        method, path = request_.split()
        assert_problem(door().request(method, path, headers={"Host": host}), "host_not_allowed")

    def test_may_be_named(self, door):
        client = door(allowed_hosts="mend.example, mend")
        for host in ("mend.example", "MEND.example:443", "mend:8000", "127.0.0.1:8000"):
            assert let_in(client.get("/model", headers={"Host": host}))
        for host in ("localhost", "a.mend.example"):
            assert_problem(client.get("/model", headers={"Host": host}), "host_not_allowed")

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "10.1.2.3"])
    def test_may_be_any_only_where_that_is_asked_for(self, door, host):
        """Whoever listens beyond loopback without keys means those who reach the port, not the pages they look at."""
        headers = {"Host": "rebound.example:8000", "Origin": "http://rebound.example:8000"}
        closed = door(host=host, open_to_all=True)
        assert_problem(closed.delete("/edits/edit_1", headers=headers), "host_not_allowed")
        assert let_in(closed.delete("/edits/edit_1", headers={"Host": "192.168.1.2:8000"}))
        opened = door(host=host, open_to_all=True, allowed_hosts="*")
        assert let_in(opened.delete("/edits/edit_1", headers=headers))

    def test_matters_not_to_who_shows_a_key_unless_it_is_named(self, door, key):
        headers = {"Host": "mend.example", "Authorization": f"Bearer {key[1]}"}
        assert let_in(door(api_keys=key[0]).get("/model", headers=headers))
        named = door(api_keys=key[0], allowed_hosts="other.example")
        assert_problem(named.get("/model", headers=headers), "host_not_allowed")

    def test_is_not_asked_by_probes(self, door):
        for path in ("/livez", "/readyz"):
            assert door().get(path, headers={"Host": "evil.example"}).status_code in (200, 503)

    @pytest.mark.parametrize("value", ["a b", "host:80", "https://a.example", "a/b", "::1"])
    def test_that_is_none_is_no_setting(self, value):
        with pytest.raises(ValueError, match="is no name of a host"):
            Settings(allowed_hosts=value)


def test_that_everybody_may_do_everything_is_said(door, caplog, key):
    with caplog.at_level(logging.WARNING):
        for host, keys, said in (("127.0.0.1", None, 0), ("0.0.0.0", None, 1), ("0.0.0.0", key[0], 0)):
            caplog.clear()
            client = door(host=host, api_keys=keys)
            assert [record.getMessage() for record in caplog.records] == client.get("/readyz").json()["warnings"]
            assert len(caplog.records) == said


class TestPagesOfOthers:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": ELSEWHERE},
            {"Origin": "null"},
            {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"},
            {"Origin": f"{OWN}.evil.example"},
            {"Origin": "http://[x"},
            {"Origin": "http://[::1"},
            {"Origin": "http://a]b"},
            {"Origin": ""},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        ],
    )
    @pytest.mark.parametrize(
        "request_",
        ["POST /edits", "POST /edits/batch", "DELETE /edits/edit_1", "GET /generate?prompt=a", "GET /export", "PUT /x"],
    )
    def test_may_not_ask(self, door, headers, request_):
        method, path = request_.split()
        assert_problem(door().request(method, path, headers=headers), "cross_site")

    @pytest.mark.parametrize(
        "headers",
        [{}, {"Origin": OWN}, {"Origin": OWN.upper()}, {"Origin": OWN, "Sec-Fetch-Site": "same-origin"},
         {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"}],
    )  # fmt: skip
    def test_are_not_those_of_the_service_and_no_page_at_all(self, door, headers):
        assert let_in(door().delete("/edits/edit_1", headers=headers))

    def test_may_where_they_are_named(self, door):
        client = door(cors_origins=f"{ELSEWHERE}, http://localhost:3000")
        for origin in (ELSEWHERE, "http://localhost:3000"):
            answer = client.delete("/edits/edit_1", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
            assert let_in(answer)
            assert answer.headers["access-control-allow-origin"] == origin
            assert "access-control-allow-credentials" not in answer.headers
        assert_problem(client.delete("/edits/edit_1", headers={"Origin": "http://localhost:3001"}), "cross_site")

    def test_cannot_use_a_key_that_they_do_not_have(self, door, key):
        answer = door(api_keys=key[0]).post("/edits", headers={"Origin": ELSEWHERE})
        assert_problem(answer, "unauthenticated")
        headers = {"Origin": ELSEWHERE, "Authorization": f"Bearer {key[1]}"}
        assert let_in(door(api_keys=key[0]).delete("/edits/edit_1", headers=headers))

    @pytest.mark.parametrize(
        "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
    )
    def test_cannot_send_json_as_a_form_does(self, client, bodies, media_type):
        headers = {"content-type": media_type} if media_type else {}
        content = b'{"prompt": "The", "correction": "x"}'
        for path in ("/edits", "/generate"):
            assert_problem(client.post(path, content=content, headers=headers), "invalid_request")
        content = b'{"edits": [{"prompt": "The", "correction": "x"}]}'
        assert_problem(client.post("/edits/batch", content=content, headers=headers), "invalid_request")


PREFLIGHT = {
    "Origin": ELSEWHERE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
}


class TestCors:
    def test_is_off(self, door, key):
        for client in (door(), door(api_keys=key[0])):
            answer = client.options("/edits", headers=PREFLIGHT)
            assert answer.status_code in (401, 403)
            assert not [name for name in answer.headers if name.startswith("access-control")]

    @pytest.mark.parametrize("with_keys", [False, True])
    def test_opens_for_named_origins(self, door, key, with_keys):
        client = door(cors_origins=ELSEWHERE, api_keys=key[0] if with_keys else None)
        answer = client.options("/edits", headers=PREFLIGHT)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ELSEWHERE)
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        other = client.options("/edits", headers={**PREFLIGHT, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers

    def test_lets_its_pages_read_why_they_are_refused(self, door, key):
        answer = door(cors_origins=ELSEWHERE, api_keys=key[0]).get("/model", headers={"Origin": ELSEWHERE})
        assert_problem(answer, "unauthenticated")
        assert answer.headers["access-control-allow-origin"] == ELSEWHERE

    @pytest.mark.parametrize("value", ["*", "elsewhere.example", "https://a.example/path", "null", "https://*.example"])
    def test_takes_no_origins_that_are_none(self, value):
        with pytest.raises(ValueError, match="is no origin"):
            Settings(cors_origins=value)


class TestRates:
    def test_are_none_unless_asked_for(self, door):
        client = door()
        assert all(let_in(client.get("/model")) for _ in range(50))

    def test_are_of_each_key_and_kind(self, door, key, caplog):
        client = door(api_keys=key[0], rate_reads="3/hour", rate_changes="2/hour")
        one, other = ({"Authorization": f"Bearer {token}"} for token in key[1:])
        for headers in (one, other):
            assert all(let_in(client.get("/model", headers=headers)) for _ in range(3))
            assert all(let_in(client.delete("/edits/edit_1", headers=headers)) for _ in range(2))
            with caplog.at_level(logging.WARNING, "mend.audit"):
                for answer, limit in (
                    (client.get("/model", headers=headers), "3 reads per hour"),
                    (client.delete("/edits/edit_1", headers=headers), "2 changes per hour"),
                ):
                    body = assert_problem(answer, "rate_limited")
                    assert limit in body["detail"]
                    assert 3500 < int(answer.headers["retry-after"]) == body["retry_after_s"] <= 3600
        kept_out = [record.key for record in caplog.records if record.levelno == logging.WARNING]
        assert kept_out == ["one", "one", "other", "other"]

    def test_without_keys_are_of_each_address_which_no_header_changes(self, door):
        client = door(rate_reads="2/hour")
        assert all(let_in(client.get("/model")) for _ in range(2))
        assert_problem(client.get("/model", headers={"X-Forwarded-For": "10.9.8.7"}), "rate_limited")

    def test_do_not_count_who_may_not_and_what_is_open(self, door, key):
        client = door(api_keys=key[0], rate_reads="2/hour")
        headers = {"Authorization": f"Bearer {key[1]}"}
        for _ in range(5):
            assert_problem(client.get("/model"), "unauthenticated")
            assert_problem(client.get("/export?format=lora", headers=headers), "forbidden")
            assert client.get("/livez").status_code == 200
        assert all(let_in(client.get("/model", headers=headers)) for _ in range(2))

    def test_of_attempts_without_a_good_key_are_of_each_address(self, door, key, caplog):
        client = door(api_keys=key[0])
        bad = [{}, {"Authorization": "Bearer mend_guessed"}]
        for attempt in range(600):
            assert_problem(client.get("/model", headers=bad[attempt % 2]), "unauthenticated")
        for headers in bad:
            answer = client.get("/model", headers=headers)
            assert "600 attempts without a good key per minute" in assert_problem(answer, "rate_limited")["detail"]
            assert 0 < int(answer.headers["retry-after"]) <= 60
        assert let_in(client.get("/model", headers={"Authorization": f"Bearer {key[1]}"}))

    def test_let_in_again_when_the_time_is_over(self, door):
        client = door(rate_reads="2/second")
        assert all(let_in(client.get("/model")) for _ in range(2))
        wait_s = int(client.get("/model").headers["retry-after"])
        assert wait_s == 1
        time.sleep(wait_s)
        assert let_in(client.get("/model"))

    @pytest.mark.parametrize("value", ["many", "10", "0/minute", "10/fortnight", "-1/second", "1/minute; 2/hour"])
    def test_that_are_none_are_no_setting(self, value):
        with pytest.raises(ValueError, match="such as 600/minute"):
            Settings(rate_reads=value)


WANTED = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}


class TestHeaders:
    def assert_safe(self, answer) -> None:
        assert {name: answer.headers[name] for name in WANTED} == WANTED
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy)
        assert all(len(answer.headers.get_list(name)) == 1 for name in [*WANTED, "content-security-policy"])

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            ("GET /generate?prompt=The", 200),
            ("GET /edits", 200),
            ("GET /docs", 200),
            ("GET /livez", 200),
            ("GET /nothing", 404),
            ("PUT /edits", 405),
            ("GET /edits/", 404),
            ("GET /generate", 422),
            ("GET /generate?prompt=%ff", 400),
            ("GET /export?format=lora", 409),
        ],
    )
    def test_are_on_every_answer(self, client, request_, status):
        method, path = request_.split()
        answer = client.request(method, path, follow_redirects=False)
        assert answer.status_code == status
        self.assert_safe(answer)

    def test_are_on_a_refusal(self, door, key):
        self.assert_safe(door(api_keys=key[0]).get("/model"))
        self.assert_safe(door().get("/model", headers={"Host": "evil.example"}))
        self.assert_safe(door(cors_origins=ELSEWHERE).options("/edits", headers=PREFLIGHT))

    def test_are_on_an_error_of_ours(self, door, caplog):
        client = door()

        @client.app.get("/broken")
        def broken() -> None:
            raise RuntimeError("the marker")

        answer = client.get("/broken")
        assert_problem(answer, "internal_error")
        self.assert_safe(answer)

    def test_do_not_hold_a_stream_up(self, door):
        """A whole answer would come at once, after both parts of it."""
        seen, app = [], door().app

        @app.get("/stream")
        def stream() -> StreamingResponse:
            def parts():
                yield b"one"
                seen.append("one")
                yield b"two"

            return StreamingResponse(parts())

        async def listen() -> None:
            async def receive():
                await asyncio.sleep(60)  # nobody goes

            async def send(message):
                if message["type"] == "http.response.body":
                    seen.append(message["body"])

            scope = {"type": "http", "method": "GET", "path": "/stream", "raw_path": b"/stream", "query_string": b"",
                     "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
                     "scheme": "http", "http_version": "1.1", "root_path": ""}  # fmt: skip
            await app(scope, receive, send)

        asyncio.run(listen())
        assert seen.index(b"one") < seen.index("one") < seen.index(b"two")


class TestDocs:
    class Page(HTMLParser):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.fetched: dict[str, tuple[str, str]] = {}
            self.inline: list[str] = []
            self._in_script = False
            self.feed(text)

        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            source = given.get("src") or given.get("href")
            if source:
                self.fetched[source] = (tag, given.get("integrity", ""))
            assert not any(name.startswith("on") or name == "style" for name in given)
            self._in_script = tag == "script" and not source

        def handle_data(self, data):
            if self._in_script and data.strip():
                self.inline.append(data)

    def test_are_let_load_what_they_need_and_nothing_else(self, door):
        """By what a browser does with a policy: each source is listed, each inline script by its hash."""
        answer = door().get("/docs")
        page = self.Page(answer.text)
        policy = {
            name: sources
            for name, *sources in (part.split() for part in answer.headers["content-security-policy"].split("; "))
        }
        by_tag = {"script": "script-src", "link": "style-src"}
        for source, (tag, integrity) in page.fetched.items():
            if source == "data:,":
                assert "data:" in policy["img-src"]
                continue
            assert source in policy[by_tag[tag]]
            assert re.fullmatch(r"sha384-[A-Za-z0-9+/]{64}", integrity)
        (script,) = page.inline
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy["script-src"]
        assert "'unsafe-inline'" not in policy["script-src"]
        assert policy["connect-src"] == ["'self'"]
        assert policy["default-src"] == ["'none'"]
        assert {docs.SCRIPT, docs.STYLE} <= set(page.fetched)
        assert '"/openapi.json"' in script
        assert door().get("/openapi.json").status_code == 200
