"""Every error that the ledger can raise.

    LedgerError
    ├── LedgerUnavailable           Redis cannot be reached, is loading, or refuses to write
    ├── LedgerConflict              another writer moved the head first
    ├── LedgerCorrupt               what is stored is not what was written (names the sequence)
    ├── EntryInvalid                an entry that would not read back as it is; nothing was stored
    └── EmbeddedRedisError          the server of our own could not be started

Errors carry facts as attributes and a stable `code`; they know nothing of HTTP.
"""

from __future__ import annotations


class LedgerError(Exception):
    """Base of all errors of this package. `facts` is what a caller may show or log."""

    code = "ledger_error"

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class LedgerUnavailable(LedgerError):
    """Worth trying again later. Whether an append was stored before this is not known: append it again."""

    code = "ledger_unavailable"


class LedgerConflict(LedgerError):
    """Refused: the ledger does not end where this writer thought it ended. Nothing was stored."""

    code = "ledger_conflict"

    def __init__(self, expected: int, actual: int) -> None:
        super().__init__(
            f"the ledger was expected to end at entry {expected}, but it ends at entry {actual}",
            expected=expected,
            actual=actual,
        )


class LedgerCorrupt(LedgerError):
    """Never heals by itself: restore the ledger from a backup, or start a new namespace."""

    code = "ledger_corrupt"

    def __init__(self, sequence: int, problem: str) -> None:
        super().__init__(f"entry {sequence} of the ledger {problem}", sequence=sequence, problem=problem)


class EntryInvalid(LedgerError):
    code = "entry_invalid"


class EmbeddedRedisError(LedgerError):
    """`facts["log"]` holds the last lines that the server wrote, when it came to that."""

    code = "embedded_redis_error"
