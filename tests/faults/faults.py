"""Each fault: what it needs, and how it strikes while changes are made.

A fault comes back when it is healed as far as an operator would heal it: the disk has room again, a frozen server
runs again. What is dead may stay dead: whoever checks brings it back.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx
import psutil
import redis

from service.ledger import LedgerError, RedisLedger
from tests.faults.clients import Kind, Record, clients
from tests.faults.processes import Scene

WRITING = ("append", "send", "commit", "settle", "publish")
STEPS: dict[Kind, tuple[str, ...]] = {
    "edit": ("before", "capture", "propose", "search", "stage", "judge", *WRITING),
    "supersede": ("before", "capture", "propose", "search", "stage", "judge", *WRITING),
    "batch": ("before", "capture", "propose", "stage", "place", "judge", *WRITING),
    "rollback": ("stage", *WRITING),
    "restore": ("stage", *WRITING),
}
"""The failpoints that a change passes, in their order."""
MOST_ASKS = 60
DIES_WITHIN_S = 20.0
COMPACTING = {"MEND_COMPACT_EVERY": "3", "MEND_AUDIT_EVERY_S": "0.2"}
"""The housekeeper audits and compacts several times a second."""

Strike = Callable[[Scene, Record, Random], None]


class Missed(Exception):
    """The fault did not come about, so that nothing was tried."""


@dataclass(frozen=True)
class Fault:
    """beside, proxied, options, environment, failpoint: of the scene that it needs."""

    name: str
    strike: Strike
    beside: bool = False
    proxied: bool = False
    options: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    failpoint: str = ""

    def scene(self, folder: Path, environment: Mapping[str, str], failpoint: str) -> Scene:
        """failpoint: where it needs none of its own."""
        return Scene(
            folder,
            {**environment, **self.environment},
            beside=self.beside,
            proxied=self.proxied,
            options=self.options,
            failpoint=self.failpoint or failpoint,
        )


def prepare(scene: Scene, record: Record, rng: Random, number: int = 3) -> None:
    """Have some edits made, which can be rolled back and superseded."""
    for _ in range(MOST_ASKS):
        if len(record.of("made")) == number:
            return
        record.draw(rng, "edit").send(scene.service.http)
    raise Missed(f"of {MOST_ASKS} edits not even {number} are made")


def ask_until_death(scene: Scene, record: Record, rng: Random, kind: Kind | None = None) -> None:
    """One change after the other, until the service dies of the failpoint that it was given."""
    for _ in range(MOST_ASKS):
        answer = None
        with suppress(httpx.ConnectError):
            answer = record.draw(rng, kind).send(scene.service.http)
        if answer is None and scene.service.await_end(DIES_WITHIN_S):
            return
        if kind in ("rollback", "restore"):
            record.draw(rng, "edit").send(scene.service.http)
    raise Missed(f"nothing of {MOST_ASKS} passed the failpoint")


def die_at_every_step(kind: Kind) -> Strike:
    """SIGKILL of the service when it has done a step of a change: one step after the other, a life for each."""

    def strike(scene: Scene, record: Record, rng: Random) -> None:
        prepare(scene, record, rng, len(WRITING) + 1)
        for step in STEPS[kind]:
            # Whoever replays confirms what it has read, which passes these for the first time.
            scene.restart(f"{step}=kill@{2 if step in ('append', 'send') else 1}")
            ask_until_death(scene, record, rng, kind)

    return strike


def die_at_any_moment(scene: Scene, record: Record, rng: Random) -> None:
    """SIGKILL of the service, a few times, among its clients."""
    for life in range(rng.randint(1, 3)):
        if life:
            scene.restart()
        with clients(record, rng, scene.service):
            time.sleep(rng.uniform(0.05, 1.5))
            scene.service.kill()


def kill_one_of_two(scene: Scene, record: Record, rng: Random) -> None:
    """Clients ask any of two services, and ask the other one again."""
    first, second = scene.service, scene.add()
    with clients(record, rng, first, second):
        time.sleep(rng.uniform(0.1, 1.5))
        first.kill()
        time.sleep(rng.uniform(0.0, 1.0))


def kill_redis(scene: Scene, record: Record, rng: Random) -> None:
    """SIGKILL of a server that the service brings back by itself."""
    with clients(record, rng, scene.service):
        for _ in range(rng.randint(1, 2)):
            time.sleep(rng.uniform(0.05, 1.0))
            scene.kill_redis()
            await_back(scene)


def kill_both(scene: Scene, record: Record, rng: Random) -> None:
    with clients(record, rng, scene.service):
        time.sleep(rng.uniform(0.05, 1.5))
        doomed = [scene.service.pid, scene.redis.pid]
        rng.shuffle(doomed)
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        scene.service.kill()


def fill_disk_of_embedded(scene: Scene, record: Record, rng: Random) -> None:
    """No more can be written, not even by the servers that the service starts in place of the one that ends."""
    with clients(record, rng, scene.service):
        time.sleep(rng.uniform(0.05, 0.8))
        with full_disk(scene, rng, psutil.Process(scene.service.pid), scene.redis):
            time.sleep(rng.uniform(0.5, 2.0))
            if rng.random() < 0.3:
                scene.service.kill()
        if scene.service.is_alive():
            await_back(scene)


def fill_disk_of_other(scene: Scene, record: Record, rng: Random) -> None:
    """A server that fsyncs once a second goes on, and refuses to write until there is room again.

    It may be killed before that: what it had not written yet is lost then, and none of its services, of which there may
    be two, must have taken it for stored.
    """
    with scene.client() as client:
        client.config_set("appendfsync", "everysec")
    services = [scene.service, *([scene.add()] if rng.random() < 0.5 else [])]
    with clients(record, rng, *services):
        time.sleep(rng.uniform(0.3, 1.5))
        with full_disk(scene, rng, scene.redis):
            time.sleep(rng.uniform(0.5, 4.0))
            if rng.random() < 0.5:
                scene.kill_redis()
        scene.beside.ensure_running()
        time.sleep(rng.uniform(0.0, 2.0))


@contextmanager
def full_disk(scene: Scene, rng: Random, *processes: psutil.Process) -> Iterator[None]:
    """No file of these processes can become longer than the append-only file is, give or take a part of an entry."""
    limit = scene.append_only_file.stat().st_size + rng.choice([0, rng.randrange(1, 20_000)])
    for process in processes:
        process.rlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    yield
    for process in processes + tuple(processes[0].children() if processes[0].is_running() else ()):
        with suppress(psutil.NoSuchProcess):
            process.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def freeze_redis(scene: Scene, record: Record, rng: Random) -> None:
    """SIGSTOP for longer than the service waits for an answer, so that what it sent is done later, or never.

    The service stays a while before each append, so that most of them are sent to a server that is frozen by then.
    """
    with clients(record, rng, scene.service):
        time.sleep(rng.uniform(0.05, 0.8))
        frozen = scene.redis
        frozen.suspend()
        time.sleep(rng.uniform(1.1, 2.5))
        if rng.random() < 0.2:
            scene.kill_redis()
            scene.beside.ensure_running()
        else:
            frozen.resume()
        time.sleep(rng.uniform(0.0, 0.5))


def cut_connections(scene: Scene, record: Record, rng: Random) -> None:
    """Of the connection to Redis: in the middle of an append, before its answer, or in the middle of that."""
    with clients(record, rng, scene.service):
        for _ in range(rng.randint(2, 5)):
            time.sleep(rng.uniform(0.1, 0.7))
            scene.proxy.cut_appends(*(rng.randint(-1, 16) for _ in range(rng.randint(1, 4))))
    if not scene.proxy.cut:
        raise Missed("no append was under way")


def run_redis_out_of_memory(scene: Scene, record: Record, rng: Random) -> None:
    """It still reads, so a service may even start then, and be ready when there is room again."""
    with clients(record, rng, scene.service), scene.client() as client:
        time.sleep(rng.uniform(0.05, 0.8))
        client.config_set("maxmemory", 1)
        time.sleep(rng.uniform(0.2, 1.0))
        if rng.random() < 0.5:
            scene.service.kill()
            scene.start()
            time.sleep(rng.uniform(0.2, 1.0))
        client.config_set("maxmemory", 0)
        time.sleep(rng.uniform(0.0, 0.5))


def hang_up(scene: Scene, record: Record, rng: Random) -> None:
    """Clients that do not wait for their answers."""
    with clients(record, rng, scene.service, patience_s=(0.005, 0.02, 0.05, 0.1, 0.2, 20)):
        time.sleep(rng.uniform(0.5, 2.0))


def die_replaying(scene: Scene, record: Record, rng: Random) -> None:
    """SIGKILL of a service that starts, again and again."""
    with clients(record, rng, scene.service):
        time.sleep(rng.uniform(0.3, 1.2))
        scene.service.kill()
    if not record.of("made"):
        prepare_anew(scene, record, rng)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            scene.start("replay=kill")
            if not scene.service.await_end(DIES_WITHIN_S):
                raise Missed("there was nothing to replay")
        else:
            scene.start()
            time.sleep(rng.uniform(0.0, 0.5))
            scene.service.kill()


def prepare_anew(scene: Scene, record: Record, rng: Random) -> None:
    scene.restart()
    prepare(scene, record, rng)
    scene.service.kill()


def die_compacting(scene: Scene, record: Record, rng: Random) -> None:
    """SIGKILL of the service, of Redis or of both, while the ledger is compacted, here and by the service."""
    if rng.random() < 0.5:
        prepare(scene, record, rng)
        scene.restart(rng.choice(["compact=kill", "compacted=kill", "compacted=kill@2"]))
        ask_until_death(scene, record, rng)
        return
    with clients(record, rng, scene.service):
        until = time.monotonic() + rng.uniform(0.3, 1.5)
        while time.monotonic() < until:
            compact(scene)
        service, server = scene.service.pid, scene.redis.pid
        doomed = rng.choice([[service], [server], [service, server]])
        for pid in doomed:
            os.kill(pid, signal.SIGKILL)
        if service in doomed:
            scene.service.kill()
        else:
            await_back(scene)


def compact(scene: Scene) -> None:
    """As an operator may, beside the service."""
    with scene.client() as client:
        names = [key.decode().partition("{")[2].partition("}")[0] for key in client.scan_iter("mend:{*}:entries")]
    for name in names:
        ledger = RedisLedger.connect(scene.redis_url, name)
        with suppress(LedgerError):
            ledger.compact()
        ledger.close()


def await_back(scene: Scene) -> None:
    """Until Redis answers again; while its service lives, that sees to it."""
    deadline = time.monotonic() + DIES_WITHIN_S
    while time.monotonic() < deadline:
        with suppress(redis.RedisError), scene.client() as client:
            client.ping()
            return
        time.sleep(0.05)


AT_EVERY_STEP = tuple(
    Fault(f"SIGKILL of the service at every step of {what}", die_at_every_step(kind))
    for kind, what in {
        "edit": "an edit",
        "batch": "a batch",
        "rollback": "a rollback",
        "restore": "a return to a revision",
        "supersede": "an edit that supersedes",
    }.items()
)
AT_RANDOM = (
    Fault("SIGKILL of the service at a random moment", die_at_any_moment),
    Fault("SIGKILL of the service while it replays", die_replaying),
    Fault("SIGKILL of one of two services", kill_one_of_two, beside=True),
    Fault("SIGKILL of redis-server", kill_redis),
    Fault("SIGKILL of the service and of redis-server at once", kill_both),
    Fault("SIGKILL while the ledger is compacted", die_compacting, environment=COMPACTING),
    Fault("full disk (writes fail), embedded Redis", fill_disk_of_embedded),
    Fault("full disk (writes fail), Redis with everysec", fill_disk_of_other, beside=True, options="?socket_timeout=2"),
    Fault("frozen Redis", freeze_redis, beside=True, options="?socket_timeout=1", failpoint="send=sleep:0.2"),
    Fault("connection to Redis cut inside an append", cut_connections, proxied=True),
    Fault("Redis out of memory", run_redis_out_of_memory, beside=True),
    Fault("client gone before the answer", hang_up),
)
FAULTS = AT_EVERY_STEP + AT_RANDOM
