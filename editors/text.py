"""From words to token ids, and back: the one place that knows how a prompt and its correction join.

The prompt is always tokenised on its own, because that is what the model will decode from; the correction's
tokens are what must follow. A target never carries the tokenizer's special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editors.errors import EmptyTextError

IGNORED = -100
"""Label of a position that is not scored, as in transformers."""


@dataclass(frozen=True)
class Tokens:
    """A prompt's tokens followed by the tokens of what should come next (possibly none)."""

    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: everything but the last target token, which nothing is predicted from."""
        return self.prompt + self.target[:-1]

    @property
    def scored(self) -> range:
        """Positions of `inputs` whose next-token prediction is scored: one per target token (the last, if none)."""
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + max(1, len(self.target)))


def separator(prompt: str, correction: str) -> str:
    """The space between a prompt and its correction, unless either already brings its own boundary."""
    if prompt[-1:].isspace() or correction[:1].isspace() or re.search(r"[(\[{<\"'“‘/-]$", prompt):
        return ""
    return " "


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, correction: str | None = None) -> Tokens:
    """Tokenise a prompt and what should follow it.

    Where the tokenizer splits the joined text at the boundary, its own split is used; otherwise the
    correction is tokenised alone, so that the prompt's tokens are always those of the bare prompt.
    Raises EmptyTextError when either has no tokens.
    """
    ids = tokenizer(prompt).input_ids
    if not ids:
        raise EmptyTextError("the prompt has no tokens", field="prompt")
    if correction is None:
        return Tokens(tuple(ids))
    continuation = separator(prompt, correction) + correction
    joined = tokenizer(prompt + continuation).input_ids
    if joined[: len(ids)] == ids:
        target = [token for token in joined[len(ids) :] if token != tokenizer.eos_token_id]
    else:
        target = tokenizer(continuation, add_special_tokens=False).input_ids
    if not target or not correction.strip():
        raise EmptyTextError("the correction has no tokens", field="correction")
    return Tokens(tuple(ids), tuple(target))


def begins_with(text: str, correction: str) -> bool:
    """Whether a decoded answer says the correction: it begins with it, white space before it aside."""
    return text.lstrip().startswith(correction.strip())


def pad(sequences: Sequence[Sequence[int]], value: int = 0, device: torch.device | None = None) -> Tensor:
    """Right-pad to one (batch, tokens) int64 tensor.

    Right padding needs no attention mask in a causal model: no real token can see the padding.
    """
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences], device=device)
