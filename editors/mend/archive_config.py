"""The configuration beside an archive of the original code: which weights, in which order, and two switches.

Read from the original's hydra files (a model's `inner_params`, a composed configuration's `model.inner_params`), from
EasyEdit's hyperparameters, or from the file that an export writes; YAML, or JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from editors.errors import DataFileError
from editors.mend.variant import Variant
from editors.targets import Target

INITS = {"id": True, "xavier": False}
"""The original's `init`, and whether blocks then have a residual."""


@dataclass(frozen=True)
class ArchiveConfig:
    """inner_params: names of the edited weights, in the order of the archive's steps; empty where none are given.

    identity, normalise: what the tensors do not show. stated: settings that they do show, as far as they are given.
    """

    inner_params: tuple[str, ...] = ()
    identity: bool = True
    normalise: bool = True
    stated: Mapping[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> ArchiveConfig:
    """Raises DataFileError, naming the file and the field."""
    try:
        raw = path.read_text(encoding="utf-8")
        content = json.loads(raw) if path.suffix == ".json" else yaml.safe_load(raw)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).split("\n", 1)[0]
        raise DataFileError(f"the configuration {path} cannot be read ({reason})", file=str(path)) from error
    content = content if isinstance(content, dict) else {}
    model = content.get("model")
    names = content.get("inner_params", model.get("inner_params") if isinstance(model, dict) else None)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataFileError(
            f"{path} has no list of names under inner_params (nor under model.inner_params)",
            file=str(path),
            field="inner_params",
        )
    names = [without_wrapper(name) for name in names]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataFileError(f"{path} names {repeated[0]} twice in inner_params", file=str(path), field="inner_params")
    # In the original a section of its own, earlier called gtn; in EasyEdit beside everything else.
    settings = next((content[name] for name in ("mend", "gtn") if isinstance(content.get(name), dict)), content)
    init, norm = settings.get("init", "id"), settings.get("norm", True)
    if init not in tuple(INITS):
        raise DataFileError(f"{path} has init: {init!r}, none of {', '.join(INITS)}", file=str(path), field="init")
    if not isinstance(norm, bool):
        raise DataFileError(f"{path} has norm: {norm!r}, neither true nor false", file=str(path), field="norm")
    stated = {name: settings[name] for name in ("shared", "combine", "n_hidden", "rank") if name in settings}
    return ArchiveConfig(tuple(names), INITS[init], norm, stated)


def without_wrapper(name: str) -> str:
    """A parameter's own name. The original's runs in half precision put a wrapper around some modules."""
    return name.replace(".underlying.", ".")


def describe(targets: tuple[Target, ...], variant: Variant) -> dict[str, Any]:
    """The configuration of an editor, as the original code writes it."""
    return {
        "inner_params": [target.name for target in targets],
        "mend": {
            "shared": variant.shared,
            "combine": variant.sides == "joint",
            "one_sided": variant.sides == "smaller",
            "x_only": variant.sides == "u",
            "delta_only": variant.sides == "delta",
            "n_hidden": variant.blocks - 1,
            "rank": variant.rank,
            "init": next(init for init, identity in INITS.items() if identity == variant.identity),
            "norm": variant.normalise,
            "act": "relu",
            "hidden_dim": None,
            "mlp_class": "IDMLP",
        },
    }
