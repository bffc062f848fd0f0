"""However a connection breaks, an append is stored once, and nobody is told more of it than is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from service.ledger import LedgerConflict, LedgerUnavailable, OutcomeUnknown, RedisLedger
from tests.ledger.entries import FACTORS, applied, batch, rolled_back, stored_in
from tests.ledger.servers import BEFORE_THE_REPLY, BEFORE_THE_REQUEST, NOWHERE, WITHOUT_WAITAOF, Cut, Proxy, Server

REPLY_BYTES = len(b"$-1\r\n+OK\r\n*2\r\n:1\r\n:0\r\n")
"""What an append is answered: nothing, the write for WAITAOF to wait for, and its counts."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def ledger(proxy: Proxy) -> Iterator[RedisLedger]:
    """Behind the proxy, with one entry."""
    ledger = proxy.server.ledger("strict", path=proxy.path, query="socket_timeout=1")
    ledger.append(applied(1), FACTORS)
    ledger.close()
    proxy.received.clear()
    yield ledger
    ledger.close()


def _outcome_unknown(call: Callable[[], object]) -> str:
    with pytest.raises(OutcomeUnknown, match="whether this change was stored is not known") as unknown:
        call()
    return unknown.value.facts["reason"]


def _unavailable(call: Callable[[], object]) -> str:
    """That nothing was stored."""
    with pytest.raises(LedgerUnavailable) as unavailable:
        call()
    assert type(unavailable.value) is LedgerUnavailable
    return unavailable.value.facts["reason"]


class TestOneCut:
    def test_anywhere_in_the_reply_is_made_good_and_the_entry_stored_once(
        self, proxy: Proxy, ledger: RedisLedger
    ) -> None:
        for sequence, passed_on in enumerate((BEFORE_THE_REQUEST, *range(REPLY_BYTES)), 2):
            proxy.cut(Cut(passed_on))
            ledger.append(applied(sequence), FACTORS)
            assert ledger.head() == sequence
        assert [received.count(b"XADD") for received in proxy.marked] == [1] + [2] * REPLY_BYTES + [1]
        assert len(stored_in(ledger)) == sequence

    @pytest.mark.parametrize("passed_on", [BEFORE_THE_REQUEST, BEFORE_THE_REPLY])
    def test_of_a_batch_is_too(self, proxy: Proxy, ledger: RedisLedger, passed_on: int | None) -> None:
        stored = batch(2, [FACTORS] * 20)
        proxy.cut(Cut(passed_on))
        ledger.append_all(stored)
        assert stored_in(ledger, 1) == stored

    def test_is_made_good_on_a_server_without_waitaof(self) -> None:
        with Server(WITHOUT_WAITAOF) as server, Proxy(server) as proxy:
            ledger = server.ledger("strict", path=proxy.path)
            for sequence, passed_on in enumerate((BEFORE_THE_REQUEST, BEFORE_THE_REPLY, 7, 300), 1):
                proxy.cut(Cut(passed_on))
                ledger.append(applied(sequence), FACTORS)
                assert ledger.head() == sequence

    def test_while_nobody_asked_is_not_noticed(self, server: Server, ledger: RedisLedger) -> None:
        server.client.client_kill_filter(_type="normal", skipme=True)
        ledger.append(applied(2), FACTORS)
        server.kill()
        server.start()
        ledger.append(applied(3), FACTORS)
        assert ledger.head() == 3

    @pytest.mark.parametrize("mark", [b"last-generated-id", b"XRANGE\r\n$", b"HMGET"], ids=["head", "read", "factors"])
    def test_of_a_question_is_not_noticed(self, server: Server, ledger: RedisLedger, mark: bytes) -> None:
        with Proxy(server, mark, name="other") as proxy:
            reader = server.ledger(path=proxy.path)
            for passed_on in (BEFORE_THE_REQUEST, BEFORE_THE_REPLY, 20):
                proxy.cut(Cut(passed_on))
                assert stored_in(reader) == stored_in(ledger)
            assert len(proxy.marked) == 4
            proxy.cut_always(Cut(20))
            assert _unavailable(lambda: stored_in(reader)) == "unreachable"

    @pytest.mark.parametrize("passed_on", [BEFORE_THE_REQUEST, BEFORE_THE_REPLY])
    def test_of_a_compaction_is_made_good(self, server: Server, ledger: RedisLedger, passed_on: int | None) -> None:
        ledger.append(rolled_back(2))
        before = list(ledger.read())
        with Proxy(server, b"XTRIM", name="other") as proxy:
            proxy.cut(Cut(passed_on))
            assert server.ledger(path=proxy.path).compact().sequence == 2
        assert list(server.ledger().read()) == before
        assert ledger.stored_since_snapshot() == 1


class TestCutsThatDoNotEnd:
    @pytest.mark.parametrize("passed_on", [BEFORE_THE_REQUEST, BEFORE_THE_REPLY, REPLY_BYTES - 1])
    def test_leave_the_outcome_unknown_until_the_same_is_appended_again(
        self, proxy: Proxy, ledger: RedisLedger, passed_on: int | None
    ) -> None:
        entry = applied(2)
        proxy.cut_always(Cut(passed_on))
        for _ in range(2):
            assert _outcome_unknown(lambda: ledger.append(entry, FACTORS)) == "unreachable"
        assert ledger.head() == (1 if passed_on is BEFORE_THE_REQUEST else 2)
        proxy.cut()
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]

    def test_leave_it_unknown_where_the_server_is_gone_the_second_time(
        self, server: Server, proxy: Proxy, ledger: RedisLedger
    ) -> None:
        entry = applied(2)
        proxy.cut(Cut(BEFORE_THE_REPLY, then=server.kill))
        assert _outcome_unknown(lambda: ledger.append(entry, FACTORS)) == "unreachable"
        server.start()
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]


class TestARefusalBehindACut:
    """It says nothing of what was sent before the cut, which may still arrive."""

    def test_leaves_the_outcome_unknown(self, server: Server, proxy: Proxy, ledger: RedisLedger) -> None:
        entry = applied(2)
        proxy.cut(Cut(BEFORE_THE_REQUEST, then=lambda: server.client.config_set("maxmemory", 1)))
        assert _outcome_unknown(lambda: ledger.append(entry, FACTORS)) == "unreachable"
        assert _unavailable(lambda: ledger.append(entry, FACTORS)) == "out_of_memory"
        server.client.config_set("maxmemory", 0)
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]

    def test_does_not_hide_what_was_stored_before_it(self, server: Server, proxy: Proxy, ledger: RedisLedger) -> None:
        entry = applied(2)
        proxy.cut(Cut(BEFORE_THE_REPLY, then=lambda: server.client.config_set("maxmemory", 1)))
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]

    def test_is_that_of_a_disk_that_takes_nothing(self, server: Server, proxy: Proxy, ledger: RedisLedger) -> None:
        def break_the_disk() -> None:
            (server.path.parent / "dump.rdb").mkdir()  # where the server would rename its file to
            server.client.config_set("save", "3600 1")
            server.client.bgsave()
            while server.client.info("persistence")["rdb_last_bgsave_status"] == "ok":
                pass

        one, two = applied(2), applied(3)
        proxy.cut(Cut(BEFORE_THE_REPLY, then=break_the_disk))
        assert _outcome_unknown(lambda: ledger.append(one, FACTORS)) == "not_durable"
        assert [entry for entry, _ in stored_in(ledger, 1)] == [one]
        assert _unavailable(lambda: ledger.append(two, FACTORS)) == "cannot_persist"
        server.client.config_set("save", "")
        ledger.append(one, FACTORS)
        ledger.append(two, FACTORS)
        assert ledger.head() == 3


class TestAnotherWriterBehindACut:
    def test_wins_if_ours_never_arrived(self, server: Server, proxy: Proxy, ledger: RedisLedger) -> None:
        theirs = applied(2, actor="another")
        proxy.cut(Cut(BEFORE_THE_REQUEST, then=lambda: server.ledger().append(theirs, FACTORS)))
        with pytest.raises(LedgerConflict):
            ledger.append(applied(2), FACTORS)
        assert stored_in(ledger, 1) == [(theirs, FACTORS)]

    @pytest.mark.parametrize("compacts", [False, True])
    def test_follows_on_ours_if_it_did(self, server: Server, proxy: Proxy, ledger: RedisLedger, compacts: bool) -> None:
        def follow() -> None:
            other = server.ledger()
            other.append(rolled_back(3))
            if compacts:
                assert other.compact() is not None

        entry = applied(2)
        proxy.cut(Cut(BEFORE_THE_REPLY, then=follow))
        ledger.append(entry, FACTORS)
        assert [found.sequence for found in ledger.read()] == [1, 2, 3]
        assert next(ledger.read(1)) == entry


class TestAServerThatDoesNotAnswer:
    def test_was_told_nothing_if_it_was_down_before(self, server: Server, ledger: RedisLedger) -> None:
        server.kill()
        assert _unavailable(lambda: ledger.append(applied(2), FACTORS)) == "unreachable"
        server.start()
        assert ledger.head() == 1

    def test_was_told_nothing_if_it_was_frozen_before(self, server: Server, ledger: RedisLedger) -> None:
        server.freeze()
        assert _unavailable(lambda: ledger.append(applied(2), FACTORS)) == "timeout"
        server.thaw()
        assert ledger.head() == 1

    @pytest.mark.parametrize(
        "cut",
        [Cut(NOWHERE), Cut(BEFORE_THE_REQUEST), Cut(BEFORE_THE_REPLY)],
        ids=["with_the_request", "before_it_came", "after_it_answered"],
    )
    def test_may_have_stored_it_and_the_same_append_settles_it(
        self, server: Server, proxy: Proxy, ledger: RedisLedger, cut: Cut
    ) -> None:
        entry = applied(2)
        when = "before" if cut.passed_on == NOWHERE else "then"
        proxy.cut(replace(cut, **{when: server.freeze}))
        assert _outcome_unknown(lambda: ledger.append(entry, FACTORS)) == "timeout"
        assert sum(received.count(b"XADD") for received in proxy.received) == 1  # nobody waits twice
        server.thaw()
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]


class TestAUrl:
    @pytest.mark.parametrize(
        "query", ["decode_responses=yes", "socket_timeout=0", "socket_timeout=-1", "socket_connect_timeout=0"]
    )
    def test_with_an_option_that_cannot_work_is_refused_at_once(self, query: str) -> None:
        with pytest.raises(LedgerUnavailable, match=query.partition("=")[0]) as refused:
            RedisLedger.connect(f"redis://:hunter2@localhost:6379/0?{query}", "any")
        assert refused.value.facts["reason"] == "bad_url"
        assert "hunter2" not in str(refused.value)

    @pytest.mark.parametrize("query", ["protocol=3", "retry_on_timeout=yes", "health_check_interval=1", "db=3"])
    def test_may_have_any_other_option(self, server: Server, query: str) -> None:
        ledger = server.ledger("strict", query=query)
        ledger.append(applied(1), FACTORS)
        ledger.append(rolled_back(2))
        assert ledger.compact() is not None
        ledger.confirm()
        assert [entry.sequence for entry in ledger.read()] == [1, 2]

    def test_with_little_patience_can_still_be_followed(self, server: Server) -> None:
        ledger = server.ledger(query="socket_timeout=0.8")
        ledger.wait(0, within_s=1)
        ledger.append(applied(1), FACTORS)
        ledger.wait(0, within_s=1)
