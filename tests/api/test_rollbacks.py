"""Going back over HTTP: to a revision or a tag, by the kill switch, and when an edit expires."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from tests.api.answers import assert_fields, assert_problem
from tests.api.conftest import wait_until


@pytest.fixture
def made(fresh, bodies) -> list[dict]:
    return [fresh.post("/edits", json=body).json() for body in bodies]


def say(client, prompt: str) -> str:
    return client.get("/generate", params={"prompt": prompt, "max_new_tokens": 4}).json()["text"]


def restore(client, query: str = "", headers: dict | None = None, **body: object) -> dict:
    answer = client.post(f"/rollback{query}", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] == f'"{answer.json()["revision"]}"'
    return answer.json()


class TestRollback:
    def test_to_a_revision_is_its_state(self, fresh, made):
        done = restore(fresh, revision=1, reason="wrong", headers={"X-Actor": "ops"})
        assert_fields(done, "status", "revision", "digest", "active_edits", "changes", "undo")
        assert (done["status"], done["revision"], done["active_edits"]) == ("restored", 4, 1)
        assert done["digest"] == made[0]["digest"] == fresh.get("/model").json()["digest"]
        assert done["rolled_back"] == [made[1]["id"], made[2]["id"]]
        assert [(each["id"], each["change"]) for each in done["changes"]] == [
            (made[1]["id"], "leaves"), (made[2]["id"], "leaves")
        ]  # fmt: skip
        by = fresh.get(f"/edits/{made[1]['id']}").json()["rolled_back"]
        assert (by["revision"], by["to_revision"], by["actor"], by["reason"]) == (4, 1, "ops", "wrong")

    def test_can_be_undone_as_its_answer_says(self, fresh, made):
        done = restore(fresh, revision=0)
        again = restore(fresh, revision=done["undo"]["revision"])
        assert again["digest"] == made[2]["digest"]
        assert again["restored"] == [each["id"] for each in made]

    def test_in_a_dry_run_shows_what_would_change(self, fresh, made):
        before = fresh.get("/model").json()
        foretold = restore(fresh, "?dry_run=true", revision=0)
        assert fresh.get("/model").json() == before
        assert (foretold["status"], foretold["revision"], foretold["undo"]) == ("dry_run", 3, None)
        for change, edit in zip(foretold["changes"], made, strict=True):
            assert change["now"]["text"].strip().startswith(edit["correction"].strip())
        done = restore(fresh, revision=0)
        assert done["digest"] == foretold["digest"]
        for change in foretold["changes"]:
            assert say(fresh, change["prompt"]) == change["then"]["text"]

    def test_of_one_edit_can_be_previewed(self, fresh, made):
        before = fresh.get("/model").json()
        foretold = fresh.delete(f"/edits/{made[1]['id']}?dry_run=true").json()
        assert fresh.get("/model").json() == before
        assert (foretold["status"], foretold["revision"], foretold["edit"]["status"]) == ("dry_run", 3, "applied")
        assert [change["id"] for change in foretold["changes"]] == [made[1]["id"]]
        done = fresh.delete(f"/edits/{made[1]['id']}").json()
        assert (done["status"], done["digest"]) == ("rolled_back", foretold["digest"])

    def test_to_what_is_live_changes_nothing(self, fresh, made):
        done = restore(fresh, revision=3)
        assert (done["status"], done["revision"], done["changes"], done["undo"]) == ("unchanged", 3, [], None)

    def test_with_a_key_is_answered_the_same_again(self, fresh, made):
        headers = {"Idempotency-Key": "back"}
        first = fresh.post("/rollback", json={"revision": 1}, headers=headers)
        restore(fresh, revision=3)
        again = fresh.post("/rollback", json={"revision": 1}, headers=headers)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert_problem(fresh.post("/rollback", json={"revision": 2}, headers=headers), "idempotency_key_reused")

    def test_of_an_edit_with_a_key_is_answered_the_same_after_it_was_returned(self, fresh, made):
        path, headers = f"/edits/{made[1]['id']}", {"Idempotency-Key": "one"}
        first = fresh.delete(path, headers=headers)
        restore(fresh, revision=3)
        again = fresh.delete(path, headers=headers)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert fresh.get(path).json()["status"] == "applied"

    def test_at_another_revision_is_refused(self, fresh, made):
        answer = fresh.post("/rollback", json={"revision": 1}, headers={"If-Match": '"2"'})
        assert_problem(answer, "revision_mismatch")

    @pytest.mark.parametrize(
        ("body", "code"),
        [
            ({"revision": 4}, "revision_not_found"),
            ({"tag": "none"}, "tag_not_found"),
            ({}, "invalid_request"),
            ({"revision": 1, "tag": "x"}, "invalid_request"),
            ({"revision": -1}, "invalid_request"),
            ({"revision": 2**80}, "invalid_request"),
            ({"revision": 1.5}, "invalid_request"),
            ({"revision": False}, "invalid_request"),
            ({"revision": "0"}, "invalid_request"),
            ({"revision": 1, "to": 2}, "invalid_request"),
            ({"tag": "\ud800"}, "invalid_request"),
        ],
    )
    def test_to_nowhere_is_refused_and_changes_nothing(self, fresh, made, body, code):
        before = fresh.get("/model").json()
        answer = fresh.post("/rollback", content=json.dumps(body), headers={"content-type": "application/json"})
        assert_problem(answer, code)
        assert fresh.get("/model").json() == before


class TestTags:
    def test_name_a_revision_to_go_back_to(self, fresh, made):
        answer = fresh.put("/tags/before-release", json={"revision": 2, "reason": "v2"}, headers={"X-Actor": "ops"})
        tag = answer.json()
        assert (answer.status_code, answer.headers["etag"]) == (200, '"4"')
        assert (tag["name"], tag["revision"], tag["recorded_at_revision"]) == ("before-release", 2, 4)
        assert (tag["actor"], tag["reason"]) == ("ops", "v2")
        assert fresh.get("/tags/before-release").json() == tag
        assert fresh.get("/tags").json() == {"items": [tag]}
        done = restore(fresh, tag="before-release")
        assert (done["target"], done["digest"]) == ({"revision": 2, "tag": "before-release"}, made[1]["digest"])
        assert fresh.delete("/tags/before-release").json()["revision"] is None
        assert fresh.get("/tags").json() == {"items": []}
        assert_problem(fresh.get("/tags/before-release"), "tag_not_found")
        assert_problem(fresh.delete("/tags/before-release"), "tag_not_found")

    def test_without_a_body_name_what_is_live(self, fresh, made):
        assert fresh.put("/tags/now").json()["revision"] == 3
        assert fresh.put("/tags/now").json()["revision"] == 3
        assert fresh.get("/revision").json()["revision"] == 4
        assert fresh.get("/model").json()["digest"] == made[2]["digest"]

    @pytest.mark.parametrize("name", ["1", "-x", "a" * 65, "a b", "%00", "ä", "base"])
    def test_have_names_of_a_certain_form(self, client, name):
        assert_problem(client.put(f"/tags/{name}"), "invalid_request")

    def test_of_what_never_was_are_refused(self, fresh):
        assert_problem(fresh.put("/tags/x", json={"revision": 1}), "revision_not_found")
        assert_problem(fresh.put("/tags/x", json={"revision": "one"}), "invalid_request")
        assert fresh.get("/revision").json()["revision"] == 0


class TestKillSwitch:
    def test_serves_the_base_and_then_what_was_before(self, fresh, made, bodies):
        base = fresh.get("/generate", params={"prompt": bodies[0]["prompt"], "view": "base"}).json()["text"]
        assert fresh.get("/kill-switch").json()["engaged"] is False
        answer = fresh.put("/kill-switch", json={"reason": "nonsense"}, headers={"X-Actor": "night"})
        killed = answer.json()
        assert (killed["engaged"], killed["actor"], killed["reason"]) == (True, "night", "nonsense")
        assert (killed["revision"], killed["active_edits"], answer.headers["etag"]) == (4, 0, '"4"')
        assert fresh.get("/kill-switch").json() == killed
        assert fresh.get("/model").json()["kill_switch_engaged"] is True
        assert fresh.get("/generate", params={"prompt": bodies[0]["prompt"]}).json()["text"] == base
        refused = assert_problem(fresh.post("/edits", json=bodies[0]), "kill_switch_engaged")
        assert (refused["actor"], refused["reason"]) == ("night", "nonsense")
        assert_problem(fresh.post("/rollback", json={"revision": 1}), "kill_switch_engaged")
        released = fresh.delete("/kill-switch", params={"reason": "fixed"}).json()
        assert (released["engaged"], released["reason"]) == (False, "fixed")
        assert released["digest"] == made[2]["digest"] == fresh.get("/model").json()["digest"]
        assert fresh.delete("/kill-switch").json()["revision"] == 5

    def test_needs_no_body(self, fresh):
        assert fresh.put("/kill-switch").json()["engaged"] is True
        assert fresh.put("/kill-switch").json()["revision"] == 1
        assert fresh.delete("/kill-switch").json()["engaged"] is False


class TestExpiry:
    def test_takes_the_edit_back_by_itself(self, fresh, bodies):
        before = say(fresh, bodies[0]["prompt"])
        at = datetime.now(UTC) + timedelta(seconds=2)
        made = fresh.post("/edits", json={**bodies[0], "expires_at": at.isoformat()}).json()
        assert datetime.fromisoformat(made["expires_at"]) == at
        wait_until(lambda: fresh.get("/model").json()["active_edits"] == 0, within_s=10)
        assert 0 <= (datetime.now(UTC) - at).total_seconds() < 3
        shown = fresh.get(f"/edits/{made['id']}").json()
        assert (shown["status"], shown["rolled_back"]["expired"]) == ("rolled_back", True)
        assert say(fresh, bodies[0]["prompt"]) == before

    @pytest.mark.parametrize(
        "at",
        [
            "tomorrow",
            "2030-01-01",
            "2030-01-01T00:00:00",
            1893456000,
            "0001-01-01T00:00:00+14:00",
        ],
    )
    def test_at_no_time_to_come_is_refused(self, client, bodies, at):
        assert_problem(client.post("/edits", json={**bodies[0], "expires_at": at}), "invalid_request")

    def test_in_the_past_is_refused_unless_it_was_made_before(self, fresh, bodies):
        past = {**bodies[0], "expires_at": "2001-01-01T00:00:00Z"}
        assert_problem(fresh.post("/edits", json=past), "already_expired")
        refused = assert_problem(fresh.post("/edits/batch", json={"edits": [past, bodies[1]]}), "batch_refused")
        assert refused["edits"][0]["code"] == "already_expired"
        at = (datetime.now(UTC) + timedelta(seconds=1.5)).isoformat()
        sent = {"json": {**bodies[0], "expires_at": at}, "headers": {"Idempotency-Key": "passing"}}
        made = fresh.post("/edits", **sent)
        wait_until(lambda: fresh.get("/model").json()["active_edits"] == 0, within_s=10)
        again = fresh.post("/edits", **sent)
        assert (again.status_code, again.content) == (made.status_code, made.content) == (201, made.content)

    def test_is_told_in_utc(self, client, bodies):
        body = {**bodies[0], "expires_at": "2090-01-01T01:00:00+01:00"}
        made = client.post("/edits", json=body).json()
        assert made["expires_at"] == "2090-01-01T00:00:00Z"
