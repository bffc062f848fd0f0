"""Archives of the original code, and of ROME's and EasyEdit's copies of it: read, and written.

An archive is a `torch.save` of `{model, opt, lr_opt, val_stats, start_time, elapsed_time, step}`. In `model`:
- `edit_lrs` (targets,), signed, in the order of the configuration's `inner_params`; ΔW += lr · δ̃ᵀ ũ;
- `mend.<key>.{u,v}_{mean,std,s}` and `k`: running statistics of u and of δ (which it calls v), count included; `std`
  is what it normalises with;
- `mend.<key>.<mlp>.layers.<i>.{u,v,bias,mode_scale.weight,mode_shift.weight}`: the blocks of the networks; a mode is
  a layer, by its place among those of its shape;
- `model_config`, the base model's configuration as an object.
<key> is "(d_in, d_out)", or, without sharing, the parameter's name with "#" for "."; then there are no modes.
What it does not say is the order of the weights, whether blocks have a residual, and whether rows are normalised.
Source: the formats as written by github.com/eric-mitchell/mend; facts only, the code here is this project's own.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from editors.errors import ArchiveMismatch, ArchiveUnreadable, CheckpointError
from editors.mend.archive_config import describe
from editors.mend.editor import MendEditor
from editors.mend.network import RunningStatistics
from editors.mend.unpickling import Placeholder, load_untrusted
from editors.targets import Target

NETWORKS = {"blocks": "mlp", "u_blocks": "mlp1", "delta_blocks": "mlp2"}
PARAMETERS = {"u": "u", "v": "v", "bias": "bias", "scale": "mode_scale.weight", "shift": "mode_shift.weight"}
STATISTICS = {"u_statistics": "u", "delta_statistics": "v"}
"""Names in an editor, and in an archive."""

NAME = re.compile(
    r"mend\.(?P<key>[^.]+)\."
    r"(?:(?P<mlp>mlp[12]?)\.layers\.(?P<layer>\d+)\.(?:u|v|bias|mode_(?:scale|shift)\.weight)|[uv]_(?:mean|std|s)|k)"
)
_SHAPE = re.compile(r"\((\d+), (\d+)\)")


@dataclass(frozen=True)
class Archive:
    """What is in an archive. digest: SHA-256 of the file. tensors: of its networks and statistics, by name.

    steps: (targets,) float32, signed. model: class and name of the base model that it was made for.
    """

    file: str
    digest: str
    tensors: Mapping[str, Tensor]
    steps: Tensor
    model: str
    step: int | None
    val_stats: Mapping[str, float]

    @property
    def keys(self) -> list[str]:
        """Of the networks, in the archive's own order, which without sharing is that of the steps."""
        return list(dict.fromkeys(name.split(".")[1] for name in self.tensors))

    @property
    def shared(self) -> bool:
        return all(_SHAPE.fullmatch(key) for key in self.keys)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the edited weights in the order of the steps; empty for a shared editor, which does not tell."""
        return [] if self.shared else [key.replace("#", ".") for key in self.keys]


def read_archive(path: Path) -> Archive:
    """Read an archive without trusting it. Raises ArchiveUnreadable or ArchiveUnsafe."""
    content = load_untrusted(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(state.get("edit_lrs"), Tensor):
        raise ArchiveUnreadable(f"{path} is no archive of MEND: it has no model with edit_lrs", file=str(path))
    tensors = {_today(str(name)): value for name, value in state.items() if name not in ("edit_lrs", "model_config")}
    strange = [name for name, value in tensors.items() if not (NAME.fullmatch(name) and _is_float(value))]
    if strange or not tensors or state["edit_lrs"].dim() != 1 or not _is_float(state["edit_lrs"]):
        raise ArchiveUnreadable(
            f"{path} is no archive of MEND: {', '.join(strange) or 'what it holds'} is no part of one", file=str(path)
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    step, statistics = content.get("step"), content.get("val_stats")
    return Archive(
        file=path.name,
        digest=digest,
        tensors=tensors,
        steps=state["edit_lrs"].detach().float(),
        model=_model_of(state.get("model_config")),
        step=step if type(step) is int else None,
        val_stats=_plain_numbers(statistics if isinstance(statistics, dict) else {}),
    )


def write_archive(checkpoint: Checkpoint, base: BaseModel, path: Path, *, replace: bool = False) -> Path:
    """Write an editor as the original code would have saved it. Returns the path of its configuration, beside it.

    base: the model that it was trained for. replace: also what is there already.
    Raises ArchiveMismatch for an editor that the original code cannot run, and CheckpointError when the files cannot be
    written or are there already.
    """
    editor, card = checkpoint.editor, checkpoint.card
    if checkpoint.aggregate != "sum" or editor.variant.plain:
        joins = checkpoint.aggregate.replace("_", " ")
        what = f"joins edits by {joins}" if checkpoint.aggregate != "sum" else "has no networks"
        raise ArchiveMismatch(f"{checkpoint.name} {what}, which the original code cannot do")
    sidecar = path.with_suffix(".yaml")
    if sidecar == path:
        raise CheckpointError(f"{path} is the name of the archive's configuration; give the archive another ending")
    if there := [file for file in (path, sidecar) if file.exists() and not replace]:
        raise CheckpointError(f"{there[0]} is there already; name another file, or replace it by --force")
    state: dict[str, Any] = OrderedDict(edit_lrs=(editor.signs * editor.log_steps.exp()).detach().cpu())
    own = editor.state_dict()
    state.update({theirs: own[ours].cpu() for ours, theirs in parameters_of(editor)})
    for prefix, side, statistics in statistics_of(editor, neutral=True):
        values = (statistics.mean, statistics.deviation, statistics.m2, statistics.count[None].float())
        state.update({f"{prefix}.{name}": value.cpu() for name, value in zip(four(side), values, strict=True)})
    state["model_config"] = copy.deepcopy(base.model.config)
    state["model_config"]._name_or_path = base.ref  # not the folder that it happens to be in here
    content = {
        "model": state,
        "opt": None,
        "lr_opt": None,
        "val_stats": dict(card.get("validation", {})),
        "start_time": "",
        "elapsed_time": card.get("training_seconds", 0),
        "step": card.get("step", 0),
    }
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                torch.save(content, file)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        sidecar.write_text(yaml.safe_dump(describe(editor.targets, editor.variant), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be written ({error.strerror})") from error
    return sidecar


def parameters_of(editor: MendEditor) -> Iterator[tuple[str, str]]:
    """The names of every parameter of the networks, in the editor and in an archive."""
    for group, members in editor.groups.items():
        key = key_of(editor.targets[members[0]], editor.variant.shared)
        for network, mlp in NETWORKS.items():
            for layer, block in enumerate(getattr(editor.networks[group], network)):
                for ours, theirs in PARAMETERS.items():
                    if getattr(block, ours) is not None:
                        yield f"networks.{group}.{network}.{layer}.{ours}", f"mend.{key}.{mlp}.layers.{layer}.{theirs}"


def statistics_of(editor: MendEditor, neutral: bool = False) -> Iterator[tuple[str, str, RunningStatistics]]:
    """The statistics of every network, with the prefix of their names in an archive, and u or v.

    neutral: where there are none, such as change nothing; archives always have some.
    """
    for group, members in editor.groups.items():
        target = editor.targets[members[0]]
        for (ours, side), width in zip(STATISTICS.items(), target.shape, strict=True):
            statistics = getattr(editor.networks[group], ours)
            if statistics is None and neutral:
                statistics = RunningStatistics(width)
                statistics.count.fill_(2)
                statistics.m2.fill_(1)
            if statistics is not None:
                yield f"mend.{key_of(target, editor.variant.shared)}", side, statistics


def four(side: str) -> tuple[str, str, str, str]:
    return f"{side}_mean", f"{side}_std", f"{side}_s", "k"


def key_of(target: Target, shared: bool) -> str:
    return str(target.shape) if shared else target.name.replace(".", "#")


def _today(name: str) -> str:
    """A tensor's name as later versions write it."""
    return re.sub(r"^gtn\.", "mend.", name).replace("#underlying#", "#")


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _model_of(config: object) -> str:
    if not isinstance(config, Placeholder):
        return ""
    state = config.state if isinstance(config.state, dict) else {}
    return f"{config.kind.rpartition('.')[2]} {state.get('_name_or_path') or ''}".strip()


def _plain_numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    return {str(name): value for name, value in values.items() if type(value) in (int, float) and math.isfinite(value)}
