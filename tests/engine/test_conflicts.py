"""Two prompts that the model hardly tells apart cannot have two answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from editors.text import begins_with
from service.engine import EditConflict, EditRequest, StateFull
from service.engine.capacity import LIMIT, Capacity
from service.engine.conflicts import CONFLICT, MOST, NOTABLE, find_near, find_place
from service.engine.history import History
from service.ledger import digest_of
from tests.engine.keyed_sum import KeyedSum
from tests.ledger.entries import applied, rolled_back
from tests.service_fixtures import ANSWERS, Standing, live_weights, same_bits, takes


def digest_for(name: str) -> str:
    return digest_of(name.encode())


class TestFindPlace:
    """On a history of its own: edit-1 asks `a`, edit-2 asks `b`, edit-3 asks `c`; all say Rome."""

    @pytest.fixture
    def history(self) -> History:
        history = History()
        for sequence, prompt in enumerate("abc", 1):
            history.record(applied(sequence, prompt=prompt, correction=" Rome", factors_digest=digest_for(prompt)))
        return history

    def place(self, history, prompt, correction, overlaps, on_conflict="refuse"):
        found = [(digest_for(name), overlap) for name, overlap in overlaps.items()]
        return find_place(EditRequest(prompt, correction), find_near(found, history), history, on_conflict)

    @pytest.mark.parametrize("overlap", [CONFLICT, 0.99, 1.0])
    def test_refuses_another_answer_to_hardly_another_prompt(self, history, overlap):
        with pytest.raises(EditConflict) as caught:
            self.place(history, "d", "Oslo", {"b": overlap, "a": 0.94})
        assert caught.value.facts["conflicts"] == [
            {"id": "edit-2", "prompt": "b", "correction": " Rome", "overlap": overlap}
        ]
        assert "on_conflict=supersede" in str(caught.value)

    def test_supersedes_where_the_caller_says_so(self, history):
        place = self.place(history, "d", "Oslo", {"b": 0.97, "c": 0.96, "a": 0.5}, "supersede")
        assert place.supersedes == ("edit-2", "edit-3")
        assert place.checks() == [
            {"id": "edit-2", "overlap": 0.97, "superseded": True},
            {"id": "edit-3", "overlap": 0.96, "superseded": True},
            {"id": "edit-1", "overlap": 0.5, "superseded": False},
        ]

    def test_keeps_both_where_the_caller_says_so(self, history):
        place = self.place(history, "b", "Oslo", {"b": 1.0, "c": 0.97}, "keep")
        assert place.supersedes == ("edit-2",)  # of its own prompt
        assert [check["superseded"] for check in place.checks()] == [True, False]

    @pytest.mark.parametrize("correction", [" Rome", "Rome", "Rome \n"])
    def test_the_same_answer_is_no_conflict(self, history, correction):
        place = self.place(history, "d", correction, {"b": 1.0})
        assert place.supersedes == ()
        assert place.checks() == [{"id": "edit-2", "overlap": 1.0, "superseded": False}]

    def test_below_the_threshold_both_stand_and_far_ones_are_not_told(self, history):
        place = self.place(history, "d", "Oslo", {"b": CONFLICT - 1e-6, "c": NOTABLE, "a": NOTABLE - 1e-6})
        assert place.supersedes == ()
        assert [check["id"] for check in place.checks()] == ["edit-2", "edit-3"]

    def test_the_same_prompt_supersedes_without_being_asked(self, history):
        assert self.place(history, "b", "Oslo", {"b": 1.0}).supersedes == ("edit-2",)

    def test_but_not_others_that_it_conflicts_with(self, history):
        with pytest.raises(EditConflict) as caught:
            self.place(history, "b", "Oslo", {"b": 1.0, "c": 0.98})
        assert [each["id"] for each in caught.value.facts["conflicts"]] == ["edit-3"]

    def test_takes_along_what_the_others_had_superseded(self, history):
        history.record(applied(4, prompt="b", supersedes=("edit-2",), factors_digest=digest_for("newer b")))
        place = self.place(history, "d", "Oslo", {"newer b": 1.0}, "supersede")
        assert place.supersedes == ("edit-2", "edit-4")

    def test_knows_nothing_of_what_was_rolled_back(self, history):
        history.record(rolled_back(4, "edit-2"))
        assert self.place(history, "d", "Oslo", {"b": 1.0}).supersedes == ()
        assert self.place(history, "b", "Oslo", {}).supersedes == ()

    def test_tells_no_more_than_a_few(self):
        history = History()
        names = [f"p{number}" for number in range(MOST + 5)]
        for sequence, name in enumerate(names, 1):
            history.record(applied(sequence, prompt=name, factors_digest=digest_for(name)))
        overlaps = {name: 1 - row / 1000 for row, name in enumerate(names)}
        with pytest.raises(EditConflict) as caught:
            self.place(history, "d", "Oslo", overlaps)
        assert len(caught.value.facts["conflicts"]) == MOST
        place = self.place(history, "d", "Oslo", overlaps, "supersede")
        assert len(place.checks()) == MOST
        assert len(place.supersedes) == len(names)


class TestOnAnEngineWithKeys:
    @pytest.fixture
    def engine(self, engine):
        engine.weights.state = KeyedSum(engine.checkpoint.editor.targets)
        return engine

    @pytest.fixture
    def older(self, engine, third) -> EditRequest:
        engine.apply(third)
        return third

    @pytest.fixture
    def other(self, engine, older) -> EditRequest:
        """One word more, and another answer; takes in the older one's place."""
        requests = [
            EditRequest(older.prompt + word, f" {answer}")
            for word in (" the", " a", " in", " of")
            for answer in ANSWERS
        ]
        return next(
            each
            for each in requests
            if each.correction != older.correction and takes(engine, each, on_conflict="supersede")
        )

    def test_it_is_refused_and_changes_nothing(self, engine, older, other):
        (edit,) = engine.history.all_active()
        standing = Standing.of(engine)
        for dry_run in (True, False):
            with pytest.raises(EditConflict) as caught:
                engine.apply(other, dry_run=dry_run)
            assert [each["id"] for each in caught.value.facts["conflicts"]] == [edit.id]
            assert caught.value.facts["conflicts"][0]["prompt"] == older.prompt
        assert Standing.of(engine) == standing

    def test_it_takes_the_older_one_s_place_where_the_caller_says_so(self, engine, older, other):
        (edit,) = engine.history.all_active()
        weights = live_weights(engine)
        made = engine.apply(other, on_conflict="supersede").applied
        assert made.supersedes == (edit.id,)
        assert made.checks["conflicts"][0]["id"] == edit.id
        assert made.checks["conflicts"][0]["superseded"]
        assert engine.published.active_edits == 1
        assert tuple(edit.id for edit in engine.rollback(made.edit_id).change.returning) == (edit.id,)
        assert same_bits(live_weights(engine), weights)

    def test_it_stands_beside_the_older_one_where_the_caller_says_so(self, engine, older):
        (edit,) = engine.history.all_active()
        requests = [
            EditRequest(older.prompt + word, f" {answer}")
            for word in (" the", " a", " in", " of", " is born in", " speaks")
            for answer in ANSWERS
        ]
        other = next(
            each
            for each in requests
            if takes(engine, each, on_conflict="keep") and not takes(engine, each, on_conflict="refuse")
        )
        made = engine.apply(other, on_conflict="keep").applied
        assert made.supersedes == ()
        assert made.checks["conflicts"][0] == {
            "id": edit.id, "overlap": pytest.approx(1, abs=1 - CONFLICT), "superseded": False,
        }  # fmt: skip
        assert engine.published.active_edits == 2
        for request in (older, other):
            assert begins_with(engine.generate(request.prompt, 4)[0].text, request.correction)

    def test_every_edit_tells_which_are_near_to_it(self, engine, first, second):
        one = engine.apply(first, allow_loss=True).applied
        two = engine.apply(second, allow_loss=True).applied
        assert one.checks["conflicts"] == []
        assert {each["id"] for each in two.checks["conflicts"]} <= {one.edit_id}


class TestCapacity:
    def full(self, engine, edits: int) -> None:
        engine.weights.state = KeyedSum(engine.checkpoint.editor.targets)
        engine.weights.state.full_at = edits

    def test_a_full_state_takes_no_more_and_superseding_needs_no_room(self, engine, first, second):
        self.full(engine, 1.2)
        engine.apply(first)
        standing = Standing.of(engine)
        with pytest.raises(StateFull) as caught:
            engine.apply(second)
        assert caught.value.facts == {"fullness": 1.0, "limit": LIMIT}
        assert Standing.of(engine) == standing
        for answer in ANSWERS:
            again = replace(first, correction=f" {answer}")
            if again.correction != first.correction and takes(engine, again):
                assert engine.apply(again).committed
                return
        raise AssertionError("no other correction takes")

    def test_is_warned_of_before_it_ends(self, engine, first, second, caplog):
        self.full(engine, 2.5)
        engine.apply(first)
        assert engine.published.fullness == pytest.approx(0.4)
        assert Capacity(engine.published.fullness).warning is None
        assert not caplog.messages
        engine.apply(second)
        assert "80%" in Capacity(engine.published.fullness).warning
        assert [message for message in caplog.messages if "80%" in message]

    def test_is_not_known_of_a_sum(self, engine, first):
        engine.apply(first)
        assert engine.published.fullness is None
        assert Capacity(None).warning is None
