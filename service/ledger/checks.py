"""Whether one entry, as Redis holds it, is what was written: its id, its link of the hash chain, and its factors."""

from __future__ import annotations

from service.ledger.chain import link
from service.ledger.errors import FactorsMissing, LedgerCorrupt
from service.ledger.records import Applied, Entry, decode, digest_of

EMPTY = digest_of(b"")
"""Of no factors."""


def sequence_of(stored_id: bytes) -> int:
    """Of the entry with this id in the stream. Raises LedgerCorrupt when it is none of ours."""
    sequence, _, within = stored_id.decode().partition("-")
    if within != "0":
        raise LedgerCorrupt(int(sequence), f"was not written by this service: its id is {stored_id.decode()}")
    return int(sequence)


def verified(sequence: int, stored_id: bytes, fields: dict[bytes, bytes], before: str) -> tuple[Entry, bytes, str]:
    """One stored entry, its bytes and its link, or LedgerCorrupt when they are not those of `sequence`."""
    if stored_id != f"{sequence}-0".encode():
        raise LedgerCorrupt(sequence, f"is missing: the next one is {stored_id.decode()}")
    try:
        raw, chain = fields[b"entry"], fields[b"chain"].decode(errors="replace")
        entry = decode(raw)
    except KeyError as error:
        raise LedgerCorrupt(sequence, f"has no field {error.args[0].decode()}") from error
    except ValueError as error:
        raise LedgerCorrupt(sequence, f"cannot be read: {error}") from error
    if entry.sequence != sequence:
        raise LedgerCorrupt(sequence, f"says that it is entry {entry.sequence}")
    if chain != link(before, raw):
        raise LedgerCorrupt(sequence, "was altered, or what is before it: it breaks the hash chain")
    return entry, raw, chain


def verified_factors(entry: Applied, stored: bytes | None) -> bytes:
    """The factors that an entry speaks of, or FactorsMissing, LedgerCorrupt. Empty ones are not stored."""
    if stored is None and entry.factors_digest != EMPTY:
        raise FactorsMissing(entry.sequence)
    factors = stored or b""
    if problem := mismatch(entry, factors):
        raise LedgerCorrupt(entry.sequence, problem)
    return factors


def mismatch(entry: Entry, factors: bytes | None) -> str | None:
    """What is wrong between an entry and the factors beside it."""
    if isinstance(entry, Applied):
        actual = entry.factors_digest if factors is None else digest_of(factors)
        if actual != entry.factors_digest:
            return f"has factors with digest {actual}, not {entry.factors_digest}"
    elif factors:
        return "applies no edit, but has factors"
    return None
