"""MEND and its ablations, by name."""

from __future__ import annotations

from editors.mend.variant import Variant

VARIANTS = {
    "mend": Variant(),
    "unshared": Variant(shared=False),
    "unnormalised": Variant(normalise=False),
    "xavier": Variant(identity=False),
    "separate": Variant(sides="separate"),
    "only-u": Variant(sides="u"),
    "only-delta": Variant(sides="delta"),
    "only-smaller": Variant(sides="smaller"),
    "plain": Variant(plain=True),
}
