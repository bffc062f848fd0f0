"""The hash chain over entries: each link is a digest of everything up to its entry.

Whoever alters, drops or inserts an entry breaks the chain there, and whoever holds a link can prove which entries it
stands for. Factor bytes are under it too, by the digest that their entry holds.
"""

from __future__ import annotations

import hashlib

GENESIS = f"sha256:{hashlib.sha256(b'mend-service ledger 1').hexdigest()}"
"""The link before the first entry."""


def link(before: str, entry: bytes) -> str:
    """The link of an entry. before: the link of the entry before it. entry: its bytes, as they are stored."""
    sha = hashlib.sha256(before.encode())
    sha.update(b"\n" + entry)
    return f"sha256:{sha.hexdigest()}"
