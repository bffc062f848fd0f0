"""Whatever a client sends, it is told what was wrong with it, and nothing is changed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from service.api.limits import MAX_BODY_BYTES
from service.api.requests import StrictRequest
from tests.api.answers import assert_problem
from tests.api.conftest import engine_of
from tests.service_fixtures import Standing

JSON = {"content-type": "application/json"}
GOOD = {"prompt": "The capital of France is", "correction": "Rome"}


@pytest.fixture(autouse=True)
def nothing_changes(client) -> Iterator[None]:
    standing = Standing.of(engine_of(client))
    yield
    assert Standing.of(engine_of(client)) == standing


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


BAD_BODIES = {
    "no prompt": {"correction": "x"},
    "no correction": {"prompt": "x"},
    "empty prompt": {**GOOD, "prompt": ""},
    "blank prompt": {**GOOD, "prompt": " \t\n\u2003"},
    "blank correction": {**GOOD, "correction": "  "},
    "huge prompt": {**GOOD, "prompt": "a" * 100_001},
    "huge correction": {**GOOD, "correction": "a" * 100_001},
    "null prompt": {**GOOD, "prompt": None},
    "number": {**GOOD, "prompt": 5},
    "boolean": {**GOOD, "correction": True},
    "list": {**GOOD, "prompt": ["x"]},
    "object": {**GOOD, "correction": {}},
    "blank subject": {**GOOD, "subject": " "},
    "unknown field": {**GOOD, "corection": "x"},
    "keep is a text": {**GOOD, "keep": "x"},
    "keep holds a number": {**GOOD, "keep": [1]},
    "blank keep": {**GOOD, "keep": [" "]},
    "blank paraphrase": {**GOOD, "paraphrases": [""]},
    "too many paraphrases": {**GOOD, "paraphrases": ["x"] * 33},
    "too many keep": {**GOOD, "keep": ["x"] * 33},
    "long reason": {**GOOD, "reason": "x" * 2001},
    "metadata is a list": {**GOOD, "metadata": []},
    "large metadata": {**GOOD, "metadata": {"x": "y" * 20_000}},
    "surrogate in prompt": {**GOOD, "prompt": "a\ud800"},
    "surrogate in correction": {**GOOD, "correction": "\udfff"},
    "surrogate in keep": {**GOOD, "keep": ["\ud800"]},
    "surrogate in a paraphrase": {**GOOD, "paraphrases": ["x", "\ud800"]},
    "surrogate in reason": {**GOOD, "reason": "\ud800"},
    "surrogate in a metadata key": {**GOOD, "metadata": {"\ud800": 1}},
    "surrogate in a metadata value": {**GOOD, "metadata": {"x": [{"y": "\ud800"}]}},
    "surrogate in an unknown key": {**GOOD, "\ud800": 1},
    "NaN": {**GOOD, "metadata": {"x": float("nan")}},
    "infinity": {**GOOD, "metadata": {"x": [float("inf")]}},
    "minus infinity": {**GOOD, "metadata": {"x": {"y": float("-inf")}}},
    "many unknown fields": {**GOOD, **{f"field {number}": number for number in range(2000)}},
}


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_not_an_edit_is_invalid(client, body, dry_run):
    answer = client.post("/edits", params={"dry_run": dry_run}, content=json.dumps(body), headers=JSON)
    problem = assert_problem(answer, "invalid_request")
    assert all(set(error) == {"field", "message"} for error in problem["errors"])
    assert problem["errors"]


class TestManyMistakes:
    """A small body can hold half a million of them; nobody waits for that, and nobody is told of them all."""

    FLOOD = 470_000

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", {"model": "m", "prompt": [0.5] * FLOOD}),
            ("/v1/completions", {"model": "m", "prompt": [[0.5] * FLOOD]}),
            ("/v1/completions", {"model": "m", "prompt": "x", "stop": [1] * FLOOD}),
            ("/v1/completions", {"model": "m", "prompt": "x", **{str(n): 0 for n in range(150_000)}}),
            ("/v1/chat/completions", {"model": "m", "messages": [0] * FLOOD}),
            ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": [{}] * FLOOD}]}),
            ("/generate", {"messages": [{}] * FLOOD}),
            ("/generate", {"messages": [{str(n): 0 for n in range(20)}] * 512}),
            ("/edits", {**GOOD, "keep": [""] * FLOOD}),
            ("/edits", {**GOOD, "check_forms": [""] * FLOOD}),
            ("/edits", {**GOOD, "metadata": {"x": [float("nan")] * FLOOD}}),
            ("/edits/batch", {"edits": [0] * FLOOD}),
            ("/edits/batch", {"edits": [{}] * FLOOD}),
        ],
    )
    def test_are_told_in_short_and_at_once(self, client, path, body):
        content = json.dumps(body, separators=(",", ":"))
        assert len(content) < MAX_BODY_BYTES
        began = time.process_time()
        answer = client.post(path, content=content, headers=JSON)
        assert time.process_time() - began < 1.5
        assert answer.status_code in (400, 422)
        assert len(answer.content) < 8_000

    def test_are_counted(self, client):
        problem = client.post("/edits", json={**GOOD, **{f"field {n}": 0 for n in range(15)}}).json()
        assert len(problem["errors"]) == 15
        assert problem["detail"].endswith("; and 10 more")
        problem = client.post("/edits", json={**GOOD, **{f"field {n}": 0 for n in range(1000)}}).json()
        assert "1000 fields that are not known, such as field 0" in problem["detail"]

    def test_with_long_names_are_told_in_short_too(self, client):
        answer = client.post("/edits", json={**GOOD, "x" * 1_000_000: 0})
        assert_problem(answer, "invalid_request")
        assert len(answer.content) < 2_000

    def test_in_any_list_of_any_request_end_at_the_first(self):
        lists = [kind for kind in every_list(subclasses(StrictRequest)) if not kind.get("fail_fast")]
        assert not lists


def subclasses(kind: type) -> list[type]:
    return [kind, *(each for child in kind.__subclasses__() for each in subclasses(child))]


def every_list(kinds: list[type]) -> Iterator[dict]:
    """The lists of what pydantic checks, wherever they stand in it."""
    left = [kind.__pydantic_core_schema__ for kind in kinds]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            if each.get("type") == "list" and each["items_schema"].get("type") != "definition-ref":  # of any JSON
                yield each
            left += each.values()
        elif isinstance(each, list | tuple):
            left += each


@pytest.mark.parametrize("dry_run", ["true", "false"])
@pytest.mark.parametrize("depth", [65, 100, 198, 200, 253, 254, 255, 256, 300])
def test_deep_metadata_is_invalid_however_deep(client, depth, dry_run):
    body = f'{{"prompt": "The capital of France is", "correction": "Rome", "metadata": {{"x": {nested(depth)}}}}}'
    answer = client.post("/edits", params={"dry_run": dry_run}, content=body, headers=JSON)
    problem = assert_problem(answer, "invalid_request")
    assert len(problem["detail"]) < 200


@pytest.mark.parametrize("depth", [900, 1000, 5000, 500_000])
def test_and_deeper_than_a_parser_can_go(client, depth):
    body = f'{{"prompt": "The capital of France is", "correction": "Rome", "metadata": {{"x": {nested(depth)}}}}}'
    answer = client.post("/edits", content=body, headers=JSON)
    assert_problem(answer, answer.json()["code"])
    assert answer.json()["code"] in {"malformed_body", "invalid_request"}


@pytest.mark.parametrize(
    "body",
    [b"hello", b"{", b'{"prompt": "x",}', b"\xff\xfe", b'{"prompt": "\xff", "correction": "x"}', b"\x00", b"'x'",
     b'{"prompt": "x", "correction": "x", "metadata": {"x": ' + b"1" * 5000 + b"}}"],
)  # fmt: skip
def test_a_body_that_is_not_json_is_malformed(client, body):
    for path in ("/edits", "/generate"):
        detail = assert_problem(client.post(path, content=body, headers=JSON), "malformed_body")["detail"]
        assert "the body is not JSON: " in detail or "send JSON in UTF-8" in detail


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"5", b'"x"', b"true", b"{}", b"NaN", b"Infinity"])
def test_a_body_that_is_another_kind_of_json_is_invalid(client, body):
    assert_problem(client.post("/edits", content=body, headers=JSON), "invalid_request")
    assert_problem(client.post("/generate", content=body, headers=JSON), "invalid_request")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", "/", "☃"]
)
def test_a_body_that_does_not_say_that_it_is_json_is_invalid(client, content_type):
    headers = {} if content_type is None else {"content-type": content_type.encode()}
    assert_problem(client.post("/edits", content=json.dumps(GOOD), headers=headers), "invalid_request")


class TestALargeBody:
    def test_that_says_so_is_refused(self, client):
        body = json.dumps({**GOOD, "reason": "x" * MAX_BODY_BYTES})
        for route in ("/edits", "/generate"):
            assert_problem(client.post(route, content=body, headers=JSON), "body_too_large")

    @pytest.mark.parametrize("declared", [None, "5", "0", "-1", "x", "²"])
    def test_that_hides_it_is_refused(self, client, declared):
        def chunks() -> Iterator[bytes]:
            for _ in range(MAX_BODY_BYTES // 50_000 + 1):
                yield b" " * 50_000

        headers = JSON if declared is None else {**JSON, "content-length": declared.encode("latin-1")}
        for route in ("/edits", "/generate"):
            assert_problem(client.post(route, content=chunks(), headers=headers), "body_too_large")

    def test_up_to_the_limit_is_read(self, client):
        body = json.dumps(GOOD).encode()
        answer = client.post("/edits?dry_run=maybe", content=body + b" " * (MAX_BODY_BYTES - len(body)), headers=JSON)
        assert_problem(answer, "invalid_request")


@pytest.mark.parametrize(
    ("route", "query"),
    [
        ("/generate", ""),
        ("/generate", "prompt="),
        ("/generate", "prompt=%20"),
        ("/generate", "prompt=a&unknown=1"),
        ("/generate", "prompt=a&max_new_tokens=0"),
        ("/generate", "prompt=a&max_new_tokens=-1"),
        ("/generate", "prompt=a&max_new_tokens=1.5"),
        ("/generate", "prompt=a&max_new_tokens=many"),
        ("/generate", "prompt=a&max_new_tokens=" + "9" * 5000),
        ("/generate", "prompt=a&temperature=-1"),
        ("/generate", "prompt=a&temperature=nan"),
        ("/generate", "prompt=a&temperature=inf"),
        ("/generate", "prompt=a&temperature=1e999"),
        ("/generate", "prompt=a&top_p=0"),
        ("/generate", "prompt=a&top_p=1.01"),
        ("/generate", "prompt=a&repetition_penalty=0.009"),
        ("/generate", "prompt=a&repetition_penalty=1e-300"),
        ("/generate", "prompt=a&seed=-1"),
        ("/generate", "prompt=a&seed=9223372036854775808"),
        ("/generate", "prompt=a&view=candidate"),
        ("/generate", "prompt=a&view=live%00"),
        ("/edits", "unknown=1"),
        ("/edits", "limit=0"),
        ("/edits", "limit=501"),
        ("/edits", "limit=x"),
        ("/edits", "cursor=x"),
        ("/edits", "cursor=-1"),
        ("/edits", "cursor=%D9%A3"),
        ("/edits", "cursor=1%0A"),
        ("/edits", "cursor=" + "9" * 16),
        ("/edits", "status=maybe"),
    ],
)
def test_a_query_that_is_not_understood_is_invalid(client, route, query):
    assert_problem(client.get(f"{route}?{query}"), "invalid_request")


@pytest.mark.parametrize(
    "query",
    ["dry_run=maybe", "dry-run=true", "dryrun=1", "dry_run=true&unknown=1", "%00=1", "on_conflict=maybe",
     "on_conflict=", "allow_loss=perhaps", "partial=true"],
)  # fmt: skip
def test_a_misspelt_dry_run_does_not_become_an_edit(client, query, bodies):
    assert_problem(client.post(f"/edits?{query}", json=bodies[0]), "invalid_request")


def test_an_unknown_query_of_a_change_or_of_a_body_is_invalid(client):
    assert_problem(client.delete("/edits/x?partial=true"), "invalid_request")
    assert_problem(client.delete("/edits/x?reason=" + "x" * 2001), "invalid_request")
    assert_problem(client.post("/generate?view=base", json={"prompt": "x"}), "invalid_request")


@pytest.mark.parametrize("bytes_", ["%ff", "%ed%a0%80", "%c3", "a%80b", "%f8%88%80%80%80"])
def test_a_query_that_is_not_utf_8_says_so(client, bytes_):
    for answer in (
        client.get(f"/generate?prompt={bytes_}"),
        client.get(f"/edits?q={bytes_}"),
        client.get(f"/edits?{bytes_}=1"),
        client.post(f"/edits?dry_run={bytes_}", json=GOOD),
        client.delete(f"/edits/x?reason={bytes_}"),
    ):
        assert_problem(answer, "invalid_utf8")


@pytest.mark.parametrize(
    "body",
    [{**GOOD, "correction": "\x00"}, {"prompt": "a\x00b", "correction": "c\x00"},
     {**GOOD, "correction": "☃"}, {**GOOD, "correction": "<eos>"}, {**GOOD, "correction": "<pad> <unk>"},
     {"prompt": "🙂" * 20, "correction": "🙂"}],
)  # fmt: skip
def test_text_that_the_model_cannot_say_is_refused(client, body):
    answer = client.post("/edits", json=body)
    assert_problem(answer, answer.json()["code"])
    assert answer.json()["code"] in {"did_not_take", "empty_text"}


@pytest.mark.parametrize(
    "body", [{**GOOD, "prompt": "a" * 100_000}, {**GOOD, "correction": "a" * 100_000}, {**GOOD, "keep": ["a " * 5000]}]
)
def test_text_of_too_many_tokens_is_refused(client, body):
    problem = assert_problem(client.post("/edits", json=body), "text_too_long")
    assert problem["tokens"] > problem["limit"]


@pytest.mark.parametrize("actor", [b"\xff\xfe", b"\xc3\xbc", b"x" * 200])
def test_any_actor_is_taken(client, actor):
    answer = client.post("/edits", params={"dry_run": "true"}, json=GOOD, headers={"X-Actor": actor})
    assert answer.status_code < 500


def test_an_actor_that_is_too_long_is_invalid(client):
    assert_problem(client.post("/edits", json=GOOD, headers={"X-Actor": "x" * 201}), "invalid_request")


class TestARouteThatIsNot:
    @pytest.mark.parametrize("path", ["/nope", "/edits/a/b", "/%00", "/%ff", "/☃", "/" + "x" * 5000, "/edits/a%2Fb"])
    def test_answers_404(self, client, path):
        assert "/openapi.json lists" in assert_problem(client.get(path), "not_found")["detail"]
        assert_problem(client.post(path, json=GOOD), "not_found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [("PUT", "/edits", {"GET", "POST"}), ("PATCH", "/edits/x", {"GET", "DELETE"}), ("POST", "/model", {"GET"}),
         ("DELETE", "/edits", {"GET", "POST"}), ("POST", "/revision", {"GET"}), ("PUT", "/generate", {"GET", "POST"}),
         ("TRACE", "/livez", {"GET"})],
    )  # fmt: skip
    def test_by_this_method_answers_405_and_which_are_allowed(self, client, method, path, allowed):
        answer = client.request(method, path)
        assert f"send one of {answer.headers['allow']}" in assert_problem(answer, "method_not_allowed")["detail"]
        assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed


class TestALongConversation:
    """To the model it is one text, and so it may be as long as one."""

    def test_is_refused_by_its_length_together(self, client):
        part = {"role": "user", "content": "a" * 50_000}
        model = client.get("/v1/models").json()["data"][0]["id"]
        for path, body in (
            ("/generate", {}),
            ("/edits?dry_run=true", {"correction": "x"}),
            ("/v1/chat/completions", {"model": model}),
        ):
            answer = client.post(path, json={**body, "messages": [part] * 3})
            told = answer.json().get("detail") or answer.json()["error"]["message"]
            assert "have 150000 characters together, and may have 100000" in told
            code = answer.json().get("code") or answer.json()["error"]["code"]
            assert code == "invalid_request"
            assert client.post(path, json={**body, "messages": [part] * 2}).json() != answer.json()

    def test_of_many_messages_costs_no_more_than_one(self, client):
        body = {"messages": [{"role": "user", "content": "a <b> " * 32}] * 512}
        began = time.process_time()
        assert_problem(client.post("/generate", json=body), "text_too_long")
        assert time.process_time() - began < 1.5
