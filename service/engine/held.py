"""Do the other active edits still hold? One batch over the upper blocks, whatever their number.

The hidden states under each edit's prompt are worked out once, since nothing there ever changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.base_model import BaseModel
from editors.scale import token_margins
from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks
from service.engine.history import Edit

BATCH = 128


class HeldEdits:
    def __init__(self, base: BaseModel, pristine: UpperBlocks) -> None:
        self._base, self._pristine = base, pristine
        self._known: dict[str, tuple[Tokens, Tensor]] = {}

    @torch.no_grad()
    def lost(self, edits: Sequence[Edit], upper: UpperBlocks) -> list[str]:
        """Ids of the edits whose correction the model behind `upper` would no longer decode first."""
        self._known = {edit.id: self._known.get(edit.id) or self._encode(edit) for edit in edits}
        return [
            edit_id
            for start in range(0, len(edits), BATCH)
            for edit_id in self._lost(edits[start : start + BATCH], upper)
        ]

    def _lost(self, edits: Sequence[Edit], upper: UpperBlocks) -> list[str]:
        tokens = [self._known[edit.id][0] for edit in edits]
        hidden = upper.batch([self._known[edit.id][1] for edit in edits])
        rows, _ = scored_positions(tokens, self._base.device)
        wanted = torch.tensor([token for sequence in tokens for token in sequence.target], device=self._base.device)
        wrong = token_margins(upper.logits(hidden, tokens), wanted) <= 0
        return [edits[row].id for row in sorted(set(rows[wrong].tolist()))]

    def _encode(self, edit: Edit) -> tuple[Tokens, Tensor]:
        tokens = self._base.encode(edit.applied.prompt, edit.applied.correction)
        return tokens, self._pristine.below([tokens.inputs])[0]
