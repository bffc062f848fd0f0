"""From data files to a checkpoint folder: what `mend train` runs."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.checkpoint import load_checkpoint, save_checkpoint
from editors.data import DataSet
from editors.errors import TrainingOptionsInvalid
from editors.mend.completed import CompletedEditor
from editors.mend.editor import MendEditor
from editors.mend.keyed import KeyedEditor
from editors.mend.training.config import TrainingConfig
from editors.mend.training.corpus import Corpus
from editors.mend.training.fitting import fit
from editors.mend.training.journal import Journal, require_tensorboard
from editors.mend.training.objective import Validation
from editors.mend.training.passages import PassageSet
from editors.mend.training.processes import ALONE, Processes
from editors.mend.training.samples import own_samples
from editors.mend.training.settling import settle
from editors.mend.training.trainer import STATE, Trainer
from editors.targets import last_projection, resolve_keyed_targets, resolve_targets
from editors.training_free.calibration import calibrate
from editors.views import UpperBlocks

VALIDATION_SAMPLES = 128
UNSHOWN = ("learning rate",)
"""In the terminal, where figures have three decimals."""

Data = Sequence[DataSet | PassageSet]


def train(
    base: BaseModel,
    training: Data,
    validation: Data,
    config: TrainingConfig,
    folder: Path,
    *,
    layers: Sequence[str] | None = None,
    command: str = "",
    resume: bool = False,
    with_changes: bool = False,
    cache: Path | None = None,
    tensorboard: Path | None = None,
    processes: Processes = ALONE,
) -> Validation | None:
    """Train an editor and keep the best one in `folder`, with its card and a plot of the run.

    layers: patterns of the layers to edit; the family's preset without any.
    resume: go on from `folder/training.pt`, exactly as if the run had not stopped. with_changes: even where options or
    data make it another run.
    cache: folder that keeps samples, answers and hidden states for the next run on the same data.
    tensorboard: folder of its log. processes: those that train together; only the first of them writes.
    Returns the best validation of this run, None if none was better than before it was resumed.
    Raises TrainingOptionsInvalid, DataFileError, ResumeRefused or TrainingDiverged, each saying what to do.
    """
    config.require_shares(processes.count)
    _require_writable(folder)
    if (folder / STATE).exists() and not resume:
        raise TrainingOptionsInvalid(
            f"there is a run in {folder} already: go on with it by --resume, or name another folder", option="out"
        )
    if tensorboard is not None:
        require_tensorboard()
    if base.device.type == "cpu" and base.dtype == torch.bfloat16:
        base.model.set_attn_implementation("eager")  # the fused one takes a third of a step to differentiate there
    editor = _new_editor(base, config, layers)
    upper = UpperBlocks(base.model, editor.captured)
    samples = processes.from_main(lambda: own_samples(base, config.samples + VALIDATION_SAMPLES, config.seed, cache))
    corpus = Corpus(base, upper, training, samples[: config.samples], cache, processes)
    held_out = Corpus(base, upper, validation, samples[config.samples :], cache, processes)
    if isinstance(editor, KeyedEditor) and not resume:
        found = fit(editor, base, upper, corpus, config.seed)
        _say(f"mend: the gate finds {found:.3f} of the subjects that it was not trained on", processes)
    about = {
        "base model": base.digest,
        "layers": ", ".join(target.name for target in editor.targets),
        "training data": _in_words(training),
        "validation data": _in_words(validation),
    }
    trainer = Trainer(editor, upper, corpus, held_out, config, folder, processes, about)
    for change in trainer.resume(with_changes=with_changes) if resume else ():
        _say(f"mend: resumed with changes: {change}", processes)
    trainer.progress.commands.append(command)
    best: list[Validation] = []

    def on_best(figures: Validation) -> None:
        best.append(figures)
        facts: dict[str, Any] = {
            "command": "\n".join(trainer.progress.commands),
            "config": dataclasses.asdict(config),
            "training_data": [_describe(data) for data in training],
            "validation_data": [_describe(data) for data in validation],
            "step": trainer.progress.step,
            "training_seconds": round(trainer.progress.seconds),
            "validation": _figures(figures),
            "torch": torch.__version__,
        }
        save_checkpoint(folder, editor, base, facts)

    if not processes.is_main:
        trainer.run(_ignore, _ignore)
        return None
    with (
        Journal(folder, tensorboard, trainer.progress.step) as journal,
        tqdm(total=config.steps, initial=trainer.progress.step, desc="training", unit="step", disable=None) as bar,
    ):

        def on_step(figures: dict[str, float]) -> None:
            shown = {name: f"{value:.3f}" for name, value in figures.items() if name not in UNSHOWN}
            bar.update()
            bar.set_postfix(shown, refresh=False)
            journal.step(trainer.progress.step, figures)
            if "held out score" in figures:
                bar.write(f"step {trainer.progress.step}: " + "  ".join(f"{k} {v}" for k, v in shown.items()))
                journal.plot(trainer.curve, trainer.progress.history)

        trainer.run(on_step, on_best)
    if isinstance(editor, KeyedEditor):
        _settle(folder, base, trainer)
    return best[-1] if best else None


def _settle(folder: Path, base: BaseModel, trainer: Trainer) -> None:
    """Choose what is not trained of the best editor, once, and keep it with that, and with what completes its edits."""
    checkpoint = load_checkpoint(folder, base)
    if "settled" in checkpoint.card:
        return
    trainer.editor.load_state_dict(checkpoint.editor.state_dict())
    tried = settle(trainer.editor, trainer.judgement)
    curve = [
        {**dataclasses.asdict(choice), "edits": size, **_figures(figures)}
        for choice, sizes in tried.items()
        for size, figures in sizes.items()
    ]
    completed = CompletedEditor(trainer.editor, calibrate(base))
    save_checkpoint(folder, completed, base, {**checkpoint.card, "settled": curve})


def _figures(validation: Validation) -> dict[str, float | None]:
    """JSON has no NaN: what could not be measured is null."""
    return {k: None if math.isnan(v) else v for k, v in dataclasses.asdict(validation).items()}


def _new_editor(base: BaseModel, config: TrainingConfig, layers: Sequence[str] | None) -> MendEditor | KeyedEditor:
    torch.manual_seed(config.seed)
    if config.aggregate == "least_squares":
        if base.kind != "decoder":
            raise TrainingOptionsInvalid(
                f"--aggregate least_squares keys an edit at one token of a decoder's text; {base.ref} is a "
                f"{base.kind}: train it with --aggregate sum",
                option="aggregate",
            )
        targets, witness = resolve_keyed_targets(base.model, layers)
        if (late := last_projection(base.model)) in targets:
            raise TrainingOptionsInvalid(
                f"{late.name} completes edits at the answer and cannot be keyed as well; name lower blocks by --layers",
                option="layers",
            )
        return KeyedEditor(targets, witness, config.rank).to(base.device)
    return MendEditor(resolve_targets(base.model, layers), config.variant).to(base.device)


def _require_writable(folder: Path) -> None:
    """What cannot be written is said before anything is computed, not at the first validation."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        why = "cannot be written to" if nearest.is_dir() else "is not a folder"
        raise TrainingOptionsInvalid(f"--out is {folder}, but {nearest} {why}; name another folder", option="out")


def _ignore(_figures: object) -> None:
    pass


def _say(line: str, processes: Processes) -> None:
    if processes.is_main:
        tqdm.write(line, file=sys.stderr)


def _describe(data: DataSet | PassageSet) -> dict[str, Any]:
    return {"name": data.name, "layout": data.layout, "digest": data.digest, "examples": len(data.examples)}


def _in_words(data: Data) -> str:
    return ", ".join(f"{d.name} ({len(d.examples)} examples, sha256:{d.digest[:12]})" for d in data)
