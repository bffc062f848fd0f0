"""Real servers with given options, and a proxy that cuts connections at a chosen moment.

Flow: RedisLedger -> [Proxy ->] Server, a valkey-server or redis-server process of the test's own.
"""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Self

import redis

from service.ledger import RedisLedger
from service.ledger.durability import Demand
from service.ledger.embedded import _packaged_binary

VALKEY = str(_packaged_binary())
DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": "", "auto-aof-rewrite-percentage": "0"}
WITHOUT_WAITAOF = {"rename-command": "WAITAOF WAITAOF-IS-NOT-HERE"}
"""What an older server has in common with this one."""
NAMESPACE = "proof"
KEY = f"mend:{{{NAMESPACE}}}:entries"
FACTORS_KEY, SNAPSHOT_KEY = KEY.replace("entries", "factors"), KEY.replace("entries", "snapshot")


def old_redis() -> str | None:
    """A redis-server of this machine that has no WAITAOF, as Debian 12 and Ubuntu 22.04 ship it; None without one."""
    binary = shutil.which("redis-server")
    if binary is None:
        return None
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    return binary if found and (6, 2) <= tuple(map(int, found.groups())) < (7, 2) else None


class Server:
    """A server process with a folder of its own. Durable, unless an option says otherwise."""

    def __init__(self, options: Mapping[str, str] | None = None, binary: str = VALKEY) -> None:
        self._binary, self._options = binary, {**DURABLE, **(options or {})}
        self._folder = Path(tempfile.mkdtemp(prefix="mend-"))
        self.path = self._folder / "redis.sock"
        self._ledgers: list[RedisLedger] = []
        self.client = redis.Redis(unix_socket_path=str(self.path), protocol=2)
        """Of someone who may do everything."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for ledger in self._ledgers:
            ledger.close()
        self.client.close()
        self.kill()
        shutil.rmtree(self._folder)

    def start(self) -> None:
        options = {**self._options, "dir": str(self._folder), "port": "0", "unixsocket": str(self.path)}
        arguments = [part for name, value in options.items() for part in (f"--{name}", *(value.split() or [""]))]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._binary, *arguments], stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                time.sleep(0.01)
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text())

    def kill(self) -> None:
        """End it, and what it forked, as a crash does: with nothing written any more."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def permit(self, *rules: str) -> None:
        """What the user `ledger` may do, as rules of an ACL."""
        self.client.execute_command("ACL", "SETUSER", "ledger", "reset", "on", "nopass", "~*", *rules)

    def ledger(
        self, durability: Demand = "warn", *, user: str = "default", query: str = "", path: Path | None = None
    ) -> RedisLedger:
        """A new RedisLedger of the one namespace, closed with the server. path: where it is spoken to, if not here."""
        url = f"unix://{user}:any@{path or self.path}?{query}"
        self._ledgers.append(RedisLedger.connect(url, NAMESPACE, durability))
        return self._ledgers[-1]


@dataclass(frozen=True)
class Cut:
    """What happens to a request. passed_on: bytes of its reply that come through; None where it does not itself.

    before: called before the request is passed on; then: when the connection is about to be cut.
    """

    passed_on: int | None
    before: Callable[[], object] = lambda: None
    then: Callable[[], object] = lambda: None


BEFORE_THE_REQUEST, BEFORE_THE_REPLY, NOWHERE = None, 0, sys.maxsize


class Proxy:
    """Stands before a server. A request that contains `mark` meets the next of the cuts, if any are left."""

    def __init__(self, server: Server, mark: bytes = b"XADD", name: str = "proxy") -> None:
        self.server, self._mark = server, mark
        self.path = server.path.with_name(f"{name}.sock")
        self._cuts: Iterator[Cut] = iter(())
        self.received: list[bytearray] = []
        """Everything that was asked, one item for each connection."""
        self._threads: list[threading.Thread] = []

    def cut(self, *cuts: Cut) -> None:
        self._cuts = iter(cuts)

    def cut_always(self, cut: Cut) -> None:
        self._cuts = repeat(cut)

    @property
    def marked(self) -> list[bytearray]:
        """Of what was asked, the connections with such a request."""
        return [received for received in self.received if self._mark in received]

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._stop, self._stopped = socket.socketpair()
        self._run(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._stopped.close()
        self.path.unlink()

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        for _ in self._readable(self._listener):
            self.received.append(bytearray())
            self._run(self._pass_on, self._listener.accept()[0], self.received[-1])

    def _readable(self, *sockets: socket.socket) -> Iterator[socket.socket]:
        """Whichever has something to read, until the proxy is left."""
        with selectors.DefaultSelector() as selector:
            for each in (self._stopped, *sockets):
                selector.register(each, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._stopped:
                        return
                    yield key.fileobj

    def _pass_on(self, ledger: socket.socket, received: bytearray) -> None:
        cut = None
        with suppress(ConnectionError), ledger, socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self.server.path))
            for readable in self._readable(ledger, server):
                data = readable.recv(1 << 16)
                if not data:
                    return
                if readable is server:
                    ledger.sendall(data[: cut.passed_on] if cut else data)
                    cut = cut and replace(cut, passed_on=max(0, cut.passed_on - len(data)))
                else:
                    received += data
                    if self._mark in data:
                        cut = next(self._cuts, None)
                        if cut:
                            cut.before()
                    if not cut or cut.passed_on is not None:
                        server.sendall(data)
                        continue
                if cut and not cut.passed_on:
                    cut.then()
                    return
