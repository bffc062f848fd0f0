"""POST, GET and DELETE of edits: the fields that clients rely on, and what each status means."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.api.answers import assert_fields, assert_problem
from tests.api.conftest import engine_of
from tests.service_fixtures import ANSWERS, COUNTRIES, Standing, never_takes

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REFUSED = {"prompt": never_takes().prompt, "correction": never_takes().correction}


@pytest.fixture
def body(bodies: tuple[dict, ...]) -> dict:
    return bodies[0]


def revision(client) -> int:
    return client.get("/revision").json()["revision"]


class TestPostEdits:
    def test_answers_201_with_the_edit(self, client, body):
        before = client.get("/generate", params={"prompt": body["prompt"], "max_new_tokens": 4}).json()
        full = {
            **body,
            "subject": body["prompt"].split()[3],
            "paraphrases": [body["prompt"], "Oslo is"],
            "keep": ["Berlin is a city in"],
            "reason": "a test",
            "metadata": {"ticket": 7, "ü": [None, 1.5, {"deep": True}]},
        }
        answer = client.post("/edits", json=full, headers={"X-Actor": "ops"})
        assert answer.status_code == 201, answer.text
        edit = answer.json()
        assert_fields(
            edit, "id", "revision", "status", "prompt", "correction", "scale", "digest", "timings_ms", "before",
            "after", "checks",
        )  # fmt: skip
        assert edit["status"] == "applied"
        assert edit["revision"] == before["revision"] + 1 == revision(client)
        assert {name: edit[name] for name in ("prompt", "correction", "subject", "reason", "metadata")} == {
            name: full[name] for name in ("prompt", "correction", "subject", "reason", "metadata")
        }
        assert edit["actor"] == "ops"
        assert edit["scale"] > 0
        assert DIGEST.fullmatch(edit["digest"])
        assert edit["digest"] == client.get("/revision").json()["digest"]
        assert edit["timings_ms"]
        assert all(ms >= 0 for ms in edit["timings_ms"].values())
        assert edit["before"]["text"].startswith(before["text"])
        assert edit["after"]["text"].strip().startswith(body["correction"].strip())
        assert datetime.fromisoformat(edit["created_at"]).utcoffset().total_seconds() == 0
        checks = edit["checks"]
        assert_fields(checks, "took", "paraphrases", "keep", "drawdown")
        assert checks["took"] is True
        assert 0 <= checks["drawdown"] <= checks["drawdown_budget"]
        for paraphrase in checks["paraphrases"]:
            assert_fields(paraphrase, "prompt", "took", "text")
        assert [paraphrase["prompt"] for paraphrase in checks["paraphrases"]] == full["paraphrases"]
        (kept,) = checks["keep"]
        assert_fields(kept, "prompt", "kept", "before", "after")
        assert kept["kept"] is (kept["before"] == kept["after"])

    def test_names_where_the_edit_is_and_what_it_cost(self, client, body):
        answer = client.post("/edits", json=body)
        edit = answer.json()
        assert answer.headers["location"] == f"/edits/{edit['id']}"
        assert answer.headers["etag"] == f'"{edit["revision"]}"'
        assert re.fullmatch(r"commit;dur=[\d.]+, publish;dur=[\d.]+", answer.headers["server-timing"])
        assert client.get(answer.headers["location"]).json() == edit

    def test_keeps_metadata_as_it_was_sent(self, client, body):
        nested: object = 0.1
        for _ in range(31):
            nested = {"x": [nested]}
        metadata = {"nested": nested, "large": 10**300, "float": 1e308, "empty": "", "NUL": "a\x00b", "zero": -0.0}
        answer = client.post("/edits", json={**body, "metadata": metadata})
        assert answer.status_code == 201, answer.text
        assert answer.json()["metadata"] == metadata
        assert client.get(answer.headers["location"]).json()["metadata"] == metadata

    def test_is_what_generation_then_says(self, client, body):
        edit = client.post("/edits", json=body).json()
        said = client.get("/generate", params={"prompt": body["prompt"], "max_new_tokens": 4}).json()
        assert said["revision"] == edit["revision"]
        assert edit["after"]["text"].startswith(said["text"])
        assert client.get("/model").json()["active_edits"] == 1

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    def test_keeps_who_asked_as_it_was_sent(self, client, body, encoding):
        made = client.post("/edits", json=body, headers={b"X-Actor": "Jürgen".encode(encoding)}).json()
        assert client.get(f"/edits/{made['id']}").json()["actor"] == "Jürgen"

    def test_of_what_is_true_already_answers_200_and_changes_nothing(self, client, body):
        made = client.post("/edits", json=body).json()
        answer = client.post("/edits", json=body)
        assert answer.status_code == 200
        unchanged = answer.json()
        assert unchanged["status"] == "unchanged"
        assert unchanged["id"] is None
        assert unchanged["before"] == unchanged["after"]
        assert (unchanged["revision"], unchanged["digest"]) == (made["revision"], made["digest"])
        assert answer.headers["etag"] == f'"{made["revision"]}"'
        assert "location" not in answer.headers
        assert revision(client) == made["revision"]

    def test_that_does_not_take_answers_422_with_the_measurements(self, client):
        standing = Standing.of(engine_of(client))
        problem = assert_problem(client.post("/edits", json=REFUSED), "did_not_take")
        assert problem["best_margin_nats"] < 0
        assert problem["before"]["text"]
        assert Standing.of(engine_of(client)) == standing

    def test_over_the_budget_answers_422_with_the_measurements(self, serve, tmp_path, body):
        with serve(tmp_path, guard_budget=0.0) as client:
            standing = Standing.of(engine_of(client))
            problem = assert_problem(client.post("/edits", json=body), "drawdown_exceeded")
            assert_fields(problem, "before", "after", "checks")
            assert problem["checks"]["drawdown"] > problem["checks"]["drawdown_budget"] == 0
            assert Standing.of(engine_of(client)) == standing


class TestDryRun:
    def test_answers_200_and_changes_nothing(self, client, body):
        standing = Standing.of(engine_of(client))
        answer = client.post("/edits", params={"dry_run": "true"}, json=body)
        assert answer.status_code == 200
        foretold = answer.json()
        assert foretold["status"] == "dry_run"
        assert foretold["id"] is None
        assert foretold["revision"] == standing.published.revision
        assert answer.headers["etag"] == f'"{standing.published.revision}"'
        assert "location" not in answer.headers
        assert Standing.of(engine_of(client)) == standing
        made = client.post("/edits", json=body).json()
        assert made["digest"] == foretold["digest"]
        assert (made["scale"], made["checks"], made["after"]) == (
            foretold["scale"], foretold["checks"], foretold["after"],
        )  # fmt: skip

    def test_false_is_the_real_thing(self, client, body):
        assert client.post("/edits", params={"dry_run": "false"}, json=body).status_code == 201

    def test_of_what_would_be_refused_is_refused(self, client):
        assert_problem(client.post("/edits", params={"dry_run": "true"}, json=REFUSED), "did_not_take")


class TestIfMatch:
    def test_at_the_current_revision_goes_through(self, client, bodies):
        for body, tag in zip(bodies, ('"{}"', 'W/"{}"', "*"), strict=True):
            etag = tag.format(revision(client))
            assert client.post("/edits", json=body, headers={"If-Match": etag}).status_code == 201

    @pytest.mark.parametrize(
        "tag",
        ['"999"', '"-1"', '""', "", '"', '"x"', "null", "1.5", '"1", "2"', "²", "9" * 400, '"\x01"', "\xff"],
    )
    def test_at_any_other_answers_412_and_changes_nothing(self, client, bodies, tag):
        made = client.post("/edits", json=bodies[0]).json()
        standing = Standing.of(engine_of(client))
        headers = {"If-Match": tag.encode("latin-1")}
        problem = assert_problem(client.post("/edits", json=bodies[1], headers=headers), "revision_mismatch")
        assert problem["revision"] == made["revision"]
        assert_problem(client.delete(f"/edits/{made['id']}", headers=headers), "revision_mismatch")
        assert Standing.of(engine_of(client)) == standing


class TestIdempotencyKey:
    def test_gives_the_first_answer_again(self, fresh, body):
        headers = {"Idempotency-Key": "one"}
        first = fresh.post("/edits", json=body, headers=headers)
        again = fresh.post("/edits", json=body, headers=headers)
        assert first.status_code == again.status_code == 201
        assert again.json() == first.json()
        assert again.headers["location"] == first.headers["location"]
        assert revision(fresh) == 1

    def test_of_another_request_is_refused(self, fresh, bodies):
        headers = {"Idempotency-Key": "one"}
        made = fresh.post("/edits", json=bodies[0], headers=headers).json()
        for other in (bodies[1], {**bodies[0], "reason": "else"}):
            problem = assert_problem(fresh.post("/edits", json=other, headers=headers), "idempotency_key_reused")
            assert problem["id"] == made["id"]
        assert revision(fresh) == 1

    @pytest.mark.parametrize("key", ["", "x" * 201])
    def test_of_no_use_is_refused(self, client, body, key):
        answer = client.post("/edits", json=body, headers={"Idempotency-Key": key})
        assert_problem(answer, "invalid_request")


class TestGetEdits:
    @pytest.fixture
    def made(self, fresh, bodies) -> list[dict]:
        """Ten edits, newest first: one of three active."""
        made = []
        for round_ in range(3):
            for body in bodies:
                made.append(fresh.post("/edits", json={**body, "reason": f"round {round_}"}).json())  # noqa: PERF401
            for edit in made[-3:]:
                fresh.delete(f"/edits/{edit['id']}")
        made.append(fresh.post("/edits", json=bodies[0]).json())
        return made[::-1]

    def pages(self, client, query: dict) -> Iterator[str]:
        """Ids on every page, to the last."""
        page = client.get("/edits", params=query).json()
        while page["next_cursor"] is not None:
            assert len(page["items"]) == query["limit"]
            yield from (edit["id"] for edit in page["items"])
            page = client.get("/edits", params={**query, "cursor": page["next_cursor"]}).json()
        assert len(page["items"]) <= query["limit"]
        yield from (edit["id"] for edit in page["items"])

    def test_lists_filters_searches_and_pages_to_the_end(self, fresh, made, bodies):
        listed = fresh.get("/edits").json()
        assert_fields(listed, "items", "next_cursor")
        assert [edit["id"] for edit in listed["items"]] == [edit["id"] for edit in made]
        assert listed["next_cursor"] is None
        assert listed["items"][0] == made[0]

        applied = fresh.get("/edits", params={"status": "applied"}).json()["items"]
        assert [edit["id"] for edit in applied] == [made[0]["id"]]
        rolled_back = fresh.get("/edits", params={"status": "rolled_back"}).json()["items"]
        assert [edit["id"] for edit in rolled_back] == [edit["id"] for edit in made[1:]]
        assert all(edit["rolled_back"]["revision"] > edit["revision"] for edit in rolled_back)

        for text in (bodies[1]["prompt"][5:].upper(), bodies[1]["correction"].strip().lower()):
            found = fresh.get("/edits", params={"q": text}).json()["items"]
            expected = [edit["id"] for edit in made if text.lower() in (edit["prompt"] + edit["correction"]).lower()]
            assert [edit["id"] for edit in found] == expected
            assert expected
        assert fresh.get("/edits", params={"q": "nothing has this"}).json() == {"items": [], "next_cursor": None}

        for query in ({}, {"status": "rolled_back"}, {"q": bodies[2]["prompt"]}):
            whole = [edit["id"] for edit in fresh.get("/edits", params=query).json()["items"]]
            for limit in (1, 2, 3, 9, 10, 500):
                pages, cursor = [], None
                while True:
                    page = fresh.get(
                        "/edits", params={**query, "limit": limit, **({"cursor": cursor} if cursor else {})}
                    )
                    pages.append([edit["id"] for edit in page.json()["items"]])
                    cursor = page.json()["next_cursor"]
                    if cursor is None:
                        break
                    assert len(pages[-1]) == limit
                assert [edit_id for page in pages for edit_id in page] == whole
        assert fresh.get("/edits", params={"cursor": "0"}).json()["items"] == []

    def test_a_page_stays_the_same_while_edits_are_added(self, fresh, made, bodies):
        page = fresh.get("/edits", params={"limit": 4}).json()
        fresh.post("/edits", json=bodies[1])
        rest = fresh.get("/edits", params={"cursor": page["next_cursor"]}).json()
        assert [edit["id"] for edit in page["items"] + rest["items"]] == [edit["id"] for edit in made]

    def test_one_by_its_id(self, client, body):
        made = client.post("/edits", json=body).json()
        answer = client.get(f"/edits/{made['id']}")
        assert answer.status_code == 200
        assert answer.json() == made
        assert answer.headers["etag"] == f'"{made["revision"]}"'

    @pytest.mark.parametrize("edit_id", ["nope", "%00", "%ff", "%ed%a0%80", "☃", "x" * 5000, "..%2e", "'\"<>"])
    def test_none_by_an_id_that_nobody_has(self, client, edit_id):
        assert_problem(client.get(f"/edits/{edit_id}"), "edit_not_found")
        assert_problem(client.delete(f"/edits/{edit_id}"), "edit_not_found")


class TestDeleteEdits:
    def test_answers_with_the_new_state(self, client, body):
        empty = client.get("/revision").json()
        made = client.post("/edits", json=body).json()
        answer = client.delete(f"/edits/{made['id']}", params={"reason": "wrong"}, headers={"X-Actor": "ops"})
        assert answer.status_code == 200
        rolled_back = answer.json()
        assert (rolled_back["id"], rolled_back["status"]) == (made["id"], "rolled_back")
        assert rolled_back["revision"] == made["revision"] + 1 == revision(client)
        assert rolled_back["digest"] == empty["digest"] == client.get("/model").json()["digest"]
        assert rolled_back["active_edits"] == 0
        assert answer.headers["etag"] == f'"{rolled_back["revision"]}"'
        shown = client.get(f"/edits/{made['id']}").json()
        assert shown == rolled_back["edit"]
        assert shown["status"] == "rolled_back"
        assert (shown["rolled_back"]["reason"], shown["rolled_back"]["actor"]) == ("wrong", "ops")
        assert shown["rolled_back"]["revision"] == rolled_back["revision"]
        assert {**shown, "status": "applied", "rolled_back": None} == made

    def test_twice_answers_409_and_changes_nothing(self, client, body):
        made = client.post("/edits", json=body).json()
        rolled_back = client.delete(f"/edits/{made['id']}").json()
        problem = assert_problem(client.delete(f"/edits/{made['id']}"), "already_rolled_back")
        assert (problem["id"], problem["revision"]) == (made["id"], rolled_back["revision"])
        assert revision(client) == rolled_back["revision"]

    def test_at_the_current_revision_goes_through(self, client, body):
        made = client.post("/edits", json=body).json()
        answer = client.delete(f"/edits/{made['id']}", headers={"If-Match": f'"{made["revision"]}"'})
        assert answer.status_code == 200


def test_every_state_is_there_after_a_restart(serve, tmp_path, bodies):
    with serve(tmp_path) as client:
        made = [client.post("/edits", json=body).json() for body in bodies]
        client.delete(f"/edits/{made[1]['id']}")
        model, listed = client.get("/model").json(), client.get("/edits").json()
        prompts = [f"The capital of {country} is" for country in COUNTRIES]
        said = [client.get("/generate", params={"prompt": prompt}).json() for prompt in prompts]
    with serve(tmp_path) as client:
        assert client.get("/model").json() == model
        assert client.get("/edits").json() == listed
        assert [client.get("/generate", params={"prompt": prompt}).json() for prompt in prompts] == said


class TestSuperseding:
    @pytest.fixture
    def other(self, client, body) -> dict:
        """Another correction of the same prompt, which takes in its place."""
        client.post("/edits", json=body)
        for answer in ANSWERS:
            other = {**body, "correction": f" {answer}"}
            if other["correction"] != body["correction"]:
                foretold = client.post("/edits", params={"dry_run": "true"}, json=other)
                if foretold.status_code == 200 and foretold.json()["status"] == "dry_run":
                    return other
        raise AssertionError("no other correction takes")

    def test_shows_which_edit_is_in_whose_place_until_it_is_rolled_back(self, client, body, other):
        (older,) = client.get("/edits", params={"status": "applied"}).json()["items"]
        newer = client.post("/edits", json=other).json()
        assert newer["supersedes"] == [older["id"]]
        shown = client.get(f"/edits/{older['id']}").json()
        assert shown == {**older, "status": "superseded", "superseded_by": newer["id"]}
        listed = client.get("/edits", params={"status": "superseded"}).json()["items"]
        assert shown in listed
        assert [edit["id"] for edit in client.get("/edits?status=applied").json()["items"]] == [newer["id"]]
        assert client.get("/model").json()["active_edits"] == 1

        answer = client.delete(f"/edits/{newer['id']}").json()
        assert answer["revived"] == answer["edit"]["rolled_back"]["revived"] == [older["id"]]
        assert answer["digest"] == older["digest"]
        assert client.get(f"/edits/{older['id']}").json() == older

    def test_lets_the_older_one_be_rolled_back_without_a_change(self, client, body, other):
        (older,) = client.get("/edits", params={"status": "applied"}).json()["items"]
        newer = client.post("/edits", json=other).json()
        answer = client.delete(f"/edits/{older['id']}").json()
        assert (answer["revived"], answer["digest"], answer["active_edits"]) == ([], newer["digest"], 1)
        assert client.delete(f"/edits/{newer['id']}").json()["revived"] == []


class TestAnEditThatBreaksAnother:
    def test_answers_409_naming_it_unless_the_loss_is_accepted(self, client, body):
        made = client.post("/edits", json=body).json()
        for country, answer in itertools.product(COUNTRIES, ANSWERS):
            request = {"prompt": f"The capital of {country} is", "correction": f" {answer}"}
            if request["prompt"] == body["prompt"]:
                continue
            answer = client.post("/edits", params={"dry_run": "true"}, json=request)
            if answer.status_code == 409:
                break
        problem = assert_problem(answer, "would_break_edits")
        assert problem["lost"] == [{"id": made["id"], **body}]
        accepted = client.post("/edits", params={"allow_loss": "true"}, json=request)
        assert accepted.status_code == 201
        assert accepted.json()["checks"]["lost"] == [made["id"]]
