"""Choose a text's next token: the best one, or one that is drawn with a seed of the text's own.

Flow: scores of the model -> transformers' own repetition penalty, temperature, top-k, top-p -> Gumbel noise -> arg max.
The noise is the text's own, so that a seed draws the same whatever is decoded beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

MIN_TEMPERATURE = 1e-6
"""Below it dividing by the temperature would overflow, and sampling is greedy decoding."""


@dataclass(frozen=True)
class Sampling:
    """temperature >= 0, and greedy at 0; 0 < top_p <= 1; top_k: of so many tokens, all of them at 0.

    repetition_penalty >= 0.01, so that no score becomes infinite: divides the scores of what was said or asked already.
    Equal seeds give equal texts.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


class GumbelNoise(LogitsProcessor):
    """Turns the arg max that follows into a sample of the softmax."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        exponential = torch.empty(scores.shape).exponential_(generator=self._generator)
        return scores - exponential.log().to(scores.device)


class Choice:
    """Of one text's tokens, one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not sampling.greedy:
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(sampling.top_p))
            self._processors.append(GumbelNoise(sampling.seed))

    def of(self, scores: Tensor, best: int, before: Sequence[int]) -> int:
        """The next token. scores (tokens,), best: their arg max, before: the prompt and what was said."""
        if not self._processors:
            return best
        ids = torch.tensor([before], device=scores.device)
        return int(self._processors(ids, scores[None]).argmax())
