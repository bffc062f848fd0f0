"""One edit and one training step on random tokens, with the very classes that make them.

The same walk is run twice: on the meta device to plan, on a real one to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editors.capture import Capture, capture
from editors.factors import Factors, quantise
from editors.mend.editor import MendEditor
from editors.mend.training.config import TrainingConfig
from editors.mend.training.trainer import Trainer
from editors.mend.variant import Variant
from editors.planning.random_text import RandomCorpus, RandomTexts
from editors.scale import search_scale
from editors.state import SumState
from editors.targets import Target
from editors.text import Tokens
from editors.views import UpperBlocks, view

FORWARD, QUANTISE, DIGEST = "forward pass", "quantise", "digest"


@dataclass(frozen=True)
class Workload:
    """tokens: that the model reads for an edit, the correction included. rank: of the editor's networks.

    batch: independent edits in a training step.
    """

    tokens: int = 16
    rank: int = 512
    batch: int = 24


class EditWalk:
    """What a service holds beside its base model, and one edit in steps, each of which needs those before it.

    Held are, as in the service's engine: a live and a candidate view, the upper blocks of all three views, the
    exact state and the editor.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target], work: Workload) -> None:
        own = [target.name for target in targets]
        self.base, self.targets = model, targets
        self.live, self.candidate = view(model, own), view(model, own)
        self.pristine, self.upper_live, self.upper_candidate = (
            UpperBlocks(module, targets) for module in (model, self.live, self.candidate)
        )
        self.state = SumState(targets, model.device)
        self.editor = build_editor(model, targets, work.rank)
        self.tokens = RandomTexts(model, work.tokens).edit()
        hidden = self.pristine.below([self.tokens.inputs])
        self.editor.update_statistics(capture(self.pristine, hidden, [self.tokens]))

    @property
    def steps(self) -> dict[str, Callable[[], None]]:
        """A plain forward pass, to compare with, and the steps of an edit."""
        return {
            FORWARD: self.forward,
            "lower blocks": self._below,
            "capture": self._capture,
            "editor": self._edit,
            "search": self._search,
            QUANTISE: self._quantise,
            "add to the state": self._add,
            "write the candidate": self._write,
            DIGEST: self._digest,
            "publish": self._publish,
        }

    def forward(self) -> Tensor:
        """Logits of what an edit reads."""
        return read(self.base, self.tokens)

    def _below(self) -> None:
        self._hidden = self.pristine.below([self.tokens.inputs])

    def _capture(self) -> None:
        self._captured: Capture = capture(self.pristine, self._hidden, [self.tokens])

    @torch.no_grad()
    def _edit(self) -> None:
        self.rows: Mapping[str, tuple[Tensor, Tensor]] = self.editor(self._captured).rows_of(self.targets, 0)
        del self._captured

    def _search(self) -> None:
        names = zip(self.targets, self.upper_live.targets, strict=True)
        rows = {short.name: self.rows[full.name] for full, short in names}
        (increment,) = self.state.increments(rows)
        search_scale(self.upper_live, self._hidden, self.tokens, increment)

    def _quantise(self) -> None:
        self.factors: Factors = quantise(self.rows)

    def _add(self) -> None:
        self.state.add(self.factors)

    def _write(self) -> None:
        self.state.write(self.base, self.candidate)

    def _digest(self) -> None:
        self.state.digest()

    @torch.no_grad()
    def _publish(self) -> None:
        for target in self.targets:
            self.live.get_parameter(target.name).copy_(self.candidate.get_parameter(target.name))

    def take_back(self) -> None:
        """As if the edit had never been made; what its steps gave is dropped."""
        self.state.remove(self.factors)
        self.state.write(self.base, self.candidate)
        self._publish()
        del self._hidden, self.rows, self.factors


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """A plain forward pass, with which every cost is compared. Returns logits of all positions."""
    inputs = {"input_ids": tokens.inputs, "decoder_input_ids": tokens.decoder_inputs}
    return model(**{name: torch.tensor([ids], device=model.device) for name, ids in inputs.items() if ids}).logits


class TrainingWalk:
    """What training holds beside the base model, and its step: the trainer's own, on random tokens."""

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target], work: Workload) -> None:
        self.upper = UpperBlocks(model, targets)
        self.editor = build_editor(model, targets, work.rank)
        corpus = RandomCorpus(self.upper, RandomTexts(model, work.tokens))
        config = TrainingConfig(rank=work.rank, batch=work.batch)
        self.trainer = Trainer(self.editor, self.upper, corpus, corpus, config, Path())

    def step(self) -> None:
        self.trainer.step()
        self.trainer.progress.step += 1


def build_editor(model: PreTrainedModel, targets: Sequence[Target], rank: int) -> MendEditor:
    """An untrained editor on the model's device, in float32."""
    with torch.device(model.device):
        return MendEditor(targets, Variant(rank=rank))
