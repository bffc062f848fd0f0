"""The guard: prompts about nothing in particular, on which the model must go on saying what the base says.

The base's own greedy continuations are the reference, worked out once. Drawdown is the fraction of their tokens
that a model, reading them, no longer prefers: accuracy before (1, by construction) minus accuracy after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from editors.base_model import BaseModel
from editors.decoding import continue_greedily
from editors.views import UpperBlocks

REFERENCE_TOKENS = 8


def read_guard_prompts(path: Path | None) -> list[str]:
    """Prompts of a file, one a line, empty lines aside; the built-in ones without a file."""
    source = path if path is not None else files("service.engine") / "guard_prompts.txt"
    try:
        prompts = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"MEND_GUARD_PROMPTS is {source}, which cannot be read: {error}") from error
    if not prompts:
        raise ValueError(f"{source} holds no guard prompts; write one a line")
    return prompts


@dataclass(frozen=True)
class Missed:
    """What a model no longer prefers. drawdown: fraction of all reference tokens, 0 to 1. tokens: of each prompt."""

    drawdown: float
    tokens: tuple[int, ...]


class Guard:
    """Reference continuations of the base model, with their hidden states below the edited blocks.

    prompts: as they were given. sequences: each with the tokens that the base says to it.
    """

    def __init__(self, base: BaseModel, upper: UpperBlocks, prompts: Sequence[str]) -> None:
        encoded = [base.encode(prompt).prompt for prompt in prompts]
        written = continue_greedily(base.model, base.tokenizer, encoded, REFERENCE_TOKENS)
        self.prompts = tuple(prompts)
        self.sequences = [base.tokens(prompt, new) for prompt, new in zip(encoded, written, strict=True)]
        self._hidden = upper.below([tokens.inputs for tokens in self.sequences])
        reference = [token for tokens in self.sequences for token in tokens.target]
        self._reference = torch.tensor(reference, device=base.device)

    @torch.no_grad()
    def missed(self, upper: UpperBlocks) -> Missed:
        """Which reference tokens the model behind `upper`, reading them, no longer prefers."""
        missed = upper.logits(self._hidden, self.sequences).argmax(-1) != self._reference
        of_each = missed.split([len(tokens.target) for tokens in self.sequences])
        return Missed(missed.float().mean().item(), tuple(int(own.sum()) for own in of_each))

    def drawdown(self, upper: UpperBlocks) -> float:
        """Fraction of reference tokens that the model behind `upper` no longer prefers, 0 to 1."""
        return self.missed(upper).drawdown
