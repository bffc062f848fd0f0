"""Which editor a base model is edited by: the one that was named, the one that fits, or the training-free one."""

from __future__ import annotations

from pathlib import Path

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint, load_checkpoint, read_card
from editors.errors import CheckpointNotFound
from editors.training_free.calibration import calibrated_folder
from editors.training_free.editor import TrainingFreeEditor


def choose_editor(named: str | Path | None, default: Path, base: BaseModel, cache: Path) -> Checkpoint:
    """named: folder of a checkpoint, or `training-free`; without it `default` if that is for this base model.

    cache: folder in which the training-free editor is kept.
    Raises CheckpointNotFound, CheckpointUnreadable, BaseModelMismatch, TargetsError.
    """
    if named == TrainingFreeEditor.method or (named is None and not _fits(default, base)):
        return load_checkpoint(calibrated_folder(base, cache), base)
    return load_checkpoint(named or default, base)


def _fits(folder: Path, base: BaseModel) -> bool:
    try:
        return read_card(folder)["base_model"]["digest"] == base.digest
    except CheckpointNotFound:
        return False
