"""What an editor is made of: MEND as published, and its ablations.

Source: arXiv:2110.11309, section 5.3. `plain` is ours: what is left of MEND when its networks are taken away.
"""

from __future__ import annotations

from dataclasses import dataclass

SIDES = ("joint", "separate", "u", "delta", "smaller")


@dataclass(frozen=True)
class Variant:
    """The shape of an editor. Together with its targets it fixes every parameter's name and size.

    rank: of the networks' factorised linear maps, at most their width.
    shared: one network per shape of weight, with a scale and a shift per layer; else one per layer, without these.
    normalise: rows are normalised by running statistics.
    sides: one network over [u; δ] ("joint"), one each ("separate"), or one for only u, only δ, or only the smaller of
    the two; the other side is then normalised and passed on.
    identity: networks begin as the identity, as residual blocks; else Xavier weights and no residual.
    plain: no networks and no statistics; the gradient itself, with a learned step per layer.
    blocks: of each network.
    """

    rank: int = 512
    shared: bool = True
    normalise: bool = True
    sides: str = "joint"
    identity: bool = True
    plain: bool = False
    blocks: int = 2

    def __post_init__(self) -> None:
        for name in ("rank", "blocks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, not a whole number above 0")
        for name in ("shared", "normalise", "identity", "plain"):
            value = getattr(self, name)
            if type(value) is not bool:
                raise ValueError(f"{name} is {value!r}, neither true nor false")
        if self.sides not in SIDES:
            raise ValueError(f"sides is {self.sides!r}, none of {', '.join(SIDES)}")

    @property
    def has_statistics(self) -> bool:
        return self.normalise and not self.plain

    def widths(self, d_in: int, d_out: int) -> dict[str, int]:
        """Width of each network of one shape, by the name that its blocks have in `GradientNetwork`."""
        if self.plain:
            return {}
        smaller = "delta" if d_in > d_out else "u"
        return {
            "joint": {"blocks": d_in + d_out},
            "separate": {"u_blocks": d_in, "delta_blocks": d_out},
            "u": {"u_blocks": d_in},
            "delta": {"delta_blocks": d_out},
        }[smaller if self.sides == "smaller" else self.sides]

    def __str__(self) -> str:
        """In the words of a card."""
        if self.plain:
            return "the gradient itself, no networks"
        networks = {
            "joint": "one network for u and δ",
            "separate": "a network each for u and δ",
            "u": "a network for u only",
            "delta": "a network for δ only",
            "smaller": "a network for the smaller of u and δ",
        }[self.sides]
        return ", ".join(
            (
                networks,
                "shared by shape" if self.shared else "one per layer",
                f"{self.blocks} blocks of rank {self.rank}",
                "residual" if self.identity else "without residual",
                "normalised" if self.normalise else "not normalised",
            )
        )
