"""Folded into a snapshot or not, a ledger reads the same; what was altered in either is found and named."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import pytest

from service.ledger import (
    Applied,
    Compacted,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerUnavailable,
    RedisLedger,
    digest_of,
)
from service.ledger.chain import GENESIS, link
from service.ledger.redis_ledger import PAGE
from service.ledger.snapshot import Snapshot
from tests.ledger.entries import FACTORS, applied, batch, factors_at, restored, rolled_back
from tests.ledger.servers import FACTORS_KEY, KEY, NOWHERE, SNAPSHOT_KEY, Cut, Proxy, Server

ODD = "naïve \x00 \u2028 \x85 \x1c \v \f \U0001f5fc \r\n \"'{}"
"""All that some reader of lines takes for the end of one."""
LAST, STANDING, GONE = 8, (1, 3, 5, 8), (2, 6)
"""Of the ledger below: how many entries it has, and where edits stand or were rolled back."""

Stored = list[tuple[bytes, str]]


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Server:
    """With nothing in it."""
    shared.client.flushall()
    return shared


@pytest.fixture
def ledger(server: Server) -> RedisLedger:
    """With edits that stand, one that is superseded, and two that were rolled back, one of them of a batch."""
    ledger = server.ledger("strict")
    ledger.append(applied(1, prompt=ODD, actor=ODD), FACTORS)
    ledger.append(applied(2), FACTORS)
    ledger.append(applied(3, supersedes=("edit-1",)), FACTORS)
    ledger.append(rolled_back(4, "edit-2", reason=ODD))
    ledger.append_all(batch(5, [FACTORS, FACTORS * 2]))
    ledger.append(rolled_back(7, "edit-6"))
    ledger.append(applied(8, b""))
    return ledger


def _everything(ledger: RedisLedger) -> list[object]:
    """What a reader can learn: entries with their bytes and links, from everywhere, and the factors that count."""
    standing = [entry for entry in ledger.read() if isinstance(entry, Applied) and entry.sequence not in GONE]
    pages = [list(ledger.read_raw(after)) for after in range(ledger.head() + 1)]
    return [ledger.last(), pages, list(ledger.factors(standing))]


def _sequences(ledger: RedisLedger, after: int = 0) -> list[int]:
    return [entry.sequence for entry in ledger.read(after)]


def _corrupt(call: Callable[[], object], sequence: int) -> str:
    """What is said of the entry that is named."""
    with pytest.raises(LedgerCorrupt) as corrupt:
        call()
    assert corrupt.value.facts["sequence"] == sequence
    assert f"entry {sequence} " in str(corrupt.value)
    return str(corrupt.value)


class TestACompaction:
    def test_changes_nothing_for_any_reader(self, server: Server, ledger: RedisLedger) -> None:
        other, before = server.ledger(), _everything(ledger)
        own_reading, other_reading = ledger.read(), other.read()
        read = [next(own_reading)]
        assert [next(other_reading)] == read
        done = ledger.compact()
        assert done == Compacted(sequence=LAST, dropped_factors=2, snapshot_bytes=server.client.strlen(SNAPSHOT_KEY))
        assert read + list(own_reading) == read + list(other_reading) == list(server.ledger().read())
        for reader in (ledger, other, server.ledger()):
            assert _everything(reader) == before
            assert reader.head() == LAST
            assert reader.stored_since_snapshot() == 1

    def test_changes_nothing_for_a_reader_of_many_pages(self, server: Server) -> None:
        ledger = server.ledger()
        count = 2 * PAGE + 10
        ledger.append_all(batch(1, [b""] * count))
        for taken in (1, PAGE - 1, PAGE, PAGE + 1):
            reading = server.ledger().read()
            read = [next(reading).sequence for _ in range(taken)]
            count += 1
            ledger.append(applied(count), FACTORS)
            assert ledger.compact().sequence == count
            assert [*read, *(entry.sequence for entry in reading)] == list(range(1, count + 1))

    @pytest.mark.parametrize(
        "mark", [b"last-generated-id", b"XRANGE\r\n$", b"$3\r\nGET\r\n"], ids=["head", "page", "get"]
    )
    def test_between_any_two_questions_of_a_reader_is_not_noticed(
        self, server: Server, ledger: RedisLedger, mark: bytes
    ) -> None:
        def go_on() -> None:
            ledger.append(applied(ledger.head() + 1), FACTORS)
            assert ledger.compact() is not None

        ledger.compact()
        with Proxy(server, mark) as proxy:
            proxy.cut(*[Cut(NOWHERE, before=go_on)] * 5)
            reader = server.ledger(path=proxy.path)
            read = _sequences(reader)
            reader.close()
        assert read == list(range(1, ledger.head() + 1))
        assert ledger.head() > LAST

    def test_drops_the_factors_of_what_was_rolled_back_and_no_others(self, server: Server, ledger: RedisLedger) -> None:
        ledger.compact()
        edits = {entry.sequence: entry for entry in server.ledger().read() if isinstance(entry, Applied)}
        assert list(ledger.factors(edits[sequence] for sequence in STANDING)) == [FACTORS, FACTORS, FACTORS, b""]
        for sequence in GONE:
            with pytest.raises(FactorsMissing) as missing:
                list(ledger.factors([edits[sequence]]))
            assert missing.value.facts["sequence"] == sequence
        assert sorted(map(int, server.client.hkeys(FACTORS_KEY))) == [1, 3, 5]

    def test_is_followed_by_appends_and_by_another_one(self, server: Server, ledger: RedisLedger) -> None:
        ledger.compact()
        ledger.append(applied(9), FACTORS)
        server.ledger().append(rolled_back(10, "edit-9"))
        assert _sequences(server.ledger(), 7) == [8, 9, 10]
        before = [list(ledger.read_raw(after)) for after in range(11)]
        done = ledger.compact()
        assert (done.sequence, done.dropped_factors) == (10, 1)
        assert [list(server.ledger().read_raw(after)) for after in range(11)] == before
        ledger.append(applied(11), FACTORS)

    def test_with_nothing_new_does_nothing(self, server: Server, ledger: RedisLedger) -> None:
        ledger.compact()
        kept = server.client.get(SNAPSHOT_KEY)
        assert ledger.compact() is server.ledger().compact() is None
        assert server.client.get(SNAPSHOT_KEY) == kept

    def test_of_no_entry_or_of_one_does_nothing(self, server: Server) -> None:
        ledger = server.ledger()
        assert ledger.compact() is None
        ledger.append(applied(1), FACTORS)
        assert ledger.compact() is None
        assert server.client.exists(SNAPSHOT_KEY) == 0
        assert (ledger.head(), ledger.stored_since_snapshot()) == (1, 1)

    def test_hides_no_entry_that_is_appended_again(self, server: Server, ledger: RedisLedger) -> None:
        again = [(entry, FACTORS if entry.sequence == 1 else None) for entry in ledger.read()][:3]
        ledger.compact()
        for writer in (ledger, server.ledger()):
            writer.append_all(again)
            writer.append(*again[1])
            with pytest.raises(LedgerConflict):
                writer.append(applied(2, actor="somebody else"), FACTORS)
        assert ledger.head() == LAST

    def test_outlives_a_crash_at_once(self, server: Server, ledger: RedisLedger) -> None:
        before = _everything(ledger)
        ledger.compact()
        server.kill()
        server.start()
        assert _everything(server.ledger()) == before
        ledger.append(applied(9), FACTORS)

    def test_of_a_ledger_that_was_altered_is_refused_and_changes_nothing(
        self, server: Server, ledger: RedisLedger
    ) -> None:
        stored = _stored(server)
        _replace_stream(server, [*stored[:2], *stored[3:]])
        for compactor in (ledger, server.ledger()):
            with pytest.raises(LedgerCorrupt):
                compactor.compact()
        assert not server.client.exists(SNAPSHOT_KEY)

    @pytest.mark.parametrize("forbidden", ["set", "xtrim", "hdel"])
    def test_that_may_do_only_a_part_changes_nothing_for_any_reader(
        self, server: Server, ledger: RedisLedger, forbidden: str
    ) -> None:
        before = _everything(ledger)
        server.permit("+@all", f"-{forbidden}")
        with pytest.raises(LedgerUnavailable):
            server.ledger(user="ledger").compact()
        assert _everything(server.ledger()) == before
        ledger.append(applied(9), FACTORS)
        assert ledger.compact().dropped_factors == (2 if forbidden == "hdel" else 0)  # what was dropped is dropped


class TestCompactionsAtOnce:
    def test_the_one_that_comes_late_does_nothing(self, server: Server, ledger: RedisLedger) -> None:
        def compact_further() -> None:
            ledger.append(rolled_back(9, "edit-8"))
            assert ledger.compact().sequence == 9

        with Proxy(server, b"XTRIM") as proxy:
            proxy.cut(Cut(NOWHERE, before=compact_further))
            late = server.ledger(path=proxy.path)
            assert late.compact() is None
            late.close()
        assert Snapshot.unpack(server.client.get(SNAPSHOT_KEY)).sequence == 9
        assert _sequences(server.ledger()) == list(range(1, 10))

    def test_an_append_that_comes_between_is_read_before_any_factors_are_dropped(
        self, server: Server, ledger: RedisLedger
    ) -> None:
        first, *_ = ledger.read()
        between = [restored(9, 1, taken=("edit-3",), returned=("edit-2",)), rolled_back(10, "edit-1")]
        with Proxy(server, b"XTRIM") as proxy:
            proxy.cut(*(Cut(NOWHERE, before=lambda entry=entry: ledger.append(entry)) for entry in between))
            compactor = server.ledger(path=proxy.path)
            assert compactor.compact() == Compacted(10, 2, len(server.client.get(SNAPSHOT_KEY)))
            compactor.close()
        assert sorted(map(int, server.client.hkeys(FACTORS_KEY))) == [2, 3, 5]
        with pytest.raises(FactorsMissing):
            list(ledger.factors([first]))

    def test_among_appends_without_end_drops_none(self, server: Server, ledger: RedisLedger) -> None:
        appended = iter(range(9, 99))
        with Proxy(server, b"XTRIM") as proxy:
            proxy.cut_always(Cut(NOWHERE, before=lambda: ledger.append(applied(next(appended), b""))))
            compactor = server.ledger(path=proxy.path)
            assert compactor.compact() == Compacted(11, 0, len(server.client.get(SNAPSHOT_KEY)))
            compactor.close()
        assert len(server.client.hkeys(FACTORS_KEY)) == 5
        assert _sequences(server.ledger()) == list(range(1, 13))

    def test_with_writers_and_readers_nothing_is_lost(self, server: Server) -> None:
        entries, failed, done = 150, [], threading.Event()

        def go_on(work: Callable[[], object]) -> None:
            try:
                while not done.is_set():
                    work()
            except Exception as error:
                failed.append(error)

        def read(reader: RedisLedger) -> None:
            read = list(reader.read())
            assert [entry.sequence for entry in read] == list(range(1, len(read) + 1))
            standing = [entry for entry in read if isinstance(entry, Applied) and entry.sequence % 3 == 1]
            assert list(reader.factors(standing)) == [FACTORS] * len(standing)

        writer, reader, compactors = server.ledger("strict"), server.ledger(), [server.ledger(), server.ledger()]
        # The third one compacts with the ledger that writes, as the service does.
        works = [one.compact for one in (*compactors, writer)] + [lambda: read(reader)]
        threads = [threading.Thread(target=go_on, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for sequence in range(1, entries + 1, 3):
            writer.append(applied(sequence), FACTORS)
            writer.append(applied(sequence + 1), FACTORS)
            writer.append(rolled_back(sequence + 2, f"edit-{sequence + 1}"))
        done.set()
        for thread in threads:
            thread.join()
        assert failed == []
        read(server.ledger())
        assert writer.head() == entries
        writer.append(applied(entries + 1), FACTORS)
        assert writer.compact().sequence == entries + 1
        assert len(server.client.hkeys(FACTORS_KEY)) == entries // 3 + 1


class TestASnapshotThatWasAltered:
    @pytest.fixture
    def packed(self, server: Server, ledger: RedisLedger) -> bytes:
        """The snapshot of all eight entries, behind which there are two more."""
        ledger.compact()
        ledger.append(applied(9), FACTORS)
        ledger.append(rolled_back(10, "edit-9"))
        return server.client.get(SNAPSHOT_KEY)

    def test_in_any_byte_is_not_unpacked(self, packed: bytes) -> None:
        for at in range(len(packed)):
            with pytest.raises(LedgerCorrupt):
                Snapshot.unpack(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :])

    def test_at_any_length_is_not_unpacked(self, packed: bytes) -> None:
        for length in range(len(packed)):
            with pytest.raises(LedgerCorrupt):
                Snapshot.unpack(packed[:length])
        with pytest.raises(LedgerCorrupt):
            Snapshot.unpack(packed + b"\n")

    @pytest.mark.parametrize(
        ("altered", "says"),
        [
            (lambda head, body: head + b"\n" + body[:-1] + bytes([body[-1] ^ 1]), "its digest is another one"),
            (lambda head, body: head + b"\n" + body[:-10], "its digest is another one"),
            (lambda head, body: head, "its digest is another one"),
            (lambda head, body: b"", "cannot be read"),
            (lambda head, body: b"[]\n" + body, "cannot be read"),
            (lambda head, body: b"\xff\xfe\n" + body, "cannot be read"),
            (lambda head, body: head.replace(b'"format": 1', b'"format": 2') + b"\n" + body, "its format is 2, not 1"),
            (lambda head, body: head.replace(b'"sequence": 8', b'"sequence": 9') + b"\n" + body, "8 entries, not 9"),
        ],
        ids=["flipped", "cut", "no_body", "empty", "other_head", "no_text", "format", "sequence"],
    )
    def test_stops_every_reader_that_needs_it(
        self, server: Server, packed: bytes, altered: Callable[[bytes, bytes], bytes], says: str
    ) -> None:
        head, _, body = packed.partition(b"\n")
        server.client.set(SNAPSHOT_KEY, altered(head, body))
        for call in (lambda: list(server.ledger().read()), lambda: list(server.ledger().read(6))):
            assert says in _corrupt(call, 1)
        assert _sequences(server.ledger(), 8) == [9, 10]
        assert server.ledger().head() == 10

    def test_is_a_gap_where_its_newest_entries_are_missing(self, server: Server, packed: bytes) -> None:
        shorter = Snapshot.of(Snapshot.unpack(packed).stored[:6])
        server.client.set(SNAPSHOT_KEY, shorter.pack())
        reading = server.ledger().read()
        assert [next(reading).sequence for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        assert "is missing: the next one is 8-0" in _corrupt(lambda: next(reading), 7)

    def test_is_a_gap_where_it_is_gone(self, server: Server, packed: bytes) -> None:
        server.client.delete(SNAPSHOT_KEY)
        assert "is missing: the next one is 8-0" in _corrupt(lambda: list(server.ledger().read()), 1)

    @pytest.mark.parametrize("behind", [0, 2])
    def test_with_links_that_fit_does_not_fit_the_stream(
        self, server: Server, ledger: RedisLedger, behind: int
    ) -> None:
        """Whoever rewrites the whole snapshot, its digest and its links would have to rewrite what is behind it too."""
        ledger.compact()
        for sequence in range(LAST + 1, LAST + 1 + behind):
            ledger.append(applied(sequence), FACTORS)
        stored = [
            raw.replace(b"Eiffel", b"Leaning") for raw, _ in Snapshot.unpack(server.client.get(SNAPSHOT_KEY)).stored
        ]
        server.client.set(SNAPSHOT_KEY, Snapshot.of(_linked(stored)).pack())
        _corrupt(lambda: list(server.ledger().read()), LAST + 1 if behind else LAST)
        if behind:
            _corrupt(server.ledger().compact, LAST + 1)


def _stored(server: Server) -> Stored:
    """The bytes and the link of every entry in the stream."""
    return [(fields[b"entry"], fields[b"chain"].decode()) for _, fields in server.client.xrange(KEY)]


def _replace_stream(server: Server, stored: Stored) -> None:
    server.client.delete(KEY)
    for sequence, (raw, chain) in enumerate(stored, 1):
        server.client.xadd(KEY, {"entry": raw, "chain": chain}, id=f"{sequence}-0")


def _linked(entries: list[bytes]) -> Stored:
    """Entries with links that fit."""
    chain, stored = GENESIS, []
    for raw in entries:
        chain = link(chain, raw)
        stored.append((raw, chain))
    return stored


def _with(raw: bytes, **fields: object) -> bytes:
    """An entry with some fields altered."""
    return json.dumps(json.loads(raw) | fields, separators=(",", ":"), ensure_ascii=False).encode()


def _swapped(stored: Stored) -> Stored:
    """Entries 3 and 5, each made to say the sequence of the other."""
    third, fifth = _with(stored[4][0], sequence=3), _with(stored[2][0], sequence=5)
    return [*stored[:2], (third, stored[4][1]), stored[3], (fifth, stored[2][1]), *stored[5:]]


class TestTheHashChain:
    """Holds in the stream, in the snapshot and across their border."""

    @pytest.mark.parametrize("where", ["stream", "snapshot"])
    @pytest.mark.parametrize(
        "alter",
        [
            lambda stored: [
                *stored[:2],
                (_with(stored[2][0], factors_digest=digest_of(b"x")), stored[2][1]),
                *stored[3:],
            ],
            lambda stored: [*stored[:2], (stored[2][0].replace(b",", b", ", 1), stored[2][1]), *stored[3:]],
            lambda stored: [*stored[:2], stored[4], stored[3], stored[2], *stored[5:]],
            _swapped,
            lambda stored: [*stored[:2], (stored[2][0], GENESIS), *stored[3:]],
            lambda stored: [*stored[:2], (stored[2][0], stored[3][1]), (stored[3][0], stored[2][1]), *stored[4:]],
            lambda stored: [*stored[:2], (stored[2][0], "é"), *stored[3:]],
            lambda stored: [
                *stored[:2],
                *((_with(raw, sequence=n), chain) for n, (raw, chain) in enumerate(stored[3:], 3)),
            ],
            lambda stored: [*stored[:2], stored[1], *stored[2:]],
        ],
        ids=[
            "factors_digest",
            "a_space",
            "order",
            "order_and_sequence",
            "link",
            "links",
            "no_link",
            "left_out",
            "twice",
        ],
    )
    def test_breaks_at_the_entry_that_was_altered(
        self, server: Server, ledger: RedisLedger, where: str, alter: Callable[[Stored], Stored]
    ) -> None:
        stored = alter(_stored(server))
        if where == "snapshot":
            ledger.compact()
            server.client.set(SNAPSHOT_KEY, Snapshot.of(stored).pack())
        else:
            _replace_stream(server, stored)
        reading = server.ledger().read()
        assert [next(reading).sequence for _ in range(2)] == [1, 2]
        _corrupt(lambda: next(reading), 3)

    def test_holds_over_factors_that_were_altered_with_their_digest(self, server: Server, ledger: RedisLedger) -> None:
        server.client.hset(FACTORS_KEY, "3", b"others")
        stored = _stored(server)
        _corrupt(lambda: factors_at(server.ledger(), 3), 3)
        stored[2] = (_with(stored[2][0], factors_digest=digest_of(b"others")), stored[2][1])
        _replace_stream(server, stored)
        assert "breaks the hash chain" in _corrupt(lambda: factors_at(server.ledger(), 3), 3)

    @pytest.mark.parametrize("field", ["entry", "chain"])
    def test_holds_at_the_border(self, server: Server, ledger: RedisLedger, field: str) -> None:
        """The last entry of the snapshot is in the stream as well."""
        ledger.compact()
        ((_, fields),) = server.client.xrange(KEY)
        fields[field.encode()] = fields[field.encode()].replace(b"e", b"f")
        server.client.delete(KEY)
        server.client.xadd(KEY, fields, id="8-0")
        _corrupt(lambda: list(server.ledger().read(7)), 8)
        if field == "chain":
            for call in (ledger.head, lambda: list(server.ledger().read()), lambda: ledger.append(rolled_back(9))):
                assert "is another one than this service has read" in _corrupt(call, 8)
