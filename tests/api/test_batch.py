"""POST /edits/batch: as JSON and as JSON Lines, all or none."""

from __future__ import annotations

import json
import re

import pytest

from service.api.limits import BYTES_PER_EDIT, MAX_BODY_BYTES
from tests.api.answers import assert_fields, assert_problem
from tests.api.conftest import engine_of
from tests.service_fixtures import PROMPTS, Standing, never_takes

LINES = {"content-type": "application/x-ndjson"}


@pytest.fixture
def refused(client, bodies) -> dict:
    """An edit that does not take, of a prompt of its own."""
    used = {body["prompt"] for body in bodies}
    for prompt in PROMPTS.values():
        body = {"prompt": prompt, "correction": never_takes().correction}
        if prompt not in used and client.post("/edits?dry_run=true", json=body).status_code == 422:
            return body
    raise AssertionError("every edit takes")


def as_lines(bodies) -> bytes:
    return b"\n".join(json.dumps(body).encode() for body in bodies)


def lines_of(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


class TestAsJson:
    def test_answers_201_with_every_verdict_and_the_new_state(self, client, bodies):
        before = client.get("/revision").json()
        answer = client.post("/edits/batch", json={"edits": list(bodies)}, headers={"X-Actor": "ops"})
        assert answer.status_code == 201, answer.text
        batch = answer.json()
        assert_fields(batch, "id", "revision", "digest", "applied", "unchanged", "refused", "checks", "edits")
        assert (batch["applied"], batch["unchanged"], batch["refused"]) == (3, 0, 0)
        assert batch["revision"] == before["revision"] + 3
        assert answer.headers["etag"] == f'"{batch["revision"]}"'
        live = client.get("/revision").json()
        assert (live["revision"], live["digest"]) == (batch["revision"], batch["digest"])
        assert client.get("/model").json()["active_edits"] == 3
        assert {"before", "propose", "stage", "judge"} <= set(batch["timings_ms"])
        assert {"commit", "publish"} == {part.partition(";")[0] for part in answer.headers["server-timing"].split(", ")}
        for index, (item, body) in enumerate(zip(batch["edits"], bodies, strict=True)):
            assert (item["index"], item["status"], item["prompt"]) == (index, "applied", body["prompt"])
            shown = client.get(f"/edits/{item['id']}").json()
            assert shown["batch"] == {"id": batch["id"], "position": index + 1, "size": 3}
            assert shown["actor"] == "ops"
            assert shown["digest"] == (batch["digest"] if index == 2 else None)
            for name in ("checks", "scale", "before", "after", "revision"):
                assert shown[name] == item[name]

    def test_refused_answers_422_with_every_verdict_and_changes_nothing(self, client, bodies, refused):
        standing = Standing.of(engine_of(client))
        answer = client.post("/edits/batch", json={"edits": [bodies[0], refused, bodies[1]]})
        problem = assert_problem(answer, "batch_refused")
        assert [item["status"] for item in problem["edits"]] == ["withheld", "refused", "withheld"]
        assert problem["edits"][1]["code"] == "did_not_take"
        assert Standing.of(engine_of(client)) == standing

    def test_partial_makes_the_others(self, client, bodies, refused):
        body = {"edits": [refused, bodies[0]]}
        batch = client.post("/edits/batch", params={"partial": "true"}, json=body).json()
        assert [item["status"] for item in batch["edits"]] == ["refused", "applied"]
        assert (batch["applied"], batch["refused"]) == (1, 1)
        assert client.get("/model").json()["active_edits"] == 1

    def test_dry_run_answers_200_and_changes_nothing(self, client, bodies):
        standing = Standing.of(engine_of(client))
        answer = client.post("/edits/batch", params={"dry_run": "true"}, json={"edits": list(bodies)})
        assert answer.status_code == 200
        assert [item["status"] for item in answer.json()["edits"]] == ["dry_run"] * 3
        assert answer.json()["id"] is None
        assert Standing.of(engine_of(client)) == standing

    def test_of_what_is_true_already_answers_200(self, client, bodies):
        client.post("/edits/batch", json={"edits": list(bodies)})
        answer = client.post("/edits/batch", json={"edits": list(bodies)})
        assert answer.status_code == 200
        assert (answer.json()["id"], answer.json()["unchanged"], answer.json()["checks"]) == (None, 3, None)

    def test_honours_if_match(self, client, bodies):
        revision = client.get("/revision").json()["revision"]
        body = {"edits": list(bodies)}
        for tag in ('"999"', "x"):
            assert_problem(client.post("/edits/batch", json=body, headers={"If-Match": tag}), "revision_mismatch")
        assert client.post("/edits/batch", json=body, headers={"If-Match": f'"{revision}"'}).status_code == 201

    def test_honours_idempotency_keys(self, fresh, bodies):
        headers = {"Idempotency-Key": "one"}
        body = {"edits": list(bodies)}
        made = fresh.post("/edits/batch", json=body, headers=headers)
        again = fresh.post("/edits/batch", json=body, headers=headers)
        assert made.status_code == again.status_code == 201
        assert again.json() == made.json()
        assert fresh.get("/revision").json()["revision"] == 3
        for answer in (
            fresh.post("/edits/batch", json={"edits": [bodies[0]]}, headers=headers),
            fresh.post("/edits", json=bodies[0], headers=headers),
        ):
            assert_problem(answer, "idempotency_key_reused")

    def test_is_listed_edit_by_edit_and_comes_off_edit_by_edit(self, client, bodies):
        empty = client.get("/revision").json()["digest"]
        batch = client.post("/edits/batch", json={"edits": list(bodies)}).json()
        listed = client.get("/edits", params={"limit": 3}).json()["items"]
        assert [edit["id"] for edit in listed] == [item["id"] for item in batch["edits"]][::-1]
        for item in batch["edits"]:
            last = client.delete(f"/edits/{item['id']}").json()
        assert last["digest"] == empty


class TestAsJsonLines:
    def test_tells_progress_then_verdicts_then_the_new_state(self, client, bodies):
        lines = lines_of(client.post("/edits/batch", content=as_lines(bodies), headers=LINES))
        kinds = [next(iter(line)) for line in lines]
        assert re.fullmatch(r"(progress )+(edit ){3}batch ", "".join(f"{kind} " for kind in kinds))
        steps = [line["progress"]["step"] for line in lines if "progress" in line]
        assert set(steps) == {"answer", "capture", "stage", "judge"}
        assert [line["edit"]["status"] for line in lines if "edit" in line] == ["applied"] * 3
        batch = lines[-1]["batch"]
        assert batch["applied"] == 3
        live = client.get("/revision").json()
        assert (live["revision"], live["digest"]) == (batch["revision"], batch["digest"])

    def test_are_lines_to_whoever_splits_at_any_line_end(self, client, bodies):
        odd = [{**bodies[0], "reason": "\u2028"}, {**bodies[1], "prompt": f"{bodies[1]['prompt']}\u2028"}]
        answer = client.post("/edits/batch", params={"partial": "true"}, content=as_lines(odd), headers=LINES)
        assert all(json.loads(line) for line in answer.text.splitlines())

    def test_says_the_same_as_json(self, client, bodies):
        params = {"dry_run": "true"}
        as_json = client.post("/edits/batch", params=params, json={"edits": list(bodies)}).json()
        lines = lines_of(client.post("/edits/batch", params=params, content=as_lines(bodies), headers=LINES))
        shown = [line["edit"] for line in lines if "edit" in line]
        for one, other in zip(shown, as_json["edits"], strict=True):
            assert one.items() <= other.items()
        assert lines[-1]["batch"]["digest"] == as_json["digest"]

    def test_ends_with_the_problem_when_it_is_refused(self, client, bodies, refused):
        standing = Standing.of(engine_of(client))
        lines = lines_of(client.post("/edits/batch", content=as_lines([*bodies, refused]), headers=LINES))
        assert [line["edit"]["status"] for line in lines if "edit" in line] == ["withheld"] * 3 + ["refused"]
        problem = lines[-1]["problem"]
        assert (problem["code"], problem["status"]) == ("batch_refused", 422)
        assert "edits" not in problem
        assert Standing.of(engine_of(client)) == standing

    def test_refused_before_any_progress_is_a_plain_problem(self, client, bodies):
        again = as_lines([bodies[0], bodies[0]])
        assert_problem(client.post("/edits/batch", content=again, headers=LINES), "batch_refused")
        headers = {**LINES, "If-Match": '"999"'}
        assert_problem(client.post("/edits/batch", content=as_lines(bodies), headers=headers), "revision_mismatch")

    @pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n \n"])
    def test_takes_empty_lines_and_any_line_end(self, client, bodies, end):
        content = as_lines(bodies[:2]).replace(b"\n", b"\r\n") + end
        lines = lines_of(client.post("/edits/batch", params={"dry_run": "true"}, content=content, headers=LINES))
        assert lines[-1]["batch"]["id"] is None

    @pytest.mark.parametrize(
        ("line", "code"),
        [(b"{", "malformed_body"), (b'{"prompt": "\xff"}', "malformed_body"), (b"[" * 100_000, "malformed_body"),
         (b'{"prompt": "x"}', "invalid_request"), (b"5", "invalid_request"),
         (b'{"prompt": "x", "correction": "y", "z": 1}', "invalid_request"),
         (b'{"prompt": "\\ud800", "correction": "y"}', "invalid_request")],
    )  # fmt: skip
    def test_a_bad_line_names_its_number(self, client, bodies, line, code):
        standing = Standing.of(engine_of(client))
        content = as_lines(bodies[:1]) + b"\n\n" + line
        problem = assert_problem(client.post("/edits/batch", content=content, headers=LINES), code)
        assert "line 3" in problem["detail"] or "line.3" in problem["detail"]
        assert Standing.of(engine_of(client)) == standing


class TestABadBatch:
    @pytest.mark.parametrize(
        ("content", "code"),
        [(b"", "malformed_body"), (b"{", "malformed_body"), (b"\xff", "malformed_body"), (b"[]", "invalid_request"),
         (b"{}", "invalid_request"), (b'{"edits": []}', "invalid_request"), (b'{"edits": {}}', "invalid_request"),
         (b'{"edits": [{}]}', "invalid_request"), (b'{"edits": [], "x": 1}', "invalid_request"),
         (b'{"edits": ' + b"[" * 100_000, "malformed_body")],
    )  # fmt: skip
    def test_is_a_problem(self, client, content, code):
        headers = {"content-type": "application/json"}
        assert_problem(client.post("/edits/batch", content=content, headers=headers), code)

    @pytest.mark.parametrize("content", [b"", b"\n\n", b" "])
    def test_of_no_lines_is_a_problem(self, client, content):
        assert_problem(client.post("/edits/batch", content=content, headers=LINES), "invalid_request")

    def test_names_the_edit_and_the_field(self, client, bodies):
        answer = client.post("/edits/batch", json={"edits": [bodies[0], {"prompt": "x"}]})
        problem = assert_problem(answer, "invalid_request")
        assert problem["errors"][0]["field"] == "body.edits.1.correction"

    @pytest.mark.parametrize("content_type", [None, "text/plain", "application/jsonx", ""])
    def test_must_say_what_it_is(self, client, bodies, content_type):
        headers = {} if content_type is None else {"content-type": content_type}
        answer = client.post("/edits/batch", content=as_lines(bodies), headers=headers)
        problem = assert_problem(answer, "invalid_request")
        assert "application/x-ndjson" in problem["detail"]

    @pytest.mark.parametrize("query", ["partial=maybe", "Partial=true", "dry_run=maybe", "on_conflict=x"])
    def test_with_a_query_that_is_not_understood_is_not_made(self, client, bodies, query):
        answer = client.post(f"/edits/batch?{query}", json={"edits": list(bodies)})
        assert_problem(answer, "invalid_request")

    def test_may_be_larger_than_other_bodies_but_not_without_end(self, serve, tmp_path, bodies):
        with serve(tmp_path, max_batch=300) as client:
            limit = 300 * BYTES_PER_EDIT
            assert limit > MAX_BODY_BYTES
            for headers, edits in (({"content-type": "application/json"}, b'{"edits": []}'), (LINES, b"")):
                padded = edits + b" " * (limit - len(edits))
                assert_problem(client.post("/edits/batch", content=padded, headers=headers), "invalid_request")
                assert_problem(client.post("/edits/batch", content=padded + b" ", headers=headers), "body_too_large")
            many = {"edits": [{**bodies[0], "prompt": f"{number}"} for number in range(301)]}
            problem = assert_problem(client.post("/edits/batch", json=many), "batch_too_large")
            assert problem["limit"] == 300
            assert_problem(
                client.post("/edits/batch", content=as_lines(many["edits"]), headers=LINES), "batch_too_large"
            )
