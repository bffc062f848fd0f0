"""Append-only, each sequence won once, and nothing is read that was not written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from service.ledger import (
    EmbeddedRedis,
    EntryInvalid,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerUnavailable,
    RedisLedger,
    digest_of,
)
from service.ledger.chain import GENESIS
from service.ledger.records import encode
from service.ledger.redis_ledger import PAGE
from tests.ledger.entries import FACTORS, applied, batch, factors_at, rolled_back, stored_in

Connect = Callable[..., RedisLedger]


class TestAppendAndRead:
    def test_an_empty_ledger_has_head_zero_and_no_entries(self, ledger: RedisLedger) -> None:
        assert ledger.head() == 0
        assert stored_in(ledger) == []

    def test_entries_and_factors_come_back_as_they_were(self, ledger: RedisLedger) -> None:
        odd = "naïve \x00 \u2028 \U0001f5fc é \u202e ‮ \r\n \"'{}"
        first = applied(1, prompt=odd, paraphrases=[odd, ""], metadata={odd: [odd, 1.5, None]})
        second = rolled_back(2, actor=odd)
        ledger.append(first, FACTORS)
        ledger.append(second)
        assert stored_in(ledger) == [(first, FACTORS), (second, b"")]
        assert ledger.head() == 2
        assert factors_at(ledger, 1) == FACTORS
        assert factors_at(ledger, 2) == b""

    def test_reads_from_anywhere_over_several_pages(self, ledger: RedisLedger) -> None:
        count = 2 * PAGE + 3
        for sequence in range(1, count + 1):
            ledger.append(applied(sequence), FACTORS)
        assert [entry.sequence for entry in ledger.read()] == list(range(1, count + 1))
        assert [entry.sequence for entry in ledger.read(after=PAGE + 1)] == list(range(PAGE + 2, count + 1))
        assert list(ledger.read(after=count)) == []

    def test_reads_what_is_appended_meanwhile(self, ledger: RedisLedger) -> None:
        ledger.append(applied(1), FACTORS)
        reader = ledger.read()
        assert next(reader).sequence == 1
        ledger.append(applied(2), FACTORS)
        assert next(reader).sequence == 2

    def test_knows_the_other_ledgers_of_one_beginning(self, own_server: EmbeddedRedis, connect: Connect) -> None:
        names = ["abc:1", "abc:2", "abd:1"]
        for name in names:
            connect(own_server, name).append(applied(1), FACTORS)
        assert connect(own_server, "abc:3").namespaces("abc:") == ["abc:1", "abc:2"]
        assert connect(own_server, "abc:3").namespaces("b") == []

    def test_half_a_megabyte_of_factors(self, ledger: RedisLedger) -> None:
        factors = FACTORS * 256
        ledger.append(applied(1, factors), factors)
        assert factors_at(ledger, 1) == factors

    def test_namespaces_do_not_see_each_other(self, server: EmbeddedRedis, connect: Connect) -> None:
        one, other = connect(server, "isolated"), connect(server, "isolated}:entries")
        one.append(applied(1), FACTORS)
        assert (one.head(), other.head()) == (1, 0)
        other.append(applied(1), FACTORS)
        assert len(stored_in(other)) == 1

    def test_closed_it_opens_again(self, ledger: RedisLedger) -> None:
        ledger.close()
        ledger.ping()


class TestABatch:
    def test_is_stored_whole_and_read_as_its_entries(self, ledger: RedisLedger) -> None:
        ledger.append(applied(1), FACTORS)
        stored = batch(2, [FACTORS, b"", FACTORS * 2])
        ledger.append_all(stored)
        assert ledger.head() == 4
        assert stored_in(ledger, 1) == stored
        ledger.append(applied(5), FACTORS)

    def test_of_thousands_is_one_command(self, server: EmbeddedRedis, ledger: RedisLedger) -> None:
        stored = batch(1, [FACTORS] * 5000)
        with redis.Redis.from_url(server.url) as raw:
            before = raw.info("commandstats").get("cmdstat_eval", {}).get("calls", 0)
            ledger.append_all(stored)
            # And a second one, for WAITAOF to wait for.
            assert raw.info("commandstats")["cmdstat_eval"]["calls"] - before == 2
        assert ledger.head() == 5000
        assert [entry.sequence for entry in ledger.read()] == list(range(1, 5001))

    def test_that_lost_the_race_stores_nothing(self, ledger: RedisLedger) -> None:
        ledger.append(applied(1), FACTORS)
        with pytest.raises(LedgerConflict) as conflict:
            ledger.append_all(batch(1, [FACTORS] * 3))
        assert conflict.value.facts == {"expected": 0, "actual": 1}
        assert ledger.head() == 1

    def test_again_succeeds_and_is_stored_once(self, ledger: RedisLedger) -> None:
        stored = batch(1, [FACTORS] * 3)
        ledger.append_all(stored)
        ledger.append_all(stored)
        ledger.append(applied(4), FACTORS)
        ledger.append_all(stored)
        assert ledger.head() == 4
        with pytest.raises(LedgerConflict):
            ledger.append_all(batch(1, [FACTORS] * 3, actor="someone else"))

    def test_with_one_bad_entry_stores_nothing(self, ledger: RedisLedger) -> None:
        good = batch(1, [FACTORS] * 3)
        for bad in (good[0], (good[1][0], b"other factors"), (applied(3), FACTORS)):
            with pytest.raises(EntryInvalid):
                ledger.append_all([good[0], bad, good[2]])
        assert ledger.head() == 0

    def test_is_given_the_time_that_its_size_may_take(self, server: EmbeddedRedis) -> None:
        ledger = RedisLedger.connect(f"{server.url}?socket_timeout=0.2", "patience")
        with redis.Redis.from_url(server.url) as raw:
            factors = bytes(15_000_000)
            raw.client_pause(1000, all=False)
            with pytest.raises(LedgerUnavailable):
                ledger.append(applied(1), FACTORS)
            raw.client_pause(1000, all=False)
            ledger.append_all(batch(1, [factors, factors]))
            assert ledger.head() == 2
        ledger.close()

    def test_that_was_being_written_when_the_server_died_is_not_there(
        self, own_server: EmbeddedRedis, connect: Connect, tmp_path: Path
    ) -> None:
        ledger = connect(own_server)
        ledger.append(applied(1), FACTORS)
        (log,) = (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")
        before = log.stat().st_size
        ledger.append_all(batch(2, [FACTORS] * 9))
        own_server.stop()
        whole = log.read_bytes()
        for cut in (before + 10, (before + len(whole)) // 2, whole.rindex(b"EXEC")):
            log.write_bytes(whole[:cut])
            own_server.start()
            assert ledger.head() == 1
            own_server.stop()


class TestConflict:
    @pytest.mark.parametrize("sequence", [1, 3])
    def test_names_both_heads_and_stores_nothing(self, ledger: RedisLedger, sequence: int) -> None:
        ledger.append(applied(1), FACTORS)
        with pytest.raises(LedgerConflict) as conflict:
            ledger.append(applied(sequence, reason="late"), FACTORS)
        assert conflict.value.facts == {"expected": sequence - 1, "actual": 1}
        assert ledger.head() == 1

    def test_of_many_writers_each_sequence_is_won_by_one(self, server: EmbeddedRedis, connect: Connect) -> None:
        sequences, writers = 12, 4
        ledgers = [connect(server, "race") for _ in range(writers)]
        won: list[tuple[int, str]] = []
        lost: list[dict[str, object]] = []
        together = threading.Barrier(writers)

        def write(ledger: RedisLedger, actor: str) -> None:
            for sequence in range(1, sequences + 1):
                together.wait(10)
                try:
                    ledger.append(applied(sequence, actor=actor), FACTORS)
                    won.append((sequence, actor))
                except LedgerConflict as conflict:
                    lost.append(conflict.facts)

        threads = [threading.Thread(target=write, args=(ledger, f"writer-{n}")) for n, ledger in enumerate(ledgers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [(entry.sequence, entry.actor) for entry, _ in stored_in(ledgers[0])]
        assert [sequence for sequence, _ in sorted(won)] == list(range(1, sequences + 1))
        assert len(lost) == sequences * (writers - 1)
        assert all(facts["actual"] == facts["expected"] + 1 for facts in lost)


class TestRetry:
    def test_the_same_append_again_succeeds_and_is_stored_once(self, ledger: RedisLedger) -> None:
        entry = applied(1)
        ledger.append(entry, FACTORS)
        ledger.append(entry, FACTORS)
        assert stored_in(ledger) == [(entry, FACTORS)]

    def test_even_after_another_writer_has_appended_to_it(self, ledger: RedisLedger) -> None:
        entry = applied(1)
        ledger.append(entry, FACTORS)
        ledger.append(rolled_back(2))
        ledger.append(entry, FACTORS)
        assert ledger.head() == 2

    def test_another_entry_for_the_same_sequence_is_still_a_conflict(self, ledger: RedisLedger) -> None:
        entry = applied(1)
        ledger.append(entry, FACTORS)
        with pytest.raises(LedgerConflict):
            ledger.append(entry.model_copy(update={"actor": "someone else"}), FACTORS)

    def test_survives_a_server_that_has_forgotten_the_script(self, own_server: EmbeddedRedis, connect: Connect) -> None:
        ledger = connect(own_server)
        ledger.append(applied(1), FACTORS)
        with redis.Redis.from_url(own_server.url) as raw:
            raw.script_flush()
        ledger.append(applied(2), FACTORS)
        assert ledger.head() == 2


class TestRefused:
    def test_factors_that_do_not_match_their_digest(self, ledger: RedisLedger) -> None:
        with pytest.raises(EntryInvalid):
            ledger.append(applied(1), b"other factors")
        with pytest.raises(EntryInvalid):
            ledger.append(rolled_back(1), FACTORS)
        assert ledger.head() == 0


class TestCorrupt:
    """Whatever happened to the stream, the first bad sequence is named and nothing beyond it is yielded."""

    @pytest.fixture
    def key(self) -> str:
        return "mend:{corrupt}:entries"

    @pytest.fixture
    def raw(self, server: EmbeddedRedis, key: str) -> Iterator[redis.Redis]:
        with redis.Redis.from_url(server.url) as raw:
            raw.delete(key, key.replace("entries", "factors"))
            yield raw

    @pytest.fixture
    def damaged(self, raw: redis.Redis, server: EmbeddedRedis, connect: Connect) -> RedisLedger:
        """Three good entries, to be damaged."""
        ledger = connect(server, "corrupt")
        for sequence in (1, 2, 3):
            ledger.append(applied(sequence), FACTORS)
        return ledger

    def read(self, ledger: RedisLedger, after: int = 0) -> tuple[list[int], LedgerCorrupt]:
        read: list[int] = []
        with pytest.raises(LedgerCorrupt) as corrupt:
            read.extend(entry.sequence for entry in ledger.read(after))
        return read, corrupt.value

    @pytest.mark.parametrize("missing", [1, 2, 3])
    def test_a_gap(self, damaged: RedisLedger, raw: redis.Redis, key: str, missing: int) -> None:
        raw.xdel(key, f"{missing}-0")
        read, corrupt = self.read(damaged)
        assert read == (list(range(1, missing)) if missing < 3 else [])  # of a lost end nothing is read at all
        assert corrupt.facts["sequence"] == missing
        with pytest.raises(LedgerCorrupt):
            factors_at(damaged, missing)

    def test_entries_lost_from_the_end(self, damaged: RedisLedger, raw: redis.Redis, key: str) -> None:
        raw.delete(key)
        damaged.append(applied(1), FACTORS)
        read, corrupt = self.read(damaged, after=3)
        assert read == []
        assert corrupt.facts["sequence"] == 2

    @pytest.mark.parametrize(
        "fields",
        [
            {"entry": b"{", "chain": GENESIS},
            {"entry": b'{"kind":"superseded","sequence":4}', "chain": GENESIS},
            {"entry": encode(applied(5)), "chain": GENESIS},
            {"entry": encode(applied(4)), "chain": GENESIS},
            {"entry": encode(applied(4))},
            {"chain": GENESIS},
        ],
        ids=["cut", "kind", "sequence", "chain", "no_chain", "no_entry"],
    )
    def test_an_entry_that_was_altered(
        self, damaged: RedisLedger, raw: redis.Redis, key: str, fields: dict[str, bytes]
    ) -> None:
        raw.xadd(key, fields, id="4-0")
        read, corrupt = self.read(damaged)
        assert read == [1, 2, 3]
        assert corrupt.facts["sequence"] == 4
        assert "entry 4 " in str(corrupt)

    @pytest.mark.parametrize("altered", [1, 2, 3])
    def test_one_that_was_replaced_breaks_the_chain(
        self, damaged: RedisLedger, raw: redis.Redis, server: EmbeddedRedis, connect: Connect, key: str, altered: int
    ) -> None:
        stored = raw.xrange(key)
        raw.delete(key)
        for sequence, (entry_id, fields) in enumerate(stored, 1):
            if sequence == altered:
                fields[b"entry"] = fields[b"entry"].replace(b"Eiffel", b"Leaning")
            raw.xadd(key, fields, id=entry_id)
        read, corrupt = self.read(connect(server, "corrupt"))
        assert read == list(range(1, altered))
        assert corrupt.facts["sequence"] == altered
        assert "altered" in str(corrupt)

    def test_a_whole_other_ledger_in_its_place(
        self, damaged: RedisLedger, raw: redis.Redis, server: EmbeddedRedis, connect: Connect, key: str
    ) -> None:
        raw.delete(key)
        other = connect(server, "corrupt")
        for sequence in (1, 2, 3):
            other.append(applied(sequence, actor="somebody else"), FACTORS)
        for call in (damaged.head, lambda: damaged.append(rolled_back(4)), lambda: list(damaged.read(3))):
            with pytest.raises(LedgerCorrupt, match="entry 3 of the ledger is another one"):
                call()
        assert other.head() == 3

    @pytest.mark.parametrize("factors", [None, FACTORS[:-1] + b"\x00"], ids=["missing", "altered"])
    def test_factors(self, damaged: RedisLedger, raw: redis.Redis, key: str, factors: bytes | None) -> None:
        name = key.replace("entries", "factors")
        raw.hdel(name, 2) if factors is None else raw.hset(name, 2, factors)
        with pytest.raises(FactorsMissing if factors is None else LedgerCorrupt) as corrupt:
            stored_in(damaged)
        assert corrupt.value.facts["sequence"] == 2

    def test_an_entry_of_another_program(self, damaged: RedisLedger, raw: redis.Redis, key: str) -> None:
        raw.xadd(key, {"hello": "world"}, id="3-7")
        with pytest.raises(LedgerCorrupt):
            damaged.head()
        raw.xadd(key, {"entry": encode(applied(4)), "factors": FACTORS}, id="4-0")
        read, corrupt = self.read(damaged)
        assert read == [1, 2, 3]
        assert corrupt.facts["sequence"] == 4

    def test_a_key_that_is_no_stream(self, raw: redis.Redis, key: str, server: EmbeddedRedis, connect: Connect) -> None:
        raw.set(key, "hello")
        ledger = connect(server, "corrupt")
        for call in (ledger.head, lambda: ledger.append(applied(1), FACTORS), lambda: factors_at(ledger, 1)):
            with pytest.raises(LedgerCorrupt):
                call()


class TestUnavailable:
    def test_without_a_server_and_again_with_one(self, own_server: EmbeddedRedis, connect: Connect) -> None:
        ledger = connect(own_server)
        entry = applied(1)
        ledger.append(entry, FACTORS)
        own_server.stop()
        calls = (
            ledger.ping,
            ledger.head,
            lambda: stored_in(ledger),
            lambda: factors_at(ledger, 1),
            lambda: ledger.append(rolled_back(2)),
        )
        for call in calls:
            with pytest.raises(LedgerUnavailable) as unavailable:
                call()
            assert unavailable.value.facts["reason"] == "unreachable"
        own_server.start()
        ledger.append(rolled_back(2))
        assert ledger.head() == 2

    def test_a_full_server_stores_nothing_and_still_reads(self, own_server: EmbeddedRedis, connect: Connect) -> None:
        ledger = connect(own_server)
        ledger.append(applied(1), FACTORS)
        with redis.Redis.from_url(own_server.url) as raw:
            raw.config_set("maxmemory", 1)
            with pytest.raises(LedgerUnavailable) as unavailable:
                ledger.append(applied(2), FACTORS)
            assert unavailable.value.facts["reason"] == "out_of_memory"
            assert [entry.sequence for entry in ledger.read()] == [1]
            raw.config_set("maxmemory", 0)
        ledger.append(applied(2), FACTORS)

    def test_a_read_only_replica(self, own_server: EmbeddedRedis, connect: Connect) -> None:
        ledger = connect(own_server)
        with redis.Redis.from_url(own_server.url) as raw:
            raw.replicaof("127.0.0.1", 1)
        with pytest.raises(LedgerUnavailable) as unavailable:
            ledger.append(applied(1), FACTORS)
        assert unavailable.value.facts["reason"] == "read_only"

    def test_a_server_that_hangs_is_given_up_on_and_asked_again(self, server: EmbeddedRedis) -> None:
        ledger = RedisLedger.connect(f"{server.url}?socket_timeout=0.2", "hangs")
        first, second = applied(1), applied(2)
        ledger.append(first, FACTORS)
        with redis.Redis.from_url(server.url) as raw:
            raw.client_pause(10_000, all=False)
            with pytest.raises(LedgerUnavailable) as unavailable:
                ledger.append(second, FACTORS)
            raw.client_unpause()
        assert unavailable.value.facts["reason"] == "timeout"
        # Nobody knows whether it was stored; appending it again settles it, and no late reply is taken for another.
        ledger.append(second, FACTORS)
        assert ledger.head() == 2
        assert stored_in(ledger) == [(first, FACTORS), (second, FACTORS)]
        ledger.close()

    def test_credentials_are_asked_for_without_being_told(self, own_server: EmbeddedRedis) -> None:
        with redis.Redis.from_url(own_server.url) as raw:
            raw.config_set("requirepass", "right-secret")
        path = own_server.url.removeprefix("unix://")
        for url in (own_server.url, f"unix://:wrong-secret@{path}"):
            ledger = RedisLedger.connect(url, "secret")
            with pytest.raises(LedgerUnavailable) as unavailable:
                ledger.head()
            ledger.close()
            assert unavailable.value.facts["reason"] == "credentials"
            assert "secret" not in str(unavailable.value)
        ledger = RedisLedger.connect(f"unix://:right-secret@{path}", "secret")
        assert ledger.head() == 0
        ledger.close()

    @pytest.mark.parametrize(
        "url",
        [
            "http://:hunter2@localhost",
            "hunter2",
            "redis://:hunter2/x@localhost:99",
            "redis://:hunter2@localhost:6379/0?surprise=1",
            "redis://:hunter2@localhost:6379/0?socket_timeout=soon",
        ],
    )
    def test_a_url_that_cannot_be_understood_is_not_repeated(self, url: str) -> None:
        with pytest.raises(LedgerUnavailable) as unavailable:
            RedisLedger.connect(url, "any")
        assert unavailable.value.facts["reason"] == "bad_url"
        assert "hunter2" not in str(unavailable.value)
        assert unavailable.value.__suppress_context__

    def test_digests_are_sha256(self) -> None:
        assert digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
