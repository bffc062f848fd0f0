"""Edits of one editor are made again by another, from what was asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from editors.checkpoint import load_checkpoint
from service.engine import EditRefused
from service.engine.migration import Migration, migrate
from tests.service_fixtures import Standing, never_takes, save_completed_editor, small_engine


@pytest.fixture
def newer(base, open_engine, tmp_path):
    """An engine with another editor for the same base model."""
    checkpoint = load_checkpoint(save_completed_editor(tmp_path / "other", base), base)
    return small_engine(base, checkpoint, open_engine().ledger)


def move(old, new, **terms) -> Migration:
    terms = {"dry_run": False, "allow_loss": True, **terms}
    return migrate(new, old.ledger.read(), "old", tell=lambda step, done, of: None, **terms)


@pytest.fixture
def old(engine, first, second, third):
    """Two active edits, one that was superseded and one that was rolled back."""
    engine.apply(replace(first, correction=" Vienna"), allow_loss=True)
    engine.apply(replace(first, actor="ops", reason="why", metadata={"ticket": 7}), allow_loss=True)
    engine.apply(second, allow_loss=True)
    engine.rollback(engine.apply(third, allow_loss=True).applied.edit_id)
    return engine


def test_the_active_edits_are_made_again_with_who_asked_for_them_why(old, newer, first, second):
    done = move(old, newer)
    assert [edit["status"] for edit in done.edits] == ["applied", "applied"]
    assert [edit["prompt"] for edit in done.edits] == [first.prompt, second.prompt]
    made = newer.history.find(done.edits[0]["new_id"]).applied
    source = old.history.find(done.edits[0]["id"])
    assert source.active
    assert (made.actor, made.reason, made.correction) == ("ops", "why", first.correction)
    assert made.metadata == {"ticket": 7, "migrated_from": {"ledger": "old", "id": source.id}}
    assert (done.edits[0]["said"], done.edits[0]["says"]) == (source.applied.after, made.after)
    assert newer.published.active_edits == 2
    assert newer.prove().holds


def test_again_makes_nothing_twice(old, newer):
    move(old, newer)
    standing = Standing.of(newer)
    again = move(old, newer)
    assert [edit["status"] for edit in again.edits] == ["unchanged", "unchanged"]
    assert Standing.of(newer) == standing


def test_a_dry_run_only_reports(old, newer):
    standing = Standing.of(newer)
    foretold = move(old, newer, dry_run=True)
    assert [edit["status"] for edit in foretold.edits] == ["dry_run", "dry_run"]
    assert Standing.of(newer) == standing


def test_what_cannot_be_made_is_reported_with_its_reason(old, newer, first, second):
    entries = list(old.ledger.read())
    hopeless = [
        entry.model_copy(update={"correction": never_takes().correction}) if entry.prompt == second.prompt else entry
        for entry in entries
        if entry.kind == "applied"
    ][:3]
    done = migrate(newer, hopeless, "old", dry_run=False, allow_loss=True, tell=lambda step, done, of: None)
    assert [edit["status"] for edit in done.edits] == ["applied", "refused"]
    assert (done.edits[1]["code"], done.refused) == ("did_not_take", 1)
    assert newer.published.active_edits == 1


def test_of_edits_that_can_none_be_made_nothing_is(old, newer):
    hopeless = [
        entry.model_copy(update={"correction": never_takes().correction, "supersedes": ()})
        for entry in old.ledger.read()
        if entry.kind == "applied"
    ][1:2]
    standing = Standing.of(newer)
    done = migrate(newer, hopeless, "old", dry_run=False, allow_loss=True, tell=lambda step, done, of: None)
    assert isinstance(done.refusal, EditRefused)
    assert (done.outcome, done.refused) == (None, 1)
    assert Standing.of(newer) == standing


def test_of_a_ledger_without_active_edits_there_is_nothing_to_do(engine, newer, first):
    engine.rollback(engine.apply(first).applied.edit_id)
    assert move(engine, newer) == Migration([])
