"""Every error that the ledger can raise.

    LedgerError
    ├── LedgerUnavailable           Redis cannot be reached, is loading, or refuses to write; nothing was stored
    │   └── OutcomeUnknown          an append was sent, and no answer came that says whether it is durable
    ├── LedgerNotDurable            Redis may lose what it acknowledges, and strict durability was asked for
    ├── LedgerConflict              another writer moved the head first
    ├── LedgerCorrupt               what is stored is not what was written (names the sequence)
    │   └── FactorsMissing          an entry is there, its factors are not
    ├── EntryInvalid                an entry that would not read back as it is; nothing was stored
    ├── LedgerFileError             a file is no export of a ledger, is damaged, or belongs to another ledger
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
    """Worth trying again later. brief: the same for everybody, without where Redis is."""

    code = "ledger_unavailable"

    def __init__(self, message: str, *, brief: str | None = None, **facts: object) -> None:
        super().__init__(message, **facts)
        self.brief = brief or message


class OutcomeUnknown(LedgerUnavailable):
    """Appending the same again tells; so does reading the ledger once it is back."""

    code = "outcome_unknown"

    def __init__(self, why: str, **facts: object) -> None:
        super().__init__(
            f"{why}; whether this change was stored is not known: ask for it again with the same Idempotency-Key, or "
            "look at GET /edits, once the ledger is back",
            **facts,
        )


class LedgerNotDurable(LedgerError):
    """`facts["weaknesses"]` says why, a sentence each."""

    code = "ledger_not_durable"


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


class FactorsMissing(LedgerCorrupt):
    code = "factors_missing"

    def __init__(self, sequence: int) -> None:
        super().__init__(sequence, "has lost its factors")


class EntryInvalid(LedgerError):
    code = "entry_invalid"


class LedgerFileError(LedgerError):
    code = "ledger_file_error"


class EmbeddedRedisError(LedgerError):
    """`facts["log"]` holds the last lines that the server wrote, when it came to that."""

    code = "embedded_redis_error"
    brief = "the embedded Redis does not run"
