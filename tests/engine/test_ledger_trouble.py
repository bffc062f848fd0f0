"""What an engine does when its ledger is gone, was written by somebody else, or was tampered with."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import pytest
import redis

from editors.factors import Factors, LayerFactors
from service.engine import AlreadyRolledBack, Engine
from service.engine.changes import MAX_RACES
from service.engine.errors import LedgerDiverged
from service.ledger import (
    Applied,
    EmbeddedRedis,
    Entry,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerUnavailable,
    RedisLedger,
    digest_of,
)
from service.ledger.chain import GENESIS, link
from tests.ledger.entries import stored_in
from tests.service_fixtures import (
    Standing,
    base_weights,
    live_weights,
    namespace_of,
    same_bits,
)


def kill(server: EmbeddedRedis) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGKILL)
    while server.alive:
        pass


class TestMemoryGone:
    """An error that nobody foresaw, on either side of the moment in which an edit becomes durable."""

    @pytest.fixture(params=["apply", "rollback"])
    def change(self, request, open_engine, first, second):
        engine = open_engine()
        edit = engine.apply(first).applied
        return engine, (lambda: engine.apply(second)) if request.param == "apply" else (
            lambda: engine.rollback(edit.edit_id)
        )

    def fail_once(self, monkeypatch, engine, name):
        def fail(*_: object) -> None:
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(engine.weights, name, fail)

    def test_before_it_leaves_everything_as_it_was(self, change, monkeypatch):
        engine, make = change
        before = Standing.of(engine)
        self.fail_once(monkeypatch, engine, "as_published")
        with pytest.raises(MemoryError):
            make()
        assert Standing.of(engine) == before
        make()
        assert engine.published.revision == 2

    def test_behind_it_the_next_request_brings_it_live(self, change, monkeypatch, open_engine):
        engine, make = change
        self.fail_once(monkeypatch, engine, "publish")
        with pytest.raises(MemoryError):
            make()
        assert engine.ledger.head() == 2
        assert engine.published.revision == 1
        engine.catch_up()
        again = open_engine(namespace_of(engine))
        assert engine.published == again.published
        assert engine.published.revision == 2
        assert same_bits(live_weights(engine), live_weights(again))


class TestRedisGone:
    def test_changes_nothing_goes_on_generating_and_recovers(self, open_engine, own_server, first, second):
        engine = open_engine(on=own_server)
        edit = engine.apply(first).applied
        weights, published = live_weights(engine), engine.published
        said = engine.generate(first.prompt, 8)
        kill(own_server)
        for attempt in (
            lambda: engine.apply(second),
            lambda: engine.apply(second, dry_run=True),
            lambda: engine.apply(first),
            lambda: engine.rollback(edit.edit_id),
            engine.catch_up,
            engine.follow,
        ):
            with pytest.raises(LedgerUnavailable):
                attempt()
            assert same_bits(live_weights(engine), weights)
            assert engine.published == published
            assert engine.weights.state.digest() == published.digest
        assert engine.generate(first.prompt, 8) == said
        assert own_server.ensure_running()
        assert engine.apply(second).revision == 2
        assert engine.rollback(edit.edit_id).revision == 3

    def test_at_the_moment_of_the_commit_changes_nothing(self, open_engine, own_server, first, second):
        class DiesFirst(RedisLedger):
            def append(self, entry: Entry, factors: bytes = b"", needs: Iterable[Applied] = ()) -> None:
                if own_server.alive and entry.sequence == 2:
                    kill(own_server)
                super().append(entry, factors, needs)

        engine = open_engine(on=own_server, ledger=DiesFirst)
        edit = engine.apply(first).applied
        weights, published = live_weights(engine), engine.published
        for attempt in (lambda: engine.apply(second), lambda: engine.rollback(edit.edit_id)):
            with pytest.raises(LedgerUnavailable):
                attempt()
            assert same_bits(live_weights(engine), weights)
            assert engine.published == published
            assert engine.weights.state.digest() == published.digest
            own_server.ensure_running()
            engine.catch_up()
            assert engine.published == published

    def test_just_after_the_commit_is_found_out_at_the_next_call(self, open_engine, own_server, first):
        class DiesAfter(RedisLedger):
            """The entry is stored, but nobody hears of it."""

            def append(self, entry: Entry, factors: bytes = b"", needs: Iterable[Applied] = ()) -> None:
                super().append(entry, factors, needs)
                kill(own_server)
                self.ping()

        engine = open_engine(on=own_server, ledger=DiesAfter)
        request = dataclasses.replace(first, idempotency_key="key", request_digest="one")
        standing = live_weights(engine), engine.published
        with pytest.raises(LedgerUnavailable):
            engine.apply(request)
        assert same_bits(live_weights(engine), standing[0])
        assert engine.published == standing[1]
        own_server.ensure_running()
        again = engine.apply(request)
        assert again.replayed
        assert again.revision == engine.published.revision == engine.ledger.head() == 1
        assert engine.weights.state.digest() == again.digest == engine.published.digest
        with pytest.raises(LedgerUnavailable):
            engine.rollback(again.applied.edit_id)
        assert engine.published.revision == 1
        own_server.ensure_running()
        with pytest.raises(AlreadyRolledBack):
            engine.rollback(again.applied.edit_id)
        assert same_bits(live_weights(engine), standing[0])

    def test_in_the_middle_of_a_replay_is_survived(self, open_engine, own_server, first, second, third):
        class DiesBeforeTheThird(RedisLedger):
            def read(self, after: int = 0) -> Iterator[Entry]:
                for entry in super().read(after):
                    yield entry
                    if entry.sequence == 3 and own_server.alive and not died:
                        died.append(True)
                        kill(own_server)

        died: list[bool] = []
        writer = open_engine(on=own_server)
        edit = writer.apply(first).applied
        writer.apply(second)
        writer.rollback(edit.edit_id)
        writer.apply(third)
        with pytest.raises(LedgerUnavailable):
            open_engine(namespace_of(writer), on=own_server, ledger=DiesBeforeTheThird)
        own_server.ensure_running()

        died.clear()
        follower = open_engine(on=own_server, ledger=DiesBeforeTheThird)
        follower.ledger._keys, follower.ledger._key = writer.ledger._keys, writer.ledger._key
        for _ in range(2):
            with pytest.raises(LedgerUnavailable):
                follower.catch_up()
            assert follower.published.revision == 0
        own_server.ensure_running()
        follower.catch_up()
        assert follower.published == writer.published
        assert same_bits(live_weights(follower), live_weights(writer))


class Overtaken(RedisLedger):
    """A ledger on which somebody else commits just before its own writer does."""

    overtake: Callable[[], object] | None = None
    appends = 0

    def append(self, entry: Entry, factors: bytes = b"", needs: Iterable[Applied] = ()) -> None:
        self.appends += 1
        if self.overtake is not None:
            self.overtake()
        super().append(entry, factors, needs)


class TestAnotherWriter:
    @pytest.fixture
    def two(self, open_engine) -> tuple[Engine, Engine]:
        one = open_engine()
        return one, open_engine(namespace_of(one), ledger=Overtaken)

    def test_is_followed(self, two, first):
        one, other = two
        made = one.apply(first)
        assert other.published.revision == 0
        other.follow()
        assert other.published == one.published
        assert same_bits(live_weights(other), live_weights(one))
        other.rollback(made.applied.edit_id)
        one.follow()
        assert one.published == other.published
        assert same_bits(live_weights(other), live_weights(one))

    def test_that_drops_what_this_one_still_has_live_is_followed(self, two, first, second, third):
        """The factors of an edit that was rolled back are gone before this one has heard of it."""
        one, other = two
        edit = one.apply(first).applied
        one.apply(second)
        other.follow()
        one.rollback(edit.edit_id)
        one.apply(third)
        assert one.ledger.compact().dropped_factors == 1
        other.follow()
        assert other.published == one.published
        assert same_bits(live_weights(other), live_weights(one))
        assert other.prove().holds

    def test_is_caught_up_with_before_an_edit(self, two, first, second, third):
        one, other = two
        one.apply(first)
        assert other.apply(second).revision == 2
        assert one.apply(third).revision == 3
        other.catch_up()
        assert one.published == other.published

    def test_that_commits_first_makes_the_edit_judged_again(self, two, first, second):
        one, other = two

        def overtake() -> None:
            other.ledger.overtake = None
            one.apply(first)

        other.ledger.overtake = overtake
        outcome = other.apply(second)
        assert (outcome.revision, other.ledger.appends) == (2, 2)
        assert other.published.active_edits == 2
        one.catch_up()
        assert one.published == other.published
        assert same_bits(live_weights(other), live_weights(one))

    def test_that_makes_the_same_edit_first_leaves_it_unchanged(self, two, first):
        one, other = two

        def overtake() -> None:
            other.ledger.overtake = None
            one.apply(first)

        other.ledger.overtake = overtake
        assert other.apply(first).unchanged
        assert other.ledger.head() == 1

    def test_that_used_the_same_key_first_is_repeated(self, two, first):
        one, other = two
        request = dataclasses.replace(first, idempotency_key="key", request_digest="one")

        def overtake() -> None:
            other.ledger.overtake = None
            one.apply(request)

        other.ledger.overtake = overtake
        outcome = other.apply(request)
        assert outcome.replayed
        assert outcome.revision == other.ledger.head() == 1

    def test_that_rolls_the_same_edit_back_first(self, two, first):
        one, other = two
        edit = one.apply(first).applied
        other.catch_up()

        def overtake() -> None:
            other.ledger.overtake = None
            one.rollback(edit.edit_id)

        other.ledger.overtake = overtake
        with pytest.raises(AlreadyRolledBack):
            other.rollback(edit.edit_id)
        assert other.published == one.published
        assert other.weights.state.digest() == one.published.digest

    @pytest.mark.parametrize("what", ["apply", "rollback"])
    def test_that_is_always_first_is_a_conflict_and_changes_nothing(self, two, what, first, second, third):
        one, other = two
        edit = one.apply(first).applied
        other.catch_up()
        pending: list[str] = []

        def overtake() -> None:
            if pending:
                one.rollback(pending.pop())
            else:
                pending.append(one.apply(second).applied.edit_id)

        other.ledger.overtake = overtake
        with pytest.raises(LedgerConflict):
            other.apply(third) if what == "apply" else other.rollback(edit.edit_id)
        assert other.ledger.appends == MAX_RACES
        other.ledger.overtake = None
        other.catch_up()
        assert other.published == one.published
        assert other.weights.state.digest() == one.published.digest
        assert same_bits(live_weights(other), live_weights(one))


class Tampering:
    """Changes what Redis holds behind the ledger's back."""

    def __init__(self, server: EmbeddedRedis, engine: Engine) -> None:
        self._client = redis.Redis.from_url(server.url, protocol=2)
        self._key = engine.ledger._key

    def rewrite(self, old: str, new: str) -> None:
        """Replace text in all entries, and make the chain of hashes good again."""
        stored, chain = self._client.xrange(self._key), GENESIS
        self._client.delete(self._key)
        for entry_id, fields in stored:
            raw = fields[b"entry"].replace(old.encode(), new.encode())
            chain = link(chain, raw)
            self._client.xadd(self._key, {"entry": raw, "chain": chain}, id=entry_id)

    def rewrite_factors(self, sequence: int) -> None:
        name = self._key.replace("entries", "factors")
        self._client.hset(name, sequence, self._client.hget(name, sequence)[:-1] + b"\x7f")

    def drop_factors(self, sequence: int) -> None:
        self._client.hdel(self._key.replace("entries", "factors"), sequence)

    def trim(self, keep: int) -> None:
        self._client.xtrim(self._key, maxlen=keep, approximate=False)

    def delete(self) -> None:
        self._client.delete(self._key)

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def tampering(server, engine) -> Iterator[Tampering]:
    tampering = Tampering(server, engine)
    yield tampering
    tampering.close()


class TestATamperedLedger:
    def test_whose_state_digest_was_altered_is_not_served(self, engine, open_engine, tampering, first, second):
        engine.apply(first)
        made = engine.apply(second)
        tampering.rewrite(made.digest, digest_of(b"else"))
        with pytest.raises(LedgerDiverged) as caught:
            open_engine(namespace_of(engine))
        assert caught.value.facts == {"expected": digest_of(b"else"), "actual": made.digest, "revision": 0}

    def test_stays_diverged_however_often_it_is_asked(self, engine, open_engine, tampering, base, first, second, third):
        follower = open_engine(namespace_of(engine))
        edit = engine.apply(first).applied
        engine.rollback(edit.edit_id)
        made = engine.apply(second)
        tampering.rewrite(made.digest, digest_of(b"else"))
        for attempt in (follower.catch_up, follower.follow, lambda: follower.apply(third), follower.catch_up):
            with pytest.raises(LedgerDiverged):
                attempt()
            assert follower.published.revision == 0
            assert same_bits(live_weights(follower), base_weights(base))

    def test_whose_factors_were_altered_is_not_served(self, engine, open_engine, tampering, first):
        engine.apply(first)
        tampering.rewrite_factors(1)
        with pytest.raises(LedgerCorrupt) as caught:
            open_engine(namespace_of(engine))
        assert caught.value.facts["sequence"] == 1

    def test_that_was_trimmed_is_not_served_anew_and_edits_without_factors_cannot_be_rolled_back(
        self, engine, open_engine, tampering, first, second
    ):
        lost = engine.apply(first).applied
        kept = engine.apply(second).applied
        tampering.trim(1)
        tampering.drop_factors(1)
        standing = Standing.of(engine)
        with pytest.raises(FactorsMissing):
            engine.rollback(lost.edit_id)
        assert Standing.of(engine) == standing
        with pytest.raises(LedgerCorrupt):
            open_engine(namespace_of(engine))
        assert engine.rollback(kept.edit_id).revision == 3

    def test_in_whose_place_there_is_another_of_the_same_length(self, engine, tampering, first, second):
        engine.apply(first)
        tampering.rewrite(first.prompt, second.prompt)
        standing = engine.published, live_weights(engine)
        for attempt in (lambda: engine.apply(second), engine.catch_up, engine.follow):
            with pytest.raises(LedgerCorrupt, match="another one"):
                attempt()
        assert engine.published == standing[0]
        assert same_bits(live_weights(engine), standing[1])

    def test_that_was_emptied_is_noticed_by_the_engine_that_knows_more(self, engine, tampering, first, second):
        edit = engine.apply(first).applied
        weights, published = live_weights(engine), engine.published
        tampering.delete()
        for attempt in (lambda: engine.apply(second), lambda: engine.rollback(edit.edit_id), engine.catch_up):
            with pytest.raises(LedgerDiverged) as caught:
                attempt()
            assert caught.value.facts == {"head": 0, "revision": 1}
            assert same_bits(live_weights(engine), weights)
            assert engine.published == published

    @pytest.mark.parametrize("edit_id", ["edit_unknown", None], ids=["unknown", "rolled back already"])
    def test_that_rolls_back_what_is_not_active_has_diverged(self, engine, open_engine, edit_id, second, first):
        edit = engine.apply(first).applied
        last = engine.rollback(edit.edit_id).entry
        engine.ledger.append(last.model_copy(update={"sequence": 3, "edit_id": edit_id or edit.edit_id}))
        for attempt in (lambda: open_engine(namespace_of(engine)), lambda: engine.apply(second), engine.catch_up):
            with pytest.raises(LedgerDiverged) as caught:
                attempt()
            assert caught.value.facts["sequence"] == 3
        assert engine.published.revision == 2

    def test_whose_factors_are_not_of_this_model_has_diverged(self, engine, open_engine, first):
        made = engine.apply(first).applied
        ((_, raw),) = stored_in(engine.ledger)
        real = Factors.from_bytes(raw)
        name, layer = next(iter(real.layers.items()))
        strange = [
            b"not factors at all",
            Factors({"elsewhere.weight": layer}).to_bytes(),
            Factors({**real.layers, name: LayerFactors(layer.u[:, :-1], layer.delta, layer.exponent)}).to_bytes(),
            Factors({**real.layers, name: LayerFactors(layer.u, layer.delta, 100)}).to_bytes(),
        ]
        for factors in strange:
            follower = open_engine()
            entry = made.model_copy(update={"factors_digest": digest_of(factors)})
            follower.ledger.append(entry, factors)
            for _ in range(2):
                with pytest.raises(LedgerDiverged) as caught:
                    follower.catch_up()
                assert caught.value.facts["sequence"] == 1
            assert follower.published.revision == 0
            assert follower.weights.state.digest() == follower.published.digest

    def test_by_an_entry_of_the_same_edit_is_not_applied_twice_over(self, engine, open_engine, first):
        """Appending the very same entry again is a repetition, which the ledger takes for what it is."""
        entry = engine.apply(first).applied
        ((_, raw),) = stored_in(engine.ledger)
        engine.ledger.append(entry, raw)
        assert engine.ledger.head() == 1
        assert open_engine(namespace_of(engine)).published == engine.published
