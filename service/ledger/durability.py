"""Whether a Redis keeps what it has acknowledged: read from its own configuration, never assumed.

An entry is durable when it is in the append-only file, and that is fsynced. Servers from 7.2 on tell so themselves
(WAITAOF, asked behind every write); of older ones `appendfsync always` is verified, behind every write as well.

Flow: client -> Durability.of -> `ask` in the pipeline of a write -> its answers -> `doubt`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis

from service.ledger.connection import Client
from service.ledger.errors import LedgerUnavailable
from service.ledger.scripts import TOUCH

Demand = Literal["strict", "warn"]
OLDEST = (6, 2)


@dataclass(frozen=True)
class Durability:
    """What a Redis says of itself.

    server: its name and version. waits: it confirms an fsync by WAITAOF. weaknesses: by what it may lose an
    acknowledged edit, one sentence each with what to do; empty when by nothing. refuses: why it stores nothing now.
    """

    server: str
    appendonly: str | None
    appendfsync: str | None
    maxmemory_policy: str | None
    waits: bool
    weaknesses: tuple[str, ...]
    refuses: str | None = None

    @classmethod
    def of(cls, client: Client) -> Durability:
        """Raises redis.RedisError; LedgerUnavailable when the server is too old for the ledger."""
        info = _permitted(lambda: client.info("everything"))
        config = {
            **_permitted(lambda: client.config_get("*append*")),
            **_permitted(lambda: client.config_get("maxmemory*")),
        }
        name, version = _version(info)
        server = f"{name} {version}".strip()
        numbers = tuple(map(int, re.findall(r"\d+", str(info.get("redis_version", "")))[:2]))
        if numbers and numbers < OLDEST:
            raise LedgerUnavailable(
                f"this is {server}; the ledger needs Redis {'.'.join(map(str, OLDEST))} or newer, or Valkey",
                reason="too_old",
            )
        appendonly, appendfsync = _appendonly(config, info), config.get("appendfsync")
        policy = config.get("maxmemory-policy") or info.get("maxmemory_policy")
        waits = appendonly == "yes" and appendfsync != "no" and _answers_waitaof(client)
        weaknesses = tuple(filter(None, (_of_its_file(config, info, waits), _of_its_memory(policy))))
        return cls(server, appendonly, appendfsync, policy, waits, weaknesses, _refuses(info))

    def ask(self, pipeline: redis.client.Pipeline, key: str, patience_s: float) -> None:
        """Ask behind a write, over its connection, whether all that was written is durable. key: of the stream.

        Nothing of a server that has weaknesses and cannot tell.
        """
        if self.waits:
            pipeline.eval(TOUCH, 1, key)
            pipeline.execute_command("WAITAOF", 1, 0, int(1000 * patience_s))
        elif not self.weaknesses:
            pipeline.config_get("*append*")
            pipeline.info("persistence")

    def doubt(self, answers: Sequence[Any]) -> str | None:
        """Why that may not be durable, by the answers to `ask`; None when it is, as far as was asked."""
        for answer in answers:
            if isinstance(answer, Exception):
                return f"it does not say whether it is: {answer}"
        if self.waits:
            _, (fsynced, _) = answers
            return None if fsynced else "its disk did not confirm it in time"
        return _of_its_file(*answers, waits=False) if answers else None


def _appendonly(config: Mapping[str, str], info: Mapping[str, Any]) -> str | None:
    return config.get("appendonly") or {1: "yes", 0: "no"}.get(info.get("aof_enabled"))


def _of_its_file(config: Mapping[str, str], info: Mapping[str, Any], waits: bool) -> str | None:
    """How the append-only file may lose what was acknowledged: the first way that there is."""
    appendonly, appendfsync = _appendonly(config, info), config.get("appendfsync")
    if appendonly is None:
        return "its appendonly cannot be read; permit CONFIG GET or INFO to this user"
    if appendonly != "yes":
        return "its appendonly is no: a restart of Redis loses edits; set appendonly yes"
    if waits:
        return None
    if appendfsync is None:
        return "its appendfsync cannot be read, and WAITAOF not be asked; permit one of both to this user"
    if appendfsync != "always":
        says = f"its appendfsync is {appendfsync}: a crash of its machine loses the last edits; set appendfsync always"
        return says if appendfsync == "no" else f"{says}, or permit WAITAOF (Redis 7.2 or newer) to this user"
    if config.get("no-appendfsync-on-rewrite") == "yes":
        return "its no-appendfsync-on-rewrite is yes: while the file is rewritten, a crash loses edits; set it to no"
    if "aof_base_size" not in info:
        return "whether its append-only file is complete cannot be read; permit INFO to this user"
    if not info["aof_base_size"] and (info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]):
        # After `CONFIG SET appendonly yes`, no file that a restart would read has anything until the first is complete.
        return "its append-only file is being written for the first time: until then a crash loses edits; wait for it"
    return None


def _refuses(info: Mapping[str, Any]) -> str | None:
    """Why it would not store anything now, where it tells."""
    if info.get("role", "master") != "master":
        return "it is a read-only replica: name the server that writes"
    if info.get("aof_last_write_status", "ok") != "ok":
        return "it cannot write its append-only file: see to its disk"
    if 0 < info.get("maxmemory", 0) <= info.get("used_memory", 0):
        return "it has reached its maxmemory: give it more, or roll edits back and compact the ledger"
    return None


def _of_its_memory(policy: str | None) -> str | None:
    """Whether it may evict the ledger. Its keys never expire, so the policies `volatile-…` spare them."""
    if policy is None:
        return "its maxmemory-policy cannot be read; permit CONFIG GET or INFO to this user"
    if policy.startswith("allkeys"):
        return f"its maxmemory-policy is {policy}: it may evict the ledger; set maxmemory-policy noeviction"
    return None


def _version(info: Mapping[str, Any]) -> tuple[str, str]:
    if "valkey_version" in info:
        return "Valkey", str(info["valkey_version"])
    return "Redis", str(info.get("redis_version", "of unknown version"))


def _permitted(question: Callable[[], Any]) -> dict[str, Any]:
    """The answer, or nothing where this user may not ask."""
    try:
        return dict(question())
    except redis.ResponseError:
        return {}


def _answers_waitaof(client: Client) -> bool:
    try:
        client.execute_command("WAITAOF", 0, 0, 1)
    except redis.ResponseError:
        return False
    return True
