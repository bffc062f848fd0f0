"""Promise 1 on the whole engine: what is live is a function of the active edits, whatever led to them."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from contextlib import closing

import pytest

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from editors.factors import Factors
from editors.state import SumState
from service.engine import AlreadyRolledBack, EditNotFound, EditRequest, Engine, Note, RevisionMismatch
from service.ledger import Applied, EmbeddedRedis, RedisLedger, RolledBack
from tests.ledger.entries import stored_in
from tests.service_fixtures import (
    Standing,
    base_weights,
    live_weights,
    namespace_of,
    same_bits,
    small_engine,
)
from tests.small import SMALL_MODELS

both_layouts = pytest.mark.parametrize("base", SMALL_MODELS, indirect=True)


def apply_all(engine: Engine, edits: Sequence[EditRequest]) -> list[str]:
    """The ids of edits, each made on top of those before it."""
    return [engine.apply(request).applied.edit_id for request in edits]


def active(engine: Engine) -> list[tuple[Applied, bytes]]:
    """The entries that are active by the ledger alone, with their factors."""
    standing: dict[str, tuple[Applied, bytes]] = {}
    for entry, raw in stored_in(engine.ledger):
        if isinstance(entry, Applied):
            standing[entry.edit_id] = (entry, raw)
        else:
            del standing[entry.edit_id]
    superseded = {older for entry, _ in standing.values() for older in entry.supersedes}
    return [stored for edit_id, stored in standing.items() if edit_id not in superseded]


def engine_given_only(
    survivors: list[tuple[Applied, bytes]], base: BaseModel, checkpoint: Checkpoint, ledger: RedisLedger
) -> Engine:
    """An engine whose ledger never held anything but these edits."""
    state = SumState(checkpoint.editor.targets)
    for sequence, (entry, raw) in enumerate(survivors, 1):
        state.add(Factors.from_bytes(raw))
        alone = {"sequence": sequence, "state_digest": state.digest(), "supersedes": ()}
        ledger.append(entry.model_copy(update=alone), raw)
    return small_engine(base, checkpoint, ledger)


class TestRollback:
    def test_is_an_entry_and_a_revision(self, engine, edits):
        (first, *_) = apply_all(engine, edits)
        done = engine.rollback(first, Note(reason="wrong", actor="ops"))
        *_, (entry, raw) = stored_in(engine.ledger)
        assert isinstance(entry, RolledBack)
        assert raw == b""
        assert done.entry == entry == engine.history.find(first).rolled_back
        assert not engine.history.find(first).active
        assert (entry.edit_id, entry.sequence, entry.reason, entry.actor) == (first, 4, "wrong", "ops")
        assert (engine.published.revision, engine.published.active_edits) == (4, 2)
        assert engine.published.digest == entry.state_digest == engine.weights.state.digest()

    @both_layouts
    def test_in_any_order_restores_the_same_bits(self, open_engine, base, checkpoint, server, edits):
        engine = open_engine()
        ids = apply_all(engine, edits)
        stored = {entry.edit_id: (entry, raw) for entry, raw in stored_in(engine.ledger)}
        for count in range(1, len(ids) + 1):
            for order in itertools.permutations(ids, count):
                with closing(RedisLedger.connect(server.url, uuid.uuid4().hex)) as copy:
                    again = engine_given_only(list(stored.values()), base, checkpoint, copy)
                    for edit_id in order:
                        again.rollback(edit_id)
                    with closing(RedisLedger.connect(server.url, uuid.uuid4().hex)) as other:
                        left = [stored[edit_id] for edit_id in ids if edit_id not in order]
                        only = engine_given_only(left, base, checkpoint, other)
                        assert same_bits(live_weights(again), live_weights(only)), order
                        assert again.published.digest == only.published.digest

    @both_layouts
    def test_of_everything_is_the_base_bit_for_bit(self, engine, base, edits):
        empty = engine.published.digest
        ids = apply_all(engine, edits)
        assert not same_bits(live_weights(engine), base_weights(base))
        for edit_id in (ids[1], ids[0], ids[2]):
            engine.rollback(edit_id)
        assert same_bits(live_weights(engine), base_weights(base))
        assert engine.published.digest == empty == SumState(engine.checkpoint.editor.targets).digest()
        assert engine.published.active_edits == 0

    def test_brings_the_earlier_answer_back(self, engine, edits):
        prompt = edits[0].prompt
        before = engine.generate(prompt, 8)[0].text
        edit = engine.apply(edits[0]).applied
        assert engine.generate(prompt, 8)[0].text != before
        engine.rollback(edit.edit_id)
        assert engine.generate(prompt, 8)[0].text == before

    def test_twice_is_refused_and_changes_nothing(self, engine, edits):
        first, *_ = apply_all(engine, edits)
        engine.rollback(first)
        standing = Standing.of(engine)
        with pytest.raises(AlreadyRolledBack) as caught:
            engine.rollback(first)
        assert caught.value.facts == {"id": first, "revision": 4}
        assert Standing.of(engine) == standing

    @pytest.mark.parametrize("edit_id", ["", "edit_0", "\x00", "☃", "x" * 10_000])
    def test_of_an_unknown_edit_is_refused_and_changes_nothing(self, engine, edit_id):
        standing = Standing.of(engine)
        with pytest.raises(EditNotFound):
            engine.rollback(edit_id)
        assert Standing.of(engine) == standing

    def test_at_another_revision_is_refused_and_changes_nothing(self, engine, edits):
        first, *_ = apply_all(engine, edits)
        standing = Standing.of(engine)
        with pytest.raises(RevisionMismatch):
            engine.rollback(first, expected_revision=2)
        assert Standing.of(engine) == standing
        assert engine.rollback(first, expected_revision=3).revision == 4


class TestRestart:
    @both_layouts
    def test_replays_to_the_same_revision_digest_weights_and_history(self, engine, open_engine, edits):
        ids = apply_all(engine, edits)
        engine.rollback(ids[1])
        restarted = open_engine(namespace_of(engine))
        assert restarted.published == engine.published
        assert same_bits(live_weights(restarted), live_weights(engine))
        assert list(restarted.history.newest_first()) == list(engine.history.newest_first())
        assert [edit.id for edit in restarted.history.all_active()] == [ids[0], ids[2]]

    def test_on_the_same_folder_with_a_new_server_too(self, base, checkpoint, tmp_path, edits):
        with EmbeddedRedis(tmp_path) as redis, closing(RedisLedger.connect(redis.url, "x")) as ledger:
            engine = small_engine(base, checkpoint, ledger)
            engine.rollback(apply_all(engine, edits)[0])
        with EmbeddedRedis(tmp_path) as redis, closing(RedisLedger.connect(redis.url, "x")) as ledger:
            restarted = small_engine(base, checkpoint, ledger)
        assert restarted.published == engine.published
        assert same_bits(live_weights(restarted), live_weights(engine))

    def test_can_roll_back_what_was_applied_before_it(self, engine, open_engine, base, edits):
        ids = apply_all(engine, edits)
        restarted = open_engine(namespace_of(engine))
        for edit_id in ids:
            restarted.rollback(edit_id)
        assert same_bits(live_weights(restarted), base_weights(base))

    def test_of_more_entries_than_one_page_holds(self, engine, open_engine, edits):
        for _ in range(10):
            engine.rollback(engine.apply(edits[0]).applied.edit_id)
        made = engine.apply(edits[1])
        restarted = open_engine(namespace_of(engine))
        assert restarted.published.digest == made.digest
        assert restarted.published.revision == 21
