"""From data files to a checkpoint folder: what `mend train` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from editors.base_model import BaseModel
from editors.data import DataSet
from editors.mend.checkpoint import save_checkpoint
from editors.mend.corpus import Corpus, own_samples
from editors.mend.editor import MendEditor
from editors.mend.training import Trainer, TrainingConfig, Validation
from editors.mend.variant import variant_named
from editors.targets import resolve_targets
from editors.views import UpperBlocks

VALIDATION_SAMPLES = 128


def train(
    base: BaseModel,
    training: Sequence[DataSet],
    validation: Sequence[DataSet],
    config: TrainingConfig,
    folder: Path,
    *,
    layers: Sequence[str] | None = None,
    command: str = "",
    resume: bool = False,
    cache: Path | None = None,
) -> Validation | None:
    """Train an editor and keep the best one in `folder`, with its card.

    layers: patterns of the layers to edit; the family's preset without any.
    cache: folder that keeps hidden states for the next run on the same data.
    resume: go on from `folder/training.pt`, exactly as if the run had not stopped.
    Returns the best validation of this run, None if none was better than before it was resumed.
    """
    targets = resolve_targets(base.model, layers)
    upper = UpperBlocks(base.model, targets)
    samples = own_samples(base, config.samples + VALIDATION_SAMPLES, config.seed)
    corpus = Corpus(base, upper, training, samples[: config.samples], cache)
    held_out = Corpus(base, upper, validation, samples[config.samples :], cache)
    torch.manual_seed(config.seed)
    editor = MendEditor(targets, variant_named(config.variant, config.rank)).to(base.device)
    trainer = Trainer(editor, upper, corpus, held_out, config, folder)
    if resume:
        trainer.resume()
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
            "validation": dataclasses.asdict(figures),
            "torch": torch.__version__,
        }
        save_checkpoint(folder, editor, base, facts)

    with tqdm(total=config.steps, initial=trainer.progress.step, desc="training", unit="step", disable=None) as bar:

        def on_step(figures: dict[str, float]) -> None:
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()}, refresh=False)
            if "held out score" in figures:
                line = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
                bar.write(f"step {trainer.progress.step}: {line}")

        trainer.run(on_step, on_best)
    return best[-1] if best else None


def _describe(data: DataSet) -> dict[str, Any]:
    return {"name": data.name, "layout": data.layout, "digest": data.digest, "examples": len(data.examples)}
