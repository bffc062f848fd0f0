"""Train a MEND editor.

One step: draw independent edits -> capture their gradients -> rewrite them -> run every judging text under its own
edit -> L = c_edit · NLL(correction | paraphrase) + c_neighbour · KL(base ‖ edited) on neighbours
+ c_unrelated · KL(base ‖ edited) on unrelated text. Source: arXiv:2110.11309, section 3.2; the locality loss is
split in two because neighbours and unrelated text pull differently.

Each step's batch is a function of (seed, step) alone, so a run that is stopped and resumed equals one that was not.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from editors.capture import capture, target_losses
from editors.errors import CheckpointNotFound, CheckpointUnreadable, TrainingDiverged
from editors.mend.corpus import Batch, Corpus, Text, locality_positions
from editors.mend.editor import MendEditor, Proposal
from editors.mend.variant import DEFAULT_VARIANT
from editors.text import scored_positions
from editors.views import UpperBlocks, edited


@dataclass(frozen=True)
class TrainingConfig:
    """What a run depends on, besides its data and its base model.

    c_edit, c_neighbour, c_unrelated: weights of the losses. learning_rate: of the networks, warmed up, then
    cosine to a twentieth; the steps' own is `step_learning_rate`, on their logarithm.
    patience: validations without a better score before stopping. precision: of the matrix products in training.
    variant: a name of `VARIANTS`.
    """

    variant: str = DEFAULT_VARIANT
    rank: int = 512
    steps: int = 3000
    batch: int = 24
    c_edit: float = 0.2
    c_neighbour: float = 1.0
    c_unrelated: float = 1.0
    unrelated: int = 2
    self_share: float = 0.2
    learning_rate: float = 2e-4
    step_learning_rate: float = 1e-2
    warmup: int = 50
    gradient_clip: float = 10.0
    samples: int = 1024
    validate_every: int = 100
    validation_edits: int = 192
    patience: int = 20
    precision: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Validation:
    """Fractions, teacher-forced: every token of the correction right; same next token as the base model."""

    efficacy: float
    paraphrase: float
    neighbour: float
    unrelated: float

    @property
    def score(self) -> float:
        """Harmonic mean: no figure can be bought with another."""
        figures = [value for value in dataclasses.astuple(self) if not math.isnan(value)]
        return len(figures) / sum(1 / max(value, 1e-6) for value in figures)


@dataclass
class Progress:
    """Where a run stands; saved with its checkpoint."""

    step: int = 0
    best_score: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """Every command that took part in it, the first and those that resumed it."""


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


class Trainer:
    """Trains `editor` on `corpus`, validating on `held_out`.

    folder: where `training.pt` (to resume) is kept.
    """

    def __init__(
        self,
        editor: MendEditor,
        upper: UpperBlocks,
        corpus: Corpus,
        held_out: Corpus,
        config: TrainingConfig,
        folder: Path,
    ) -> None:
        self.editor, self.upper, self.corpus, self.held_out = editor, upper, corpus, held_out
        self.config, self.folder = config, folder
        self.progress = Progress()
        networks = [p for name, p in editor.named_parameters() if name != "log_steps"]
        self.optimizer = torch.optim.Adam(
            [
                {"params": networks, "lr": config.learning_rate},
                {"params": [editor.log_steps], "lr": config.step_learning_rate},
            ]
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.config.warmup))
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.config.steps))))

    def run(self, on_step: Callable[[dict[str, float]], None], on_best: Callable[[Validation], None]) -> None:
        """Train to the end, to early stopping, or to divergence.

        on_step: given each step's losses (and validation figures, when there are some).
        on_best: called whenever the validation score is the best so far; saving the editor is the caller's.
        Raises TrainingDiverged on NaN or infinity; `training.pt` then still holds the last good state.
        """
        if self.progress.step == 0:
            self.calibrate()
        while self.progress.step < self.config.steps:
            started = time.monotonic()
            losses = self.step()
            self.progress.step += 1
            if self.progress.step % self.config.validate_every == 0 or self.progress.step == self.config.steps:
                validation = self.validate()
                figures = dataclasses.asdict(validation) | {"score": validation.score}
                losses |= {f"held out {name}": value for name, value in figures.items()}
                if validation.score > self.progress.best_score:
                    self.progress.best_score, self.progress.best_step = validation.score, self.progress.step
                    on_best(validation)
                self.progress.history.append({"step": self.progress.step, **losses})
                self.progress.seconds += time.monotonic() - started
                self.save()
            else:
                self.progress.seconds += time.monotonic() - started
            on_step(losses)
            behind = self.progress.step - self.progress.best_step
            if behind >= self.config.patience * self.config.validate_every:
                return

    def step(self) -> dict[str, float]:
        """One optimiser step. Returns its losses."""
        rng = random.Random(f"{self.config.seed}-{self.progress.step}")
        batch = self.corpus.draw(
            rng, self.config.batch, self_share=self.config.self_share, unrelated=self.config.unrelated
        )
        loss, parts = self._loss(batch, rng, update_statistics=True)
        self._require_finite("loss", loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.editor.parameters(), self.config.gradient_clip)
        self._require_finite("gradient", norm)  # a finite loss may have one that is not
        self.optimizer.step()
        self.scheduler.step()
        return {**parts, "loss": loss.item(), "gradient": norm.item()}

    def _require_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise TrainingDiverged(
                f"the {what} is {value.item()} at step {self.progress.step}; the last good state is in {self.folder}: "
                "resume it with a lower --learning-rate",
                step=self.progress.step,
            )

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the first step sizes to the power of two at which an untrained editor lowers the loss most.

        The networks begin as the identity on normalised gradients, whose size says nothing about the model's.
        """
        rng = random.Random(f"{self.config.seed}-calibration")
        batch = self.corpus.draw(rng, 2 * self.config.batch, self_share=0.0, unrelated=self.config.unrelated)
        with torch.no_grad():
            self._loss(batch, rng, update_statistics=True)
        start = self.editor.log_steps.clone()
        trials: dict[float, float] = {}
        for exponent in range(-10, 7):
            self.editor.log_steps.copy_(start + exponent * math.log(2))
            trials[exponent] = self._loss(batch, random.Random(0), update_statistics=False)[0].item()
        best = min(trials, key=lambda exponent: trials[exponent] if math.isfinite(trials[exponent]) else math.inf)
        self.editor.log_steps.copy_(start + best * math.log(2))

    def _loss(self, batch: Batch, rng: random.Random, *, update_statistics: bool) -> tuple[Tensor, dict[str, float]]:
        proposal = self._propose(batch.edits, self.corpus, update_statistics=update_statistics)
        # Targets
        targets = [text.tokens for text in batch.targets]
        where = scored_positions(targets, self._device)
        logits = self._edited_logits(proposal, batch.targets, batch.target_owner, where, self.corpus)
        nll = target_losses(logits, targets, where[0]).mean()
        # Locality
        where = tuple(torch.tensor(index, device=self._device) for index in locality_positions(rng, batch.locality))
        hidden = self.corpus.hidden.batch(batch.locality)
        with torch.no_grad(), self._precision():
            base = self.upper.logits(hidden, [text.tokens for text in batch.locality], where)
        changed = self._edited_logits(proposal, batch.locality, batch.locality_owner, where, self.corpus)
        divergence = _Divergence.apply(changed.float(), base.float())
        per_text = torch.zeros(len(batch.locality), device=self._device).index_add(0, where[0], divergence)
        per_text = per_text / torch.bincount(where[0], minlength=len(batch.locality))
        weight = torch.tensor(batch.locality_weight, device=self._device) / len(batch.edits)
        near = torch.tensor(batch.locality_near, device=self._device)
        neighbour = (per_text * weight * near).sum()
        unrelated = (per_text * weight * ~near).sum()
        c = self.config
        loss = c.c_edit * nll + c.c_neighbour * neighbour + c.c_unrelated * unrelated
        parts = {"edit": nll, "neighbour": neighbour, "unrelated": unrelated}
        return loss, {name: value.item() for name, value in parts.items()}

    def _propose(self, edits: list[Text], corpus: Corpus, *, update_statistics: bool) -> Proposal:
        captured = capture(self.upper, corpus.hidden.batch(edits), [text.tokens for text in edits])
        if update_statistics:
            self.editor.update_statistics(captured)
        with self._precision():
            return self.editor(captured)

    def _edited_logits(
        self,
        proposal: Proposal,
        texts: list[Text],
        owner: list[int],
        where: tuple[Tensor, Tensor],
        corpus: Corpus,
    ) -> Tensor:
        factored = {name: (u[owner], delta[owner]) for name, (u, delta) in proposal.padded(self.upper.targets).items()}
        with self._precision(), edited(self.upper.module, self.upper.targets, factored):
            return self.upper.logits(corpus.hidden.batch(texts), [text.tokens for text in texts], where)

    @torch.no_grad()
    def validate(self) -> Validation:
        """Teacher-forced figures on held-out edits, always the same ones."""
        rng = random.Random("validation")
        counts = {name: [0, 0] for name in ("efficacy", "paraphrase", "neighbour", "unrelated")}

        def count(name: str, right: Tensor) -> None:
            counts[name][0] += int(right.sum())
            counts[name][1] += len(right)

        for _ in range(math.ceil(self.config.validation_edits / 32)):
            batch = self.held_out.draw(rng, 32, self_share=0.0, unrelated=2)
            proposal = self._propose(batch.edits, self.held_out, update_statistics=False)
            count("efficacy", self._says_target(proposal, batch.edits, list(range(len(batch.edits)))))
            count("paraphrase", self._says_target(proposal, batch.targets, batch.target_owner))
            locality = [text.tokens for text in batch.locality]
            where = (
                torch.arange(len(locality), device=self._device),
                torch.tensor([tokens.predicted[-1] for tokens in locality], device=self._device),
            )
            base = self.upper.logits(self.held_out.hidden.batch(batch.locality), locality, where).argmax(-1)
            now = self._edited_logits(proposal, batch.locality, batch.locality_owner, where, self.held_out).argmax(-1)
            near = torch.tensor(batch.locality_near, device=self._device)
            count("neighbour", (base == now)[near])
            count("unrelated", (base == now)[~near])
        return Validation(**{name: right / total if total else math.nan for name, (right, total) in counts.items()})

    def _says_target(self, proposal: Proposal, texts: list[Text], owner: list[int]) -> Tensor:
        sequences = [text.tokens for text in texts]
        rows, positions = scored_positions(sequences, self._device)
        said = self._edited_logits(proposal, texts, owner, (rows, positions), self.held_out).argmax(-1)
        wanted = torch.tensor([token for tokens in sequences for token in tokens.target], device=self._device)
        wrong = torch.zeros(len(texts), device=self._device).index_add(0, rows, (said != wanted).float())
        return wrong == 0

    @property
    def _device(self) -> torch.device:
        return self.editor.log_steps.device

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            yield

    def save(self) -> None:
        """Keep everything that the next step depends on, in one file that is replaced whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / "training.pt.draft"
        torch.save(
            {
                "config": dataclasses.asdict(self.config),
                "progress": dataclasses.asdict(self.progress),
                "editor": self.editor.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            },
            draft,
        )
        os.replace(draft, self.folder / "training.pt")

    def resume(self) -> None:
        """Go on from `training.pt` exactly where it stopped, statistics included."""
        path = self.folder / "training.pt"
        try:
            saved = torch.load(path, weights_only=True, map_location=self._device)
            self.editor.load_state_dict(saved["editor"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            self.progress = Progress(**saved["progress"])
        except FileNotFoundError as error:
            raise CheckpointNotFound(f"{path} is missing, so there is no run to resume", file=str(path)) from error
        except Exception as error:  # torch.load and the state dicts raise many unrelated types
            raise CheckpointUnreadable(f"{path} cannot be resumed ({error}); train anew", file=str(path)) from error
