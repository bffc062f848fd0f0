"""Take the active edits elsewhere: as a LoRA adapter for `peft`, as a merged model, or as their factors alone.

Flow: rows of all active edits together, per weight -> reduced to their numerical rank -> A, B with BA = ΔW.
Pure: reads models and rows, and writes into the folder that it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from editors import DEFAULT_MODEL
from editors.base_model import BaseModel
from editors.errors import ExportUnwritable, NothingToExport
from editors.factors import digest
from editors.state import Rows
from editors.targets import Target
from editors.views import view

LARGEST_RANK = 512
"""Runtimes that serve adapters beside a base model go no further; vLLM's `max_lora_rank` ends here."""


def write_lora(base: BaseModel, targets: Sequence[Target], rows: Rows, folder: Path) -> dict[str, Any]:
    """Write a PEFT adapter of what all edits do together; weights that no edit changes are left out.

    rows: whose product is ΔW, from the editor's `joined`. The adapter holds it up to float32 rounding; a summed state
    also rounds each edit to its grid of 2^-32.
    Returns `rank`, the largest, `ranks` per module, and `warning`, None unless the rank is beyond LARGEST_RANK.
    Raises NothingToExport when the edits change nothing, ExportUnwritable.
    """
    pairs = {target.module: reduce_rank(*rows[target.name]) for target in targets}
    pairs = {module: (a, b) for module, (a, b) in pairs.items() if len(a)}
    if not pairs:
        raise NothingToExport(
            "no active edit changes a weight, so there is no adapter to write; make an edit first, "
            "or export `merged` or `factors`"
        )
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    rank = max(ranks.values())
    tensors = {
        **{f"{module}.lora_A.weight": a for module, (a, _) in pairs.items()},
        **{f"{module}.lora_B.weight": b for module, (_, b) in pairs.items()},
        **_head(base),
    }
    config = {
        "peft_type": "LORA",
        "task_type": TASKS[base.kind],
        "base_model_name_or_path": base.ref,
        "fan_in_fan_out": all(target.transposed for target in targets),
        **_ranked(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with writing(folder):
        save_file(
            {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        _write_json(folder / "adapter_config.json", config)
        (folder / "README.md").write_text(_adapter_card(base, rank), encoding="utf-8")
    return {"rank": rank, "ranks": ranks, "warning": _rank_warning(rank)}


def write_merged(base: BaseModel, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Write the whole model with these weights in place of its own, and the tokenizer: what `from_pretrained` reads.

    weights: per parameter name, in the parameter's own layout and dtype; they are stored bit for bit.
    Returns no facts. Raises ExportUnwritable.
    """
    model = view(base.model)  # saving writes to a model's configuration, and others are using that of the base
    if base.generation is not None:
        model.generation_config = base.generation
    with writing(folder):
        model.save_pretrained(folder, state_dict={**model.state_dict(), **weights})
        base.tokenizer.save_pretrained(folder)
    return {}


def write_factors(edits: Iterable[tuple[int, bytes]], folder: Path) -> list[dict[str, str]]:
    """Write the bytes of each edit as they are, to files named after the revision that the edit led to.

    edits: revision and factor bytes, taken one at a time.
    Returns `file`, relative to the folder, and `factors_digest` of each. Raises ExportUnwritable.
    """
    written = []
    with writing(folder):
        (folder / "factors").mkdir()
        for revision, raw in edits:
            file = f"factors/{revision:06d}.safetensors"
            (folder / file).write_bytes(raw)
            written.append({"file": file, "factors_digest": digest(raw)})
    return written


def write_index(facts: Mapping[str, Any], path: Path) -> None:
    """Write what an export is made of, as JSON. Raises ExportUnwritable."""
    with writing(path.parent):
        _write_json(path, facts)


def reduce_rank(u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest A (rank, d_in) and B (d_out, rank), float32, with BA = deltaᵀ u.

    u: (rows, d_in), delta: (rows, d_out), float64, any number of rows. Directions that float32 cannot hold beside the
    largest one are left out. A and B share the size of each direction evenly.
    """
    basis_in, rows_in = torch.linalg.qr(u.T)  # (d_in, k), (k, rows), with k = min(d_in, rows)
    basis_out, rows_out = torch.linalg.qr(delta.T)
    left, sizes, right = torch.linalg.svd(rows_out @ rows_in.T, full_matrices=False)
    kept = sizes > sizes[:1] * torch.finfo(torch.float32).eps
    root = sizes[kept].sqrt()
    a = root[:, None] * (right[kept] @ basis_in.T)
    b = (basis_out @ left[:, kept]) * root
    return a.float().contiguous(), b.float().contiguous()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The folder exists inside; whatever keeps files from being written becomes ExportUnwritable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ExportUnwritable(
            f"the export cannot be written to {folder} ({error}); it needs as much space as the files that it writes",
            folder=str(folder),
        ) from error


def _ranked(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Which modules have an adapter, and of which rank. Scaling is alpha / rank: 1, so both have the same pattern."""
    rank = max(ranks.values())
    lower = {module: each for module, each in ranks.items() if each != rank}
    return {
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": lower,
        "alpha_pattern": lower,
    }


TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
"""peft's names for the kinds of model."""


def _head(base: BaseModel) -> dict[str, Tensor]:
    """A classifier's head, unchanged, by the names that peft knows it by; empty for other models.

    peft takes the head for trained with the adapter, and demands a copy in the file.
    """
    if base.kind != "classifier":
        return {}
    heads = {name: module for name, module in base.model.named_modules() if name.endswith(("classifier", "score"))}
    return {
        f"{name}.{key}": tensor.detach().float().cpu().contiguous()
        for name, module in heads.items()
        for key, tensor in module.state_dict().items()
    }


def _rank_warning(rank: int) -> str | None:
    if rank <= LARGEST_RANK:
        return None
    return (
        f"the adapter's rank is {rank}; runtimes that serve LoRA adapters take {LARGEST_RANK} at most. "
        "Load it with peft, or export `merged`"
    )


def _adapter_card(base: BaseModel, rank: int) -> str:
    if base.ref == DEFAULT_MODEL:  # no hub knows it, and its weights are not those of the model that it was made from
        loading = f"from editors.base_model import load_base_model\n\nbase = load_base_model({base.ref!r}).model"
    else:
        kind = type(base.model).__name__
        loading = f"from transformers import {kind}\n\nbase = {kind}.from_pretrained({base.ref!r})"
    return f"""# LoRA adapter

What the active edits do to a base model: rank {rank} at most, scaling 1.
`edits.json` lists them.

| | |
|---|---|
| base model | `{base.ref}` |
| its weights, in the precision in which they are stored | `{base.digest}` |

The adapter is right for these weights alone. In Python, with `peft` 0.21 or newer:

```python
from peft import PeftModel
{loading}
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def _write_json(path: Path, facts: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
