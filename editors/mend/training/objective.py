"""What an editor is trained for, and how well it does: the losses of a micro-batch, the figures of a validation.

For each edit: the likelihood of its correction on another wording of the prompt, and how little moves elsewhere.
Several edits may be in force together; every text of such a group then runs under the sum of its edits.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.capture import Capture, capture, target_losses
from editors.mend.editor import MendEditor, Proposal
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Batch, Corpus, locality_positions
from editors.mend.training.hidden import Text
from editors.targets import Target
from editors.text import scored_positions
from editors.views import Factored, UpperBlocks, edited

LOSSES = ("edit", "neighbour", "unrelated", "loss")
VALIDATION_BATCH = 32
Where = tuple[list[int], list[int]]
"""Row and position of each prediction that is wanted."""
PASS_TOKENS = 1000
"""Of the texts of a micro-batch that are run together, their padding included, short ones first. Fewer do not keep a
processor busy, and with more texts of one batch there is more padding."""
UNRELATED = 2
"""Unrelated texts of each edit in a validation."""


@dataclass(frozen=True)
class Validation:
    """Fractions, teacher-forced: every token of the correction right; same next token as the base model.

    NaN where there was nothing to measure, such as neighbours in data that has none.
    """

    efficacy: float
    paraphrase: float
    neighbour: float
    unrelated: float

    @property
    def score(self) -> float:
        """Harmonic mean: no figure can be bought with another."""
        figures = [value for value in dataclasses.astuple(self) if not math.isnan(value)]
        return len(figures) / sum(1 / max(value, 1e-6) for value in figures)


class _Divergence(torch.autograd.Function):
    """KL(base ‖ edited) per row of logits, (rows, vocabulary) -> (rows,) in nats.

    Written out because the vocabulary is wide: composed of library calls it took half of a training step.
    """

    @staticmethod
    def forward(context, edited: Tensor, base: Tensor) -> Tensor:  # noqa: ANN001 - torch's own signature
        p, q = base.softmax(-1), edited.softmax(-1)
        kl = (p * (base - edited)).sum(-1) - base.logsumexp(-1) + edited.logsumexp(-1)
        context.save_for_backward(q.sub_(p))
        return kl

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001
        (difference,) = context.saved_tensors
        return difference * gradient[:, None], None


class Objective:
    """What `editor` is trained for on one corpus. upper: the base model's blocks, of what the editor captures."""

    def __init__(self, editor: MendEditor, upper: UpperBlocks, corpus: Corpus, config: TrainingConfig) -> None:
        self.editor, self.upper, self.corpus, self.config = editor, upper, corpus, config

    def draw(self, seed: str, index: int) -> tuple[Batch, random.Random]:
        """The `index`-th micro-batch of a step, with the generator for what is still to be chosen."""
        c = self.config
        chosen = self.corpus.choose(random.Random(seed), (index + 1) * c.micro_batch, c.together)
        rng = random.Random(f"{seed}-{index}")
        own = chosen[index * c.micro_batch :]
        judged_on = {"self_share": c.self_share, "unrelated": c.unrelated, "near": c.neighbours}
        return self.corpus.draw(rng, own, together=c.together, **judged_on), rng

    def capture(self, batch: Batch) -> Capture:
        """The gradients of a batch's edits, each by itself."""
        return capture(self.upper, self.corpus.hidden.batch(batch.edits), [text.tokens for text in batch.edits])

    def losses(self, batch: Batch, captured: Capture, rng: random.Random) -> Tensor:
        """Means over the batch's edits, by `LOSSES`, (4,) in nats; the last is what is minimised.

        captured: from `capture`. rng: chooses where locality is scored.
        """
        changes = self._changes(batch, captured)
        wanted, where = _scored(batch.targets), locality_positions(rng, batch.locality)
        with torch.no_grad(), self._precision():
            base = self._base_logits(batch.locality, where)
        texts, owner = [*batch.targets, *batch.locality], [*batch.target_owner, *batch.locality_owner]
        moved = [row + len(batch.targets) for row in where[0]]
        logits = self._edited_logits(changes, batch, texts, owner, (wanted[0] + moved, wanted[1] + where[1]))
        said, changed = logits.split([len(wanted[0]), len(moved)])
        # Targets
        targets = [text.tokens for text in batch.targets]
        nll = target_losses(said, targets, scored_positions(targets, self._device)[0]).mean()
        # Locality
        divergence = _Divergence.apply(changed.float(), base.float())
        rows = torch.tensor(where[0], device=self._device)
        per_text = torch.zeros(len(batch.locality), device=self._device).index_add(0, rows, divergence)
        per_text = per_text / torch.bincount(rows, minlength=len(batch.locality))
        weight = torch.tensor(batch.locality_weight, device=self._device) / len(batch.targets)
        near = torch.tensor(batch.locality_near, device=self._device)
        neighbour = (per_text * weight * near).sum()
        unrelated = (per_text * weight * ~near).sum()
        c = self.config
        loss = c.c_edit * nll + c.c_neighbour * neighbour + c.c_unrelated * unrelated
        return torch.stack([nll, neighbour, unrelated, loss])

    @torch.no_grad()
    def validate(self) -> Validation:
        """Figures on edits of the corpus, always the same ones."""
        return self._measured(self._validation_batches())

    def _validation_batches(self) -> Iterator[Batch]:
        rng = random.Random("validation")
        together = self.config.together
        size = max(together, VALIDATION_BATCH // together * together)
        for _ in range(math.ceil(self.config.validation_edits / size)):
            chosen = self.corpus.choose(rng, size, together)
            yield self.corpus.draw(rng, chosen, self_share=0.0, unrelated=UNRELATED, together=together)

    def _measured(self, batches: Iterable[Batch]) -> Validation:
        counts = {option.name: [0, 0] for option in dataclasses.fields(Validation)}

        def count(name: str, right: Tensor) -> None:
            counts[name][0] += int(right.sum())
            counts[name][1] += len(right)

        for batch in batches:
            changes = self._changes(batch, self.capture(batch))
            own = [batch.edits[owner] for owner in batch.target_owner]
            count("efficacy", self._says_target(changes, batch, own))
            count("paraphrase", self._says_target(changes, batch, batch.targets))
            where = _scored(batch.locality)
            base = self._base_logits(batch.locality, where).argmax(-1)
            now = self._edited_logits(changes, batch, batch.locality, batch.locality_owner, where).argmax(-1)
            near = torch.tensor([batch.locality_near[row] for row in where[0]], device=self._device)
            count("neighbour", (base == now)[near])
            count("unrelated", (base == now)[~near])
        return Validation(**{name: right / total if total else math.nan for name, (right, total) in counts.items()})

    def _changes(self, batch: Batch, captured: Capture) -> Factored:
        """The changes to run texts under, one for each group of edits."""
        with self._precision():
            return self.editor.together(self._propose(captured), batch.together, self._targets)

    def _propose(self, captured: Capture) -> Proposal:
        return self.editor(captured)

    @property
    def _targets(self) -> tuple[Target, ...]:
        """The edited weights under the names that they have in the upper blocks."""
        return self.upper.targets[: len(self.editor.targets)]

    def _logits(self, texts: Sequence[Text], where: tuple[Tensor, Tensor]) -> Tensor:
        return self.upper.logits(self.corpus.hidden.batch(texts), [text.tokens for text in texts], where)

    def _base_logits(self, texts: Sequence[Text], where: Where) -> Tensor:
        return self._by_length(texts, where, lambda part, at: self._logits([texts[index] for index in part], at))

    def _edited_logits(
        self, changes: Factored, batch: Batch, texts: Sequence[Text], owner: Sequence[int], where: Where
    ) -> Tensor:
        """Logits of texts, each under the change of the group that its owner belongs to."""
        grouped = batch.together < len(batch.edits)

        def run(part: Sequence[int], part_where: tuple[Tensor, Tensor]) -> Tensor:
            group = [owner[index] // batch.together for index in part]
            own = {name: (u[group], delta[group]) for name, (u, delta) in changes.items()} if grouped else changes
            with self._precision(), edited(self.upper.module, self._targets, own):
                return self._logits([texts[index] for index in part], part_where)

        return self._by_length(texts, where, run)

    def _by_length(
        self,
        texts: Sequence[Text],
        where: Where,
        run: Callable[[Sequence[int], tuple[Tensor, Tensor]], Tensor],
    ) -> Tensor:
        """What `run` gives for the wanted positions, texts of similar length together: padding costs as much as words.

        run: given indexes of texts, and row among them and position of each prediction that is wanted.
        """
        found, wanted = [], []
        for part in _passes(texts):
            place = {index: row for row, index in enumerate(part)}
            own = [number for number, row in enumerate(where[0]) if row in place]
            rows = torch.tensor([place[where[0][number]] for number in own], device=self._device)
            positions = torch.tensor([where[1][number] for number in own], device=self._device)
            found.append(run(list(place), (rows, positions)))
            wanted += own
        back = sorted(range(len(wanted)), key=wanted.__getitem__)
        return torch.cat(found)[torch.tensor(back, device=self._device)]

    def _says_target(self, changes: Factored, batch: Batch, texts: Sequence[Text]) -> Tensor:
        """Of texts that belong to the batch's target owners, one each."""
        sequences = [text.tokens for text in texts]
        rows, _ = scored_positions(sequences, self._device)
        said = self._edited_logits(changes, batch, texts, batch.target_owner, _scored(texts)).argmax(-1)
        wanted = torch.tensor([token for tokens in sequences for token in tokens.target], device=self._device)
        wrong = torch.zeros(len(texts), device=self._device).index_add(0, rows, (said != wanted).float())
        return wrong == 0

    @property
    def _device(self) -> torch.device:
        return self.editor.scalars[0].device

    def _precision(self) -> AbstractContextManager:
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def _passes(texts: Sequence[Text]) -> Iterator[list[int]]:
    """Indexes of texts that are run together."""
    part: list[int] = []
    for index in sorted(range(len(texts)), key=lambda index: len(texts[index].tokens.inputs)):
        if part and (len(part) + 1) * len(texts[index].tokens.inputs) > PASS_TOKENS:
            yield part
            part = []
        part.append(index)
    yield part


def _scored(texts: Sequence[Text]) -> Where:
    """Every position that is scored."""
    pairs = [(row, position) for row, text in enumerate(texts) for position in text.tokens.scored]
    return [row for row, _ in pairs], [position for _, position in pairs]
