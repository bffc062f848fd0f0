"""One correction, worked out on the pristine model: captured, proposed, and searched for its scale.

Nothing here touches a weight that anybody reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.capture import capture
from editors.factors import Factors, quantise
from editors.mend.checkpoint import Checkpoint
from editors.scale import SCALES, ScaleSearch, search_scale
from editors.state import Increment
from editors.text import Tokens
from editors.views import UpperBlocks

MAX_ATTEMPTS = 5
"""Scales that are staged and judged for one edit, at most."""


@dataclass(frozen=True)
class Proposed:
    """An edit at every scale: factors are quantised when a scale is chosen."""

    tokens: Tokens
    rows: Mapping[str, tuple[Tensor, Tensor]]
    search: ScaleSearch
    margin_nats: float

    def factors(self, index: int) -> Factors:
        return quantise(self.rows, SCALES[index])

    @property
    def best_margin(self) -> float:
        """How far the correction gets ahead at the best scale, in nats; not above 0 when it never takes."""
        return self.search.margins[self.search.strongest]


class Attempts:
    """The order in which scales are tried, told after each how it went.

    Begins at the smallest scale that takes with the margin; goes up while decoding does not say the correction,
    and down once the guard's budget is broken.
    """

    def __init__(self, proposed: Proposed) -> None:
        self._search = proposed.search
        self._queue = proposed.search.order(proposed.margin_nats)
        self._tried: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        while self._queue and len(self._tried) < MAX_ATTEMPTS:
            index = self._queue.pop(0)
            if index not in self._tried:
                self._tried.add(index)
                self._last = index
                yield index

    def too_strong(self) -> None:
        """The last scale broke the budget: only smaller ones are worth trying."""
        self._queue = [index for index in self._search.smaller(self._last) if index not in self._tried]


class Proposer:
    """Works edits out against the pristine model and the live one. Used by the one writer alone."""

    def __init__(self, checkpoint: Checkpoint, pristine: UpperBlocks, live: UpperBlocks) -> None:
        self._checkpoint = checkpoint
        self._pristine, self._live = pristine, live

    def below(self, tokens: Tokens) -> Tensor:
        """Hidden states under the edited blocks, (1, tokens, width); the same for every view."""
        return self._pristine.below([tokens.inputs])

    @torch.no_grad()
    def propose(self, tokens: Tokens, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Per target name, the rows u and delta of the edit at scale 1."""
        captured = capture(self._pristine, hidden, [tokens])
        editor = self._checkpoint.editor
        return editor(captured).rows_of(editor.targets, 0)

    def search(
        self, tokens: Tokens, hidden: Tensor, rows: Mapping[str, tuple[Tensor, Tensor]], increment: Increment
    ) -> Proposed:
        """Try the edit at every scale on top of what is live now. increment: what its rows change there."""
        names = {
            full.name: short.name
            for full, short in zip(self._checkpoint.editor.targets, self._live.targets, strict=True)
        }
        found = search_scale(self._live, hidden, tokens, {names[name]: change for name, change in increment.items()})
        return Proposed(tokens, rows, found, self._checkpoint.margin_nats)
