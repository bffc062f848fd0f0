"""The ledger: what was edited, by whom, and the factors to replay it. Knows Redis; nothing of models or HTTP.

Flow: EmbeddedRedis.url or a URL of the operator -> RedisLedger -> append, head, read.
"""

from service.ledger.embedded import EmbeddedRedis
from service.ledger.errors import (
    EmbeddedRedisError,
    EntryInvalid,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    LedgerUnavailable,
)
from service.ledger.records import Applied, Entry, InBatch, RolledBack, digest_of
from service.ledger.redis_ledger import RedisLedger

__all__ = [
    "Applied",
    "EmbeddedRedis",
    "EmbeddedRedisError",
    "Entry",
    "EntryInvalid",
    "InBatch",
    "LedgerConflict",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerUnavailable",
    "RedisLedger",
    "RolledBack",
    "digest_of",
]
