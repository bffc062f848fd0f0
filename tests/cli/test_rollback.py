"""`mend rollback`, `tag`, `tags` and `kill-switch` against a service that runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from service.cli.client_command import REFUSED
from tests.cli.running import LOST, Live, between, superseding


@pytest.fixture
def made(live: Live) -> list[dict]:
    return [live.post(body) for body in live.edits[:2]]


class TestRollbackOfEdits:
    def test_takes_edits_back_and_says_what_came_back(self, mend, live):
        older, other = (live.post(body) for body in live.edits[:2])
        newer = superseding(live, older)
        ended = mend("rollback", newer["id"], other["id"], "--reason", "was wrong", "--actor", "ops")
        first, second = ended.out.splitlines()
        assert first.endswith(f"2 active edits; {older['id']} came back")
        assert second.startswith(f"{other['id']}  rolled back at revision ")
        assert second.endswith(", 1 active edits")
        assert [edit["id"] for edit in live.active()] == [older["id"]]
        by = live.get(f"/edits/{newer['id']}")["rolled_back"]
        assert (by["reason"], by["actor"]) == ("was wrong", "ops")

    def test_as_json_is_the_services_own_answer_a_line_each(self, mend, live):
        made = [live.post(body) for body in live.edits[:2]]
        ended = mend("rollback", *(edit["id"] for edit in made), "--json")
        answers = [json.loads(line) for line in ended.out.splitlines()]
        assert [answer["edit"] for answer in answers] == [live.get(f"/edits/{edit['id']}") for edit in made]
        assert answers[1]["digest"] == live.get("/revision")["digest"]

    def test_one_that_is_refused_does_not_keep_the_others(self, mend, live):
        made = live.post(live.edits[0])
        ended = mend("rollback", "nobody", made["id"], made["id"])
        assert ended.status == REFUSED
        assert [line.rpartition("(")[2] for line in ended.err.splitlines()] == [
            "edit_not_found)",
            "already_rolled_back)",
        ]
        assert ended.out.startswith(f"{made['id']}  rolled back")
        assert live.active() == []

    def test_one_that_is_refused_is_the_problem_itself_as_json(self, mend, live):
        ended = mend("rollback", "nobody", "--json")
        assert ended.status == REFUSED
        said, again = json.loads(ended.out), live.server.client.delete("/edits/nobody").json()
        assert said.pop("request_id") != again.pop("request_id")
        assert said == again

    def test_at_a_revision_follows_its_own_changes(self, mend, live):
        ids = [live.post(body)["id"] for body in live.edits[:2]]
        revision = live.get("/revision")["revision"]
        assert mend("rollback", ids[0], "--if-match", revision - 1).refusal.endswith("(revision_mismatch)")
        assert mend("rollback", *ids, "--if-match", revision).status == 0
        assert live.active() == []

    def test_can_be_previewed(self, mend, live, made):
        before = live.get("/model")
        ended = mend("rollback", made[0]["id"], "--dry-run")
        first, change = ended.out.splitlines()
        assert first == f"{made[0]['id']}  dry run: 1 active edits"
        assert f"{made[0]['id']}  leaves" in change
        assert f": {made[0]['correction']!r}"[:-1] in change
        assert live.get("/model") == before

    @pytest.mark.parametrize("given", [[], ["edit_x", "--to", "1"]])
    def test_names_edits_or_a_target(self, mend, given):
        assert "give the IDs of edits, or --to" in mend("rollback", *given).refusal


class TestRollbackTo:
    def test_a_revision_says_what_undoes_it(self, mend, live, made):
        ended = mend("rollback", "--to", made[0]["revision"], "--reason", "wrong", "--actor", "ops")
        first, change = ended.out.splitlines()
        assert first.startswith(f"revision {made[1]['revision'] + 1}: the state of revision {made[0]['revision']}, 1 ")
        assert f"{made[1]['id']}  leaves" in change
        assert live.get("/model")["digest"] == made[0]["digest"]
        undo = first.rpartition("; ")[2].split()
        assert undo[2:] == ["undoes", "it"]
        assert mend("rollback", *undo[:2]).status == 0
        assert live.get("/model")["digest"] == made[1]["digest"]

    def test_the_base_and_a_tag(self, mend, live, made):
        assert mend("tag", "both").status == 0
        assert mend("rollback", "--to", "base").status == 0
        assert live.active() == []
        assert mend("rollback", "--to", "both").status == 0
        assert len(live.active()) == 2
        assert mend("rollback", "--to", "both").out.startswith("unchanged  revision ")

    def test_in_a_preview_changes_nothing(self, mend, live, made):
        before = live.get("/model")
        ended = mend("rollback", "--to", "base", "--dry-run")
        assert ended.out.startswith("dry run: the state of revision 0, 0 active edits\n")
        assert live.get("/model") == before

    def test_as_json_is_the_services_own_answer(self, mend, live, made):
        told = json.loads(mend("rollback", "--to", "base", "--json").out)
        assert told["rolled_back"][-2:] == [edit["id"] for edit in made]

    @pytest.mark.parametrize(("to", "code"), [("999999", "revision_not_found"), ("nobody", "tag_not_found")])
    def test_nowhere_is_refused(self, mend, live, to, code):
        assert mend("rollback", "--to", to).refusal.endswith(f"({code})")

    def test_is_done_once_where_the_answer_is_lost(self, mend, live, made):
        with between(live.url, "/rollback", LOST) as proxy:
            assert mend("rollback", "--to", "base", "--service", proxy.url).status == 0
        assert len(proxy.keys) == 2
        assert live.get("/revision")["revision"] == made[1]["revision"] + 1


class TestTags:
    def test_are_set_listed_and_removed(self, mend, live, made):
        revision = made[0]["revision"]
        ended = mend("tag", "first", "--revision", revision, "--reason", "good", "--actor", "ops")
        assert ended.out.startswith(f"first  revision {revision}  ")
        assert ended.out.endswith("by ops: 'good'\n")
        assert ended.out.strip() in mend("tags").out.splitlines()
        assert json.loads(mend("tags", "--json").out) == live.get("/tags")
        assert mend("tag", "first", "--remove").out == "first  removed\n"
        assert mend("tag", "first", "--remove").refusal.endswith("(tag_not_found)")
        assert not [line for line in mend("tags").out.splitlines() if line.startswith("first ")]

    def test_are_removed_from_whatever_they_name(self, mend):
        assert "leave out --revision" in mend("tag", "x", "--remove", "--revision", "1").refusal


class TestKillSwitch:
    def test_is_engaged_and_released(self, mend, live, made):
        assert mend("kill-switch").out.startswith("not engaged\n")
        ended = mend("kill-switch", "engage", "--reason", "nonsense", "--actor", "night")
        assert "by night: 'nonsense'" in ended.out
        assert ended.out.endswith("0 active edits\n")
        assert mend("kill-switch").out == ended.out
        body = live.edits[2]
        assert mend("edit", body["prompt"], body["correction"]).refusal.endswith("(kill_switch_engaged)")
        assert mend("kill-switch", "release").out.endswith("2 active edits\n")
        assert json.loads(mend("kill-switch", "--json").out)["engaged"] is False
        assert live.get("/model")["digest"] == made[1]["digest"]

    def test_does_nothing_else(self, mend):
        assert "give engage or release" in mend("kill-switch", "press").refusal


def test_an_edit_may_expire(mend, live):
    body = live.edits[0]
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    ended = mend("edit", body["prompt"], body["correction"], "--expires-at", at.isoformat())
    (made,) = live.active()
    assert ended.status == 0
    assert datetime.fromisoformat(made["expires_at"]) == at
    assert f"  expires {made['expires_at'][:19]}" in mend("edits", made["id"]).out.splitlines()
