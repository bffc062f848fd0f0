"""What a view says to prompts: greedy answers, long enough to tell whether they begin with a correction."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from editors.base_model import BaseModel
from editors.decoding import generate_batch
from editors.text import Tokens
from service.engine.weights import View

BATCH = 64
"""Prompts that are decoded together, at most."""


class Answers:
    """least: tokens of every answer, at least; a correction that is longer gets as many as it needs."""

    def __init__(self, base: BaseModel, least: int) -> None:
        self._base, self._least = base, least

    def length(self, tokens: Tokens) -> int:
        """Tokens of an answer that may say this correction."""
        return max(self._least, len(tokens.target) + 2)

    def say(self, view: View, prompts: Sequence[str], lengths: Sequence[int]) -> list[str]:
        """Answers of so many tokens each, decoded in batches of prompts of like length."""
        texts: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda row: (lengths[row], len(prompts[row])))
        for length, group in groupby(order, key=lengths.__getitem__):
            rows = list(group)
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                asked = [prompts[row] for row in batch]
                said = generate_batch(view.model, self._base.tokenizer, asked, length)
                texts |= {row: each.text for row, each in zip(batch, said, strict=True)}
        return [texts[row] for row in range(len(prompts))]

    def one(self, view: View, prompt: str, tokens: Tokens) -> str:
        """The answer to one prompt, in which its correction may be."""
        return self.say(view, [prompt], [self.length(tokens)])[0]
