"""The server lives as long as the service, and what it acknowledged lives longer than both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from service.ledger import EmbeddedRedis, EmbeddedRedisError, LedgerUnavailable, RedisLedger, embedded
from tests.ledger.entries import FACTORS, applied, stored_in

Connect = Callable[..., RedisLedger]

SERVICE = """
import sys
from pathlib import Path
from service.ledger import EmbeddedRedis, RedisLedger
from tests.ledger.entries import FACTORS, applied, stored_in
server = EmbeddedRedis(Path(sys.argv[1]))
server.start()
RedisLedger.connect(server.url, "crash").append(applied(1, edit_id="before-the-crash"), FACTORS)
print(server.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def service(data_dir: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that runs a server on this folder, has appended one entry, and ends when its stdin does."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(data_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        server_pid = None
        try:
            server_pid = int(process.stdout.readline())
            yield process, server_pid
        finally:
            process.kill()
            if server_pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(server_pid, signal.SIGCONT)  # a test may have stopped it; stopped, it could not end


def ended(server: EmbeddedRedis, within_s: float = 10.0) -> bool:
    """A killed process cannot be waited for before the last of its threads is gone too."""
    deadline = time.monotonic() + within_s
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    return not server.alive


def gone(pid: int, within_s: float = 10.0) -> bool:
    """A process that nobody has reaped yet counts as gone: it holds nothing any more."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


class TestStart:
    def test_keeps_every_write_on_disk_and_listens_to_nobody_else(self, own_server: EmbeddedRedis) -> None:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "port": "0",
            "maxmemory-policy": "noeviction",
        }
        with redis.Redis.from_url(own_server.url, decode_responses=True) as raw:
            actual = {name: raw.config_get(name)[name] for name in wanted}
            socket = Path(raw.config_get("unixsocket")["unixsocket"])
        assert actual == wanted
        assert socket.stat().st_mode & 0o077 == 0

    def test_again_does_nothing(self, own_server: EmbeddedRedis) -> None:
        pid = own_server.pid
        own_server.start()
        assert own_server.ensure_running() is False
        assert own_server.pid == pid

    def test_is_out_of_reach_of_ctrl_c(self, own_server: EmbeddedRedis) -> None:
        assert own_server.pid is not None
        assert os.getsid(own_server.pid) != os.getsid(0)

    def test_outlives_the_thread_that_started_it(self, tmp_path: Path) -> None:
        server = EmbeddedRedis(tmp_path)
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        try:
            assert server.pid is not None
            assert not gone(server.pid, within_s=0.5)
        finally:
            server.stop()

    def test_folder_names_with_spaces_quotes_and_accents(self, tmp_path: Path, connect: Connect) -> None:
        with EmbeddedRedis(tmp_path / "dé \"pôt\" 'x' %20?#") as server:
            connect(server).append(applied(1), FACTORS)

    def test_a_folder_too_deep_for_a_socket(self, tmp_path: Path, connect: Connect) -> None:
        deep = tmp_path / ("d" * 120)
        with EmbeddedRedis(deep) as server:
            connect(server, "deep").append(applied(1), FACTORS)
            url, folder = server.url, Path(server.url.removeprefix("unix://")).parent
            assert folder.stat().st_mode & 0o777 == 0o700
        assert not folder.exists()
        with EmbeddedRedis(deep) as server:
            assert server.url == url
            assert connect(server, "deep").head() == 1

    def test_a_socket_folder_of_someone_else_is_refused(self, tmp_path: Path) -> None:
        server = EmbeddedRedis(tmp_path / ("d" * 120))
        folder = Path(server.url.removeprefix("unix://")).parent
        folder.mkdir()
        folder.chmod(0o777)
        try:
            with pytest.raises(EmbeddedRedisError, match="belongs to someone else"):
                server.start()
            assert folder.exists()
        finally:
            folder.rmdir()


class TestCannotStart:
    @pytest.mark.parametrize("content", [None, "", "#!/bin/sh\n"], ids=["missing", "empty", "not_executable"])
    def test_without_an_executable(self, tmp_path: Path, content: str | None) -> None:
        binary = tmp_path / "redis-server"
        if content is not None:
            binary.write_text(content)
        with pytest.raises(EmbeddedRedisError, match="not an executable file"):
            EmbeddedRedis(tmp_path / "data", binary).start()

    @pytest.mark.parametrize(
        ("content", "says"),
        [("#!/bin/sh\necho out of luck; exit 3\n", "out of luck"), ("\x7fELF no program", "cannot execute")],
        ids=["exits", "not_a_program"],
    )
    def test_with_one_that_ends_tells_its_last_words(self, tmp_path: Path, content: str, says: str) -> None:
        binary = tmp_path / "redis-server"
        binary.write_text(content)
        binary.chmod(0o755)
        before = time.monotonic()
        with pytest.raises(EmbeddedRedisError, match=says) as error:
            EmbeddedRedis(tmp_path / "data", binary).start()
        assert time.monotonic() - before < 5
        assert says in error.value.facts["log"][-1]

    def test_with_one_that_never_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "START_TIMEOUT_S", 0.3)
        binary = tmp_path / "redis-server"
        binary.write_text("#!/bin/sh\necho dreaming\nexec sleep 60\n")
        binary.chmod(0o755)
        server = EmbeddedRedis(tmp_path / "data", binary)
        with pytest.raises(EmbeddedRedisError, match="dreaming"):
            server.start()
        assert not server.alive

    def test_where_the_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("")
        with pytest.raises(EmbeddedRedisError, match="cannot be used"):
            EmbeddedRedis(tmp_path / "data").start()

    def test_and_leaves_the_folder_free(self, tmp_path: Path) -> None:
        with pytest.raises(EmbeddedRedisError):
            EmbeddedRedis(tmp_path, tmp_path / "missing").start()
        with EmbeddedRedis(tmp_path) as server:
            assert server.alive

    def test_from_append_only_files_that_are_damaged(self, tmp_path: Path, connect: Connect) -> None:
        with EmbeddedRedis(tmp_path) as server:
            for sequence in (1, 2, 3):
                connect(server, "damaged").append(applied(sequence), FACTORS)
        (log,) = (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")
        log.write_bytes(log.read_bytes().replace(b"*7\r\n", b"?7\r\n", 2))
        with pytest.raises(EmbeddedRedisError) as error:
            EmbeddedRedis(tmp_path).start()
        assert any("append only file" in line.lower() for line in error.value.facts["log"])


class TestOneServicePerFolder:
    def test_a_second_one_is_refused_and_the_first_not_disturbed(
        self, own_server: EmbeddedRedis, tmp_path: Path
    ) -> None:
        second = EmbeddedRedis(tmp_path)
        with pytest.raises(EmbeddedRedisError, match=f"in use by another service .*{os.getpid()}"):
            second.start()
        second.stop()
        with redis.Redis.from_url(own_server.url) as raw:
            assert raw.ping()

    def test_of_another_process_too(self, tmp_path: Path) -> None:
        with service(tmp_path) as (process, _), pytest.raises(EmbeddedRedisError, match=str(process.pid)):
            EmbeddedRedis(tmp_path).start()

    def test_stopped_it_may_be_followed(self, tmp_path: Path) -> None:
        first = EmbeddedRedis(tmp_path)
        first.start()
        first.stop()
        first.stop()
        assert not first.alive
        assert first.pid is None
        with pytest.raises(EmbeddedRedisError, match="not been started"):
            first.ensure_running()
        with EmbeddedRedis(tmp_path) as second:
            assert second.alive


class TestServerKilled:
    def test_comes_back_at_the_same_url_with_every_acknowledged_entry(
        self, own_server: EmbeddedRedis, connect: Connect
    ) -> None:
        ledger, url, pid = connect(own_server), own_server.url, own_server.pid
        assert pid is not None
        entries = [applied(sequence) for sequence in range(1, 6)]
        for entry in entries:
            ledger.append(entry, FACTORS)
        os.kill(pid, signal.SIGKILL)
        assert ended(own_server)
        with pytest.raises(LedgerUnavailable):
            ledger.head()
        assert own_server.ensure_running() is True
        assert own_server.url == url
        assert [entry for entry, _ in stored_in(ledger)] == entries
        ledger.append(applied(6), FACTORS)

    def test_a_write_that_was_cut_off_does_not_stop_the_next_start(self, tmp_path: Path, connect: Connect) -> None:
        with EmbeddedRedis(tmp_path) as server:
            for sequence in (1, 2):
                connect(server, "cut").append(applied(sequence), FACTORS)
        (log,) = (tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")
        os.truncate(log, log.stat().st_size - 100)
        with EmbeddedRedis(tmp_path) as server:
            ledger = connect(server, "cut")
            assert [entry.sequence for entry in ledger.read()] == [1]
            ledger.append(applied(2), FACTORS)

    def test_brought_back_by_a_short_thread_it_stays(self, own_server: EmbeddedRedis) -> None:
        killed = own_server.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        assert ended(own_server)
        thread = threading.Thread(target=own_server.ensure_running)
        thread.start()
        thread.join()
        assert own_server.pid is not None
        assert not gone(own_server.pid, within_s=0.5)


class TestServiceKilled:
    def test_takes_its_server_along_and_loses_nothing(self, tmp_path: Path, connect: Connect) -> None:
        with service(tmp_path) as (process, server_pid):
            process.kill()
            process.wait()
            with EmbeddedRedis(tmp_path) as server:
                assert server.pid != server_pid
                assert gone(server_pid, within_s=0.1)
                ((entry, factors),) = stored_in(connect(server, "crash"))
        assert (entry.edit_id, factors) == ("before-the-crash", FACTORS)

    def test_the_server_ends_even_if_nobody_starts_again(self, tmp_path: Path) -> None:
        with service(tmp_path) as (process, server_pid):
            process.kill()
            assert gone(server_pid)

    def test_a_server_that_hangs_is_forced_to_let_go(
        self, tmp_path: Path, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.3)
        with service(tmp_path) as (process, server_pid):
            os.kill(server_pid, signal.SIGSTOP)
            process.kill()
            process.wait()
            with EmbeddedRedis(tmp_path) as server:
                assert gone(server_pid, within_s=0.1)
                assert connect(server, "crash").head() == 1

    def test_ends_in_order_without_a_stop(self, tmp_path: Path) -> None:
        with service(tmp_path) as (process, server_pid):
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
            assert gone(server_pid)
