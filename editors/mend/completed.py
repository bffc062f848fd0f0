"""The editor that is served: keyed edits, each completed where that is not enough.

A keyed edit changes what a middle block knows of its subject. That carries over to other wordings, but by itself does
not always make the model say the correction, least of all several rare tokens in a row, or beside many other edits. So
an edit has a second part: what a late block writes where the correction's tokens are predicted, by the training-free
editor. The first part has the size that it was trained for, unless the edit needs less of the second with less of the
first. The scale of an edit is that of its second part, from 0 on, and so the smallest that makes the edit take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from editors.capture import Capture
from editors.least_squares import LeastSquaresState
from editors.least_squares_editor import Joined
from editors.mend.editor import Proposal
from editors.mend.keyed import KeyedEditor
from editors.state import Rows
from editors.targets import Target
from editors.training_free.editor import TrainingFreeEditor

SHARES = (1.0, 0.5, 0.0)
"""Of the first part that edits are tried with."""


class CompletedEditor(Joined, nn.Module):
    """keyed, late: the editors of the two parts, of different weights."""

    first_scale = 0.0

    def __init__(self, keyed: KeyedEditor, late: TrainingFreeEditor) -> None:
        super().__init__()
        self.keyed, self.late = keyed, late

    @property
    def targets(self) -> tuple[Target, ...]:
        """The edited weights."""
        return (*self.keyed.targets, *self.late.targets)

    @property
    def captured(self) -> tuple[Target, ...]:
        """The weights whose inputs and gradients are captured; the second part may edit the first's witness."""
        return tuple(dict.fromkeys((*self.keyed.captured, *self.late.captured)))

    def forms(self, rows: Rows) -> Iterator[Rows]:
        """An edit with all of its first part, and with less: of an answer of many tokens that may say the first again
        and again, so that the second has to undo it."""
        for share in SHARES:
            yield rows | {
                target.name: (rows[target.name][0], share * rows[target.name][1]) for target in self.keyed.targets
            }

    def new_state(self, device: torch.device) -> LeastSquaresState:
        """The state that this editor's edits are joined in; with no edit yet."""
        whitening, laws = self.keyed.metrics()
        late_whitening, late_laws = self.late.metrics()
        steady = [target.name for target in self.keyed.targets]
        return LeastSquaresState(self.targets, whitening | late_whitening, laws | late_laws, device, steady)

    def forward(self, capture: Capture) -> Proposal:
        """Keys and wanted changes of a batch of edits. See `Proposal` for shapes."""
        first, second = self.keyed(self._seen(capture, self.keyed)), self.late(self._seen(capture, self.late))
        return Proposal(
            (*first.u, *second.u), (*first.delta, *second.delta), (*first.example, *second.example), first.edits
        )

    def _seen(self, capture: Capture, part: KeyedEditor | TrainingFreeEditor) -> Capture:
        """What one of the two captures."""
        own = [self.captured.index(target) for target in part.captured]
        u, delta, example = (
            tuple(rows[index] for index in own) for rows in (capture.u, capture.delta, capture.example)
        )
        return dataclasses.replace(capture, u=u, delta=delta, example=example)
