"""Going back to a revision or a tag, the kill switch, and edits that expire: the same bits, and nothing is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from service.engine import EditNotFound, Note, RevisionMismatch
from service.engine.errors import (
    Busy,
    IdempotencyKeyReused,
    KillSwitchEngaged,
    RevisionNotFound,
    RevisionNotRestorable,
    TagNotFound,
)
from service.engine.turns import MAX_WAITING
from service.ledger import FactorsMissing, Restored, Tagged, verify_ledger
from tests.service_fixtures import Standing, base_weights, live_weights, namespace_of, same_bits

KEYED = Note("ops", "a bad day", "key", "digest")


@pytest.fixture
def made(engine, edits) -> list[str]:
    """Ids of three active edits, at revision 3."""
    return [engine.apply(edit).applied.edit_id for edit in edits]


def active(engine) -> list[str]:
    return [edit.id for edit in engine.history.all_active()]


def ids(edits) -> list[str]:
    return [edit.id for edit in edits]


def in_a_moment(request, seconds: float = 0.3):
    return replace(request, expires_at=datetime.now(UTC) + timedelta(seconds=seconds))


class TestRestore:
    def test_makes_the_bits_of_that_revision_whatever_came_and_went_since(self, engine, edits):
        seen = {0: (engine.published.digest, live_weights(engine), [])}
        made = []

        def remember():
            seen[engine.published.revision] = (engine.published.digest, live_weights(engine), active(engine))

        for edit in edits:
            made.append(engine.apply(edit).applied.edit_id)
            remember()
        for edit_id in made[:2]:
            engine.rollback(edit_id)
            remember()
        for revision in (2, 5, 0, 3, 4, 1, 3):
            done = engine.restore(revision)
            digest, weights, edits_then = seen[revision]
            assert done.digest == engine.published.digest == digest
            assert same_bits(live_weights(engine), weights)
            assert active(engine) == edits_then
            assert done.active_edits == len(edits_then)

    def test_is_an_entry_that_says_what_was_done_by_whom_and_why(self, engine, made):
        engine.restore(1, Note("ops", "a bad day"))
        *_, entry = engine.ledger.read()
        assert isinstance(entry, Restored)
        assert (entry.revision, entry.taken, entry.returned) == (1, tuple(made[1:]), ())
        assert (entry.actor, entry.reason, entry.state_digest) == ("ops", "a bad day", engine.published.digest)
        assert engine.history.find(made[2]).rolled_back == entry

    def test_brings_superseded_edits_back_to_where_they_were(self, engine, edits):
        first = engine.apply(edits[0]).applied.edit_id
        again = replace(edits[0], correction=" Oslo")
        newer = engine.apply(again, allow_loss=True).applied
        assert newer.supersedes == (first,)
        engine.rollback(first)
        engine.rollback(newer.edit_id)
        done = engine.restore(2)
        assert done.change.returned == (first, newer.edit_id)
        assert ids(done.change.returning) == [newer.edit_id]
        assert engine.history.find(first).status == "superseded"
        assert engine.rollback(newer.edit_id).change.returning[0].id == first

    def test_to_what_is_live_changes_nothing(self, engine, made):
        standing = Standing.of(engine)
        done = engine.restore(3)
        assert (done.entry, done.committed, done.revision) == (None, False, 3)
        assert Standing.of(engine) == standing

    def test_in_a_preview_tells_all_and_changes_nothing(self, engine, made, edits):
        engine.rollback(made[0])
        standing = Standing.of(engine)
        foretold = engine.restore(1, dry_run=True)
        assert Standing.of(engine) == standing
        assert not foretold.committed
        assert ids(foretold.change.leaving) == made[1:]
        assert ids(foretold.change.returning) == made[:1]
        done = engine.restore(1)
        assert (done.digest, done.active_edits) == (foretold.digest, foretold.active_edits)
        for edit_id, request in zip(made, edits, strict=True):
            now, then = foretold.answers[edit_id]
            assert then == engine.generate(request.prompt, 4)[0].text
            assert (then if edit_id == made[0] else now).startswith(request.correction)

    def test_survives_a_restart_and_is_followed_by_a_replica(self, engine, made, open_engine):
        replica = open_engine(namespace_of(engine))
        engine.restore(1)
        engine.restore(3)
        replica.follow()
        for other in (replica, open_engine(namespace_of(engine))):
            assert other.published == engine.published
            assert same_bits(live_weights(other), live_weights(engine))
            assert list(other.history.newest_first()) == list(engine.history.newest_first())

    def test_again_with_the_same_key_is_done_once_and_told_the_same(self, engine, made):
        done = engine.restore(1, KEYED)
        engine.restore(3)
        again = engine.restore(1, KEYED)
        assert engine.published.revision == 5
        assert replace(again, change=done.change) == done
        for name in ("leaving", "returning"):
            assert ids(getattr(again.change, name)) == ids(getattr(done.change, name))
        with pytest.raises(IdempotencyKeyReused):
            engine.rollback(made[0], replace(KEYED, request_digest="other"))

    @pytest.mark.parametrize("revision", [4, 10**9])
    def test_to_what_never_was_is_refused(self, engine, made, revision):
        standing = Standing.of(engine)
        with pytest.raises(RevisionNotFound, match="there is no revision"):
            engine.restore(revision)
        assert Standing.of(engine) == standing

    def test_to_the_inside_of_a_batch_is_refused(self, engine, edits):
        engine.apply_batch(edits)
        with pytest.raises(RevisionNotFound, match="led to revision 3"):
            engine.restore(2)
        engine.restore(0)
        engine.restore(3)
        assert engine.published.active_edits == 3

    def test_at_another_revision_is_refused(self, engine, made):
        with pytest.raises(RevisionMismatch):
            engine.restore(1, expected_revision=2)
        assert engine.restore(1, expected_revision=3).revision == 4


class TestCompaction:
    def test_keeps_what_was_taken_back_to_restore_a_revision(self, engine, made):
        engine.restore(0)
        assert engine.ledger.compact().dropped_factors == 0
        engine.restore(3)
        assert active(engine) == made

    def test_drops_what_was_rolled_back_by_itself_and_says_so(self, engine, made, open_engine):
        engine.rollback(made[1])
        assert engine.ledger.compact().dropped_factors == 1
        for each in (engine, open_engine(namespace_of(engine))):
            standing = Standing.of(each)
            with pytest.raises(RevisionNotRestorable, match="a tag names is kept") as refused:
                each.restore(3)
            assert refused.value.facts == {"sequence": 2}
            assert Standing.of(each) == standing
            with pytest.raises(RevisionNotRestorable):
                each.tag("late", 3)
        assert engine.restore(1).committed

    def test_keeps_what_stood_at_a_tag_until_it_is_removed(self, engine, made):
        digest = engine.published.digest
        engine.tag("good")
        engine.rollback(made[1])
        assert engine.ledger.compact().dropped_factors == 0
        assert engine.restore("good").digest == digest
        engine.rollback(made[1])
        engine.untag("good")
        assert engine.ledger.compact().dropped_factors == 1
        assert verify_ledger(engine.ledger).problems == []
        with pytest.raises(RevisionNotRestorable):
            engine.restore(3)

    def test_beside_a_writer_never_drops_what_is_returned_meanwhile(self, engine, made, monkeypatch):
        engine.rollback(made[1])
        wanted = list(engine.ledger.read())[1]
        write, others = engine.ledger._write, [lambda: engine.restore(3)]

        def late(script, *rest):
            if others and "HDEL" in script:
                others.pop()()
            return write(script, *rest)

        monkeypatch.setattr(engine.ledger, "_write", late)
        assert engine.ledger.compact().dropped_factors == 0
        assert not others
        assert len(next(engine.ledger.factors([wanted]))) > 0

    def test_of_what_a_ledger_has_lost_otherwise_is_told_by_its_verification(self, engine, made):
        engine.restore(0)
        engine.ledger._connection.ask(lambda client: client.hdel(engine.ledger._keys[1], "2"))
        assert [str(each) for each in verify_ledger(engine.ledger).problems] == ["entry 2 has lost its factors"]
        with pytest.raises(FactorsMissing):
            next(engine.ledger.factors([list(engine.ledger.read())[1]]))

    def test_just_before_an_edit_is_returned_or_tagged_refuses_that(self, engine, made, monkeypatch, open_engine):
        """Whoever compacts may be another service, which drops what this one has just read."""
        other = open_engine(namespace_of(engine))
        for number, attempt in enumerate((lambda: engine.restore(3), lambda: engine.tag("both", 3))):
            engine.rollback(made[number])
            head, commit = engine.ledger.head(), engine._journal.commit

            def late(*stored, commit=commit, **needs):
                assert other.ledger.compact().dropped_factors == 1
                return commit(*stored, **needs)

            monkeypatch.setattr(engine._journal, "commit", late)
            standing = Standing.of(engine)
            with pytest.raises(RevisionNotRestorable):
                attempt()
            monkeypatch.setattr(engine._journal, "commit", commit)
            assert Standing.of(engine) == standing
            assert engine.ledger.head() == head
        assert verify_ledger(engine.ledger).problems == []
        other.catch_up()
        assert other.published == engine.published

    def test_drops_what_has_expired_although_a_tag_had_it(self, engine, edits):
        engine.apply(edits[0])
        engine.apply(in_a_moment(edits[1]))
        engine.apply(in_a_moment(edits[2], 1.0))
        engine.tag("all")
        time.sleep(0.35)
        engine.expire()
        engine.kill()
        time.sleep(0.7)
        engine.revive()
        assert engine.ledger.compact().dropped_factors == 2
        assert verify_ledger(engine.ledger).problems == []
        assert engine.tag("again", 3).revision == 3
        assert engine.restore("all").entry is None
        assert len(engine.restore("all", dry_run=True).change.expired) == 2


class TestTags:
    def test_name_the_live_revision_or_another(self, engine, made):
        live = engine.tag("good", note=Note("ops", "before the release"))
        assert isinstance(live, Tagged)
        assert (live.name, live.revision, live.sequence, live.actor) == ("good", 3, 4, "ops")
        assert engine.tag("first", 1).revision == 1
        assert [each.name for each in engine.history.tags()] == ["first", "good"]
        assert engine.restore("first").target.revision == 1
        assert active(engine) == made[:1]

    def test_change_no_weight(self, engine, made):
        weights, digest = live_weights(engine), engine.published.digest
        engine.tag("good")
        assert engine.published.digest == digest
        assert same_bits(live_weights(engine), weights)
        assert engine.prove().holds

    def test_again_are_no_further_entry_and_elsewhere_move(self, engine, made):
        first = engine.tag("good")
        assert engine.tag("good") == engine.tag("good", 3) == first
        assert engine.published.revision == 4
        keyed = engine.tag("good", note=KEYED)
        assert (keyed.revision, keyed.sequence) == (3, 5)
        assert engine.tag("good", 2).revision == 2
        assert engine.history.tag("good").revision == 2

    def test_survive_a_restart_and_compaction(self, engine, made, open_engine):
        engine.tag("good")
        engine.tag("gone")
        engine.untag("gone")
        engine.ledger.compact()
        restarted = open_engine(namespace_of(engine))
        assert restarted.history.tags() == engine.history.tags()
        assert [each.name for each in restarted.history.tags()] == ["good"]

    def test_that_are_not_there_are_refused(self, engine, made):
        for attempt in (lambda: engine.restore("none"), lambda: engine.untag("none")):
            with pytest.raises(TagNotFound):
                attempt()
        with pytest.raises(RevisionNotFound):
            engine.tag("good", 9)
        assert engine.published.revision == 3


class TestKillSwitch:
    def test_serves_the_base_and_then_what_was_before(self, engine, base, made):
        weights, digest = live_weights(engine), engine.published.digest
        killed = engine.kill(Note("ops", "at night"))
        assert engine.history.killed == killed
        assert same_bits(live_weights(engine), base_weights(base))
        released = engine.revive()
        assert released.returned == tuple(made)
        assert engine.history.killed is None
        assert engine.published.digest == digest
        assert same_bits(live_weights(engine), weights)

    def test_lets_nobody_change_anything_until_it_is_released(self, engine, edits, made, open_engine):
        engine.kill(Note("ops", "at night"))
        for each in (engine, open_engine(namespace_of(engine))):
            for attempt in (
                lambda each=each: each.apply(edits[0]),
                lambda each=each: each.apply_batch(edits),
                lambda each=each: each.rollback(made[0]),
                lambda each=each: each.restore(3),
                lambda each=each: each.restore(3, dry_run=True),
            ):
                with pytest.raises(KillSwitchEngaged, match="DELETE /kill-switch") as refused:
                    attempt()
                assert refused.value.facts == {"revision": 4, "actor": "ops", "reason": "at night"}
            assert each.published.revision == 4

    def test_twice_is_once(self, engine, made):
        killed = engine.kill()
        assert engine.kill() == killed
        assert engine.revive().sequence == 5
        assert engine.revive() is None
        assert engine.published.revision == 5

    def test_holds_where_there_is_nothing_to_take_back(self, engine, edits):
        engine.kill()
        with pytest.raises(KillSwitchEngaged):
            engine.apply(edits[0])
        engine.revive()
        assert engine.apply(edits[0]).committed

    def test_with_a_key_is_told_the_same_later_and_never_engaged_again(self, engine, made):
        first = engine.kill()
        killed = engine.kill(KEYED)
        assert engine.history.killed == first
        engine.revive()
        assert active(engine) == made
        assert engine.kill(KEYED) == killed
        assert engine.history.killed is None
        released = engine.revive(replace(KEYED, idempotency_key="back"))
        engine.kill()
        assert engine.revive(replace(KEYED, idempotency_key="back")) == released
        assert engine.history.killed is not None

    def test_needs_nothing_of_what_is_taken_back(self, engine, base, made):
        engine.ledger._connection.ask(lambda client: client.delete(engine.ledger._keys[1]))
        engine.kill()
        assert same_bits(live_weights(engine), base_weights(base))

    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_waits_for_no_change_that_is_under_way(self, engine, edits, base, elsewhere, open_engine):
        other = open_engine(namespace_of(engine)) if elsewhere else engine
        began, killed = threading.Event(), threading.Event()

        def tell(step, done, of):
            began.set()
            killed.wait(30)

        with ThreadPoolExecutor(3) as pool:
            batch = pool.submit(engine.apply_batch, edits, tell=tell)
            waiting = pool.submit(lambda: began.wait(30) and engine.apply(edits[0]))
            assert began.wait(30)
            killing = pool.submit(other.kill)
            while not (engine._turns._urgent or killing.done()):
                time.sleep(0.01)
            if elsewhere:
                assert not engine.follow()
            killed.set()
            with pytest.raises(KillSwitchEngaged):
                batch.result(30)
            with pytest.raises(KillSwitchEngaged):
                waiting.result(30)
            killing.result(30)
        engine.follow()
        assert engine.published == other.published
        assert same_bits(live_weights(engine), base_weights(base))
        engine.revive()
        assert engine.apply(edits[0]).committed

    def test_finds_a_place_where_nobody_else_does(self, engine, edits):
        with ThreadPoolExecutor(MAX_WAITING + 1) as pool:
            with engine._turns.taken():
                waiting = [pool.submit(engine.apply, edits[0]) for _ in range(MAX_WAITING)]
                while engine._turns._places._free._value:
                    time.sleep(0.01)
                with pytest.raises(Busy):
                    pool.submit(engine.rollback, "x").result(30)
                killing = pool.submit(engine.kill)
                while not engine._turns._urgent:
                    time.sleep(0.01)
            assert killing.result(30).kill_switch == "engaged"
            for each in waiting:
                with pytest.raises(KillSwitchEngaged):
                    each.result(30)

    def test_answers_what_was_made_before_it(self, engine, edits):
        request = replace(edits[0], idempotency_key="key", request_digest="digest")
        made = engine.apply(request)
        engine.kill()
        assert engine.apply(request).applied == made.applied


class TestExpiry:
    def test_takes_an_edit_back_when_its_time_has_come(self, engine, base, edits):
        made = engine.apply(in_a_moment(edits[0])).applied
        assert engine.expire() == []
        time.sleep(0.35)
        assert ids(engine.expire()) == [made.edit_id]
        assert engine.expire() == []
        by = engine.history.find(made.edit_id).rolled_back
        assert (by.expired, by.reason, by.actor) == (True, "expired", None)
        assert same_bits(live_weights(engine), base_weights(base))

    def test_brings_back_what_it_superseded(self, engine, edits):
        first = engine.apply(edits[0]).applied.edit_id
        engine.apply(in_a_moment(replace(edits[0], correction=" Oslo")), allow_loss=True)
        time.sleep(0.35)
        engine.expire()
        assert active(engine) == [first]

    def test_happens_once_whoever_is_first(self, engine, edits, open_engine):
        engine.apply(in_a_moment(edits[0]))
        other = open_engine(namespace_of(engine))
        time.sleep(0.35)
        assert len(other.expire() + engine.expire()) == 1
        engine.follow()
        assert engine.published == other.published
        assert engine.published.revision == 2

    def test_is_not_undone_by_going_back(self, engine, edits):
        kept = engine.apply(edits[0]).applied.edit_id
        passing = engine.apply(in_a_moment(edits[1])).applied.edit_id
        engine.kill()
        time.sleep(0.35)
        assert engine.expire() == []
        released = engine.revive()
        assert (released.returned, released.expired) == ((kept,), (passing,))
        assert active(engine) == [kept]
        done = engine.restore(2)
        assert (done.entry, done.change.expired) == (None, (passing,))


def test_a_rollback_of_an_edit_can_be_previewed(engine, made):
    standing = Standing.of(engine)
    foretold = engine.rollback(made[1], dry_run=True)
    assert Standing.of(engine) == standing
    assert (foretold.committed, foretold.revision, ids(foretold.change.leaving)) == (False, 3, [made[1]])
    assert engine.rollback(made[1]).digest == foretold.digest
    with pytest.raises(EditNotFound):
        engine.rollback("edit_none", dry_run=True)
