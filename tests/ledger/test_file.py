"""A file holds a ledger byte for byte, is believed in nothing, and becomes the same ledger elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.ledger import (
    EmbeddedRedis,
    LedgerConflict,
    LedgerCorrupt,
    LedgerFile,
    LedgerFileError,
    RedisLedger,
    export_ledger,
    import_file,
    verify_ledger,
)
from service.ledger import file as ledger_file
from service.ledger.chain import GENESIS, link
from service.ledger.file import FORMAT
from service.ledger.records import encode
from service.ledger.verification import Stored, walk
from tests.ledger.entries import FACTORS, applied, batch, factors_at, restored, rolled_back

Connect = Callable[..., RedisLedger]
ODD = "naïve \x00 \u2028 \U0001f5fc é \u202e\x85 \r\n \"'{}"
"""With everything that ends a line for somebody."""


@pytest.fixture
def another(server: EmbeddedRedis, connect: Connect) -> Callable[[], RedisLedger]:
    """An empty ledger, as a service names them."""
    return lambda: connect(server, f"{uuid.uuid4().hex}:{'a' * 12}:{'b' * 12}")


@pytest.fixture
def filled(another: Callable[[], RedisLedger]) -> RedisLedger:
    """Nine entries, of which 3 to 5 are a batch, 2 and 6 have no factors, and 7 takes 1 back."""
    ledger = another()
    ledger.append(applied(1, prompt=ODD, metadata={ODD: [ODD, 1.5, None]}), FACTORS)
    ledger.append(applied(2, b""))
    ledger.append_all(batch(3, [FACTORS + b"3", FACTORS + b"4", FACTORS + b"5"]))
    ledger.append(applied(6, b""))
    ledger.append(rolled_back(7, "edit-1", reason=ODD))
    ledger.append(applied(8, FACTORS + b"8"), FACTORS + b"8")
    ledger.append(applied(9, FACTORS), FACTORS)
    return ledger


def write(ledger: RedisLedger, path: Path) -> LedgerFile:
    with path.open("wb") as out:
        export_ledger(ledger, out, packed=path.suffix == ".gz")
    return LedgerFile(path)


def contents(ledger: RedisLedger) -> list[Stored]:
    """Everything that a ledger holds, as it is stored."""
    return list(walk(ledger, 0, ledger.head()))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def rewrite(path: Path, lines: list[dict[str, Any] | bytes]) -> LedgerFile:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return LedgerFile(path)


def named(file: LedgerFile) -> dict[int, list[str]]:
    """What is wrong with a file, by entry."""
    problems: dict[int, list[str]] = {}
    for problem in file.verify().problems:
        problems.setdefault(problem.sequence, []).append(problem.what)
    return problems


class TestThereAndBack:
    @pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.jsonl.gz"])
    def test_gives_the_same_bytes_links_and_factors(self, filled, another, tmp_path, name):
        file, target = write(filled, tmp_path / name), another()
        assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b" if name.endswith(".gz") else b"{")
        assert import_file(file, target) == 9
        assert contents(target) == contents(filled)
        assert target.last() == filled.last() == (file.header.entries, file.header.chain)
        assert verify_ledger(target).problems == []

    def test_is_one_line_of_json_for_each_entry_behind_one_that_says_of_what(self, filled, tmp_path):
        write(filled, tmp_path / "file")
        header, *lines = lines_of(tmp_path / "file")
        assert header.pop("exported_at").endswith("Z")
        last, chain = filled.last()
        assert header == {
            "format": FORMAT,
            "namespace": filled.namespace,
            "model": "a" * 12,
            "editor": "b" * 12,
            "entries": last,
            "chain": chain,
        }
        assert [line.keys() for line in lines] == [{"entry", "chain", "factors"}] * 9
        assert [line["factors"] is None for line in lines] == [n in (2, 6, 7) for n in range(1, 10)]

    def test_keeps_what_was_compacted_and_needs_none_of_what_was_dropped(self, filled, another, tmp_path):
        filled.compact()
        filled.append(rolled_back(10, "edit-2"))
        target = another()
        import_file(write(filled, tmp_path / "file"), target)
        assert lines_of(tmp_path / "file")[1]["factors"] is None
        assert contents(target) == contents(filled)
        assert verify_ledger(target).problems == []

    def test_of_an_entry_of_an_earlier_version_changes_no_byte(self, another, tmp_path):
        older = encode(applied(1)).replace(b'"subject":null,', b"")
        first, second = another(), another()
        first.append_raw(1, [(older, FACTORS)])
        import_file(write(first, tmp_path / "file"), second)
        assert contents(second)[0].raw == older != encode(next(second.read()))

    def test_of_an_empty_ledger_is_an_empty_ledger(self, another, tmp_path):
        file, target = write(another(), tmp_path / "file"), another()
        assert (file.header.entries, file.header.chain) == (0, GENESIS)
        assert import_file(file, target) == 0
        assert target.head() == 0


class TestExport:
    def test_is_a_beginning_of_a_ledger_that_goes_on_meanwhile(self, filled, server, tmp_path):
        class Busy(RedisLedger):
            def page(self, after, **which):
                filled.append_all(batch(filled.head() + 1, [FACTORS] * 3))
                return super().page(after, **which)

        busy = Busy.connect(server.url, filled.namespace)
        file = write(busy, tmp_path / "file")
        busy.close()
        assert filled.head() == 12
        assert named(file) == {}
        assert [stored.raw for stored in file.read()] == [stored.raw for stored in contents(filled)[:9]]

    @pytest.mark.parametrize("name", ["ledger", "ledger.gz"])
    def test_is_whole_though_factors_are_dropped_meanwhile(self, filled, server, tmp_path, name):
        class Busy(RedisLedger):
            def raw_factors(self, sequences):
                """Those of 8 are read and those of 9 are not when both are dropped."""
                read = list(super().raw_factors(sequences[:8]))
                if filled.head() == 9:
                    filled.append(rolled_back(10, "edit-8"))
                    filled.append(rolled_back(11, "edit-9"))
                    filled.compact()
                return iter([*read, *super().raw_factors(sequences[8:])])

        busy = Busy.connect(server.url, filled.namespace)
        file = write(busy, tmp_path / name)
        busy.close()
        assert file.header.entries == 11
        assert named(file) == {}
        assert list(file.read()) == contents(filled)

    def test_of_a_ledger_that_is_damaged_stops_and_names_the_entry(self, filled, server, tmp_path):
        import redis

        with redis.Redis.from_url(server.url) as raw:
            raw.hdel(f"mend:{{{filled.namespace}}}:factors", "8")
            with pytest.raises(LedgerCorrupt, match="entry 8 of the ledger has lost its factors"):
                export_ledger(filled, io.BytesIO(), packed=False)
            raw.hset(f"mend:{{{filled.namespace}}}:factors", "4", b"other")
        with pytest.raises(LedgerCorrupt, match="entry 4 "):
            export_ledger(filled, io.BytesIO(), packed=False)


Change = Callable[[list[dict[str, Any]]], Any]


def _swap(lines: list[dict[str, Any]], one: int, other: int) -> None:
    lines[one], lines[other] = lines[other], lines[one]


def _set(sequence: int, **fields: Any) -> Change:
    return lambda lines: lines[sequence].update(fields)


def _say(sequence: int, old: str, new: str) -> Change:
    def change(lines: list[dict[str, Any]]) -> None:
        assert old in lines[sequence]["entry"]
        lines[sequence]["entry"] = lines[sequence]["entry"].replace(old, new)

    return change


def _rechain(lines: list[dict[str, Any]]) -> None:
    """Without entry 2, but with a chain that holds."""
    del lines[2]
    before = GENESIS
    for line in lines[1:]:
        before = line["chain"] = link(before, line["entry"].encode())


DAMAGES: dict[str, tuple[Change, dict[int, str]]] = {
    "altered": (_say(2, " Rome", " Oslo"), {2: "breaks the hash chain"}),
    "altered twice": (
        lambda lines: (_say(2, " Rome", " Oslo")(lines), _say(8, " Paris", " Bonn")(lines)),
        {2: "breaks the hash chain", 8: "breaks the hash chain"},
    ),
    "link altered": (_set(2, chain=GENESIS), {2: "breaks the hash chain"}),
    "last link altered": (_set(9, chain=GENESIS), {9: "breaks the hash chain"}),
    "first dropped": (lambda lines: lines.pop(1), {1: "is missing", 2: "cannot be checked"}),
    "dropped": (lambda lines: lines.pop(6), {6: "is missing", 7: "cannot be checked"}),
    "several dropped": (
        lambda lines: lines.__delitem__(slice(2, 5)),
        {2: "and those up to 4 are missing", 5: "cannot be checked"},
    ),
    "dropped in two places": (
        lambda lines: (lines.pop(8), lines.pop(1)),
        {1: "is missing", 2: "cannot be checked", 8: "is missing", 9: "cannot be checked"},
    ),
    "swapped": (
        lambda lines: _swap(lines, 6, 7),
        {6: "out of order", 7: "cannot be checked"},
    ),
    "doubled": (lambda lines: lines.insert(6, dict(lines[6])), {6: "a second time"}),
    "first doubled at the end": (lambda lines: lines.append(dict(lines[1])), {1: "behind entry 9, a second time"}),
    "cut short": (lambda lines: lines.__delitem__(slice(9, 10)), {9: "is missing"}),
    "cut to its first line": (lambda lines: lines.__delitem__(slice(1, 10)), {1: "and those up to 9 are missing"}),
    "cut in a batch": (
        lambda lines: lines.__delitem__(slice(4, 10)),
        {3: "number 1 of 3 of the batch batch-3, whose end is missing", 4: "and those up to 9 are missing"},
    ),
    "says a later number": (_say(2, '"sequence":2,', '"sequence":999,'), {2: "missing", 999: "cannot be checked"}),
    "says an earlier number": (_say(6, '"sequence":6,', '"sequence":1,'), {1: "stands behind entry 5"}),
    "says no number": (_say(6, '"sequence":6,', ""), {6: "sequence: Field required"}),
    "no entry in a batch": (_set(4, entry="{"), {4: "cannot be read"}),
    "no entry": (_set(6, entry="{"), {6: "cannot be read"}),
    "nothing": (_set(6, entry=""), {6: "cannot be read"}),
    "half a character": (lambda lines: lines.__setitem__(6, rb'{"entry": "\ud800", "chain": "", "factors": null}'),
                         {6: "cannot be read", 7: "cannot be checked"}),
    "no line of ours": (lambda lines: lines.__setitem__(6, b"[" * 5000), {6: "cannot be read", 7: "cannot be checked"}),
    "an empty line": (lambda lines: lines.insert(6, b""), {6: "cannot be read"}),
    "more in a line": (_set(6, more=1), {6: "cannot be read", 7: "cannot be checked"}),
    "factors altered": (_set(8, factors="b3RoZXI="), {8: "has factors with digest"}),
    "factors of another": (
        lambda lines: lines[8].update(factors=lines[1]["factors"]),
        {8: "has factors with digest"},
    ),
    "factors dropped": (_set(4, factors=None), {4: "has lost its factors"}),
    "factors that are no base64": (_set(8, factors="b3R*oZXI="), {8: "has factors that are no base64"}),
    "factors of a roll-back": (_set(7, factors="b3RoZXI="), {7: "applies no edit, but has factors"}),
    "chained anew without one": (_rechain, {2: "is missing", 9: "is not the one that should be the last"}),
    "entries in the first line": (_set(0, entries=8), {9: "stands behind entry 8, which should be the last one"}),
    "link in the first line": (_set(0, chain=GENESIS), {9: "is not the one that should be the last"}),
}  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize(("change", "expected"), DAMAGES.values(), ids=DAMAGES)
    def test_is_named_where_it_is_and_nowhere_else(self, filled, tmp_path, change, expected):
        write(filled, tmp_path / "file")
        lines = lines_of(tmp_path / "file")
        change(lines)
        file = rewrite(tmp_path / "file", lines)
        found = named(file)
        for sequence, what in expected.items():
            assert any(what in each for each in found.pop(sequence)), sequence
        assert found == {}
        with pytest.raises(LedgerFileError, match="is damaged: entry"):
            file.require_sound()

    def test_of_one_entry_leaves_the_others_good(self, filled, tmp_path):
        write(filled, tmp_path / "file")
        lines = lines_of(tmp_path / "file")
        _say(2, " Rome", " Oslo")(lines)
        checking = rewrite(tmp_path / "file", lines).verify()
        assert (checking.entries, checking.factors, checking.last) == (8, 6, 9)

    def test_in_the_middle_of_a_line_is_named(self, filled, tmp_path):
        file = write(filled, tmp_path / "file")
        file.path.write_bytes(file.path.read_bytes()[:-100])
        assert list(named(file)) == [9]

    def test_but_not_of_the_last_end_of_line_which_may_be_missing(self, filled, tmp_path):
        file = write(filled, tmp_path / "file")
        file.path.write_bytes(file.path.read_bytes()[:-1])
        assert named(file) == {}

    @pytest.mark.parametrize("cut", [1, 8, 9, 60])
    def test_of_gzip_that_is_cut_short_names_the_first_entry_that_is_lost(self, filled, tmp_path, cut):
        for sequence in range(10, 60):
            filled.append(applied(sequence, noise := os.urandom(2000)), noise)
        file = write(filled, tmp_path / "file.gz")
        file.path.write_bytes(file.path.read_bytes()[:-cut])
        (first, (what,)), *_ = named(file).items()
        assert first == (60 if cut < 10 else 59)
        assert "and those behind it cannot be read" in what

    def test_of_gzip_that_was_altered_is_named(self, filled, tmp_path):
        for sequence in range(10, 60):
            filled.append(applied(sequence, noise := os.urandom(2000)), noise)
        file = write(filled, tmp_path / "file.gz")
        packed = bytearray(file.path.read_bytes())
        packed[len(packed) // 2] ^= 0xFF
        file.path.write_bytes(packed)
        assert named(file)


class TestWhatIsNoLedger:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "is not a ledger"),
            (b"hello\n", "is not a ledger"),
            (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 1000, "is not a ledger"),
            (b"[" * 100_000, "is not a ledger"),
            (b"[]\n", "is not a ledger"),
            (b'{"format": 1}\n', "is not a ledger"),
            (b'{"format": "safetensors"}\n', "is not a ledger"),
            (b'{"format": "mend-ledger 2"}\n', "has the format 'mend-ledger 2', and this version"),
            (b'{"format": "mend-ledger 1"}\n', "has a damaged first line: namespace: Field required"),
            (b"\x1f\x8b", "cannot be read"),
            (b"\x1f\x8bhello, this is no gzip", "cannot be read"),
            (gzip.compress(b"hello\n", mtime=0), "is not a ledger"),
            (gzip.compress(b'{"format": "mend-ledger 3"}\n', mtime=0), "has the format 'mend-ledger 3'"),
            (gzip.compress(b'{"format": "mend-ledger 1"}\n' * 50, mtime=0)[:20], "cannot be read"),
        ],
    )
    def test_is_told_so_in_one_line(self, tmp_path, content, says):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(LedgerFileError) as error:
            LedgerFile(tmp_path / "file")
        assert str(error.value).startswith(f"{tmp_path / 'file'} {says}")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("namespace", "default"),
            ("namespace", f"mine:{'c' * 12}:{'b' * 12}"),
            ("model", "../../etc/pwd"),
            ("editor", "B" * 12),
            ("entries", -1),
            ("entries", "9"),
            ("chain", "sha256:1"),
            ("exported_at", "today"),
        ],
    )
    def test_with_a_first_line_that_is_damaged_says_what_of_it(self, filled, tmp_path, field, value):
        write(filled, tmp_path / "file")
        lines = lines_of(tmp_path / "file")
        lines[0][field] = value
        with pytest.raises(LedgerFileError, match=f"has a damaged first line: .*{field}"):
            rewrite(tmp_path / "file", lines)

    def test_is_told_of_what_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for name in ("nothing", ".", "pipe", "pipe/under"):
            with pytest.raises(LedgerFileError, match="is no file"):
                LedgerFile(tmp_path / name)


class TestImport:
    @pytest.mark.parametrize("there", [1, 2, 5, 6, 7, 8, 9])
    def test_goes_on_with_a_beginning(self, filled, another, tmp_path, there):
        file, target = write(filled, tmp_path / "file"), another()
        target.append_raw(1, [(stored.raw, stored.factors) for stored in contents(filled)[:there]])
        target.compact()
        assert import_file(file, target) == 9 - there
        assert target.last() == filled.last()
        assert [stored.raw for stored in contents(target)] == [stored.raw for stored in contents(filled)]
        assert import_file(file, target) == 0

    def test_goes_on_where_factors_were_dropped_that_what_follows_returns(self, filled, another, tmp_path):
        number = filled.head()
        filled.append(applied(number + 1), FACTORS)
        filled.append(rolled_back(number + 2, f"edit-{number + 1}"))
        filled.append(restored(number + 3, number + 1, returned=(f"edit-{number + 1}",)))
        file, target = write(filled, tmp_path / "file"), another()
        target.append_raw(1, [(stored.raw, stored.factors) for stored in contents(filled)[: number + 2]])
        assert target.compact().dropped_factors
        assert import_file(file, target) == 1
        assert factors_at(target, number + 1) == FACTORS
        assert verify_ledger(target).problems == []

    def test_refuses_a_ledger_that_has_diverged_and_names_the_first_entry_that_differs(self, filled, another, tmp_path):
        file, target = write(filled, tmp_path / "file"), another()
        target.append_raw(1, [(stored.raw, stored.factors) for stored in contents(filled)[:2]])
        for sequence in (3, 4, 5):
            target.append(applied(sequence), FACTORS)
        before = contents(target)
        with pytest.raises(LedgerFileError, match="entry 3 of the ledger") as error:
            import_file(file, target)
        assert error.value.facts["sequence"] == 3
        assert contents(target) == before

    def test_refuses_a_ledger_that_is_ahead_and_names_the_first_entry_that_it_has_more(self, filled, tmp_path):
        file = write(filled, tmp_path / "file")
        for sequence in (10, 11):
            filled.append(applied(sequence), FACTORS)
        with pytest.raises(LedgerFileError, match="goes on to 11: entry 10 is none of the file"):
            import_file(file, filled)
        assert filled.head() == 11

    def test_of_a_file_that_was_changed_since_it_was_verified_stops_before_what_was(
        self, filled, another, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(ledger_file, "PIECE_BYTES", 1)
        file, target = write(filled, tmp_path / "file"), another()
        file.require_sound()
        lines = lines_of(file.path)
        _say(6, " Rome", " Oslo")(lines)
        rewrite(file.path, lines)
        with pytest.raises(LedgerFileError, match="entry 6 was altered"):
            import_file(file, target)
        assert target.head() == 5
        assert verify_ledger(target).problems == []

    def test_into_a_ledger_that_somebody_else_appends_to_stops(self, filled, another, server, tmp_path, monkeypatch):
        monkeypatch.setattr(ledger_file, "PIECE_BYTES", 1)
        file, target = write(filled, tmp_path / "file"), another()

        class Raced(RedisLedger):
            def append_raw(self, first, stored):
                if first == 3:
                    target.append(applied(3), FACTORS)
                super().append_raw(first, stored)

        raced = Raced.connect(server.url, target.namespace)
        with pytest.raises(LedgerConflict):
            import_file(file, raced)
        raced.close()
        assert target.head() == 3


class TestPieces:
    """What is there after each piece, should the import end with it."""

    @pytest.fixture
    def ends(self, server: EmbeddedRedis, another: Callable[[], RedisLedger]) -> Callable[[LedgerFile], list[int]]:
        def ends(file: LedgerFile) -> list[int]:
            heads: list[int] = []

            class Watched(RedisLedger):
                def append_raw(self, first, stored):
                    super().append_raw(first, stored)
                    heads.append(self.head())

            target = Watched.connect(server.url, another().namespace)
            import_file(file, target)
            assert target.last() == (file.header.entries, file.header.chain)
            target.close()
            return heads

        return ends

    def test_are_of_so_many_bytes(self, filled, ends, tmp_path, monkeypatch):
        file = write(filled, tmp_path / "file")
        assert ends(file) == [9]
        monkeypatch.setattr(ledger_file, "PIECE_BYTES", 2 * len(FACTORS))
        heads = ends(file)
        assert heads[-1] == 9
        assert 1 < len(heads) < 9

    def test_never_end_inside_a_batch(self, filled, ends, tmp_path, monkeypatch):
        monkeypatch.setattr(ledger_file, "PIECE_BYTES", 1)
        monkeypatch.setattr(ledger_file, "MOST_BYTES", 1)
        assert ends(write(filled, tmp_path / "file")) == [1, 2, 5, 6, 7, 8, 9]

    def test_end_where_no_factors_are_lacking_unless_they_become_too_large(self, filled, ends, tmp_path, monkeypatch):
        filled.compact()
        file = write(filled, tmp_path / "file")
        monkeypatch.setattr(ledger_file, "PIECE_BYTES", 1)
        assert ends(file) == [7, 8, 9]  # edit 1 was rolled back by entry 7
        monkeypatch.setattr(ledger_file, "MOST_BYTES", 2 * len(FACTORS))
        assert ends(file) == [5, 7, 8, 9]
