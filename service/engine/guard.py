"""The guard: prompts about nothing in particular, on which the model must go on saying what the base says.

The base's own greedy continuations are the reference, worked out once. Drawdown is the fraction of their tokens
that a model, reading them, no longer prefers: accuracy before (1, by construction) minus accuracy after.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Guard:
    """Reference continuations of the base model, with their hidden states below the edited blocks."""

    def __init__(self, base: BaseModel, upper: UpperBlocks, prompts: Sequence[str]) -> None:
        encoded = [base.encode(prompt).prompt for prompt in prompts]
        written = continue_greedily(base.model, base.tokenizer, encoded, REFERENCE_TOKENS)
        self._sequences = [base.tokens(prompt, new) for prompt, new in zip(encoded, written, strict=True)]
        self._hidden = upper.below([tokens.inputs for tokens in self._sequences])
        reference = [token for tokens in self._sequences for token in tokens.target]
        self._reference = torch.tensor(reference, device=base.device)

    @torch.no_grad()
    def drawdown(self, upper: UpperBlocks) -> float:
        """Fraction of reference tokens that the model behind `upper` no longer prefers, 0 to 1."""
        said = upper.logits(self._hidden, self._sequences).argmax(-1)
        return (said != self._reference).float().mean().item()
