"""Which weights may be edited, and how they are laid out.

A target is one weight matrix of the base model. `nn.Linear` stores it (d_out, d_in), transformers'
`Conv1D` stores it (d_in, d_out); everything else in this package speaks of (d_in, d_out) and never of layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editors.errors import TargetsError

EDITED_BLOCKS = 3
"""MEND edits the MLPs of the last three blocks of a decoder (arXiv:2110.11309, appendix C)."""

_GATED_MLP = r"mlp\.(gate_proj|up_proj|down_proj)"
MLP_BY_FAMILY = {
    "gpt2": r"mlp\.(c_fc|c_proj)",
    "gpt_neo": r"mlp\.(c_fc|c_proj)",
    "gptj": r"mlp\.(fc_in|fc_out)",
    "gpt_neox": r"mlp\.(dense_h_to_4h|dense_4h_to_h)",
    "opt": r"(fc1|fc2)",
    "llama": _GATED_MLP,
    "mistral": _GATED_MLP,
    "qwen2": _GATED_MLP,
    "qwen3": _GATED_MLP,
    "gemma2": _GATED_MLP,
}
"""Per `config.model_type`: the MLP projections, by module name inside a block."""


@dataclass(frozen=True)
class Target:
    """One editable weight matrix.

    name: the parameter's name in the model, e.g. `model.layers.29.mlp.up_proj.weight`.
    d_in, d_out: width of its input and of its output.
    transposed: stored as (d_in, d_out), as in Conv1D.
    """

    name: str
    d_in: int
    d_out: int
    transposed: bool

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out): targets of one shape share one editor network."""
        return (self.d_in, self.d_out)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Turn (d_out, d_in) into the parameter's own layout, or back."""
        return matrix.T if self.transposed else matrix


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's stack of transformer blocks: the longest ModuleList, with its name."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise TargetsError(f"{type(model).__name__} has no stack of blocks; name its layers yourself with --layers")
    return max(stacks, key=lambda stack: len(stack[1]))


def block_index(targets: Sequence[Target], stack: str) -> int:
    """Index of the first block of `stack` that holds a target."""
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    matches = [pattern.match(target.name) for target in targets]
    outside = [target.name for target, match in zip(targets, matches, strict=True) if match is None]
    if outside:
        raise TargetsError(f"{outside[0]} is not inside the stack of blocks {stack}", layer=outside[0])
    return min(int(match[1]) for match in matches if match)


def resolve_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> tuple[Target, ...]:
    """Find the weights to edit, in the order of the model's own modules.

    patterns: regular expressions searched in module names; without any, the family's preset is used.
    Raises TargetsError when nothing matches, or when a match must not be edited.
    """
    if patterns is None:
        patterns = [_preset(model)]
    compiled = [re.compile(pattern) for pattern in patterns]
    targets = []
    for expression in compiled:
        if not any(expression.search(name) and _is_matrix(module) for name, module in model.named_modules()):
            raise TargetsError(
                f"the layer pattern {expression.pattern!r} matches no linear layer of {type(model).__name__}; "
                "see the names with `model.named_modules()`",
                pattern=expression.pattern,
            )
    for name, module in model.named_modules():
        if _is_matrix(module) and any(expression.search(name) for expression in compiled):
            targets.append(_target(model, name, module))
    return tuple(targets)


def named_targets(model: nn.Module, names: Sequence[str]) -> tuple[Target, ...]:
    """The weights of these names, in this order. Raises TargetsError naming every one that cannot be edited."""
    modules = {f"{name}.weight": module for name, module in model.named_modules() if _is_matrix(module)}
    if wrong := [name for name in names if name not in modules]:
        raise TargetsError(f"{type(model).__name__} has no linear layer with {', '.join(wrong)}", layer=wrong[0])
    return tuple(_target(model, name.removesuffix(".weight"), modules[name]) for name in names)


def _preset(model: nn.Module) -> str:
    family = getattr(model.config, "model_type", "unknown")
    if family not in MLP_BY_FAMILY:
        raise TargetsError(
            f"no preset of layers for the architecture {family!r} (presets: {', '.join(sorted(MLP_BY_FAMILY))}); "
            "name the layers with --layers",
            architecture=family,
        )
    stack, blocks = find_blocks(model)
    last = "|".join(str(index) for index in range(max(0, len(blocks) - EDITED_BLOCKS), len(blocks)))
    return rf"^{re.escape(stack)}\.({last})\.{MLP_BY_FAMILY[family]}$"


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _target(model: nn.Module, name: str, module: nn.Module) -> Target:
    weight = module.weight
    if not weight.is_floating_point():
        raise TargetsError(f"{name} holds quantised weights ({weight.dtype}); load the model dequantised", layer=name)
    owners = [owner for owner, other in model.named_modules() if getattr(other, "weight", None) is weight]
    if owners != [name]:
        raise TargetsError(
            f"{name} shares its weight with {', '.join(o for o in owners if o != name)}; editing it would edit both",
            layer=name,
        )
    transposed = isinstance(module, Conv1D)
    d_in, d_out = weight.shape if transposed else reversed(weight.shape)
    return Target(f"{name}.weight", d_in, d_out, transposed)
