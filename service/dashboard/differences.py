"""What two answers have in common, and what they have not, by the tokens of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A token of an answer. changed: it is not in the other one. base, live: its probabilities, 0 to 1, if known."""

    text: str
    changed: bool
    base: float | None = None
    live: float | None = None


def compared(before: Sequence[Any], after: Sequence[Any]) -> tuple[list[Piece], list[Piece]]:
    """Both answers, piece by piece. Each is a sequence of tokens: `{"token", "base", "live"}`, or bare texts."""
    texts = [[_text(token) for token in answer] for answer in (before, after)]
    same: tuple[set[int], set[int]] = (set(), set())
    for block in SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks():
        at_an_end = block.a == block.b == 0 or all(
            first + block.size == len(answer) for first, answer in zip((block.a, block.b), texts, strict=True)
        )
        if block.size > 1 or at_an_end:  # that both say "the" somewhere is nothing in common
            same[0].update(range(block.a, block.a + block.size))
            same[1].update(range(block.b, block.b + block.size))
    return _pieces(before, same[0]), _pieces(after, same[1])


def _pieces(tokens: Sequence[Any], same: set[int]) -> list[Piece]:
    return [
        Piece(_text(token), place not in same)
        if isinstance(token, str)
        else Piece(token["token"], place not in same, probability(token["base"]), probability(token["live"]))
        for place, token in enumerate(tokens)
    ]


def _text(token: Any) -> str:
    return token if isinstance(token, str) else token["token"]


def probability(nats: float) -> float:
    """Of a log-probability; 0 to 1."""
    return min(1.0, math.exp(nats))
