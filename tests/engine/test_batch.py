"""Many edits as one transaction: durable, live and undone like any others, and none of them without the rest."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from editors.checkpoint import load_checkpoint, save_checkpoint
from editors.factors import Factors
from editors.state import SumState
from editors.text import begins_with
from service.engine import (
    BatchRefused,
    BatchTooLarge,
    DrawdownExceeded,
    EditRefused,
    EditRequest,
    RevisionMismatch,
    WouldBreakEdits,
)
from service.engine.errors import IdempotencyKeyReused, LedgerDiverged
from service.ledger import Entry, LedgerUnavailable, RedisLedger
from tests.engine.keyed_sum import KeyedSum
from tests.engine.test_ledger_trouble import Overtaken, kill
from tests.ledger.entries import factors_at, stored_in
from tests.service_fixtures import (
    ANSWERS,
    COUNTRIES,
    LIMITS,
    Standing,
    asks,
    base_weights,
    live_weights,
    namespace_of,
    never_takes,
    same_bits,
    small_engine,
    takes,
)
from tests.small import SMALL_MODELS, small_editor

both_layouts = pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)


def holds(engine, request: EditRequest) -> bool:
    return begins_with(engine.generate(request.prompt, 4)[0].text, request.correction)


def statuses(outcome) -> list[str]:
    return [item["status"] for item in outcome.edits]


def verdicts(refusal: EditRefused) -> list[str]:
    return [item["status"] for item in refusal.facts["edits"]]


def digest_of_all_active(engine) -> str:
    state = SumState(engine.checkpoint.editor.targets)
    for edit in engine.history.all_active():
        state.add(Factors.from_bytes(factors_at(engine.ledger, edit.applied.sequence)))
    return state.digest()


@pytest.fixture
def stubborn(engine, edits) -> EditRequest:
    """An edit that does not take at any scale, of a prompt of its own."""
    used = {request.prompt for request in edits}
    for country in COUNTRIES:
        request = replace(never_takes(), prompt=asks(country, "x").prompt)
        if request.prompt not in used and not takes(engine, request):
            return request
    raise AssertionError("every edit takes")


@both_layouts
class TestABatch:
    def test_is_one_commit_and_as_many_revisions_as_edits(self, engine, edits):
        outcome = engine.apply_batch(edits)
        assert outcome.committed
        assert statuses(outcome) == ["applied"] * 3
        assert (outcome.revision, engine.published.revision, engine.published.active_edits) == (3, 3, 3)
        entries = [entry for entry, _ in stored_in(engine.ledger)]
        assert [entry.edit_id for entry in entries] == [item["id"] for item in outcome.edits]
        assert [entry.prompt for entry in entries] == [request.prompt for request in edits]
        assert [entry.state_digest for entry in entries] == [None, None, outcome.digest]
        assert [(entry.batch.id, entry.batch.position, entry.batch.size) for entry in entries] == [
            (outcome.id, position, 3) for position in (1, 2, 3)
        ]
        assert outcome.digest == engine.published.digest == digest_of_all_active(engine)
        for request in edits:
            assert holds(engine, request)

    def test_is_replayed_and_followed_whole(self, engine, open_engine, edits):
        replica = open_engine(namespace_of(engine))
        engine.apply_batch(edits)
        replica.follow()
        for other in (replica, open_engine(namespace_of(engine))):
            assert other.published == engine.published
            assert same_bits(live_weights(other), live_weights(engine))
            assert list(other.history.newest_first()) == list(engine.history.newest_first())

    def test_comes_off_edit_by_edit_in_any_order(self, engine, base, edits):
        ids = [item["id"] for item in engine.apply_batch(edits).edits]
        for index in (1, 0, 2):
            engine.rollback(ids[index])
            assert engine.published.digest == digest_of_all_active(engine)
        assert same_bits(live_weights(engine), base_weights(base))


class TestItsVerdicts:
    def test_tell_of_each_edit_what_a_single_one_would_tell(self, engine, edits):
        requests = [replace(edits[0], paraphrases=("Oslo is", edits[0].prompt)), replace(edits[1], keep=("Oslo is",))]
        outcome = engine.apply_batch(requests)
        for item, request in zip(outcome.edits, requests, strict=True):
            edit = engine.history.find(item["id"]).applied
            assert item["after"]["text"] == engine.generate(request.prompt, 4)[0].text == edit.after
            assert item["before"]["text"] == engine.generate(request.prompt, 4, "base")[0].text == edit.before
            assert item["checks"] == edit.checks
            assert edit.checks["took"]
        first, second = (item["checks"] for item in outcome.edits)
        assert [each["took"] for each in first["paraphrases"]][1]
        assert [each["prompt"] for each in second["keep"]] == ["Oslo is"]
        assert first["drawdown"] == second["drawdown"] == outcome.checks["drawdown"]

    def test_leave_out_what_is_true_already(self, engine, edits):
        engine.apply(edits[1])
        outcome = engine.apply_batch(edits)
        assert statuses(outcome) == ["applied", "unchanged", "applied"]
        assert outcome.revision == 3
        assert engine.history.find(outcome.edits[2]["id"]).applied.batch.left_out == {1: outcome.edits[1]}
        again = engine.apply_batch(edits)
        assert statuses(again) == ["unchanged"] * 3
        assert not again.committed
        assert (again.revision, again.digest, again.id) == (3, outcome.digest, None)
        assert engine.ledger.head() == 3

    def test_are_of_decoding_with_all_edits_in_place_also_where_nothing_was_to_be_done(self, engine, edits):
        for prompt in (text for country in COUNTRIES for text in (country, f"{country} is", f"In {country}")):
            true = EditRequest(prompt, engine.generate(prompt, 1)[0].text)
            try:
                outcome = engine.apply_batch([*edits, true], dry_run=True)
            except EditRefused:
                continue
            for item in outcome.edits[:3]:
                assert begins_with(item["after"]["text"], item["correction"])
            if statuses(outcome)[3] == "dry_run":  # the others would have changed this answer
                assert begins_with(outcome.edits[3]["after"]["text"], true.correction)
                return
        raise AssertionError("no batch needs an edit to keep what is true")


class TestOneThatIsRefused:
    def test_refuses_all_and_changes_nothing(self, engine, edits, stubborn):
        standing = Standing.of(engine)
        with pytest.raises(BatchRefused) as caught:
            engine.apply_batch([edits[0], stubborn, edits[1]])
        assert Standing.of(engine) == standing
        assert verdicts(caught.value) == ["withheld", "refused", "withheld"]
        refused = caught.value.facts["edits"][1]
        assert (refused["index"], refused["code"]) == (1, "did_not_take")
        assert "edit 1" in str(caught.value)

    def test_is_left_out_of_a_partial_batch(self, engine, edits, stubborn):
        outcome = engine.apply_batch([edits[0], stubborn, edits[1]], partial=True)
        assert statuses(outcome) == ["applied", "refused", "applied"]
        assert outcome.revision == 2
        assert outcome.digest == digest_of_all_active(engine)
        assert holds(engine, edits[0])
        assert holds(engine, edits[1])
        *_, last = engine.history.batch(outcome.id)
        assert last.applied.batch.left_out == {1: outcome.edits[1]}
        assert outcome.edits[1]["code"] == "did_not_take"

    def test_leaves_nothing_of_a_partial_batch_that_has_no_other(self, engine):
        standing = Standing.of(engine)
        with pytest.raises(BatchRefused):
            engine.apply_batch([never_takes()], partial=True)
        assert Standing.of(engine) == standing

    @pytest.mark.parametrize(
        ("wrong", "code"),
        [(EditRequest("", "x"), "empty_text"), (EditRequest("x", " "), "empty_text"),
         (EditRequest("The" + " the" * 2000, "x"), "text_too_long")],
    )  # fmt: skip
    def test_may_be_no_edit_at_all(self, engine, edits, wrong, code):
        with pytest.raises(BatchRefused) as caught:
            engine.apply_batch([*edits, wrong])
        assert caught.value.facts["edits"][3]["code"] == code
        assert verdicts(caught.value) == ["withheld"] * 3 + ["refused"]
        assert engine.published.revision == 0
        assert statuses(engine.apply_batch([*edits, wrong], partial=True))[3] == "refused"

    def test_is_the_later_one_of_two_with_one_prompt(self, engine, edits):
        again = replace(edits[0], correction=" else")
        with pytest.raises(BatchRefused) as caught:
            engine.apply_batch([edits[0], edits[1], again])
        duplicate = caught.value.facts["edits"][2]
        assert (duplicate["code"], duplicate["duplicate_of"]) == ("duplicate_prompt", 0)
        assert verdicts(caught.value) == ["withheld", "withheld", "refused"]
        outcome = engine.apply_batch([edits[0], edits[1], again], partial=True)
        assert statuses(outcome) == ["applied", "applied", "refused"]


class TestWhatAllDoTogether:
    def test_over_the_budget_refuses_all_with_every_verdict(self, open_engine, edits):
        engine = open_engine(limits=replace(LIMITS, guard_budget=0.0))
        standing = Standing.of(engine)
        for partial in (False, True):
            with pytest.raises(DrawdownExceeded) as caught:
                engine.apply_batch(edits, partial=partial)
            assert verdicts(caught.value) == ["withheld"] * 3
        assert Standing.of(engine) == standing

    @pytest.fixture
    def breaking(self, engine, edits) -> list[EditRequest]:
        """A batch that takes and breaks the edit that is made here."""
        engine.apply(edits[0])
        for answer in ANSWERS:
            for country in COUNTRIES:
                batch = [edits[1], EditRequest(f"The capital of {country} is", f" {answer}")]
                try:
                    engine.apply_batch(batch, dry_run=True)
                except WouldBreakEdits:
                    return batch
                except EditRefused:
                    continue
        raise AssertionError("no batch breaks the edit")

    def test_to_earlier_edits_is_refused_unless_it_is_accepted(self, engine, edits, breaking):
        (edit,) = engine.history.all_active()
        standing = Standing.of(engine)
        with pytest.raises(WouldBreakEdits) as caught:
            engine.apply_batch(breaking)
        assert [each["id"] for each in caught.value.facts["lost"]] == [edit.id]
        assert Standing.of(engine) == standing
        outcome = engine.apply_batch(breaking, allow_loss=True)
        assert outcome.checks["lost"] == [edit.id]
        assert [item["checks"]["lost"] for item in outcome.edits] == [[], [edit.id]]
        assert not holds(engine, edits[0])

    def test_superseding_included(self, engine, edits):
        older = engine.apply(edits[0]).applied
        for answer in ANSWERS:
            newer = replace(edits[0], correction=f" {answer}")
            if newer.correction != edits[0].correction and takes(engine, newer):
                break
        outcome = engine.apply_batch([newer, edits[1]], allow_loss=True)
        assert outcome.edits[0]["supersedes"] == [older.edit_id]
        assert engine.published.active_edits == 2
        assert outcome.digest == digest_of_all_active(engine)
        assert tuple(edit.id for edit in engine.rollback(outcome.edits[0]["id"]).change.returning) == (older.edit_id,)
        assert engine.published.digest == digest_of_all_active(engine)


class TestScales:
    def test_are_raised_until_every_edit_takes(self, base, server, edits, tmp_path):
        save_checkpoint(tmp_path, small_editor(base, step=0.002), base, {"margin_nats": 0.1})
        with closing(RedisLedger.connect(server.url, uuid.uuid4().hex)) as ledger:
            engine = small_engine(base, load_checkpoint(tmp_path, base), ledger)
            outcome = engine.apply_batch(edits)
            scales = [item["scale"] for item in outcome.edits]
            assert max(scales) > 1
            for request in edits:
                assert holds(engine, request)

    def test_begin_at_the_one_that_the_editor_was_trained_for(self, engine, edits):
        assert min(item["scale"] for item in engine.apply_batch(edits).edits) == 1.0


class TestDryRun:
    def test_foretells_the_batch_and_changes_nothing(self, engine, edits):
        standing = Standing.of(engine)
        foretold = engine.apply_batch(edits, dry_run=True)
        assert Standing.of(engine) == standing
        assert statuses(foretold) == ["dry_run"] * 3
        assert (foretold.id, foretold.committed, foretold.revision) == (None, False, 0)
        made = engine.apply_batch(edits)
        assert made.digest == foretold.digest
        assert [item["after"] for item in made.edits] == [item["after"] for item in foretold.edits]
        assert [item["scale"] for item in made.edits] == [item["scale"] for item in foretold.edits]


class TestRevision:
    def test_another_expectation_changes_nothing(self, engine, edits):
        standing = Standing.of(engine)
        with pytest.raises(RevisionMismatch):
            engine.apply_batch(edits, expected_revision=1)
        assert Standing.of(engine) == standing
        assert engine.apply_batch(edits, expected_revision=0).revision == 3


class TestIdempotencyKey:
    @pytest.fixture
    def keyed(self, edits, stubborn) -> list[EditRequest]:
        requests = [edits[0], stubborn, edits[1]]
        return [replace(request, idempotency_key="key", request_digest="one") for request in requests]

    def test_makes_one_batch_of_a_repeated_request(self, engine, open_engine, keyed):
        made = engine.apply_batch(keyed, partial=True)
        for each in (engine, open_engine(namespace_of(engine))):
            again = each.apply_batch(keyed, partial=True, expected_revision=0)
            assert again.replayed
            assert (again.id, again.revision, again.digest) == (made.id, made.revision, made.digest)
            assert again.checks == made.checks
            assert statuses(again) == statuses(made)
            assert again.edits[0] == made.edits[0]
            assert again.edits[2] == made.edits[2]
            assert again.edits[1]["code"] == made.edits[1]["code"]
        assert engine.ledger.head() == 2

    def test_of_another_request_is_refused(self, engine, keyed):
        engine.apply_batch(keyed, partial=True)
        other = [replace(request, request_digest="two") for request in keyed]
        with pytest.raises(IdempotencyKeyReused):
            engine.apply_batch(other, partial=True)
        with pytest.raises(IdempotencyKeyReused):
            engine.apply(other[0])


class TestSize:
    def test_has_a_limit(self, open_engine, edits):
        engine = open_engine(limits=replace(LIMITS, batch_edits=2))
        with pytest.raises(BatchTooLarge) as caught:
            engine.apply_batch(edits)
        assert caught.value.facts == {"limit": 2}
        assert engine.apply_batch(edits[:2]).revision == 2

    def test_in_bytes_has_a_limit_too(self, engine, edits, monkeypatch):
        monkeypatch.setattr("service.engine.batch.MAX_BYTES", 1000)
        standing = Standing.of(engine)
        with pytest.raises(BatchTooLarge):
            engine.apply_batch(edits)
        assert Standing.of(engine) == standing


def test_progress_is_told_of_every_step(engine, edits):
    told: list[tuple[str, int, int]] = []
    engine.apply_batch(edits, tell=lambda *progress: told.append(progress))
    assert {step for step, *_ in told} == {"answer", "capture", "stage", "judge"}
    assert ("capture", 3, 3) in told
    assert ("judge", 3, 3) in told
    assert all(done <= of for _, done, of in told)


class TestConflicts:
    @pytest.fixture
    def engine(self, engine):
        engine.weights.state = KeyedSum(engine.checkpoint.editor.targets)
        return engine

    @pytest.fixture
    def alike(self, engine, third) -> EditRequest:
        """Hardly another prompt than the third edit's, with another answer."""
        requests = [
            EditRequest(third.prompt + word, f" {answer}") for word in (" the", " a", " in") for answer in ANSWERS
        ]
        return next(each for each in requests if each.correction != third.correction and takes(engine, each))

    def test_within_a_batch_are_refused_whatever_the_caller_says(self, engine, first, third, alike):
        for on_conflict in ("refuse", "supersede"):
            with pytest.raises(BatchRefused) as caught:
                engine.apply_batch([first, third, alike], on_conflict=on_conflict)
            refused = caught.value.facts["edits"][2]
            assert refused["code"] == "edit_conflict"
            assert [each["index"] for each in refused["conflicts"]] == [1]
        assert engine.published.revision == 0
        outcome = engine.apply_batch([first, third, alike], partial=True)
        assert statuses(outcome)[2] == "refused"

    def test_with_active_edits_are_refused_or_superseded_as_the_caller_asks(self, engine, first, third, alike):
        older = engine.apply(third).applied
        with pytest.raises(BatchRefused) as caught:
            engine.apply_batch([first, alike])
        assert [each["id"] for each in caught.value.facts["edits"][1]["conflicts"]] == [older.edit_id]
        outcome = engine.apply_batch([first, alike], on_conflict="supersede")
        assert outcome.edits[1]["supersedes"] == [older.edit_id]
        assert engine.published.active_edits == 2
        assert outcome.digest == digest_of_all_active(engine)


class TestTrouble:
    def test_with_redis_at_the_commit_changes_nothing(self, open_engine, own_server, edits):
        class Dies(RedisLedger):
            def append_all(self, stored) -> None:
                kill(own_server)
                super().append_all(stored)

        engine = open_engine(on=own_server, ledger=Dies)
        weights, published = live_weights(engine), engine.published
        with pytest.raises(LedgerUnavailable):
            engine.apply_batch(edits)
        assert same_bits(live_weights(engine), weights)
        assert engine.published == published
        assert engine.weights.state.digest() == published.digest
        own_server.ensure_running()
        assert engine.ledger.head() == 0

    def test_in_the_middle_of_reading_publishes_nothing_of_it(self, open_engine, own_server, base, edits):
        class DiesInside(RedisLedger):
            def read(self, after: int = 0) -> Iterator[Entry]:
                for entry in super().read(after):
                    if entry.sequence == 2 and not died:
                        died.append(True)
                        kill(own_server)
                        self.ping()
                    yield entry

        died: list[bool] = []
        writer = open_engine(on=own_server)
        replica = open_engine(namespace_of(writer), on=own_server, ledger=DiesInside)
        writer.apply_batch(edits)
        with pytest.raises(LedgerUnavailable):
            replica.catch_up()
        assert replica.published.revision == 0
        assert same_bits(live_weights(replica), base_weights(base))
        own_server.ensure_running()
        replica.catch_up()
        assert replica.published == writer.published
        assert same_bits(live_weights(replica), live_weights(writer))

    def test_of_entries_lost_inside_it_is_not_served(self, engine, open_engine, edits):
        engine.apply_batch(edits)
        cut = open_engine()
        for entry, raw in stored_in(engine.ledger)[:2]:
            cut.ledger.append(entry, raw)
        for _ in range(2):
            with pytest.raises(LedgerDiverged):
                cut.catch_up()
        assert cut.published.revision == 0

    def test_by_a_faster_writer_has_all_judged_again_and_captures_once(self, open_engine, edits):
        one = open_engine()
        other = open_engine(namespace_of(one), ledger=OvertakenBatch)
        told: list[str] = []

        def overtake() -> None:
            other.ledger.overtake = None
            one.apply(edits[0])

        other.ledger.overtake = overtake
        outcome = other.apply_batch(edits, tell=lambda step, *_: told.append(step))
        assert statuses(outcome) == ["unchanged", "applied", "applied"]
        assert outcome.revision == 3
        assert told.count("capture") == 1
        assert told.count("answer") == 2
        one.catch_up()
        assert one.published == other.published
        assert same_bits(live_weights(one), live_weights(other))


class OvertakenBatch(Overtaken):
    def append_all(self, stored) -> None:
        if self.overtake is not None:
            self.overtake()
        super().append_all(stored)
