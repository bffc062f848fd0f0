"""The fine-tuning gradient of a correction, in its low-rank form.

For one example the loss is the mean negative log-likelihood of the correction's tokens. At a weight W with input
u_t and output W u_t, its gradient is Σ_t δ_t u_tᵀ with δ_t = ∂loss/∂(W u_t). Capture returns the rows u_t and
δ_t. It runs on the pristine model; nothing below the first edited block is differentiated, because all parameters
are frozen and the graph begins at the first edited layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editors.text import Tokens, scored_positions
from editors.views import UpperBlocks

FLOAT16_LOSS_SCALE = 2.0**12
"""Gradients of a float16 model would vanish below 6e-8; a power of two scales them without rounding."""


@dataclass(frozen=True)
class Capture:
    """Captured rows of a batch of examples, padding removed.

    u, delta: one tensor per target, (rows, d_in) and (rows, d_out), float32 (float64 from a float64 model).
    example: one (rows,) int64 tensor per target, the example that each row belongs to; an encoder's weights see other
    rows than a decoder's. loss: (examples,), in nats per token. sequences: the examples themselves.
    """

    u: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    example: tuple[Tensor, ...]
    loss: Tensor
    sequences: tuple[Tokens, ...] = ()


def target_losses(logits: Tensor, sequences: Sequence[Tokens], rows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's target tokens, (examples,) in nats."""
    targets = torch.tensor([token for sequence in sequences for token in sequence.target], device=logits.device)
    nll = F.cross_entropy(_wide(logits), targets, reduction="none")  # (scored,)
    counts = torch.bincount(rows, minlength=len(sequences))
    return nll.new_zeros(len(sequences)).index_add(0, rows, nll) / counts


def capture(upper: UpperBlocks, hidden: Tensor, sequences: Sequence[Tokens]) -> Capture:
    """Capture the gradient of each example of a batch, independently of the others.

    hidden: what enters the first edited block, from `UpperBlocks.below` for the sequences' inputs.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            inputs[name], outputs[name] = args[0].detach(), output
            return output

        return hook

    handles = [upper.module.get_submodule(t.module).register_forward_hook(record(t.name)) for t in upper.targets]
    try:
        with torch.enable_grad():
            rows, _ = scored_positions(sequences, hidden.device)
            losses = target_losses(upper.logits(hidden, sequences), sequences, rows)
            # Some keep single weights in float32, but what is above them passes gradients on in float16.
            loss_scale = FLOAT16_LOSS_SCALE if upper.module.dtype == torch.float16 else 1.0
            # The examples are independent, so the gradient of the sum is each example's own gradient.
            gradients = torch.autograd.grad(
                losses.sum() * loss_scale, [outputs[target.name] for target in upper.targets]
            )
    finally:
        for handle in handles:
            handle.remove()
    lengths = [tuple(upper.rows_seen(target, sequences)) for target in upper.targets]
    real = {each: _real_rows(each, hidden.device) for each in set(lengths)}
    example = {each: mask.nonzero()[:, 0] for each, mask in real.items()}
    return Capture(
        # Some architectures (OPT) flatten batch and tokens before their MLP.
        u=tuple(
            _wide(inputs[target.name].reshape(-1, target.d_in)[real[each].flatten()])
            for target, each in zip(upper.targets, lengths, strict=True)
        ),
        delta=tuple(
            _wide(gradient.reshape(-1, gradient.shape[-1])[real[each].flatten()]) / loss_scale
            for gradient, each in zip(gradients, lengths, strict=True)
        ),
        example=tuple(example[each] for each in lengths),
        loss=losses.detach(),
        sequences=tuple(sequences),
    )


def _real_rows(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Which positions of a padded batch hold tokens: (batch, tokens) bool."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def _wide(rows: Tensor) -> Tensor:
    """At least float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
