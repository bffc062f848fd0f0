"""From an archive of the original code to an editor for a base model.

Flow: Archive + configuration -> the base model's weights in the archive's order -> the variant that the networks'
names and sizes show -> MendEditor with the archive's tensors. Whatever does not fit is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from editors.errors import ArchiveMismatch
from editors.mend.archive import NAME, NETWORKS, Archive, four, key_of, parameters_of, statistics_of
from editors.mend.archive_config import ArchiveConfig
from editors.mend.editor import MendEditor
from editors.mend.variant import SIDES, Variant
from editors.targets import Target, named_targets, resolve_targets

_NO_STEP = -1000.0
"""Logarithm of a step of 0, whose exponential is 0 in any precision."""


def ordered_targets(
    archive: Archive, model: nn.Module, names: Sequence[str] = (), layers: Sequence[str] = ()
) -> tuple[Target, ...]:
    """The base model's weights in the order of the archive's steps.

    names: of its configuration. layers: patterns in their place, in the archive's order; several weights that one
    matches are in the model's. An archive that is not shared tells the order by itself.
    Raises ArchiveMismatch, or TargetsError where the model lacks a weight.
    """
    if layers:
        names = list(dict.fromkeys(t.name for layer in layers for t in resolve_targets(model, [layer])))
    own = archive.parameter_names
    if not (names or own):
        raise ArchiveMismatch(
            f"{archive.file} does not tell which weights it edits in which order, because its networks are shared: "
            "give the configuration that it was trained with by --inner-params, or name the layers in order by --layers"
        )
    if own and names and list(names) != own:
        raise ArchiveMismatch(f"{archive.file} edits {', '.join(own)} in this order, not {', '.join(names)}")
    return named_targets(model, names or own)


def editor_of(archive: Archive, targets: Sequence[Target], config: ArchiveConfig) -> MendEditor:
    """The archive's editor. targets: from `ordered_targets`. Raises ArchiveMismatch naming everything that is wrong."""
    editor = MendEditor(targets, _variant_of(archive, targets, config)).requires_grad_(False)
    _require_fit(archive, editor)
    state = editor.state_dict()
    for ours, theirs in parameters_of(editor):
        state[ours].copy_(archive.tensors[theirs])
    for prefix, side, statistics in statistics_of(editor):
        mean, deviation, m2, count = (archive.tensors[f"{prefix}.{name}"].float() for name in four(side))
        statistics.mean.copy_(mean)
        statistics.count.copy_(count[0])
        statistics.m2.copy_(m2)
        # The deviation is what the original uses: where the sums give another, they give way.
        other = deviation.double().square() * (statistics.count - 1).clamp(min=1)
        statistics.m2.copy_(torch.where(statistics.deviation == deviation, m2, other.float()))
    editor.log_steps.copy_(_logarithm(archive.steps.abs()))
    editor.signs.copy_(torch.where(archive.steps > 0, 1.0, -1.0))
    return editor


def _variant_of(archive: Archive, targets: Sequence[Target], config: ArchiveConfig) -> Variant:
    """What the networks' names and sizes show, and the configuration where they do not."""
    shapes = {key_of(target, archive.shared): target.shape for target in targets}
    problems = [f"no network for {key}" for key in shapes if key not in archive.keys]
    problems += [f"a network for {key}, which no named weight has" for key in archive.keys if key not in shapes]
    if problems:
        raise ArchiveMismatch(f"{archive.file} has {'; '.join(problems)}")
    matches = [match for match in map(NAME.fullmatch, archive.tensors) if match and match["mlp"]]
    found = {key: {match["mlp"] for match in matches if match["key"] == key} for key in shapes}
    fitting = [
        sides
        for sides in SIDES
        if all({NETWORKS[name] for name in Variant(sides=sides).widths(*shapes[key])} == found[key] for key in shapes)
    ]
    if not fitting:
        networks = "; ".join(f"{key}: {', '.join(sorted(found[key])) or 'none'}" for key in shapes)
        raise ArchiveMismatch(f"{archive.file} has networks that are no variant of MEND ({networks})")
    matrices = [archive.tensors[match[0]] for match in matches if match[0].endswith(".u")]
    variant = Variant(
        rank=max([1, *(u.shape[1] for u in matrices if u.dim() == 2)]),
        shared=archive.shared,
        normalise=config.normalise,
        sides=fitting[0],
        identity=config.identity,
        blocks=len({match["layer"] for match in matches}),
    )
    widest = max(width for shape in shapes.values() for width in variant.widths(*shape).values())
    shown = {
        "shared": variant.shared,
        "combine": variant.sides == "joint",
        "n_hidden": variant.blocks - 1,
        "rank": variant.rank,
    }
    stated = dict(config.stated)
    if type(stated.get("rank")) is int:
        stated["rank"] = min(stated["rank"], widest)  # no network's rank is more than its width
    wrong = [f"{name} is {shown[name]}, not {value}" for name, value in stated.items() if value != shown[name]]
    if wrong:
        raise ArchiveMismatch(f"{archive.file} was not made with this configuration: its {'; its '.join(wrong)}")
    return variant


def _require_fit(archive: Archive, editor: MendEditor) -> None:
    own = editor.state_dict()
    expected = {theirs: tuple(own[ours].shape) for ours, theirs in parameters_of(editor)}
    for prefix, side, statistics in statistics_of(editor):
        width = tuple(statistics.mean.shape)
        expected |= dict(zip((f"{prefix}.{name}" for name in four(side)), (width, width, width, (1,)), strict=True))
    networks = [name for name in archive.tensors if ".layers." in name]
    problems = [f"{name} is missing" for name in expected if name not in archive.tensors]
    problems += [f"{name} has no place in it" for name in networks if name not in expected]
    present = [name for name in expected if name in archive.tensors]
    for name in present:
        shape = tuple(archive.tensors[name].shape)
        if shape != expected[name]:
            modes = ".mode_" in name and f" ({shape[0]} modes for {expected[name][0]} named weights of this shape)"
            problems.append(f"{name} is {shape}, not {expected[name]}{modes or ''}")
    if len(archive.steps) != len(editor.targets):
        problems.append(f"it has {len(archive.steps)} edit_lrs for {len(editor.targets)} weights")
    if problems:
        raise ArchiveMismatch(f"{archive.file} does not fit the named weights: {'; '.join(problems)}")
    if any(archive.tensors[name].isnan().all() for name in present if name.endswith(("_mean", "_std"))):
        raise ArchiveMismatch(
            f"{archive.file} was never trained: its statistics are NaN; if it was made with norm: false, "
            "give its configuration by --inner-params, or --no-norm"
        )
    infinite = [name for name in present if not (archive.tensors[name].isfinite().all() or name.endswith("_s"))]
    infinite += [] if archive.steps.isfinite().all() else ["edit_lrs"]
    if infinite:
        raise ArchiveMismatch(f"{archive.file} holds NaN or infinity in {', '.join(infinite)}")


def _logarithm(steps: Tensor) -> Tensor:
    """The float32 numbers whose exponentials are nearest to `steps`, (targets,) from 0 on."""
    rounded = steps.double().log().float().clamp(min=_NO_STEP)
    above, below = torch.full_like(rounded, math.inf), torch.full_like(rounded, -math.inf)
    nearby = torch.stack([rounded, rounded.nextafter(above), rounded.nextafter(below)])  # (3, targets)
    best = (nearby.exp() - steps).abs().argmin(0)
    return nearby.gather(0, best[None])[0]
