"""An edit that would break earlier ones does not go live unless its caller accepts that."""

from __future__ import annotations

import pytest

from editors.text import begins_with
from service.engine import EditRefused, EditRequest, WouldBreakEdits
from tests.service_fixtures import ANSWERS, COUNTRIES, Standing


def holds(engine, request: EditRequest) -> bool:
    return begins_with(engine.generate(request.prompt, 4)[0].text, request.correction)


def alike(but: EditRequest) -> list[EditRequest]:
    """Edits of prompts that a small model hardly tells apart."""
    requests = [
        EditRequest(f"The capital of {country} is", f" {answer}") for country in COUNTRIES for answer in ANSWERS
    ]
    return [request for request in requests if request.prompt != but.prompt]


@pytest.fixture
def breaker(engine, first) -> EditRequest:
    """An edit that takes on the first, and breaks it. The first is made here."""
    engine.apply(first)
    for request in alike(first):
        try:
            engine.apply(request, dry_run=True)
        except WouldBreakEdits:
            return request
        except EditRefused:
            continue
    raise AssertionError("no edit breaks the first one; the prompts are told apart too well")


class TestAnEditThatWouldBreakAnother:
    def test_is_refused_naming_it_and_changes_nothing(self, engine, first, breaker):
        (edit,) = engine.history.all_active()
        standing = Standing.of(engine)
        with pytest.raises(WouldBreakEdits) as caught:
            engine.apply(breaker)
        facts = caught.value.facts
        assert facts["lost"] == [{"id": edit.id, "prompt": first.prompt, "correction": first.correction}]
        assert facts["checks"]["lost"] == [edit.id]
        assert facts["checks"]["took"]
        assert Standing.of(engine) == standing
        assert holds(engine, first)

    def test_is_made_where_the_loss_is_accepted_and_says_so(self, engine, first, breaker):
        (edit,) = engine.history.all_active()
        foretold = engine.apply(breaker, allow_loss=True, dry_run=True).applied
        made = engine.apply(breaker, allow_loss=True).applied
        assert made.checks["lost"] == foretold.checks["lost"] == [edit.id]
        assert not holds(engine, first)
        assert holds(engine, breaker)

    def test_gives_back_what_it_broke_when_it_is_rolled_back(self, engine, first, breaker):
        standing = Standing.of(engine)
        engine.rollback(engine.apply(breaker, allow_loss=True).applied.edit_id)
        assert engine.published.digest == standing.published.digest
        assert holds(engine, first)

    def test_is_all_that_is_blamed(self, engine, first, breaker):
        lost = engine.history.all_active()[0].id
        engine.apply(breaker, allow_loss=True)
        assert not holds(engine, first)
        for request in alike(first):
            try:
                later = engine.apply(request, allow_loss=True, dry_run=True).applied
            except EditRefused:
                continue
            assert later is None or lost not in later.checks["lost"]


def test_a_smaller_scale_is_tried_before_an_edit_is_refused_for_it(engine, first):
    engine.apply(first)
    spared = 0
    for request in alike(first):
        try:
            free = engine.apply(request, dry_run=True, allow_loss=True).applied
            careful = engine.apply(request, dry_run=True).applied
        except EditRefused:
            continue
        if free is not None and free.checks["lost"]:
            assert careful.scale < free.scale
            assert careful.checks["lost"] == []
            spared += 1
    assert spared


def test_lost_is_what_decoding_says_and_not_teacher_forcing(engine, first):
    made = engine.apply(first).applied
    seen = set()
    for request in alike(first)[::3]:
        try:
            later = engine.apply(request, allow_loss=True).applied
        except EditRefused:
            continue
        if later is None:
            continue
        assert (made.edit_id in later.checks["lost"]) == (not holds(engine, first))
        seen.add(holds(engine, first))
        engine.rollback(later.edit_id)
    assert seen == {True, False}
