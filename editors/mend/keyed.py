"""The editor for many edits at once: one key and one wanted change per edit and weight, joined by least squares.

    key     what the weight reads at the last token of the subject, whitened (see `least_squares_editor`)
    change  v = network(u, gradient at the key, gradient at the answer)

Summed changes of single edits destroy each other within a dozen; these are trained, through the solve, on sets of up
to a thousand. Sources: MEND (arXiv:2110.11309) for gradients in and weight changes out, MALMEN (Tan et al., ICLR 2024)
for least squares, MEMIT (arXiv:2210.07229) for the subject's last token and the covariance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from editors.capture import Capture
from editors.least_squares_editor import LeastSquaresEditor
from editors.mend.editor import Proposal
from editors.targets import Target

ANSWERS = 2
"""Gradients at the answer that a network reads: of its first token, and of all."""
FIRST_SHARE = 0.04
"""Of the size of what a weight usually writes: how far each gradient moves it before training."""
FIRST_RIDGE = 1.0
"""λ before training. Among a thousand keys a small one would move other texts nearly twice as far."""
BOUND = 8.0
"""Standard deviations to which inputs are clipped: some features are nearly always 0."""


@dataclass(frozen=True)
class Evidence:
    """What edits are made from, all that is left of their captures.

    u, delta: per edited weight, its input at the key (edits, d_in) and the gradient of its output there (edits, d_out).
    answer: gradients at the witness, (edits, ANSWERS, width).
    """

    u: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    answer: Tensor

    def __len__(self) -> int:
        return len(self.answer)


class ValueNetwork(nn.Module):
    """The wanted change of one weight's output at its key. It begins as a step against the gradients.

    Gradients are read by their direction: their size says how wrong the model was, not what it should say.
    """

    def __init__(self, d_in: int, d_out: int, answer: int, rank: int) -> None:
        super().__init__()
        gradients = d_out + ANSWERS * answer
        self.read = nn.Linear(d_in + gradients, rank)
        self.mix = nn.Linear(rank, rank)
        self.write = nn.Linear(rank, d_out)
        self.skip = nn.Linear(gradients, d_out, bias=False)
        self.register_buffer("mean", torch.zeros(d_in))
        self.register_buffer("deviation", torch.ones(d_in))
        self.register_buffer("unit", torch.ones(()))
        nn.init.normal_(self.write.weight, std=0.01 / math.sqrt(rank))
        nn.init.zeros_(self.write.bias)
        nn.init.zeros_(self.skip.weight)
        with torch.no_grad():
            self.skip.weight[:, :d_out].fill_diagonal_(-FIRST_SHARE)
            if answer == d_out:  # both are of the residual stream
                self.skip.weight[:, -answer:].fill_diagonal_(-FIRST_SHARE)

    @torch.no_grad()
    def fit(self, u: Tensor, weight: Tensor) -> None:
        """Take the statistics of keys' inputs u (edits, d_in), and the size of what `weight` (d_out, d_in) writes."""
        self.mean.copy_(u.mean(0))
        self.deviation.copy_(u.std(0).clamp(min=1e-4 * u.std()))
        self.unit.copy_((u @ weight.to(u.dtype).T).square().mean().sqrt())

    def normalise(self, u: Tensor) -> Tensor:
        return ((u - self.mean) / self.deviation).clamp(-BOUND, BOUND)

    def forward(self, u: Tensor, delta: Tensor, answer: Tensor) -> Tensor:
        """u (edits, d_in), delta (edits, d_out), answer (edits, ANSWERS, width) -> (edits, d_out)."""
        gradients = torch.cat([_direction(delta), *_direction(answer).unbind(1)], dim=-1)
        h = F.silu(self.read(torch.cat([self.normalise(u), gradients], dim=-1)))
        h = h + F.silu(self.mix(h))
        return self.unit * (self.write(h) + self.skip(gradients))


class Gate(nn.Module):
    """Finds the token that an edit is keyed at where the caller does not name the subject.

    Trained to find the subject's last token; untrained it takes the prompt's. Reads the input of the first edited
    weight at each token of the prompt.
    """

    def __init__(self, d_in: int, rank: int) -> None:
        super().__init__()
        self.read = nn.Linear(d_in, rank)
        self.write = nn.Linear(rank, 1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Normalised inputs (tokens, d_in) -> (tokens,) in nats, one softmax over a prompt's tokens."""
        return self.write(F.silu(self.read(u)))[:, 0]


class KeyedEditor(LeastSquaresEditor):
    """An editor of decoders whose edits are joined by least squares.

    targets: the edited weights. witness: a weight that is only read, of the last block, whose gradient at the answer's
    tokens says what is wanted. rank: width of the networks.
    """

    def __init__(self, targets: Sequence[Target], witness: Target, rank: int) -> None:
        super().__init__(targets, FIRST_RIDGE)
        self.witness, self.rank = witness, rank
        self.networks = nn.ModuleList(ValueNetwork(t.d_in, t.d_out, witness.d_out, rank) for t in self.targets)
        # Trained before everything else, by itself.
        self.gate = Gate(self.targets[0].d_in, max(1, rank // 8)).requires_grad_(False)

    @property
    def captured(self) -> tuple[Target, ...]:
        """The weights whose inputs and gradients are captured."""
        return (*self.targets, self.witness)

    @property
    def scalars(self) -> list[nn.Parameter]:
        """Parameters that are trained at a rate of their own."""
        return [self.log_ridge]

    def forward(self, capture: Capture) -> Proposal:
        """Keys and wanted changes of a batch of edits, one row each. See `Proposal` for shapes."""
        return self.propose(self.read(capture))

    @torch.no_grad()
    def read(self, capture: Capture) -> Evidence:
        """What matters of captures of `captured`: their rows at the keys and at the answers."""
        starts = _starts(capture)
        rows = starts + torch.tensor(self._positions(capture), device=starts.device)
        wrong = capture.delta[-1].float()
        first = starts + torch.tensor([tokens.scored[0] for tokens in capture.sequences], device=starts.device)
        every = wrong.new_zeros(len(starts), wrong.shape[1]).index_add(0, capture.example[-1], wrong)
        return Evidence(
            tuple(u[rows].float() for u in capture.u[:-1]),
            tuple(delta[rows].float() for delta in capture.delta[:-1]),
            torch.stack([wrong[first], every], 1),
        )

    def propose(self, evidence: Evidence) -> Proposal:
        """`Proposal.u` holds keys, `Proposal.delta` wanted changes."""
        edits = torch.arange(len(evidence), device=evidence.answer.device)
        read = zip(self.networks, evidence.u, evidence.delta, strict=True)
        return Proposal(
            u=tuple(self.keys(index, u) for index, u in enumerate(evidence.u)),
            delta=tuple(network(u, delta, evidence.answer) for network, u, delta in read),
            example=(edits,) * len(self.targets),
            edits=len(evidence),
        )

    @torch.autocast("cuda", enabled=False)  # it has no solve in half precision
    def together(self, proposal: Proposal, size: int, targets: Sequence[Target]) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What groups of `size` edits do together, for `views.edited` under the names of `targets`; differentiable.

        The dual form of `LeastSquaresState`, unquantised.
        """
        factored = {}
        for index, target in enumerate(targets):
            keys = proposal.u[index].float().unflatten(0, (-1, size))  # (groups, size, d_in)
            changes = proposal.delta[index].float().unflatten(0, (-1, size)) * size**-self.fading
            ridge = self.log_ridge[index].exp() * torch.eye(size, device=keys.device)
            solved = torch.linalg.solve(keys @ keys.mT + ridge, changes)
            unwhitened = torch.linalg.solve_triangular(self.whitening(index).T, keys.flatten(0, 1).T, upper=True).T
            factored[target.name] = (unwhitened.view_as(keys), solved)
        return factored

    def _positions(self, capture: Capture) -> list[int]:
        """Of each example's key: the end of its subject, or where the gate finds one."""
        unknown = [index for index, tokens in enumerate(capture.sequences) if tokens.subject is None]
        found = dict(zip(unknown, self.find(capture, unknown), strict=True))
        return [
            found[index] if tokens.subject is None else tokens.subject for index, tokens in enumerate(capture.sequences)
        ]

    def find(self, capture: Capture, examples: Sequence[int]) -> list[int]:
        """The token of each example's prompt that the gate takes for the end of a subject."""
        positions = []
        for index in examples:
            tokens = capture.sequences[index]
            question = tokens.question or range(len(tokens.prompt))
            u = capture.u[0][capture.example[0] == index][question.start : question.stop].float()
            scores = self.gate(self.networks[0].normalise(u))
            positions.append(question.stop - 1 - int(scores.flip(0).argmax()))
        return positions


def _starts(capture: Capture) -> Tensor:
    """Index of each example's first row, (examples,) int64; a decoder's weights all see the same rows."""
    counts = torch.bincount(capture.example[0], minlength=len(capture.loss))
    return torch.cumsum(counts, 0) - counts


def _direction(rows: Tensor) -> Tensor:
    """Scaled to entries of size 1 on average."""
    return F.normalize(rows, dim=-1) * math.sqrt(rows.shape[-1])
