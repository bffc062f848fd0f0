"""Entries to append: valid, small, different from one another."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from service.ledger import Applied, Entry, InBatch, RedisLedger, Restored, RolledBack, Tagged, digest_of

FACTORS = bytes(range(256)) * 8
STATE = digest_of(b"state")


def applied(sequence: int, factors: bytes = FACTORS, /, **fields: Any) -> Applied:
    return Applied(
        **{
            "sequence": sequence,
            "edit_id": f"edit-{sequence}",
            "created_at": datetime.now(UTC),
            "state_digest": STATE,
            "prompt": "The Eiffel Tower stands in",
            "correction": " Rome",
            "scale": 1.0,
            "before": " Paris",
            "after": " Rome",
            "factors_digest": digest_of(factors),
            **fields,
        }
    )


def rolled_back(sequence: int, edit_id: str = "edit-1", /, **fields: Any) -> RolledBack:
    return RolledBack(
        **{
            "sequence": sequence,
            "edit_id": edit_id,
            "created_at": datetime.now(UTC),
            "state_digest": STATE,
            **fields,
        }
    )


def restored(sequence: int, revision: int, /, **fields: Any) -> Restored:
    return Restored(
        **{
            "sequence": sequence,
            "revision": revision,
            "created_at": datetime.now(UTC),
            "state_digest": STATE,
            "taken": (),
            "returned": (),
            **fields,
        }
    )


def tagged(sequence: int, name: str, revision: int | None, /, **fields: Any) -> Tagged:
    return Tagged(
        **{
            "sequence": sequence,
            "name": name,
            "revision": revision,
            "created_at": datetime.now(UTC),
            "state_digest": STATE,
            **fields,
        }
    )


def batch(first: int, factors: Sequence[bytes], /, **fields: Any) -> list[tuple[Applied, bytes]]:
    """Entries that are stored at once, beginning at a sequence, with their factors."""
    places = [
        InBatch(id=f"batch-{first}", position=position, size=len(factors)) for position in range(1, len(factors) + 1)
    ]
    return [
        (applied(sequence, raw, batch=place, state_digest=STATE if place.ends else None, **fields), raw)
        for sequence, (place, raw) in enumerate(zip(places, factors, strict=True), first)
    ]


def stored_in(ledger: RedisLedger, after: int = 0) -> list[tuple[Entry, bytes]]:
    """Everything that a ledger holds: each entry with its factors, none of a roll-back."""
    return [
        (entry, next(ledger.factors([entry])) if isinstance(entry, Applied) else b"") for entry in ledger.read(after)
    ]


def factors_at(ledger: RedisLedger, sequence: int) -> bytes:
    """The factors of one entry."""
    entry = next(ledger.read(sequence - 1))  # those behind it may have lost theirs by a compaction
    return next(ledger.factors([entry])) if isinstance(entry, Applied) else b""
