"""What is live is exchanged, whole: who reads it goes on reading what it was."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from service.engine.weights import weights_digest
from tests.service_fixtures import Standing, live_weights, same_bits


def change(engine, first) -> None:
    """One more revision, which is the base's or the first edit's in turn."""
    active = engine.history.all_active()
    if active:
        engine.rollback(active[0].id)
    else:
        engine.apply(first)


class TestReading:
    def test_goes_on_with_the_weights_of_its_revision(self, engine, first):
        with ExitStack() as readers:
            seen = []
            for _ in range(5):
                view, published = readers.enter_context(engine.weights.reading())
                seen.append((view, published, weights_digest(engine.weights.edited(view))))
                change(engine, first)
            assert [published.revision for _, published, _ in seen] == [0, 1, 2, 3, 4]
            for view, _, digest in seen:
                assert weights_digest(engine.weights.edited(view)) == digest
            assert len({digest for _, _, digest in seen}) == 2
            assert len({view for view, _, _ in seen}) == 5

    def test_leaves_nothing_behind_when_all_have_left(self, engine, first):
        with ExitStack() as readers:
            for _ in range(6):
                readers.enter_context(engine.weights.reading())
                change(engine, first)
        for _ in range(2):
            change(engine, first)
        assert len(engine.weights._retired) <= 1
        assert not engine.weights._readers


def test_where_no_view_can_be_had_the_next_edit_fails_and_what_is_live_stays(engine, first, second, monkeypatch):
    def fail():
        raise MemoryError

    with engine.weights.reading():
        monkeypatch.setattr(engine.weights, "another_view", fail)
        engine.apply(first)
        standing = Standing.of(engine)
        for attempt in (
            lambda: engine.apply(second, dry_run=True),
            lambda: engine.apply(second),
            engine.prove,
        ):
            with pytest.raises(MemoryError):
                attempt()
            assert Standing.of(engine) == standing
        monkeypatch.undo()
    before = live_weights(engine)
    engine.apply(second, dry_run=True, allow_loss=True)
    assert same_bits(live_weights(engine), before)
    assert engine.prove().holds
