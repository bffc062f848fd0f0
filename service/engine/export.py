"""One published revision as files that live without the service. See `editors.export` for the formats.

A revision's active edits are what the history says of it, and their factors never change in the ledger: only the live
weights themselves have to be copied, while they are read. Everything is written after that, while edits go on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from editors.base_model import BaseModel
from editors.checkpoint import Checkpoint
from editors.export import write_factors, write_index, write_lora, write_merged
from editors.factors import Factors
from editors.formats import INDEX, ExportFormat
from service.engine.history import Edit
from service.engine.requests import Published
from service.ledger import RedisLedger


@dataclass(frozen=True)
class Snapshot:
    """A published state. weights: of the live model, by name, those that may be edited; only `merged` needs them."""

    published: Published
    edits: Sequence[Edit]
    weights: Mapping[str, Tensor]


def write_export(
    snapshot: Snapshot,
    base: BaseModel,
    checkpoint: Checkpoint,
    ledger: RedisLedger,
    format: ExportFormat,
    folder: Path,
) -> dict[str, Any]:
    """Write a snapshot into an empty folder. Returns what its index says.

    Raises NothingToExport, ExportUnwritable, LedgerUnavailable, LedgerCorrupt.
    """
    stored = zip(
        (edit.applied.sequence for edit in snapshot.edits),
        ledger.factors(edit.applied for edit in snapshot.edits),
        strict=True,
    )
    edits = [_described(edit) for edit in snapshot.edits]
    facts: dict[str, Any] = {}
    match format:
        case ExportFormat.LORA:
            factors = [Factors.from_bytes(raw) for _, raw in stored]
            editor = checkpoint.editor
            facts = write_lora(base, editor.targets, editor.joined(factors), folder)
        case ExportFormat.MERGED:
            facts = write_merged(base, snapshot.weights, folder)
        case ExportFormat.FACTORS:
            files = write_factors(stored, folder)
            edits = [{**edit, **file} for edit, file in zip(edits, files, strict=True)]
    index = {
        "format": format,
        "revision": snapshot.published.revision,
        "digest": snapshot.published.digest,
        "base_model": {"ref": base.ref, "digest": base.digest},
        "editor": {"name": checkpoint.name, "digest": checkpoint.digest, "aggregate": checkpoint.aggregate},
        **facts,
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
        "edits": edits,
    }
    write_index(index, folder / INDEX)
    return index


def _described(edit: Edit) -> dict[str, Any]:
    applied = edit.applied
    return {
        "id": applied.edit_id,
        "revision": applied.sequence,
        "prompt": applied.prompt,
        "correction": applied.correction,
        "subject": applied.subject,
        "created_at": applied.created_at.isoformat(),
        "scale": applied.scale,
        "factors_digest": applied.factors_digest,
    }
