"""Nothing is called durable that is not: of a Redis that may lose edits it is said why, and each append is proven."""

from __future__ import annotations

import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from service.ledger import (
    Applied,
    LedgerCorrupt,
    LedgerError,
    LedgerNotDurable,
    LedgerUnavailable,
    OutcomeUnknown,
    RedisLedger,
)
from tests.ledger.entries import FACTORS, applied, factors_at, rolled_back, stored_in
from tests.ledger.servers import FACTORS_KEY, KEY, VALKEY, WITHOUT_WAITAOF, Proxy, Server, old_redis

Start = Callable[..., Server]
NEW = pytest.param(VALKEY, id="new")
OLD = pytest.param(
    old_redis(), id="old", marks=pytest.mark.skipif(old_redis() is None, reason="no redis-server older than 7.2 here")
)
TOO_OLD = b"redis_version:5.0.7\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\n"


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as servers:
        yield lambda options=None, binary=VALKEY: servers.enter_context(Server(options, binary))


def _outcome_unknown(append: Callable[[], None]) -> OutcomeUnknown:
    """That an append is there, but is not known to be durable."""
    with pytest.raises(OutcomeUnknown) as unknown:
        append()
    assert unknown.value.facts["reason"] == "not_durable"
    return unknown.value


class TestADurableServer:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"appendfsync": "everysec"},
            {"appendfsync": "everysec", "no-appendfsync-on-rewrite": "yes"},
            {"maxmemory-policy": "volatile-lru"},
            WITHOUT_WAITAOF,
        ],
        ids=["always", "everysec", "everysec_pausing", "volatile", "always_without_waitaof"],
    )
    def test_has_no_weakness_and_takes_edits(self, start: Start, options: Mapping[str, str]) -> None:
        ledger = start(options).ledger("strict")
        durability = ledger.inspect()
        assert durability.weaknesses == ()
        assert durability.waits == (options is not WITHOUT_WAITAOF)
        assert durability.server.startswith("Valkey ")
        ledger.confirm()
        ledger.append(applied(1), FACTORS)
        ledger.confirm()

    @pytest.mark.parametrize("binary", [OLD])
    def test_may_be_an_old_redis(self, start: Start, binary: str) -> None:
        server = start(binary=binary)
        ledger = server.ledger("strict")
        durability = ledger.inspect()
        assert (durability.weaknesses, durability.waits) == ((), False)
        assert re.fullmatch(r"Redis (6\.2|7\.0)\.\d+", durability.server)
        entry = applied(1)
        ledger.append(entry, FACTORS)
        ledger.append(entry, FACTORS)
        ledger.append(rolled_back(2))
        ledger.confirm()
        assert ledger.compact().sequence == 2
        server.kill()
        server.start()
        read = list(server.ledger().read())
        assert [found.sequence for found in read] == [1, 2]
        assert read[0] == entry

    def test_of_which_the_memory_is_full_keeps_the_ledger_under_a_volatile_policy(self, start: Start) -> None:
        server = start({"maxmemory-policy": "volatile-lru"})
        ledger = server.ledger("strict")
        ledger.append(applied(1), FACTORS)
        server.client.config_set("maxmemory", 1)
        with pytest.raises(LedgerUnavailable):
            ledger.append(applied(2), FACTORS)
        assert factors_at(ledger, 1) == FACTORS


class TestAWeakServer:
    """strict refuses it before anything is written; warn says why, and goes on."""

    @pytest.mark.parametrize(
        ("options", "setting", "advice"),
        [
            ({"appendonly": "no"}, "appendonly is no", "set appendonly yes"),
            ({"appendfsync": "no"}, "appendfsync is no", "set appendfsync always"),
            ({"appendfsync": "no", **WITHOUT_WAITAOF}, "appendfsync is no", "set appendfsync always"),
            ({"appendfsync": "everysec", **WITHOUT_WAITAOF}, "appendfsync is everysec", "set appendfsync always"),
            ({"appendfsync": "everysec", **WITHOUT_WAITAOF}, "appendfsync is everysec", "permit WAITAOF"),
            (
                {"no-appendfsync-on-rewrite": "yes", **WITHOUT_WAITAOF},
                "no-appendfsync-on-rewrite is yes",
                "set it to no",
            ),
            (
                {"maxmemory-policy": "allkeys-lru"},
                "maxmemory-policy is allkeys-lru",
                "set maxmemory-policy noeviction",
            ),
        ],
    )
    def test_is_refused_by_its_setting_and_what_to_set(
        self, start: Start, options: Mapping[str, str], setting: str, advice: str
    ) -> None:
        server = start(options)
        strict, warned = server.ledger("strict"), server.ledger("warn")
        for call in (strict.inspect, lambda: strict.append(applied(1), FACTORS), strict.confirm):
            with pytest.raises(LedgerNotDurable) as refused:
                call()
            (weakness,) = refused.value.facts["weaknesses"]
            assert setting in weakness
            assert advice in weakness
            assert weakness in str(refused.value)
            assert "MEND_DURABILITY" in str(refused.value)
        assert server.client.keys() == []
        assert warned.inspect().weaknesses == (weakness,)
        warned.append(applied(1), FACTORS)
        assert warned.head() == 1

    def test_says_all_that_is_wrong_at_once(self, start: Start) -> None:
        server = start({"appendonly": "no", "maxmemory-policy": "allkeys-random"})
        assert len(server.ledger().inspect().weaknesses) == 2

    def test_is_taken_again_once_it_was_mended(self, start: Start) -> None:
        server = start({"maxmemory-policy": "allkeys-lru"})
        ledger = server.ledger("strict")
        with pytest.raises(LedgerNotDurable):
            ledger.append(applied(1), FACTORS)
        server.client.config_set("maxmemory-policy", "noeviction")
        ledger.append(applied(1), FACTORS)


class TestWhatAUserMayNotAsk:
    @pytest.fixture
    def permitted(self, start: Start) -> Callable[..., RedisLedger]:
        """A ledger of a user with these rules, on a server that fsyncs each second or as is said."""

        def permitted(*rules: str, appendfsync: str = "everysec", durability: str = "strict") -> RedisLedger:
            server = start({"appendfsync": appendfsync})
            server.permit("+@all", *rules)
            return server.ledger(durability, user="ledger")

        return permitted

    @pytest.mark.parametrize("rules", [["-config"], ["-info"]])
    def test_one_source_is_enough_where_waitaof_proves_each_write(
        self, permitted: Callable[..., RedisLedger], rules: list[str]
    ) -> None:
        ledger = permitted(*rules)
        assert ledger.inspect().waits
        ledger.append(applied(1), FACTORS)

    def test_without_any_it_says_what_to_permit(self, permitted: Callable[..., RedisLedger]) -> None:
        with pytest.raises(LedgerNotDurable) as refused:
            permitted("-config", "-info").inspect()
        assert len(refused.value.facts["weaknesses"]) == 2
        assert all("permit CONFIG GET or INFO" in weakness for weakness in refused.value.facts["weaknesses"])

    def test_without_waitaof_it_falls_back_to_appendfsync_always(self, permitted: Callable[..., RedisLedger]) -> None:
        ledger = permitted("-waitaof", appendfsync="always")
        ledger.append(applied(1), FACTORS)
        assert not ledger.inspect().waits
        with pytest.raises(LedgerNotDurable, match="set appendfsync always, or permit WAITAOF"):
            permitted("-waitaof").inspect()

    @pytest.mark.parametrize(
        ("rules", "advice"),
        [(["-waitaof", "-config"], "permit one of both"), (["-waitaof", "-info"], "permit INFO")],
    )
    def test_without_waitaof_both_sources_are_needed(
        self, permitted: Callable[..., RedisLedger], rules: list[str], advice: str
    ) -> None:
        with pytest.raises(LedgerNotDurable, match=advice):
            permitted(*rules, appendfsync="always").inspect()

    @pytest.mark.parametrize("binary", [NEW, OLD])
    @pytest.mark.parametrize("forbidden", ["-hset", "-xadd"])
    def test_an_append_of_which_a_part_is_forbidden_stores_no_entry(
        self, start: Start, binary: str, forbidden: str
    ) -> None:
        server = start(binary=binary)
        server.permit("+@all", forbidden)
        with pytest.raises(LedgerUnavailable) as unavailable:
            server.ledger(user="ledger").append(applied(1), FACTORS)
        assert not isinstance(unavailable.value, OutcomeUnknown)
        assert not server.client.exists(KEY)
        server.permit("+@all")
        ledger = server.ledger(user="ledger")
        ledger.append(applied(1), FACTORS)
        assert factors_at(ledger, 1) == FACTORS


class TestAServerThatIsTooOld:
    def test_is_named_and_refused(self, tmp_path: Path) -> None:
        with _Answering(tmp_path / "s", TOO_OLD) as url:
            ledger = RedisLedger.connect(url, "old")
            for call in (ledger.inspect, lambda: ledger.append(rolled_back(1))):
                with pytest.raises(LedgerUnavailable) as old:
                    call()
                assert old.value.facts["reason"] == "too_old"
                assert "this is Redis 5.0.7; the ledger needs Redis 6.2 or newer" in str(old.value)
            ledger.close()


class _Answering(socketserver.ThreadingUnixStreamServer):
    """A server that answers INFO, and knows no other command but PING."""

    def __init__(self, path: Path, info: bytes) -> None:
        self.info = info
        super().__init__(str(path), _Answers)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> str:
        self._thread.start()
        return f"unix://{self.server_address}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Answers(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        with suppress(ConnectionError):
            while line := self.rfile.readline():
                words = [self._word() for _ in range(int(line[1:]))]
                answers = {b"INFO": b"$%d\r\n%s\r\n" % (len(self.server.info), self.server.info), b"PING": b"+PONG\r\n"}
                self.wfile.write(answers.get(words[0].upper(), b"-ERR unknown command\r\n"))

    def _word(self) -> bytes:
        size = int(self.rfile.readline()[1:])
        return self.rfile.read(size + 2)[:size]


class TestAConfigurationThatChanges:
    """Between two looks at it: the append itself tells."""

    @pytest.fixture(params=[NEW, OLD])
    def server(self, start: Start, request: pytest.FixtureRequest) -> Server:
        return start(binary=request.param)

    def test_an_append_without_a_file_is_not_acknowledged_until_there_is_one_again(self, server: Server) -> None:
        ledger = server.ledger()
        ledger.append(applied(1), FACTORS)
        server.client.config_set("appendonly", "no")
        entry = applied(2)
        unknown = _outcome_unknown(lambda: ledger.append(entry, FACTORS))
        assert "has it, but it is not durable yet" in str(unknown)
        assert "appendonly" in str(unknown)
        assert ledger.inspect().weaknesses[0].startswith("its appendonly is no")
        self._turn_on(server)
        ledger.inspect()
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]

    def test_strict_refuses_what_comes_next_and_goes_on_when_it_is_mended(self, server: Server) -> None:
        ledger = server.ledger("strict")
        ledger.append(applied(1), FACTORS)
        server.client.config_set("appendonly", "no")
        entry = applied(2)
        _outcome_unknown(lambda: ledger.append(entry, FACTORS))
        for call in (lambda: ledger.append(entry, FACTORS), lambda: ledger.append(applied(3), FACTORS), ledger.compact):
            with pytest.raises(LedgerNotDurable, match="set appendonly yes"):
                call()
        self._turn_on(server)
        ledger.append(entry, FACTORS)
        ledger.append(entry, FACTORS)
        assert stored_in(ledger, 1) == [(entry, FACTORS)]

    def test_what_was_acknowledged_since_the_file_was_turned_on_outlives_a_crash(self, server: Server) -> None:
        """Redis acknowledges writes before its first file is complete, which it fills in the background."""
        server.client.config_set("appendonly", "no")
        with server.client.pipeline(transaction=False) as other:
            for number in range(100):
                other.set(f"of another program {number}", bytes(1_000_000))
            other.execute()
        ledger, entry = server.ledger("strict"), applied(1)
        server.client.config_set("appendonly", "yes")
        self._append_until_acknowledged(ledger, entry)
        server.kill()
        server.start()
        assert stored_in(server.ledger()) == [(entry, FACTORS)]

    def test_of_a_server_without_waitaof_is_looked_at_behind_each_append(self, start: Start) -> None:
        server = start(WITHOUT_WAITAOF)
        ledger = server.ledger("strict")
        for sequence, (setting, value) in enumerate({"appendfsync": "everysec", "appendonly": "no"}.items(), 1):
            ledger.inspect()
            before = server.client.config_get(setting)
            server.client.config_set(setting, value)
            entry = applied(sequence)
            assert f"{setting} is {value}" in str(_outcome_unknown(lambda entry=entry: ledger.append(entry, FACTORS)))
            server.client.config_set(setting, before[setting])
            if setting == "appendfsync":
                ledger.append(entry, FACTORS)

    def _turn_on(self, server: Server) -> None:
        server.client.config_set("appendonly", "yes")
        while server.client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.01)

    def _append_until_acknowledged(self, ledger: RedisLedger, entry: Applied) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                return ledger.append(entry, FACTORS)
            except (LedgerNotDurable, OutcomeUnknown):
                assert time.monotonic() < deadline


class TestEachAppend:
    def test_is_not_acknowledged_before_its_fsync(self, start: Start) -> None:
        server = start()
        ledger = server.ledger("strict", query="socket_timeout=1.5")
        ledger.append(applied(1), FACTORS)
        server.client.config_set("appendfsync", "no")
        entry = applied(2)
        unknown = _outcome_unknown(lambda: ledger.append(entry, FACTORS))
        assert "did not confirm it in time" in str(unknown)
        server.client.config_set("appendfsync", "always")
        ledger.append(entry, FACTORS)
        assert ledger.head() == 2

    def test_waits_for_what_another_connection_wrote_before(self, start: Start) -> None:
        """WAITAOF alone waits for the writes of its own connection: an append again would not have any."""
        server = start()
        one, again, reader = (server.ledger("strict", query="socket_timeout=1.5") for _ in range(3))
        for ledger in (one, again, reader):
            ledger.inspect()
        server.client.config_set("appendfsync", "no")
        entry = applied(1)
        for ledger in (one, again):
            _outcome_unknown(lambda ledger=ledger: ledger.append(entry, FACTORS))
        _outcome_unknown(reader.confirm)
        assert stored_in(one) == [(entry, FACTORS)]
        server.client.config_set("appendfsync", "always")
        reader.confirm()
        again.append(entry, FACTORS)

    def test_is_asked_after_over_its_own_connection(self, start: Start) -> None:
        with Proxy(start()) as proxy:
            ledger = proxy.server.ledger(path=proxy.path)
            ledger.inspect()
            ledger.close()
            ledger.append(applied(1), FACTORS)
            (requests,) = [received for received in proxy.received if b"XADD" in received]
            assert re.search(rb"XADD.*XSETID.*WAITAOF\r\n\$1\r\n1\r\n\$1\r\n0\r\n\$4\r\n4000\r\n", requests, re.DOTALL)
            ledger.close()

    def test_in_a_full_memory_is_refused_and_what_is_there_is_durable(self, start: Start) -> None:
        server = start()
        ledger = server.ledger("strict")
        entry = applied(1)
        ledger.append(entry, FACTORS)
        server.client.config_set("maxmemory", 1)
        with pytest.raises(LedgerUnavailable) as full:
            ledger.append(applied(2), FACTORS)
        assert type(full.value) is LedgerUnavailable
        assert full.value.facts["reason"] == "out_of_memory"
        newcomer = server.ledger("strict")
        newcomer.inspect()
        newcomer.confirm()
        newcomer.append(entry, FACTORS)
        assert stored_in(newcomer) == [(entry, FACTORS)]
        server.client.config_set("maxmemory", 0)
        ledger.append(applied(2), FACTORS)

    def test_is_whole_where_the_factors_cannot_be_stored(self, start: Start) -> None:
        """Redis takes nothing back of a script that fails half-way."""
        server = start()
        server.client.set(FACTORS_KEY, "of another program")
        with pytest.raises(LedgerError):
            server.ledger().append(applied(1), FACTORS)
        assert not server.client.exists(KEY)


class TestALostStream:
    def test_is_found_by_its_snapshot(self, start: Start) -> None:
        """As an eviction would leave it: one key gone, the others there."""
        server = start()
        ledger = server.ledger()
        for sequence in (1, 2, 3):
            ledger.append(applied(sequence), FACTORS)
        ledger.compact()
        server.client.delete(KEY)
        for call in (server.ledger().head, lambda: list(server.ledger().read())):
            with pytest.raises(LedgerCorrupt, match=r"entry 4 .* may be lost: there is a snapshot up to entry 3"):
                call()
