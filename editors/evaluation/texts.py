"""Running text on which perplexity is measured: a file's, or what the base model writes by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from editors.base_model import BaseModel
from editors.errors import DataFileError
from editors.evaluation.reader import Reader
from editors.mend.training.samples import own_samples
from editors.state import Rows
from editors.text import Tokens

CHUNK_TOKENS = 128
"""Length of the pieces of a file: each is predicted from its own beginning."""
MAX_CHUNKS = 32
OWN_TEXTS = 32
OWN_SEED = 1_000_003
"""Added to the seed, so that these are not the very samples that training keeps as they are."""


def read_text(base: BaseModel, path: Path) -> list[Tokens]:
    """The first pieces of a plain text file. Raises DataFileError where there is no piece, or no decoder."""
    if base.kind != "decoder":
        raise DataFileError(f"only a decoder continues running text, and this model is of the kind {base.kind}; "
                            "leave --text out", file=str(path))  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataFileError(f"cannot read the text {path}: {reason}", file=str(path)) from error
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = min(CHUNK_TOKENS, len(ids))
    if size < 2:
        raise DataFileError(f"{path} holds fewer than two tokens of text", file=str(path))
    starts = range(0, len(ids) - size + 1, size)[:MAX_CHUNKS]
    return [base.tokens(ids[start : start + 1], ids[start + 1 : start + size]) for start in starts]


def own_text(base: BaseModel, seed: int) -> list[Tokens]:
    """Texts of the base model's own; a classifier writes none."""
    if base.kind == "classifier":
        return []
    samples = own_samples(base, OWN_TEXTS, OWN_SEED + seed)
    if base.kind == "decoder":
        return [replace(sample, prompt=sample.prompt[:1], target=sample.prompt[1:]) for sample in samples]
    return samples


class TextLoss:
    """Mean negative log-likelihood of each text, in nats per token, on the base (`before`) and under edits."""

    def __init__(self, pristine: Reader, texts: Sequence[Tokens]) -> None:
        self._texts = texts
        self.digest = hashlib.sha256(repr([(text.prompt, text.target) for text in texts]).encode()).hexdigest()
        self._states: list[Tensor] = pristine.below(texts)
        self.before = self._losses(pristine, None)
        self._after: list[list[float]] = []

    def measure(self, reader: Reader, edit: Rows | None = None) -> None:
        """Take in what the texts cost under one more set of edits."""
        if self._texts:
            self._after.append(self._losses(reader, edit))

    @property
    def measured(self) -> int:
        return len(self._after)

    @property
    def after(self) -> list[float]:
        """Each text's loss, averaged over what was measured."""
        return [sum(column) / len(column) for column in zip(*self._after, strict=True)]

    def _losses(self, reader: Reader, edit: Rows | None) -> list[float]:
        edits = [edit] * len(self._texts) if edit else None
        return [-reading.log_probability for reading in reader.read(self._texts, self._states, edits)]
