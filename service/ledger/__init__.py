"""The ledger: what was edited, by whom, and the factors to replay it. Knows Redis; nothing of models or HTTP.

Flow: EmbeddedRedis.url or a URL of the operator -> RedisLedger -> append, head, read.
"""

from service.ledger.embedded import EmbeddedRedis
from service.ledger.errors import (
    EmbeddedRedisError,
    EntryInvalid,
    FactorsMissing,
    LedgerConflict,
    LedgerCorrupt,
    LedgerError,
    LedgerFileError,
    LedgerNotDurable,
    LedgerUnavailable,
    OutcomeUnknown,
)
from service.ledger.file import LedgerFile, export_ledger, import_file
from service.ledger.records import Applied, ChatMessage, Entry, InBatch, Restored, RolledBack, Tagged, decode, digest_of
from service.ledger.redis_ledger import RedisLedger
from service.ledger.replicas import Replica, Seen
from service.ledger.snapshot import Compacted
from service.ledger.verification import Verification, verify_ledger

__all__ = [
    "Applied",
    "ChatMessage",
    "Compacted",
    "EmbeddedRedis",
    "EmbeddedRedisError",
    "Entry",
    "EntryInvalid",
    "FactorsMissing",
    "InBatch",
    "LedgerConflict",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerFile",
    "LedgerFileError",
    "LedgerNotDurable",
    "LedgerUnavailable",
    "OutcomeUnknown",
    "RedisLedger",
    "Replica",
    "Restored",
    "RolledBack",
    "Seen",
    "Tagged",
    "Verification",
    "decode",
    "digest_of",
    "export_ledger",
    "import_file",
    "verify_ledger",
]
