"""FT and FT+KL, the baselines of MEND's paper (arXiv:2110.11309, section 5): fine-tuning on the edit itself.

Adam on the correction's negative log-likelihood, over the weights that the editor edits, until every token of the
correction is preferred. FT+KL adds KL(base ‖ edited) on unrelated text, whose gradient is zero at the base; so it takes
all of its steps, or the second term would never act. Only the upper blocks run: the hidden states
below them are worked out once. Steps are taken in float32, and each is judged on the weights as they are served.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editors.base_model import BaseModel
from editors.capture import FLOAT16_LOSS_SCALE, target_losses
from editors.data import Example
from editors.evaluation.methods import Made, Weights
from editors.targets import Target
from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks, view

KL_TEXTS = 4
"""Unrelated texts of one step."""
KL_POSITIONS = 2
"""Positions of each of them at which the models are compared."""


@dataclass(frozen=True)
class Recipe:
    """learning_rate: Adam's. steps: at most. kl: weight of the divergence on unrelated text, 0 for plain FT."""

    learning_rate: float
    steps: int
    kl: float = 0.0


class FineTuning:
    """Fine-tunes copies of the target weights; the base model itself is never touched.

    unrelated: texts for FT+KL, such as the base's own samples; each edit draws from them in the same order.
    """

    factored = False

    def __init__(
        self,
        base: BaseModel,
        targets: Sequence[Target],
        recipe: Recipe,
        unrelated: Sequence[Tokens] = (),
        *,
        seed: int = 0,
    ) -> None:
        self.base, self.targets, self.recipe, self.seed = base, tuple(targets), recipe, seed
        self.name = "ft+kl" if recipe.kl else "ft"
        self.model = view(base.model, [target.name for target in targets])
        self.upper = UpperBlocks(self.model, targets)
        self._weights = {target.name: self.model.get_parameter(target.name) for target in targets}
        self._unrelated = _Unrelated(self.upper, unrelated, seed) if recipe.kl else None
        for weight in self._weights.values():
            weight.requires_grad_()

    def edits(self, examples: Sequence[Example]) -> Iterator[Made]:
        for example in examples:
            self._set(self.base.model)
            taken = self.tune([self.base.encode(example.prompt, example.correction)])
            yield Made(self._copy(), {"steps": taken})

    def write(self, edit: Weights, live: nn.Module) -> None:
        with torch.no_grad():
            for name, weight in edit.items():
                live.get_parameter(name).copy_(weight)

    def write_together(self, examples: Sequence[Example], live: nn.Module) -> None:
        self._set(self.base.model)
        self.tune([self.base.encode(example.prompt, example.correction) for example in examples])
        self._give(live)

    def write_in_turn(self, examples: Sequence[Example], live: nn.Module) -> Iterator[Made]:
        self._set(live)
        for example in examples:
            taken = self.tune([self.base.encode(example.prompt, example.correction)])
            self._give(live)
            yield Made(None, {"steps": taken})

    def reset(self) -> None:
        """Go back to the base's weights."""
        self._set(self.base.model)

    def tune(self, sequences: Sequence[Tokens], on_step: Callable[[int], None] | None = None) -> int:
        """Tune from the weights as they are now; FT until every token of the targets is preferred.

        on_step: called after each step, with its number from 1 on. Returns how many were taken.
        """
        weights = list(self._weights.values())
        wide = torch.promote_types(self.base.dtype, torch.float32)
        masters = [weight.detach().to(wide) if weight.dtype != wide else weight for weight in weights]
        optimizer = torch.optim.Adam(masters, lr=self.recipe.learning_rate, fused=True)
        loss_scale = FLOAT16_LOSS_SCALE if self.base.dtype == torch.float16 else 1.0
        hidden = self.upper.below([sequence.inputs for sequence in sequences])
        rows, _ = scored_positions(sequences, hidden.device)
        wanted = torch.tensor([token for sequence in sequences for token in sequence.target], device=hidden.device)
        rng = random.Random(self.seed)
        for step in range(self.recipe.steps):
            logits = self.upper.logits(hidden, sequences)
            if self._unrelated is None and bool((logits.argmax(-1) == wanted).all()):
                return step
            loss = target_losses(logits, sequences, rows).mean()
            if self._unrelated is not None:
                loss = loss + self.recipe.kl * self._unrelated.divergence(self.upper, rng)
            gradients = torch.autograd.grad(loss * loss_scale, weights)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.to(wide).mul_(1 / loss_scale) if loss_scale != 1 else gradient.to(wide)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
            if on_step is not None:
                on_step(step + 1)
        return self.recipe.steps

    @torch.no_grad()
    def _set(self, source: nn.Module) -> None:
        for name, weight in self._weights.items():
            weight.copy_(source.get_parameter(name))

    @torch.no_grad()
    def _give(self, live: nn.Module) -> None:
        for name, weight in self._weights.items():
            live.get_parameter(name).copy_(weight)

    def _copy(self) -> Weights:
        return {name: weight.detach().clone() for name, weight in self._weights.items()}


class _Unrelated:
    """Unrelated texts, and what the base says at a few positions of each. upper: with the base's weights."""

    @torch.no_grad()
    def __init__(self, upper: UpperBlocks, texts: Sequence[Tokens], seed: int) -> None:
        rng = random.Random(f"{seed}-positions")
        self._texts = list(texts)
        self._positions = [[rng.choice(text.predicted) for _ in range(KL_POSITIONS)] for text in texts]
        self._states: list[Tensor] = []
        self._base: list[Tensor] = []
        for start in range(0, len(texts), KL_TEXTS):
            chosen = list(range(start, min(start + KL_TEXTS, len(texts))))
            hidden = upper.below([texts[index].inputs for index in chosen])
            self._states += [row[: len(texts[index].inputs)].clone() for index, row in zip(chosen, hidden, strict=True)]
            self._base += self._logits(upper, chosen).log_softmax(-1).split(KL_POSITIONS)

    def divergence(self, upper: UpperBlocks, rng: random.Random) -> Tensor:
        """Mean KL(base ‖ edited) in nats at the chosen positions of a few texts."""
        chosen = rng.sample(range(len(self._texts)), min(KL_TEXTS, len(self._texts)))
        edited = self._logits(upper, chosen).log_softmax(-1)
        base = torch.cat([self._base[index] for index in chosen])
        return F.kl_div(edited, base, log_target=True, reduction="none").sum(-1).mean()

    def _logits(self, upper: UpperBlocks, chosen: Sequence[int]) -> Tensor:
        hidden = upper.batch([self._states[index] for index in chosen])
        where = (
            torch.arange(len(chosen), device=hidden.device).repeat_interleave(KL_POSITIONS),
            torch.tensor([place for index in chosen for place in self._positions[index]], device=hidden.device),
        )
        return upper.logits(hidden, [self._texts[index] for index in chosen], where).float()
