"""Whether a Redis keeps what it has acknowledged: read from its own configuration, never assumed.

An entry is durable when it is in the append-only file, and that is fsynced. Servers from 7.2 on tell so themselves
(WAITAOF, asked after every append); of older ones `appendfsync always` is verified, after every append as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import redis

from service.ledger.connection import Client
from service.ledger.errors import LedgerUnavailable

Demand = Literal["strict", "warn"]
OLDEST = (6, 2)
WAITAOF = (7, 2)


@dataclass(frozen=True)
class Durability:
    """What a Redis says of itself.

    server: its name and version. waits: it confirms an fsync by WAITAOF. weaknesses: by what it may lose an
    acknowledged edit, one sentence each with what to do; empty when by nothing.
    """

    server: str
    appendonly: str | None
    appendfsync: str | None
    maxmemory_policy: str | None
    waits: bool
    weaknesses: tuple[str, ...]

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
        appendonly = config.get("appendonly") or {1: "yes", 0: "no"}.get(info.get("aof_enabled"))
        appendfsync = config.get("appendfsync")
        policy = config.get("maxmemory-policy") or info.get("maxmemory_policy")
        waits = numbers >= WAITAOF and appendonly == "yes" and appendfsync != "no" and _answers_waitaof(client)
        weaknesses = tuple(_weaknesses(appendonly, appendfsync, policy, config, waits))
        return cls(server, appendonly, appendfsync, policy, waits, weaknesses)


def always_fsynced(config: Mapping[str, str]) -> bool:
    """Whether a configuration has every write fsynced before it is acknowledged."""
    return (config.get("appendonly"), config.get("appendfsync")) == ("yes", "always") and not _pauses(config)


def _weaknesses(
    appendonly: str | None, appendfsync: str | None, policy: str | None, config: Mapping[str, str], waits: bool
) -> list[str]:
    found = []
    if appendonly is None:
        found.append("its appendonly cannot be read; permit CONFIG GET or INFO to this user")
    elif appendonly != "yes":
        found.append("its appendonly is no: a restart of Redis loses edits; set appendonly yes")
    if policy is None:
        found.append("its maxmemory-policy cannot be read; permit CONFIG GET or INFO to this user")
    elif policy.startswith("allkeys"):
        found.append(f"its maxmemory-policy is {policy}: it may evict the ledger; set maxmemory-policy noeviction")
    if appendonly == "yes" and not waits:
        if appendfsync is None:
            found.append("its appendfsync cannot be read, and WAITAOF not be asked; permit one of both to this user")
        elif appendfsync != "always":
            found.append(
                f"its appendfsync is {appendfsync}: a crash of its machine loses the last edits; set appendfsync always"
                + ("" if appendfsync == "no" else ", or take Redis 7.2 or newer, which confirms each fsync")
            )
        elif _pauses(config):
            found.append(
                "its no-appendfsync-on-rewrite is yes: while the file is rewritten, a crash loses edits; set it to no"
            )
    return found


def _pauses(config: Mapping[str, str]) -> bool:
    return config.get("no-appendfsync-on-rewrite", "no") == "yes"


def _version(info: Mapping[str, Any]) -> tuple[str, str]:
    if "valkey_version" in info:
        return "Valkey", str(info["valkey_version"])
    return "Redis", str(info.get("redis_version", "of unknown version"))


def _permitted(question: Any) -> dict[str, Any]:
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
