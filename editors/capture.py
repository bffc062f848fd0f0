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

from editors.text import Tokens
from editors.views import UpperBlocks


@dataclass(frozen=True)
class Capture:
    """Captured rows of a batch of examples, padding removed.

    u, delta: one tensor per target, (rows, d_in) and (rows, d_out), float32.
    example: one tensor per target, (rows,) int64, the example that each row belongs to, in ascending order.
    loss: (examples,) float32, in nats per token.
    """

    u: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    example: tuple[Tensor, ...]
    loss: Tensor


def scored_positions(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and position of every scored prediction of a padded batch, two int64 tensors (scored,)."""
    rows = [row for row, sequence in enumerate(sequences) for _ in sequence.scored]
    positions = [position for sequence in sequences for position in sequence.scored]
    return torch.tensor(rows, device=device), torch.tensor(positions, device=device)


def target_losses(logits: Tensor, sequences: Sequence[Tokens], rows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's target tokens, (examples,) in nats."""
    targets = torch.tensor([token for sequence in sequences for token in sequence.target], device=logits.device)
    nll = F.cross_entropy(logits.float(), targets, reduction="none")  # (scored,)
    counts = torch.bincount(rows, minlength=len(sequences))
    return torch.zeros(len(sequences), device=logits.device).index_add(0, rows, nll) / counts


def capture(upper: UpperBlocks, hidden: Tensor, sequences: Sequence[Tokens]) -> Capture:
    """Capture the gradient of each example of a batch, independently of the others.

    hidden: (batch, tokens, width), what enters the first edited block for `Tokens.inputs`, padded on the right.
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
            rows, positions = scored_positions(sequences, hidden.device)
            logits = upper.logits(hidden, (rows, positions))
            losses = target_losses(logits, sequences, rows)
            # The examples are independent, so the gradient of the sum is each example's own gradient.
            gradients = torch.autograd.grad(losses.sum(), [outputs[target.name] for target in upper.targets])
    finally:
        for handle in handles:
            handle.remove()
    lengths = torch.tensor([len(sequence.inputs) for sequence in sequences], device=hidden.device)
    real = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (batch, tokens)
    kept = real.flatten()  # some architectures (OPT) flatten batch and tokens before their MLP
    return Capture(
        u=tuple(inputs[target.name].reshape(-1, target.d_in)[kept].float() for target in upper.targets),
        delta=tuple(g.reshape(-1, g.shape[-1])[kept].float() for g in gradients),
        example=(real.nonzero()[:, 0],) * len(upper.targets),
        loss=losses.detach(),
    )
