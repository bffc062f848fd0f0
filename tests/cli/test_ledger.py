"""`mend ledger`: of a Redis that nobody uses, of one that a service is using, and of none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from editors.base_model import load_base_model
from service.cli import main
from service.ledger import EmbeddedRedis, RedisLedger
from tests.e2e.server import READY_WITHIN_S, Server, serving
from tests.ledger.entries import FACTORS, applied, batch, rolled_back
from tests.service_fixtures import Folders, find_edits, small_checkpoint, small_engine

MEND = [sys.executable, "-c", "from service.cli import main; main()", "ledger"]
ENDS_WITHIN_S = 240
MODEL, EDITOR = "a" * 12, "b" * 12
NAME = f"default:{MODEL}:{EDITOR}"


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """Why it did nothing: the last line, behind what it was about to do."""
        assert (self.status, self.out) == (1, ""), self
        *before, last = self.err.splitlines()
        assert all(line.startswith("mend: ") and line.endswith(" …") for line in before), self
        assert last.startswith("mend: "), self
        return last.removeprefix("mend: ")


Mend = Callable[..., Ended]


@pytest.fixture
def mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Mend:
    """`mend ledger …` in the test's folder."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["mend", "ledger", *map(str, arguments)])
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = (said.decode() for said in capsysbinary.readouterr())
        why = end.value.code
        return Ended(1, out, f"{err}{why}\n") if isinstance(why, str) else Ended(why or 0, out, err)

    for name in [name for name in os.environ if name.startswith("MEND_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return run


def process(*arguments: object, **environment: str) -> Ended:
    """The same as a process."""
    ended = subprocess.run(
        [*MEND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=ENDS_WITHIN_S,
        check=False,
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def fill(ledger: RedisLedger) -> None:
    """Six entries; four edits stand and three are active."""
    ledger.append(applied(1), FACTORS)
    ledger.append_all(batch(2, [FACTORS + b"2", FACTORS + b"3", FACTORS + b"4"]))
    ledger.append(rolled_back(5, "edit-3"))
    ledger.append(applied(6, b"", supersedes=("edit-1",)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder `data` of a service that does not run, as the settings have it, with one ledger."""
    with EmbeddedRedis(tmp_path / "data") as server, closing(RedisLedger.connect(server.url, NAME)) as ledger:
        fill(ledger)
    return tmp_path / "data"


def others(folder: Path, *names: str) -> None:
    """More ledgers beside that one, of one entry each."""
    with EmbeddedRedis(folder) as server:
        for name in names:
            with closing(RedisLedger.connect(server.url, name)) as ledger:
                ledger.append(applied(1), FACTORS)


def last_of(folder: Path, name: str = NAME) -> tuple[int, str]:
    with EmbeddedRedis(folder) as server, closing(RedisLedger.connect(server.url, name)) as ledger:
        return ledger.last()


class TestList:
    def test_tells_of_every_ledger(self, mend, data):
        others(data, f"tenant:{MODEL}:{EDITOR}", "not:of:a service")
        ended = mend("list")
        first, second = ended.out.splitlines()
        assert (ended.status, ended.err) == (0, "")
        assert first.startswith(f"{NAME}  6 entries, 3 active edits, 0.0 MB, last at 2")
        assert second.startswith(f"tenant:{MODEL}:{EDITOR}  1 entries, 1 active edits")

    def test_as_json_for_a_program(self, mend, data):
        (facts,) = json.loads(mend("list", "--json").out)
        assert facts.keys() == {"namespace", "entries", "active_edits", "size_bytes", "last_entry_at"}
        assert (facts["namespace"], facts["entries"], facts["active_edits"]) == (NAME, 6, 3)
        assert 4 * len(FACTORS) < facts["size_bytes"] < 10 * len(FACTORS)

    def test_tells_of_one_that_is_damaged_and_of_the_others(self, mend, data):
        others(data, f"tenant:{MODEL}:{EDITOR}")
        with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as raw:
            raw.xdel(f"mend:{{{NAME}}}:entries", "3-0")
        first, second = mend("list").out.splitlines()
        assert first == f"{NAME}  damaged: entry 3 of the ledger is missing: the next one is 4-0"
        assert "1 entries" in second
        assert json.loads(mend("list", "--json").out)[0].keys() == {"namespace", "problem"}

    def test_of_none_says_so(self, mend, tmp_path):
        with EmbeddedRedis(tmp_path / "data"):
            pass
        ended = mend("list")
        assert (ended.status, ended.out, ended.err) == (0, "", "mend: this Redis holds no ledger\n")
        assert json.loads(mend("list", "--json").out) == []


class TestWhichRedis:
    def test_is_that_of_the_settings(self, mend, data, server, monkeypatch):
        name = f"which:{MODEL}:{EDITOR}"
        with closing(RedisLedger.connect(server.url, name)) as ledger:
            ledger.append(applied(1), FACTORS)
        assert name not in mend("list").out
        assert name in mend("list", "--redis-url", server.url).out
        monkeypatch.setenv("MEND_REDIS_URL", server.url)
        assert name in mend("list").out

    @pytest.mark.parametrize("command", [["list"], ["export", "file"], ["verify"], ["compact"]])
    def test_is_not_made_where_there_is_none(self, mend, tmp_path, command):
        assert mend(*command).refusal.startswith("there is no ledger in data; point MEND_DATA_DIR at")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("command", [["list"], ["export", "file"], ["verify"], ["compact"]])
    def test_that_does_not_answer_is_named(self, mend, command):
        assert "127.0.0.1:1 cannot be reached" in mend(*command, "--redis-url", "redis://127.0.0.1:1/0").refusal

    def test_settings_that_make_no_sense_are_named(self, mend):
        assert mend("list", "--namespace", "a:b").refusal.startswith("MEND_NAMESPACE is 'a:b'")


class TestWhichLedger:
    @pytest.fixture(autouse=True)
    def several(self, data: Path) -> None:
        others(data, f"default:{MODEL}:{'c' * 12}", f"tenant:{MODEL}:{'d' * 12}")

    def chosen(self, ended: Ended) -> str:
        assert ended.status == 0, ended
        return json.loads(ended.out)["ledger"]

    def test_is_the_only_one_of_the_namespace(self, mend):
        assert self.chosen(mend("verify", "--json", "--namespace", "tenant")) == f"tenant:{MODEL}:{'d' * 12}"

    @pytest.mark.parametrize("name", [NAME, EDITOR, "b", f"default:{MODEL}:b"])
    def test_is_the_one_of_that_name_beginning_or_end(self, mend, name):
        assert self.chosen(mend("verify", "--json", "--ledger", name)) == NAME

    def test_is_the_one_of_that_name_though_another_ends_so(self, mend, data):
        others(data, f"not-{NAME}")
        assert self.chosen(mend("verify", "--json", "--ledger", NAME)) == NAME

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ([], "2 ledgers of the namespace 'default'; choose with --ledger one of"),
            (["--ledger", "default"], "2 ledgers whose name is, begins or ends with 'default'"),
            (["--ledger", "nobody"], "no ledgers whose name is, begins or ends with 'nobody'"),
            (["--namespace", "nobody"], "no ledgers of the namespace 'nobody'"),
        ],
    )
    @pytest.mark.parametrize("command", [["verify"], ["export", "file"], ["compact"]])
    def test_must_be_one_or_all_are_named(self, mend, command, flags, says):
        refusal = mend(*command, *flags).refusal
        assert says in refusal
        assert NAME in refusal
        assert f"default:{MODEL}:{'c' * 12}" in refusal
        assert (f"tenant:{MODEL}:{'d' * 12}" in refusal) == ("nobody" in says)

    def test_cannot_be_one_where_there_is_none(self, mend, tmp_path):
        with EmbeddedRedis(tmp_path / "empty"):
            pass
        assert "holds no ledger at all" in mend("verify", "--data-dir", "empty").refusal


class TestExport:
    @pytest.mark.parametrize("name", ["ledger.jsonl", "ledger.jsonl.gz"])
    def test_and_import_elsewhere_gives_the_same_ledger(self, mend, data, tmp_path, name):
        ended = mend("export", name)
        assert (ended.status, ended.out) == (0, f"{name}\n")
        sequence, chain = last_of(data)
        assert f"{sequence} entries, up to the link {chain}" in ended.err
        ended = mend("import", name, "--data-dir", "other")
        assert ended.status == 0, ended.err
        assert ended.out == f"{NAME}  6 of 6 entries appended, up to the link {chain}\n"
        assert last_of(tmp_path / "other") == (sequence, chain)
        assert mend("import", name, "--data-dir", "other").out.startswith(f"{NAME}  0 of 6 entries appended")
        assert mend("import", name).out.startswith(f"{NAME}  0 of 6 entries appended")

    def test_to_stdout_is_the_same_file(self, mend, data):
        mend("export", "file")
        ended = mend("export", "-")
        assert ended.out.splitlines()[1:] == Path("file").read_text().splitlines()[1:]
        assert len(ended.out.splitlines()) == 7
        assert not Path("-").exists()

    def test_replaces_a_file_only_by_force(self, mend, data):
        Path("file").write_text("mine")
        assert "replace it with --force" in mend("export", "file").refusal
        assert Path("file").read_text() == "mine"
        assert mend("export", "file", "--force").status == 0
        assert len(Path("file").read_text().splitlines()) == 7

    def test_replaces_nothing_but_a_file(self, mend, data):
        Path("folder").mkdir()
        os.mkfifo("pipe")
        for name in ("folder", "pipe"):
            assert "is there already; choose another file" in mend("export", name, "--force").refusal

    def test_that_cannot_be_written_says_so(self, mend, data):
        assert "nowhere/file cannot be written: No such file" in mend("export", "nowhere/file").refusal

    def test_of_a_damaged_ledger_names_the_entry_and_leaves_what_was_there(self, mend, data, tmp_path):
        with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as raw:
            raw.hdel(f"mend:{{{NAME}}}:factors", "4")
        Path("file").write_text("mine")
        for file in ("file", "-"):
            assert "entry 4 of the ledger has lost its factors" in mend("export", file, "--force").refusal
        assert Path("file").read_text() == "mine"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "file"]


class TestImport:
    def test_becomes_the_ledger_of_the_namespace_of_the_settings_and_says_so(self, mend, data):
        mend("export", "file")
        ended = mend("import", "file", "--namespace", "tenant")
        assert ended.status == 0
        assert f"{NAME} becomes tenant:{MODEL}:{EDITOR}, as MEND_NAMESPACE says" in ended.err
        assert last_of(data, f"tenant:{MODEL}:{EDITOR}") == last_of(data)

    def test_of_what_is_not_whole_imports_nothing_and_makes_no_folder(self, mend, data, tmp_path):
        mend("export", "file")
        lines = Path("file").read_text().splitlines(keepends=True)
        Path("short").write_text("".join(lines[:-1]))
        Path("other").write_text("hello\n")
        Path("future").write_text(lines[0].replace("mend-ledger 1", "mend-ledger 2"))
        for name, says in {
            "short": "short is damaged: entry 6 is missing; `mend ledger verify`",
            "other": "other is not a ledger",
            "future": "future has the format 'mend-ledger 2'",
            "nothing": "nothing is no file",
        }.items():
            assert says in mend("import", name, "--data-dir", "new").refusal
        assert not (tmp_path / "new").exists()

    def test_into_a_ledger_that_has_diverged_or_is_ahead_says_where(self, mend, data):
        mend("export", "file")
        with EmbeddedRedis(data) as server:
            with closing(RedisLedger.connect(server.url, NAME)) as ledger:
                ledger.append(applied(7), FACTORS)
                first = next(ledger.read())
            with closing(RedisLedger.connect(server.url, f"tenant:{MODEL}:{EDITOR}")) as ledger:
                ledger.append(first, FACTORS)
                ledger.append(applied(2), FACTORS)
        before = last_of(data)
        assert "goes on to 7: entry 7 is none of the file" in mend("import", "file").refusal
        assert "entry 2 of the ledger tenant" in mend("import", "file", "--namespace", "tenant").err
        assert last_of(data) == before

    def test_into_a_redis_that_may_lose_it_says_so_or_refuses(self, mend, data, tmp_path):
        mend("export", "file")
        with EmbeddedRedis(tmp_path / "weak") as server:
            with redis.Redis.from_url(server.url) as raw:
                raw.config_set("appendonly", "no")
            refusal = mend("import", "file", "--redis-url", server.url, "--durability", "strict").refusal
            assert "strict durability" in refusal
            ended = mend("import", "file", "--redis-url", server.url)
        assert ended.status == 0
        assert "mend: warning: Redis may lose edits: its appendonly is no" in ended.err

    def test_goes_on_after_a_crash(self, mend, tmp_path):
        large = FACTORS * 2000  # two make a piece
        with EmbeddedRedis(tmp_path / "data") as server, closing(RedisLedger.connect(server.url, NAME)) as ledger:
            for sequence in range(1, 9):
                ledger.append(applied(sequence, large), large)
        assert mend("export", "file.gz").status == 0
        crashed = process(
            "import", tmp_path / "file.gz", "--data-dir", tmp_path / "new", MEND_FAILPOINT="append=kill@3"
        )
        assert crashed.status == -signal.SIGKILL
        assert last_of(tmp_path / "new")[0] == 4
        ended = mend("import", "file.gz", "--data-dir", "new")
        assert ended.out.startswith(f"{NAME}  4 of 8 entries appended")
        assert last_of(tmp_path / "new") == last_of(tmp_path / "data")
        assert mend("verify", "--data-dir", "new").status == 0


class TestVerify:
    def test_of_a_sound_ledger_counts_and_ends_well(self, mend, data):
        chain = last_of(data)[1]
        ended = mend("verify")
        assert (ended.status, ended.err) == (0, f"mend: verifying {NAME} …\n")
        assert ended.out == f"6 of 6 entries and 4 factors are good, up to the link {chain}\n"
        mend("export", "file")
        ended = mend("verify", "file")
        assert (ended.status, ended.err) == (0, "")
        assert ended.out == f"6 of 6 entries and 4 factors are good, up to the link {chain}\n"

    def test_of_a_damaged_one_names_every_entry_and_ends_with_status_1(self, mend, data):
        mend("export", "file")
        Path("file").write_text(Path("file").read_text().replace("edit-1", "edit-X").replace(" Paris", " Bonn"))
        with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as raw:
            raw.hset(f"mend:{{{NAME}}}:factors", "2", b"other")
            raw.hdel(f"mend:{{{NAME}}}:factors", "4")
            raw.xdel(f"mend:{{{NAME}}}:entries", "6-0")
        ended = mend("verify")
        assert ended.status == 1
        *problems, summary = ended.out.splitlines()
        assert [problem.split(" has ")[0] for problem in problems] == ["entry 2", "entry 4", "entry 6 is missing"]
        assert summary == "4 of 6 entries and 2 factors are good"
        ended = mend("verify", "file")
        assert ended.status == 1
        assert [line.split()[1] for line in ended.out.splitlines()[:-1]] == ["1", "2", "3", "4", "6"]

    def test_as_json_for_a_program(self, mend, data):
        mend("export", "file")
        lines = Path("file").read_text().splitlines(keepends=True)
        Path("file").write_text("".join(lines[:-1]))
        ended = mend("verify", "file", "--json")
        assert ended.status == 1
        assert json.loads(ended.out) == {
            "ledger": "file",
            "ok": False,
            "entries": 6,
            "good_entries": 5,
            "good_factors": 4,
            "chain": last_of(data)[1],
            "problems": [{"sequence": 6, "what": "is missing"}],
        }
        found = json.loads(mend("verify", "--json").out)
        assert (found["ledger"], found["ok"], found["good_entries"]) == (NAME, True, 6)

    def test_of_a_file_takes_no_ledger(self, mend, data):
        mend("export", "file")
        assert "leave one of them out" in mend("verify", "file", "--ledger", NAME).refusal

    def test_of_what_is_no_ledger_says_so(self, mend):
        Path("file").write_text("hello\n")
        assert mend("verify", "file").refusal.startswith("file is not a ledger")


class TestCompact:
    def test_tells_what_it_did_and_loses_nothing_that_stands(self, mend, data):
        before = last_of(data)
        ended = mend("compact")
        assert (ended.status, ended.err) == (0, f"mend: compacting {NAME} …\n")
        assert ended.out.startswith(f"{NAME}  entries up to 6 are a snapshot of ")
        assert "the factors of 1 edits that were rolled back are dropped" in ended.out
        assert last_of(data) == before
        assert "6 of 6 entries and 3 factors are good" in mend("verify").out

    def test_as_json_for_a_program(self, mend, data):
        facts = json.loads(mend("compact", "--json").out)
        assert facts.pop("snapshot_bytes") > 0
        assert facts == {"namespace": NAME, "compacted": True, "sequence": 6, "dropped_factors": 1}

    def test_again_has_nothing_to_do(self, mend, data):
        mend("compact")
        assert mend("compact").out == f"{NAME}  there is nothing to compact\n"
        assert json.loads(mend("compact", "--json").out) == {"namespace": NAME, "compacted": False}

    def test_of_a_damaged_ledger_names_the_entry_and_changes_nothing(self, mend, data):
        with EmbeddedRedis(data) as server, redis.Redis.from_url(server.url) as raw:
            raw.xdel(f"mend:{{{NAME}}}:entries", "3-0")
        assert "entry 3 of the ledger is missing" in mend("compact").refusal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def environment(folders: Folders) -> dict[str, str]:
    settings = {**folders.settings(Path()), "compact_every": 0}
    variables = {f"MEND_{name.upper()}": str(value) for name, value in settings.items() if name != "data_dir"}
    return {**variables, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def edits(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Edits that take, one after the other."""
    folder = tmp_path_factory.mktemp("search")
    base = load_base_model(str(folders.base_model))
    with EmbeddedRedis(folder) as server, closing(RedisLedger.connect(server.url, "edits")) as ledger:
        found = find_edits(small_engine(base, small_checkpoint(folder / "editor", base), ledger))
    return [{"prompt": edit.prompt, "correction": edit.correction} for edit in found]


@pytest.fixture
def live(environment: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "live", tmp_path / "log", **environment) as server:
        yield server


def make(server: Server, edit: dict[str, str]) -> str:
    answer = server.client.post("/edits", json=edit)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def test_of_a_service_that_runs_is_served_elsewhere_bit_for_bit(live, environment, edits, mend, tmp_path):
    first = make(live, edits[0])
    make(live, edits[1])
    assert live.client.delete(f"/edits/{first}").status_code == 200
    assert json.loads(mend("compact", "--json", "--data-dir", "live").out)["dropped_factors"] == 1
    revision = live.get("/revision")
    ended = process("export", tmp_path / "file.gz", "--data-dir", tmp_path / "live")
    assert (ended.status, ended.out) == (0, f"{tmp_path / 'file.gz'}\n"), ended
    assert live.get("/readyz")["status"] == "ready"

    assert mend("import", "file.gz", "--data-dir", "other").status == 0
    with serving(tmp_path / "other", tmp_path / "log2", **environment) as server:
        assert server.get("/revision") == revision
        assert server.get("/model")["active_edits"] == 1

        # What is imported into the ledger of a service that runs is followed.
        make(live, edits[2])
        assert mend("export", "file.gz", "--force", "--data-dir", "live").status == 0
        assert "1 of 4 entries appended" in mend("import", "file.gz", "--data-dir", "other").out
        deadline = time.monotonic() + READY_WITHIN_S
        while server.get("/revision") != live.get("/revision") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.get("/revision") == live.get("/revision") != revision
        for folder in ("live", "other"):
            ended = mend("verify", "--data-dir", folder)
            assert ended.status == 0, ended
            assert ended.out.startswith("4 of 4 entries and 2 factors are good")
            (facts,) = json.loads(mend("list", "--json", "--data-dir", folder).out)
            assert facts["active_edits"] == 2
