"""How far corrections are ahead of everything else, teacher-forced: many sequences at once, over the upper blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from editors.scale import token_margins
from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks

ROWS = 128
SCORED = 512
"""Sequences and scored positions of one pass, at most: the vocabulary is wide."""


def sure_nats(dtype: torch.dtype) -> float:
    """A margin beyond which greedy decoding says the same tokens: rounding moves it by less."""
    return max(0.01, 64 * torch.finfo(dtype).eps)


def states_below(upper: UpperBlocks, tokens: Sequence[Tokens]) -> list[Tensor]:
    """What enters the first edited block for each sequence, (tokens, width); the same for every view."""
    states: list[Tensor] = []
    for part in _parts(tokens):
        hidden = upper.below([sequence.inputs for sequence in tokens[part]])
        states += [state[: len(sequence.inputs)].clone() for state, sequence in zip(hidden, tokens[part], strict=True)]
    return states


@torch.no_grad()
def smallest_margins(upper: UpperBlocks, tokens: Sequence[Tokens], hidden: Sequence[Tensor]) -> list[float]:
    """Per sequence, how far the least preferred token of its target is ahead of any other, in nats.

    hidden: of each sequence, from `states_below`.
    """
    margins: list[float] = []
    for part in _parts(tokens):
        sequences, device = tokens[part], hidden[part.start].device
        rows, _ = scored_positions(sequences, device)
        wanted = torch.tensor([token for sequence in sequences for token in sequence.target], device=device)
        each = token_margins(upper.logits(upper.batch(hidden[part]), sequences), wanted)
        least = each.new_full((len(sequences),), float("inf")).scatter_reduce(0, rows, each, "amin")
        margins += least.tolist()
    return margins


def _parts(tokens: Sequence[Tokens]) -> Iterator[slice]:
    """Runs of sequences for one pass each."""
    start = scored = 0
    for row, sequence in enumerate(tokens):
        more = len(sequence.scored)
        if row > start and (row - start == ROWS or scored + more > SCORED):
            yield slice(start, row)
            start, scored = row, 0
        scored += more
    if start < len(tokens):
        yield slice(start, len(tokens))
