"""The same prompt again: the newer edit takes the older one's place, and gives it back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from editors.factors import Factors
from editors.formats import INDEX
from editors.state import SumState
from service.engine import AlreadyRolledBack, EditRequest
from service.engine.errors import LedgerDiverged
from tests.ledger.entries import factors_at, stored_in
from tests.service_fixtures import ANSWERS, Standing, base_weights, live_weights, namespace_of, same_bits, takes
from tests.small import SMALL_MODELS

both_layouts = pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)


def digest_of_only(engine, *edit_ids: str) -> str:
    """Of a state that never held anything but these edits."""
    state = SumState(engine.checkpoint.editor.targets)
    for edit_id in edit_ids:
        sequence = engine.history.find(edit_id).applied.sequence
        state.add(Factors.from_bytes(factors_at(engine.ledger, sequence)))
    return state.digest()


def statuses(engine) -> list[str]:
    """Of all edits, oldest first."""
    return [edit.status for edit in engine.history.newest_first()][::-1]


@pytest.fixture
def again(engine, first) -> EditRequest:
    """Another correction of the first one's prompt, which takes in its place."""
    made = engine.apply(first).applied
    found = [replace(first, correction=f" {answer}") for answer in ANSWERS]
    found = [request for request in found if request.correction != first.correction and takes(engine, request)]
    engine.rollback(made.edit_id)
    return found[0]


@both_layouts
class TestTheSamePromptAgain:
    def test_leaves_the_state_of_the_newer_edit_alone(self, engine, first, again):
        older = engine.apply(first).applied
        outcome = engine.apply(again)
        newer = outcome.applied
        assert newer.supersedes == (older.edit_id,)
        assert engine.published.active_edits == 1
        assert outcome.digest == engine.published.digest == digest_of_only(engine, newer.edit_id)
        assert statuses(engine)[-2:] == ["superseded", "applied"]
        assert engine.history.find(older.edit_id).superseded_by == newer.edit_id
        assert [edit.id for edit in engine.history.all_active()] == [newer.edit_id]

    def test_says_before_what_the_older_one_made_it_say(self, engine, first, again):
        older = engine.apply(first).applied
        assert engine.apply(again).applied.before == older.after

    def test_brings_the_older_one_back_when_the_newer_is_rolled_back(self, engine, first, again):
        older = engine.apply(first)
        weights = live_weights(engine)
        newer = engine.apply(again).applied
        engine.rollback(newer.edit_id)
        assert engine.history.find(newer.edit_id).revived == (older.applied.edit_id,)
        assert engine.published.digest == older.digest
        assert same_bits(live_weights(engine), weights)
        assert statuses(engine)[-2:] == ["applied", "rolled_back"]

    def test_a_superseded_edit_can_be_rolled_back_and_changes_no_weight(self, engine, base, first, again):
        older, newer = engine.apply(first).applied, engine.apply(again)
        weights, revision = live_weights(engine), engine.published.revision
        done = engine.rollback(older.edit_id)
        assert (engine.published.revision, engine.published.digest) == (revision + 1, newer.digest)
        assert done.digest == newer.digest
        assert done.change.returning == ()
        assert same_bits(live_weights(engine), weights)
        assert engine.rollback(newer.applied.edit_id).change.returning == ()
        assert same_bits(live_weights(engine), base_weights(base))

    def test_survives_a_restart_at_every_revision(self, engine, open_engine, first, again):
        older = engine.apply(first).applied
        for change in (
            lambda: engine.apply(again),
            lambda: engine.rollback(next(engine.history.newest_first()).id),
            lambda: engine.apply(again),
            lambda: engine.rollback(older.edit_id),
        ):
            change()
            restarted = open_engine(namespace_of(engine))
            assert restarted.published == engine.published
            assert same_bits(live_weights(restarted), live_weights(engine))
            assert list(restarted.history.newest_first()) == list(engine.history.newest_first())


class TestAChain:
    @pytest.fixture
    def chain(self, engine, first, again) -> list[str]:
        """Three edits of one prompt, each in the place of the one before."""
        return [engine.apply(request).applied.edit_id for request in (first, again, first)]

    def test_names_every_standing_edit_that_it_replaces(self, engine, chain):
        one, two, three = (engine.history.find(edit_id) for edit_id in chain)
        assert two.applied.supersedes == (one.id,)
        assert three.applied.supersedes == (one.id, two.id)
        assert one.superseded_by == two.superseded_by == three.id
        assert [edit.id for edit in engine.history.all_active()] == [three.id]

    @pytest.mark.parametrize(
        ("order", "active"),
        [((2, 1, 0), [[1], [0], []]), ((1, 2, 0), [[2], [0], []]), ((0, 2, 1), [[2], [1], []]),
         ((1, 0, 2), [[2], [2], []]), ((2, 0, 1), [[1], [1], []]), ((0, 1, 2), [[2], [2], []])],
    )  # fmt: skip
    def test_comes_off_in_any_order_leaving_one_at_a_time(self, engine, chain, order, active):
        for index, left in zip(order, active, strict=True):
            engine.rollback(chain[index])
            assert [edit.id for edit in engine.history.all_active()] == [chain[each] for each in left]
            assert engine.published.digest == digest_of_only(engine, *(chain[each] for each in left))

    def test_is_known_at_every_revision(self, engine, chain):
        engine.rollback(chain[2])
        start = engine.history.find(chain[0]).applied.sequence
        active = [[edit.id for edit in engine.history.active_at(start + step)] for step in range(4)]
        assert active == [[chain[0]], [chain[1]], [chain[2]], [chain[1]]]


class TestSuperseding:
    def test_is_foretold_by_a_dry_run_that_changes_nothing(self, engine, first, again):
        older = engine.apply(first).applied
        standing = Standing.of(engine)
        foretold = engine.apply(again, dry_run=True)
        assert Standing.of(engine) == standing
        assert statuses(engine)[-1:] == ["applied"]
        assert foretold.applied.supersedes == (older.edit_id,)
        assert engine.apply(again).digest == foretold.digest

    def test_is_of_prompts_with_the_same_tokens(self, engine, first, again):
        # The small tokenizer reads both as <unk>, so the model cannot tell them apart.
        one, other = (replace(first, prompt=f"{first.prompt} {sign} is") for sign in "☃☀")
        if not takes(engine, one):
            one, other = (replace(each, correction=again.correction) for each in (one, other))
        older = engine.apply(one).applied
        for answer in ANSWERS:
            request = replace(other, correction=f" {answer}")
            if request.correction != one.correction and takes(engine, request):
                assert engine.apply(request).applied.supersedes == (older.edit_id,)
                return
        raise AssertionError("no other correction takes")

    def test_is_followed_by_a_replica(self, open_engine, engine, first, again):
        engine.apply(first)
        replica = open_engine(namespace_of(engine))
        newer = engine.apply(again).applied
        replica.follow()
        assert replica.published == engine.published
        assert same_bits(live_weights(replica), live_weights(engine))
        assert replica.rollback(newer.edit_id).change.returning
        engine.follow()
        assert same_bits(live_weights(replica), live_weights(engine))
        assert list(replica.history.newest_first()) == list(engine.history.newest_first())

    def test_exports_only_what_is_active(self, engine, first, again, tmp_path):
        engine.apply(first)
        newer = engine.apply(again).applied
        engine.export("factors", tmp_path)
        index = json.loads((tmp_path / INDEX).read_text())
        assert [edit["id"] for edit in index["edits"]] == [newer.edit_id]

    def test_an_idempotency_key_still_answers_with_the_older_one(self, engine, first, again):
        keyed = replace(first, idempotency_key="key", request_digest="one")
        older = engine.apply(keyed).applied
        engine.apply(again)
        repeated = engine.apply(keyed)
        assert repeated.replayed
        assert repeated.applied == older

    def test_twice_rolled_back_is_refused(self, engine, first, again):
        older = engine.apply(first).applied
        engine.apply(again)
        engine.rollback(older.edit_id)
        with pytest.raises(AlreadyRolledBack):
            engine.rollback(older.edit_id)


class TestAnOlderLedger:
    """Before edits superseded each other, two of the same prompt were both active."""

    @pytest.fixture
    def both(self, engine, open_engine, first, again) -> list[str]:
        made = [engine.apply(request).applied for request in (first, again)]
        older = open_engine()
        state = SumState(engine.checkpoint.editor.targets)
        for sequence, entry in enumerate(made, 1):
            raw = factors_at(engine.ledger, entry.sequence)
            state.add(Factors.from_bytes(raw))
            alone = {"sequence": sequence, "supersedes": (), "state_digest": state.digest()}
            older.ledger.append(entry.model_copy(update=alone), raw)
        self.engine = open_engine(namespace_of(older))
        return [entry.edit_id for entry in made]

    def test_keeps_both_active(self, both):
        assert [edit.id for edit in self.engine.history.all_active()] == both
        assert self.engine.published.digest == digest_of_only(self.engine, *both)

    def test_has_both_superseded_and_both_come_back(self, both, first):
        for answer in ANSWERS:
            request = replace(first, correction=f" {answer}")
            if takes(self.engine, request):
                made = self.engine.apply(request).applied
                break
        assert made.supersedes == tuple(both)
        assert self.engine.published.digest == digest_of_only(self.engine, made.edit_id)
        self.engine.rollback(made.edit_id)
        assert self.engine.history.find(made.edit_id).revived == tuple(both)
        assert self.engine.published.digest == digest_of_only(self.engine, *both)


@pytest.mark.parametrize("wrong", ["unknown", "rolled back"])
def test_a_ledger_that_supersedes_what_does_not_stand_has_diverged(engine, open_engine, first, second, wrong):
    taken_back = engine.apply(first).applied
    engine.rollback(taken_back.edit_id)
    made = engine.apply(second).applied
    forged = open_engine()
    for entry, raw in stored_in(engine.ledger):
        if entry.sequence == made.sequence:
            entry = made.model_copy(update={"supersedes": (taken_back.edit_id if wrong == "rolled back" else "x",)})
        forged.ledger.append(entry, raw)
    for _ in range(2):
        with pytest.raises(LedgerDiverged) as caught:
            forged.catch_up()
        assert caught.value.facts["sequence"] == made.sequence
    assert forged.published.revision == 0
