"""An audit says of every active edit what greedy decoding says, of one revision, and nobody waits for it."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from editors.text import begins_with
from service.engine import EditRefused, EditRequest, WouldBreakEdits
from service.engine.audit import attribute
from service.engine.history import History
from tests.ledger.entries import applied, batch, rolled_back
from tests.service_fixtures import ANSWERS, COUNTRIES, Standing, asks, takes
from tests.small import SMALL_MODELS

both_layouts = pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)


def holds(engine, each) -> bool:
    request = each.edit.applied
    return begins_with(engine.generate(request.prompt, 4)[0].text, request.correction)


def crowd(engine) -> None:
    """Make whatever takes, whatever it breaks."""
    for country, answer in itertools.product(COUNTRIES, ANSWERS[:2]):
        for request in (asks(country, answer), EditRequest(f"The capital of {country} is", f" {answer}")):
            try:
                engine.apply(request, allow_loss=True)
            except EditRefused:
                continue


@both_layouts
class TestAnAudit:
    def test_finds_that_edits_hold_that_break_none(self, engine, edits):
        made = [engine.apply(request).applied for request in edits]
        audit = engine.audit()
        assert [each.edit.applied for each in audit.edits] == made
        assert all(each.holds and each.margin_nats > 0 for each in audit.edits)
        assert (audit.held, audit.lost, audit.lost_to) == (3, 0, {})
        assert audit.published == engine.published
        assert engine.last_audit is audit

    def test_agrees_with_decoding_on_every_edit_of_a_crowd(self, engine):
        crowd(engine)
        audit = engine.audit()
        assert len(audit.edits) == engine.published.active_edits > 5
        for each in audit.edits:
            assert each.holds == holds(engine, each)
            if each.text is not None:
                assert each.text == engine.generate(each.edit.applied.prompt, 4)[0].text
            else:
                assert each.margin_nats > 0
        assert 0 < audit.held < len(audit.edits)

    def test_changes_nothing(self, engine, edits):
        engine.apply(edits[0])
        standing = Standing.of(engine)
        engine.audit()
        assert Standing.of(engine) == standing
        assert engine.apply(edits[1]).committed


class TestWhatIsAudited:
    def test_is_what_is_active(self, engine, edits):
        one, two = (engine.apply(request).applied for request in edits[:2])
        for answer in ANSWERS:
            newer = replace(edits[0], correction=f" {answer}")
            if newer.correction != edits[0].correction and takes(engine, newer, allow_loss=True):
                break
        newest = engine.apply(newer, allow_loss=True).applied
        assert {each.edit.id for each in engine.audit().edits} == {two.edit_id, newest.edit_id}
        engine.rollback(two.edit_id)
        engine.rollback(newest.edit_id)
        assert [each.edit.id for each in engine.audit().edits] == [one.edit_id]

    def test_may_be_nothing(self, engine):
        audit = engine.audit()
        assert (audit.edits, audit.held, audit.lost) == ((), 0, 0)


class TestALostEdit:
    @pytest.fixture
    def lost(self, engine, first) -> tuple[str, str]:
        """The id of an edit, and of the one that broke it."""
        edit = engine.apply(first).applied
        for country, answer in itertools.product(COUNTRIES, ANSWERS):
            request = EditRequest(f"The capital of {country} is", f" {answer}")
            try:
                if request.prompt != first.prompt:
                    engine.apply(request, dry_run=True)
            except WouldBreakEdits:
                return edit.edit_id, engine.apply(request, allow_loss=True).applied.edit_id
            except EditRefused:
                continue
        raise AssertionError("no edit breaks the first one")

    def test_is_told_with_what_the_model_says_and_which_edit_took_it(self, engine, lost, caplog):
        edit, breaker = lost
        audit = engine.audit()
        broken, other = audit.edits
        assert (broken.edit.id, broken.holds, other.holds) == (edit, False, True)
        assert broken.text == engine.generate(broken.edit.applied.prompt, 4)[0].text
        assert audit.lost_to == {edit: breaker}
        assert "1 of 2 active edits no longer hold" in caplog.text

    def test_holds_again_without_that_edit(self, engine, lost):
        edit, breaker = lost
        engine.rollback(breaker)
        audit = engine.audit()
        assert [(each.edit.id, each.holds) for each in audit.edits] == [(edit, True)]
        assert audit.lost_to == {}


class TestAttribution:
    def attribute(self, *entries) -> dict[str, str]:
        history = History()
        for entry in entries:
            history.record(entry)
        return attribute([history.find("edit-1")], history)

    def lost(self, sequence: int, *lost: str, **fields):
        return applied(sequence, prompt=str(sequence), checks={"lost": list(lost)}, **fields)

    def test_is_to_the_edit_that_said_so_when_it_was_made(self):
        assert self.attribute(self.lost(1), self.lost(2), self.lost(3, "edit-1"), self.lost(4)) == {"edit-1": "edit-3"}

    def test_is_to_none_that_does_not_stand(self):
        assert self.attribute(self.lost(1), self.lost(2, "edit-1"), rolled_back(3, "edit-2")) == {}

    def test_is_to_the_newest_with_which_it_was_lost(self):
        entries = self.lost(1), self.lost(2, "edit-1"), self.lost(3), self.lost(4, "edit-1")
        assert self.attribute(*entries) == {"edit-1": "edit-4"}

    def test_is_to_the_first_where_older_services_name_it_again_and_again(self):
        entries = self.lost(1), self.lost(2, "edit-1"), self.lost(3, "edit-1"), self.lost(4, "edit-1")
        assert self.attribute(*entries) == {"edit-1": "edit-2"}

    def test_is_to_the_edit_in_the_place_of_one_that_was_superseded(self):
        entries = self.lost(1), self.lost(2, "edit-1"), self.lost(3, supersedes=("edit-2",))
        assert self.attribute(*entries) == {"edit-1": "edit-3"}

    def test_is_to_a_batch_as_a_whole(self):
        *_, (first, _), (last, _) = batch(2, [b"", b""])
        last = last.model_copy(update={"checks": {"lost": ["edit-1"]}})
        assert self.attribute(self.lost(1), first, last) == {"edit-1": "batch-2"}

    def test_is_unknown_where_nothing_says_so(self):
        assert self.attribute(applied(1), applied(2, prompt="else")) == {}


class TestNobodyWaits:
    def test_for_a_writer(self, engine, first):
        engine.apply(first)
        with engine._turns.taken(), ThreadPoolExecutor(1) as other:
            assert other.submit(engine.audit).result(timeout=60).held == 1

    def test_and_every_audit_is_of_one_revision(self, engine, edits):
        kept = engine.apply(edits[0]).applied
        done = threading.Event()

        def audit() -> list:
            audits = []
            while not done.is_set():
                audits.append(engine.audit())
            return audits

        with ThreadPoolExecutor(2) as auditing:
            taken = [auditing.submit(audit) for _ in range(2)]
            try:
                for _ in range(8):
                    engine.rollback(engine.apply(edits[1]).applied.edit_id)
            finally:
                done.set()
        audits = [each for one in taken for each in one.result()]
        assert len({each.published.revision for each in audits}) > 2
        for each in audits:
            active = engine.history.active_at(each.published.revision)
            assert [held.edit.id for held in each.edits] == [edit.id for edit in active]
            assert each.published.active_edits == len(active)
            assert all(held.holds for held in each.edits)
            assert each.edits[0].edit.id == kept.edit_id

    def test_when_it_is_stopped(self, engine, first):
        engine.apply(first)
        before = engine.audit()
        stopping = threading.Event()
        stopping.set()
        assert engine.audit(stopping) is None
        assert engine.last_audit is before
