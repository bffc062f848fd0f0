"""Archives as MEND's original code leaves them, and what that code makes of a gradient, written out in einsums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editors.capture import Capture

MODES = {"combine": True, "one_sided": False, "x_only": False, "delta_only": False}


@dataclass
class Original:
    """A trained editor of the original code for some weights of a model.

    settings: those of its `mend` section that differ from the defaults below. steps: its edit_lrs.
    """

    model: PreTrainedModel
    inner_params: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: Sequence[float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        defaults = {"shared": True, "init": "id", "norm": True, "rank": 5, "n_hidden": 1, **MODES}
        self.settings = {**defaults, **self.settings}
        self._random = torch.Generator().manual_seed(self.seed)
        if self.steps is None:
            self.steps = [1e-4 * (1 + i) for i in range(len(self.inner_params))]
        self.state: dict[str, Any] = OrderedDict(edit_lrs=torch.tensor(self.steps))
        self.modes: dict[str, list[str]] = {}
        for name in self.inner_params:
            self.modes.setdefault(self.key(name), []).append(name)
        for key, names in self.modes.items():
            self._write_network(key, *self.shape(names[0]), len(names))
        self.state["model_config"] = self.model.config

    def shape(self, name: str) -> tuple[int, int]:
        """(x_dim, delta_dim)"""
        rows, columns = self.model.get_parameter(name).shape
        return (rows, columns) if self.transposed(name) else (columns, rows)

    def transposed(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name.removesuffix(".weight")), Conv1D)

    def key(self, name: str) -> str:
        return str(self.shape(name)) if self.settings["shared"] else name.replace(".", "#")

    def networks(self, x_dim: int, delta_dim: int) -> dict[str, int]:
        """Name and width of the networks of one shape."""
        if self.settings["combine"]:
            return {"mlp": x_dim + delta_dim}
        if self.settings["one_sided"]:
            return {"mlp2": delta_dim} if x_dim > delta_dim else {"mlp1": x_dim}
        both = {"mlp1": x_dim, "mlp2": delta_dim}
        only = "mlp1" if self.settings["x_only"] else "mlp2" if self.settings["delta_only"] else None
        return {only: both[only]} if only else both

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)

    def _write_network(self, key: str, x_dim: int, delta_dim: int, modes: int) -> None:
        prefix = f"mend.{key}"
        for side, width in (("u", x_dim), ("v", delta_dim)):
            size = 1.0 if side == "u" else 1e-3
            self.state[f"{prefix}.{side}_mean"] = size * self._randn(width)
            self.state[f"{prefix}.{side}_s"] = 40 * size**2 * (0.1 + self._randn(width).square())
        self.state[f"{prefix}.k"] = torch.tensor([41.0])
        for side in "uv":
            self.state[f"{prefix}.{side}_std"] = (self.state[f"{prefix}.{side}_s"] / 40) ** 0.5
        for network, width in self.networks(x_dim, delta_dim).items():
            rank = min(self.settings["rank"], width)
            for layer in range(self.settings["n_hidden"] + 1):
                place = f"{prefix}.{network}.layers.{layer}"
                self.state[f"{place}.u"] = self._randn(width, rank) / rank**0.5
                self.state[f"{place}.v"] = self._randn(rank, width) / width**0.5
                self.state[f"{place}.bias"] = 0.1 * self._randn(width)
                if self.settings["shared"]:
                    self.state[f"{place}.mode_shift.weight"] = 0.1 * self._randn(modes, width)
                    self.state[f"{place}.mode_scale.weight"] = 1 + 0.1 * self._randn(modes, width)

    def content(self) -> dict[str, Any]:
        optimiser = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-6, "params": [0]}]}
        return {
            "model": self.state,
            "opt": optimiser,
            "lr_opt": optimiser,
            "val_stats": {"edit/acc_val": 0.75, "loss/total_val": float("nan"), "who": "me", "n_tokens/pre_val": 12},
            "start_time": "24/12/2021-18:00:00/000000",
            "elapsed_time": 3600.5,
            "step": 123,
        }

    def save(self, path: Path, *, legacy: bool = False) -> Path:
        torch.save(self.content(), path, _use_new_zipfile_serialization=not legacy)
        return path

    def change(self, name: str, rows: tuple[Tensor, Tensor]) -> Tensor:
        """What it adds to a parameter, in the parameter's own layout, float64. rows: x (n, x_dim), δ (n, delta_dim)."""
        key, (x, delta) = self.key(name), (part.double() for part in rows)
        told = (x != 0).any(-1) * (delta != 0).any(-1)
        x, delta = x[told], delta[told]
        state = {name: value.double() for name, value in self.state.items() if isinstance(value, Tensor)}
        if self.settings["norm"]:
            x = (x - state[f"mend.{key}.u_mean"]) / (state[f"mend.{key}.u_std"] + 1e-7)
            delta = (delta - state[f"mend.{key}.v_mean"]) / (state[f"mend.{key}.v_std"] + 1e-7)
        networks, mode = self.networks(*self.shape(name)), self.modes[key].index(name)

        def run(network: str, h: Tensor) -> Tensor:
            for layer in range(self.settings["n_hidden"] + 1):
                place = f"mend.{key}.{network}.layers.{layer}"
                inside = torch.einsum("or,ri,bi->bo", state[f"{place}.u"], state[f"{place}.v"], h)
                inside = inside + state[f"{place}.bias"]
                if self.settings["shared"]:
                    scale, shift = (state[f"{place}.mode_{kind}.weight"][mode] for kind in ("scale", "shift"))
                    inside = inside * scale + shift
                h = inside.clamp(min=0) + (h if self.settings["init"] == "id" else 0)
            return h

        if "mlp" in networks:
            x, delta = run("mlp", torch.cat((x, delta), -1)).split(self.shape(name), -1)
        x = run("mlp1", x) if "mlp1" in networks else x
        delta = run("mlp2", delta) if "mlp2" in networks else delta
        step = state["edit_lrs"][list(self.inner_params).index(name)]
        return step * torch.einsum("bi,bj->ij" if self.transposed(name) else "bi,bj->ji", x, delta)

    def rows(self, names: Sequence[str], seed: int = 7) -> Capture:
        """Rows of one example for some weights, of which a few carry no gradient."""
        generator = torch.Generator().manual_seed(seed)
        u, delta = [], []
        for name in names:
            x_dim, delta_dim = self.shape(name)
            u.append(torch.randn(9, x_dim, generator=generator))
            delta.append(1e-3 * torch.randn(9, delta_dim, generator=generator))
            u[-1][2], delta[-1][5:7] = 0, 0
        return Capture(tuple(u), tuple(delta), (torch.zeros(9, dtype=torch.int64),) * len(u), torch.zeros(1))
