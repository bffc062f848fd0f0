"""The training-free editor of a base model: made once, of what the model itself writes, and kept as a checkpoint."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path

import torch

from editors.base_model import BaseModel
from editors.capture import capture
from editors.checkpoint import CARD, save_checkpoint
from editors.errors import CheckpointUnreadable
from editors.mend.training.samples import own_samples
from editors.targets import last_projection
from editors.text import Tokens
from editors.training_free.editor import TrainingFreeEditor, predicting_rows
from editors.views import UpperBlocks

logger = logging.getLogger("mend")

SAMPLES = 128
SEED = 1
BATCH = 16


def calibrated_folder(base: BaseModel, parent: Path) -> Path:
    """The checkpoint of `base`'s training-free editor in `parent`, made there first where there is none.

    Another machine would not sample the same texts: edits belong to the folder that they were made with.
    Raises TargetsError where there is no weight to edit, CheckpointUnreadable where nothing can be kept in `parent`.
    """
    folder = parent / f"{TrainingFreeEditor.method}-{base.digest.removeprefix('sha256:')[:12]}"
    if not (folder / CARD).is_file():
        logger.info("calibrating the training-free editor in %s, once", folder)
        draft = _draft(parent, folder.name)
        try:
            facts = {"name": TrainingFreeEditor.method, "calibration": {"samples": SAMPLES, "seed": SEED}}
            save_checkpoint(draft, calibrate(base), base, facts)
            draft.chmod(0o755)  # it was made for its owner alone
            _put(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _draft(parent: Path, name: str) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}-"))
    except OSError as error:
        raise CheckpointUnreadable(
            f"the training-free editor cannot be kept in {parent} ({error.strerror}); name another place: "
            "MEND_DATA_DIR for a service, XDG_CACHE_HOME for other commands",
            file=str(parent),
        ) from error


def _put(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / CARD).is_file():  # else another process was first
            raise


def calibrate(base: BaseModel) -> TrainingFreeEditor:
    """Raises TargetsError where there is no weight to edit."""
    target = last_projection(base.model)
    editor = TrainingFreeEditor([target]).to(base.device)
    upper = UpperBlocks(base.model, [target])
    texts = [_scored(base, text, index) for index, text in enumerate(own_samples(base, SAMPLES, SEED))]
    inputs, gradients = [], []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        found = capture(upper, upper.below([tokens.inputs for tokens in batch]), batch)
        rows = predicting_rows(found, 0)
        inputs.append(found.u[0][rows])
        gradients.append(found.delta[0][rows])
    weight = target.oriented(base.model.get_parameter(target.name))
    try:
        editor.calibrate(0, torch.cat(inputs), torch.cat(gradients), weight)
    except torch.linalg.LinAlgError as error:
        raise CheckpointUnreadable(
            f"what {target.name} reads of the model's own texts is no number in {base.dtype}; load the model in float32"
        ) from error
    return editor.requires_grad_(False)


def _scored(base: BaseModel, text: Tokens, index: int) -> Tokens:
    """A text of the model's own with something to be predicted: all of it, its own answer, or one of its labels."""
    if base.kind == "decoder":
        return base.tokens(text.prompt[:1], text.prompt[1:])
    if base.kind == "classifier":
        return base.tokens(text.prompt, (index % base.model.config.num_labels,))
    return text
