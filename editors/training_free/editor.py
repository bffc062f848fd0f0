"""The editor that was never trained: the natural gradient of each correction, joined by least squares.

    key     what one late weight reads where it predicts the correction's tokens, whitened (see `least_squares_editor`)
    change  v_t = −step · F⁻¹δ_t   δ: the gradient at its output; F: the covariance of such gradients in general

What covers the model's own texts on both sides is Kronecker's factorisation of the Fisher information (Martens and
Grosse, arXiv:1503.05671). That edits without any training hold beside many others when they are joined by least
squares is from UltraEdit (arXiv:2505.14679). Such an edit holds on its own prompt, and seldom on other wordings: what a
trained editor adds is exactly that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editors.capture import Capture
from editors.least_squares_editor import LeastSquaresEditor, ridged
from editors.mend.editor import Proposal
from editors.targets import Target
from editors.text import LabelledTokens

LAMBDA = 0.05
FIRST_STEP = 0.5
"""Of what a weight usually writes: how far an edit alone moves its output at scale 1, where it moves it most."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Where the model is certain of the correction there is no gradient, and so no change."""


class TrainingFreeEditor(LeastSquaresEditor):
    """For every kind of model. Knows of it two covariances per target and no more."""

    method = "training-free"

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets, LAMBDA)
        for index, target in enumerate(self.targets):
            self.register_buffer(f"natural_{index}", torch.eye(target.d_out))
            self.register_buffer(f"unit_{index}", torch.ones(()))

    @property
    def captured(self) -> tuple[Target, ...]:
        """The weights whose inputs and gradients are captured."""
        return self.targets

    @torch.no_grad()
    def calibrate(self, index: int, u: Tensor, delta: Tensor, weight: Tensor) -> None:
        """Take what one target does in general.

        u, delta: its inputs (rows, d_in) and the gradients of its outputs (rows, d_out). weight: (d_out, d_in).
        """
        u, delta = u.double(), delta.double()
        self.set_covariance(index, u.T @ u / len(u))
        natural = torch.linalg.inv(ridged(delta.T @ delta / len(delta)))
        # Only its directions count.
        getattr(self, f"natural_{index}").copy_((natural / natural.diagonal().mean()).half())
        getattr(self, f"unit_{index}").copy_((u @ weight.double().T).norm(dim=-1).mean())

    @torch.no_grad()
    def forward(self, capture: Capture) -> Proposal:
        """Keys and wanted changes of a batch of edits, a row for each token of their corrections. See `Proposal`."""
        proposed = [self._propose(index, capture) for index in range(len(self.targets))]
        u, delta, example = zip(*proposed, strict=True)
        return Proposal(u, delta, example, len(capture.loss))

    def _propose(self, index: int, capture: Capture) -> tuple[Tensor, Tensor, Tensor]:
        rows = predicting_rows(capture, index)
        u, delta, example = (
            capture.u[index][rows].float(),
            capture.delta[index][rows].float(),
            capture.example[index][rows],
        )
        along = delta @ getattr(self, f"natural_{index}").T
        largest = torch.zeros(len(capture.loss), device=rows.device).scatter_reduce(
            0, example, along.norm(dim=-1), "amax"
        )
        step = FIRST_STEP * getattr(self, f"unit_{index}") / largest.clamp(min=SMALLEST)
        # A key is as long as 1, what it stands for is not: an edit's own output is to move by its step.
        length = torch.linalg.solve_triangular(self.whitening(index), u.T, upper=False).norm(dim=0).clamp(min=SMALLEST)
        change = -(step[example] / length)[:, None] * along
        return self.keys(index, u), change, example


def predicting_rows(capture: Capture, index: int) -> Tensor:
    """Rows of one target at which the tokens of corrections are predicted, (rows,) int64."""
    counts = torch.bincount(capture.example[index], minlength=len(capture.loss))
    starts = (torch.cumsum(counts, 0) - counts).tolist()
    rows: list[int] = []
    for start, count, tokens in zip(starts, counts.tolist(), capture.sequences, strict=True):
        if isinstance(tokens, LabelledTokens):  # a label is predicted from wherever its model looks
            rows.append(start + int(capture.delta[index][start : start + count].norm(dim=-1).argmax()))
        else:
            rows += [start + place for place in tokens.scored]
    return torch.tensor(rows, device=counts.device)
