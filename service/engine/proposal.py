"""Corrections worked out on the pristine model: captured, proposed, and searched for a scale.

Nothing here touches a weight that anybody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editors.capture import Capture, capture
from editors.checkpoint import Checkpoint
from editors.factors import Factors
from editors.scale import ScaleSearch, search_edit
from editors.state import Rows, State
from editors.text import Tokens
from editors.views import UpperBlocks

MAX_ATTEMPTS = 5
"""Scales that are staged and judged for one edit, at most."""


@dataclass(frozen=True)
class Captured:
    """What edits are worked out from. hidden: under the edited blocks, (edits, tokens, width)."""

    tokens: Sequence[Tokens]
    hidden: Tensor
    rows: Capture


@dataclass(frozen=True)
class Draft:
    """An edit before its scale is chosen. hidden: under the edited blocks, (1, tokens, width), the same for every view.

    rows: before they are scaled. quantise: the state's way to store them.
    """

    tokens: Tokens
    hidden: Tensor
    rows: Rows
    quantise: Callable[[Rows, float], Factors]

    def factors(self, scale: float) -> Factors:
        return self.quantise(self.rows, scale)


class Attempts:
    """The order in which scales are tried, told after each how it went.

    Begins at the smallest scale that takes with the margin; goes up while decoding does not say the correction,
    and down once it does more harm than it may.
    """

    def __init__(self, search: ScaleSearch, margin_nats: float) -> None:
        self._search = search
        self._queue = search.order(margin_nats)
        self._tried: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        while self._queue and len(self._tried) < MAX_ATTEMPTS:
            index = self._queue.pop(0)
            if index not in self._tried:
                self._tried.add(index)
                self._last = index
                yield index

    def too_strong(self) -> None:
        """The last scale did too much harm: only smaller ones are worth trying."""
        self._queue = [index for index in self._search.smaller(self._last) if index not in self._tried]


class Proposer:
    """Works edits out on the pristine model. Used by the one writer alone."""

    def __init__(self, checkpoint: Checkpoint, pristine: UpperBlocks, state: State) -> None:
        self._editor, self._pristine, self._quantise = checkpoint.editor, pristine, state.quantise
        self.first_scale, self._margin_nats = checkpoint.editor.first_scale, checkpoint.margin_nats

    @torch.no_grad()
    def capture(self, tokens: Sequence[Tokens]) -> Captured:
        """The gradients of edits that are independent of each other, as one batch."""
        hidden = self._pristine.below([sequence.inputs for sequence in tokens])
        return Captured(tokens, hidden, capture(self._pristine, hidden, tokens))

    @torch.no_grad()
    def draft(self, captured: Captured) -> list[Draft]:
        """What the editor makes of them."""
        tokens, hidden, proposal = captured.tokens, captured.hidden, self._editor(captured.rows)
        return [
            Draft(
                sequence,
                hidden[row : row + 1, : len(sequence.inputs)].clone(),
                proposal.rows_of(self._editor.targets, row),
                self._quantise,
            )
            for row, sequence in enumerate(tokens)
        ]

    def search(self, draft: Draft, upper: UpperBlocks, state: State) -> tuple[Draft, ScaleSearch]:
        """Try an edit at every scale, on top of the state that `upper` shows. Returns it in the form that is best."""
        rows, found = search_edit(self._editor, state, upper, draft.hidden, draft.tokens, draft.rows, self._margin_nats)
        return replace(draft, rows=rows), found
