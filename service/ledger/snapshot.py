"""The first entries of a ledger as one value: compressed, under a digest, each with its link of the hash chain.

    {"format": 1, "sequence": …, "digest": "sha256:…"}\\n     of the compressed bytes behind it
    zlib of `<link> <entry>\\n` for each entry, from the first on

Everything that was ever done stays in it, and the chain goes on behind it; only factors that nothing can need again
(`service.ledger.needed`) are dropped beside it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from service.ledger.errors import LedgerCorrupt
from service.ledger.records import digest_of

FORMAT = 1


@dataclass(frozen=True)
class Compacted:
    """What a compaction did. sequence: the last entry of the snapshot."""

    sequence: int
    dropped_factors: int
    snapshot_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """Entries 1 to `sequence`: the bytes and the link of each."""

    stored: tuple[tuple[bytes, str], ...]

    @classmethod
    def of(cls, stored: Sequence[tuple[bytes, str]]) -> Snapshot:
        return cls(tuple(stored))

    @property
    def sequence(self) -> int:
        return len(self.stored)

    @property
    def chain(self) -> str:
        return self.stored[-1][1]

    def after(self, sequence: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The entries beyond this one, as a stream would give them."""
        return [
            (f"{number}-0".encode(), {b"entry": raw, b"chain": chain.encode()})
            for number, (raw, chain) in enumerate(self.stored[sequence:], sequence + 1)
        ]

    def pack(self) -> bytes:
        """As it is kept."""
        body = zlib.compress(b"".join(chain.encode() + b" " + raw + b"\n" for raw, chain in self.stored))
        header = {"format": FORMAT, "sequence": self.sequence, "digest": digest_of(body)}
        return json.dumps(header).encode() + b"\n" + body

    @classmethod
    def unpack(cls, packed: bytes) -> Snapshot:
        """Raises LedgerCorrupt when it is not what was kept."""
        head, _, body = packed.partition(b"\n")
        try:
            header = json.loads(head)
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']}, not {FORMAT}")
            if header["digest"] != digest_of(body):
                raise ValueError("its digest is another one")
            lines = zlib.decompress(body).splitlines()
            stored = tuple((raw, chain.decode()) for chain, _, raw in (line.partition(b" ") for line in lines))
            if len(stored) != header["sequence"]:
                raise ValueError(f"it has {len(stored)} entries, not {header['sequence']}")
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise LedgerCorrupt(1, f"and those behind it are in a snapshot that cannot be read: {error}") from error
        return cls(stored)
