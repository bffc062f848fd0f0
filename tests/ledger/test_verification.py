"""Every entry of a Redis that is not what was written is named, and what is behind it is checked all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from service.ledger import EmbeddedRedis, LedgerUnavailable, RedisLedger, Verification, verify_ledger
from service.ledger.chain import GENESIS, link
from service.ledger.records import encode
from service.ledger.redis_ledger import PAGE
from service.ledger.verification import EMPTY
from tests.ledger.entries import FACTORS, applied, batch, rolled_back

KEY = "mend:{verified}:"
Row = list[Any]
"""The id and the fields of an entry in the stream."""


@pytest.fixture
def raw(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as raw:
        raw.delete(*(f"{KEY}{part}" for part in ("entries", "factors", "snapshot")))
        yield raw


@pytest.fixture
def verified(raw: redis.Redis, server: EmbeddedRedis, connect: Callable[..., RedisLedger]) -> RedisLedger:
    """Eight entries, of which 3 to 5 are a batch, 2 and 6 have no factors, and 7 takes 1 back."""
    ledger = connect(server, "verified")
    ledger.append(applied(1), FACTORS)
    ledger.append(applied(2, b""))
    ledger.append_all(batch(3, [FACTORS + b"3", FACTORS + b"4", FACTORS + b"5"]))
    ledger.append(applied(6, b""))
    ledger.append(rolled_back(7, "edit-1"))
    ledger.append(applied(8, FACTORS + b"8"), FACTORS + b"8")
    return ledger


def verify_anew(server: EmbeddedRedis) -> Verification:
    """As somebody does who has read nothing of it before."""
    ledger = RedisLedger.connect(server.url, "verified")
    try:
        return verify_ledger(ledger)
    finally:
        ledger.close()


def found(server: EmbeddedRedis) -> dict[int, list[str]]:
    """What is wrong, by entry."""
    problems: dict[int, list[str]] = {}
    for problem in verify_anew(server).problems:
        problems.setdefault(problem.sequence, []).append(problem.what)
    return problems


def rewrite(raw: redis.Redis, change: Callable[[dict[int, Row]], None]) -> None:
    """Write the stream anew, as somebody could who may write to Redis."""
    rows = {int(id_.partition(b"-")[0]): [id_.decode(), fields] for id_, fields in raw.xrange(f"{KEY}entries")}
    change(rows)
    raw.delete(f"{KEY}entries")
    for id_, fields in rows.values():
        raw.xadd(f"{KEY}entries", fields, id=id_)


def alter(rows: dict[int, Row], sequence: int, old: bytes = b" Rome", new: bytes = b" Oslo") -> None:
    fields = rows[sequence][1]
    assert old in fields[b"entry"]
    fields[b"entry"] = fields[b"entry"].replace(old, new)


class TestASoundLedger:
    def test_has_nothing_wrong_and_all_is_counted(self, verified, server):
        checking = verify_anew(server)
        assert checking.problems == []
        assert (checking.entries, checking.factors) == (8, 5)
        assert (checking.last, checking.chain) == verified.last()

    def test_that_is_empty_is_sound(self, raw, server):
        checking = verify_anew(server)
        assert (checking.problems, checking.entries, checking.last, checking.chain) == ([], 0, 0, GENESIS)

    def test_is_sound_when_it_is_compacted_and_goes_on(self, verified, server):
        verified.compact()
        verified.append(rolled_back(9, "edit-2"))
        checking = verify_anew(server)
        assert checking.problems == []
        assert (checking.entries, checking.factors, checking.last) == (9, 4, 9)

    def test_of_several_pages_is_read_to_its_end(self, ledger):
        count = 2 * PAGE + 3
        ledger.append_all([(applied(sequence, b""), None) for sequence in range(1, count + 1)])
        assert verify_ledger(ledger).entries == count

    def test_that_goes_on_and_is_compacted_meanwhile_has_lost_nothing(self, verified, server, connect):
        class Busy(RedisLedger):
            """The first time that factors are asked for, the edit is rolled back and they are dropped."""

            def raw_factors(self, sequences):
                if verified.head() == 8:
                    verified.append(rolled_back(9, "edit-8"))
                    assert verified.compact().dropped_factors >= 1
                return super().raw_factors(sequences)

        busy = Busy.connect(server.url, "verified")
        checking = verify_ledger(busy)
        busy.close()
        assert checking.problems == []
        assert (checking.last, checking.entries) == (9, 9)

    def test_cannot_be_verified_where_nobody_answers(self):
        ledger = RedisLedger.connect("redis://127.0.0.1:1/0", "verified")
        with pytest.raises(LedgerUnavailable):
            verify_ledger(ledger)


class TestAnEntry:
    def test_that_was_altered_is_named_and_no_other(self, verified, raw, server):
        rewrite(raw, lambda rows: alter(rows, 2))
        assert {sequence: len(problems) for sequence, problems in found(server).items()} == {2: 1}
        assert "breaks the hash chain" in found(server)[2][0]
        assert verify_anew(server).entries == 7

    def test_that_was_altered_is_named_each_of_several(self, verified, raw, server):
        def change(rows):
            for sequence in (1, 2, 4, 8):
                alter(rows, sequence)

        rewrite(raw, change)
        assert list(found(server)) == [1, 2, 4, 8]

    def test_whose_link_was_altered_is_named_and_no_other(self, verified, raw, server):
        rewrite(raw, lambda rows: rows[6][1].update({b"chain": GENESIS}))
        assert list(found(server)) == [6]

    def test_that_is_last_with_its_link_altered_is_named(self, verified, raw, server):
        rewrite(raw, lambda rows: rows[8][1].update({b"chain": b"\xff"}))
        assert list(found(server)) == [8]

    def test_that_was_altered_with_its_link_is_named_by_the_next_one(self, verified, raw, server):
        def change(rows):
            alter(rows, 6)
            before = rows[5][1][b"chain"].decode()
            rows[6][1][b"chain"] = link(before, rows[6][1][b"entry"])

        rewrite(raw, change)
        assert list(found(server)) == [7]

    def test_that_cannot_be_read_is_named(self, verified, raw, server):
        rewrite(raw, lambda rows: rows[6][1].update({b"entry": b"{"}))
        assert list(found(server)) == [6]
        assert any(what.startswith("cannot be read:") for what in found(server)[6])

    def test_that_is_another_one_is_named(self, verified, raw, server):
        rewrite(raw, lambda rows: rows[6][1].update({b"entry": encode(applied(7, b""))}))
        assert list(found(server)) == [6]
        assert "says that it is entry 7" in found(server)[6]

    @pytest.mark.parametrize("field", [b"entry", b"chain"])
    def test_without_a_field_is_named(self, verified, raw, server, field):
        def change(rows):
            del rows[6][1][field]

        rewrite(raw, change)
        assert list(found(server)) == [6]

    def test_of_somebody_else_is_named(self, verified, raw, server):
        raw.xadd(f"{KEY}entries", {"hello": "world"}, id="8-1")
        assert "was not written by this service: its id is 8-1" in found(server)[8]
        assert list(found(server)) == [8]

    @pytest.mark.parametrize(
        ("removed", "named"),
        [([1], [1, 2]), ([2], [2, 3]), ([6, 7], [6, 8]), ([8], [8]), ([7, 8], [7]), ([1, 2, 3, 4, 5, 6, 7, 8], [1])],
    )
    def test_that_is_missing_is_named_with_what_cannot_be_checked_without_it(
        self, verified, raw, server, removed, named
    ):
        raw.xdel(f"{KEY}entries", *(f"{sequence}-0" for sequence in removed))
        problems = found(server)
        assert list(problems) == named
        assert "missing" in problems[removed[0]][0]
        lost = f"those up to {removed[-1]} are missing"
        assert (lost in problems[removed[0]][0]) == (len(removed) > 1)

    def test_is_not_left_out_by_whoever_chains_the_rest_anew(self, verified, raw, server):
        def change(rows):
            del rows[6]
            before = rows[5][1][b"chain"].decode()
            for sequence in (7, 8):
                before = link(before, rows[sequence][1][b"entry"])
                rows[sequence][1][b"chain"] = before.encode()

        rewrite(raw, change)
        assert found(server) == {6: ["is missing"]}


class TestABatch:
    def test_whose_middle_is_missing_is_named_once(self, verified, raw, server):
        raw.xdel(f"{KEY}entries", "4-0")
        assert list(found(server)) == [4, 5]

    def rechained(self, raw: redis.Redis, entries: list[tuple[Any, bytes]]) -> None:
        """A ledger of these entries whose chain holds, as a service would write it that is wrong."""
        raw.delete(f"{KEY}entries", f"{KEY}factors")
        before = GENESIS
        for entry, factors in entries:
            raw_entry = encode(entry)
            before = link(before, raw_entry)
            raw.xadd(f"{KEY}entries", {"entry": raw_entry, "chain": before}, id=f"{entry.sequence}-0")
            raw.hset(f"{KEY}factors", str(entry.sequence), factors)

    def test_that_is_not_whole_is_named(self, raw, server):
        whole = batch(1, [FACTORS] * 3)
        moved = {entry.batch.position: entry.batch for entry, _ in whole}
        other = moved[2].model_copy(update={"id": "other"})
        cases = {
            "ends early": ([*whole[:2]], 2, "whose end is missing"),
            "is cut by another entry": ([*whole[:2], (applied(3), FACTORS)], 3, "number 3 of 3 of the batch batch-1"),
            "is cut by another batch": (
                [whole[0], (applied(2, batch=other, state_digest=None), FACTORS)], 2, "where number 2 of 3",
            ),
            "has no beginning": (
                [(applied(1, batch=moved[2], state_digest=None), FACTORS)], 1, "does not begin before it"
            ),
            "has a place twice": (
                [whole[0], (applied(2, batch=moved[1], state_digest=None), FACTORS)], 2, "where number 2 of 3",
            ),
        }  # fmt: skip
        for name, (entries, sequence, says) in cases.items():
            self.rechained(raw, entries)
            assert any(says in what for what in found(server)[sequence]), name


class TestFactors:
    def test_that_were_altered_are_named(self, verified, raw, server):
        raw.hset(f"{KEY}factors", "4", b"other")
        assert list(found(server)) == [4]
        assert "has factors with digest" in found(server)[4][0]
        assert verify_anew(server).factors == 4

    def test_of_an_edit_that_stands_must_be_there(self, verified, raw, server):
        raw.hdel(f"{KEY}factors", "1", "4", "8")
        assert found(server) == {4: ["has lost its factors"], 8: ["has lost its factors"]}

    def test_of_an_edit_that_was_taken_back_may_be_gone_but_not_altered(self, verified, raw, server):
        raw.hset(f"{KEY}factors", "1", b"other")
        assert list(found(server)) == [1]

    def test_beside_a_roll_back_are_named(self, verified, raw, server):
        raw.hset(f"{KEY}factors", "7", b"some")
        assert found(server) == {7: ["applies no edit, but has factors"]}

    def test_that_are_empty_need_not_be_there(self):
        assert applied(1, b"").factors_digest == EMPTY


class TestASnapshot:
    def test_that_was_altered_is_named_and_what_is_behind_it_checked(self, verified, raw, server):
        verified.compact()
        verified.append(applied(9), FACTORS)
        verified.append(applied(10), FACTORS)
        raw.setrange(f"{KEY}snapshot", 200, b"altered")
        rewrite(raw, lambda rows: alter(rows, 10))
        problems = found(server)
        assert list(problems) == [1, 2, 8, 10]
        assert "in a snapshot that cannot be read" in problems[1][0]
        assert "those up to 7 are missing" in problems[2][0]
        assert "cannot be checked" in problems[8][0]

    def test_that_is_gone_is_told_as_what_was_in_it(self, verified, raw, server):
        verified.compact()
        raw.delete(f"{KEY}snapshot")
        problems = found(server)
        assert list(problems) == [1, 8]
        assert "those up to 7 are missing" in problems[1][0]

    def test_without_its_stream_is_told(self, verified, raw, server):
        verified.compact()
        raw.xdel(f"{KEY}entries", "8-0")
        assert found(server) == {8: ["is missing in the stream, which ends in it"]}
        raw.delete(f"{KEY}entries")
        assert found(server) == {9: ["is missing"]}  # or more: the snapshot does not say how many there were

    def test_whose_last_entry_is_another_one_than_in_the_stream_is_named(self, verified, raw, server):
        verified.compact()
        rewrite(raw, lambda rows: rows[8][1].update({b"chain": GENESIS}))
        assert list(found(server)) == [8]
