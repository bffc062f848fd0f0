"""Train an editor: what happens in a step, how a run goes on after it was stopped, and when it ends.

    step     a step's edits are drawn from (seed, step) and cut into micro-batches, shared out among the processes
    capture  of every micro-batch, on the pristine base model (only the upper blocks are differentiated)
    count    the rows of all of them in the editor's statistics, in the order of the micro-batches
    learn    each micro-batch's losses and their gradients; the mean over all, clipped; one optimiser step

Training never touches the base model's weights: edits run as factors beside them. Everything random is drawn from
(seed, step, micro-batch), so a resumed run continues exactly, and several processes do what one would have done.
"""

from __future__ import annotations

import dataclasses
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from editors.capture import Capture
from editors.errors import (
    BaseModelMismatch,
    CheckpointNotFound,
    CheckpointUnreadable,
    ResumeRefused,
    TrainingDiverged,
)
from editors.mend.editor import MendEditor
from editors.mend.keyed import Evidence, KeyedEditor
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Batch, Corpus
from editors.mend.training.journal import Curve
from editors.mend.training.objective import LOSSES, Objective, Validation
from editors.mend.training.processes import ALONE, Processes
from editors.mend.training.sets import SetObjective
from editors.mend.training.statistics import merge_statistics
from editors.views import UpperBlocks

STATE = "training.pt"
CALIBRATION_STEPS = 2
"""The first step sizes are calibrated on the edits of so many steps."""
CALIBRATION_POWERS = range(-10, 7)


@dataclass
class Progress:
    """Where a run stands; saved with its checkpoint."""

    step: int = 0
    best_score: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    """The step, losses and figures of every validation."""
    commands: list[str] = field(default_factory=list)
    """Every command that took part in it, the first and those that resumed it."""


@dataclass(frozen=True)
class _Micro:
    """A micro-batch of this process' share. rng: its own, for what is still to be chosen."""

    batch: Batch
    captured: Capture | Evidence
    rng: random.Random


class Trainer:
    """Trains `editor` on `corpus`, validating on `held_out`.

    folder: where `training.pt` (to resume) is kept. processes: those that train together.
    about: what the run depends on beside its configuration, in words: base model (its digest), data, layers.
    """

    def __init__(
        self,
        editor: MendEditor | KeyedEditor,
        upper: UpperBlocks,
        corpus: Corpus,
        held_out: Corpus,
        config: TrainingConfig,
        folder: Path,
        processes: Processes = ALONE,
        about: Mapping[str, str] | None = None,
    ) -> None:
        config.require_shares(processes.count)
        config.require_groups(corpus.prompts, held_out.prompts)
        self.editor, self.corpus, self.config, self.folder = editor, corpus, config, folder
        objective = SetObjective if config.aggregate == "least_squares" else Objective
        self.objective = objective(editor, upper, corpus, config)
        self.judgement = objective(editor, upper, held_out, config)
        self._processes = processes
        self._about = {"base model": "", **(about or {})}
        self.progress, self.curve = Progress(), Curve()
        scalars = {id(parameter) for parameter in editor.scalars}
        networks = [parameter for parameter in editor.parameters() if id(parameter) not in scalars]
        self.optimizer = torch.optim.Adam([{"params": networks}, {"params": editor.scalars}])

    def run(self, on_step: Callable[[dict[str, float]], None], on_best: Callable[[Validation], None]) -> None:
        """Train to the end, to early stopping, or to divergence.

        on_step: given each step's losses (and validation figures, when there are some).
        on_best: called whenever the validation score is the best so far; saving the editor is the caller's.
        Both are called on the main process alone.
        Raises TrainingDiverged on NaN or infinity; `training.pt` then still holds the last good state.
        """
        main = self._processes.is_main
        if self.progress.step == 0 and self.config.aggregate == "sum":
            self.calibrate()
        while self.progress.step < self.config.steps:
            started = time.monotonic()
            figures = self.step()
            self.progress.step += 1
            self.curve.add(self.progress.step, figures)
            if self.progress.step % self.config.validate_every == 0 or self.progress.step == self.config.steps:
                validation = self.validate()
                measured = dataclasses.asdict(validation) | {"score": validation.score}
                figures |= {f"held out {name}": value for name, value in measured.items()}
                if validation.score > self.progress.best_score:
                    self.progress.best_score, self.progress.best_step = validation.score, self.progress.step
                    if main:
                        on_best(validation)
                self.progress.history.append({"step": self.progress.step, **figures})
                self.progress.seconds += time.monotonic() - started
                if main:
                    self.save()
            else:
                self.progress.seconds += time.monotonic() - started
            if main:
                on_step(figures)
            behind = self.progress.step - self.progress.best_step
            if behind >= self.config.patience * self.config.validate_every:
                return

    def step(self) -> dict[str, float]:
        """One optimiser step. Returns its losses, the norm of its gradient and its learning rate."""
        micros = self._prepare(f"{self.config.seed}-{self.progress.step}", self.config.accumulate)
        self.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(LOSSES), device=self._device)
        for micro in micros:
            found = self.objective.losses(micro.batch, micro.captured, micro.rng) / self.config.accumulate
            found[-1].backward()
            losses += found.detach()
        parameters = [parameter for parameter in self.editor.parameters() if parameter.requires_grad]
        self._processes.add([*(parameter.grad for parameter in parameters), losses])
        named = dict(zip(LOSSES, losses.tolist(), strict=True))
        self._require_finite("loss", named["loss"])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip or math.inf).item()
        self._require_finite("gradient", norm)  # a finite loss may have one that is not
        rate = self.config.rate(self.progress.step)
        peaks = (self.config.learning_rate, self.config.step_learning_rate)
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["lr"] = rate * peak
        self.optimizer.step()
        return {**named, "gradient": norm, "learning rate": rate * self.config.learning_rate}

    def _prepare(self, seed: str, count: int) -> list[_Micro]:
        """This process' share of `count` micro-batches drawn from a seed, captured; the rows of all are counted."""
        micros: dict[int, _Micro] = {}
        for index in self._processes.share(count):
            batch, rng = self.objective.draw(seed, index)
            micros[index] = _Micro(batch, self.objective.capture(batch), rng)
        captures = {index: micro.captured for index, micro in micros.items()}
        merge_statistics(self.editor, captures, count, self._processes)
        return list(micros.values())

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {what} is {value} at step {self.progress.step}; the last good state is in {self.folder}: "
                "resume it with a lower --learning-rate",
                step=self.progress.step,
            )

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the first step sizes to the power of two at which an untrained editor lowers the loss most.

        The networks begin as the identity on normalised gradients, whose size says nothing about the model's.
        """
        micros = self._prepare(f"{self.config.seed}-calibration", CALIBRATION_STEPS * self.config.accumulate)
        start = self.editor.log_steps.clone()
        losses = start.new_zeros(len(CALIBRATION_POWERS))
        for place, power in enumerate(CALIBRATION_POWERS):
            self.editor.log_steps.copy_(start + power * math.log(2))
            for micro in micros:
                losses[place] += self.objective.losses(micro.batch, micro.captured, random.Random(0))[-1]
        self._processes.add([losses])
        best = CALIBRATION_POWERS[int(losses.nan_to_num(nan=math.inf).argmin())]
        self.editor.log_steps.copy_(start + best * math.log(2))

    def validate(self) -> Validation:
        """Teacher-forced figures on held-out edits, always the same ones; the main process measures them."""
        return self._processes.from_main(self.judgement.validate)

    @property
    def _device(self) -> torch.device:
        return self.editor.scalars[0].device

    def save(self) -> None:
        """Keep everything that the next step depends on, in one file that is replaced whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{STATE}.draft"
        torch.save(
            {
                "about": self._about,
                "config": dataclasses.asdict(self.config),
                "progress": dataclasses.asdict(self.progress),
                "curve": dataclasses.asdict(self.curve),
                "editor": self.editor.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            draft,
        )
        os.replace(draft, self.folder / STATE)

    def resume(self, *, with_changes: bool = False) -> list[str]:
        """Go on from `training.pt` exactly where it stopped, statistics included.

        with_changes: also where that run had other data, or options that make it another run.
        Returns what is different now, in words. Raises CheckpointNotFound, CheckpointUnreadable, ResumeRefused,
        or BaseModelMismatch.
        """
        path = self.folder / STATE
        saved = self._processes.from_main(lambda: _read(path))
        try:
            fixed, free = self._changes(saved, with_changes)
            self.editor.load_state_dict(saved["editor"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.progress, self.curve = Progress(**saved["progress"]), Curve(**saved["curve"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointUnreadable(f"{path} cannot be resumed ({error}); train anew", file=str(path)) from error
        if fixed:  # its scores were of something else
            self.progress.best_score, self.progress.best_step = -1.0, self.progress.step
        return fixed + free

    def _changes(self, saved: Mapping[str, Any], allowed: bool) -> tuple[list[str], list[str]]:
        """How this run differs from the saved one: in what makes it another run, and in what may change."""
        about, differing = saved["about"], self.config.differences(saved["config"])
        if about["base model"] != self._about["base model"]:
            raise BaseModelMismatch(trained_for=about["base model"], loaded=self._about["base model"])
        if differing["shape"]:
            raise ResumeRefused(
                f"the editor in {self.folder} has another shape: {'; '.join(differing['shape'])}; "
                "give the options of the run that is resumed, or train anew in another folder"
            )
        another = differing["run"] + [
            f"the {name} were {about.get(name)}, now they are {now}"
            for name, now in self._about.items()
            if about.get(name) != now
        ]
        if another and not allowed:
            raise ResumeRefused(
                f"the run in {self.folder} was another one: {'; '.join(another)}; "
                "resume it as it was, or go on with what is new by --resume-with-changes"
            )
        return another, differing["free"]


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{path} is missing, so there is no run to resume", file=str(path)) from error
    except Exception as error:  # torch.load raises many unrelated types
        raise CheckpointUnreadable(f"{path} cannot be resumed ({error}); train anew", file=str(path)) from error
