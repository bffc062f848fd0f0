"""What a cycle plays on, all of it real processes: a service, and a Redis that it embeds or that stands beside it.

Starting Python with torch takes seconds, so services are forked from a process that has imported everything, and so
are ready in a fraction of one. Each is `mend serve` with a pid of its own, that SIGKILL ends like any other.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import httpx
import psutil
import redis

from service.ledger import EmbeddedRedis
from tests.faults.proxy import Proxy

IMPORTED = (
    "service.app",
    "service.cli.main",
    "service.cli.serve",
    "transformers.models.llama.modeling_llama",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.auto",
)
READY_WITHIN_S = 40.0
"""Longest of all takes a Redis that is frozen and has to be forced to let go of its folder."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(list(IMPORTED))


def _serve(environment: Mapping[str, str], log: str) -> None:
    """Become `mend serve`. Ends when the process that forked it does, so that no harness leaves services behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    os.environ.update(environment)

    import torch

    from service import failpoints
    from service.cli.main import main

    torch.set_num_threads(1)
    failpoints.arm(environment.get(failpoints.VARIABLE, ""))  # it was read when everything was imported
    sys.argv = ["mend", "serve"]
    main()


class Service:
    """One process, from its start to its end."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        self._process = _forking.Process(target=_serve, args=(dict(environment), str(log)), daemon=True)
        self._process.start()
        self._http: httpx.Client | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def http(self) -> httpx.Client:
        """A client of it, as soon as it listens. Threads may share it."""
        while self._http is None:
            said = self._log.read_text() if self._log.exists() else ""
            url, told, _ = said.partition("listening on ")[2].partition(";")
            if told:
                # There is no TLS, and reading the certificates for it takes longer than an edit.
                self._http = httpx.Client(base_url=url, verify=False, timeout=60)
            elif not self.is_alive():
                raise RuntimeError(f"the service ended before it listened:\n{said}")
            else:
                time.sleep(0.01)
        return self._http

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def await_ready(self, within_s: float = READY_WITHIN_S) -> str | None:
        """Come back when it is ready, or with what keeps it from that."""
        deadline, trouble = time.monotonic() + within_s, "it does not listen"
        while time.monotonic() < deadline:
            if not self.is_alive():
                return f"it ended: {self._log.read_text()[-2000:]}"
            try:
                answer = self.http.get("/readyz", timeout=5)
            except (httpx.TransportError, RuntimeError) as error:
                trouble = str(error)
            else:
                if answer.status_code == 200:
                    return None
                trouble = answer.text
            time.sleep(0.02)
        return f"not ready in {within_s:.0f} s: {trouble}"

    def await_end(self, within_s: float) -> bool:
        """Whether it ends by itself in that time."""
        self._process.join(within_s)
        return not self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        """Kill it, and let go of what its clients held, when nobody asks it any more."""
        self.kill()
        if self._http is not None:
            self._http.close()


class Scene:
    """A folder, and the processes on it. environment: MEND_… settings.

    beside: Redis is a process that the service does not own. proxied: that is reached over TCP, through a proxy.
    options: of the URL by which it is reached. failpoint: of every service that is given no other.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *,
        beside: bool = False,
        proxied: bool = False,
        options: str = "",
        failpoint: str = "",
    ) -> None:
        self.folder = folder
        self._data = folder / "data"
        self._environment = {"MEND_PORT": "0", "MEND_DATA_DIR": str(self._data), **environment}
        self.beside = EmbeddedRedis(folder / "beside") if beside or proxied else None
        self.proxy = Proxy(self.redis_url.removeprefix("unix://")) if proxied else None
        if self.beside:
            self._environment["MEND_REDIS_URL"] = (self.proxy or self.beside).url + options
        self._failpoint = failpoint
        self._services: list[Service] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.beside:
            self.beside.start()
        return self

    def __exit__(self, *_: object) -> None:
        for service in self._services:
            service.close()
        if self.proxy:
            self.proxy.close()
        if self.beside:
            self.beside.stop()
        else:
            self.kill_redis()

    def start(self, failpoint: str = "") -> None:
        """Start a service, which may die at a failpoint."""
        log = self.folder / f"service-{len(self._services) + 1}.log"
        self._services.append(Service({**self._environment, "MEND_FAILPOINT": failpoint or self._failpoint}, log))

    @property
    def service(self) -> Service:
        """The one that was started last."""
        return self._services[-1]

    @property
    def services(self) -> list[Service]:
        """Those that are alive."""
        return [service for service in self._services if service.is_alive()]

    def restart(self, failpoint: str = "") -> None:
        """SIGKILL, unless it is dead already, and another one, until that is ready, or has died at the failpoint."""
        self.service.kill()
        self.start(failpoint)
        self.service.await_ready()

    def add(self) -> Service:
        """Another service on the same Redis."""
        self.start()
        if trouble := self.service.await_ready():
            raise RuntimeError(trouble)
        return self.service

    def kill(self) -> None:
        """SIGKILL of everything."""
        self.kill_redis()
        for service in self.services:
            service.kill()

    def recover(self) -> str | None:
        """Start what is dead, and wait until all is well. Returns what keeps it from that."""
        if self.beside:
            self.beside.ensure_running()
        if not self.services:
            self.start()
        return next(filter(None, (service.await_ready() for service in self.services)), None)

    @property
    def redis_url(self) -> str:
        """Of Redis itself, not of a proxy before it."""
        return self.beside.url if self.beside else f"unix://{self._data / 'redis.sock'}"

    @property
    def redis(self) -> psutil.Process:
        """The server process. Raises psutil.NoSuchProcess."""
        if self.beside:
            return psutil.Process(self.beside.pid)
        try:
            server = psutil.Process(int((self._data / "redis" / "server.lock").read_text()))
        except (FileNotFoundError, ValueError):  # not yet
            raise psutil.NoSuchProcess(0) from None
        if str(self._data) not in " ".join(server.cmdline()):  # it is gone, and another process has its number
            raise psutil.NoSuchProcess(server.pid)
        return server

    def kill_redis(self) -> None:
        """SIGKILL, and come back when it is dead."""
        with suppress(psutil.NoSuchProcess):
            server = self.redis
            server.kill()
            while server.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)

    @property
    def append_only_file(self) -> Path:
        """The one that grows."""
        folder = (self.folder / "beside" if self.beside else self._data) / "redis" / "appendonlydir"
        return max(folder.glob("*.incr.aof"))

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """Of Redis itself."""
        with redis.Redis.from_url(self.redis_url, socket_timeout=10, protocol=2) as client:
            yield client
