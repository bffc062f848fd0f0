"""Whether a checkpoint is whole, is what its card says, and belongs to a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from editors.base_model import BaseModel
from editors.checkpoint import Editor, build_editor, made_of, read_card, read_weights
from editors.errors import BaseModelMismatch, CheckpointUnreadable, EditorsError, TargetsError
from editors.targets import named_targets

Found = TypeVar("Found")


@dataclass(frozen=True)
class Check:
    """One claim about a checkpoint, and in a line what was found."""

    name: str
    ok: bool
    detail: str


def verify_checkpoint(folder: Path, base: BaseModel | None = None) -> list[Check]:
    """Check all that can be checked: what needs something that could not be read is left out.

    base: the model that it should belong to; without one that is not checked.
    """
    checks: list[Check] = []

    def attempt(name: str, find: Callable[[], Found], describe: Callable[[Found], str]) -> Found | None:
        try:
            found = find()
        except EditorsError as error:
            checks.append(Check(name, False, str(error)))
            return None
        checks.append(Check(name, True, describe(found)))
        return found

    card = attempt("card", lambda: read_card(folder), lambda card: f"of the editor {card['name']}")
    if card is None:
        return checks
    raw = attempt("digest", lambda: read_weights(folder, card), lambda _: card["digest"])
    editor = None
    if raw is not None:
        editor = attempt(
            "tensors", lambda: build_editor(folder, card, raw), lambda e: f"{len(e.targets)} weights, {made_of(card)}"
        )
    if editor is not None:
        attempt("finite", lambda: _require_finite(editor), lambda count: f"{count} numbers")
    if base is not None:
        attempt("base model", lambda: _require_same(card, base), str)
    if base is not None and editor is not None:
        attempt("targets", lambda: _require_targets(editor, base), ", ".join)
    return checks


def _require_finite(editor: Editor) -> int:
    tensors = editor.state_dict()
    if infinite := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise CheckpointUnreadable(f"there is NaN or infinity in {', '.join(infinite)}")
    return sum(tensor.numel() for tensor in tensors.values())


def _require_same(card: dict[str, Any], base: BaseModel) -> str:
    if card["base_model"]["digest"] != base.digest:
        raise BaseModelMismatch(trained_for=card["base_model"]["digest"], loaded=base.digest)
    return base.digest


def _require_targets(editor: Editor, base: BaseModel) -> list[str]:
    there = named_targets(base.model, [target.name for target in editor.captured])
    other = [mine.name for mine, theirs in zip(editor.captured, there, strict=True) if mine != theirs]
    if other:
        raise TargetsError(f"the base model has other shapes or layouts of {', '.join(other)}")
    return [target.name for target in there]
