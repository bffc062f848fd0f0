"""What a model makes of texts: the base, every text under an edit of its own, or weights that hold edits.

Sequences are scored through the upper blocks alone, from hidden states that are worked out once and serve every
version of the model, since nothing below the edited blocks ever changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.base_model import BaseModel
from editors.capture import target_losses
from editors.decoding import generate_batch
from editors.state import Rows
from editors.targets import Target
from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks, edited

ROWS = 48
SCORED = 384
"""Sequences and scored positions of one pass, at most: the vocabulary is wide."""


@dataclass(frozen=True)
class Reading:
    """One sequence's target, as a model sees it.

    best: in the place of each token, the most likely one. right: whether it is the token itself.
    log_probability: mean per token, in nats.
    first: log-probabilities of everything that could stand in the place of the first token, (classes,) float32.
    """

    best: tuple[int, ...]
    right: tuple[bool, ...]
    log_probability: float
    first: Tensor


class Reader:
    """Reads with `model`, a view of the base model that the reader may place hooks on."""

    def __init__(self, base: BaseModel, model: nn.Module, targets: Sequence[Target]) -> None:
        self.base, self.whole, self.targets = base, model, tuple(targets)
        self.upper = UpperBlocks(model, targets)

    def below(self, sequences: Sequence[Tokens]) -> list[Tensor]:
        """Hidden states under the edited blocks, (tokens, width) each."""
        states: list[Tensor | None] = [None] * len(sequences)
        for chunk in _chunks(sequences):
            hidden = self.upper.below([sequences[row].inputs for row in chunk])
            for row, state in zip(chunk, hidden, strict=True):
                states[row] = state[: len(sequences[row].inputs)].clone()
        return states

    @torch.no_grad()
    def read(
        self, sequences: Sequence[Tokens], states: Sequence[Tensor], edits: Sequence[Rows] | None = None
    ) -> list[Reading]:
        """Score every sequence. states: from `below`. edits: one for each sequence; without any, the model as it is."""
        readings: list[Reading | None] = [None] * len(sequences)
        for chunk in _chunks(sequences):
            tokens = [sequences[row] for row in chunk]
            with self._under(self.upper.module, self.upper.targets, [edits[row] for row in chunk] if edits else None):
                logits = self.upper.logits(self.upper.batch([states[row] for row in chunk]), tokens).float()
            for row, reading in zip(chunk, _readings(tokens, logits), strict=True):
                readings[row] = reading
        return readings

    def say(self, prompts: Sequence[str], length: int, edits: Sequence[Rows] | None = None) -> list[str]:
        """Greedy answers of at most `length` tokens; a classifier's label."""
        texts: list[str] = []
        for start in range(0, len(prompts), ROWS):
            part = slice(start, start + ROWS)
            with self._under(self.whole, self.targets, edits[part] if edits else None):
                answers = generate_batch(self.whole, self.base.tokenizer, prompts[part], length)
            texts += [answer.text for answer in answers]
        return texts

    def _under(
        self, module: nn.Module, targets: Sequence[Target], edits: Sequence[Rows] | None
    ) -> AbstractContextManager:
        if edits is None:
            return nullcontext()
        stacked = _stack(edits, self.base.device)
        names = [target.name for target in self.targets]
        return edited(module, targets, {t.name: stacked[name] for t, name in zip(targets, names, strict=True)})


def _readings(sequences: Sequence[Tokens], logits: Tensor) -> Iterator[Reading]:
    """One per sequence, from the logits of all their scored positions, (scored, classes)."""
    rows, _ = scored_positions(sequences, logits.device)
    losses = target_losses(logits, sequences, rows).tolist()
    best = logits.argmax(-1).tolist()
    start = 0
    for sequence, loss in zip(sequences, losses, strict=True):
        mine = tuple(best[start : start + len(sequence.target)])
        right = tuple(token == wanted for token, wanted in zip(mine, sequence.target, strict=True))
        yield Reading(mine, right, -loss, logits[start].log_softmax(-1))
        start += len(mine)


def _chunks(sequences: Sequence[Tokens]) -> Iterator[list[int]]:
    """Indexes of sequences for one pass each, those of similar length together."""
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row].inputs))
    chunk: list[int] = []
    scored = 0
    for row in order:
        more = len(sequences[row].scored)
        if chunk and (len(chunk) == ROWS or scored + more > SCORED):
            yield chunk
            chunk, scored = [], 0
        chunk.append(row)
        scored += more
    if chunk:
        yield chunk


def _stack(edits: Sequence[Rows], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Per target, the rows of every text's edit, float32, padded to one rank with zero rows."""
    unique = {id(edit): edit for edit in edits}
    place = {key: index for index, key in enumerate(unique)}
    owners = [place[id(edit)] for edit in edits]

    def padded(parts: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)[owners].to(device)

    stacked = {}
    for name in edits[0]:
        pairs = [edit[name] for edit in unique.values()]
        stacked[name] = (padded([u.float() for u, _ in pairs]), padded([delta.float() for _, delta in pairs]))
    return stacked
