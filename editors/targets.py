"""Which weights may be edited, and how they are laid out.

A target is one weight matrix of the base model. `nn.Linear` stores it (d_out, d_in), transformers'
`Conv1D` stores it (d_in, d_out); everything else in this package speaks of (d_in, d_out) and never of layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editors.errors import TargetsError

EDITED_BLOCKS = 3
"""MEND edits the MLPs of the last three blocks of a decoder or of BERT (arXiv:2110.11309, appendix C) …"""
EDITED_BLOCKS_OF_EACH = 2
"""… and those of the last two blocks of an encoder-decoder's encoder, and of its decoder."""

_GATED_MLP = r"mlp\.(gate_proj|up_proj|down_proj)"
_FUSED_MLP = r"mlp\.(gate_up_proj|down_proj)"
_T5_MLP = r"layer\.\d\.DenseReluDense\.(wi|wi_0|wi_1|wo)"
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
    "gemma3_text": _GATED_MLP,
    "phi": r"mlp\.(fc1|fc2)",
    "phi3": _FUSED_MLP,
    "t5": _T5_MLP,
    "mt5": _T5_MLP,
    "bart": r"(fc1|fc2)",
    "bert": r"(intermediate|output)\.dense",
}
"""Per `config.model_type`: the MLP projections, by module name inside a block."""

KEYED_DEPTH = 0.27
"""Of a decoder's blocks: where edits that are keyed at their subject are made. There other wordings of a fact have
nearly the same key, and what a thousand keys do to all other tokens is least; further up the former fades."""


LATE_DEPTH = 0.9
"""Of a model's last blocks: where its answer is all but made, so that any answer can be put in its place."""

EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def find_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The stacks of transformer blocks that may be edited, with their names: the encoder's first, if there are two.

    A stack is the longest ModuleList of its half of the model, those inside of blocks aside.
    """
    if not model.config.is_encoder_decoder:
        return [_longest_list(model, model)]
    return [_longest_list(model, half) for half in (model.get_encoder(), model.get_decoder())]


def _longest_list(model: nn.Module, part: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = {module for module in part.modules() if isinstance(module, nn.ModuleList)}
    nested = {inner for outer in lists for inner in outer.modules() if inner is not outer}
    stacks = [(name, module) for name, module in model.named_modules() if module in lists - nested]
    if not stacks:
        raise TargetsError(f"{type(model).__name__} has no stack of blocks, so that there is nothing to edit in it")
    return max(stacks, key=lambda stack: len(stack[1]))


def first_edited_block(model: nn.Module, targets: Sequence[Target]) -> tuple[int, str]:
    """Index of the lowest block of the first stack that holds a target, with the stack's name.

    Where only a later stack is edited, it is the first stack's last block: everything above it depends on the edit.
    """
    stack, blocks = find_stacks(model)[0]
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    matches = [match for match in (pattern.match(target.name) for target in targets) if match]
    return min((int(match[1]) for match in matches), default=len(blocks) - 1), stack


def resolve_keyed_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> tuple[tuple[Target, ...], Target]:
    """The weights that a keyed editor edits, and its witness: the first one's counterpart in the last block.

    patterns: as for `resolve_targets`; without any, the MLP's last projection in a block of the lower middle.
    Raises TargetsError, also for whatever is not a decoder: only there a subject has one last token.
    """
    stack, blocks = find_stacks(model)[0]
    if patterns is None:
        block = round(KEYED_DEPTH * len(blocks))
        targets = resolve_targets(model, [rf"^{re.escape(stack)}\.{block}\.{MLP_BY_FAMILY[_family(model)]}$"])[-1:]
    else:
        targets = resolve_targets(model, patterns)
    last = re.sub(rf"^({re.escape(stack)})\.\d+\.", rf"\g<1>.{len(blocks) - 1}.", targets[0].module)
    (witness,) = resolve_targets(model, [f"^{re.escape(last)}$"])
    return targets, witness


def last_projection(model: nn.Module) -> Target:
    """What a late block writes last, of any architecture: its last linear layer as wide as the blocks are.

    Raises TargetsError where there is none.
    """
    stack, blocks = find_stacks(model)[-1]
    block = f"{stack}.{min(len(blocks) - 1, round(LATE_DEPTH * len(blocks)))}"
    width = model.config.get_text_config().hidden_size
    written = [
        name for name, module in model.named_modules()
        if name.startswith(f"{block}.") and _is_matrix(module) and _outputs(module) == width
    ]  # fmt: skip
    if not written:
        raise TargetsError(f"{block} has no linear layer with {width} outputs, so that none can be edited untrained")
    return _target(model, written[-1], model.get_submodule(written[-1]))


def resolve_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> tuple[Target, ...]:
    """Find the weights to edit, in the order of the model's own modules.

    patterns: regular expressions searched in module names; without any, the family's preset is used.
    Raises TargetsError when nothing matches, or when a match must not be edited.
    """
    if patterns is None:
        patterns = [_preset(model)]
    compiled = [_compile(pattern) for pattern in patterns]
    for expression in compiled:
        packed = [name for name, module in model.named_modules() if expression.search(name) and _is_packed(module)]
        if packed:
            raise TargetsError(
                f"the layer pattern {expression.pattern!r} matches {packed[0]}, whose weights are quantised; "
                "load the model dequantised",
                layer=packed[0],
            )
        if not any(expression.search(name) and _is_matrix(module) for name, module in model.named_modules()):
            raise TargetsError(_why_nothing_matches(model, expression), pattern=expression.pattern)
    return tuple(
        _target(model, name, module)
        for name, module in model.named_modules()
        if _is_matrix(module) and any(expression.search(name) for expression in compiled)
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetsError(
            f"the layer pattern {pattern!r} is not a regular expression: {error}", pattern=pattern
        ) from error


def _why_nothing_matches(model: nn.Module, expression: re.Pattern[str]) -> str:
    start = f"the layer pattern {expression.pattern!r} matches "
    for name, module in model.named_modules():
        if not expression.search(name):
            continue
        if isinstance(module, nn.Embedding):
            return f"{start}the embeddings {name}, which must not be edited; name projections inside the blocks"
        if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
            return f"{start}{name}, which fuses the matrices of several experts into one tensor; that cannot be edited"
    example = next((name for name, module in model.named_modules() if _is_matrix(module)), "none")
    return f"{start}no linear layer of {type(model).__name__}; its linear layers have names like {example}"


def named_targets(model: nn.Module, names: Sequence[str]) -> tuple[Target, ...]:
    """The weights of these names, in this order. Raises TargetsError naming every one that cannot be edited."""
    modules = {f"{name}.weight": module for name, module in model.named_modules() if _is_matrix(module)}
    if wrong := [name for name in names if name not in modules]:
        raise TargetsError(f"{type(model).__name__} has no linear layer with {', '.join(wrong)}", layer=wrong[0])
    return tuple(_target(model, name.removesuffix(".weight"), modules[name]) for name in names)


def _family(model: nn.Module) -> str:
    family = getattr(model.config, "model_type", "unknown")
    if family not in MLP_BY_FAMILY:
        raise TargetsError(
            f"no preset of layers for the architecture {family!r} (presets: {', '.join(sorted(MLP_BY_FAMILY))}); "
            "name the layers with --layers",
            architecture=family,
        )
    return family


def _preset(model: nn.Module) -> str:
    family = _family(model)
    stacks = find_stacks(model)
    count = EDITED_BLOCKS if len(stacks) == 1 else EDITED_BLOCKS_OF_EACH
    blocks = "|".join(
        rf"{re.escape(stack)}\.{index}"
        for stack, blocks in stacks
        for index in range(max(0, len(blocks) - count), len(blocks))
    )
    return rf"^({blocks})\.{MLP_BY_FAMILY[family]}$"


def _is_packed(module: nn.Module) -> bool:
    """Layers of GPTQ and AWQ hold their weights as packed integers under this name."""
    return hasattr(module, "qweight")


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _outputs(module: nn.Linear | Conv1D) -> int:
    return module.nf if isinstance(module, Conv1D) else module.out_features


def _target(model: nn.Module, name: str, module: nn.Module) -> Target:
    weight = module.weight
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    if not plain or weight.dtype not in EDITABLE_DTYPES:
        held = weight.dtype if plain else f"{type(weight.data).__name__}, {weight.dtype}"
        raise TargetsError(f"{name} holds quantised weights ({held}); load the model dequantised", layer=name)
    if module in (model.get_input_embeddings(), model.get_output_embeddings()):
        raise TargetsError(f"{name} is an embedding, which must not be edited; name projections in blocks", layer=name)
    owners = [owner for owner, other in model.named_modules() if getattr(other, "weight", None) is weight]
    if owners != [name]:
        raise TargetsError(
            f"{name} shares its weight with {', '.join(o for o in owners if o != name)}; editing it would edit both",
            layer=name,
        )
    stacks = [stack for stack, _ in find_stacks(model)]
    if not name.startswith(tuple(f"{stack}." for stack in stacks)):
        raise TargetsError(f"{name} is not inside the stack of blocks {' or '.join(stacks)}", layer=name)
    transposed = isinstance(module, Conv1D)
    d_in, d_out = weight.shape if transposed else reversed(weight.shape)
    return Target(f"{name}.weight", d_in, d_out, transposed)
