"""How strongly an edit should be applied: the smallest scale at which it takes.

Most editors are trained at scale 1, where they balance generality against locality. Many corrections take there; some
need more, and every bit more than needed is paid in locality. So the search begins at 1 and goes up. Below 1 an edit
often still takes on its own prompt, but no longer on other wordings: those scales are kept for when a guard's budget
leaves no other. Where a scale is only that of what completes an edit, the search begins at 0. All scales of a grid are
tried at once, as rows of one batch over the upper blocks, before any weight is touched.

An edit takes at a scale when the model, reading the prompt, prefers each token of the correction over every other
by at least `margin` nats; 0 is what greedy decoding needs, more buys generality to other wordings.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from editors.state import Increment, Rows, State
from editors.text import Tokens
from editors.views import UpperBlocks, edited

SCALES = (0.0, *(2 ** (step / 4) for step in range(-8, 17)))
"""0, and 0.25 to 16 in steps of a quarter octave. Corrections of many tokens need the upper end."""


STEP = 4
"""Places in `SCALES`, an octave, by which an edit is made stronger that does not take beside others."""


def stronger(scale: float) -> float:
    """The next scale to try, by STEP places, from one of `SCALES`; the largest has none above it."""
    return SCALES[min(SCALES.index(scale) + STEP, len(SCALES) - 1)]


@dataclass(frozen=True)
class ScaleSearch:
    """Margins of one edit over `SCALES`, in nats. margins: (scales,), negative where it does not take.

    first: the scale at which the search begins.
    """

    margins: tuple[float, ...]
    first: float = 1.0

    def order(self, margin: float) -> list[int]:
        """Indexes of the scales worth trying, best first.

        First the smallest from `first` on that takes with the margin and those above it; where none has the margin, the
        one that comes nearest to it; never one that does not take.
        """
        enough = [index for index, value in enumerate(self.margins) if value >= margin and SCALES[index] >= self.first]
        if enough:
            return enough
        taking = [index for index, value in enumerate(self.margins) if value > 0]
        return sorted(taking, key=lambda index: -self.margins[index])

    def rank(self, margin: float) -> tuple[int, float]:
        """How good the best scale is; larger is better.

        First that it takes with the margin, then that it takes; then how small it is by STEPs, or how near it comes.
        """
        best, *_ = [*self.order(margin), self.strongest]
        reached = self.margins[best]
        return (2, -(best // STEP)) if reached >= margin else (int(reached > 0), reached)

    @property
    def strongest(self) -> int:
        """The scale with the largest margin."""
        return max(range(len(self.margins)), key=self.margins.__getitem__)

    def smaller(self, index: int) -> list[int]:
        """Scales below `index` at which the edit still takes, largest first: what a broken budget leaves."""
        return [lower for lower in range(index - 1, -1, -1) if self.margins[lower] > 0]


class Searched(Protocol):
    """What is asked of an editor. first_scale: at which the search for a scale of its edits begins."""

    first_scale: float

    def forms(self, rows: Rows) -> Iterable[Rows]:
        """An edit in all forms that it may have, those first that are to be taken where others are no better."""


def search_edit(
    editor: Searched, state: State, upper: UpperBlocks, hidden: Tensor, tokens: Tokens, rows: Rows, margin: float
) -> tuple[Rows, ScaleSearch]:
    """The form in which an edit takes with the margin at the smallest scale, or else comes nearest, and its margins.

    state: what upper shows. The rest is as in `search_scale`.
    """
    names = {full: short.name for full, short in zip(state.targets, upper.targets, strict=True)}
    best: tuple[Rows, ScaleSearch] | None = None
    for form in editor.forms(rows):
        searches = [
            search_scale(upper, hidden, tokens, {names[name]: change for name, change in increment.items()})
            for increment in state.increments(form)
        ]
        margins = torch.tensor([search.margins for search in searches]).amin(0)  # of one that is NaN, NaN
        found = ScaleSearch(tuple(margins.tolist()), editor.first_scale)
        if best is None or found.rank(margin) > best[1].rank(margin):
            best = form, found
        if found.rank(margin) == (2, -(SCALES.index(editor.first_scale) // STEP)):
            break
    return best


@torch.no_grad()
def search_scale(upper: UpperBlocks, hidden: Tensor, tokens: Tokens, increment: Increment) -> ScaleSearch:
    """Try every scale of the grid.

    upper: blocks of the model as it is without the edit. hidden: (1, tokens, …) from `below`, for `tokens.inputs`.
    increment: what the edit changes there, by the name of its target in `upper.targets`; from a `State`.
    """
    scales = torch.tensor(SCALES, device=hidden.device)
    count = len(scales)
    scaled = {name for name, (_, delta, _) in increment.items() if delta.any()}
    factored = {
        name: (u[None].expand(count, -1, -1), scales[:, None, None] * delta[None] + offset)
        if name in scaled
        else (u[None], offset[None])
        for name, (u, delta, offset) in increment.items()
    }
    # All scales are the same below what they scale.
    once = scaled and upper.kind == "decoder"
    with ExitStack() as stack:
        stack.enter_context(
            edited(upper.module, [target for target in upper.targets if target.name in factored], factored)
        )
        if once:
            stack.enter_context(upper.copied(count, scaled))
        else:
            hidden = hidden.expand(count, *hidden.shape[1:])
        logits = upper.logits(hidden, [tokens] * count)
    margins = token_margins(logits, torch.tensor(tokens.target, device=hidden.device).repeat(count))
    return ScaleSearch(tuple(margins.view(count, len(tokens.target)).amin(1).tolist()))


def token_margins(logits: Tensor, wanted: Tensor) -> Tensor:
    """How far each wanted token is ahead of the best other one: (n, vocabulary), (n,) int64 -> (n,) in nats."""
    logits = logits.float()
    own = logits.gather(1, wanted[:, None])
    others = logits.scatter(1, wanted[:, None], float("-inf")).amax(1)
    return own[:, 0] - others
