"""Training on sets of edits that are in force together: one of a few up to as many as a service holds.

How many is drawn anew for every micro-batch, log-uniformly. What an edit is made from does not depend on the others, so
it is captured once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from editors.mend.editor import Proposal
from editors.mend.keyed import Evidence, KeyedEditor
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Batch, Corpus
from editors.mend.training.hidden import Text
from editors.mend.training.objective import UNRELATED, Objective, Validation
from editors.text import Tokens
from editors.views import UpperBlocks

CAPTURED_TOGETHER = 32
VALIDATED = (1, 10, 100, 1000)
"""Sizes of sets in a validation."""


class SetObjective(Objective):
    """What a keyed editor is trained for on one corpus: edits that hold, beside all the others of their set."""

    def __init__(self, editor: KeyedEditor, upper: UpperBlocks, corpus: Corpus, config: TrainingConfig) -> None:
        super().__init__(editor, upper, corpus, config)
        self._place: dict[Tokens, int] = {}
        self._evidence: Evidence | None = None

    def draw(self, seed: str, index: int) -> tuple[Batch, random.Random]:
        rng = random.Random(f"{seed}-{index}")
        size = round(self._largest ** rng.random())
        c = self.config
        return self._draw(
            rng, size, c.micro_batch, self_share=c.self_share, unrelated=c.unrelated, near=c.neighbours
        ), rng

    def capture(self, batch: Batch) -> Evidence:
        if self._evidence is None:
            self._capture_all()
        rows = torch.tensor([self._place[text.tokens] for text in batch.edits])
        device, held = self.upper.module.device, self._evidence
        return Evidence(
            tuple(u[rows].to(device) for u in held.u),
            tuple(delta[rows].to(device) for delta in held.delta),
            held.answer[rows].to(device),
        )

    def _propose(self, captured: Evidence) -> Proposal:
        return self.editor.propose(captured)

    @torch.no_grad()
    def by_size(self, edits: int) -> dict[int, Validation]:
        """Figures of sets of each size, on so many edits in all; always the same ones."""
        return {batch.together: self._measured([batch]) for batch in self._of_sizes(edits)}

    def _validation_batches(self) -> Iterator[Batch]:
        return self._of_sizes(self.config.validation_edits)

    def _of_sizes(self, edits: int) -> Iterator[Batch]:
        """Of every size as many."""
        rng = random.Random("validation")
        sizes = [size for size in VALIDATED if size <= self._largest] or [self._largest]
        for size in sizes:
            yield self._draw(rng, size, edits // len(sizes), self_share=0.0, unrelated=UNRELATED)

    @property
    def _largest(self) -> int:
        return min(self.config.together, len(self.corpus.prompts))

    def _draw(self, rng: random.Random, size: int, judged: int, **judged_on: Any) -> Batch:
        """Sets of one size, of which about `judged` edits are judged."""
        groups = max(1, judged // size)
        chosen = self.corpus.choose(rng, groups * size, size)
        return self.corpus.draw(rng, chosen, together=size, judged=max(1, judged // groups), **judged_on)

    def _capture_all(self) -> None:
        """Of edits of equal length together, so that a batch has little padding."""
        texts = {item.edit.tokens: item.edit for items in self.corpus.files for item in items}
        ordered = sorted(texts.values(), key=lambda text: (len(text.tokens.inputs), text.tokens.inputs))
        self._place = {text.tokens: place for place, text in enumerate(ordered)}
        batches = [ordered[start : start + CAPTURED_TOGETHER] for start in range(0, len(ordered), CAPTURED_TOGETHER)]
        read = [self._read(batch) for batch in tqdm(batches, desc="captures", unit="batch", disable=None)]
        self._evidence = Evidence(
            tuple(torch.cat(parts) for parts in zip(*(one.u for one in read), strict=True)),
            tuple(torch.cat(parts) for parts in zip(*(one.delta for one in read), strict=True)),
            torch.cat([one.answer for one in read]),
        )

    def _read(self, texts: Sequence[Text]) -> Evidence:
        found = self.editor.read(super().capture(Batch(list(texts))))
        return Evidence(tuple(u.cpu() for u in found.u), tuple(d.cpu() for d in found.delta), found.answer.cpu())
