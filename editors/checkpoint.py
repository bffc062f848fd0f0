"""A trained editor on disk: a folder with `editor.safetensors` and its card, in JSON and in Markdown.

The card says what the editor was trained for and on, by which command, and what it measured; `notes`, in Markdown, are
its author's own. What gives the tensors their meaning (base model, targets, variant, signs) stands in the header of the
weights' file too, under its digest. The networks' matrices are stored in float16 (training ends by measuring the stored
ones) unless the caller wants them exact, everything else in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from editors.base_model import BaseModel
from editors.errors import BaseModelMismatch, CheckpointNotFound, CheckpointUnreadable
from editors.mend.completed import CompletedEditor
from editors.mend.editor import MendEditor
from editors.mend.keyed import KeyedEditor
from editors.mend.variant import Variant
from editors.targets import Target
from editors.training_free.editor import TrainingFreeEditor

WEIGHTS = "editor.safetensors"
CARD = "card.json"
FORMAT = 1
STATEMENT = "mend"
"""Key of the safetensors file's metadata under which it says what its tensors mean."""
MEND = "mend"
METHODS = (MEND, TrainingFreeEditor.method)
"""How an editor makes edits, by its card; one that does not say it is MEND's."""
DEFAULT_MARGIN = 2.0
"""Nats; chosen on validation data, where less costs paraphrases and more costs neighbours."""


Editor = MendEditor | KeyedEditor | CompletedEditor | TrainingFreeEditor


@dataclass(frozen=True)
class Checkpoint:
    """A loaded editor. digest: `sha256:…` of its weights' file. aggregate: how its edits add up."""

    editor: Editor
    folder: Path
    name: str
    digest: str
    aggregate: str
    margin_nats: float
    """Of the scale search: how far ahead each token of a correction should be (see `editors.scale`)."""
    card: dict[str, Any]

    @property
    def trained(self) -> bool:
        return not isinstance(self.editor, TrainingFreeEditor)

    @property
    def notice(self) -> str | None:
        """What whoever uses this editor should know."""
        if self.trained:
            return None
        return (
            "the editor is training-free: its edits hold on their own prompts, and seldom on other wordings; "
            "train one for this base model with `mend train`, and name it with MEND_EDITOR"
        )


def save_checkpoint(
    folder: Path, editor: Editor, base: BaseModel, facts: dict[str, Any], matrices: torch.dtype = torch.float16
) -> None:
    """Write the editor and its card, each replaced whole.

    facts: what the trainer knows: data, configuration, command, results. matrices: how the networks' are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "name": folder.name,
        "margin_nats": DEFAULT_MARGIN,
        **facts,
        "format": FORMAT,
        "base_model": {"ref": base.ref, "digest": base.digest, "parameters": base.parameters},
        "aggregate": editor.aggregate,
        **_shape(editor),
        "targets": [asdict(target) for target in editor.targets],
    }
    tensors = {name: _stored(name, tensor, matrices) for name, tensor in editor.state_dict().items()}
    raw = save_tensors(tensors, metadata={STATEMENT: json.dumps(_statement(card), sort_keys=True)})
    card["digest"] = _digest(raw)
    _replace(folder / WEIGHTS, raw)
    write_card(folder, card)


def _shape(editor: Editor) -> dict[str, Any]:
    """What an editor of its kind is made of, beside its targets."""
    if isinstance(editor, TrainingFreeEditor):
        return {"method": editor.method}
    if isinstance(editor, CompletedEditor):
        return {**_shape(editor.keyed), "late": [target.name for target in editor.late.targets]}
    if isinstance(editor, KeyedEditor):
        return {"rank": editor.rank, "witness": asdict(editor.witness)}
    variant = asdict(editor.variant)
    return {"rank": variant.pop("rank"), "variant": variant, "signs": [int(sign) for sign in editor.signs]}


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write card.json and card.md."""
    _replace(folder / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    _replace(folder / "card.md", _markdown(card).encode())


def load_checkpoint(folder: str | Path, base: BaseModel) -> Checkpoint:
    """Load an editor for a base model.

    Raises CheckpointNotFound, CheckpointUnreadable, or BaseModelMismatch when it was trained for another model.
    """
    folder = Path(folder)
    card = read_card(folder)
    if card["base_model"]["digest"] != base.digest:
        raise BaseModelMismatch(trained_for=card["base_model"]["digest"], loaded=base.digest)
    editor = build_editor(folder, card, read_weights(folder, card))
    editor.requires_grad_(False).eval().to(base.device)
    return Checkpoint(editor, folder, card["name"], card["digest"], card["aggregate"], card["margin_nats"], card)


def read_weights(folder: Path, card: dict[str, Any]) -> bytes:
    """The weights' file of a card. Raises CheckpointNotFound, or CheckpointUnreadable where the digest is another."""
    path = folder / WEIGHTS
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointNotFound(f"{path} is missing; fetch the checkpoint again", file=str(path)) from error
    if _digest(raw) != card["digest"]:
        raise CheckpointUnreadable(
            f"{path} has the digest {_digest(raw)}, its card says {card['digest']}: "
            "the file is damaged or belongs to another card; fetch the checkpoint again",
            file=str(path),
        )
    return raw


def build_editor(folder: Path, card: dict[str, Any], raw: bytes) -> Editor:
    """The editor that a card describes, with the tensors of its file. Raises CheckpointUnreadable."""
    path = folder / WEIGHTS
    try:
        tensors = load_tensors(raw)
        _require_same(_statement(card), raw)
        editor = _empty(card)
        template = editor.state_dict()
        editor.load_state_dict({name: tensor.to(template[name].dtype) for name, tensor in tensors.items()})
    except (SafetensorError, RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointUnreadable(f"{path} does not hold the editor of its card ({error})", file=str(path)) from error
    return editor


def _empty(card: dict[str, Any]) -> Editor:
    """An editor of the card's shape. Raises KeyError, TypeError or ValueError for a card of none."""
    targets = [Target(**target) for target in card["targets"]]
    if card.get("method", MEND) == TrainingFreeEditor.method:
        return TrainingFreeEditor(targets)
    if card["aggregate"] == KeyedEditor.aggregate:
        late = [target for target in targets if target.name in card.get("late", ())]
        keyed = KeyedEditor(
            [target for target in targets if target not in late], Target(**card["witness"]), card["rank"]
        )
        return CompletedEditor(keyed, TrainingFreeEditor(late)) if late else keyed
    if card["aggregate"] != MendEditor.aggregate:
        raise ValueError(f"edits cannot be joined by {card['aggregate']!r}")
    return MendEditor(targets, Variant(rank=card["rank"], **card.get("variant", {})), card.get("signs"))


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a checkpoint folder. Raises CheckpointNotFound or CheckpointUnreadable."""
    path = folder / CARD
    try:
        card = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(
            f"there is no editor checkpoint in {folder} ({CARD} is missing); train one with `mend train`, "
            "or point MEND_EDITOR at a folder that holds one",
            file=str(path),
        ) from error
    except ValueError as error:
        raise CheckpointUnreadable(
            f"{path} is not JSON ({error}); fetch the checkpoint again", file=str(path)
        ) from error
    if not isinstance(card, dict):
        raise CheckpointUnreadable(f"{path} holds no card but {type(card).__name__}", file=str(path))
    method = card.get("method", MEND)
    if method not in METHODS:
        raise CheckpointUnreadable(
            f"{path} is of an editor by {method!r}; this version knows {', '.join(METHODS)}", file=str(path)
        )
    required = {"format", "name", "digest", "base_model", "aggregate", "margin_nats", "targets"}
    missing = (required | {"rank"} if method == MEND else required) - set(card)
    if missing or card["format"] != FORMAT:
        problem = f"lacks {', '.join(sorted(missing))}" if missing else f"has format {card['format']}, not {FORMAT}"
        raise CheckpointUnreadable(f"{path} {problem}", file=str(path))
    margin = card["margin_nats"]
    if not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise CheckpointUnreadable(f"{path} has margin_nats {margin!r}, not a number from 0 on", file=str(path))
    if not isinstance(card["base_model"], dict) or "digest" not in card["base_model"]:
        raise CheckpointUnreadable(f"{path} does not say the digest of its base model", file=str(path))
    return card


def _statement(card: dict[str, Any]) -> dict[str, Any]:
    """What gives the tensors their meaning."""
    names = ("rank", "variant", "targets", "signs")
    if card.get("method", MEND) == TrainingFreeEditor.method:
        names = ("method", "aggregate", "targets")
    elif card["aggregate"] == KeyedEditor.aggregate:
        names = ("aggregate", "rank", "targets", "witness", *(["late"] if "late" in card else []))
    stated = {name: card.get(name) for name in names}
    return {"base_model": card["base_model"]["digest"], **stated}


def _require_same(statement: dict[str, Any], raw: bytes) -> None:
    """A card must say what the file says of itself; files of the first release say nothing.

    raw: a safetensors file: the length of its header in 8 bytes, little end first, then the header in JSON.
    """
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    said = header.get("__metadata__", {}).get(STATEMENT)
    if said is not None and (said := json.loads(said)) != statement:
        differing = [name for name in sorted(statement.keys() | said.keys()) if statement.get(name) != said.get(name)]
        raise ValueError(f"the card says another {', '.join(differing)}; has it been edited by hand?")


def _stored(name: str, tensor: torch.Tensor, matrices: torch.dtype) -> torch.Tensor:
    matrix = name.endswith((".u", ".v", ".weight")) or name.rpartition(".")[2].startswith(("whitening", "natural"))
    return tensor.detach().cpu().to(matrices if matrix else tensor.dtype).contiguous()


def _digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _replace(path: Path, raw: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(raw)
    os.replace(draft, path)


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def made_of(card: dict[str, Any]) -> str:
    """What an editor is made of, in words."""
    if card.get("method", MEND) == TrainingFreeEditor.method:
        return "the natural gradient, without training"
    if card["aggregate"] == KeyedEditor.aggregate:
        completed = ", completed at the answer in a late block without training" if "late" in card else ""
        return f"rank {card['rank']}, keyed at the subject's last token{completed}"
    return str(Variant(rank=card["rank"], **card.get("variant", {})))


def _markdown(card: dict[str, Any]) -> str:
    """The card for people: one table per section, and the measured results as they were reported."""
    base = card["base_model"]
    lines = [
        f"# {card['name']}",
        "",
        f"{'A MEND editor (arXiv:2110.11309)' if card.get('method', MEND) == MEND else 'An editor'} for "
        f"`{base['ref']}`, {len(card['targets'])} weights: {made_of(card)}. "
        f"Several edits are joined by `{card['aggregate']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{base['digest']}` |",
        f"| editor | `{card['digest']}` |",
        *(
            f"| {role} data | {entry['name']} ({entry['layout']}, {entry['examples']} examples), "
            f"`sha256:{entry['digest']}` |"
            for role in ("training", "validation")
            for entry in card.get(f"{role}_data", [])
        ),
    ]
    if "imported_from" in card:
        origin = card["imported_from"]
        lines += ["", "Imported from an archive of the original code:", "", "| | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {origin[name]} |" for name in ("file", "digest", "made_for", "step")]
        lines += [f"| {name} | {value:.4g} |" for name, value in origin["val_stats"].items()]
    if "command" in card:
        lines += ["", "Trained by:", "", "```", card["command"], "```"]
    if "validation" in card:
        lines += ["", "Validation during training (teacher-forced):", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in card["validation"].items()]
    if "settled" in card:
        head = list(card["settled"][0])
        lines += ["", "When the networks were trained, chosen on held-out edits (first the one that was taken):", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in card["settled"]:
            ridge, strength, fading, edits, *figures = row.values()
            lines.append(
                f"| {ridge:g} | {strength:g} | {fading:g} | {edits} | " + " | ".join(map(_shown, figures)) + " |"
            )
    if "notes" in card:
        lines += ["", card["notes"]]
    for result in card.get("results", []):
        lines += ["", f"Measured by `{result['command']}`:", "", result["table"]]
    if "config" in card:
        lines += ["", "Configuration:", "", "| option | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in card["config"].items()]
    return "\n".join(lines) + "\n"
